"""How studies show measurements over seeds: in tables and in figures, shares in percent."""

from collections.abc import Iterable, Sequence
from math import log10
from typing import Any

from ..inspection.drawing import MARKERS, SERIES, Axes
from .study import Results, Spread

ACCURACY = "accuracy, % (mean ± SD)"
DASH = "–"


def percent(spread: Spread | None) -> str:
    """Return a share for a table, with its deviation; a dash if there is none."""
    return DASH if spread is None else spread.percent()


def number(spread: Spread | None, form: str, scale: float = 1.0) -> str:
    """Return the mean of a measurement for a table; a dash if there is none."""
    return DASH if spread is None else format(scale * spread.mean, form)


def exponent_of(results: Results) -> int:
    """Return the power of 10, a multiple of 3, in which to state training compute."""
    costs = [row["training_flops"] for row in results.rows if row.get("training_flops")]
    return 3 * int(log10(max(costs)) // 3) if costs else 0


def draw_series(axis: Axes, x: Sequence[Any], spreads: Sequence[Spread | None], label: str, index: int) -> None:
    """Draw shares as a line with error bars, skipping missing values; `index` selects colour and marker."""
    known = [(place, spread) for place, spread in zip(x, spreads, strict=True) if spread is not None]
    axis.errorbar(
        [place for place, _ in known],
        [100 * spread.mean for _, spread in known],
        yerr=[100 * (spread.deviation or 0.0) for _, spread in known],
        color=SERIES[index % len(SERIES)],
        marker=MARKERS[index % len(MARKERS)],
        ms=5,
        lw=1.5,
        capsize=3,
        label=label,
    )


def draw_dots(axis: Axes, y: float, values: Iterable[float], color: str) -> None:
    """Draw the shares of one cell on a row: every seed, and the mean with its deviation."""
    values = list(values)
    axis.scatter([100 * value for value in values], [y] * len(values), color=color, s=14, alpha=0.4, lw=0)
    if spread := Spread.of(values):
        error = 100 * (spread.deviation or 0.0)
        axis.errorbar(100 * spread.mean, y, xerr=error, color=color, marker=MARKERS[0], ms=5, capsize=3)
