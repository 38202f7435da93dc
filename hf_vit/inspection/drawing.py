"""How pictures of this package look: sizes, colours, and names.

Colours can be told apart by the colour-blind: viridis for quantities, and for series the palette of Okabe and Ito
("Color Universal Design", 2008), which begins with blue and orange.
"""

import textwrap
from os import PathLike
from typing import TYPE_CHECKING, Literal

from ..system.texts import one_line, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GRAY, INK = "#2a6ebb", "#e07b00", "#8a8f98", "#22262b"
SERIES = (BLUE, ORANGE, "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8a8f98", "#22262b")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")  # beside the colour, for those who see none


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure of so many inches."""
    from matplotlib.figure import Figure  # not pyplot: no window, no state

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def bare(axis: "Axes", grid: Literal["both", "x", "y"] = "y") -> "Axes":
    """Leave of an axis what is read: no frame above and beside it, and faint lines along `grid`."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis=grid, color="#e6e8eb", lw=0.8)
    axis.set_axisbelow(True)
    return axis


def whole_numbers(axis: "Axes") -> None:
    """Label an axis of numbers of layers, and of all that is counted, at whole numbers alone."""
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def caption(drawn: "Figure", text: str) -> None:
    """Write below a figure, in as many lines as its width asks for, what it shows and of what."""
    lines = textwrap.fill(text, max(30, int(17 * drawn.get_figwidth())))
    drawn.supxlabel(plain(lines), x=0.01, ha="left", fontsize=8, color=INK)


def short(name: str, length: int = 22) -> str:
    """Return a name of at most `length` letters, as matplotlib takes it."""
    name = one_line(name)
    return plain(name if len(name) <= length else f"{name[: length - 1]}…")


def plain(text: str) -> str:
    """Return a text for matplotlib, which takes what stands between dollars for a formula."""
    return visible(text).replace("$", r"\$")


def save(drawn: "Figure", path: str | PathLike) -> None:
    """Write a figure as the file's ending says; the same figure gives the same bytes."""
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": "hf-vit"}):
        drawn.savefig(path, metadata={"Date": None} if str(path).endswith(".svg") else None)
