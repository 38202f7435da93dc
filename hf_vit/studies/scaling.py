"""In which dimension is a larger ViT worth its compute? The paper's appendix D.2 and its section 4.4."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import inf, log2
from statistics import correlation, linear_regression
from typing import TYPE_CHECKING, Any

from ..inspection.drawing import GRAY, INK, MARKERS, SERIES, bare, new_figure
from ..training.recipe import TrainConfig
from ..training.tasks import architecture_of
from .figures import draw_series, exponent_of, number_of
from .study import Cell, Difference, Factors, Finding, Results, Spread, Study, cell_of, is_more, with_architecture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BASE, DIMENSIONS = "base", ("depth", "width", "MLP", "patch")
SCALES = (0.5, 2.0)


class Scaling(Study):
    name = "scaling"
    title = "Scaling each dimension"
    question = (
        "A ViT can grow in its depth, in the width of its tokens, in that of its MLPs, and by smaller patches, which "
        "are more tokens. The paper scales each alone from one base: depth gains most and width least, and smaller "
        "patches gain robustly at no more parameters, which suggests that compute foretells accuracy better than "
        "parameters do. Here each is halved and doubled, and every model sees the same images as often."
    )
    source = "Dosovitskiy et al. 2021, appendix D.2, figure 8, and section 4.4, figure 5 (accuracy against compute)"

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
            slopes = list(slopes_of(results, dimension).values())
            for model in models_of(results, [dimension]):
                numbers = [
                    number_of(results.spread("parameters", **model), ",.0f"),
                    number_of(results.spread("training_flops", **model), ".3g", 10.0**-exponent),
                    number_of(results.spread("seconds", **model), ".1f"),
                    cell_of(results.spread(**model)),
                ]
                rows.append([dimension, model["size"], *numbers, cell_of(Spread.of(slopes) if slopes else None)])
        return rows

    def plot(self, results: Results) -> "Figure":
        drawn = new_figure(11.5, 3.8)
        over_dimensions, over_compute, over_time = drawn.subplots(1, 3, sharey=True)
        _draw_dimensions(over_dimensions, results)
        exponent = exponent_of(results)
        _draw_front(over_compute, results, "training_flops", 10.0**-exponent)
        over_compute.set(xlabel=f"training compute, $10^{{{exponent}}}$ FLOP", title="all: accuracy against compute")
        _draw_front(over_time, results, "seconds", 1.0)
        over_time.set(xlabel="seconds of a run, beside others", title="all: accuracy against time")
        for axis in (over_dimensions, over_compute, over_time):
            bare(axis, grid="both")
        return drawn

    def findings(self, results: Results) -> list[Finding]:
        gains = {dimension: slopes_of(results, dimension) for dimension in DIMENSIONS}
        by_parameters, by_compute = (explained(results, figure) for figure in ("parameters", "training_flops"))
        return [
            all_are_more(
                "A doubling of compute gains most in depth",
                {
                    f"depth less {other}": Difference.by_seed(gains["depth"], gains[other])
                    for other in ("width", "MLP", "patch")
                },
            ),
            all_are_more(
                "A doubling of compute gains least in width",
                {
                    f"{other} less width": Difference.by_seed(gains[other], gains["width"])
                    for other in ("depth", "MLP", "patch")
                },
            ),
            is_more(
                "Smaller patches are more accurate",
                Difference.by_seed(gains["patch"], dict.fromkeys(gains["patch"], 0.0)),
                "gain of a doubling of compute by smaller patches",
            ),
            is_more(
                "Compute foretells accuracy better than the number of parameters does",
                Difference.by_seed(by_compute, by_parameters),
                "share of the variance of accuracy that a line over its logarithm explains, compute less parameters",
            ),
        ]


def scaled(config: TrainConfig, scale: float) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield each dimension scaled alone: its name, its size in words, and the fields of the architecture.

    Heads keep their width and stay whole, so a width may be scaled by somewhat more or less. What is not possible, or
    comes to the recipe's own size, is left out.
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


# --------------------------------------------------------------------------------------------------- what they cost


def models_of(results: Results, dimensions: Iterable[str]) -> list[Factors]:
    """Return the models of some dimensions, from little compute to much; last those that no seed was measured of."""
    sizes = {dimension: results.where(dimension=dimension).levels("size") for dimension in dimensions}
    models = [{"dimension": dimension, "size": size} for dimension in sizes for size in sizes[dimension]]
    return sorted(models, key=lambda model: cost_of(results, model))


def cost_of(results: Results, model: Factors, figure: str = "training_flops") -> float:
    """Return a figure of a model, the mean over its seeds; infinite if there is none."""
    spread = results.spread(figure, **model)
    return inf if spread is None else spread.mean


def points_of(results: Results, models: Sequence[Factors], figure: str) -> dict[int, tuple[list[float], list[float]]]:
    """Return log2 of a figure of models, and their accuracies, for each seed that all those measured have."""
    costs = {index: cost_of(results, model, figure) for index, model in enumerate(models)}
    known = [index for index, cost in costs.items() if cost < inf]
    accuracies = [results.by_seed("accuracy", **models[index]) for index in known]
    seeds = set.intersection(*map(set, accuracies)) if accuracies else set()
    logarithms = [log2(costs[index]) for index in known]
    return {seed: (logarithms, [values[seed] for values in accuracies]) for seed in sorted(seeds)}


def slopes_of(results: Results, dimension: str) -> dict[int, float]:
    """Return what a doubling of compute gains, for each seed: the slope of a line through a dimension and the base."""
    if dimension == BASE:
        return {}
    points = points_of(results, models_of(results, [BASE, dimension]), "training_flops")
    return {seed: linear_regression(*line).slope for seed, line in points.items() if len(line[0]) > 1}


def explained(results: Results, figure: str) -> dict[int, float]:
    """Return the share of the variance of accuracy over all models that a line over log2 of a figure explains."""
    points = points_of(results, models_of(results, [BASE, *DIMENSIONS]), figure)
    told_apart = {seed: line for seed, line in points.items() if all(len(set(values)) > 1 for values in line)}
    return {seed: correlation(*line) ** 2 for seed, line in told_apart.items()}


def front_of(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points, each a cost and a gain, for which no other has as much gain at less cost or the same."""
    front: list[tuple[float, float]] = []
    for cost, gain in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or gain > front[-1][1]:
            front.append((cost, gain))
    return front


# ------------------------------------------------------------------------------------------------------ judging it


def all_are_more(claim: str, differences: Mapping[str, Difference | None]) -> Finding:
    """Judge a claim that all of several differences are more than 0: all told apart, or one that is less."""
    parts = [is_more(claim, difference, what) for what, difference in differences.items()]
    verdicts = [part.holds for part in parts]
    holds = False if False in verdicts else None if None in verdicts else True
    return Finding(claim, holds, "; ".join(part.measured for part in parts))


# ------------------------------------------------------------------------------------------------------ drawing it


def _draw_dimensions(axis: "Axes", results: Results) -> None:
    base = min((cost_of(results, model) for model in models_of(results, [BASE])), default=inf)
    for number, dimension in enumerate(DIMENSIONS):
        models = models_of(results, [BASE, dimension]) if base < inf else []
        places = [cost_of(results, model) / base for model in models]
        draw_series(axis, places, [results.spread(**model) for model in models], dimension, number)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}×")
    axis.set(xlabel="training compute, the base is 1×", ylabel="accuracy, % (mean, deviation)")
    axis.set_title("each dimension alone")
    axis.legend(frameon=False, fontsize=8)


def _draw_front(axis: "Axes", results: Results, figure: str, scale: float) -> None:
    """Draw all models over what they cost, and as a step line the most that is reached for so much."""
    from matplotlib.ticker import LogLocator, NullLocator

    points = {}
    for number, dimension in enumerate((*DIMENSIONS, BASE)):
        for model in models_of(results, [dimension]):
            if (spread := results.spread(**model)) is not None:
                point = scale * cost_of(results, model, figure), 100 * spread.mean
                axis.plot(*point, MARKERS[number], color=INK if dimension == BASE else SERIES[number], ms=6, zorder=3)
                points[point] = BASE if dimension == BASE else model["size"]
    front = front_of(points)
    for point in (point for point, name in points.items() if name == BASE or point in front):
        axis.annotate(points[point], point, (0, 6), textcoords="offset points", ha="center", fontsize=7)
    if points:
        ends = [*front, (max(cost for cost, _ in points), front[-1][1])]
        axis.step(*zip(*ends, strict=True), where="post", color=GRAY, lw=1.5)
    axis.set_xscale("log")
    axis.margins(x=0.2)  # for the names
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter("{x:g}")


def _pixels(sides: Sequence[int]) -> str:
    return "x".join(map(str, sides))
