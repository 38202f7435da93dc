"""Thresholds fitted to held-out predictions: coverage and error on new images, limits, and what a model then says."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from isolated import python, save_tiny_classifier
from PIL import Image
from test_handler import ENDPOINT, in_base64
from tiny_run import COLORS, colored_dataset, save_photos
from torch import Tensor
from transformers import pipeline
from typer.testing import CliRunner

from hf_vit import HFViTConfig, HFViTForImageClassification, HFViTForMultiTask, HFViTImageProcessor
from hf_vit.checkpoints.export import no_certainty
from hf_vit.checkpoints.models import load, load_classifier
from hf_vit.cli.main import app
from hf_vit.data.labelled import METRICS, RECIPE
from hf_vit.evaluation.calibration import fit_temperature
from hf_vit.evaluation.certainty import (
    CalibrationPlan,
    coverage_interval,
    fit_abstention_threshold,
    fit_certainty,
    fit_label_set_threshold,
    interval_of_share,
    least_for_coverage,
    least_for_error,
    measure_certainty,
    plan_of,
)
from hf_vit.graphs.describing import description
from hf_vit.graphs.tracing import Graph
from hf_vit.hub.card import set_section
from hf_vit.hub.folder import write_handler
from hf_vit.model.abstention_hf_vit import UNKNOWN, abstains, certainties, in_label_sets
from hf_vit.prediction.predictor import Predictor
from hf_vit.serving.answers import answer_of
from hf_vit.training.fitting.fit import fit
from hf_vit.training.trained import TrainedModel

THRESHOLDS: dict[str, Any] = {
    "abstention_threshold": 0.4, "label_set_threshold": 0.15, "label_set_coverage": 0.9,
}  # fmt: skip
runner = CliRunner()


# ------------------------------------------------------------------------------------------------------- the rules


def drawn(number: int, seed: int, scale: float = 2.0, classes: int = 10) -> tuple[Tensor, Tensor]:
    """Return the logits of a calibrated classifier, and labels drawn from its probabilities."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(number, classes, generator=generator)
    labels = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(1)
    return logits, labels


@pytest.mark.parametrize("coverage", [0.7, 0.9, 0.95])
def test_sets_cover_new_images_as_often_as_stated(coverage: float) -> None:
    fitted, number, draws = 99, 200, 200
    low, high = coverage_interval(coverage, fitted, number)
    found = []
    for seed in range(draws):
        logits, labels = drawn(fitted + number, seed)
        probabilities = logits.softmax(dim=-1)
        threshold = fit_label_set_threshold(probabilities[:fitted], labels[:fitted], coverage)
        of_label = probabilities.gather(1, labels[:, None]).squeeze(1)
        # What a set has beside the labels above the threshold, the most likely one, only adds to this.
        found.append((of_label[fitted:] >= threshold).double().mean().item())
        sets = in_label_sets(probabilities, threshold)
        assert sets.gather(1, labels[:, None]).squeeze(1)[fitted:].double().mean() >= found[-1]
        assert sets.any(dim=1).all()
    assert np.mean(found) == pytest.approx(coverage, abs=0.01)  # the mean of 200 draws has a deviation below 0.003
    assert np.mean([low <= each <= high for each in found]) >= 0.9  # expected: 0.95


def test_the_error_of_answers_is_bounded() -> None:
    exceeded, answered = 0, []
    for seed in range(60):
        logits, labels = drawn(4300, seed, scale=4.0)
        probabilities = logits.softmax(dim=-1)
        threshold = fit_abstention_threshold(probabilities[:300], labels[:300], 0.2)
        kept = ~abstains(probabilities[300:], threshold)
        answered.append(kept.double().mean().item())
        exceeded += (probabilities[300:].argmax(dim=-1) != labels[300:])[kept].double().mean().item() > 0.2
    assert exceeded <= 3 and np.mean(answered) > 0.5


def test_thresholds_are_monotone() -> None:
    logits, labels = drawn(400, 0, scale=4.0)
    probabilities = logits.softmax(dim=-1)
    levels = (0.5, 0.6, 0.8, 0.9, 0.99)
    fitted = [fit_label_set_threshold(probabilities, labels, level) for level in levels]
    assert fitted == sorted(fitted, reverse=True) and len(set(fitted)) == len(levels)
    sizes = [in_label_sets(probabilities, each).sum().item() for each in fitted]
    assert sizes == sorted(sizes)
    errors = (0.15, 0.2, 0.3, 0.5, 0.9)
    fitted = [fit_abstention_threshold(probabilities, labels, error) for error in errors]
    assert fitted == sorted(fitted, reverse=True) and not abstains(probabilities, fitted[-1]).any()
    order = torch.randperm(400, generator=torch.Generator().manual_seed(1))
    assert fit_certainty(logits[order], labels[order], CalibrationPlan(0.9, 0.2)) == fit_certainty(
        logits, labels, CalibrationPlan(0.9, 0.2)
    )


def test_few_images_leave_a_calibrated_classifier_as_it_is() -> None:
    found = [fit_temperature(*drawn(180, seed, scale=10.0)) for seed in range(20)]
    assert 0.8 < np.mean(found) < 1.25  # with one more image of each class: 2.5


def test_ties_one_class_and_a_model_that_is_always_right() -> None:
    even, labels = torch.full((200, 4), 0.25), torch.arange(200) % 4
    threshold = fit_label_set_threshold(even, labels, 0.9)
    assert threshold == 0.25 and in_label_sets(even, threshold).all()
    one = torch.ones(200, 1)
    assert fit_label_set_threshold(one, torch.zeros(200, dtype=torch.int64), 0.9) == 1
    assert in_label_sets(one, 1.0).all() and not abstains(one, 1.0).any()
    right = torch.eye(4)[labels] * 0.9 + 0.025
    assert fit_abstention_threshold(right, labels, 0.05) == right.max()
    assert in_label_sets(right, fit_label_set_threshold(right, labels, 0.9)).sum() == 200
    measured = measure_certainty(right.log(), labels, {**dict.fromkeys(THRESHOLDS), **THRESHOLDS}, 200, list("abcd"))
    assert measured["label_set"]["coverage"] == 1 and measured["abstention"]["error"] == 0


def test_a_model_that_is_always_wrong_answers_nothing() -> None:
    labels = torch.arange(200) % 4
    wrong = torch.eye(4)[(labels + 1) % 4] * 0.9 + 0.025
    with pytest.raises(ValueError, match=r"of 200 images, 200 are wrong, and the lowest bound is 100\.0%"):
        fit_abstention_threshold(wrong, labels, 0.05)
    threshold = fit_label_set_threshold(wrong, labels, 0.9)
    assert in_label_sets(wrong, threshold).all()
    fields = {**dict.fromkeys(THRESHOLDS), "abstention_threshold": 0.99}
    assert measure_certainty(wrong.log(), labels, fields, 200, list("abcd"))["abstention"]["error"] is None


@pytest.mark.parametrize(("coverage", "least"), [(0.9, 9), (0.95, 19), (0.99, 99), (0.5, 1), (0.8, 4), (0.999, 999)])
def test_few_images_have_a_remedy(coverage: float, least: int) -> None:
    assert least_for_coverage(coverage) == least
    logits, labels = drawn(least, 0)
    fit_label_set_threshold(logits.softmax(dim=-1), labels, coverage)
    with pytest.raises(ValueError, match=f"needs at least {least:,} images?.*smaller --coverage"):
        CalibrationPlan(coverage, None).check(least - 1)


def test_a_bound_needs_images_too() -> None:
    labels = torch.zeros(least_for_error(0.05), dtype=torch.int64)
    right = torch.tensor([[0.9, 0.1]]).expand(len(labels), 2)
    assert fit_abstention_threshold(right, labels, 0.05) == right[0, 0]
    with pytest.raises(ValueError, match=f"needs at least {len(labels)} images.*larger --max-error"):
        fit_abstention_threshold(right[1:], labels[1:], 0.05)
    for wrong in ({"coverage": 0.0}, {"coverage": 1.0}, {"max_error": float("nan")}, {"share": 0.0}, {"share": 1.5}):
        with pytest.raises(ValueError, match=r"must be"):
            CalibrationPlan(**wrong)
    with pytest.raises(ValueError, match="add --calibrate"):
        plan_of(False, None, 0.1)
    assert plan_of(False, None, None) is None and plan_of(True, None, None) == CalibrationPlan()
    assert plan_of(True, 0.8, None) == CalibrationPlan(0.8, None)
    with pytest.raises(ValueError, match="NaN"):
        fit_certainty(torch.full((200, 2), torch.nan), labels[:200], CalibrationPlan())
    assert abstains(torch.full((1, 2), torch.nan), 0.0).all()


def test_intervals_are_those_of_the_books() -> None:
    assert interval_of_share(0, 10) == pytest.approx((0, 0.3085), abs=1e-4)  # Clopper and Pearson
    assert interval_of_share(5, 10) == pytest.approx((0.1871, 0.8129), abs=1e-4)
    low, high = coverage_interval(0.9, 1000, 1000)
    assert low == pytest.approx(0.873, abs=0.002) and high == pytest.approx(0.926, abs=0.002)


# ------------------------------------------------------------------------------------------------- what a model says


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny_classifier(tmp_path_factory.mktemp("certain") / "tiny")
    HFViTImageProcessor(size={"height": 32, "width": 48}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    random, folder = np.random.default_rng(0), tmp_path_factory.mktemp("images")
    for number in range(8):
        low = 31 * number
        Image.fromarray(random.integers(low, low + 32, (32, 48, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return [str(path) for path in sorted(folder.iterdir())]


def with_fields(source: Path, folder: Path, **fields: Any) -> str:
    """Copy a model, with other fields in its config."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return str(folder)


@pytest.fixture
def certain(folder: Path, images: list[str], tmp_path: Path) -> str:
    """Save the model with thresholds between the probabilities of the images."""
    scores = [each.scores for each in Predictor.from_pretrained(folder, "fp32")(images)]
    confidence = sorted(row[0] for row in scores)
    second = sorted(row[1] for row in scores)
    thresholds = {"abstention_threshold": sum(confidence[3:5]) / 2, "label_set_threshold": sum(second[3:5]) / 2}
    return with_fields(folder, tmp_path / "certain", **thresholds, label_set_coverage=0.9)


def test_every_form_of_a_model_says_the_same(certain: str, images: list[str]) -> None:
    model, processor = load(certain)
    with torch.no_grad():
        logits = model(**processor(images, return_tensors="pt")).logits
    expected = certainties(logits, model.config)
    unknown = [each.is_unknown for each in expected]
    assert sum(map(bool, unknown)) == 4 and {len(each.label_set or ()) for each in expected} >= {1, 2}
    names = model.config.id2label
    sets = [[names[index] for index in each.label_set or ()] for each in expected]
    predictions = TrainedModel(certain).predict(images, precision="fp32")
    assert [each.is_unknown for each in predictions] == unknown and [each.label_set for each in predictions] == sets
    assert "; label set: " in repr(predictions)
    for each in predictions:
        assert len(each.labels) == 5 and each.answers[0].startswith(UNKNOWN) == each.is_unknown
        answer = answer_of(each, names)
        assert (answer["unknown"], answer["label_set"]) == (each.is_unknown, each.label_set)
        assert [row["label"] for row in answer["labels"]] == each.labels
    piped = pipeline("image-classification", certain)(images, top_k=2)
    for answer, each in zip(piped, predictions, strict=True):
        found = answer[1:] if each.is_unknown else answer
        assert [row["label"] for row in found] == each.labels[:2]
        assert [row["in_label_set"] for row in found] == [label in each.label_set for label in each.labels[:2]]
        if each.is_unknown:
            assert answer[0] == {"label": UNKNOWN, "score": pytest.approx(1 - each.scores[0], abs=1e-5)}


def test_a_table_has_columns_for_it(certain: str, folder: Path, images: list[str], tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"none")
    sources = [*images, str(tmp_path / "broken.png")]
    expected: Any = TrainedModel(certain).predict(images, precision="fp32")
    options: dict[str, Any] = {"top_k": 2, "precision": "fp32"}
    TrainedModel(certain).predict(sources, tmp_path / "a.parquet", **options)
    rows = pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert list(rows[0]) == ["image", "labels", "scores", "error", "unknown", "label_set"]
    assert [row["unknown"] for row in rows] == [*(each.is_unknown for each in expected), None]
    assert [row["label_set"] for row in rows] == [*(each.label_set for each in expected), None]
    TrainedModel(certain).predict(sources, tmp_path / "a.csv", **options)
    with (tmp_path / "a.csv").open() as file:
        cells = list(csv.DictReader(file))
    assert list(cells[0]) == ["image", "label", "score", "label_2", "score_2", "unknown", "label_set", "error"]
    assert [row["unknown"] for row in cells[:-1]] == [json.dumps(each.is_unknown) for each in expected]
    assert [json.loads(row["label_set"]) for row in cells[:-1]] == [each.label_set for each in expected]
    assert cells[-1]["unknown"] == cells[-1]["label_set"] == "" and cells[-1]["error"]
    TrainedModel(str(folder)).predict(sources, tmp_path / "old.csv", **options)
    assert (tmp_path / "old.csv").read_text().splitlines()[0] == "image,label,score,label_2,score_2,error"


def test_models_without_thresholds_are_as_before(folder: Path, images: list[str], tmp_path: Path) -> None:
    config = HFViTConfig.from_pretrained(folder)
    assert [getattr(config, name) for name in THRESHOLDS] == [None] * 3 and no_certainty(config) == []
    answers = pipeline("image-classification", str(folder))(images)
    assert all(row.keys() == {"label", "score"} for answer in answers for row in answer)
    (prediction, *_) = Predictor.from_pretrained(folder, "fp32")(images)
    assert prediction.is_unknown is None and prediction.label_set is None and "label set" not in prediction.line
    assert answer_of(prediction, config.id2label).keys() == {"labels"}
    several = with_fields(folder, tmp_path / "several", problem_type="multi_label_classification")
    assert certainties(torch.zeros(2, 5), HFViTConfig.from_pretrained(several))[0].is_unknown is None
    assert certainties(torch.zeros(2, 5), None)[0].label_set is None


def test_more_labels_than_a_pipeline_shows_are_in_a_set(folder: Path, images: list[str], tmp_path: Path) -> None:
    names = [f"kind {index}" for index in range(9)]
    model, processor = load_classifier(folder, names)
    model.config.label_set_threshold, model.config.label_set_coverage = 0.0, 0.9
    model.save_pretrained(tmp_path / "nine")
    processor.save_pretrained(tmp_path / "nine")
    classify = pipeline("image-classification", str(tmp_path / "nine"))
    assert len(classify(images[0])) == 9 and len(classify(images[0], top_k=3)) == 3


def test_fields_travel_and_end_with_the_head(certain: str, folder: Path, tmp_path: Path) -> None:
    model, _ = load(certain)
    stated = {name: getattr(model.config, name) for name in THRESHOLDS}
    assert None not in stated.values()
    model.save_pretrained(tmp_path / "again")
    again = HFViTConfig.from_pretrained(tmp_path / "again")
    assert {name: getattr(again, name) for name in THRESHOLDS} == stated
    for labels in (list(model.config.id2label.values()), ["a", "b"]):  # further training, and another head
        trained, _ = load_classifier(certain, labels)
        assert {getattr(trained.config, name) for name in THRESHOLDS} == {None}
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"abstention_threshold": 1.5}, "abstention_threshold must be at least 0 and at most 1"),
        ({"label_set_threshold": 0.5}, "set both, or neither"),
        ({**THRESHOLDS, "problem_type": "regression"}, "is for one label per image"),
    ]
    for fields, message in wrong:
        with pytest.raises(ValueError, match=message):
            HFViTConfig(num_labels=3, **fields)
    said = description(Graph(model))
    assert f"unknown if the largest probability is below {stated['abstention_threshold']!r}" in said
    assert f"at least {stated['label_set_threshold']!r}, and the most likely one" in said
    assert "label set" not in description(Graph(load(folder)[0]))
    assert "abstention_threshold" in no_certainty(model.config)[0]


def test_a_head_of_several_says_it_too(images: list[str], tmp_path: Path) -> None:
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    kinds = {"task": "classification", "id2label": dict(enumerate("abcdefg")), **THRESHOLDS}
    kinds |= {"label_set_threshold": 0.0}
    config = HFViTConfig(**size, image_size=32, patch_size=8, task_heads={"kind": kinds})
    HFViTForMultiTask(config).save_pretrained(tmp_path / "heads")
    HFViTImageProcessor.from_preset("original", 32).save_pretrained(tmp_path / "heads")
    answer = pipeline("multi-task", str(tmp_path / "heads"))(images[0])["kind"]
    assert answer[0]["label"] == UNKNOWN and len(answer) == 8  # all probabilities are about 1/7
    assert all(row["in_label_set"] for row in answer[1:])
    (prediction,) = Predictor.from_pretrained(tmp_path / "heads", "fp32")(images[:1])
    assert prediction.answers[0].startswith("kind (unknown 8")


@pytest.mark.slow
def test_it_is_said_without_the_package(certain: str, images: list[str], tmp_path: Path) -> None:
    write_handler(Path(certain))
    texts = [in_base64(Image.open(path)) for path in images]
    (tmp_path / "requests.json").write_text(json.dumps([{"inputs": texts}]))
    done = python(ENDPOINT, tmp_path / "requests.json", certain, home=tmp_path)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("ANSWERS"))
    (answers,) = json.loads(line.removeprefix("ANSWERS "))
    here = pipeline("image-classification", certain)(images)
    assert [[row["label"] for row in answer] for answer in answers] == [
        [row["label"] for row in each] for each in here
    ]
    assert sum(answer[0]["label"] == UNKNOWN for answer in answers) == 4


# ------------------------------------------------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_photos(tmp_path_factory.mktemp("data") / "photos")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = HFViTConfig(**size, image_size=8, patch_size=4, initializer_range=0.3, id2label=dict(enumerate(COLORS)))
    HFViTForImageClassification(config).save_pretrained(tmp_path / "tiny")
    HFViTImageProcessor.from_preset("original", (8, 8)).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def evaluate(*arguments: object, exit_code: int = 0) -> str:
    result = runner.invoke(app, ["evaluate", *map(str, arguments)])
    assert result.exit_code == exit_code, result.output
    return " ".join(result.output.split())


def test_a_calibration_is_written_and_measured(model: Path, photos: Path, tmp_path: Path) -> None:
    options = ("--calibrate", "--coverage", 0.8, "--max-error", 0.97, "--precision", "fp32")
    said = evaluate(model, photos, *options, "--json", tmp_path / "measured.json")
    found = json.loads((tmp_path / "measured.json").read_text())["calibration"]
    config = HFViTConfig.from_pretrained(model)
    assert {name: getattr(config, name) for name in found["fields"]} == found["fields"]
    assert found["images"] + found["measured"]["images"] == 21 and config.label_set_coverage == 0.8
    for words in ("Calibrated on 10 images, and measured on the other 11", "Label sets have all labels", "Wrote the"):
        assert words in said
    card = (model / "README.md").read_text()
    assert card.count("## Unknown images") == 1 and "held-out" not in card and "split test" in card
    # What is written is what the model does with the images that were left.
    dataset = colored_dataset(21, 1)
    fitted, rest = CalibrationPlan().divide(21)
    assert len(fitted) == 10 and sorted([*fitted.tolist(), *rest.tolist()]) == list(range(21))
    predictions: Any = TrainedModel(model).predict([dataset["image"][index] for index in rest.tolist()])
    labels = [list(COLORS)[dataset["label"][index]] for index in rest.tolist()]
    covered = [label in each.label_set for label, each in zip(labels, predictions, strict=True)]
    assert np.mean(covered) == pytest.approx(found["measured"]["label_set"]["coverage"])
    answered = np.mean([not each.is_unknown for each in predictions])
    assert answered == pytest.approx(found["measured"]["abstention"]["answered"])
    # Again, with label sets only and on all images: the temperature does not change twice, the old threshold goes.
    said = evaluate(model, photos, "--calibrate", "--coverage", 0.9, "--calibration-share", 1, "--precision", "fp32")
    assert (
        "Calibrated on 21 images." in said and "unknown" not in said.split("Label sets")[1].split("images recall")[0]
    )
    config = HFViTConfig.from_pretrained(model)
    assert config.abstention_threshold is None and config.label_set_coverage == 0.9
    assert (model / "README.md").read_text().count("## Unknown images") == 1
    first = (model / "config.json").read_text()
    evaluate(model, photos, "--calibrate", "--coverage", 0.9, "--calibration-share", 1, "--precision", "fp32")
    again = HFViTConfig.from_pretrained(model)
    assert again.temperature == pytest.approx(config.temperature, rel=1e-3)
    assert json.loads(first).keys() == json.loads((model / "config.json").read_text()).keys()


def test_what_cannot_be_calibrated_has_a_remedy(model: Path, photos: Path, tmp_path: Path) -> None:
    before = (model / "config.json").read_text()
    for options, words in {
        ("--coverage", 0.9): "is an option of a calibration: add --calibrate",
        ("--calibrate",): "--max-error 0.05 needs at least 117 images",
        ("--calibrate", "--coverage", 0.99): "--coverage 0.99 needs at least 99 images",
        ("--calibrate", "--max-error", 2): "--max-error must be between 0 and 1, such as 0.05, got 2",
        ("--calibrate", "--coverage", 0.8, "--image-size", 12): "--image-size changes its probabilities",
        ("--calibrate", "--coverage", 0.8, "--calibration-share", 0): "--calibration-share must be above 0",
    }.items():
        said = evaluate(model, photos, *options, exit_code=2)
        assert words in said, said
    several = with_fields(model, tmp_path / "several", problem_type="multi_label_classification")
    assert "one of several labels per image" in evaluate(several, photos, "--calibrate", exit_code=2)
    weights = model / "model.safetensors"
    assert "make one with hf-vit convert" in evaluate(weights, photos, "--calibrate", exit_code=2)
    (model / RECIPE).write_text(f"data: {photos}\n")
    (model / METRICS).write_text(json.dumps({"fitted_to": str(photos)}))
    said = evaluate(model, photos, "--split", "train", "--calibrate", "--coverage", 0.8, exit_code=2)
    assert "images that the model was not trained on" in said
    assert (model / "config.json").read_text() == before


def test_a_head_of_several_is_calibrated(photos: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    kinds = {"task": "classification", "id2label": dict(enumerate(COLORS))}
    config = HFViTConfig(**size, image_size=8, patch_size=4, task_heads={"kind": kinds, "other": kinds})
    HFViTForMultiTask(config).save_pretrained(tmp_path / "heads")
    HFViTImageProcessor.from_preset("original", 8).save_pretrained(tmp_path / "heads")
    evaluate(tmp_path / "heads", photos, "--head", "kind", "--calibrate", "--coverage", 0.8)
    heads = HFViTConfig.from_pretrained(tmp_path / "heads").task_heads
    assert heads is not None and heads["kind"]["label_set_coverage"] == 0.8 and "temperature" not in heads["other"]
    assert "## Unknown images: kind" in (tmp_path / "heads" / "README.md").read_text()


def test_fit_uses_its_held_out_predictions(photos: Path, model: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    options: dict[str, Any] = {"model": str(model), "minutes": 0, "cache": tmp_path / "cache", "say": lines.append}
    fitted = fit(str(photos), output_dir=tmp_path / "mine", coverage=0.9, max_error=0.5, **options)
    config = load(tmp_path / "mine")[0].config
    found = fitted.metrics["certainty"]
    assert config.label_set_threshold == found["fields"]["label_set_threshold"] and config.label_set_coverage == 0.9
    assert found["images"] == 54 and found["measured"]["images"] == 21
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "## Unknown images" in card and "coverage=0.9, max_error=0.5" in card
    with pytest.raises(ValueError, match=r"--coverage 0\.999 needs at least 999 images"):
        fit(str(photos), output_dir=tmp_path / "few", coverage=0.999, **options)


def test_a_section_of_a_card_is_replaced(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    set_section(card, "Unknown", "nothing")
    assert not card.exists()
    card.write_text("---\ntags:\n- a\n---\n\n# Title\n\n## Use\n\nText.\n\n## Citation\n\nAs this.\n")
    before = card.read_text()
    set_section(card, "Unknown", "one")
    assert card.read_text() == before.replace("## Citation", "## Unknown\n\none\n\n## Citation")
    set_section(card, "Unknown", "two")
    assert card.read_text() == before.replace("## Citation", "## Unknown\n\ntwo\n\n## Citation")
    card.write_text("# Title\n")
    set_section(card, "Unknown", "one")
    set_section(card, "Unknown", "two")
    assert card.read_text() == "# Title\n\n## Unknown\n\ntwo\n"
