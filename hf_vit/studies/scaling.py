"""In which dimension is a larger ViT worth its compute? The paper's appendix D.2 and section 4.4."""

from collections.abc import Iterable, Iterator, Sequence
from math import inf, log2
from statistics import correlation, linear_regression
from typing import Any

from ..inspection.drawing import GRAY, INK, MARKERS, SERIES, Axes, Figure, bare, new_figure
from ..training.recipe import TrainConfig
from ..training.tasks import architecture_of
from .figures import ACCURACY, draw_series, exponent_of, number, percent
from .study import (
    BySeed,
    Cell,
    Difference,
    Factors,
    Finding,
    Results,
    Spread,
    Study,
    all_are_more,
    is_more,
    with_architecture,
)

BASE, DIMENSIONS = "base", ("depth", "width", "MLP", "patch")
SCALES = (0.5, 2.0)


class Scaling(Study):
    name = "scaling"
    question = (
        "A ViT can be scaled in depth, in width, in the width of its MLPs, and in the number of tokens by smaller "
        "patches. The paper scales each dimension alone from one base model: depth gains most, width least, and "
        "smaller patches give robust gains without more parameters, which suggests that compute predicts accuracy "
        "better than the number of parameters does. Here each dimension is halved and doubled, and every model is "
        "trained on the same number of images."
    )

    def cells(self, config: TrainConfig) -> Iterator[Cell]:
        base = architecture_of(config)
        size = f"{base.num_hidden_layers} layers, width {base.hidden_size}, MLP {base.intermediate_size}"
        yield Cell({"dimension": BASE, "size": f"{size}, patch {_pixels(base.patch_shape)}"}, config)
        for scale in SCALES:
            for dimension, size, fields in scaled(config, scale):
                yield Cell({"dimension": dimension, "size": size}, with_architecture(config, **fields))

    def table(self, results: Results) -> list[list[str]]:
        exponent = exponent_of(results)
        heading = ["scaled", "size", "parameters", f"training, 10^{exponent} FLOP", "seconds", "accuracy, %"]
        rows = [[*heading, "gain per doubling of compute, points"]]
        for dimension in (BASE, *DIMENSIONS):
            gain = percent(Spread.of(slopes_of(results, dimension).values()))
            for model in models_of(results, [dimension]):
                costs = [
                    number(results.spread("parameters", **model), ",.0f"),
                    number(results.spread("training_flops", **model), ".3g", 10.0**-exponent),
                    number(results.spread("seconds", **model), ".1f"),
                ]
                rows.append([dimension, model["size"], *costs, percent(results.spread(**model)), gain])
        return rows

    def plot(self, results: Results) -> Figure:
        figure = new_figure(11.5, 3.8)
        by_dimension, by_compute, by_time = figure.subplots(1, 3, sharey=True)
        _draw_dimensions(by_dimension, results)
        exponent = exponent_of(results)
        _draw_front(by_compute, results, "training_flops", 10.0**-exponent)
        by_compute.set(xlabel=f"training compute, $10^{{{exponent}}}$ FLOP", title="all models, by compute")
        _draw_front(by_time, results, "seconds", 1.0)
        by_time.set(xlabel="training time, s (runs in parallel)", title="all models, by time")
        for axis in (by_dimension, by_compute, by_time):
            bare(axis, grid="both")
        return figure

    def findings(self, results: Results) -> list[Finding]:
        gains = {dimension: slopes_of(results, dimension) for dimension in DIMENSIONS}
        by_parameters, by_compute = (explained(results, figure) for figure in ("parameters", "training_flops"))
        compared = {
            (one, other): Difference.by_seed(gains[one], gains[other]) for one in DIMENSIONS for other in DIMENSIONS
        }
        most = {f"depth minus {other}": compared["depth", other] for other in ("width", "MLP", "patch")}
        least = {f"{other} minus width": compared[other, "width"] for other in ("depth", "MLP", "patch")}
        return [
            all_are_more("Doubling compute helps most when spent on depth", most),
            all_are_more("Doubling compute helps least when spent on width", least),
            is_more(
                "Smaller patches are more accurate",
                Difference.by_seed(gains["patch"], dict.fromkeys(gains["patch"], 0.0)),
                "gain per doubling of compute by smaller patches",
            ),
            is_more(
                "Compute predicts accuracy better than the number of parameters does",
                Difference.by_seed(by_compute, by_parameters),
                "variance of accuracy explained by a linear fit to the logarithm, compute minus parameters",
            ),
        ]


def scaled(config: TrainConfig, scale: float) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield each dimension scaled alone: its name, its size as text, and the fields of the architecture.

    The head width stays the same, so the model width is rounded to whole heads. Sizes that are impossible, or equal
    to the recipe's own, are skipped.
    """
    base = architecture_of(config)
    layers, mlp = round(scale * base.num_hidden_layers), round(scale * base.intermediate_size)
    heads = round(scale * base.num_attention_heads)
    width = heads * base.hidden_size // base.num_attention_heads
    patch = tuple(round(scale * side) for side in base.patch_shape)
    if layers not in (0, base.num_hidden_layers):
        yield "depth", f"{layers} layers", {"num_hidden_layers": layers}
    if heads not in (0, base.num_attention_heads):
        yield "width", f"width {width}", {"hidden_size": width, "num_attention_heads": heads}
    if mlp not in (0, base.intermediate_size):
        yield "MLP", f"MLP {mlp}", {"intermediate_size": mlp}
    fits = all(side and pixels % side == 0 for side, pixels in zip(patch, base.image_shape, strict=True))
    if fits and patch != base.patch_shape:
        yield "patch", f"patch {_pixels(patch)}", {"patch_size": list(patch)}


# ---------------------------------------------------------------------------------------------- costs and gains


def models_of(results: Results, dimensions: Iterable[str]) -> list[Factors]:
    """Return the models of some dimensions by increasing compute; those without measurements come last."""
    sizes = {dimension: results.where(dimension=dimension).levels("size") for dimension in dimensions}
    models = [{"dimension": dimension, "size": size} for dimension in sizes for size in sizes[dimension]]
    return sorted(models, key=lambda model: cost_of(results, model))


def cost_of(results: Results, model: Factors, figure: str = "training_flops") -> float:
    """Return the mean of a cost over the seeds of a model; infinite if there is none."""
    spread = results.spread(figure, **model)
    return inf if spread is None else spread.mean


def points_of(results: Results, models: Sequence[Factors], figure: str) -> dict[int, tuple[list[float], list[float]]]:
    """Return log2 of the models' costs and their accuracies, for each seed that all measured models have."""
    costs = {index: cost_of(results, model, figure) for index, model in enumerate(models)}
    known = [index for index, cost in costs.items() if cost < inf]
    accuracies = [results.by_seed("accuracy", **models[index]) for index in known]
    seeds = set.intersection(*map(set, accuracies)) if accuracies else set()
    logarithms = [log2(costs[index]) for index in known]
    return {seed: (logarithms, [values[seed] for values in accuracies]) for seed in sorted(seeds)}


def slopes_of(results: Results, dimension: str) -> BySeed:
    """Return the accuracy gained per doubling of compute for each seed, fitted to a dimension and the base model."""
    if dimension == BASE:
        return {}
    points = points_of(results, models_of(results, [BASE, dimension]), "training_flops")
    return {seed: linear_regression(*line).slope for seed, line in points.items() if len(line[0]) > 1}


def explained(results: Results, figure: str) -> BySeed:
    """Return the share of the variance of accuracy over all models that a linear fit to log2 of a cost explains."""
    points = points_of(results, models_of(results, [BASE, *DIMENSIONS]), figure)
    varied = {seed: line for seed, line in points.items() if all(len(set(values)) > 1 for values in line)}
    return {seed: correlation(*line) ** 2 for seed, line in varied.items()}


def front_of(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the Pareto front of (cost, gain) points: no other point gains as much at the same or a lower cost."""
    front: list[tuple[float, float]] = []
    for cost, gain in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or gain > front[-1][1]:
            front.append((cost, gain))
    return front


# ------------------------------------------------------------------------------------------------------- drawing


def _draw_dimensions(axis: Axes, results: Results) -> None:
    base = min((cost_of(results, model) for model in models_of(results, [BASE])), default=inf)
    for index, dimension in enumerate(DIMENSIONS):
        models = models_of(results, [BASE, dimension]) if base < inf else []
        costs = [cost_of(results, model) / base for model in models]
        draw_series(axis, costs, [results.spread(**model) for model in models], dimension, index)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}×")
    axis.set(xlabel="training compute relative to the base", ylabel=ACCURACY, title="one dimension at a time")
    axis.legend(frameon=False, fontsize=8)


def _draw_front(axis: Axes, results: Results, figure: str, scale: float) -> None:
    """Draw all models by their cost, and the Pareto front as a step line."""
    from matplotlib.ticker import LogLocator, NullLocator

    points = {}
    for index, dimension in enumerate((*DIMENSIONS, BASE)):
        for model in models_of(results, [dimension]):
            if (spread := results.spread(**model)) is not None:
                point = scale * cost_of(results, model, figure), 100 * spread.mean
                axis.plot(*point, MARKERS[index], color=INK if dimension == BASE else SERIES[index], ms=6, zorder=3)
                points[point] = BASE if dimension == BASE else model["size"]
    front = front_of(points)
    for point in (point for point, name in points.items() if name == BASE or point in front):
        axis.annotate(points[point], point, (0, 6), textcoords="offset points", ha="center", fontsize=7)
    if points:
        ends = [*front, (max(cost for cost, _ in points), front[-1][1])]
        axis.step(*zip(*ends, strict=True), where="post", color=GRAY, lw=1.5)
    axis.set_xscale("log")
    axis.margins(x=0.2)  # room for the annotations
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter("{x:g}")


def _pixels(sides: Sequence[int]) -> str:
    return "x".join(map(str, sides))
