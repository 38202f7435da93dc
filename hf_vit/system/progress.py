"""Progress of a run: one bar of at most 80 columns, or of the width of the terminal, and the time that is left."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .texts import COLUMNS

# The most important values come first: what does not fit is cut at the end.
FORMAT = "{desc}{n_fmt}/{total_fmt} {unit} |{bar:10}| {elapsed}<{remaining}{postfix}"
FORMAT_WITHOUT_TOTAL = "{desc}{n_fmt} {unit}, {elapsed}{postfix}{bar:0}"  # tqdm cuts only what has a bar

EVERY_LOG_LINE = {"mininterval": 30, "maxinterval": 60}  # seconds between lines of a file


def progress_bar(total: int | None, unit: str, what: str = "", **options: Any) -> Any:
    """Return a bar of tqdm for `total` units, named in the plural; `options` are tqdm's."""
    from tqdm.auto import tqdm

    if any("notebook" in kind.__module__ for kind in tqdm.__mro__):
        where: dict[str, Any] = {}
    elif sys.stderr.isatty():
        where = {"dynamic_ncols": True} if _width_of(sys.stderr) else {"ncols": COLUMNS}
    else:
        where = {"ncols": COLUMNS, "file": _LogFile(sys.stderr), **EVERY_LOG_LINE}
    shape = FORMAT_WITHOUT_TOTAL if total is None else FORMAT
    return tqdm(total=total, unit=unit, bar_format=shape, desc=what and f"{what}: ", **{**where, **options})


def _width_of(terminal: Any) -> int:
    """Return the columns of a terminal; 0 if it states none, as in some containers, where tqdm would print nothing."""
    try:
        return os.get_terminal_size(terminal.fileno()).columns
    except (OSError, ValueError):
        return 0


class _LogFile:
    """Writes each state of a bar as a line of its own, for a file or a pipe."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def write(self, text: str) -> None:
        if state := text.strip():
            self.file.write(f"{state}\n")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def show(bar: Any, values: dict[str, str]) -> None:
    """Show values beside a bar, the first ones only if there is no room for all of them."""
    parts = [f"{name}={value}" for name, value in values.items()]
    width = bar.format_dict["ncols"] or COLUMNS
    for number in range(len(parts), -1, -1):
        bar.set_postfix_str(", ".join(parts[:number]), refresh=False)
        if len(bar.format_meter(**{**bar.format_dict, "ncols": None})) <= width:
            return


class TimeLeft:
    """States once how long a run will take, as soon as some of its steps have been timed.

    Args:
        total: Number of steps of the whole run.
        say: Prints a line.
    """

    TIMED_SECONDS, TIMED_STEPS = 10.0, 3
    LEAST_MINUTES = 2  # the bar is enough for a shorter run

    def __init__(self, total: int, say: Callable[[str], None]) -> None:
        self.total, self.say = total, say
        self.first: tuple[int, float] | None = None  # the first step is slower, and not timed
        self.is_stated = False

    def after(self, step: int) -> None:
        """Count a step; print the time that the others will take if it is known now."""
        if self.is_stated:
            return
        now = time.monotonic()
        first, began = self.first = self.first or (step, now)
        if step - first < self.TIMED_STEPS or now - began < self.TIMED_SECONDS:
            return
        self.is_stated, seconds = True, (now - began) / (step - first)
        minutes = round((self.total - step) * seconds / 60)
        if minutes >= self.LEAST_MINUTES:
            left = f"{minutes} min" if minutes < 90 else f"{minutes / 60:.1f} hours"
            self.say(f"About {left} left: {self.total - step:,} steps of {seconds:.2g} s, without evaluations.")


@contextmanager
def no_bars_of_transformers() -> Iterator[None]:
    """Hide the bars of transformers, which would interrupt ours, while it loads or writes weights."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
    from transformers.utils import logging

    if not logging.is_progress_bar_enabled():
        yield
        return
    of_the_hub_are_hidden = are_progress_bars_disabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()  # those of the Hub as well
        if of_the_hub_are_hidden:
            disable_progress_bars()
