"""`hf-vit train --heads`: heads on the cached features of one frozen encoder."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PILImage
from safetensors.torch import load_file
from sklearn.metrics import pairwise_distances
from typer.testing import CliRunner

import hf_vit
from hf_vit.cli.main import app
from hf_vit.data.dense import kinds_of_images
from hf_vit.data.labelled import load_data
from hf_vit.evaluation.evaluate import evaluate_checkpoint
from hf_vit.prediction.predictor import Predictor
from hf_vit.training.multi_task import run
from hf_vit.training.multi_task.fits import coreset
from hf_vit.training.multi_task.plans import read_plans
from hf_vit.training.multi_task.run import train_heads

pytestmark = pytest.mark.usefixtures("one_thread")
COLORS = {"blue": (40, 60, 200), "green": (40, 180, 60), "red": (200, 50, 40)}
FILE = """
color: {task: classification, label_column: label}
square: {task: segmentation, label_column: mask, max_steps: 60, patch_subdivision: 2, learning_rate: 0.01}
place: {task: regression, label_column: [left]}
"""


def scenes(number: int, seed: int) -> Dataset:
    """Return black images with a square of one of `COLORS`: its colour, its mask and its left edge are the labels."""
    random = np.random.default_rng(seed)
    rows: dict[str, list[Any]] = {"image": [], "label": [], "mask": [], "left": [], "objects": []}
    for index in range(number):
        mask, left = np.zeros((32, 32), dtype=np.uint8), int(random.integers(0, 3)) * 8
        mask[8:24, left : left + 16] = 1
        pixels = np.array(list(COLORS.values()))[index % 3] * mask[..., None] + random.normal(0, 8, (32, 32, 3))
        rows["image"].append(PILImage.fromarray(pixels.clip(0, 255).astype(np.uint8)))
        rows["mask"].append(PILImage.fromarray(mask))
        rows["label"].append(index % 3)
        rows["left"].append(left / 32 + 0.001)
        rows["objects"].append({"bbox": [[left, 8, 16, 16]], "category": [index % 3]})
    label = ClassLabel(names=list(COLORS))
    objects = {"bbox": List(List(Value("float32"))), "category": List(label)}
    features = {"image": Image(), "label": label, "mask": Image(), "left": Value("float32"), "objects": objects}
    return Dataset.from_dict(rows, features=Features(features))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "photos"
    DatasetDict({"train": scenes(60, 0), "test": scenes(30, 1)}).save_to_disk(str(folder))
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder of 16 patches whose tokens stay close to the pixels of their patches."""
    folder = tmp_path_factory.mktemp("encoder") / "tiny"
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = hf_vit.HFViTModel(hf_vit.HFViTConfig(**size, image_size=32, patch_size=8))
    torch.nn.init.normal_(model.embeddings.patch_embeddings.projection.weight, std=0.2)
    torch.nn.init.normal_(model.embeddings.position_embeddings.table.weight, std=0.3)
    model.save_pretrained(folder)
    return folder


def trained(file: str, photos: Path, encoder: Path, folder: Path, **options: Any) -> list[str]:
    said: list[str] = []
    (folder.parent / f"{folder.name}.yaml").write_text(file)
    options = {"model": str(encoder), "cache": folder.parent / "features", "say": said.append, **options}
    train_heads(folder.parent / f"{folder.name}.yaml", output_dir=folder, data=str(photos), **options)
    return said


@pytest.fixture(scope="module")
def heads(photos: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heads") / "all"
    trained(FILE, photos, encoder, folder)
    return folder


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_heads_learn_and_are_measured(heads: Path, photos: Path) -> None:
    metrics = json.loads((heads / "metrics.json").read_text())["heads"]
    assert metrics["color"]["metrics"]["accuracy"] > 0.9
    assert metrics["square"]["metrics"]["mean_iou"] > 0.7
    assert metrics["place"]["metrics"]["r2"] > 0.7
    card = (heads / "README.md").read_text()
    assert 'pipeline("multi-task", "all"' in card and "| `square` | segmentation |" in card
    assert str(photos.parent) not in card + (heads / "metrics.json").read_text()
    for name, metric in {"color": "accuracy", "square": "mean_iou", "place": "r2"}.items():
        measured = evaluate_checkpoint(str(heads), str(photos), head=name, precision="fp32")
        assert measured is not None
        assert measured["figures"][metric] == pytest.approx(metrics[name]["metrics"][metric], abs=0.02)


def test_all_heads_predict_at_once(heads: Path, photos: Path) -> None:
    split = load_data(str(photos)).evaluation
    found = list(Predictor.from_pretrained(str(heads), precision="fp32")([row["image"] for row in split]))
    answers = found[1].answers
    assert [each.partition(" (")[0] for each in answers] == ["color", "place", "square"]
    colors = [each.heads["color"][0]["label"] for each in found]
    assert np.mean([color == list(COLORS)[row["label"]] for color, row in zip(colors, split, strict=True)]) > 0.9
    one = list(Predictor.from_pretrained(str(heads), precision="fp32", head="color")([split[0]["image"]]))
    assert one[0].labels[0] == colors[0] and not one[0].heads


def test_a_head_finds_objects_and_chooses_its_thresholds(photos: Path, encoder: Path, tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    file = "square: {task: detection, label_column: objects, max_steps: 150, learning_rate: 0.01}"
    trained(file, photos, encoder, tmp_path / "finder")
    model = hf_vit.HFViTForMultiTask.from_pretrained(tmp_path / "finder")
    config = model.single("square").config
    assert config.patch_subdivision == 2 and config.thresholds is not None and len(config.thresholds) == 3
    found = json.loads((tmp_path / "finder" / "metrics.json").read_text())["heads"]["square"]["metrics"]
    assert found["map_50"] > 0.6, found
    split = load_data(str(photos)).evaluation
    (answer,) = Predictor.from_pretrained(str(tmp_path / "finder"), precision="fp32")([split[0]["image"]])
    for each in answer.heads["square"]:
        assert each["score"] > config.thresholds[config.label2id[each["label"]]]


@pytest.mark.parametrize("task", ["semantic_segmentation", "object_detection"])
def test_labels_are_read_without_their_images(task: str, photos: Path, encoder: Path) -> None:
    column = {"semantic_segmentation": "mask", "object_detection": "objects"}[task]
    data = load_data(str(photos), label_column=column, problem_type=task)
    _, kind = kinds_of_images(data)
    images = kind(data.train, data.columns, hf_vit.HFViTImageProcessor.from_preset("original", (24, 40)))
    expected = [images[row]["labels"] for row in range(len(images))]
    images.label(0)
    images.prepare = images.processor = None  # no image is decoded from here on
    assert all(torch.equal(images.label(row), labels) for row, labels in enumerate(expected))


def test_an_interrupted_training_continues_with_the_head_it_was_at(
    heads: Path, photos: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits = dict(run.FITS)

    def stop(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setitem(run.FITS, "segmentation", stop)
    with pytest.raises(KeyboardInterrupt):
        trained(FILE, photos, encoder, tmp_path / "again")
    monkeypatch.setitem(run.FITS, "segmentation", fits["segmentation"])
    monkeypatch.setitem(run.FITS, "classification", stop)  # finished before
    said = trained(FILE, photos, encoder, tmp_path / "again")
    assert any(line.startswith("color: finished before.") for line in said)
    expected, found = weights_of(heads), weights_of(tmp_path / "again")
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)


def test_an_added_head_leaves_the_others_as_they_are(heads: Path, photos: Path, tmp_path: Path) -> None:
    file = "odd: {task: anomaly, label_column: label, normal: blue, memory_size: 64}"
    trained(file, photos, heads, tmp_path / "more")
    old, new = weights_of(heads), weights_of(tmp_path / "more")
    assert all(torch.equal(old[name], new[name]) for name in old) and new["heads.odd.memory"].shape == (64, 32)
    metrics = json.loads((tmp_path / "more" / "metrics.json").read_text())["heads"]
    assert list(metrics) == ["color", "place", "square", "odd"] and metrics["odd"]["metrics"]["auroc"] > 0.9
    with pytest.raises(ValueError, match=r"already has 3 heads of the same name \(color, square, place\)"):
        trained(FILE, photos, heads, tmp_path / "twice")
    with pytest.raises(ValueError, match="cannot be evaluated on labels"):
        evaluate_checkpoint(str(tmp_path / "more"), str(photos), head="odd")
    with pytest.raises(ValueError, match="has several heads: choose one with --head, color or place"):
        evaluate_checkpoint(str(heads), str(photos))


def test_a_coreset_is_the_greedy_choice_of_the_farthest() -> None:
    vectors = torch.randn(60, 8)
    distances = pairwise_distances(vectors.numpy())
    chosen = coreset(vectors, 12, seed=0).tolist()
    for number in range(1, 12):
        assert chosen[number] == distances[:, chosen[:number]].min(axis=1).argmax()


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("- a", "does not describe heads"),
        ("a: {task: sight}", "needs a task, one of classification"),
        ("a: {task: classification, labelcolumn: b}", "unknown field 'labelcolumn': did you mean label_column"),
        ("a: {task: classification, max_steps: 5}", "unknown field 'max_steps'"),
        ("a: {task: classification}", "needs data"),
        ("a: {task: segmentation, data: x, batch_size: 0}", "head 'a': batch_size must be at least 1"),
        ("a: {b", "is no YAML"),
    ],
)
def test_a_file_of_heads_is_checked(file: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "heads.yaml").write_text(file)
    with pytest.raises(ValueError, match=message):
        read_plans(tmp_path / "heads.yaml")


def test_options_of_a_recipe_belong_to_the_heads(tmp_path: Path, photos: Path, encoder: Path) -> None:
    file = tmp_path / "heads.yaml"
    file.write_text(FILE)
    command = ["train", str(photos), "--heads", str(file), "--model", str(encoder)]
    for options, message in {
        ("--epochs", "3"): "--epochs belongs to each head",
        ("--recipe", "finetune"): "takes no --recipe",
    }.items():
        result = CliRunner().invoke(app, [*command, *options])
        assert result.exit_code != 0 and message in " ".join(str(result.output).split()) + str(result.exception)
