"""The page of a study, generated from its results: question, figure, table, findings and how they were measured."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..inspection.drawing import plain, save
from ..system.texts import fenced, markdown
from .study import Results, Study

PAGE, PICTURE = "README.md", "picture.png"
# Recipe fields that describe the size of a study, with their names on the page.
SIZE = {
    "model": "model",
    "image_size": "image size",
    "train_share": "share of the training images",
    "epochs": "epochs",
    "max_steps": "steps",
    "batch_size": "batch size",
    "optimizer": "optimizer",
    "learning_rate": "learning rate",
    "augmentation": "augmentation",
}


def write_page(study: Study, results: Results, folder: Path) -> Path:
    """Write `README.md` and the figure of a study into a folder, and return the path of the page."""
    figure = study.plot(results)
    figure.suptitle(plain(f"{study.title}: {_data_of(results)}"), fontsize=12)
    save(figure, folder / PICTURE)
    path = folder / PAGE
    path.write_text(page(study, results), encoding="utf-8")
    return path


def page(study: Study, results: Results) -> str:
    """Return the page of a study in Markdown."""
    findings = [["claim", "here", "measured"]]
    findings += [[finding.claim, f"**{finding.verdict}**", finding.measured] for finding in study.findings(results)]
    parts = [
        f"# {study.title}",
        study.question,
        f"Source: {study.source}.",
        f"![{study.title}]({PICTURE})",
        markdown_table(study.table(results)),
        "Values are the mean and the sample standard deviation (SD) over seeds. A claim *agrees* or *does not agree* "
        "with the measurements if the 95 % confidence interval (Student's t, over differences within each seed) "
        "decides it. Otherwise there is *no significant difference*, or, for a claim with a margin, the result is "
        "*inconclusive*.",
        markdown_table(findings),
        "## How it was measured",
        fenced(_lines(results, "command"), "bash"),
        "\n".join(f"- {line}" for line in how(results)),
        "`results.jsonl` has one line per run. The figure and this page are generated from it: the same command "
        "redraws them, and with more `--seeds` it adds runs.",
    ]
    return "\n\n".join(parts) + "\n"


def summary(study: Study, results: Results) -> list[str]:
    """Return the table and the findings as lines for a terminal."""
    rows = study.table(results)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [*lines, "", *(f"{f.verdict}: {f.claim}. {f.measured}" for f in study.findings(results))]


def how(results: Results) -> list[str]:
    """Return the data, size, hardware and versions that the runs have in common, one per line."""
    rows = results.rows
    shared = {name: rows[0]["recipe"].get(name) for name in SIZE}
    shared = {n: v for n, v in shared.items() if v is not None and all(r["recipe"].get(n) == v for r in rows)}
    measured = [row for row in rows if not row["failed"]]
    seeds, hours = len({row["seed"] for row in rows}), sum(row["seconds"] for row in measured) / 3600
    lines = [
        f"{len(rows)} runs over {seeds} seed{'s' * (seeds != 1)}, {hours:.1f} hours of training in total",
        f"{_range(row['train_images'] for row in measured)} training images of {markdown(_data_of(results))}, "
        f"{_range(row['test_images'] for row in measured)} test images",
        f"{_range(row['parameters'] for row in measured)} parameters",
        ", ".join(f"{SIZE[name]}: {value}" for name, value in shared.items()),
        *(f"{n}: {text}" for n in ("hardware", "versions", "commit", "date") if (text := _lines(results, n, ", "))),
    ]
    if failed := len(rows) - len(measured):
        lines.append(f"runs that failed because the loss was not finite: {failed}")
    return lines


def markdown_table(rows: list[list[str]]) -> str:
    """Return rows, heading first, as a Markdown table."""
    escaped = [[" ".join(cell.replace("|", "\\|").split()) for cell in row] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in escaped]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _data_of(results: Results) -> str:
    return ", ".join(sorted({row["recipe"]["data"] for row in results.rows}))


def _lines(results: Results, name: str, separator: str = "\n") -> str:
    return separator.join(dict.fromkeys(row[name] for row in results.rows if row[name]))


def _range(numbers: Iterable[Any]) -> str:
    ordered = sorted(set(numbers)) or [0]
    return f"{ordered[0]:,}" if len(ordered) == 1 else f"{ordered[0]:,} to {ordered[-1]:,}"
