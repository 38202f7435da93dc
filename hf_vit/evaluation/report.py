"""Print the measurements of an evaluation."""

from typing import Any

from ..data.labelled import HELD_OUT
from ..system.texts import shortened

MOST_CLASSES, WORST = 20, 10  # with more classes, only the worst ones are printed


def report_lines(measured: dict[str, Any]) -> list[str]:
    """Return the measurements of `evaluate_checkpoint` as lines for a terminal."""
    height, width = measured["image_size"]
    split = "held-out split" if measured["split"] == HELD_OUT else f"split {measured['split']}"
    lines = [
        f"{measured['model']} on {measured['data']}, {split}: {measured['images']:,} images of {height}x{width} "
        f"pixels, {measured['precision']}, {measured['hardware'] if measured['device'] != 'cpu' else 'CPU'}"
    ]
    if measured["note"]:
        lines.append(f"Note: {measured['note']}{'' if 'figures' in measured else ' Only probes are run.'}")
    lines += [f"Assumed: {assumed}" for assumed in measured["assumed"]]
    if broken := measured["broken"]:
        lines.append(f"Skipped {len(broken)} images that cannot be read ({shortened(broken)})")
    lines += [f"{name:>17}  {value}" for name, value in _rows(measured)]
    lines += [sentence for probe in measured["probes"].values() for sentence in probe.get("skipped", [])]
    lines += _merging_table(measured, measured["merged"]) if "merged" in measured else []
    return lines + (_class_table(measured["per_class"]) if "per_class" in measured else [])


def _rows(measured: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    if metrics := measured.get("figures"):
        rows.append(("top-1 accuracy", f"{metrics['accuracy']:.2%}"))
        if "top5_accuracy" in metrics:
            rows.append(("top-5 accuracy", f"{metrics['top5_accuracy']:.2%}"))
        rows.append(("loss", f"{metrics['loss']:.4f}"))
        rows.append(("calibration error", f"{metrics['calibration_error']:.2%}  (ECE, 15 bins)"))
    for name, probe in measured["probes"].items():
        training = f"{probe['train_images']:,} training images"
        if name == "linear":
            failed = "" if probe["converged"] else ", not converged"
            rows.append(("linear probe", f"{probe['accuracy']:.2%}  (C={probe['C']:g}{failed}, {training})"))
        elif name == "knn":
            rows.append((f"{probe['k']}-NN", f"{probe['accuracy']:.2%}  ({training})"))
        else:
            for shots, result in probe["shots"].items():
                deviation = "" if result["std"] is None else f" ± {100 * result['std']:.2f}"
                rows.append((f"{shots}-shot", f"{result['mean']:.2%}{deviation}  ({len(probe['seeds'])} draws)"))
    speed = measured["images_per_second"]
    processes = f", {measured['processes']} processes" if measured["processes"] > 1 else ""
    speeds = f"{speed['pipeline']:,.0f} with image decoding, {speed['model']:,.0f} for the model alone{processes}"
    return [*rows, ("images/s", speeds)]


def _merging_table(measured: dict[str, Any], merged: dict[str, Any]) -> list[str]:
    lines = ["", f"{'top-1':>8}  {'loss':>7}  {'images/s':>9}  model alone"]
    for row, name in ((measured, "all tokens"), (merged, f"{merged['per_layer']} tokens merged per layer")):
        metrics, speed = row["figures"], row["images_per_second"]["model"]
        lines.append(f"{metrics['accuracy']:>8.2%}  {metrics['loss']:>7.4f}  {speed:>9,.0f}  {name}")
    return lines


def _class_table(per_class: list[dict[str, Any]]) -> list[str]:
    with_images = [row for row in per_class if row["count"]]
    is_long = len(with_images) > MOST_CLASSES
    shown = sorted(with_images, key=lambda row: row["accuracy"])[:WORST] if is_long else with_images
    lines = ["", f"{'images':>8}  {'recall':>7}  {'precision':>9}  class"]
    for row in shown:
        precision = "-" if row["precision"] is None else f"{row['precision']:.1%}"
        lines.append(f"{row['count']:>8,}  {row['accuracy']:>7.1%}  {precision:>9}  {row['label']}")
    if is_long:
        lines.append(f"These are the {WORST} worst of {len(with_images)} classes; --json writes all.")
    return lines
