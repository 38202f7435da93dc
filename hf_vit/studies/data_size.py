"""How many images does a ViT need before it is better than a ResNet? The paper's section 4.3."""

from collections.abc import Iterator
from math import gcd, lcm
from typing import TYPE_CHECKING, Any

from ..inspection.drawing import bare, new_figure
from ..training.recipe import TrainConfig
from ..training.tasks import architecture_of, build_model
from .figures import draw_series
from .resnet import build_resnet
from .study import (
    Cell,
    Difference,
    Finding,
    Results,
    Study,
    cell_of,
    images_of,
    is_more,
    with_architecture,
    with_share,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARES = (0.01, 0.03, 0.1, 0.3, 1.0)
FEWEST, ALL = SHARES[0], SHARES[-1]
MODELS = ("ViT", "hybrid", "ResNet")
STEM_WIDTH, STEM_STRIDE = 64, 16  # of the paper's hybrids, and the most that small ones have


def as_hybrid(config: TrainConfig) -> TrainConfig:
    """Return a recipe whose model begins with stages of a ResNet, in the place of a layer."""
    vit = architecture_of(config)
    patch_shape = [lcm(4, side) for side in vit.patch_shape]  # the root alone divides by 4
    common = gcd(*patch_shape)
    stride = min(STEM_STRIDE, common & -common)  # the largest power of 2 in it
    return with_architecture(
        config,
        patch_size=patch_shape,
        stem_layers=[1] * (stride.bit_length() - 2),
        stem_width=min(STEM_WIDTH, max(32, vit.hidden_size // 128 * 32)),
        num_hidden_layers=max(1, vit.num_hidden_layers - 1),
    )


class DataSize(Study):
    name = "data-size"
    title = "Accuracy against the number of training images"
    question = (
        "A convolution knows that neighbours belong together and that a thing may be anywhere; a ViT has to learn it. "
        "In the paper ResNets are better on small data and stop improving sooner: ViT-B/32 is much worse than "
        "ResNet50 on 9 million images of JFT-300M, and better on 90 million. Hybrids, a ViT behind stages of a "
        "ResNet, are slightly better than a ViT where there is little compute (figure 5). Here all train for as many "
        "steps, on nested shares of the images. The ResNet is BiT's, as wide as about the ViT's FLOPs allow; the "
        "hybrid has a stage of it for a layer. The draw of the share is the same for all seeds."
    )
    source = "Dosovitskiy et al. 2021, section 4.3, figures 3 and 4; for hybrids section 4.4, figure 5"

    def cells(self, config: TrainConfig) -> Iterator[Cell]:
        for share in SHARES:
            recipe = with_share(config, share)
            recipes = {"ViT": recipe, "hybrid": as_hybrid(recipe), "ResNet": recipe}
            for model in MODELS:
                build = build_resnet if model == "ResNet" else build_model
                yield Cell(cell(model, share), recipes[model], build=build)

    def table(self, results: Results) -> list[list[str]]:
        rows = [["training images", *(f"{model}, %" for model in MODELS)]]
        for share in SHARES:
            accuracies = [cell_of(results.spread(**cell(model, share))) for model in MODELS]
            images = images_of(results, share=share)
            rows.append([f"{100 * share:g} %" + (f" ({images:,})" if images else ""), *accuracies])
        for name, figure, unit in (
            ("parameters, thousands", "parameters", 1e3),
            ("MFLOP an image", "forward_flops", 1e6),
        ):
            spreads = [results.spread(figure, **cell(model, ALL)) for model in MODELS]
            rows.append([name, *("–" if spread is None else f"{spread.mean / unit:,.1f}" for spread in spreads)])
        return rows

    def plot(self, results: Results) -> "Figure":
        drawn = new_figure(6.4, 4.0)
        axis = bare(drawn.subplots(), grid="both")
        places = {share: images_of(results, share=share) for share in SHARES}
        known = {share: images for share, images in places.items() if images}
        for number, model in enumerate(MODELS):
            spreads = [results.spread(**cell(model, share)) for share in known]
            draw_series(axis, list(known.values()), spreads, model, number)
        axis.set_xscale("log")
        axis.set_xticks(list(known.values()), [f"{images:,}\n{100 * share:g} %" for share, images in known.items()])
        axis.minorticks_off()
        axis.set(xlabel="training images, and their share", ylabel="accuracy, % (mean, deviation)")
        axis.legend(frameon=False)
        return drawn

    def findings(self, results: Results) -> list[Finding]:
        def judge(claim: str, first: str, second: str, share: float) -> Finding:
            difference = results.difference(cell(first, share), cell(second, share))
            return is_more(claim, difference, f"{first} less {second}, {100 * share:g} % of the images")

        few = f"With {100 * FEWEST:g} % of the images"
        return [
            judge(f"{few} the ResNet is better than the ViT", "ResNet", "ViT", FEWEST),
            judge("With all images the ViT is better than the ResNet", "ViT", "ResNet", ALL),
            is_more(
                "More images help the ViT more than the ResNet",
                gain_over(results, "ViT", "ResNet"),
                f"from {100 * FEWEST:g} % of the images to all, gain of the ViT less that of the ResNet",
            ),
            judge(f"{few} the hybrid is better than the ViT", "hybrid", "ViT", FEWEST),
            judge("So it is with all, where compute is little", "hybrid", "ViT", ALL),
        ]


def cell(model: str, share: float) -> dict[str, Any]:
    return {"model": model, "share": share}


def gain_over(results: Results, first: str, second: str) -> Difference | None:
    """Return by how much more a model gains from all images instead of the fewest than another does."""
    gains = []
    for model in (first, second):
        few, many = (results.by_seed("accuracy", **cell(model, share)) for share in (FEWEST, ALL))
        gains.append({seed: many[seed] - few[seed] for seed in many.keys() & few.keys()})
    return Difference.by_seed(gains[0], gains[1])
