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

from hf_vit.checkpoints.models import load
from hf_vit.evaluation.detection import BoxResults
from hf_vit.evaluation.evaluate import evaluate_checkpoint
from hf_vit.evaluation.report import report_lines
from hf_vit.graphs.export import export_graph
from hf_vit.graphs.kinds import KINDS
from hf_vit.model.detection_hf_vit import HFViTObjectDetectionOutput
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
    assert "AutoModelForObjectDetection" in card and "post_process_object_detection(outputs, threshold=0." in card
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


def test_a_table_has_the_boxes_in_pixels_of_the_images(trained: Any, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    import hf_vit
    from hf_vit.data.sources import Sources
    from hf_vit.prediction.masks import predict_masks
    from hf_vit.prediction.predict import predict_to_file
    from hf_vit.prediction.shards import Settings

    (tmp_path / "images").mkdir()
    image, objects = scene(103)
    image.resize((2 * WIDTH, 2 * HEIGHT)).save(tmp_path / "images" / "cells.png")
    (tmp_path / "images" / "broken.jpg").write_bytes(b"no image")
    PILImage.new("RGB", (WIDTH, HEIGHT), (60, 80, 130)).save(tmp_path / "images" / "empty.png")
    settings = Settings(str(trained.output_dir), precision="fp32")
    sources = [str(tmp_path / "images")]
    for ending in ("parquet", "csv"):
        predict_to_file(tmp_path / f"boxes.{ending}", Sources(sources), settings)
    rows = pq.read_table(tmp_path / "boxes.parquet").to_pylist()
    assert [Path(row["image"]).name for row in rows] == ["broken.jpg", "cells.png", "empty.png"]
    assert rows[0]["boxes"] is None and rows[0]["error"] and rows[2]["boxes"] == []
    found = sorted(zip(rows[1]["labels"], rows[1]["boxes"], strict=True))
    true = [(NAMES[index], box) for index, box in zip(objects["category"], objects["bbox"], strict=True)]
    assert [name for name, _ in found] == sorted(name for name, _ in true)
    for name, (left, top, right, bottom) in found:
        centres = [
            (abs(left + right - 2 * (2 * x + w)), abs(top + bottom - 2 * (2 * y + h))) for _, (x, y, w, h) in true
        ]
        assert min(map(max, centres)) < 16, (name, found, true)
    lines = (tmp_path / "boxes.csv").read_text().splitlines()
    assert lines[0] == "image,label,score,left,top,right,bottom,error"
    assert len(lines) == 1 + 1 + len(found) + 1 and lines[-1].endswith("empty.png,,,,,,,")
    summary = predict_masks(tmp_path / "drawn", Sources(sources), settings)
    assert [Path(name).name for name in summary.broken] == ["broken.jpg"]
    with PILImage.open(tmp_path / "drawn" / "cells.jpg") as drawn:
        assert drawn.size == (2 * WIDTH, 2 * HEIGHT)
    [prediction] = hf_vit.TrainedModel(trained.output_dir).predict([tmp_path / "images" / "cells.png"])
    assert prediction.boxes is not None and prediction.boxes.tolist() == rows[1]["boxes"]
    assert sum(int(answer.split()[0]) for answer in prediction.answers) == len(found)


def results_of(labels: list[list[list[float]]], predicted: list[list[list[float]]]) -> BoxResults:
    """Return results for objects as (class, left, top, right, bottom), predicted ones with a score before."""

    def centred(rows: Any, first: int, most: int, empty: float) -> list[list[float]]:
        boxes = [
            [*codes, (left + right) / 2, (top + bottom) / 2, right - left, bottom - top]
            for *codes, left, top, right, bottom in rows
        ]
        return boxes + [[empty] * first + [0.0] * 4] * (most - len(rows))

    def stacked(all_rows: Any, first: int, empty: float) -> torch.Tensor:
        most = max(map(len, all_rows))
        return torch.tensor([centred(rows, first, most, empty) for rows in all_rows])

    return BoxResults(stacked(labels, 1, -1.0), stacked(predicted, 2, 0.0), torch.zeros(len(labels)), 2)


def test_metrics_are_those_of_the_definition() -> None:
    """Average precision by hand: of class 0, hit, miss, hit at recalls 0.5 and 1; class 1 has no objects."""
    box, moved, far = [0.1, 0.1, 0.3, 0.3], [0.1, 0.1, 0.3, 0.275], [0.6, 0.6, 0.9, 0.9]
    results = results_of(
        [[[0, *box], [0, *far]], [[-2, *far]]],
        [[[0.9, 0, *box], [0.8, 0, 0.4, 0.1, 0.5, 0.2], [0.6, 0, *far]], [[0.7, 0, *far], [0.1, 1, *far]]],
    )
    metrics = results.metrics()
    # 51 of 101 recalls have precision 1, the others 2/3. The object of the second image is ignored, and so is its box.
    assert metrics["map_50"] == pytest.approx((51 + 50 * 2 / 3) / 101) == metrics["map"]
    [first, second] = results.per_class(NAMES)
    assert (first["boxes"], first["count"], first["f1"]) == (2, 1, pytest.approx(0.8))
    assert second["ap"] is None and results.best_thresholds() == pytest.approx([0.3, 0.5])
    assert results.image_f1().tolist() == pytest.approx([0.8, 1])
    loose = results_of([[[0, *box]]], [[[0.9, 0, *moved]]]).metrics()  # an IoU of 0.875
    assert (loose["map_50"], loose["map_75"], loose["map"]) == pytest.approx((1, 1, 0.8))
    assert results.agreement(results) == 1 and results_of([[[-1, *box]]], [[[0.9, 0, *box]]]).metrics()["map"] == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mixup": 0.2}, "Detection does not mix images or weigh classes: remove mixup=0.2"),
        ({"loss": "binary_cross_entropy"}, "Detection has a loss of its own: remove loss=binary_cross_entropy"),
        ({"augmentation": "rand"}, "augmentation=rand does not move boxes"),
        ({"streaming": True}, "Boxes cannot be streamed"),
        ({"label_column": "other"}, "Unknown label_column 'other': choose one of objects"),
        ({"box_format": "voc"}, r"Expected boxes as \[x1, y1, x2, y2\] in pixels"),
    ],
)
def test_what_detection_cannot_do_is_refused(
    fields: dict[str, Any], message: str, photos: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        train(recipe(photos, tmp_path, **fields))


@pytest.mark.slow
def test_a_graph_finds_the_same_objects(trained: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    lines = export_graph(trained.output_dir, tmp_path / "model.onnx", "onnx")
    assert "logits [batch, points, 2] and pred_boxes [batch, points, 4]" in lines[0]
    model, processor = load(str(trained.output_dir))
    pixel_values = processor(scene(103)[0], return_tensors="pt")["pixel_values"]
    answers = KINDS["onnx"].read(tmp_path / "model.onnx")(pixel_values.numpy())
    outputs = HFViTObjectDetectionOutput(
        **dict(zip(("logits", "pred_boxes"), map(torch.from_numpy, answers), strict=True))
    )
    with torch.no_grad():
        [expected] = processor.post_process_object_detection(model(pixel_values), 0.05, [(HEIGHT, WIDTH)])
    [found] = processor.post_process_object_detection(outputs, 0.05, [(HEIGHT, WIDTH)])
    assert len(found["labels"]) > 0 and torch.equal(found["labels"], expected["labels"])
    torch.testing.assert_close(found["boxes"], expected["boxes"], rtol=1e-3, atol=1e-2)


def test_a_page_shows_objects(trained: Any, tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    from hf_vit.demo.exhibit import Exhibit, File

    image, _ = scene(103)
    image.save(tmp_path / "cells.png")
    exhibit, file = Exhibit(str(trained.output_dir)), File(tmp_path / "cells.png", "cells.png")
    drawn, answer = exhibit.overlay(file), exhibit.answer(file).prediction
    assert drawn.shape == (HEIGHT, WIDTH, 3) and (drawn != np.array(image)).any()
    assert exhibit.answers == "objects" and set(answer.labels) <= set(exhibit.colors) == set(NAMES)
