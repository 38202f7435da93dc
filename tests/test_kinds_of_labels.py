"""Several labels per image, targets, and classes of different size: losses, metrics, and runs from end to end."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Dataset, Features, Image, Sequence, Value
from sklearn import metrics as sklearn_metrics
from tiny_run import COLORS, RECIPE, assert_same_weights, colored_images, stop_at, weights
from transformers import ImageClassificationPipeline, pipeline
from transformers.pipelines.image_classification import ClassificationFunction

from hf_vit import HFViTConfig, HFViTForImageClassification, HFViTImageProcessor
from hf_vit.data.augmentation import BatchMixer
from hf_vit.data.labelled import ImageData
from hf_vit.evaluation import evaluate
from hf_vit.evaluation.calibration import fit_temperature
from hf_vit.evaluation.metrics import LOWER_IS_BETTER
from hf_vit.evaluation.report import report_lines
from hf_vit.evaluation.results import ImageResults, LabelResults, TargetResults
from hf_vit.model.pipeline_hf_vit import HFViTImageClassificationPipeline
from hf_vit.prediction.predictor import Predictor
from hf_vit.system.stopping import Interrupted
from hf_vit.training import run as run_module
from hf_vit.training.recipe import TrainConfig
from hf_vit.training.report import train_and_report
from hf_vit.training.tasks import LOSSES, TASKS, build_model, effective_number, weights_of_classes

SEVERAL, TARGETS = "multi_label_classification", "regression"


def labels_of(colors: list[int], kind: str) -> list[list[float]]:
    """Return whether an image is bright, and of each colour; or how red and how blue it is."""
    if kind == SEVERAL:
        return [[float(color == 1), *(float(color == index) for index in range(3))] for color in colors]
    rgb = np.array(list(COLORS.values()))[colors]
    return [[1000 + red / 10, -blue / 100] for red, _, blue in rgb.tolist()]


def data_of(kind: str, train: int = 54, test: int = 21) -> ImageData:
    features = Features({"image": Image(), "label": Sequence(Value("float32"))})
    splits = []
    for number, seed in ((train, 0), (test, 1)):
        images, colors = colored_images(number, seed)
        splits.append(Dataset.from_dict({"image": images, "label": labels_of(colors, kind)}, features=features))
    names = ["bright", *COLORS] if kind == SEVERAL else ["redness", "blueness"]
    return ImageData("photos", *splits, ("image", "label"), names, "test", train, problem_type=kind)


def with_counts(counts: list[int] | None, problem_type: str = "single_label_classification", images: int = 0) -> Any:
    data = ImageData("photos", range(images), None, ("image", "label"), ["a", "b", "c"], "test", 0, problem_type)
    object.__setattr__(data, "class_counts", lambda: counts)
    return data


# ------------------------------------------------------------------------------------------------ class weights


def test_weights_of_classes() -> None:
    assert weights_of_classes("none", with_counts([1, 2, 3])) is None
    balanced = weights_of_classes("balanced", with_counts([10, 0, 30]))
    assert balanced is not None
    torch.testing.assert_close(balanced, torch.tensor([2.0, 0.0, 40 / 60]))  # N / (classes * count)
    counts = torch.tensor([10.0, 500.0, 9000.0], dtype=torch.float64)
    effective = weights_of_classes("effective", with_counts([10, 500, 9000]))
    assert effective is not None
    assert (effective * counts).sum() / counts.sum() == pytest.approx(1)
    by_hand = (1 - 0.999**10) / (1 - 0.999**9000)  # the paper's equation (2), of the first class beside the last
    assert float(effective[2] / effective[0]) == pytest.approx(by_hand, rel=1e-5)
    torch.testing.assert_close(effective_number(torch.tensor([1.0])), torch.tensor([1.0]), rtol=1e-4, atol=0)
    several = weights_of_classes("balanced", with_counts([20, 0, 100], SEVERAL, images=100))
    torch.testing.assert_close(several, torch.tensor([4.0, 1.0, 1.0]))
    with pytest.raises(ValueError, match="which a stream does not tell"):
        weights_of_classes("balanced", with_counts(None))


def test_weighted_losses_by_hand() -> None:
    logits, weights = torch.randn(2, 3), torch.tensor([2.0, 0.5, 1.0])
    logs = logits.log_softmax(dim=1)
    expected = -(2 * logs[0, 0] + 0.5 * logs[1, 1]) / 2
    torch.testing.assert_close(LOSSES["cross_entropy"](logits, torch.tensor([0, 1]), weights), expected)
    soft = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.1, 0.9]])
    torch.testing.assert_close(LOSSES["cross_entropy"](logits, soft, weights), -(soft * weights * logs).sum() / 2)
    plain = LOSSES["binary_cross_entropy"]
    each = torch.stack([plain(logits[:1], soft[:1]) * (1.4 + 0.15), plain(logits[1:], soft[1:]) * (0.05 + 0.9)])
    torch.testing.assert_close(plain(logits, soft, weights), each.mean())
    ones = torch.ones(3)
    for loss in LOSSES.values():
        torch.testing.assert_close(loss(logits, soft, ones), loss(logits, soft))


def test_mixing_of_several_labels() -> None:
    labels = torch.tensor([[1.0, 0.0, -100.0], [0.0, 1.0, 1.0]])
    mixer = BatchMixer(3, mixup=1.0, label_smoothing=0.1)
    for seed in range(4):
        _, mixed = mixer(torch.zeros(2, 3, 4, 4), labels, torch.Generator().manual_seed(seed))
        known = mixed[mixed != -100]
        assert mixed[0, 2] == -100 and known.min() > 0.0499 and known.max() < 0.9501
        assert mixed[:, :2].sum(dim=1) == pytest.approx(1.0)


# ------------------------------------------------------------------------------------------------------ metrics


def test_metrics_of_classes_by_scikit_learn() -> None:
    draw = np.random.default_rng(0)
    labels, predicted = draw.choice(7, 60, p=[0.4, 0.3, 0.1, 0.1, 0.1, 0, 0]), draw.integers(0, 6, 60)
    tensors = torch.tensor(labels), torch.tensor(predicted)
    results = ImageResults(*tensors, torch.rand(60), torch.rand(60), torch.zeros(60), 7)
    metrics = results.metrics()
    assert metrics["balanced_accuracy"] == pytest.approx(_recall(labels, predicted))
    assert metrics["macro_f1"] == pytest.approx(sklearn_metrics.f1_score(labels, predicted, average="macro"))
    rows = results.per_class([str(index) for index in range(7)])
    assert rows[6]["recall"] is None and rows[6]["f1"] is None and rows[5]["f1"] == 0
    confusion = sklearn_metrics.confusion_matrix(labels, predicted, labels=range(7))
    assert sum(count for *_, count in results.pairs()) == 60
    assert all(confusion[true, said] == count for true, said, count in results.pairs())


def _recall(labels: Any, predicted: Any) -> float:
    present = np.unique(labels)
    return float(sklearn_metrics.recall_score(labels, predicted, labels=present, average="macro"))


def test_many_classes_need_no_matrix() -> None:
    labels = torch.arange(60_000) % 50_000
    results = ImageResults(labels, labels.roll(1), torch.rand(60_000), torch.rand(60_000), labels, 50_000)
    assert results.metrics()["macro_f1"] == 0 and len(results.per_class([""] * 50_000)) == 50_000
    assert len(results.pairs()) == 50_001
    assert results.confusion().is_sparse and int(results.confusion().sum()) == 60_000


def test_metrics_of_several_labels_by_scikit_learn() -> None:
    draw = np.random.default_rng(0)
    labels, scores = (draw.random((80, 4)) < [0.5, 0.2, 0.05, 0.0]).astype("float32"), draw.random((80, 4))
    scores = (scores + labels * draw.random((80, 4))).astype("float32") / 2
    results = LabelResults(torch.tensor(labels), torch.tensor(scores), torch.ones(80, 4))
    metrics, rows = results.metrics(), results.per_class("abcd")
    precisions = [sklearn_metrics.average_precision_score(labels[:, index], scores[:, index]) for index in range(3)]
    assert metrics["mean_average_precision"] == pytest.approx(np.mean(precisions), abs=1e-6)
    assert rows[3]["average_precision"] is None and rows[3]["count"] == 0
    assert metrics["micro_f1"] == pytest.approx(sklearn_metrics.f1_score(labels, scores > 0.5, average="micro"))
    results.thresholds = results.best_thresholds()
    assert results.thresholds[3] == 0.5
    f1 = [
        sklearn_metrics.f1_score(labels[:, index], scores[:, index] > results.thresholds[index]) for index in range(3)
    ]
    for index in range(3):
        others = [sklearn_metrics.f1_score(labels[:, index], scores[:, index] > cut) for cut in np.linspace(0, 1, 101)]
        assert f1[index] >= max(others) - 1e-9
    assert [row["f1"] for row in results.per_class("abcd")[:3]] == pytest.approx(f1)


def test_unknown_labels_are_not_counted() -> None:
    labels, scores = torch.tensor([[1.0], [-100.0], [0.0]]), torch.tensor([[0.9], [0.99], [0.1]])
    results = LabelResults(labels, scores, torch.tensor([[1.0], [0.0], [2.0]]))
    assert results.metrics() == {
        "mean_average_precision": 1.0, "micro_f1": 1.0, "macro_f1": 1.0, "loss": 1.5, "count": 3,
    }  # fmt: skip


def test_metrics_of_targets_by_scikit_learn() -> None:
    draw = np.random.default_rng(0)
    labels = draw.normal([10, -2], [5, 0.1], (30, 2)).astype("float32")
    predicted = labels + draw.normal(0, [1, 0.05], (30, 2)).astype("float32")
    results = TargetResults(torch.tensor(labels), torch.tensor(predicted), scale=[5.0, 0.1])
    metrics = results.metrics()
    assert metrics["r2"] == pytest.approx(sklearn_metrics.r2_score(labels, predicted), abs=1e-5)
    assert metrics["mae"] == pytest.approx(sklearn_metrics.mean_absolute_error(labels, predicted), rel=1e-5)
    assert metrics["loss"] == pytest.approx((((predicted - labels) / [5, 0.1]) ** 2).mean(), rel=1e-4)
    assert {"mae", "rmse", "loss"} <= LOWER_IS_BETTER and "r2" not in LOWER_IS_BETTER
    alone = TargetResults(torch.tensor([2.0]), torch.tensor([[2.5]]))
    assert alone.metrics() == {"r2": 0.0, "mae": 0.5, "rmse": 0.5, "loss": 0.25, "count": 1}


def test_a_planted_temperature_is_found() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, 4, generator=generator) * 2
    labels = torch.multinomial((logits / 2.5).softmax(dim=1), 1, generator=generator).squeeze(1)
    assert fit_temperature(logits, labels) == pytest.approx(2.5, rel=0.05)
    present = ((logits / 0.5).sigmoid() > torch.rand(logits.shape, generator=generator)).float()
    assert fit_temperature(logits, present) == pytest.approx(0.5, rel=0.05)
    # All are right: sharper, but the fewer images there are, the less.
    few, many = (fit_temperature(logits[:number], logits[:number].argmax(dim=1)) for number in (30, 20_000))
    assert 0.05 < many < few < 1
    assert fit_temperature(logits, logits.argmin(dim=1)) == pytest.approx(20, abs=1e-2)


# --------------------------------------------------------------------------------------------------------- runs


def test_a_regression_learns_in_units_of_its_targets() -> None:
    data, config = data_of(TARGETS), TrainConfig(**{**RECIPE, "task": "regression"})
    task = TASKS["regression"](config, data)
    model, _ = build_model(config, task)
    targets = np.array(data.train["label"][:])
    assert model.config.target_mean == pytest.approx(targets.mean(axis=0).tolist())
    assert model.config.target_scale == pytest.approx(targets.std(axis=0).tolist())
    assert model.config.problem_type == TARGETS and model.config.id2label == {0: "redness", 1: "blueness"}
    labels = torch.tensor(targets[:6], dtype=torch.float32)
    loss = task.loss(model.eval(), torch.randn(6, 3, 8, 8), labels, torch.Generator())
    assert 0.2 < loss.item() < 5  # in standard deviations, whatever the units
    for fields in ({"mixup": 0.2}, {"class_weights": "balanced"}, {"sampling": "balanced"}):
        with pytest.raises(ValueError, match="no classes to mix or to weigh"):
            TASKS["regression"](TrainConfig(**{**RECIPE, **fields}), data)


def finished(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **fields: Any) -> tuple[Any, list[str]]:
    """Train and report on data of a kind, which `load_data` need not know."""
    task = {SEVERAL: "multi_label", TARGETS: "regression"}[kind]
    monkeypatch.setattr(run_module, "data_of", lambda config: data_of(kind))
    config = TrainConfig(**{**RECIPE, "data": "photos", "output_dir": str(folder), "task": task, **fields})
    said: list[str] = []
    return train_and_report(config, "hf-vit train", said.append), said


def image() -> PIL.Image.Image:
    return colored_images(3, 5)[0][2]  # red


def test_a_model_of_several_labels_from_run_to_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "several"
    fields = {"class_weights": "balanced", "mixup": 0.1, "epochs": 30, "learning_rate": 1e-2, "eval_every": 15}
    run, said = finished(SEVERAL, folder, monkeypatch, **fields)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["eval_mean_average_precision"] > 0.9 and metrics["eval_micro_f1"] > 0.8
    assert said[0].startswith(f"Mean average precision {metrics['eval_mean_average_precision']:.2%}, micro-F1")
    config = json.loads((folder / "config.json").read_text())
    assert config["problem_type"] == SEVERAL and config["thresholds"] == run.predictions.thresholds
    card = (folder / "README.md").read_text()
    assert {path.name for path in folder.glob("*.png")} >= {"training.png", "average_precision.png"}
    assert "| label | images | average precision | F1 | threshold |" in card and "`class_weights: balanced`" in card
    assert "highest F1 on the evaluation images" in card and "Training images with each label: bright 18," in card

    answers = pipeline("image-classification", str(folder), device="cpu", top_k=4)(image())
    (prediction,) = Predictor.from_pretrained(folder, precision="fp32")([image()])
    above = {
        answer["label"]: answer["score"]
        for answer in answers
        if answer["score"] > config["thresholds"][config["label2id"][answer["label"]]]
    }
    assert dict(zip(prediction.labels, prediction.scores, strict=True)) == pytest.approx(above, abs=1e-5)
    assert prediction.labels[0] == "red" and prediction.scores == sorted(prediction.scores, reverse=True)
    (most,) = Predictor.from_pretrained(folder, precision="fp32", top_k=4)([image()])
    assert [(answer["label"], pytest.approx(answer["score"], abs=1e-5)) for answer in answers] == [
        *zip(most.labels, most.scores, strict=True)
    ]


def test_a_regression_from_run_to_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "targets"
    _, said = finished(TARGETS, folder, monkeypatch, epochs=40, learning_rate=1e-2, eval_every=20)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["eval_r2"] > 0.7 and said[0].startswith(f"R² {metrics['eval_r2']:.4f}, mean absolute error")
    card = (folder / "README.md").read_text()
    assert "| target | images | MAE | RMSE | R² |" in card and "expect larger errors outside of that" in card
    assert (folder / "targets.png").is_file() and "one of 2 classes" not in card
    # Stated, since older versions of transformers apply the softmax to regressions, too.
    answers = pipeline("image-classification", str(folder), device="cpu", function_to_apply="none")(image())
    (prediction,) = Predictor.from_pretrained(folder, precision="fp32")([image()])
    values = dict(zip(prediction.labels, prediction.scores, strict=True))
    assert values == pytest.approx({answer["label"]: answer["score"] for answer in answers}, rel=1e-4)
    assert list(values) == ["redness", "blueness"] and 1000 < values["redness"] < 1025
    assert prediction.answers[0] == f"redness {values['redness']:.4g}"


@pytest.mark.parametrize("kind", [SEVERAL, TARGETS])
def test_a_killed_run_resumes_to_the_same_bits(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = finished(kind, tmp_path / "whole", monkeypatch, max_steps=6)
    with monkeypatch.context() as stopped, pytest.raises(Interrupted):
        stop_at(3, stopped)
        finished(kind, tmp_path / "resumed", monkeypatch, max_steps=6)
    resumed, _ = finished(kind, tmp_path / "resumed", monkeypatch, max_steps=6)
    assert_same_weights(weights(whole.model), weights(resumed.model))
    assert whole.metrics == resumed.metrics
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("whole", "resumed")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("kind", [SEVERAL, TARGETS])
def test_evaluation_of_a_saved_model(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = data_of(kind, train=6, test=12)
    task = TASKS[{SEVERAL: "multi_label", TARGETS: "regression"}[kind]](TrainConfig(**RECIPE), data)
    model, processor = build_model(TrainConfig(**RECIPE), task)
    torch.nn.init.normal_(model.classifier.weight)
    if kind == SEVERAL:
        model.config.thresholds = [0.2, 0.4, 0.6, 0.8]
    model.save_pretrained(folder := tmp_path / "model")
    processor.save_pretrained(folder)
    # Another order of labels, and for several labels one less.
    order = [3, 0, 1] if kind == SEVERAL else [1, 0]
    moved = data.evaluation.map(lambda row: {"label": [row["label"][index] for index in order]})
    names = [data.label_names[index] for index in order]
    other = dataclasses.replace(data, evaluation=moved, label_names=names)
    monkeypatch.setattr(evaluate, "load_evaluation_data", lambda *names, **options: (other, ""))
    measured = evaluate.evaluate_checkpoint(str(folder), "photos", precision="fp32")
    assert measured is not None and measured["problem_type"] == kind and measured["labels"] == data.label_names

    pixels = torch.stack([processor(image, return_tensors="pt")["pixel_values"][0] for image in moved["image"]])
    with torch.no_grad():
        logits = model.eval()(pixel_values=pixels).logits
    labels = np.array(data.evaluation["label"][:])
    if kind == SEVERAL:
        chosen = logits.sigmoid().numpy() > np.array(model.config.thresholds)
        known = [0, 1, 3]
        expected = sklearn_metrics.f1_score(labels[:, known], chosen[:, known], average="micro")
        assert measured["figures"]["micro_f1"] == pytest.approx(expected)
        assert "The data has 3 of the 4 classes" in measured["note"] and measured["per_class"][2]["count"] == 0
    else:
        expected = sklearn_metrics.mean_absolute_error(labels, logits.numpy())
        assert measured["figures"]["mae"] == pytest.approx(expected, rel=1e-4)
    lines = report_lines(measured)
    assert any(line.split()[0] == {SEVERAL: "mAP", TARGETS: "R²"}[kind] for line in lines)
    assert all(any(line.endswith(f"  {name}") for line in lines) for name in names)

    plain = dataclasses.replace(other, problem_type="single_label_classification")
    monkeypatch.setattr(evaluate, "load_evaluation_data", lambda *names, **options: (plain, ""))
    with pytest.raises(ValueError, match="but the data has one label per image"):
        evaluate.evaluate_checkpoint(str(folder), "photos", precision="fp32")


@pytest.mark.parametrize("problem_type", [None, "single_label_classification", SEVERAL, "regression"])
@pytest.mark.parametrize("function", [None, "softmax", "sigmoid", "none"])
def test_a_pipeline_answers_as_that_of_transformers(problem_type: str | None, function: str | None) -> None:
    fields = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = HFViTForImageClassification(HFViTConfig(**fields, image_size=8, patch_size=4, num_labels=7))
    model.config.problem_type = problem_type
    options = {"model": model, "image_processor": HFViTImageProcessor(size={"height": 8, "width": 8})}
    ours, theirs = HFViTImageClassificationPipeline(**options), ImageClassificationPipeline(**options)
    how = None if function is None else ClassificationFunction(function)
    expected = ClassificationFunction.NONE if how is None and problem_type == "regression" else how  # before 5.24
    logits = torch.tensor([0.5, 2.0, 0.5, -1.0, 2.0, 0.25, 0.5])  # with ties
    for values in (logits, logits.bfloat16()):
        for top_k in (1, 3, 20):
            outputs = {"logits": values[None]}
            assert ours.postprocess(outputs, how, top_k) == theirs.postprocess(outputs, expected, top_k)
