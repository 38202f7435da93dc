"""How many images does a ViT need before it is better than a ResNet? The paper's section 4.3."""

from collections.abc import Iterator
from math import gcd, lcm
from operator import sub
from typing import Any

from ..inspection.drawing import Figure, bare, new_figure
from ..training.recipe import TrainConfig
from ..training.tasks import architecture_of, build_model
from .figures import ACCURACY, draw_series, number, percent
from .resnet import build_resnet
from .study import (
    BySeed,
    Cell,
    Difference,
    Finding,
    Results,
    Study,
    is_more,
    over_seeds,
    with_architecture,
    with_share,
)

SHARES = (0.01, 0.03, 0.1, 0.3, 1.0)
FEWEST, ALL = SHARES[0], SHARES[-1]
MODELS = ("ViT", "hybrid", "ResNet")
STEM_WIDTH, STEM_STRIDE = 64, 16  # as in the paper's hybrids; smaller models have at most these


def as_hybrid(config: TrainConfig) -> TrainConfig:
    """Return a recipe whose model has stages of a ResNet in place of one layer."""
    vit = architecture_of(config)
    patch_shape = [lcm(4, side) for side in vit.patch_shape]  # the stem's first convolution and pooling divide by 4
    common = gcd(*patch_shape)
    stride = min(STEM_STRIDE, common & -common)  # the largest power of 2 that divides it
    return with_architecture(
        config,
        patch_size=patch_shape,
        stem_layers=[1] * (stride.bit_length() - 2),
        stem_width=min(STEM_WIDTH, max(32, vit.hidden_size // 128 * 32)),
        num_hidden_layers=max(1, vit.num_hidden_layers - 1),
    )


class DataSize(Study):
    name = "data-size"
    question = (
        "Convolutions have locality and translation equivariance built in; a ViT has to learn them. In the paper, "
        "ResNets are better on small data and stop improving sooner: ViT-B/32 is much worse than ResNet50 on 9 "
        "million images of JFT-300M, and better on 90 million. Hybrids, which feed the features of a ResNet to a "
        "ViT, are slightly better than a ViT at small compute budgets (figure 5). Here all models are trained for "
        "the same number of steps on nested shares of the images. The ResNet is a BiT whose width is chosen to "
        "match the ViT's FLOPs; the hybrid has ResNet stages in place of one layer. All seeds use the same "
        "images."
    )

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
            images = results.train_images(share=share)
            name = f"{100 * share:g} %" + (f" ({images:,})" if images else "")
            rows.append([name, *(percent(results.spread(**cell(model, share))) for model in MODELS)])
        for name, figure, scale in (
            ("parameters, thousands", "parameters", 1e-3),
            ("MFLOP per image", "forward_flops", 1e-6),
        ):
            rows.append(
                [name, *(number(results.spread(figure, **cell(model, ALL)), ",.1f", scale) for model in MODELS)]
            )
        return rows

    def plot(self, results: Results) -> Figure:
        figure = new_figure(6.4, 4.0)
        axis = bare(figure.subplots(), grid="both")
        known = {share: images for share in SHARES if (images := results.train_images(share=share))}
        for index, model in enumerate(MODELS):
            spreads = [results.spread(**cell(model, share)) for share in known]
            draw_series(axis, list(known.values()), spreads, model, index)
        axis.set_xscale("log")
        axis.set_xticks(list(known.values()), [f"{images:,}\n{100 * share:g} %" for share, images in known.items()])
        axis.minorticks_off()
        axis.set(xlabel="training images (number and share)", ylabel=ACCURACY)
        axis.legend(frameon=False)
        return figure

    def findings(self, results: Results) -> list[Finding]:
        def judge(claim: str, first: str, second: str, share: float) -> Finding:
            difference = results.difference(cell(first, share), cell(second, share))
            return is_more(claim, difference, f"{first} minus {second}, {100 * share:g} % of the images")

        few = f"With {100 * FEWEST:g} % of the images"
        gains = {model: gain_of(results, model) for model in MODELS}
        return [
            judge(f"{few}, the ResNet is better than the ViT", "ResNet", "ViT", FEWEST),
            judge("With all images, the ViT is better than the ResNet", "ViT", "ResNet", ALL),
            is_more(
                "More images help the ViT more than the ResNet",
                Difference.by_seed(gains["ViT"], gains["ResNet"]),
                f"gain from {100 * FEWEST:g} % of the images to all, ViT minus ResNet",
            ),
            judge(f"{few}, the hybrid is better than the ViT", "hybrid", "ViT", FEWEST),
            judge("With all images and little compute, the hybrid is better than the ViT", "hybrid", "ViT", ALL),
        ]


def cell(model: str, share: float) -> dict[str, Any]:
    return {"model": model, "share": share}


def gain_of(results: Results, model: str) -> BySeed:
    """Return how much more accurate a model is with all images than with the fewest, for each seed."""
    return over_seeds(sub, *(results.by_seed("accuracy", **cell(model, share)) for share in (ALL, FEWEST)))
