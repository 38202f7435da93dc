"""Checks that run one after another within a time limit; each becomes a row of a table."""

import io
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from .texts import counted, hanging, one_line

OK, FAILED, NOT_RUN = "ok", "FAILED", "not run"


class NotPossible(Exception):
    """A check cannot run here; the message is the reason."""


class Outcome(NamedTuple):
    """What a check found.

    Attributes:
        text: Result for the table.
        problem: What is wrong; empty if the result is as expected.
        values: The same as numbers.
    """

    text: str
    problem: str = ""
    values: dict[str, Any] = {}


@dataclass(frozen=True)
class Check:
    """A check.

    Attributes:
        section, name: Place in the table.
        run: Does the work; raises `NotPossible` if it cannot. Any other exception is a failure.
        seconds: Expected duration; the check is not run if less time is left.
    """

    section: str
    name: str
    run: Callable[[], Outcome]
    seconds: float = 0.0


@dataclass(frozen=True)
class Row:
    """The result of a check: a verdict, `OK`, `FAILED` or `NOT_RUN`, and the reason of the latter two in the text."""

    section: str
    name: str
    verdict: str
    text: str
    seconds: float
    values: dict[str, Any] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """Return the row as lines for a terminal."""
        return hanging(f"{self.verdict:8} {self.section:10} ", f"{self.name}: {self.text}")


def run_checks(
    checks: Iterable[Check], minutes: float, clean_up: Callable[[], object] = lambda: None
) -> Iterator[Row]:
    """Yield the result of each check.

    Args:
        checks: The checks, the most important first.
        minutes: Time limit, which a check may exceed by the error in its expected duration.
        clean_up: Called after each check, to free what it leaves.
    """
    end = time.monotonic() + 60 * minutes
    for check in checks:
        began, values = time.monotonic(), dict[str, Any]()
        if end - began < check.seconds:
            text = f"about {check.seconds:.0f} s are needed, and {max(0.0, end - began):.0f} s are left"
            yield Row(check.section, check.name, NOT_RUN, text, 0.0)
            continue
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                text, problem, values = check.run()
            verdict, text = (FAILED, f"{text}; {problem}") if problem else (OK, text)
        except NotPossible as reason:
            verdict, text = NOT_RUN, str(reason)
        except Exception as error:  # the other checks do not depend on this one
            verdict, text = FAILED, _described(error)
        clean_up()
        yield Row(check.section, check.name, verdict, text, round(time.monotonic() - began, 2), values)


def _described(error: Exception) -> str:
    """Return the type and message of an error, and where in this package it was raised."""
    package = Path(__file__).parents[1]
    frames = traceback.extract_tb(error.__traceback__)[1:]  # the first one is `run_checks`
    frames = [frame for frame in frames if package in Path(frame.filename).parents]
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {one_line(str(error))[:300]}{place}"


def summary(rows: list[Row]) -> str:
    """Return how many checks passed, failed and did not run."""
    numbers = {verdict: sum(row.verdict == verdict for row in rows) for verdict in (OK, FAILED, NOT_RUN)}
    return f"{counted(len(rows), 'check')}: {numbers[OK]} ok, {numbers[FAILED]} failed, {numbers[NOT_RUN]} not run."


def markdown_table(rows: Iterable[Row]) -> list[str]:
    """Return rows as a Markdown table."""
    cells = [(row.section, row.name, row.text, row.verdict) for row in rows]
    return [f"| {' | '.join(row)} |" for row in [("section", "check", "result", "verdict"), ("---",) * 4, *cells]]
