"""Measure label sets and abstention of trained classifiers on held-out images, over random divisions of these.

    python scripts/measure_unknown.py my-vit --data test_pictures/ --others photos/ --output results.jsonl

The predictions for the images are made once. For each seed, thresholds are fitted to one half of them as `hf-vit
evaluate --calibrate` does, and measured on the other half; nothing is written into the models. A row of the output has
the means over the seeds, the lowest and the highest value, and the share of seeds whose coverage lies in its 95 %
interval, or whose error is at most the bound. `--others` are images of none of the classes: the row states how many of
them are answered with "unknown", or how large their label sets are.
"""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from hf_vit.checkpoints.models import load
from hf_vit.data.evaluated import load_evaluation_data
from hf_vit.data.images import normalize
from hf_vit.data.labelled import ImageData
from hf_vit.data.loaders import evaluation_loader
from hf_vit.data.sources import Sources
from hf_vit.evaluation.calibrate import calibrate
from hf_vit.evaluation.certainty import CalibrationPlan
from hf_vit.evaluation.labels import align, images_for_model
from hf_vit.evaluation.metrics import classify
from hf_vit.model.abstention_hf_vit import abstains, in_label_sets
from hf_vit.prediction.predictor import Predictor
from hf_vit.system.machine import machine, versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="Folders of classifiers of the same labels, such as of three seeds.")
    parser.add_argument("--data", required=True, help="Labelled images that the models were not trained on.")
    parser.add_argument(
        "--others", nargs="*", default=[], help="Images of none of the classes: files, folders, tables."
    )
    parser.add_argument("--coverage", type=float, nargs="*", default=[0.9])
    parser.add_argument("--max-error", type=float, nargs="*", default=[0.05])
    parser.add_argument("--seeds", type=int, default=100, help="Number of divisions.")
    parser.add_argument("--output", type=Path, default=Path("results.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    with options.output.open("a", encoding="utf-8") as file:
        for model in options.models:
            rows = measure(model, options.data, options.others, options.coverage, options.max_error, options.seeds)
            for row in rows:
                file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)


def measure(
    source: str, data_source: str, others: Sequence[str], coverages: list[float], errors: list[float], seeds: int
) -> list[dict[str, Any]]:
    """Return a row for each coverage and for each bound on the error."""
    model, processor = load(source)
    data, _ = load_evaluation_data(source, data_source, needs_train=False)
    logits, labels = predicted(model, processor, data)
    unknown = {name: logits_of_images(model, processor, name) for name in others}
    facts = {
        "model": Path(source).name,
        "data": data.name,
        "images": len(labels),
        "accuracy": (logits.argmax(dim=-1) == labels).double().mean().item(),
        "hardware": machine(),
        "versions": versions(),
    }
    names = list((model.config.id2label or {}).values())
    plans = [CalibrationPlan(coverage, None) for coverage in coverages]
    plans += [CalibrationPlan(None, error) for error in errors]
    rows = []
    for plan in plans:
        found, of_others = [], {name: [] for name in unknown}  # type: ignore[var-annotated]
        reasons = set()
        for seed in range(seeds):
            plan_of_seed = CalibrationPlan(plan.coverage, plan.max_error, seed=seed)
            try:
                each = calibrate(logits, labels, model.config, plan_of_seed, names)
            except ValueError as error:
                reasons.add(str(error))
                continue
            found.append(each)
            for name, of_images in unknown.items():
                of_others[name].append(on_others(of_images * model.config.temperature, each["fields"]))
        row = {**facts, "coverage": plan.coverage, "max_error": plan.max_error, "seeds": seeds, "fitted": len(found)}
        row |= {"not_fitted": sorted(reasons)[:1]} if reasons else {}
        if found:
            row |= summary(found) | {"others": {name: spread(values) for name, values in of_others.items()}}
        rows.append(row)
    return rows


def predicted(model: Any, processor: Any, data: ImageData) -> tuple[Tensor, Tensor]:
    """Return logits and labels of the evaluation split."""
    data, classes, _ = align(data, list(model.config.id2label.values()), needs_all=False)
    images = images_for_model(data, data.evaluation, processor, classes, model.config.num_labels)
    loader = evaluation_loader(images, 16, 0, 1, 0)
    to_model = partial(normalize, processor=processor)
    results = classify(model, loader, Accelerator(cpu=True), to_model, has_logits=True)
    assert results.logits is not None
    return results.logits, results.labels


def logits_of_images(model: Any, processor: Any, source: str) -> Tensor:
    """Return the logits of unlabelled images."""
    kept: list[Tensor] = []

    def forward(pixel_values: Tensor) -> Any:
        outputs = model(pixel_values)
        kept.append(outputs.logits)
        return SimpleNamespace(logits=outputs.logits)

    predictor = Predictor(forward, processor, model.config.id2label, torch.device("cpu"), 16, 1, config=model.config)
    for _ in predictor(Sources([source]).rows()):
        pass
    return torch.cat(kept)


def on_others(unscaled: Tensor, fields: dict[str, Any]) -> float:
    """Return the share of images that are unknown, or the mean size of their label sets."""
    probabilities = (unscaled / fields["temperature"]).softmax(dim=-1)
    if fields["label_set_threshold"] is not None:
        return in_label_sets(probabilities, fields["label_set_threshold"]).sum(dim=1).double().mean().item()
    return abstains(probabilities, fields["abstention_threshold"]).double().mean().item()


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return means over seeds, and how often a result is where it should be."""
    measured = [each["measured"] for each in found]
    if (first := measured[0].get("label_set")) is not None:
        sets = [each["label_set"] for each in measured]
        return {
            "measured_coverage": spread([each["coverage"] for each in sets]),
            "interval": [first["low"], first["high"]],
            "in_interval": mean(each["low"] <= each["coverage"] <= each["high"] for each in sets),
            "at_least_low": mean(each["low"] <= each["coverage"] for each in sets),
            "mean_size": spread([each["mean_size"] for each in sets]),
        }
    answers = [each["abstention"] for each in measured]
    errors = [each["error"] for each in answers if each["error"] is not None]
    return {
        "answered": spread([each["answered"] for each in answers]),
        "error": spread(errors),
        "within_bound": mean(each <= found[0]["max_error"] for each in errors),
    }


def spread(values: list[float]) -> dict[str, float]:
    """Return the mean, the lowest and the highest value."""
    return {"mean": mean(values), "low": min(values), "high": max(values)}


if __name__ == "__main__":
    main()
