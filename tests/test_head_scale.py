"""Temperature and units of targets, in every form of a model, and folded into the layouts of other libraries."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from isolated import save_tiny_classifier

from hf_vit import HFViTConfig, HFViTForImageClassification
from hf_vit.checkpoints.export import export_checkpoint
from hf_vit.checkpoints.models import load, load_classifier
from hf_vit.inference.optimize import optimize_for_inference
from hf_vit.model.losses_hf_vit import classification_loss

UNITS: dict[str, Any] = {
    "problem_type": "regression", "target_mean": [100.0, -3.0, 0.5], "target_scale": [20.0, 0.1, 1.0],
}  # fmt: skip
SCALES: dict[str, dict[str, Any]] = {"temperature": {"temperature": 2.5}, "units": UNITS}
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def model_of(**fields: Any) -> HFViTForImageClassification:
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = HFViTConfig(**small, image_size=32, patch_size=16, num_labels=3, **fields)
    return HFViTForImageClassification(config).eval()


@torch.no_grad()
def test_logits_are_scaled_once() -> None:
    plain = model_of()(PIXELS).logits
    assert torch.equal(model_of(temperature=2.5)(PIXELS).logits, plain / 2.5)
    scaled = plain * torch.tensor(UNITS["target_scale"]) + torch.tensor(UNITS["target_mean"])
    assert torch.equal(model_of(**UNITS)(PIXELS).logits, scaled)
    half = model_of(**UNITS).bfloat16()(PIXELS.bfloat16()).logits
    assert half.dtype == torch.float32 and (half - scaled).abs().max() < 1


@torch.no_grad()
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("to", ["transformers", "timm"])
def test_every_form_of_a_model_gives_its_logits(scale: str, to: str, tmp_path: Path) -> None:
    model = model_of(**SCALES[scale])
    expected = model(PIXELS).logits
    torch.testing.assert_close(optimize_for_inference(model, "fp32")(PIXELS).logits, expected)
    program = torch.export.export(model, (PIXELS,))
    torch.testing.assert_close(program.module()(PIXELS).logits, expected)
    model.save_pretrained(tmp_path / "own")
    again, _ = load(tmp_path / "own")
    assert torch.equal(again(PIXELS).logits, expected)
    said = export_checkpoint(tmp_path / "own", tmp_path / to, to)
    assert any(sentence.startswith("Folded into the weights of the head") for sentence in said)
    again, _ = load(tmp_path / to)
    assert again.config.temperature == 1 and again.config.target_scale is None
    torch.testing.assert_close(again(PIXELS).logits, expected)


def test_a_new_head_has_no_scale(tmp_path: Path) -> None:
    model = HFViTForImageClassification.from_pretrained(save_tiny_classifier(tmp_path / "plain"))
    model.config.temperature, model.config.thresholds = 3.0, [0.1] * 5
    model.save_pretrained(folder := tmp_path / "five")
    names = [f"LABEL_{index}" for index in range(5)]
    same, _ = load_classifier(folder, names)
    assert same.config.temperature == 3 and same.config.thresholds == [0.1] * 5
    other, _ = load_classifier(folder, ["a", "b"])
    assert other.config.temperature == 1 and other.config.thresholds is None
    kind = {"problem_type": "regression", "target_mean": [1.0] * 5, "target_scale": [2.0] * 5}
    changed, _ = load_classifier(folder, names, **kind)
    assert not changed.classifier.weight.any() and changed.config.target_scale == [2.0] * 5
    assert changed.config.temperature == 1 and changed.config.thresholds is None
    three, _ = load_classifier(
        folder, ["x", "y", "z"], **{**kind, "target_mean": [1.0] * 3, "target_scale": [2.0] * 3}
    )
    assert three.config.num_labels == 3 and three.config.target_mean == [1.0] * 3
    for options in ({"num_labels": 3}, {"id2label": {0: "a", 1: "b"}}):
        config = HFViTForImageClassification.from_pretrained(folder, ignore_mismatched_sizes=True, **options).config
        assert config.temperature == 1 and config.thresholds is None


def test_impossible_scales_have_a_remedy() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"thresholds": [0.5]}, "for each of 3 labels, got 1"),
        ({"thresholds": [0.5, 0.5, 1.5]}, r"probabilities in \[0, 1\]"),
        ({"temperature": 0}, "temperature must be at least"),
        ({"target_mean": [0.0] * 3}, "set both, or neither"),
        ({"target_mean": [0.0] * 3, "target_scale": [1.0, 0.0, 1.0]}, "target_scale must be positive"),
        ({"target_mean": [float("nan")] * 3, "target_scale": [1.0] * 3}, "must be numbers"),
    ]
    for fields, message in wrong:
        with pytest.raises(ValueError, match=message):
            HFViTConfig(num_labels=3, **fields)


def test_losses_of_several_labels_and_of_targets() -> None:
    logits, labels = torch.randn(4, 3), torch.tensor([[1, 0, 1], [0, 0, -100], [1, 1, 0], [0, -100, 1.0]])
    several = HFViTConfig(num_labels=3, problem_type="multi_label_classification")
    is_known = labels != -100
    expected = F.binary_cross_entropy_with_logits(logits[is_known], labels[is_known])
    torch.testing.assert_close(classification_loss(labels, logits, several), expected)
    torch.testing.assert_close(classification_loss(labels, logits, several, num_items_in_batch=20), expected / 2)
    weights = torch.tensor([1.0, 3.0, 0.5])
    expected = F.binary_cross_entropy_with_logits(
        logits[is_known], labels[is_known], pos_weight=weights.expand(4, 3)[is_known]
    )
    torch.testing.assert_close(classification_loss(labels, logits, several, class_weights=weights), expected)

    targets = HFViTConfig(num_labels=3, **UNITS)
    residuals = (logits - labels) / torch.tensor(UNITS["target_scale"])
    torch.testing.assert_close(classification_loss(labels, logits, targets), residuals.square().mean())
    one = HFViTConfig(num_labels=1, problem_type="regression", target_mean=[5.0], target_scale=[2.0])
    torch.testing.assert_close(
        classification_loss(torch.tensor([1.0, 3.0]), torch.tensor([[2.0], [5.0]]), one), torch.tensor(0.625)
    )
