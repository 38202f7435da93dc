"""Object detection: training, metrics, evaluation and prediction."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from tiny_run import RECIPE, assert_same_weights, stop_at, tiny_recipe, weights

from hf_vit.evaluation.detection import BoxResults
from hf_vit.evaluation.evaluate import evaluate_checkpoint
from hf_vit.evaluation.report import report_lines
from hf_vit.graphs.export import export_graph
from hf_vit.system.stopping import Interrupted
from hf_vit.training.loop import train
from hf_vit.training.report import train_and_report

NAMES = ["cell", "plate"]
COLORS = {"cell": (220, 50, 50), "plate": (50, 200, 60)}
HEIGHT, WIDTH = 32, 48


def scene(seed: int) -> tuple[PILImage.Image, dict[str, Any]]:
    """Return an image of one to three rectangles that do not overlap, and its objects as COCO has them."""
    random = np.random.default_rng(seed)
    pixels = np.full((HEIGHT, WIDTH, 3), (60, 80, 130)) + random.normal(0, 8, (HEIGHT, WIDTH, 1))
    objects: dict[str, Any] = {"bbox": [], "category": []}
    for third in random.permutation(3)[: random.integers(1, 4)].tolist():
        name = NAMES[random.integers(2)]
        width, height = (random.integers(8, 14), random.integers(8, 14)) if name == "cell" else (14, 20)
        x, y = 16 * third + random.integers(0, 17 - width), random.integers(0, HEIGHT - height)
        pixels[y : y + height, x : x + width] = COLORS[name]
        objects["bbox"].append([float(value) for value in (x, y, width, height)])
        objects["category"].append(NAMES.index(name))
    return PILImage.fromarray(pixels.clip(0, 255).astype(np.uint8)), objects


def scenes(number: int, first: int = 0) -> Dataset:
    images, objects = zip(*map(scene, range(first, first + number)), strict=True)
    classes = List(ClassLabel(names=NAMES))
    features = Features({"image": Image(), "objects": {"bbox": List(List(Value("float32"))), "category": classes}})
    return Dataset.from_dict({"image": list(images), "objects": list(objects)}, features=features)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cells")
    scenes(24).to_parquet(str(folder / "train.parquet"))
    scenes(8, 100).to_parquet(str(folder / "test.parquet"))
    return folder


def recipe(photos: Path, folder: Path, **fields: Any) -> Any:
    architecture = {**RECIPE["model_config"], "patch_subdivision": 2, "pooling": "mean", "hidden_dropout_prob": 0.0}
    options = {"image_size": [HEIGHT, WIDTH], "batch_size": 8, "task": "detection", "model_config": architecture}
    return tiny_recipe(photos, folder, **{**options, **fields})


@pytest.fixture(scope="module")
def trained(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("run") / "cells-vit"
    config = recipe(photos, folder, epochs=40, learning_rate=1e-2, best_metric="map_50", cache="ram", eval_every=10)
    return train_and_report(config, "hf-vit train cells/", lambda line: None)


def test_a_run_learns_and_reports(trained: Any, photos: Path) -> None:
    assert trained.metrics["eval_map_50"] > 0.6, trained.metrics
    card = (trained.output_dir / "README.md").read_text()
    assert "pipeline_tag: object-detection" in card and "| plate |" in card and "![predictions.png]" in card
    assert "AutoModelForObjectDetection" in card and "post_process_object_detection" in card
    config = json.loads((trained.output_dir / "config.json").read_text())
    assert config["thresholds"] == trained.predictions.thresholds
    measured = evaluate_checkpoint(str(trained.output_dir), str(photos))
    assert measured is not None
    for name in ("map", "map_50", "map_75", "loss"):
        assert measured["figures"][name] == pytest.approx(trained.metrics[f"eval_{name}"], rel=0.02, abs=5e-3)
    lines = report_lines(measured)
    assert lines[1].split() == ["mAP", f"{measured['figures']['map']:.2%}"]
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("options", [{"cache": "none"}, {"cache": "ram", "accumulation_steps": 2}])
def test_resumed_is_equal_to_uninterrupted(
    options: dict[str, Any], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(recipe(photos, tmp_path / "whole", **options))
    with pytest.raises(Interrupted), monkeypatch.context() as patch:
        stop_at(4, patch)
        train(recipe(photos, tmp_path / "parts", **options))
    parts = train(recipe(photos, tmp_path / "parts", **options))
    assert_same_weights(weights(parts.model), weights(whole.model))
    assert (tmp_path / "parts" / "log.jsonl").read_bytes() == (tmp_path / "whole" / "log.jsonl").read_bytes()
