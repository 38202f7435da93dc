"""What helps a ViT against too few images: regularisation, augmentation? The question of "How to train your ViT?"."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ..inspection.drawing import INK, MARKERS, SERIES, bare, new_figure
from ..training.recipe import TrainConfig
from .study import (
    Cell,
    Difference,
    Factors,
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

FEW, ALL = 0.1, 1.0  # shares of the images
NONE = "none"


@dataclass(frozen=True)
class Method:
    """Fields of the architecture and of the recipe that a method sets."""

    architecture: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)


REGULARIZATION = {
    "stochastic depth 0.1": Method(architecture={"drop_path_rate": 0.1}),
    "dropout 0.1": Method(architecture={"hidden_dropout_prob": 0.1}),
}
AUGMENTATION = {
    "mixup 0.2": Method(recipe={"mixup": 0.2}),
    # Of the set, the operations alone.
    "RandAugment (2, 10)": Method(recipe={"augmentation": "augreg_light2", "mixup": 0.0}),
}
METHODS = {NONE: Method(), **REGULARIZATION, **AUGMENTATION}
OTHERS = [name for name in METHODS if name != NONE]


class Regularization(Study):
    name = "regularization"
    title = "Regularisation and augmentation"
    question = (
        "A ViT overfits small data. Steiner et al. regularise (stochastic depth and dropout of 0.1) and augment "
        "(mixup, RandAugment) ViTs of many sizes. On ImageNet-1k any of it helps; on ImageNet-21k, ten times as many "
        "images, for 30 epochs it hurts all but the largest models; and augmentation helps more often than "
        "regularisation. Here one at a time is added to the recipe, on a tenth of the images and on all of them, for "
        "the same number of steps."
    )
    source = "Steiner et al. 2022, How to train your ViT? (arXiv:2106.10270), section 4.4, figure 4"

    def cells(self, config: TrainConfig) -> Iterator[Cell]:
        # As the recipe has it, without what is added here.
        base = with_architecture(replace(config, mixup=0.0), drop_path_rate=0.0, hidden_dropout_prob=0.0)
        for share in (FEW, ALL):
            for name, method in METHODS.items():
                recipe = replace(with_architecture(base, **method.architecture), **method.recipe)
                yield Cell(cell(name, share), with_share(recipe, share))

    def table(self, results: Results) -> list[list[str]]:
        heading = ["added"]
        for share in (FEW, ALL):
            heading += [f"{_images(results, share)}, %", "less none"]
        rows = [heading]
        for name in METHODS:
            row = [name]
            for share in (FEW, ALL):
                gain = None if name == NONE else results.difference(cell(name, share), cell(NONE, share))
                row += [cell_of(results.spread(**cell(name, share))), "–" if gain is None else gain.points()]
            rows.append(row)
        return rows

    def plot(self, results: Results) -> "Figure":
        drawn = new_figure(7.6, 3.4)
        axis = bare(drawn.subplots(), grid="x")
        axis.axvline(0, color=INK, lw=1)
        for number, share in enumerate((FEW, ALL)):
            gains = [results.difference(cell(name, share), cell(NONE, share)) for name in OTHERS]
            known = [(place, gain) for place, gain in enumerate(gains) if gain is not None]
            # Of one seed there is no interval.
            errors = [100 * (gain.high - gain.mean) if gain.number > 1 else 0.0 for _, gain in known]
            axis.errorbar(
                [100 * gain.mean for _, gain in known],
                [place + 0.24 * (number - 0.5) for place, _ in known],
                xerr=errors,
                color=SERIES[number],
                marker=MARKERS[number],
                ms=6,
                lw=1.5,
                ls="none",
                capsize=3,
                label=_images(results, share),
            )
        axis.set_yticks(range(len(OTHERS)), OTHERS)
        axis.set_ylim(len(OTHERS) - 0.5, -0.5)
        axis.set(xlabel="accuracy less that without, percentage points (95 % interval)")
        axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), title="learned from")
        return drawn

    def findings(self, results: Results) -> list[Finding]:
        few, many = f"with {100 * FEW:g} % of the images", "with all images"
        kinds = {"augmentation": AUGMENTATION, "regularisation": REGULARIZATION}
        helping = [
            is_more(
                f"{few.capitalize()} {kind} helps",
                Difference.by_seed(mean_of(results, names, FEW), mean_of(results, [NONE], FEW)),
                f"mean of {' and '.join(names)}, less none",
            )
            for kind, names in kinds.items()
        ]
        gains = {share: gains_of(results, OTHERS, share) for share in (FEW, ALL)}
        of_kind = {kind: gains_of(results, names, FEW) for kind, names in kinds.items()}
        return [
            *helping,
            is_more(
                f"{many.capitalize()} they hurt at the same number of steps",
                Difference.by_seed(mean_of(results, [NONE], ALL), mean_of(results, OTHERS, ALL)),
                "none, less the mean of all others",
            ),
            is_more(
                f"They help more {few} than {many}",
                Difference.by_seed(gains[FEW], gains[ALL]),
                f"mean gain {few}, less that {many}",
            ),
            is_more(
                f"{few.capitalize()} augmentation helps more than regularisation",
                Difference.by_seed(of_kind["augmentation"], of_kind["regularisation"]),
                "mean gain of the one, less that of the other",
            ),
        ]


def cell(name: str, share: float) -> Factors:
    return {"added": name, "share": share}


def mean_of(results: Results, names: Collection[str], share: float) -> dict[int, float]:
    """Return the mean accuracy of cells for each seed that all of them have."""
    by_seed = [results.by_seed("accuracy", **cell(name, share)) for name in names]
    seeds = set.intersection(*(set(accuracies) for accuracies in by_seed))
    return {seed: fmean(accuracies[seed] for accuracies in by_seed) for seed in sorted(seeds)}


def gains_of(results: Results, names: Collection[str], share: float) -> dict[int, float]:
    """Return by how much the mean accuracy of cells is more than that of none, for each seed that all have."""
    means, without = mean_of(results, names, share), mean_of(results, [NONE], share)
    return {seed: means[seed] - without[seed] for seed in means if seed in without}


def _images(results: Results, share: float) -> str:
    images = images_of(results, share=share)
    return f"{100 * share:g} % of the images" if images is None else f"{images:,} images"
