"""How studies show what was measured over seeds: means with their deviations, in percent, and costs."""

from collections.abc import Sequence
from math import log10
from typing import TYPE_CHECKING, Any

from ..inspection.drawing import MARKERS, SERIES
from .study import Results, Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_series(
    axis: "Axes", places: Sequence[Any], spreads: Sequence[Spread | None], label: str, number: int
) -> None:
    """Draw shares over places as a line, in percent with their deviations; what is missing is left out.

    Args:
        number: Of the series, which decides colour and marker.
    """
    known = [(place, spread) for place, spread in zip(places, spreads, strict=True) if spread is not None]
    axis.errorbar(
        [place for place, _ in known],
        [100 * spread.mean for _, spread in known],
        yerr=[100 * (spread.deviation or 0.0) for _, spread in known],
        color=SERIES[number % len(SERIES)],
        marker=MARKERS[number % len(MARKERS)],
        ms=5,
        lw=1.5,
        capsize=3,
        label=label,
    )


def draw_dots(axis: "Axes", place: float, values: Sequence[float], color: str) -> None:
    """Draw the shares of one cell beside each other on a row: every seed, and their mean with its deviation."""
    axis.scatter([100 * value for value in values], [place] * len(values), color=color, s=14, alpha=0.4, lw=0)
    if values:
        spread = Spread.of(values)
        error = 100 * (spread.deviation or 0.0)
        axis.errorbar(100 * spread.mean, place, xerr=error, color=color, marker=MARKERS[0], ms=5, capsize=3)


def exponent_of(results: Results) -> int:
    """Return the power of 1000, as one of 10, that compute is stated in."""
    costs = [row["training_flops"] for row in results.rows if row.get("training_flops")]
    return 3 * int(log10(max(costs)) // 3) if costs else 0


def number_of(spread: Spread | None, form: str, scale: float = 1.0) -> str:
    """Return the mean of a figure for a table, or a dash where there is none."""
    return "–" if spread is None else format(scale * spread.mean, form)
