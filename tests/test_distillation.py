"""Distillation: what a student learns from its teachers, saves, stores on disk, and refuses."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import COLORS, assert_same_weights, save_photos, stop_at, tiny_recipe, weights
from transformers import AutoModel, AutoModelForImageClassification

from hf_vit import HFViTConfig, HFViTForImageClassification, HFViTImageProcessor, HFViTModel
from hf_vit.data.images import normalize
from hf_vit.system.stopping import Interrupted
from hf_vit.training.distillation import LABEL_LOSSES, Distillation, _batches, feature_losses, sample_of
from hf_vit.training.loop import train
from hf_vit.training.recipe import TrainConfig
from hf_vit.training.rehearsal import rehearse
from hf_vit.training.run import LOG, METRICS, Run
from hf_vit.training.tasks import TASKS
from hf_vit.training.teachers import Teachers

SMALL = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_photos(tmp_path_factory.mktemp("data") / "photos")


def save_teacher(folder: Path, model_class: Any = HFViTModel, preset: str = "timm", **fields: Any) -> str:
    torch.manual_seed(len(fields))
    config = HFViTConfig(**{**SMALL, "image_size": 12, "patch_size": 4, "initializer_range": 0.2, **fields})
    model_class(config).save_pretrained(folder)
    processor = HFViTImageProcessor.from_preset(preset, config.image_shape, num_channels=config.num_channels)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_teacher(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    fields = {"id2label": dict(enumerate(COLORS)), "pooling": "mean", "image_size": 8, "num_register_tokens": 1}
    return save_teacher(tmp_path_factory.mktemp("classifier"), HFViTForImageClassification, "original", **fields)


def distill(photos: Path, folder: Path, teacher: Any, **fields: Any) -> Run:
    return train(tiny_recipe(photos, folder, **{"task": "distillation", "teacher": teacher, **fields}))


def losses(run: Run) -> list[float]:
    return [row["eval_loss"] for row in run.log if "eval_loss" in row]


def test_a_student_learns_features_of_several_teachers(
    photos: Path, tmp_path: Path, encoder: str, classifier: str
) -> None:
    run = distill(photos, tmp_path, [encoder, classifier], learning_rate=1e-2, epochs=6, ema_decay=0.9)
    values = losses(run)
    assert values[-1] < 0.8 * values[0]
    assert isinstance(run.model, HFViTModel)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert_same_weights(weights(loaded), weights(run.model))
    assert "teacher" not in (tmp_path / "config.json").read_text()
    tuned = train(tiny_recipe(photos, tmp_path / "tuned", model=str(tmp_path), model_config={}, epochs=1))
    assert isinstance(tuned.model, HFViTForImageClassification)


@pytest.mark.parametrize("distill_", ["labels", None])
def test_a_student_of_a_classifier_has_its_labels(
    photos: Path, tmp_path: Path, classifier: str, distill_: str | None
) -> None:
    run = distill(photos, tmp_path, classifier, distill=distill_, learning_rate=1e-2, epochs=6)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert loaded.config.id2label == dict(enumerate(COLORS))
    assert_same_weights(weights(loaded), weights(run.model))
    assert run.metrics["eval_agreement"] > 0.6 and losses(run)[-1] < losses(run)[0]


def test_resumed_is_equal_to_uninterrupted(
    photos: Path, tmp_path: Path, encoder: str, classifier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields: dict[str, Any] = {"ema_decay": 0.9, "accumulation_steps": 2, "distill": "features"}
    whole = distill(photos, tmp_path / "whole", [encoder, classifier], **fields)
    with monkeypatch.context() as patch:
        stop_at(4, patch)
        with pytest.raises(Interrupted):
            distill(photos, tmp_path / "parts", [encoder, classifier], **fields)
    parts = distill(photos, tmp_path / "parts", [encoder, classifier], **fields)
    assert_same_weights(weights(parts.model), weights(whole.model))
    for name in (LOG, METRICS, "model.safetensors"):
        assert (parts.output_dir / name).read_bytes() == (whole.output_dir / name).read_bytes(), name


# ------------------------------------------------------------------------------------------------------ the teachers


@pytest.mark.parametrize(
    "fields",
    [
        {"pooling": "attention", "position_embedding_type": "rotary", "patch_size": 2},
        {"pooling": "cls_and_mean", "position_embedding_type": "relative", "num_register_tokens": 2},
        {"pooling": "mean_all", "position_embedding_type": "sincos_2d", "use_cls_token": False, "image_size": (8, 20)},
        {"final_layernorm": "pooled", "representation_size": 7, "position_embedding_type": "none"},
    ],
)
def test_every_kind_of_teacher_answers_on_the_grid_of_the_student(tmp_path: Path, fields: dict[str, Any]) -> None:
    teachers = Teachers([save_teacher(tmp_path, **fields)])
    student = HFViTImageProcessor.from_preset("timm", (8, 12))
    answers = teachers.answer(torch.randn(2, 3, 8, 12), student, (4, 3))
    assert [each.shape for each in answers.summaries] == [(2, teachers.summary_widths[0])]
    assert [each.shape for each in answers.patches] == [(2, 12, 24)]
    back = teachers.unpack(answers.packed(), 12)
    assert torch.equal(back.patches[0], answers.patches[0]) and torch.equal(back.summaries[0], answers.summaries[0])


def test_a_teacher_sees_what_its_own_processor_would_show_it(tmp_path: Path) -> None:
    name = save_teacher(tmp_path, image_size=8)
    processor = HFViTImageProcessor.from_pretrained(name, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.25])
    processor.save_pretrained(name)
    teacher = HFViTModel.from_pretrained(name).eval()
    levels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    student = HFViTImageProcessor.from_preset("original", 8)
    answers = Teachers([name]).answer(normalize(levels, student), student, (2, 2))
    with torch.no_grad():
        expected = teacher(normalize(levels, processor))
    torch.testing.assert_close(answers.patches[0], expected.last_hidden_state[:, 1:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(answers.summaries[0], expected.pooler_output, rtol=1e-4, atol=1e-5)
    assert not answers.patches[0].is_inference()


def test_teachers_see_the_channels_that_are_named(tmp_path: Path) -> None:
    colors, gray = save_teacher(tmp_path / "a"), save_teacher(tmp_path / "b", num_channels=1, preset="original")
    processor = HFViTImageProcessor.from_preset("original", 8, num_channels=5)
    pixels = torch.randn(2, 5, 8, 8)
    chosen = Teachers([colors], channels=[4, 0, 2])
    chosen.check_channels(5)
    of_three = HFViTImageProcessor.from_preset("original", 8)
    expected = Teachers([colors]).answer(pixels[:, [4, 0, 2]], of_three, (2, 2))
    assert torch.equal(chosen.answer(pixels, processor, (2, 2)).patches[0], expected.patches[0])
    one = Teachers([colors, gray], channels=[3])  # repeated for the first
    one.check_channels(5)
    assert len(one.answer(pixels, processor, (2, 2)).patches) == 2
    with pytest.raises(
        ValueError, match=r"takes 3 channels, and would see 5: name the channels .* such as \[0, 1, 2\]"
    ):
        Teachers([colors]).check_channels(5)
    with pytest.raises(ValueError, match=r"teacher_channels has 5, but the images have 5 channels: use .* 0 to 4"):
        Teachers([colors], channels=[5]).check_channels(5)


def test_a_student_of_other_channels(tmp_path: Path, encoder: str) -> None:
    images = tmp_path / "arrays"
    images.mkdir()
    for number in range(10):
        np.save(images / f"{number}.npy", np.random.default_rng(number).integers(0, 255, (5, 9, 9), dtype=np.uint8))
    fields = {"teacher_channels": [0, 1, 2], "batch_size": 4, "epochs": 1}
    run = distill(images, tmp_path / "student", encoder, **fields)
    assert run.model.config.num_channels == 5


# ---------------------------------------------------------------------------------------------------------- the loss


def test_features_are_standardized_by_teacher(photos: Path, tmp_path: Path, encoder: str, classifier: str) -> None:
    seen = []

    class Spy(Distillation):
        def begin(self, run: Any, model: Any) -> None:
            super().begin(run, model)
            batch = next(_batches(run.images, sample_of(run.images), 54))
            answers = self._answers(run.to_model(batch["pixel_values"]), model.config.grid_size)
            seen.append((model, torch.cat(answers.patches, dim=-1)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS, "distillation", Spy)
        distill(photos, tmp_path, [encoder, classifier], distill="features", max_steps=1)
    model, patches = seen[0]
    standard = (patches - model.patch_mean) / model.patch_scale
    for part in standard.split(24, dim=-1):
        assert part.mean(dim=(0, 1)).abs().max() < 1e-4
        assert part.square().mean().item() == pytest.approx(1, abs=1e-3)


def test_equal_features_have_no_loss_and_opposite_ones_most() -> None:
    targets = torch.randn(3, 5, 8)
    same, opposite = feature_losses(targets, targets, [3, 5]), feature_losses(-targets, targets, [3, 5])
    assert same.abs().max() < 1e-6 and opposite.min() > 0.9 * 2


@pytest.mark.parametrize("kind", LABEL_LOSSES)
@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_soft_labels(kind: str, temperature: float) -> None:
    logits, targets = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
    measure = LABEL_LOSSES[kind]
    assert measure(targets, targets, temperature).abs().max() < 1e-5
    (gradient,) = torch.autograd.grad(measure(logits, targets, temperature).sum(), logits)
    squash, share = (lambda x: x.softmax(-1), 1) if kind.startswith("single") else (torch.sigmoid, 3)
    expected = temperature / share * (squash(logits / temperature) - squash(targets / temperature))
    torch.testing.assert_close(gradient, expected)


# ------------------------------------------------------------------------------------------------- stored answers


CACHED: dict[str, Any] = {"teacher_views": 2, "epochs": 4, "log_every": 1, "distill": "both"}


def test_stored_answers_are_those_of_the_same_views(
    photos: Path, tmp_path: Path, classifier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    fields = {**CACHED, "teacher_cache": str(cache), "teacher_views": 4}
    plain = distill(photos, tmp_path / "plain", classifier, **{**CACHED})
    stored = distill(photos, tmp_path / "stored", classifier, **fields)
    values = [[row["loss"] for row in run.log if "loss" in row] for run in (plain, stored)]
    assert values[1] == pytest.approx(values[0], rel=2e-3)  # half precision
    files = {file: file.stat().st_mtime_ns for file in cache.rglob("*.safetensors")}
    assert len(files) == 4
    with monkeypatch.context() as patch:
        stop_at(4, patch)
        with pytest.raises(Interrupted):
            distill(photos, tmp_path / "parts", classifier, **fields, num_workers=1)
    parts = distill(photos, tmp_path / "parts", classifier, **fields, num_workers=1)
    assert_same_weights(weights(parts.model), weights(stored.model))
    assert {file: file.stat().st_mtime_ns for file in cache.rglob("*.safetensors")} == files  # read, not written
    other = distill(photos, tmp_path / "other", classifier, **{**fields, "seed": 1, "epochs": 1})
    assert len([*cache.iterdir()]) == 2 and other.metrics["steps"] == 3


def test_a_file_that_is_cut_off_is_written_again(photos: Path, tmp_path: Path, encoder: str) -> None:
    fields = {**CACHED, "distill": "features", "teacher_cache": str(tmp_path / "cache"), "epochs": 1}
    whole = distill(photos, tmp_path / "whole", encoder, **fields)
    first, second = sorted((tmp_path / "cache").rglob("*.safetensors"))
    expected = first.read_bytes()
    first.write_bytes(expected[:-100])
    second.unlink()
    again = distill(photos, tmp_path / "again", encoder, **fields)
    assert first.read_bytes() == expected and second.exists()
    assert_same_weights(weights(again.model), weights(whole.model))


# ---------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"teacher": None}, "needs a teacher: add --teacher NAME"),
        ({"teacher": "nowhere/at/all"}, "nowhere/at/all"),
        ({"trained": "head"}, "trains the whole student: remove trained=head"),
        ({"loss": "binary_cross_entropy"}, "has a loss of its own: remove loss=binary_cross_entropy"),
        ({"mixup": 0.2, "label_smoothing": 0.1}, "remove mixup=0.2, label_smoothing=0.1"),
        ({"distill": "labels"}, "distill=labels needs teachers that all classify the same labels"),
        ({"teacher_image_size": 9}, "9"),
        ({"teacher_cache": "cache", "train_repeats": 2}, "set train_repeats to 1"),
        ({"best_metric": "accuracy"}, "set best_metric to one of loss"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    photos: Path, tmp_path: Path, encoder: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        distill(photos, tmp_path / "run", **{"teacher": encoder, **fields})
    assert not (tmp_path / "run" / LOG).exists()


def test_a_teacher_without_distillation_is_refused() -> None:
    with pytest.raises(ValueError, match="teacher belongs to task=distillation, got task=classification"):
        TrainConfig(teacher="a")


def test_a_dry_run(photos: Path, tmp_path: Path, encoder: str, classifier: str) -> None:
    for teacher in (encoder, classifier):
        fields = {"teacher_cache": str(tmp_path / "cache"), "distill": None}
        cost = rehearse(tiny_recipe(photos, tmp_path / "run", task="distillation", teacher=teacher, **fields))
        assert cost is not None and cost.learned > 0 and cost.training_flops > cost.forward_flops
    assert not [*tmp_path.iterdir()]
