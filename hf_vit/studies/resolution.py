"""Does it pay to train on small images and to fine-tune on larger ones? The paper's section 3.2."""

from collections.abc import Iterator
from dataclasses import replace
from operator import add

from ..inspection.drawing import Figure, bare, new_figure
from ..training.recipe import TrainConfig
from ..training.tasks import architecture_of
from .figures import ACCURACY, DASH, draw_series, exponent_of, number, percent
from .study import Cell, Factors, Finding, Results, Spread, Study, is_more, over_seeds

# Image sizes relative to the recipe's, which is the largest: many data sets have no more detail.
SCALES = (0.5, 0.75, 1.0)
# Fine-tuning relative to the recipe.
EPOCHS, LEARNING_RATE = 1 / 3, 1 / 10
SCRATCH, TUNED = "from scratch", "fine-tuned"
KEPT, RESAMPLED, NEW = "kept", "resampled", "new"
MARGIN = 0.01


class Resolution(Study):
    name = "resolution"
    question = (
        "A larger image has more patches of the same size, and costs more compute. The paper fine-tunes at a higher "
        "resolution than it pre-trains at, with position embeddings resampled to the larger grid. Touvron et al. find "
        "that this gains accuracy, and that training on smaller images saves compute. Here a model is trained on "
        "images of half the recipe's size, then fine-tuned for a third of the recipe's epochs at a tenth of its "
        "learning rate, on images of that size and of larger ones, with resampled or with new position embeddings. It "
        "is compared with models trained from scratch on the larger images for all epochs."
    )

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
            position_std=None,  # otherwise positions would always be initialized anew
        )
        for size, shape in zip(sizes, shapes, strict=True):
            for positions in (KEPT,) if size == sizes[0] else (RESAMPLED, NEW):
                recipe = replace(tuning, image_size=shape, resample_positions=positions != NEW)
                yield Cell(tuned(size, positions), recipe, begins_from=scratch(sizes[0]))

    def table(self, results: Results) -> list[list[str]]:
        exponent = exponent_of(results)
        compute = f"compute including pre-training, 10^{exponent} FLOP"
        rows = [["image size", "trained", "positions", "accuracy, %", compute, "seconds"]]
        for model in (model for models in series_of(results).values() for model in models):
            factors = [model["size"], model["trained"], model.get("positions", DASH)]
            flops = number(spent(results, "training_flops", model), ".3g", 10.0**-exponent)
            seconds = number(spent(results, "seconds", model), ".1f")
            rows.append([*factors, percent(results.spread(**model)), flops, seconds])
        return rows

    def plot(self, results: Results) -> Figure:
        figure = new_figure(9.5, 3.8)
        by_size, by_compute = figure.subplots(1, 2, sharey=True)
        sizes, exponent = results.levels("size"), exponent_of(results)
        for index, (label, models) in enumerate(series_of(results).items()):
            spreads = [results.spread(**model) for model in models]
            draw_series(by_size, [sizes.index(model["size"]) for model in models], spreads, label, index)
            spent_on = [spent(results, "training_flops", model) for model in models]
            costs = [0.0 if spread is None else spread.mean / 10**exponent for spread in spent_on]
            draw_series(by_compute, costs, spreads, label, index)
            for model, cost, spread in zip(models, costs, spreads, strict=True):
                if spread is not None:
                    point = cost, 100 * spread.mean
                    by_compute.annotate(model["size"], point, (5, -9), textcoords="offset points", fontsize=7)
        by_size.set_xticks(range(len(sizes)), sizes)
        by_size.set(xlabel="image size (height x width), pixels", ylabel=ACCURACY, title="by image size")
        by_compute.set_xlabel(f"compute including pre-training, $10^{{{exponent}}}$ FLOP")
        by_compute.set_title("by training compute")
        by_size.legend(frameon=False, fontsize=8)
        for axis in (by_size, by_compute):
            bare(axis, grid="both").margins(x=0.12)
        return figure

    def findings(self, results: Results) -> list[Finding]:
        small, *larger = results.levels("size")
        large = larger[-1] if larger else "no larger size"
        return [
            is_more(
                "On larger images, resampled position embeddings are better than new ones",
                results.difference(tuned(large, RESAMPLED), tuned(large, NEW)),
                f"resampled minus new at {large}",
            ),
            is_more(
                "Fine-tuning on larger images is better than on images of the same size",
                results.difference(tuned(large, RESAMPLED), tuned(small, KEPT)),
                f"{large} minus {small}",
            ),
            saves(results, large),
        ]


def shapes_of(config: TrainConfig) -> list[list[int]]:
    """Return the image sizes `[height, width]` in pixels, multiples of the patch, up to the recipe's own."""
    architecture = architecture_of(config)
    patch, grid = architecture.patch_shape, architecture.grid_size
    grids = dict.fromkeys(tuple(max(1, round(scale * number)) for number in grid) for scale in SCALES)
    return [[number * side for number, side in zip(grid, patch, strict=True)] for grid in grids]


def name_of(shape: list[int]) -> str:
    return "x".join(map(str, shape))


def scratch(size: str) -> dict[str, str]:
    """Return the factors of the model trained from scratch on images of a size."""
    return {"trained": SCRATCH, "size": size}


def tuned(size: str, positions: str) -> dict[str, str]:
    """Return the factors of the model fine-tuned on images of a size."""
    return {"trained": TUNED, "size": size, "positions": positions}


def series_of(results: Results) -> dict[str, list[dict[str, str]]]:
    """Return the models as labelled series, each from small images to large ones."""
    small, *larger = results.levels("size")
    return {
        SCRATCH: [scratch(size) for size in (small, *larger)],
        f"{TUNED}, {RESAMPLED} positions": [tuned(small, KEPT), *(tuned(size, RESAMPLED) for size in larger)],
        f"{TUNED}, {NEW} positions": [tuned(size, NEW) for size in larger],
    }


def spent(results: Results, figure: str, model: Factors) -> Spread | None:
    """Return a cost of a model over its seeds, including the pre-training that it starts from."""
    costs = results.by_seed(figure, **model)
    if model["trained"] == TUNED:
        costs = over_seeds(add, costs, results.by_seed(figure, **scratch(results.levels("size")[0])))
    return Spread.of(costs.values())


def saves(results: Results, size: str) -> Finding:
    """Judge whether pre-training on small images costs less compute at nearly the same accuracy."""
    claim = (
        f"Fine-tuning costs less than training on large images only, and at most {100 * MARGIN:g} point of accuracy"
    )
    difference = results.difference(tuned(size, RESAMPLED), scratch(size))
    ours, theirs = (spent(results, "training_flops", model) for model in (tuned(size, RESAMPLED), scratch(size)))
    if difference is None or ours is None or theirs is None:
        return Finding(claim, None, "not measured", "inconclusive")
    share = ours.mean / theirs.mean
    holds = False if share >= 1 or difference.high < -MARGIN else True if difference.low > -MARGIN else None
    measured = f"fine-tuned minus from scratch at {size}: {difference.points()}, for {share:.0%} of the compute"
    return Finding(claim, holds, measured, "inconclusive")
