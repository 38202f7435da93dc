"""Which regularisation and augmentation help a ViT on few images? The question of "How to train your ViT?"."""

from collections.abc import Collection, Iterator
from dataclasses import replace
from operator import sub
from statistics import fmean
from typing import Any

from ..inspection.drawing import INK, MARKERS, SERIES, Figure, bare, new_figure
from ..training.recipe import TrainConfig
from .figures import DASH, percent
from .study import (
    BySeed,
    Cell,
    Difference,
    Factors,
    Finding,
    Results,
    Study,
    is_more,
    over_seeds,
    with_architecture,
    with_share,
)

FEW, ALL = 0.1, 1.0  # shares of the images
NONE = "none"


# Fields of the architecture that a method changes, and fields of the recipe.
REGULARIZATION = {
    "stochastic depth 0.1": {"drop_path_rate": 0.1},
    "dropout 0.1": {"hidden_dropout_prob": 0.1},
}
AUGMENTATION: dict[str, dict[str, Any]] = {
    "mixup 0.2": {"mixup": 0.2},
    "RandAugment (2, 10)": {"augmentation": "augreg_light2", "mixup": 0.0},  # without the mixup of that set
}
OTHERS = [*REGULARIZATION, *AUGMENTATION]
METHODS = [NONE, *OTHERS]


class Regularization(Study):
    name = "regularization"
    question = (
        "A ViT overfits small data sets. Steiner et al. train ViTs of many sizes with regularisation (stochastic "
        "depth and dropout of 0.1) and augmentation (mixup, RandAugment). On ImageNet-1k all of them help. On "
        "ImageNet-21k, with ten times as many images and 30 epochs, they hurt all but the largest models. "
        "Augmentation helps more often than regularisation. Here each method is added to the recipe alone, with a "
        "tenth of the images and with all of them, for the same number of steps."
    )

    def cells(self, config: TrainConfig) -> Iterator[Cell]:
        # The recipe without any of the methods.
        base = with_architecture(replace(config, mixup=0.0), drop_path_rate=0.0, hidden_dropout_prob=0.0)
        for share in (FEW, ALL):
            for name in METHODS:
                recipe = with_architecture(base, **REGULARIZATION.get(name, {}))
                recipe = replace(recipe, **AUGMENTATION.get(name, {}))
                yield Cell(cell(name, share), with_share(recipe, share))

    def table(self, results: Results) -> list[list[str]]:
        heading = ["added"]
        for share in (FEW, ALL):
            heading += [f"{_images(results, share)}, %", "difference from none"]
        rows = [heading]
        for name in METHODS:
            row = [name]
            for share in (FEW, ALL):
                gain = None if name == NONE else results.difference(cell(name, share), cell(NONE, share))
                row += [percent(results.spread(**cell(name, share))), DASH if gain is None else gain.points()]
            rows.append(row)
        return rows

    def plot(self, results: Results) -> Figure:
        figure = new_figure(7.6, 3.4)
        axis = bare(figure.subplots(), grid="x")
        axis.axvline(0, color=INK, lw=1)
        for index, share in enumerate((FEW, ALL)):
            gains = [results.difference(cell(name, share), cell(NONE, share)) for name in OTHERS]
            known = [(row, gain) for row, gain in enumerate(gains) if gain is not None]
            axis.errorbar(
                [100 * gain.mean for _, gain in known],
                [row + 0.24 * (index - 0.5) for row, _ in known],
                xerr=[100 * (gain.high - gain.mean) if gain.number > 1 else 0.0 for _, gain in known],
                color=SERIES[index],
                marker=MARKERS[index],
                ms=6,
                lw=1.5,
                ls="none",
                capsize=3,
                label=_images(results, share),
            )
        axis.set_yticks(range(len(OTHERS)), OTHERS)
        axis.set_ylim(len(OTHERS) - 0.5, -0.5)
        axis.set(xlabel="difference in accuracy, percentage points (95 % interval)")
        axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), title="trained on")
        return figure

    def findings(self, results: Results) -> list[Finding]:
        few, many = f"with {100 * FEW:g} % of the images", "with all images"
        kinds = {"augmentation": AUGMENTATION, "regularisation": REGULARIZATION}
        gains = {kind: gains_of(results, methods, FEW) for kind, methods in kinds.items()}
        with_few, with_all = (gains_of(results, OTHERS, share) for share in (FEW, ALL))
        helping = [
            is_more(
                f"{few.capitalize()}, {kind} helps",
                Difference.by_seed(gains[kind], dict.fromkeys(gains[kind], 0.0)),
                f"mean of {' and '.join(methods)}, minus none",
            )
            for kind, methods in kinds.items()
        ]
        return [
            *helping,
            is_more(
                f"{many.capitalize()} and the same number of steps, augmentation and regularisation hurt",
                Difference.by_seed(dict.fromkeys(with_all, 0.0), with_all),
                "none minus the mean of all methods",
            ),
            is_more(
                f"Augmentation and regularisation help more {few} than {many}",
                Difference.by_seed(with_few, with_all),
                f"mean gain {few} minus mean gain {many}",
            ),
            is_more(
                f"{few.capitalize()}, augmentation helps more than regularisation",
                Difference.by_seed(gains["augmentation"], gains["regularisation"]),
                "mean gain of augmentation minus mean gain of regularisation",
            ),
        ]


def cell(name: str, share: float) -> Factors:
    return {"added": name, "share": share}


def gains_of(results: Results, names: Collection[str], share: float) -> BySeed:
    """Return the mean accuracy of some methods minus the accuracy without any, for each seed that all of them have."""
    accuracies = [results.by_seed("accuracy", **cell(name, share)) for name in names]
    mean = over_seeds(lambda *values: fmean(values), *accuracies)
    return over_seeds(sub, mean, results.by_seed("accuracy", **cell(NONE, share)))


def _images(results: Results, share: float) -> str:
    images = results.train_images(share=share)
    return f"{100 * share:g} % of the images" if images is None else f"{images:,} images"
