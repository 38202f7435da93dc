"""Does a ViT need a class token, or does the mean of its patches do? The paper's appendix D.3."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..inspection.drawing import SERIES, bare, new_figure
from ..training.recipe import TrainConfig
from .figures import draw_series
from .study import Cell, Difference, Finding, Results, Spread, Study, are_alike, cell_of, is_more, with_architecture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POOLINGS = {"cls": "class token", "mean": "mean pooling"}
DOUBLINGS = range(-3, 4)  # of the recipe's learning rate


class Pooling(Study):
    name = "pooling"
    title = "Class token or mean pooling"
    question = (
        "A ViT reads the class from a token of its own. The mean of all patches did much worse in the paper at "
        "first, at the class token's learning rate of 8e-4, and similarly well at one of its own, 3e-4: the rate made "
        "the difference. Here each is trained over a sweep of rates; behind either is one linear layer."
    )
    source = "Dosovitskiy et al. 2021, appendix D.3, figure 9 (5-shot accuracy on ImageNet)"

    def cells(self, config: TrainConfig) -> Iterator[Cell]:
        for pooling in POOLINGS:
            for doublings in DOUBLINGS:
                rate = config.learning_rate * 2.0**doublings
                recipe = replace(with_architecture(config, pooling=pooling), learning_rate=rate)
                yield Cell(cell(pooling, rate), recipe)

    def table(self, results: Results) -> list[list[str]]:
        best = {pooling: best_rate(results, pooling) for pooling in POOLINGS}
        rows = [["learning rate", *(f"{name}, %" for name in POOLINGS.values())]]
        for rate in rates_of(results):
            measured = [
                cell_of(results.spread(**cell(pooling, rate)))
                + (" (best)" if rate == best[pooling] else "")
                + (f" ({number} failed)" if (number := failures(results, pooling, rate)) else "")
                for pooling in POOLINGS
            ]
            rows.append([f"{rate:.2g}", *measured])
        return rows

    def plot(self, results: Results) -> "Figure":
        drawn = new_figure(9.5, 3.8)
        over_rates, over_epochs = drawn.subplots(1, 2, sharey=True)
        _draw_rates(over_rates, results)
        best = {pooling: best_rate(results, pooling) for pooling in POOLINGS}
        # The three curves of the paper's figure 9.
        curves = dict.fromkeys([("cls", best["cls"]), ("mean", best["cls"]), ("mean", best["mean"])])
        for pooling, rate in curves:
            number = list(POOLINGS).index(pooling) if rate == best[pooling] else len(POOLINGS)
            _draw_curve(over_epochs, results, pooling, rate, number)
        over_epochs.set(xlabel="epochs", title="at the best rates")
        over_epochs.xaxis.get_major_locator().set_params(integer=True)
        over_epochs.legend(frameon=False, fontsize=8)
        for axis in (over_rates, over_epochs):
            bare(axis, grid="both")
        return drawn

    def findings(self, results: Results) -> list[Finding]:
        best = {pooling: best_rate(results, pooling) for pooling in POOLINGS}
        own = {pooling: cell(pooling, rate) for pooling, rate in best.items()}
        rates = " and ".join(f"{POOLINGS[pooling]} at {rate:.2g}" for pooling, rate in best.items() if rate)
        return [
            are_alike(
                "Each at its own best learning rate, both are as accurate",
                {f"{rates}, the first less the second": results.difference(own["cls"], own["mean"])},
                within=0.01,
            ),
            _needs_lower_rate(results),
            _is_worse_at_its_rate(results),
        ]


def cell(pooling: str, rate: float | None) -> dict[str, Any]:
    """Return the factors of a cell; there is none without a rate."""
    return {"pooling": pooling, "learning_rate": rate}


def rates_of(results: Results) -> list[float]:
    """Return the learning rates of the sweep, each the double of the one before."""
    return sorted(results.levels("learning_rate"))


def failures(results: Results, pooling: str, rate: float | None) -> int:
    """Return how many runs of a cell failed."""
    return sum(row["failed"] is not None for row in results.where(**cell(pooling, rate)).rows)


def best_rate(results: Results, pooling: str) -> float | None:
    """Return the learning rate with the highest mean accuracy, of those at which no run failed."""
    safe = [rate for rate in rates_of(results) if not failures(results, pooling, rate)]
    spreads = {rate: results.spread(**cell(pooling, rate)) for rate in safe}
    means = {rate: spread.mean for rate, spread in spreads.items() if spread is not None}
    return max(means, key=means.__getitem__, default=None)


def peak_of(heights: Sequence[float | None]) -> float:
    """Return where the values of places 0, 1, 2 ... are highest, between places by a parabola.

    It goes through the highest and both of its neighbours; where one is missing, it is the place itself.
    """
    known = {place: height for place, height in enumerate(heights) if height is not None}
    top = max(known, key=known.__getitem__)
    before, after = known.get(top - 1), known.get(top + 1)
    if before is None or after is None or before == after:
        return float(top)
    return top + (before - after) / (before - 2 * known[top] + after) / 2


def _needs_lower_rate(results: Results) -> Finding:
    claim = "The best learning rate of mean pooling is lower than the class token's"
    rates = rates_of(results)
    peaks = {}
    for pooling in POOLINGS:
        by_rate = [results.by_seed("accuracy", **cell(pooling, rate)) for rate in rates]
        seeds = sorted(set().union(*by_rate))
        peaks[pooling] = {seed: peak_of([accuracies.get(seed) for accuracies in by_rate]) for seed in seeds}
    pairs = [(peaks["cls"][seed], peaks["mean"][seed]) for seed in sorted(peaks["cls"].keys() & peaks["mean"].keys())]
    if not pairs:
        return is_more(claim, None, "best learning rates")
    difference = Difference.of(pairs)
    interval = f"{difference.low:+.1f} to {difference.high:+.1f}" if len(pairs) > 1 else "one seed, so no interval"
    measured = f"class token's less mean pooling's: {difference.mean:+.1f} doublings ({interval})"
    if ends := sum(peak in (0, len(rates) - 1) for pair in pairs for peak in pair):
        return Finding(claim, None, f"{measured}; {ends} of {2 * len(pairs)} lie at an end of the sweep, or beyond")
    return replace(is_more(claim, difference, ""), measured=measured)


def _is_worse_at_its_rate(results: Results) -> Finding:
    claim = "At the class token's best learning rate mean pooling is less accurate"
    pairs, failed = [], 0
    for seed in sorted({row["seed"] for row in results.rows}):
        own = Results(row for row in results.rows if row["seed"] == seed)
        # The best rate of the other seeds: what is best for a seed flatters it.
        rate = best_rate(Results(row for row in results.rows if row["seed"] != seed), "cls")
        failed += failures(own, "mean", rate)
        first, second = (own.spread(**cell(pooling, rate)) for pooling in POOLINGS)
        if first is not None and second is not None:
            pairs.append((first.mean, second.mean))
    if failed:
        return Finding(claim, True, f"{failed} runs of mean pooling failed at it")
    difference = Difference.of(pairs) if pairs else None
    return is_more(claim, difference, "class token less mean pooling, each seed at the best rate of the others")


def _draw_rates(axis: "Axes", results: Results) -> None:
    rates = rates_of(results)
    for number, (pooling, name) in enumerate(POOLINGS.items()):
        spreads = {rate: results.spread(**cell(pooling, rate)) for rate in rates}
        draw_series(axis, rates, list(spreads.values()), name, number)
        best = best_rate(results, pooling)
        if best is not None and (spread := spreads[best]) is not None:
            axis.plot(best, 100 * spread.mean, "o", ms=13, mfc="none", mec=SERIES[number], mew=1.5)
        failed = [rate for rate in rates if failures(results, pooling, rate)]
        at_the_bottom = [0.03 + 0.05 * number] * len(failed)
        axis.plot(failed, at_the_bottom, "x", color=SERIES[number], ms=7, mew=2, transform=axis.get_xaxis_transform())
    axis.set_xscale("log", base=2)
    axis.set_xticks(rates, [f"{rate:.2g}" for rate in rates], fontsize=8)
    axis.set(
        xlabel="learning rate",
        ylabel="accuracy, % (mean, deviation)",
        title="over learning rates (ring: best, cross: failed)",
    )
    axis.legend(frameon=False, fontsize=8)


def _draw_curve(axis: "Axes", results: Results, pooling: str, rate: float | None, number: int) -> None:
    """Draw the accuracy of a cell over epochs; its runs are evaluated at the same ones."""
    curves: list[Any] = list(results.by_seed("curve", **cell(pooling, rate)).values())
    epochs = [epoch for epoch, *_ in curves[0]] if curves else []
    spreads = [Spread.of([point[1] for point in points]) for points in zip(*curves, strict=True)]
    name = "no learning rate" if rate is None else f"{rate:.2g}"
    draw_series(axis, epochs, spreads, f"{POOLINGS[pooling]} at {name}", number)
