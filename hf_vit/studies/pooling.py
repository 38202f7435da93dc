"""Does a ViT need a class token, or does mean pooling over the patches do as well? The paper's appendix D.3."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from ..inspection.drawing import SERIES, Axes, Figure, bare, new_figure
from ..training.recipe import TrainConfig
from .figures import ACCURACY, draw_series, percent
from .study import Cell, Difference, Finding, Results, Spread, Study, are_alike, is_more, with_architecture

POOLINGS = {"cls": "class token", "mean": "mean pooling"}
DOUBLINGS = range(-3, 4)  # powers of 2 by which the recipe's learning rate is multiplied


class Pooling(Study):
    name = "pooling"
    question = (
        "A ViT classifies from a class token. In the paper, mean pooling over the patches was much less accurate at "
        "the class token's learning rate of 8e-4 and similarly accurate at 3e-4: the learning rate made the "
        "difference. Here each pooling, followed by one linear layer, is trained at a range of learning rates."
    )

    def cells(self, config: TrainConfig) -> Iterator[Cell]:
        for pooling in POOLINGS:
            for doublings in DOUBLINGS:
                rate = config.learning_rate * 2.0**doublings
                recipe = replace(with_architecture(config, pooling=pooling), learning_rate=rate)
                yield Cell(cell(pooling, rate), recipe)

    def table(self, results: Results) -> list[list[str]]:
        best = best_rates(results)
        rows = [["learning rate", *(f"{name}, %" for name in POOLINGS.values())]]
        for rate in rates_of(results):
            measured = [
                percent(results.spread(**cell(pooling, rate)))
                + (" (best)" if rate == best[pooling] else "")
                + (f" ({failed} failed)" if (failed := failures(results, pooling, rate)) else "")
                for pooling in POOLINGS
            ]
            rows.append([f"{rate:.2g}", *measured])
        return rows

    def plot(self, results: Results) -> Figure:
        figure = new_figure(9.5, 3.8)
        over_rates, over_epochs = figure.subplots(1, 2, sharey=True)
        _draw_rates(over_rates, results)
        best = best_rates(results)
        # The three curves of the paper's figure 9.
        curves = dict.fromkeys([("cls", best["cls"]), ("mean", best["cls"]), ("mean", best["mean"])])
        for pooling, rate in curves:
            index = list(POOLINGS).index(pooling) if rate == best[pooling] else len(POOLINGS)
            _draw_curve(over_epochs, results, pooling, rate, index)
        over_epochs.set(xlabel="epoch", title="at the best learning rates")
        over_epochs.xaxis.get_major_locator().set_params(integer=True)
        over_epochs.legend(frameon=False, fontsize=8)
        for axis in (over_rates, over_epochs):
            bare(axis, grid="both")
        return figure

    def findings(self, results: Results) -> list[Finding]:
        best = best_rates(results)
        rates = " minus ".join(f"{POOLINGS[pooling]} at {rate:.2g}" for pooling, rate in best.items() if rate)
        difference = results.difference(cell("cls", best["cls"]), cell("mean", best["mean"]))
        return [
            are_alike("At its best learning rate, each is as accurate as the other", {rates: difference}, within=0.01),
            _needs_lower_rate(results),
            _is_worse_at_its_rate(results),
        ]


def cell(pooling: str, rate: float | None) -> dict[str, Any]:
    """Return the factors of a cell; no cell matches a rate of `None`."""
    return {"pooling": pooling, "learning_rate": rate}


def rates_of(results: Results) -> list[float]:
    """Return the learning rates that were tried, each twice the one before."""
    return sorted(results.levels("learning_rate"))


def failures(results: Results, pooling: str, rate: float | None) -> int:
    """Return how many runs of a cell failed."""
    return sum(row["failed"] is not None for row in results.where(**cell(pooling, rate)).rows)


def best_rate(results: Results, pooling: str) -> float | None:
    """Return the learning rate with the highest mean accuracy among those at which no run failed."""
    safe = [rate for rate in rates_of(results) if not failures(results, pooling, rate)]
    spreads = {rate: results.spread(**cell(pooling, rate)) for rate in safe}
    means = {rate: spread.mean for rate, spread in spreads.items() if spread is not None}
    return max(means, key=means.__getitem__, default=None)


def best_rates(results: Results) -> dict[str, float | None]:
    return {pooling: best_rate(results, pooling) for pooling in POOLINGS}


def peak_of(heights: Sequence[float | None]) -> float:
    """Return the position, from 0, at which values are highest, interpolated by a parabola.

    The parabola goes through the highest value and both of its neighbours; if one is missing, the position of the
    highest value is returned.
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
    difference = Difference.by_seed(peaks["cls"], peaks["mean"])
    if difference is None:
        return is_more(claim, None, "best learning rates")
    interval = f"{difference.low:+.1f} to {difference.high:+.1f}" if difference.number > 1 else "one seed, no interval"
    measured = f"class token minus mean pooling: {difference.mean:+.1f} doublings ({interval})"
    shared = peaks["cls"].keys() & peaks["mean"].keys()
    if ends := sum(peaks[pooling][seed] in (0, len(rates) - 1) for pooling in POOLINGS for seed in shared):
        measured += f"; {ends} of {2 * difference.number} best rates are at or beyond an end of the range"
        return Finding(claim, None, measured, "inconclusive")
    return replace(is_more(claim, difference, ""), measured=measured)


def _is_worse_at_its_rate(results: Results) -> Finding:
    claim = "At the class token's best learning rate, mean pooling is less accurate"
    pairs, failed = [], 0
    for seed in sorted({row["seed"] for row in results.rows}):
        own = Results(row for row in results.rows if row["seed"] == seed)
        # The rate that is best for the other seeds: choosing it on the same seed would favour the class token.
        rate = best_rate(Results(row for row in results.rows if row["seed"] != seed), "cls")
        failed += failures(own, "mean", rate)
        first, second = (own.spread(**cell(pooling, rate)) for pooling in POOLINGS)
        if first is not None and second is not None:
            pairs.append((first.mean, second.mean))
    if failed:
        return Finding(claim, True, f"{failed} runs of mean pooling failed at that rate")
    difference = Difference.of(pairs) if pairs else None
    return is_more(claim, difference, "class token minus mean pooling, each seed at the best rate of the other seeds")


def _draw_rates(axis: Axes, results: Results) -> None:
    rates = rates_of(results)
    for index, (pooling, name) in enumerate(POOLINGS.items()):
        spreads = {rate: results.spread(**cell(pooling, rate)) for rate in rates}
        draw_series(axis, rates, list(spreads.values()), name, index)
        best = best_rate(results, pooling)
        if best is not None and (spread := spreads[best]) is not None:
            axis.plot(best, 100 * spread.mean, "o", ms=13, mfc="none", mec=SERIES[index], mew=1.5)
        failed = [rate for rate in rates if failures(results, pooling, rate)]
        at_the_bottom = [0.03 + 0.05 * index] * len(failed)
        axis.plot(failed, at_the_bottom, "x", color=SERIES[index], ms=7, mew=2, transform=axis.get_xaxis_transform())
    axis.set_xscale("log", base=2)
    axis.set_xticks(rates, [f"{rate:.2g}" for rate in rates], fontsize=8)
    axis.set(xlabel="learning rate", ylabel=ACCURACY, title="by learning rate (ring: best, cross: failed)")
    axis.legend(frameon=False, fontsize=8)


def _draw_curve(axis: Axes, results: Results, pooling: str, rate: float | None, index: int) -> None:
    """Draw the accuracy of a cell by epoch; all its runs are evaluated after the same epochs."""
    curves = list(results.by_seed("curve", **cell(pooling, rate)).values())
    epochs = [epoch for epoch, *_ in curves[0]] if curves else []
    spreads = [Spread.of([point[1] for point in points]) for points in zip(*curves, strict=True)]
    name = "no learning rate" if rate is None else f"{rate:.2g}"
    draw_series(axis, epochs, spreads, f"{POOLINGS[pooling]} at {name}", index)
