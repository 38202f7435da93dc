"""The progress bar of commands: one line of at most 80 columns, or of the width of the terminal."""

import sys
from typing import Any

from .texts import COLUMNS

# The most important values come first: what does not fit is cut at the end.
FORMAT = "{desc}{n_fmt}/{total_fmt} {unit} |{bar:10}| {elapsed}<{remaining}{postfix}"
FORMAT_WITHOUT_TOTAL = "{desc}{n_fmt} {unit}, {elapsed}{postfix}{bar:0}"  # tqdm cuts only what has a bar


def progress_bar(total: int | None, unit: str, what: str = "", **options: Any) -> Any:
    """Return a bar of tqdm for `total` units, named in the plural; `options` are tqdm's."""
    from tqdm.auto import tqdm

    is_notebook = any("notebook" in kind.__module__ for kind in tqdm.__mro__)
    width = {} if is_notebook else {"dynamic_ncols": True} if sys.stderr.isatty() else {"ncols": COLUMNS}
    shape = FORMAT_WITHOUT_TOTAL if total is None else FORMAT
    return tqdm(total=total, unit=unit, bar_format=shape, desc=what and f"{what}: ", **{**width, **options})
