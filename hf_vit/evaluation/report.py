"""Print the measurements of an evaluation."""

from typing import Any, NamedTuple

from ..data.labelled import ALL, HELD_OUT
from ..system.texts import counted, hanging, shortened
from .calibrate import sentences

MOST_CLASSES, WORST = 20, 10  # with more classes, only the worst ones are printed

# Names and formats of metrics, in the order of their lines; the first one that was measured is the main one.
METRICS = {
    "accuracy": ("top-1 accuracy", "{:.2%}"),
    "mean_average_precision": ("mAP", "{:.2%}"),
    "r2": ("R²", "{:.4f}"),
    "mean_iou": ("mean IoU", "{:.2%}"),
    "map": ("mAP", "{:.2%}"),
    "map_50": ("AP50", "{:.2%}"),
    "map_75": ("AP75", "{:.2%}"),
    "pixel_accuracy": ("pixel accuracy", "{:.2%}"),
    "top5_accuracy": ("top-5 accuracy", "{:.2%}"),
    "balanced_accuracy": ("balanced accuracy", "{:.2%}"),
    "micro_f1": ("micro-F1", "{:.2%}"),
    "macro_f1": ("macro-F1", "{:.2%}"),
    "mae": ("mean abs. error", "{:.4g}"),
    "rmse": ("root mean sq. err", "{:.4g}"),
    "loss": ("loss", "{:.4f}"),
    "calibration_error": ("calibration error", "{:.2%}  (ECE, 15 bins)"),
}
SHORT = {"top-1 accuracy": "top-1"}


class Table(NamedTuple):
    """The table of results per class, label or target: heading, width and format of columns, the leading one first."""

    thing: str
    things: str
    columns: dict[str, tuple[str, int, str]]


TABLES = {
    "single_label_classification": Table(
        "class",
        "classes",
        {"recall": ("recall", 7, "{:.1%}"), "precision": ("precision", 9, "{:.1%}"), "f1": ("F1", 6, "{:.1%}")},
    ),
    "multi_label_classification": Table(
        "label",
        "labels",
        {
            "average_precision": ("precision", 9, "{:.1%}"),
            "f1": ("F1", 6, "{:.1%}"),
            "threshold": ("threshold", 9, "{:.3f}"),
        },
    ),
    "regression": Table(
        "target",
        "targets",
        {"r2": ("R²", 7, "{:.4f}"), "mae": ("MAE", 9, "{:.4g}"), "rmse": ("RMSE", 9, "{:.4g}")},
    ),
    "semantic_segmentation": Table(
        "class",
        "classes",
        {"iou": ("IoU", 6, "{:.1%}"), "recall": ("recall", 7, "{:.1%}"), "share": ("of pixels", 9, "{:.1%}")},
    ),
    "object_detection": Table(
        "class",
        "classes",
        {
            "ap": ("AP", 6, "{:.1%}"),
            "ap_50": ("AP50", 6, "{:.1%}"),
            "f1": ("F1", 6, "{:.1%}"),
            "threshold": ("threshold", 9, "{:.3f}"),
            "boxes": ("boxes", 7, "{:,}"),
        },
    ),
}


def split_in_words(split: str) -> str:
    """Return how to name an evaluation split in a sentence."""
    return {HELD_OUT: "held-out split", ALL: "all images"}.get(split, f"split {split}")


def report_lines(measured: dict[str, Any]) -> list[str]:
    """Return the measurements of `evaluate_checkpoint` as lines for a terminal."""
    size = "their own sizes" if measured["image_size"] is None else "{}x{} pixels".format(*measured["image_size"])
    which = split_in_words(measured["split"])
    number = f"{measured['images']:,} of " * (measured["split"] == HELD_OUT)
    number += counted(measured["images_of_data" if number else "images"], "image")
    lines = [
        f"{measured['model']} on {measured['data']}, {which}: {number} of {size}, "
        f"{measured['precision']}, {measured['hardware'] if measured['device'] != 'cpu' else 'CPU'}"
    ]
    if measured["note"]:
        lines.append(f"Note: {measured['note']}{'' if 'figures' in measured else ' Only probes are run.'}")
    lines += [f"Assumed: {assumed}" for assumed in measured["assumed"]]
    if broken := measured["broken"]:
        lines.append(f"Skipped {counted(len(broken), 'unreadable image')}: {shortened(broken)}.")
    lines += [f"{name:>17}  {value}" for name, value in _rows(measured)]
    expected = measured.get("expected")
    if expected and (value := measured.get("figures", {}).get(expected["metric"])) is not None:
        where = "below" if value < expected["low"] else "within" if value <= expected["high"] else "above"
        name = METRICS[expected["metric"]][0]
        interval = " to ".join(METRICS[expected["metric"]][1].format(expected[end]) for end in ("low", "high"))
        images = counted(measured["images"], "such image")
        advice = {
            "below": " These images probably differ from the training images.",
            "within": " This range is wider than the one that fit printed, because these images are also a sample.",
            "above": " These images may be training images, or copies of them, which hf-vit audit finds.",
        }[where]
        lines += hanging(
            "", f"The {name} is {where} the range that hf-vit fit expected for {images}, {interval}.{advice}"
        )
    lines += [sentence for probe in measured["probes"].values() for sentence in probe.get("skipped", [])]
    lines += _calibration_lines(measured["calibration"]) if "calibration" in measured else []
    lines += _merging_table(measured, measured["merged"]) if "merged" in measured else []
    return lines + (_class_table(measured["per_class"], measured["problem_type"]) if "per_class" in measured else [])


def _calibration_lines(found: dict[str, Any]) -> list[str]:
    others = found["measured"]
    rest = "" if others is None else f", and measured on the other {others['images']:,}"
    lines = ["", f"Calibrated on {counted(found['images'], 'image')}{rest}."]
    for sentence in sentences(found):
        lines += hanging("", sentence)
    if others is not None:
        lines += ["", f"{'answered':>9}  {'accuracy':>9}  least probability"]
        lines += [
            f"{row['answered']:>9.0%}  {row['accuracy']:>9.1%}  {row['threshold']:.3f}"
            for row in others["risk_coverage"]
        ]
    return lines


def _rows(measured: dict[str, Any]) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    metrics = measured.get("figures", {})
    rows += [(name, form.format(metrics[key])) for key, (name, form) in METRICS.items() if key in metrics]
    for name, probe in measured["probes"].items():
        training = counted(probe["train_images"], "training image")
        if name == "linear":
            failed = "" if probe["converged"] else ", not converged"
            rows.append(("linear probe", f"{probe['accuracy']:.2%}  (C={probe['C']:g}{failed}, {training})"))
        elif name == "knn":
            rows.append((f"{probe['k']}-NN", f"{probe['accuracy']:.2%}  ({training})"))
        else:
            for shots, result in probe["shots"].items():
                deviation = "" if result["std"] is None else f" ± {100 * result['std']:.2f}"
                rows.append((f"{shots}-shot", f"{result['mean']:.2%}{deviation}  ({len(probe['seeds'])} draws)"))
    if "windows" in measured:
        rows.append(("windows", "{}x{} pixels".format(*measured["windows"])))
    speed = measured["images_per_second"]
    processes = f", {measured['processes']} processes" if measured["processes"] > 1 else ""
    return [*rows, ("images/s", f"{speed['pipeline']:,.3g} with image decoding{processes}")]


def _merging_table(measured: dict[str, Any], merged: dict[str, Any]) -> list[str]:
    metric = next(name for name in METRICS if name in measured["figures"])
    name, form = METRICS[metric]
    lines = ["", f"{SHORT.get(name, name):>8}  {'loss':>7}  {'images/s':>9}  model alone"]
    for row, what in ((measured, "all tokens"), (merged, f"{merged['per_layer']} tokens merged per layer")):
        metrics, speed = row["figures"], row["images_per_second"]["model"]
        lines.append(f"{form.format(metrics[metric]):>8}  {metrics['loss']:>7.4f}  {speed:>9,.0f}  {what}")
    return lines


def _class_table(per_class: list[dict[str, Any]], problem_type: str) -> list[str]:
    table = TABLES[problem_type]
    key = next(iter(table.columns))  # by which rows are ordered
    known = [row for row in per_class if row["count"]]
    is_long = len(known) > MOST_CLASSES
    shown = sorted(known, key=lambda row: row[key])[:WORST] if is_long else known
    heads = "  ".join(f"{head:>{width}}" for head, width, _ in table.columns.values())
    lines = ["", f"{'images':>8}  {heads}  {table.thing}"]
    for row in shown:
        cells = "  ".join(
            f"{'-' if row[name] is None else form.format(row[name]):>{width}}"
            for name, (_, width, form) in table.columns.items()
        )
        lines.append(f"{row['count']:>8,}  {cells}  {row['label']}")
    if is_long:
        lines.append(f"These are the {WORST} worst of {len(known)} {table.things}; --json writes all.")
    return lines
