"""Can a ViT learn from images without labels? Masked patch prediction, the paper's section 4.6."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator

from ..data.images import EvaluationImages, normalize
from ..data.loaders import evaluation_loader
from ..evaluation.figures import extract
from ..evaluation.probing import few_shot
from ..inspection.drawing import BLUE, GRAY, ORANGE, bare, new_figure
from ..model.modeling_hf_vit import HFViTModel
from ..training.recipe import TrainConfig
from ..training.run import Run, data_of
from .figures import draw_dots
from .study import Cell, Finding, Results, Study, cell_of, is_more, with_architecture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNTRAINED, SUPERVISED, MASKED = "untrained", "supervised", "masked patches"
BOTH, LONGER = "masked patches, then supervised", "supervised, twice as long"
# Each with what it begins from.
TRAININGS = {UNTRAINED: None, SUPERVISED: None, MASKED: None, BOTH: MASKED, LONGER: None}
COLORS = {UNTRAINED: GRAY, SUPERVISED: BLUE, MASKED: ORANGE, BOTH: ORANGE, LONGER: BLUE}
SHOTS = (5, 10)  # images a class
DRAWN_FROM = 100  # images a class, the first ones: features of all would take longer than a small training
FIGURES = {**{f"shots_{number}": f"{number}-shot" for number in SHOTS}, "accuracy": "with its head"}
MOST = f"shots_{SHOTS[-1]}"


class Pretraining(Study):
    name = "pretraining"
    title = "Masked patch prediction"
    question = (
        "As BERT fills in words, a ViT can fill in patches: half of them are corrupted, and it predicts their mean "
        "colour, 3 bits a channel. In the paper ViT-B/16 reaches 79.9 % on ImageNet behind such a pre-training: 2 "
        "points more than from scratch, and 4 less than behind a supervised one. Here all see the same images: masked "
        "patches are predicted for as many steps as a supervised training has, and a supervised one follows; it is "
        "held against one from scratch, and against one from scratch that sees as many images as both in turn. "
        f"Few-shot accuracy is of a linear regression on frozen features, the mean over all patches, from {SHOTS[0]} "
        f"or {SHOTS[-1]} images a class; what trained supervised has seen all labels before."
    )
    source = "Dosovitskiy et al. 2021, section 4.6 and appendix B.1.2 (JFT-300M, then ImageNet)"

    def cells(self, config: TrainConfig) -> Iterator[Cell]:
        # The class token learns nothing from masked patches, so the head reads the patches too.
        base = with_architecture(config, pooling="mean")
        masked = replace(with_architecture(base, mim_objective="mean_color"), task="masked_patches", mask_ratio=0.5)
        longer = replace(base, epochs=2 * base.epochs, max_steps=base.max_steps and 2 * base.max_steps)
        recipes = {
            UNTRAINED: replace(base, learning_rate=0.0, max_steps=1),
            SUPERVISED: base,
            MASKED: masked,
            BOTH: base,
            LONGER: longer,
        }
        for training, parent in TRAININGS.items():
            yield Cell(cell(training), recipes[training], begins_from=None if parent is None else cell(parent))

    def measure(self, run: Run) -> dict[str, Any]:
        return few_shot_figures(run)

    def table(self, results: Results) -> list[list[str]]:
        rows = [["training", "images seen", *(f"{name}, %" for name in FIGURES.values())]]
        for training in TRAININGS:
            seen = images_seen(results, training)
            accuracies = [cell_of(results.spread(figure, **cell(training))) for figure in FIGURES]
            rows.append([training, "–" if seen is None else f"{seen:,}", *accuracies])
        return rows

    def plot(self, results: Results) -> "Figure":
        drawn = new_figure(9.5, 2.9)
        axes = drawn.subplots(1, len(FIGURES), sharey=True)
        for axis, (figure, name) in zip(axes, FIGURES.items(), strict=True):
            for place, training in enumerate(TRAININGS):
                values = results.by_seed(figure, **cell(training)).values()
                draw_dots(axis, place, list(values), COLORS[training])
            axis.set(title=name, xlabel="accuracy, %")
            bare(axis, grid="both")
        axes[0].set_yticks(range(len(TRAININGS)), TRAININGS)
        axes[0].set_ylim(len(TRAININGS) - 0.5, -0.5)
        return drawn

    def findings(self, results: Results) -> list[Finding]:
        def judge(claim: str, first: str, second: str, figure: str) -> Finding:
            difference = results.difference(cell(first), cell(second), figure)
            return is_more(claim, difference, f"{FIGURES[figure]}: {first}, less {second}")

        return [
            judge("Masked patches teach features that labels can be read from", MASKED, UNTRAINED, MOST),
            judge("Supervised training teaches better ones", SUPERVISED, MASKED, MOST),
            judge("Supervised training ends better behind masked patches", BOTH, SUPERVISED, "accuracy"),
            judge("It does so for the same number of images in total", BOTH, LONGER, "accuracy"),
        ]


def cell(training: str) -> dict[str, Any]:
    return {"training": training}


def images_seen(results: Results, training: str) -> int | None:
    """Return the number of images that a training saw, those of what it began from among them."""
    if training == UNTRAINED:
        return 0
    spread = results.spread("images_seen", **cell(training))
    parent = TRAININGS[training]
    before = 0 if parent is None else images_seen(results, parent)
    return None if spread is None or before is None else before + round(spread.mean)


def few_shot_figures(run: Run) -> dict[str, float]:
    """Return few-shot accuracies of a run's encoder, by number of shots; without those that a class is too small for.

    Its features are the mean over all patches.
    """
    config, accelerator = run.config, Accelerator()
    # Read again: what masked patches learn from has no labels.
    data = data_of(replace(config, task="classification", train_repeats=1.0, streaming=False))
    encoder = HFViTModel.from_pretrained(run.output_dir).to(accelerator.device)
    to_model = partial(normalize, processor=run.processor)
    features = []
    for images in (first_of_each_class(data.train, str(data.columns[1]), DRAWN_FROM), data.evaluation):
        loader = evaluation_loader(EvaluationImages(images, data.columns, run.processor), config.batch_size, 0)
        features.append(extract(encoder, loader, accelerator, to_model, encoder.pooler)[:2])
    measured = few_shot(features[0], features[1], SHOTS)["shots"]
    return {f"shots_{number}": result["mean"] for number, result in measured.items()}


def first_of_each_class(images: Any, label_column: str, number: int) -> Any:
    """Return a dataset with at most so many images of every class."""
    labels = torch.tensor(images[label_column][:])
    places = [(labels == label).nonzero().squeeze(1)[:number] for label in labels.unique()]
    return images.select(torch.cat(places).sort().values.tolist())
