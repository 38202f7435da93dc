"""Compare ways to learn features without labels, at equal CPU time.

    python scripts/benchmark_pretraining.py masked_autoencoder DATA --seed 0 --output results.jsonl
    python scripts/benchmark_pretraining.py distillation DATA --teacher MODEL --output results.jsonl
    python scripts/benchmark_pretraining.py table results.jsonl

DATA holds train.parquet and test.parquet with images and labels. All methods train the encoder of the recipe
`cifar10-cpu` with AdamW for the same CPU time, which includes the teacher's forward, and excludes reading the images
and the evaluation. The learning rate rises for a tenth of the time, and then falls to 0 as a cosine. The frozen
features, the mean over patches, are then measured on test images: by the nearest of the first --bank training images,
and by a linear probe on the first --labels images.

Methods:
    untrained           The initial weights.
    masked_patches      The recipe `mim-pretrain`: mask tokens in the encoder, pixels with L1 loss, 60 % masked.
    masked_autoencoder  The recipe `mae-pretrain`: the encoder sees the visible 25 %; a decoder of two layers.
    lejepa              The recipe `lejepa-pretrain` with two global views and no local ones.
    distillation        Features of --teacher, on the same augmented images.
    supervised          Training from scratch on the --labels images alone, with their labels.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from accelerate import Accelerator
from benchmark_segmentation import TimedSchedule

from hf_vit import HFViTImageProcessor, HFViTModel
from hf_vit.data.images import EvaluationImages, normalize
from hf_vit.data.labelled import load_data
from hf_vit.data.loaders import evaluation_loader
from hf_vit.evaluation.metrics import extract_features
from hf_vit.evaluation.probing import knn, linear_probe
from hf_vit.studies.pretraining import first_of_each_class
from hf_vit.system.machine import machine, versions
from hf_vit.training.loop import train
from hf_vit.training.recipe import TrainConfig

CLASSES = 10
DECODER = {"decoder_hidden_size": 64, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 2}
MASKED = {"task": "masked_patches", "smallest_crop": 0.6}
METHODS: dict[str, dict[str, Any]] = {
    "untrained": {},
    "masked_patches": {**MASKED, "mask_ratio": 0.6, "model_config.mim_objective": "pixels"},
    "masked_autoencoder": {
        **MASKED,
        "mask_ratio": 0.75,
        "model_config.mim_objective": "autoencoder",
        **{f"model_config.{name}": value for name, value in DECODER.items()},
    },
    "lejepa": {"task": "lejepa", "smallest_crop": 1.0, "local_views": 0},
    "distillation": {"task": "distillation"},
    "supervised": {},
}
COMMON = {
    **{"optimizer": "adamw", "learning_rate": 1e-3, "warmup_epochs": 0, "cache": "ram", "precision": "fp32"},
    **{"max_steps": 10**6, "save_every": 10**6, "eval_every": 10**6},
}


def pretrain(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train by a method for some CPU time, and return facts of the run."""
    # An untrained model takes one step with a learning rate of 0.
    schedule = TimedSchedule(60 * options.minutes if options.method != "untrained" else 1e-9)

    used: list[float] = []

    def steps(run: Any) -> Iterator[int]:
        object.__setattr__(run.plan, "schedule", schedule)
        schedule.began = time.process_time()
        yield 0
        for step in count(1):
            if schedule.passed >= schedule.seconds:
                break
            yield step
        used.append(schedule.passed)

    fields = {**COMMON, **METHODS[options.method], "seed": options.seed, "output_dir": str(folder)}
    if options.method == "untrained":
        fields["learning_rate"] = 0.0
    if options.method == "distillation":
        fields["teacher"] = options.teacher
    is_supervised = options.method in ("untrained", "supervised")
    data = load_data(str(options.data), needs_labels=is_supervised)
    if is_supervised:
        chosen = first_of_each_class(data.train, str(data.columns[1]), options.labels // CLASSES)
    else:
        chosen = data.train.select(range(options.images))
    evaluated = data.evaluation.select(range(options.test if is_supervised else 256))
    data = replace(data, train=chosen, evaluation=evaluated, train_length=len(chosen))
    run = train(TrainConfig.from_recipe("cifar10-cpu", data=str(options.data), **fields), steps=steps, data=data)
    facts = {"steps": run.metrics["steps"], "images": run.metrics["steps"] * run.config.batch_size}
    if options.method == "supervised":
        facts["accuracy"] = run.metrics["eval_accuracy"]
    return {**facts, "cpu_seconds": round(used[0], 1)}


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the accuracies of the features of a trained encoder."""
    encoder, accelerator = HFViTModel.from_pretrained(folder).eval(), Accelerator()
    data = load_data(str(options.data))
    processor = HFViTImageProcessor.from_pretrained(folder)
    label = str(data.columns[1])
    bank = first_of_each_class(data.train, label, options.bank // CLASSES)
    features = {}
    for name, images in (("bank", bank), ("test", data.evaluation.select(range(options.test)))):
        loader = evaluation_loader(EvaluationImages(images, data.columns, processor), 128, 0)
        to_model = partial(normalize, processor=processor)
        features[name] = extract_features(encoder, loader, accelerator, to_model, encoder.pooler)[:2]
    labelled = first_of(features["bank"], options.labels // CLASSES)
    return {
        "knn": knn(features["bank"], features["test"])["accuracy"],
        "knn_labels": knn(labelled, features["test"])["accuracy"],
        "linear_probe": linear_probe(labelled, features["test"], strengths=(1e-3, 1e-2, 1e-1))["accuracy"],
    }


def first_of(features: tuple[torch.Tensor, torch.Tensor], number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the features and labels of the first images of every class."""
    chosen = torch.cat([(features[1] == label).nonzero()[:number, 0] for label in features[1].unique()])
    return features[0][chosen], features[1][chosen]


def table(results: Path) -> str:
    """Return a Markdown table of mean (standard deviation) over seeds."""
    rows = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    figures = {"knn": "kNN", "knn_labels": "kNN, 1,000 labels", "linear_probe": "linear probe, 1,000 labels",
               "accuracy": "classifier, 1,000 labels"}  # fmt: skip
    lines = [f"| method | seeds | images seen | {' | '.join(figures.values())} |", "|---" * (3 + len(figures)) + "|"]
    for method in dict.fromkeys(row["method"] for row in rows):
        group = [row for row in rows if row["method"] == method]
        cells = [method, str(len(group)), f"{mean(row['images'] for row in group):,.0f}"]
        for name in figures:
            values = [100 * row[name] for row in group if row.get(name) is not None]
            spread = f" ({stdev(values):.1f})" if len(values) > 1 else ""
            cells.append(f"{mean(values):.1f}{spread}" if values else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=["table", *METHODS])
    parser.add_argument("data", type=Path, help="Folder of the data; for table: the results.")
    parser.add_argument("--teacher", help="Folder or Hub name of the teacher of distillation.")
    parser.add_argument("--minutes", type=float, default=5.0, help="CPU minutes of training.")
    parser.add_argument("--images", type=int, default=20_000, help="Number of training images without labels.")
    parser.add_argument("--labels", type=int, default=1_000, help="Number of labelled images.")
    parser.add_argument("--bank", type=int, default=5_000, help="Number of labelled images for neighbours.")
    parser.add_argument("--test", type=int, default=5_000, help="Number of test images.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results.jsonl"))
    options = parser.parse_args()
    if options.method == "table":
        print(table(options.data))
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = pretrain(options, Path(folder) / "run")
        found |= measure(options, Path(folder) / "run")
    row = {"method": options.method, "seed": options.seed, "minutes": options.minutes, **found}
    with options.output.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**row, "hardware": machine(), "versions": versions()}) + "\n")
    print(row)


if __name__ == "__main__":
    main()
