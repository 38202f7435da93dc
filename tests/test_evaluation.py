"""Figures over a loader, the last partial batch counted exactly."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from hf_vit import HFViTForImageClassification
from hf_vit.evaluation import evaluate, predict


def to_model(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.float() / 255


@pytest.fixture
def items() -> list[dict[str, Any]]:
    return [
        {"pixel_values": torch.randint(0, 256, (3, 32, 48), dtype=torch.uint8), "labels": index % 5}
        for index in range(11)
    ]


@pytest.mark.parametrize("batch_size", [1, 4, 11, 16])
def test_every_image_counts_once(batch_size: int, tiny_config: Any, items: list[dict[str, Any]]) -> None:
    model = HFViTForImageClassification(tiny_config(hidden_dropout_prob=0.5, initializer_range=0.3))
    accelerator = Accelerator(cpu=True)
    model, loader = accelerator.prepare(model, DataLoader(items, batch_size=batch_size))
    model.train()
    figures = evaluate(model, loader, accelerator, to_model)
    assert model.training
    model.eval()
    with torch.no_grad():
        logits = model(to_model(torch.stack([item["pixel_values"] for item in items]))).logits
    labels = torch.tensor([item["labels"] for item in items])
    assert figures["count"] == 11
    assert figures["accuracy"] == (logits.argmax(-1) == labels).sum().item() / 11
    assert figures["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), abs=1e-5)


def test_predictions_keep_the_order(tiny_config: Any, items: list[dict[str, Any]]) -> None:
    model = HFViTForImageClassification(tiny_config(initializer_range=0.3))
    probabilities = predict(model, DataLoader(items, batch_size=4), to_model)
    assert torch.allclose(probabilities.sum(-1), torch.ones(11))
    with torch.no_grad():
        one = model(to_model(items[9]["pixel_values"][None])).logits.softmax(-1)
    assert torch.allclose(probabilities[9], one[0], atol=1e-5)
