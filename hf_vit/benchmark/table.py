"""Reports of a benchmark: machine and versions, a table per case, and their files."""

import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from ..system.machine import slug
from .measure import CEILING


def describe(machine: dict[str, Any], installed: dict[str, str]) -> list[str]:
    """Return the machine and the versions as two lines."""
    flags = " ".join(machine["flags"]) or "unknown flags"
    facts = [f"{machine['processor']}, {machine['cores']} CPU cores ({flags})"]
    facts.append(f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}")
    if "memory" in machine:
        facts.append(f"{machine['memory'] / 2**30:.0f} GiB")
    if "accelerator" in machine:
        facts.append(f"{machine['accelerator']}, {machine['accelerator_memory'] / 2**30:.0f} GiB")
    if "load" in machine:
        facts.append(f"load average {machine['load']:.1f} at the start")
    return [", ".join(facts), ", ".join(f"{name} {number}" for name, number in installed.items())]


COLUMNS = ("variant", "images/s", "speedup", "ceiling", "memory", "error")
LEGEND = (
    "Medians over rounds; in brackets minimum and maximum of up to seven rounds, quartiles of more. Speedup: median",
    "of the ratios within each round; not significant if their range includes 1 or is wider than its distance from 1.",
    "Ceiling: share of the speed of large matrix products in the same round. Memory: peak of the process, or of torch",
    "on the GPU. Error: relative distance of the outputs from an fp32 reference.",
)


def table(results: Sequence[dict[str, Any]]) -> list[str]:
    """Return the results of one case as a heading, a Markdown table, and a line for each failed variant."""
    first = results[0]
    baselines = {result["baseline"] for result in results if result.get("baseline")}
    against = f", speedup over {baselines.pop()}" if baselines else ""
    rows = [_row(result) for result in results if "failure" not in result]
    used = [column for column in range(len(COLUMNS)) if any(row[column] for row in rows)]
    rows = [[row[column] for column in used] for row in [COLUMNS, *rows]] if rows else []
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"### {first['suite']}: {first['case']}{against}", ""]
    if rows:
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        for row in [rows[0], rule, *rows[1:]]:
            cells = [f"{cell:{'>' if number else '<'}{widths[number]}}" for number, cell in enumerate(row)]
            lines.append(f"| {' | '.join(cells)} |")
    failed = [result for result in results if "failure" in result]
    failures = [f"- {result['variant']} was not measured: {result['failure']}" for result in failed]
    return [*lines, *([""] if rows and failures else []), *failures, ""]


def _row(result: dict[str, Any]) -> list[str]:
    if result["variant"] == CEILING:
        speed = f"{_spread(result['operations_per_second'], 1e9)} GFLOP/s"
        return [f"{CEILING} {result['precision']}", speed, *[""] * 4]
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
        return "outputs differ"
    if result["baseline"] is None:
        return "1"
    ratio = result["ratio"]
    if not result["is_told_apart"]:
        return "not significant"
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def _spread(values: dict[str, float], unit: float = 1.0) -> str:
    median, low, high = (_three_digits(values[name] / unit) for name in ("median", "low", "high"))
    return f"{median} ({low} to {high})"


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


class Report:
    """Write the files of one machine and day: a JSON line per result, and the tables. Every run appends.

    Args:
        folder: Created if needed.
        command: The command line to record.
        machine, installed: See `hardware` and `versions` in `system.machine`.
    """

    def __init__(self, folder: Path, command: str, machine: dict[str, Any], installed: dict[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{slug(machine)}-{date.today().isoformat()}"
        self._add([{"command": command, "hardware": machine, "versions": installed}])
        self._write(["```bash", command, "```", "", *describe(machine, installed), "", *LEGEND, ""])

    def add(self, results: Sequence[dict[str, Any]]) -> None:
        """Append the results of a case."""
        self._add(results)
        self._write(table(results))

    def _add(self, entries: Sequence[dict[str, Any]]) -> None:
        with self.path.with_suffix(".jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in entries)

    def _write(self, lines: Sequence[str]) -> None:
        with self.path.with_suffix(".md").open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
