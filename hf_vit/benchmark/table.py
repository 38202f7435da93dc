"""What was measured, in words: the machine, the versions, a table a case, and the files that keep it."""

import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from ..system.machine import slug
from .suites import CEILING

# ---------------------------------------------------------------------------------------------------- the machine


def describe(machine: dict[str, Any], installed: dict[str, str]) -> list[str]:
    """Return machine and versions as lines."""
    facts = [f"{machine['processor']}, {machine['cores']} cores ({' '.join(machine['flags']) or 'no flags known'})"]
    facts.append(f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}")
    if "memory" in machine:
        facts.append(f"{machine['memory'] / 2**30:.0f} GiB")
    if "accelerator" in machine:
        facts.append(f"{machine['accelerator']}, {machine['accelerator_memory'] / 2**30:.0f} GiB")
    if "load" in machine:
        facts.append(f"load {machine['load']:.1f} at the start")
    return [", ".join(facts), ", ".join(f"{name} {number}" for name, number in installed.items())]


# ---------------------------------------------------------------------------------------------------- the table

COLUMNS = ("variant", "images/s", "times as fast", "ceiling", "memory", "error")
LEGEND = (
    "Medians over rounds, and in brackets the smallest and largest of up to seven rounds, the quartiles of more.",
    "Times as fast: the median of ratios within a round, not stated where its spread holds 1 or is wider than its",
    "distance from 1. Ceiling: share of the rate of large matrix products in the same round. Memory: the peak of the",
    "process, or on an accelerator of what torch took there. Error: distance of the outputs from a reference in fp32.",
)


def table(results: Sequence[dict[str, Any]]) -> list[str]:
    """Return the results of one case as a heading, a table that is Markdown, and a line for each that failed."""
    first = results[0]
    baselines = {result["baseline"] for result in results if result.get("baseline")}
    against = f", times as fast as {baselines.pop()}" if baselines else ""
    rows = [_row(result) for result in results if "failure" not in result]
    used = [place for place in range(len(COLUMNS)) if any(row[place] for row in rows)]
    rows = [[row[place] for place in used] for row in [COLUMNS, *rows]] if rows else []
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"### {first['suite']}: {first['case']}{against}", ""]
    if rows:
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        lines += ["| " + " | ".join(_aligned(row, widths)) + " |" for row in [rows[0], rule, *rows[1:]]]
    failures = [f"- {result['variant']} is left out: {result['failure']}" for result in results if "failure" in result]
    return [*lines, *([""] if rows and failures else []), *failures, ""]


def _aligned(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]


def _row(result: dict[str, Any]) -> list[str]:
    if result["variant"] == CEILING:
        pace = f"{_spread(result['operations_per_second'], 1e9)} GFLOP/s"
        return [f"{CEILING} {result['precision']}", pace, *[""] * 4]
    share, memory = result["share_of_ceiling"], result["peak_memory"]
    precision = "" if result["precision"] == "uint8" else f" {result['precision']}"
    return [
        result["variant"].removesuffix(precision) + precision,
        _spread(result["images_per_second"]),
        _ratio(result),
        "" if share is None else f"{share:.0%}",
        "" if memory is None else f"{memory / 2**20:,.0f} MiB",
        f"{result['error']:.0e}",
    ]


def _ratio(result: dict[str, Any]) -> str:
    if not result["agrees"]:
        return "disagrees"
    if result["baseline"] is None:
        return "1"
    ratio = result["ratio"]
    if not result["is_told_apart"]:
        return "not told apart"
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def _spread(values: dict[str, float], unit: float = 1.0) -> str:
    median, low, high = (_three_digits(values[name] / unit) for name in ("median", "low", "high"))
    return f"{median} ({low} to {high})"


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


# ---------------------------------------------------------------------------------------------------- the files


class Report:
    """Files of one machine and day, to which every run adds: a line of JSON a result, and the tables.

    Args:
        folder: Made if need be.
        command: What was called.
        machine: See `hardware`.
        installed: See `versions`.
    """

    def __init__(self, folder: Path, command: str, machine: dict[str, Any], installed: dict[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{slug(machine)}-{date.today().isoformat()}"
        self._add([{"command": command, "hardware": machine, "versions": installed}])
        self._write(["```bash", command, "```", "", *describe(machine, installed), "", *LEGEND, ""])

    def add(self, results: Sequence[dict[str, Any]]) -> None:
        """Keep the results of a case."""
        self._add(results)
        self._write(table(results))

    def _add(self, entries: Sequence[dict[str, Any]]) -> None:
        with self.path.with_suffix(".jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in entries)

    def _write(self, lines: Sequence[str]) -> None:
        with self.path.with_suffix(".md").open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
