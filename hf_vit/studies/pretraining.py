"""Can a ViT be pre-trained without labels? Masked patch prediction, the paper's section 4.6, and an autoencoder."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator

from ..data.images import EvaluationImages, normalize
from ..data.loaders import evaluation_loader
from ..evaluation.metrics import extract_features
from ..evaluation.probing import few_shot
from ..inspection.drawing import BLUE, GRAY, ORANGE, SERIES, Figure, bare, new_figure
from ..model.modeling_hf_vit import HFViTModel
from ..training.recipe import TrainConfig
from ..training.run import Run, data_of
from .figures import ACCURACY, DASH, draw_dots, percent
from .study import Cell, Finding, Results, Study, is_more, with_architecture

UNTRAINED, SUPERVISED, MASKED, AUTOENCODER = "untrained", "supervised", "masked patches", "masked autoencoder"
BOTH, LONGER = "masked patches, then supervised", "supervised, twice as long"
TUNED = "masked autoencoder, then supervised"
# Each with the training that it starts from.
TRAININGS = {
    UNTRAINED: None,
    SUPERVISED: None,
    MASKED: None,
    AUTOENCODER: None,
    BOTH: MASKED,
    TUNED: AUTOENCODER,
    LONGER: None,
}
COLORS = {UNTRAINED: GRAY, SUPERVISED: BLUE, MASKED: ORANGE, BOTH: ORANGE, LONGER: BLUE}
COLORS |= dict.fromkeys((AUTOENCODER, TUNED), SERIES[2])
SHOTS = (5, 10)  # images per class
DRAWN_FROM = 100  # first images of each class: extracting features of all would take longer than training
FIGURES = {**{f"shots_{number}": f"{number}-shot" for number in SHOTS}, "accuracy": "classifier"}
MOST = f"shots_{SHOTS[-1]}"


class Pretraining(Study):
    name = "pretraining"
    question = (
        "As BERT predicts masked words, a ViT can predict masked patches: half of the patches are corrupted, and "
        "their mean colour is predicted in 3 bits per channel. In the paper, ViT-B/16 reaches 79.9 % on ImageNet "
        "after such pre-training: 2 points more than from scratch, and 4 points less than after supervised "
        "pre-training. Here masked patch prediction is trained for as many steps as supervised training, on the "
        "same images, and supervised training follows. So does a masked autoencoder (arXiv:2111.06377), whose encoder "
        "sees a quarter of the patches. They are compared with supervised training from scratch, for as many steps "
        "and for twice as many. Few-shot accuracy is the accuracy of a linear regression "
        f"fitted to {SHOTS[0]} or {SHOTS[-1]} images per class, on frozen features averaged over all patches. The "
        "supervised models have already seen all labels."
    )

    def cells(self, config: TrainConfig) -> Iterator[Cell]:
        # Masked patch prediction does not train the class token, so the classifier reads the mean of the patches.
        base = with_architecture(config, pooling="mean")
        masked = replace(with_architecture(base, mim_objective="mean_color"), task="masked_patches", mask_ratio=0.5)
        decoder = {
            "decoder_hidden_size": max(32, base.model_config.get("hidden_size", 192) // 2),
            "decoder_num_hidden_layers": 2,
            "decoder_num_attention_heads": 2,
        }
        hidden = with_architecture(base, mim_objective="autoencoder", **decoder)
        longer = replace(base, epochs=2 * base.epochs, max_steps=base.max_steps and 2 * base.max_steps)
        recipes = {
            UNTRAINED: replace(base, learning_rate=0.0, max_steps=1),
            SUPERVISED: base,
            MASKED: masked,
            AUTOENCODER: replace(hidden, task="masked_patches", mask_ratio=0.75),
            BOTH: base,
            TUNED: base,
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
            accuracies = [percent(results.spread(figure, **cell(training))) for figure in FIGURES]
            rows.append([training, DASH if seen is None else f"{seen:,}", *accuracies])
        return rows

    def plot(self, results: Results) -> Figure:
        drawing = new_figure(9.5, 2.9)
        axes = drawing.subplots(1, len(FIGURES), sharey=True)
        for axis, (figure, name) in zip(axes, FIGURES.items(), strict=True):
            for row, training in enumerate(TRAININGS):
                draw_dots(axis, row, results.by_seed(figure, **cell(training)).values(), COLORS[training])
            axis.set(title=name, xlabel=ACCURACY)
            bare(axis, grid="both")
        axes[0].set_yticks(range(len(TRAININGS)), TRAININGS)
        axes[0].set_ylim(len(TRAININGS) - 0.5, -0.5)
        return drawing

    def findings(self, results: Results) -> list[Finding]:
        def judge(claim: str, first: str, second: str, figure: str) -> Finding:
            difference = results.difference(cell(first), cell(second), figure)
            return is_more(claim, difference, f"{FIGURES[figure]}: {first}, minus {second}")

        return [
            judge("Masked patch prediction learns features that help classification", MASKED, UNTRAINED, MOST),
            judge("Supervised training learns better features", SUPERVISED, MASKED, MOST),
            judge("Supervised training is better after masked patch prediction", BOTH, SUPERVISED, "accuracy"),
            judge(
                "Masked patch prediction, then supervised training, is better for the same total number of images",
                BOTH,
                LONGER,
                "accuracy",
            ),
            judge("A masked autoencoder learns better features than masked patches", AUTOENCODER, MASKED, MOST),
            judge("Supervised training is better after a masked autoencoder", TUNED, SUPERVISED, "accuracy"),
        ]


def cell(training: str) -> dict[str, Any]:
    return {"training": training}


def images_seen(results: Results, training: str) -> int | None:
    """Return the number of images that a training saw, including the training that it starts from."""
    if training == UNTRAINED:
        return 0
    spread = results.spread("images_seen", **cell(training))
    parent = TRAININGS[training]
    before = 0 if parent is None else images_seen(results, parent)
    return None if spread is None or before is None else before + round(spread.mean)


def few_shot_figures(run: Run) -> dict[str, float]:
    """Return the few-shot accuracies of a run's encoder, where every class has enough images.

    The features are the mean over all patches.
    """
    config, accelerator = run.config, Accelerator()
    # Open the data again: masked patch prediction reads no labels.
    data = data_of(replace(config, task="classification", train_repeats=1.0, streaming=False))
    encoder = HFViTModel.from_pretrained(run.output_dir).to(accelerator.device)
    to_model = partial(normalize, processor=run.processor)
    features = []
    for images in (first_of_each_class(data.train, str(data.columns[1]), DRAWN_FROM), data.evaluation):
        loader = evaluation_loader(EvaluationImages(images, data.columns, run.processor), config.batch_size, 0)
        features.append(extract_features(encoder, loader, accelerator, to_model, encoder.pooler)[:2])
    measured = few_shot(features[0], features[1], SHOTS)["shots"]
    return {f"shots_{number}": result["mean"] for number, result in measured.items()}


def first_of_each_class(images: Any, label_column: str, number: int) -> Any:
    """Return a dataset of the first `number` images of every class."""
    labels = torch.tensor(images[label_column][:])
    places = [(labels == label).nonzero().squeeze(1)[:number] for label in labels.unique()]
    return images.select(torch.cat(places).sort().values.tolist())
