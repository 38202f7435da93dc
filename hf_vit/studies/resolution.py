"""Does it pay to learn from small images and to fine-tune on larger ones? The paper's section 3.2."""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from ..inspection.drawing import bare, new_figure
from ..training.recipe import TrainConfig
from ..training.tasks import architecture_of
from .figures import draw_series, exponent_of, number_of
from .study import Cell, Factors, Finding, Results, Spread, Study, cell_of, is_more

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of the recipe's image size, which is the largest: many data sets have no more detail to show.
SCALES = (0.5, 0.75, 1.0)
# Of a fine-tuning, as shares of the recipe's.
EPOCHS, LEARNING_RATE = 1 / 3, 1 / 10
SCRATCH, TUNED = "from scratch", "fine-tuned"
KEPT, RESAMPLED, NEW = "kept", "resampled", "new"
MARGIN = 0.01


class Resolution(Study):
    name = "resolution"
    title = "Fine-tuning on larger images"
    question = (
        "A larger image is more patches of the same size, and costs more. The paper fine-tunes on larger images than "
        "it pre-trains on, with position embeddings resampled to the larger grid; Touvron et al. find that this "
        "gains accuracy, and that training on smaller images saves compute. Here a model learns from images of half "
        "the recipe's side and is fine-tuned for a third of its epochs, at a tenth of its learning rate, on images "
        "of that size and of larger ones, with positions resampled or new. Beside them are models that learn from "
        "the larger images alone, for all epochs."
    )
    source = "Dosovitskiy et al. 2021, section 3.2; Touvron et al. 2019 (arXiv:1906.06423)"

    def cells(self, config: TrainConfig) -> Iterator[Cell]:
        shapes = shapes_of(config)
        sizes = [name_of(shape) for shape in shapes]
        for size, shape in zip(sizes, shapes, strict=True):
            yield Cell(scratch(size), replace(config, image_size=shape))
        tuning = replace(
            config,
            epochs=EPOCHS * config.epochs,
            max_steps=None if config.max_steps is None else max(1, round(EPOCHS * config.max_steps)),
            warmup_epochs=EPOCHS * config.warmup_epochs,
            learning_rate=LEARNING_RATE * config.learning_rate,
            position_std=None,  # with it positions would always be new
        )
        for size, shape in zip(sizes, shapes, strict=True):
            for positions in (KEPT,) if size == sizes[0] else (RESAMPLED, NEW):
                recipe = replace(tuning, image_size=shape, resample_positions=positions != NEW)
                yield Cell(tuned(size, positions), recipe, begins_from=scratch(sizes[0]))

    def table(self, results: Results) -> list[list[str]]:
        exponent = exponent_of(results)
        compute = f"compute, pre-training included, 10^{exponent} FLOP"
        rows = [["pixels", "trained", "positions", "accuracy, %", compute, "seconds"]]
        for models in series_of(results).values():
            for model in models:
                words = [model["size"], model["trained"], model.get("positions", "–")]
                flops = number_of(spent(results, "training_flops", model), ".3g", 10.0**-exponent)
                seconds = number_of(spent(results, "seconds", model), ".1f")
                rows.append([*words, cell_of(results.spread(**model)), flops, seconds])
        return rows

    def plot(self, results: Results) -> "Figure":
        drawn = new_figure(9.5, 3.8)
        over_sizes, over_compute = drawn.subplots(1, 2, sharey=True)
        sizes, exponent = results.levels("size"), exponent_of(results)
        for number, (label, models) in enumerate(series_of(results).items()):
            spreads = [results.spread(**model) for model in models]
            draw_series(over_sizes, [sizes.index(model["size"]) for model in models], spreads, label, number)
            costs = [spent(results, "training_flops", model) for model in models]
            places = [0.0 if cost is None else cost.mean / 10**exponent for cost in costs]
            draw_series(over_compute, places, spreads, label, number)
            for model, place, spread in zip(models, places, spreads, strict=True):
                if spread is not None:
                    point = place, 100 * spread.mean
                    over_compute.annotate(model["size"], point, (5, -9), textcoords="offset points", fontsize=7)
        over_sizes.set_xticks(range(len(sizes)), sizes)
        over_sizes.set(xlabel="pixels of an image, height x width", ylabel="accuracy, % (mean, deviation)")
        over_sizes.set_title("over the size of the images")
        over_compute.set_xlabel(f"compute, pre-training included, $10^{{{exponent}}}$ FLOP")
        over_compute.set_title("over what it cost")
        over_sizes.legend(frameon=False, fontsize=8)
        for axis in (over_sizes, over_compute):
            bare(axis, grid="both").margins(x=0.12)
        return drawn

    def findings(self, results: Results) -> list[Finding]:
        small, *larger = results.levels("size")
        large = larger[-1] if larger else "no larger size"
        return [
            is_more(
                "On larger images, resampled positions are better than new ones",
                results.difference(tuned(large, RESAMPLED), tuned(large, NEW)),
                f"resampled less new at {large}",
            ),
            is_more(
                "Fine-tuning on larger images is better than on those of the same size",
                results.difference(tuned(large, RESAMPLED), tuned(small, KEPT)),
                f"{large} less {small}",
            ),
            saves(results, large),
        ]


def shapes_of(config: TrainConfig) -> list[list[int]]:
    """Return the sizes of the images, `[height, width]` in pixels, whole patches, from small to the recipe's own."""
    architecture = architecture_of(config)
    patch, grid = architecture.patch_shape, architecture.grid_size
    grids = dict.fromkeys(tuple(max(1, round(scale * number)) for number in grid) for scale in SCALES)
    return [[number * side for number, side in zip(grid, patch, strict=True)] for grid in grids]


def name_of(shape: list[int]) -> str:
    return "x".join(map(str, shape))


def scratch(size: str) -> dict[str, str]:
    """Return the factors of the model that learned from images of a size alone."""
    return {"trained": SCRATCH, "size": size}


def tuned(size: str, positions: str) -> dict[str, str]:
    """Return the factors of the model that was fine-tuned on images of a size."""
    return {"trained": TUNED, "size": size, "positions": positions}


def series_of(results: Results) -> dict[str, list[dict[str, str]]]:
    """Return the models in series, by what these are called, each from small images to large ones."""
    small, *larger = results.levels("size")
    return {
        SCRATCH: [scratch(size) for size in (small, *larger)],
        f"{TUNED}, positions {RESAMPLED}": [tuned(small, KEPT), *(tuned(size, RESAMPLED) for size in larger)],
        f"{TUNED}, positions {NEW}": [tuned(size, NEW) for size in larger],
    }


def spent(results: Results, figure: str, model: Factors) -> Spread | None:
    """Return a cost of a model over its seeds; what it began from is part of it."""
    costs = results.by_seed(figure, **model)
    if model["trained"] == TUNED:
        before = results.by_seed(figure, **scratch(results.levels("size")[0]))
        costs = {seed: cost + before[seed] for seed, cost in costs.items() if seed in before}
    return Spread.of(list(costs.values())) if costs else None


def saves(results: Results, size: str) -> Finding:
    """Judge whether pre-training on small images is cheaper at the same accuracy, or nearly the same."""
    claim = f"It costs less than learning from large images alone, and at most {100 * MARGIN:g} point of accuracy"
    difference = results.difference(tuned(size, RESAMPLED), scratch(size))
    ours, theirs = (spent(results, "training_flops", model) for model in (tuned(size, RESAMPLED), scratch(size)))
    if difference is None or ours is None or theirs is None:
        return Finding(claim, None, "not measured")
    share = ours.mean / theirs.mean
    holds = False if share >= 1 or difference.high < -MARGIN else True if difference.low > -MARGIN else None
    return Finding(
        claim, holds, f"fine-tuned less from scratch at {size}: {difference.points()}, for {share:.0%} of the compute"
    )
