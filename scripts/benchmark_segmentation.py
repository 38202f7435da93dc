"""Compare `HFViTForSemanticSegmentation` with UperNet and SegFormer of transformers at equal CPU time.

    python scripts/benchmark_segmentation.py linear DATA --output results.jsonl
    python scripts/benchmark_segmentation.py upernet DATA --model ENCODER --image-size 168x224 --output results.jsonl
    python scripts/benchmark_segmentation.py table results.jsonl

DATA holds train.parquet, validation.parquet and test.parquet with images and masks. All methods share the training
loop of `hf-vit train`: images, augmentation, AdamW, loss and clipping. They train for the same CPU time, without
evaluation. The learning rate rises for a tenth of it, and then falls to 0 as a cosine. The last model is measured once
on the validation and the test images, at the size of its input.

Methods:
    linear     `HFViTForSemanticSegmentation`, with the recipe `scratch` or, with --model, `finetune`.
    upernet    `UperNetForSemanticSegmentation` on four layers of `HFViTBackbone`, with the same encoder, initial
               weights and recipe; without an auxiliary head. --width is that of its convolutions.
    segformer  `SegformerForSemanticSegmentation` of the default size, b0, from scratch.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from transformers import (
    SegformerConfig,
    SegformerForSemanticSegmentation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from hf_vit.data.classes import SEGMENTATION
from hf_vit.data.dense import kinds_of_images
from hf_vit.data.labelled import load_data
from hf_vit.data.loaders import evaluation_loader
from hf_vit.model.configuration_hf_vit import HFViTConfig
from hf_vit.system.machine import machine, versions
from hf_vit.training.loop import train
from hf_vit.training.optim import Schedule
from hf_vit.training.recipe import TrainConfig, default_recipe
from hf_vit.training.tasks import build_model

ENCODER = {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 512}
# What a run, and the saving of an encoder, read from the config of a model.
SHARED = ("image_shape", "num_channels", "semantic_loss_ignore_index", "position_interpolation")
POINTS = 10_000  # of the schedule


class TimedSchedule(Schedule):
    """The factor on the learning rate as a function of the CPU time since the first step."""

    def __init__(self, seconds: float) -> None:
        super().__init__("cosine", POINTS, POINTS // 10)
        self.seconds, self.began = seconds, time.process_time()

    @property
    def passed(self) -> float:
        return time.process_time() - self.began

    def __call__(self, step: int) -> float:
        return super().__call__(min(POINTS, int(POINTS * self.passed / self.seconds)))


class UperNet(UperNetForSemanticSegmentation):
    """UperNet whose encoder is found by the optimizer, for layer decay."""

    base_model_prefix = "encoder"

    @property
    def encoder(self) -> Any:
        return self.backbone.vit


def linear(config: TrainConfig, task: Any, width: int) -> tuple[Any, Any]:
    """Build the model as `hf-vit train` does."""
    return build_model(config, task)


def upernet(config: TrainConfig, task: Any, width: int) -> tuple[Any, Any]:
    """Build UperNet with the encoder that `linear` has."""
    own, processor = build_model(config, task)
    depth = own.config.num_hidden_layers
    quarters = [-(-depth * part // 4) for part in range(1, 5)]
    of_backbone = HFViTConfig(**{**own.config.to_dict(), "out_features": None, "out_indices": quarters})
    of_model = {"id2label": own.config.id2label, "hidden_size": width, "use_auxiliary_head": False}
    model = UperNet(UperNetConfig(backbone_config=of_backbone, **of_model))
    model.backbone.vit.load_state_dict(own.vit.state_dict())
    model.encoder.requires_grad_(config.trained != "head")
    return _sharing(model, own), processor


def segformer(config: TrainConfig, task: Any, width: int) -> tuple[Any, Any]:
    """Build SegFormer-b0; the image processor is that of `linear`."""
    own, processor = build_model(config, task)
    model = SegformerForSemanticSegmentation(SegformerConfig(id2label=own.config.id2label))
    return _sharing(model, own), processor


def _sharing(model: Any, own: Any) -> Any:
    for name in SHARED:
        setattr(model.config, name, getattr(own.config, name))
    return model


METHODS = {"linear": linear, "upernet": upernet, "segformer": segformer}


def measure(options: argparse.Namespace, folder: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Train for some CPU minutes, and return results on the validation and the test images."""
    data, schedule = str(options.data), TimedSchedule(60 * options.minutes)

    def steps(run: Any) -> Iterator[int]:
        object.__setattr__(run.plan, "schedule", schedule)
        schedule.began = time.process_time()
        for step in count():
            if schedule.passed >= schedule.seconds:
                return
            yield step

    unlimited = {"max_steps": 10**6, "save_every": 10**6, "eval_every": 10**6, "warmup_epochs": 0}
    config = TrainConfig.from_recipe(
        default_recipe(fields.get("model")), data=data, task="segmentation", cache="ram", best_metric=None,
        output_dir=f"{folder}/run", **{**unlimited, **fields},
    )  # fmt: skip
    build = METHODS[options.method]
    run = train(config, steps=steps, build=lambda config, task: build(config, task, options.width))
    results = {"validation": run.predictions}
    if not options.no_test:
        results["test"] = _on_test_images(run, data)
    return {
        **{f"{split}_{name}": value for split, each in results.items() for name, value in each.metrics().items()},
        "learning_rate": run.config.learning_rate,
        "batch_size": run.config.batch_size,
        "steps": run.metrics["steps"],
        "parameters": run.metrics["parameters"],
        "classes": {split: each.per_class(run.data.label_names) for split, each in results.items()},
    }


def _on_test_images(run: Any, data: str) -> Any:
    test = load_data(data, eval_split="test", problem_type=SEGMENTATION, needs_train=False)
    images = kinds_of_images(test)[1](test.evaluation, test.columns, run.processor)
    loader = evaluation_loader(images, run.config.batch_size, 0)
    return run.task.results(run.model, loader, Accelerator(), run.to_model)


def table(results: Path) -> str:
    """Return a Markdown table: mean IoU as mean (standard deviation) over seeds, for every setting."""
    rows = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    names = ("encoder", "method", "width", "minutes", "learning_rate", "fields")
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(json.dumps([row[name] for name in names]), []).append(row)
    lines = [
        "| encoder | method | CPU minutes | learning rate | other | steps | validation | test |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for group in groups.values():
        first = group[0]
        cells = [first["encoder"], first["method"], first["minutes"], f"{first['learning_rate']:.1e}"]
        cells += [" ".join(first["fields"] + ([f"width {first['width']}"] if first["method"] == "upernet" else []))]
        cells += [f"{mean(row['steps'] for row in group):,.0f}"]
        for split in ("validation", "test"):
            values = [100 * row[f"{split}_mean_iou"] for row in group if f"{split}_mean_iou" in row]
            spread = f" (sd {stdev(values):.1f}, n = {len(values)})" if len(values) > 1 else ""
            cells.append(f"{mean(values):.1f} %{spread}" if values else "")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=["table", *METHODS])
    parser.add_argument("data", type=Path, help="Folder of the data; for table: the results.")
    parser.add_argument("--model", help="Folder or Hub name of an encoder; without it, from scratch.")
    parser.add_argument("--image-size", default="144x192", metavar="HxW")
    parser.add_argument("--minutes", type=float, default=4.5, help="CPU minutes of training.")
    parser.add_argument("--learning-rate", default="auto", help="Default: that of the recipe.")
    parser.add_argument("--width", type=int, default=512, help="Width of UperNet.")
    parser.add_argument(
        "--field", action="append", default=[], metavar="NAME=VALUE", help="Other field of the recipe."
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results.jsonl"))
    parser.add_argument("--no-test", action="store_true", help="Leave the test images out, to choose settings.")
    parser.add_argument("--keep", help="Folder to keep the run in.")
    options = parser.parse_args()
    if options.method == "table":
        print(table(options.data))
        return
    torch.set_num_threads(1)
    fields: dict[str, Any] = {"image_size": options.image_size, "batch_size": 16, "seed": options.seed}
    fields |= {"learning_rate": yaml.safe_load(options.learning_rate)}
    if options.model:
        fields["model"] = options.model
    else:
        fields |= {f"model_config.{name}": value for name, value in {**ENCODER, "patch_size": 16}.items()}
    fields |= {name: yaml.safe_load(value) for name, value in (field.split("=", 1) for field in options.field)}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, options.keep or folder, fields)
    row = {
        "method": options.method,
        "encoder": Path(options.model).name if options.model else "from scratch",
        "width": options.width,
        "fields": options.field,
        "seed": options.seed,
        "minutes": options.minutes,
        "seconds": round(time.perf_counter() - began),
        "image_size": options.image_size,
        **found,
        "hardware": machine(),
        "versions": versions(),
    }
    with options.output.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    scores = ", ".join(
        f"{split} {found[f'{split}_mean_iou']:.2%}" for split in ("validation", "test") if f"{split}_mean_iou" in found
    )
    print(f"{options.method} seed {options.seed}: {scores}, {found['steps']} steps")


if __name__ == "__main__":
    main()
