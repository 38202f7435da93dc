"""What the training of heads leaves beside the model: metrics and the model card."""

import json
import shlex
from pathlib import Path
from typing import Any

from ...hub.card import write_card
from ...system.machine import machine
from ...system.texts import code, counted, markdown, shortened
from ..recipe import TrainConfig
from ..report import base_model_of, fenced_command, license_of_base, public_paths
from ..run import METRICS

# The metrics of each task that people read first, with their names.
FIRST: dict[str, dict[str, str]] = {
    "classification": {"accuracy": "Accuracy"},
    "multi_label": {"mean_average_precision": "Mean average precision"},
    "regression": {"r2": "R²", "mae": "mean absolute error"},
    "segmentation": {"mean_iou": "Mean IoU", "pixel_accuracy": "pixel accuracy"},
    "detection": {"map_50": "AP50", "map": "mAP"},
    "anomaly": {"auroc": "AUROC", "recall": "recall", "false_alarms": "false alarms"},
}
AS_NUMBER = ("r2", "mae", "auroc", "mean_average_precision")  # all others are shares


def headline(row: dict[str, Any]) -> str:
    """Return the first metrics of a trained head in a sentence."""
    names, metrics = FIRST[row["plan"]["task"]], row["metrics"]
    parts = [
        f"{name} {metrics[key]:.3g}" if key in AS_NUMBER else f"{name} {metrics[key]:.1%}"
        for key, name in names.items()
        if key in metrics
    ]
    images = counted(row["eval_count"], "evaluation image")
    return f"{', '.join(parts)} on {images} ({row['eval_split']})."


def next_commands(output_dir: Path, tasks: dict[str, str]) -> list[str]:
    """Return lines with commands that use a model with several heads."""
    folder = shlex.quote(str(output_dir))
    name = next((name for name, task in tasks.items() if task != "anomaly"), None)
    of_one = [f"  hf-vit evaluate {folder} LABELED_IMAGES --head {name}"] if name else []
    push = f"  hf-vit push {folder} YOUR_NAME/{shlex.quote(output_dir.resolve().name)}"
    return ["Next:", f"  hf-vit predict {folder} IMAGES", *of_one, push]


def write_heads(
    output_dir: Path, rows: dict[str, Any], known: dict[str, str], facts: dict[str, Any], seconds: float
) -> None:
    """Write `metrics.json` and the model card into the folder of a model.

    Args:
        output_dir: Folder with the model.
        rows: What the training found, by head.
        known: Tasks of heads that the model to start from had already; their metrics are in its folder.
        facts: Model, seed, command, image size and precision.
        seconds: Time of everything.
    """
    model = facts["model"]
    before = Path(model) / METRICS
    stated = json.loads(before.read_text(encoding="utf-8")).get("heads", {}) if before.is_file() else {}
    heads = {name: stated[name] for name in known if name in stated}
    for name, row in rows.items():
        plan = {**row["plan"], "data": public_paths(row["plan"]["data"])}
        heads[name] = {"task": plan["task"], **{key: value for key, value in row.items() if key != "fields"}}
        heads[name]["plan"] = plan
    shown = {key: value for key, value in facts.items() if key != "command"}
    metrics = {"heads": heads, **shown, "model": public_paths(model), "seconds": seconds}
    (output_dir / METRICS).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    data = list(dict.fromkeys(head["data"] for head in heads.values()))
    height, width = facts["image_size"]
    encoder = markdown(Path(model).name if Path(model).exists() else model)
    write_card(
        output_dir,
        title=output_dir.resolve().name,
        description=(
            f"{counted(len(known) + len(rows), 'head')} on one frozen encoder, {encoder}: one forward answers for all "
            f"of them. Trained on {markdown(shortened(data))}."
        ),
        sections={
            "Heads": _table(heads),
            "Limitations": (
                f"- The heads were trained at {height}x{width} pixels, on complete images that were resized to this "
                "size. Expect other metrics on other images.\n"
                "- The encoder was not trained: fine-tuning it for one task can be better for this task."
            ),
            "Training": (
                f"{fenced_command(facts['command'])}\n\nThe same command resumes an interrupted training. Features "
                f"were computed in {facts['precision']}, and patches stored in float16. Measured on {machine()} in "
                f"{seconds:,.0f} s, with seed {facts['seed']}."
            ),
        },
        license=license_of_base(model),
        base_model=base_model_of(TrainConfig(model=model)),
    )


def _table(heads: dict[str, Any]) -> str:
    lines = ["| head | task | data | training images | on the evaluation images |", "|---|---|---|---|---|"]
    for name, head in heads.items():
        cells = [code(name), head["task"], markdown(head["data"]), f"{head['train_images']:,}", headline(head)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
