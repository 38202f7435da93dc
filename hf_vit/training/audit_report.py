"""The folder that `hf-vit audit` writes: a page, a table of findings, and cleaned data.

index.html        everything, with small pictures; without scripts or requests
findings.csv      a row per finding: image, split, row, finding, score, label, suggestion, copy_of, copy_split,
findings.parquet  copy_row, reason
clean.csv         paths, labels and splits of the other images, for `hf-vit train --data`; where images are not
clean/            files on this machine, parquet files of images and labels instead
"""

import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..data.classes import DENSE, MULTI, REGRESSION, SINGLE, UNKNOWN
from ..data.findings import KINDS, Finding, Images, counts_of
from ..evaluation.cues import Cue
from ..evaluation.slices import Slice
from ..inspection.cards import STYLE, Card, cards, table
from ..inspection.page import document, escape
from ..system.disk import check_output_folder, writing
from ..system.texts import counted, hanging
from .auditing import Accuracy, AuditResult

PAGE, TABLE, CLEAN = "index.html", "findings", "clean"
SHOWN = 48  # images of a kind of finding on the page
COLUMNS = (
    *("image", "split", "row", "finding", "score", "label", "suggestion", "copy_of", "copy_split", "copy_row"),
    "reason",
)


def check_audit_folder(folder: Path, sources: Any) -> None:
    """Raise `ValueError` if the folder holds anything but an earlier audit."""
    check_output_folder(folder, (folder / f"{TABLE}.csv").is_file(), sources, "--output-dir")


def write_audit(result: AuditResult, folder: Path) -> list[str]:
    """Write the folder, and return lines on what was found and what to do next."""
    with writing("the audit", folder):
        folder.mkdir(parents=True, exist_ok=True)
        rows = list(rows_of(result))
        _write_tables(rows, folder)
        (folder / PAGE).write_text(_page(result), encoding="utf-8")
        cleaned = _write_clean(result, folder)
    return [*summary_of(result), *cleaned]


def rows_of(result: AuditResult) -> Iterator[dict[str, Any]]:
    """Yield the findings as rows of the table, kind by kind, the highest score first."""
    images, order = result.images, list(KINDS)
    names = images.names
    for each in sorted(result.findings, key=lambda each: (order.index(each.kind), -each.score, each.image)):
        split, row = images.place(each.image)
        other = (None, None) if each.other is None else images.place(each.other)
        yield dict(
            zip(
                COLUMNS,
                (
                    images.stored(each.image)["path"] or names[each.image], split, row, each.kind,
                    round(each.score, 4), "" if each.kind == "unreadable" else images.label_text(each.image),
                    each.suggestion, "" if each.other is None else names[each.other], *other, each.reason,
                ),
                strict=True,
            )
        )  # fmt: skip


def _write_tables(rows: list[dict[str, Any]], folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {"row": pa.int64(), "copy_row": pa.int64(), "score": pa.float32()}
    schema = pa.schema([pa.field(name, types.get(name, pa.string())) for name in COLUMNS])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / f"{TABLE}.parquet")
    with (folder / f"{TABLE}.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


# ------------------------------------------------------------------------------------------------------- summary


def summary_of(result: AuditResult) -> list[str]:
    """Return what was found, a line each."""
    lines = [f"{KINDS[kind].heading}: {number:,}." for kind, number in counts_of(result.findings).items() if number]
    lines = lines or ["Nothing odd was found in the files."]
    if result.wrong_labels is not None:
        lines.append(f"Expected number of wrong labels: {result.wrong_labels:,.0f}.")
    lines += [
        f"The class can be predicted from {cue.facts} alone with an accuracy of {cue.accuracy:.1%} (share of the "
        f"largest class: {cue.chance:.1%}), so a model may learn this instead of the content."
        for cue in result.cues
        if cue.is_strong
    ]
    lines += [
        f"Accuracy of {each.what}: {each.value:.1%} ({each.low:.1%} to {each.high:.1%}, {each.images:,} images)."
        for each in result.accuracies
    ]
    if len(result.slices) > 1:
        weakest = result.slices[0]
        lines.append(
            f"Weakest slice of {counted(len(result.slices) - 1, 'weak slice')}: {weakest.name}, accuracy "
            f"{weakest.accuracy:.1%} on {weakest.images:,} images (all: {result.slices[-1].accuracy:.1%})."
        )
    return ["\n".join(hanging("", line)) for line in [*lines, *result.notes]]


# ---------------------------------------------------------------------------------------------------------- page


def _page(result: AuditResult) -> str:
    images, counts = result.images, counts_of(result.findings)
    data = images.data
    facts = {
        "Data": data.name,
        "Training images": f"{images.first_evaluation:,}",
        "Evaluation images": f"{len(images.names) - images.first_evaluation:,}",
        "Evaluation split": data.eval_split or "none",
    }
    found = {KINDS[kind].heading: f"{number:,}" for kind, number in counts.items()}
    if result.wrong_labels is not None:
        found["Expected number of wrong labels"] = f"{result.wrong_labels:,.0f}"
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(fact)}</dd>\n" for name, fact in facts.items())
    body = f"<dl>\n{listed}</dl>\n{table(('Finding', 'Images'), found.items(), lambda column: column == 1)}"
    body += "".join(f'<p class="note">{escape(note)}</p>\n' for note in result.notes)
    body += _accuracies(result) + _cues(result) + _slices(result)
    for kind, number in counts.items():
        if number:
            body += _section(result, kind, number)
    return document(f"Audit of {data.name}", body, STYLE)


def _accuracies(result: AuditResult) -> str:
    rows = [(each.what, f"{each.images:,}", f"{each.value:.1%}", _interval(each)) for each in result.accuracies]
    headings = ("Accuracy on the evaluation split of", "Images", "Accuracy", "95% interval")
    return _of_table("Accuracy with and without leaks", "", headings, rows)


def _cues(result: AuditResult) -> str:
    rows = [(cue.facts, f"{cue.accuracy:.1%}", _interval(cue), f"{cue.chance:.1%}") for cue in result.cues]
    text = (
        "Accuracy of a classifier that sees only these facts about an image, in cross-validation on the training "
        "split. If it is far above the share of the largest class, a model may learn these facts instead of the "
        "content. Colors are often part of the content."
    )
    return _of_table("Spurious cues", text, ("Facts", "Accuracy", "95% interval", "Largest class"), rows)


def _slices(result: AuditResult) -> str:
    rows = [
        (each.name, f"{each.images:,}", f"{each.errors:,}", f"{each.accuracy:.1%}", _interval(each))
        for each in result.slices
    ]
    text = (
        f"Groups of images with an accuracy below the overall accuracy: {result.sliced}. The intervals are widened "
        "for the number of groups that were compared."
    )
    headings = ("Images", "Number", "Errors", "Accuracy", "95% interval")
    return _of_table("Weak slices", text, headings, rows)


def _interval(of: Accuracy | Cue | Slice) -> str:
    return f"{of.low:.1%} to {of.high:.1%}"


def _of_table(heading: str, text: str, headings: tuple[str, ...], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    shown = table(headings, rows, lambda column: column > 0)
    return f"<section>\n<h2>{escape(heading)}</h2>\n<p>{escape(text)}</p>\n{shown}</section>\n"


def _section(result: AuditResult, kind: str, number: int) -> str:
    found = sorted((each for each in result.findings if each.kind == kind), key=lambda each: (-each.score, each.image))
    shown = cards(_card(result.images, each) for each in found[:SHOWN])
    more = f"The first {SHOWN} of {counted(len(found), 'finding')}; all are in {TABLE}.csv." if number > SHOWN else ""
    meaning = " ".join(filter(None, [KINDS[kind].meaning, more]))
    return f"<section>\n<h2>{escape(KINDS[kind].heading)}</h2>\n<p>{escape(meaning)}</p>\n{shown}</section>\n"


def _card(images: Images, finding: Finding) -> Card:
    chosen = [finding.image] + ([] if finding.other is None else [finding.other])
    names = images.names
    label = images.label_text(finding.image)
    title = f"{label}: {finding.reason}" if label else finding.reason
    places = [f"{names[image]} ({images.place(image)[0]} {images.place(image)[1]})" for image in chosen]
    return Card([images.stored(image) for image in chosen], [title, f"score {finding.score:.3f}", *places])


# -------------------------------------------------------------------------------------------------- cleaned data


def _write_clean(result: AuditResult, folder: Path) -> list[str]:
    """Write the images that are not left out, and return lines on how to use them."""
    images, data = result.images, result.images.data
    if data.problem_type in DENSE:
        return ["Cleaned data is not written for masks and boxes: remove the images that findings.csv names."]
    rows = data.train[data.columns[1]][:] if data.problem_type == MULTI else []
    if any(UNKNOWN in row for row in rows):
        return ["Cleaned data is not written where labels are unknown: remove the images that findings.csv names."]
    kept = [image for image in range(len(images.names)) if image not in result.left_out]
    if all(_is_file(images.stored(image)) for image in kept):  # embedded images end this at the first one
        target = folder / f"{CLEAN}.csv"
        _write_paths(images, kept, target)
    else:
        target = folder / CLEAN
        _write_images(images, kept, target)
    number = f"{len(images.names) - len(kept):,} of {counted(len(images.names), 'image')}"
    what = f"Cleaned data without {number}" if len(kept) < len(images.names) else "Nothing to remove. The same data"
    return [f"{what}:  hf-vit train --data {target}{_label_options(data)}"]


def _label_options(data: Any) -> str:
    if data.problem_type != REGRESSION or len(data.label_names) == 1:
        return ""
    return "".join(f" --label-column {name}" for name in data.label_names)


def _labels_of(images: Images, image: int) -> dict[str, Any]:
    """Return the columns of labels of an image."""
    data = images.data
    if images.labels is None:
        return {}
    label = images.labels[image]
    if data.problem_type == SINGLE:
        return {"label": data.label_names[label]}
    values = label if isinstance(label, list) else [label]
    if data.problem_type == MULTI:
        return {"labels": [name for name, value in zip(data.label_names, values, strict=True) if value == 1]}
    names = data.label_names if len(values) > 1 else ["label"]
    return dict(zip(names, values, strict=True))


def _is_file(stored: dict[str, Any]) -> bool:
    return stored["bytes"] is None and os.path.isfile(stored["path"] or "")


def _write_paths(images: Images, kept: list[int], target: Path) -> None:
    rows = [
        {
            "file_name": os.path.relpath(images.stored(image)["path"], target.parent),
            **_labels_of(images, image),
            "split": "train" if image < images.first_evaluation else "test",
        }
        for image in kept
    ]
    with target.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["file_name"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _write_images(images: Images, kept: list[int], target: Path) -> None:
    from datasets import Image

    target.mkdir(exist_ok=True)
    for old in target.glob("*.parquet"):
        old.unlink()
    (column, label), first = images.data.columns, images.first_evaluation
    for name, split, start in zip(("train", "test"), images.splits, (0, first), strict=False):
        chosen = [image for image in kept if (image >= first) == (start > 0)]
        if not chosen:
            continue
        part = split.select([image - start for image in chosen])
        part = part.remove_columns([label] if label else [])
        rows = [_labels_of(images, image) for image in chosen]
        for key in rows[0]:
            part = part.add_column(key, [row[key] for row in rows])
        part.cast_column(column, Image()).to_parquet(target / f"{name}.parquet")
