"""The page of a study, made from its results alone: question, how it was asked, picture, table, findings."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..inspection.drawing import plain, save
from ..system.texts import fenced, markdown
from .study import Results, Study

PAGE, PICTURE = "README.md", "picture.png"
# Fields of a recipe that say how large a study is, and what a page calls them.
SIZE = {
    "model": "model",
    "image_size": "pixels",
    "train_share": "share of the training images",
    "epochs": "epochs",
    "max_steps": "steps",
    "batch_size": "images a step",
    "optimizer": "optimizer",
    "learning_rate": "learning rate",
    "augmentation": "augmentation",
}


def write_page(study: Study, results: Results, folder: Path) -> Path:
    """Write `README.md` and the picture of a study into a folder, and return the page's path."""
    drawn = study.plot(results)
    drawn.suptitle(plain(f"{study.title}: {_data_of(results)}"), fontsize=12)
    save(drawn, folder / PICTURE)
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
        "Figures are the mean and the sample's standard deviation over seeds. A claim *agrees* or *does not agree* "
        "where the 95 % interval (Student's, over differences within a seed) says so; else it is *not told apart*.",
        markdown_table(findings),
        "## How it was measured",
        fenced(_lines(results, "command"), "bash"),
        "\n".join(f"- {line}" for line in how(results)),
        "Every run is a line of `results.jsonl`; the picture and this page are made from it: the same command draws "
        "them again, and with more `--seeds` adds runs.",
    ]
    return "\n\n".join(parts) + "\n"


def summary(study: Study, results: Results) -> list[str]:
    """Return table and findings as lines for a terminal."""
    rows = study.table(results)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [*lines, "", *(f"{f.verdict}: {f.claim}. {f.measured}" for f in study.findings(results))]


def how(results: Results) -> list[str]:
    """Return what the runs have in common, in lines."""
    rows = results.rows
    shared = {name: rows[0]["recipe"].get(name) for name in SIZE}
    shared = {n: v for n, v in shared.items() if v is not None and all(r["recipe"].get(n) == v for r in rows)}
    measured = [row for row in rows if not row["failed"]]
    seconds = sum(row["seconds"] for row in measured)
    lines = [
        f"{len(rows)} runs of {len({row['seed'] for row in rows})} seeds, {seconds / 3600:.1f} hours of training one "
        "behind the other",
        f"{_range(row['train_images'] for row in measured)} training images of {markdown(_data_of(results))}, and "
        f"{_range(row['test_images'] for row in measured)} to test",
        f"{_range(row['parameters'] for row in measured)} parameters",
        ", ".join(f"{SIZE[name]}: {value}" for name, value in shared.items()),
        *(f"{n}: {said}" for n in ("hardware", "versions", "commit", "date") if (said := _lines(results, n, ", "))),
    ]
    if failed := len(rows) - len(measured):
        lines.append(f"{failed} runs ended since their loss was no longer finite")
    return lines


def markdown_table(rows: list[list[str]]) -> str:
    """Return rows, the heading first, as a table in Markdown."""
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
