"""The result of an evaluation as text."""

from typing import Any

from ..system.texts import shortened

LONG, WORST = 20, 10  # with more classes than the one, only so many of the worst are printed


def describe(measured: dict[str, Any]) -> list[str]:
    """Return what `assess` measured as lines for a terminal."""
    height, width = measured["image_size"]
    split = "the part that is held out" if measured["split"] == "held out" else f"split {measured['split']}"
    lines = [
        f"{measured['model']} on {measured['data']}, {split}: {measured['images']:,} images of {height}x{width} "
        f"pixels, {measured['precision']}, {measured['hardware'] if measured['device'] != 'cpu' else 'CPU'}"
    ]
    if measured["note"]:
        probes_alone = "" if "figures" in measured else " Only probes are run."
        lines.append(f"Note: {measured['note']}{probes_alone}")
    lines += [f"Assumed: {assumed}" for assumed in measured["assumed"]]
    if broken := measured["broken"]:
        lines.append(f"Left out, since they cannot be read: {len(broken)} images ({shortened(broken)})")
    lines += [f"{name:>17}  {value}" for name, value in _rows(measured)]
    lines += [sentence for probe in measured["probes"].values() for sentence in probe.get("skipped", [])]
    lines += _merging_table(measured, measured["merged"]) if "merged" in measured else []
    return lines + (_class_table(measured["per_class"]) if "per_class" in measured else [])


def _rows(measured: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    if figures := measured.get("figures"):
        rows.append(("top-1", f"{figures['accuracy']:.2%}"))
        if "top5_accuracy" in figures:
            rows.append(("top-5", f"{figures['top5_accuracy']:.2%}"))
        rows.append(("loss", f"{figures['loss']:.4f}"))
        rows.append(("calibration error", f"{figures['calibration_error']:.2%}  (15 bins of confidence)"))
    for name, probe in measured["probes"].items():
        learned = f"{probe['train_images']:,} training images"
        if name == "linear":
            failed = "" if probe["converged"] else ", not converged"
            rows.append(("linear probe", f"{probe['accuracy']:.2%}  (C={probe['C']:g}{failed}, {learned})"))
        elif name == "knn":
            rows.append((f"{probe['k']}-NN", f"{probe['accuracy']:.2%}  ({learned})"))
        else:
            for shots, result in probe["shots"].items():
                deviation = "" if result["std"] is None else f" ± {100 * result['std']:.2f}"
                rows.append((f"{shots}-shot", f"{result['mean']:.2%}{deviation}  ({len(probe['seeds'])} draws)"))
    pace = measured["images_per_second"]
    processes = f", {measured['processes']} processes" if measured["processes"] > 1 else ""
    paces = f"{pace['pipeline']:,.0f} with reading and decoding, {pace['model']:,.0f} the model alone{processes}"
    return [*rows, ("images/s", paces)]


def _merging_table(measured: dict[str, Any], merged: dict[str, Any]) -> list[str]:
    lines = ["", f"{'top-1':>8}  {'loss':>7}  {'images/s':>9}  the model alone"]
    for row, name in ((measured, "as it is"), (merged, f"{merged['per_layer']} tokens merged in every layer")):
        figures, pace = row["figures"], row["images_per_second"]["model"]
        lines.append(f"{figures['accuracy']:>8.2%}  {figures['loss']:>7.4f}  {pace:>9,.0f}  {name}")
    return lines


def _class_table(per_class: list[dict[str, Any]]) -> list[str]:
    shown = [row for row in per_class if row["count"]]
    absent, is_long = len(per_class) - len(shown), len(shown) > LONG
    if is_long:
        shown = sorted(shown, key=lambda row: row["accuracy"])[:WORST]
    lines = ["", f"{'images':>8}  {'recall':>7}  {'precision':>9}  class"]
    for row in shown:
        precision = "-" if row["precision"] is None else f"{row['precision']:.1%}"
        lines.append(f"{row['count']:>8,}  {row['accuracy']:>7.1%}  {precision:>9}  {row['label']}")
    if is_long:
        lines.append(f"These are the {WORST} worst of {len(per_class) - absent} classes; --json writes all.")
    return lines
