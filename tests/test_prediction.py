"""Prediction from files: the processor's pixels, the model's scores, in order, whatever the files hold."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from hf_vit import HFViTForImageClassification, HFViTImageProcessor, HFViTModel
from hf_vit.cli.main import app
from hf_vit.data.sources import files_of
from hf_vit.prediction.predictor import Prediction, Predictor, answers_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write images of many kinds, and some that are none."""
    path = tmp_path_factory.mktemp("pictures")
    (path / "below").mkdir()
    random = np.random.default_rng(0)
    for number in range(11):
        pixels = random.integers(0, 256, (20 + 9 * number, 90 - 5 * number, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).convert(("RGB", "L", "RGBA")[number % 3])
        image.save(path / "below" / f"{number:02}.png" if number % 3 else path / f"{number:02}.jpg")
    (path / "05a.jpg").write_bytes((path / "06.jpg").read_bytes()[:-200])
    (path / "07a.JPG").write_text("<html>")
    (path / "notes.txt").write_text("no image by its name")
    return path


@pytest.fixture
def classifier(tmp_path, tiny_config):
    """Save a classifier whose answers differ from image to image."""
    path = tmp_path / "classifier"
    names = {index: f"kind {index}" for index in range(5)}
    fields = {"initializer_range": 0.5, "id2label": names, "label2id": {name: index for index, name in names.items()}}
    HFViTForImageClassification(tiny_config(**fields)).save_pretrained(path)
    return path


@pytest.mark.parametrize(("workers", "batch_size"), [(1, 1), (3, 2), (2, 100)])
def test_answers_are_the_model_s(folder, classifier, workers, batch_size):
    files = list(files_of([str(folder)]))
    assert [file.name for file in files] == sorted(file.name for file in files if file.parent == folder) + [
        file.name for file in files if file.parent != folder
    ]
    assert len(files) == 13
    predictor = Predictor.from_pretrained(classifier, "fp32", workers=workers, batch_size=batch_size, top_k=2)
    threads = torch.get_num_threads()
    predictions = list(predictor(files))
    assert torch.get_num_threads() == threads
    assert [prediction.source for prediction in predictions] == files
    model = HFViTForImageClassification.from_pretrained(classifier).eval()
    processor = HFViTImageProcessor.from_pretrained(classifier)
    broken = []
    for file, prediction in zip(files, predictions, strict=True):
        if prediction.error is not None:
            broken.append(file.name)
            assert not prediction.labels and not prediction.scores
            continue
        with torch.no_grad():
            scores, classes = model(**processor(file, return_tensors="pt")).logits.softmax(-1)[0].topk(2)
        assert prediction.labels == [model.config.id2label[index] for index in classes.tolist()]
        assert prediction.scores == pytest.approx(scores.tolist(), abs=1e-5)
    assert broken == ["05a.jpg", "07a.JPG"]
    assert len({tuple(prediction.labels) for prediction in predictions}) > 2


def test_images_are_read_while_they_come(classifier):
    read = []

    def images():
        for number in range(100):
            read.append(number)
            yield Image.new("RGB", (20, 20), (number, 0, 0))

    predictor = Predictor.from_pretrained(classifier, "fp32", workers=1, batch_size=2)
    predictions = predictor(images())
    next(predictions)
    assert len(read) < 12
    predictions.close()


def test_bytes_are_images_too(folder, classifier):
    predictor = Predictor.from_pretrained(classifier, "fp32")
    path = folder / "00.jpg"
    first, second = predictor([path, path.read_bytes()])
    assert first.scores == second.scores


def test_an_encoder_has_features_but_no_answers(folder, tmp_path, tiny_config):
    encoder = HFViTModel(tiny_config(initializer_range=0.5)).eval()
    encoder.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no classifier: train one first, or extract features with --features"):
        Predictor.from_pretrained(tmp_path)
    path = folder / "00.jpg"
    [prediction] = Predictor.from_pretrained(tmp_path, "fp32", has_features=True)([path])
    with torch.no_grad():
        pixel_values = HFViTImageProcessor.from_pretrained(tmp_path)(path, return_tensors="pt")["pixel_values"]
        expected = encoder(pixel_values).pooler_output[0]
    np.testing.assert_allclose(prediction.features, expected.numpy(), atol=1e-5)
    assert prediction.labels == [] and prediction.scores == []


def test_features_are_what_the_classifier_reads(folder, classifier):
    predictor = Predictor.from_pretrained(classifier, "fp32", has_features=True, top_k=5)
    head = HFViTForImageClassification.from_pretrained(classifier).classifier
    for prediction in predictor(files_of([str(folder)])):
        if prediction.error is not None:
            assert prediction.features is None
            continue
        assert prediction.features.dtype == np.float32 and prediction.features.base.size < 32 * 9  # no view of tokens
        with torch.no_grad():
            scores, classes = head(torch.from_numpy(prediction.features)).softmax(-1).topk(5)
        assert prediction.labels == [f"kind {index}" for index in classes.tolist()]
        assert prediction.scores == pytest.approx(scores.tolist(), abs=1e-5)


def test_images_of_datasets_may_be_stored_anyhow(folder, classifier):
    predictor, path = Predictor.from_pretrained(classifier, "fp32", batch_size=1), folder / "00.jpg"
    by_path, by_bytes, by_address, missing, gone = predictor(
        [
            {"bytes": None, "path": str(path)},
            {"bytes": path.read_bytes(), "path": "of another name"},
            {"bytes": None, "path": f"file://{path}"},
            {"bytes": None, "path": None},
            {"bytes": None, "path": f"file://{path}.gone"},
        ]
    )
    assert by_path.scores == by_bytes.scores == by_address.scores
    assert missing.error == "This row has no image."
    assert "00.jpg.gone could not be fetched" in gone.error


def test_batches_keep_their_tags_and_their_last_bits(folder, classifier):
    files = list(files_of([str(folder)]))
    chosen = [("a", files[:3]), ("b", []), ("c", files[3:8])]
    alone, together = (
        Predictor.from_pretrained(classifier, "fp32", batch_size=5, workers=workers) for workers in (1, 3)
    )
    answers = dict(together.in_batches(chosen))
    assert list(answers) == ["a", "b", "c"] and answers["b"] == []
    assert answers["c"] == dict(alone.in_batches(chosen[2:]))["c"]


def test_the_command(folder, classifier, tmp_path):
    output = tmp_path / "labels.jsonl"
    arguments = ["predict", str(classifier), str(folder), "--top-k", "1", "-o", str(output), "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["images"] == 13 and said["images_per_second"] > 0
    assert [name.rsplit("/")[-1] for name in said["broken"]] == ["05a.jpg", "07a.JPG"]
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [list(row) for row in rows] == [["image", "labels", "scores", "error"]] * 13
    assert [row["image"] for row in rows] == [str(file) for file in files_of([str(folder)])]
    assert [len(row["labels"]) for row in rows].count(1) == 11
    assert sum(row["error"] is not None for row in rows) == 2


def test_the_command_says_what_is_missing(classifier, tmp_path):
    for sources, message in ((["./nowhere"], "No such file or folder: ./nowhere"), ([str(tmp_path)], "no images in")):
        done = CliRunner().invoke(app, ["predict", str(classifier), *sources])
        assert done.exit_code == 2
        assert message in done.stderr


def test_images_may_keep_their_aspect(folder, classifier):
    processor = HFViTImageProcessor.from_pretrained(classifier)
    processor.size, files = {"shortest_edge": 16}, [folder / "00.jpg", folder / "03.jpg", folder / "00.jpg"]
    predictor = Predictor.from_pretrained(classifier, "fp32")
    predictor.processor = processor
    shapes = {tuple(predictor._pixels(Prediction(file)).shape) for file in files}
    assert len(shapes) == 2
    predictor.model = lambda pixels: SimpleNamespace(logits=pixels.mean(dim=(1, 2, 3))[:, None].expand(-1, 5))
    assert [len(prediction.labels) for prediction in predictor(files)] == [5, 5, 5]


def test_a_compiled_model_gets_batches_of_one_size(folder, classifier):
    files = list(files_of([str(folder)]))
    predictor = Predictor.from_pretrained(classifier, "fp32", batch_size=4, workers=1)
    expected = [prediction.scores for prediction in predictor(files)]
    model, sizes = predictor.model, []
    predictor.model = lambda pixels: sizes.append(len(pixels)) or model(pixels)
    predictor.is_compiled = True
    for prediction, scores in zip(predictor(files), expected, strict=True):
        assert prediction.scores == pytest.approx(scores, abs=1e-6)
    assert sizes == [4, 4, 4, 4]


def test_scores_are_those_of_the_problem_type():
    """Softmax, sigmoid or none, as in transformers' pipeline, which takes the sigmoid of a single output."""
    logits = torch.tensor([[4.0, 3.0, -4.0]])
    config = SimpleNamespace(num_labels=3, thresholds=None, problem_type=None)
    assert answers_of(config, 1)(logits)[0][1] == logits.softmax(dim=1)[0, :1].tolist()
    config.problem_type = "multi_label_classification"
    assert answers_of(config, None)(logits) == [([0, 1], logits.sigmoid()[0, :2].tolist())]
    config.thresholds = [0.99, 0.5, 0.01]
    assert answers_of(config, None)(logits)[0][0] == [1, 2]
    config.problem_type = "regression"
    assert answers_of(config, 1)(logits) == [([0, 1, 2], [4.0, 3.0, -4.0])]
    config = SimpleNamespace(num_labels=1, thresholds=None, problem_type=None)
    assert answers_of(config, None)(torch.tensor([[-1.0]])) == [([0], torch.tensor([-1.0]).sigmoid().tolist())]
