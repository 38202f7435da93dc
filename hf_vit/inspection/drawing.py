"""The style of all figures: sizes, colours, axes, and text.

Colours are safe for colour-blind readers: viridis for quantities, and for series the palette of Okabe and Ito ("Color
Universal Design", 2008), starting with blue and orange.
"""

import textwrap
import warnings
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

from ..system.texts import one_line, visible

if TYPE_CHECKING:  # matplotlib is imported when a figure is drawn
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
else:
    Axes = Figure = Any

BLUE, ORANGE, GRAY, INK = "#2a6ebb", "#e07b00", "#8a8f98", "#22262b"
SERIES = (BLUE, ORANGE, "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8a8f98", "#22262b")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")  # distinguish series without colour


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure with a size in inches."""
    from matplotlib.figure import Figure  # not pyplot: no window, no state

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def bare(axis: Axes, grid: Literal["both", "x", "y"] = "y") -> Axes:
    """Remove the upper and right spines of an axis, and add faint grid lines along `grid`."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis=grid, color="#e6e8eb", lw=0.8)
    axis.set_axisbelow(True)
    return axis


def whole_numbers(axis: Axes) -> None:
    """Put the ticks of the x axis at whole numbers, as for numbers of layers."""
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def heading(figure: Figure, title: str) -> Figure:
    """Write the title of a figure above it, and return the figure."""
    figure.suptitle(plain(title), fontsize=12, color=INK)
    return figure


def caption(figure: Figure, text: str) -> None:
    """Write a caption below a figure, wrapped to its width."""
    lines = textwrap.fill(text, max(30, int(17 * figure.get_figwidth())))
    figure.supxlabel(plain(lines), x=0.01, ha="left", fontsize=8, color=INK)


def short(name: str, length: int = 22) -> str:
    """Return a name cut to at most `length` letters, escaped for matplotlib."""
    name = one_line(name)
    return plain(name if len(name) <= length else f"{name[: length - 1]}…")


def plain(text: str) -> str:
    """Escape text for matplotlib, which reads text between dollar signs as a formula."""
    return visible(text).replace("$", r"\$")


def save(figure: Figure, path: str | PathLike) -> None:
    """Write a figure in the format of the file name; the same figure gives the same bytes."""
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": "hf-vit"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # characters that the font lacks become boxes
        figure.savefig(path, metadata={"Date": None} if str(path).endswith(".svg") else None)
