"""A run of seconds: photos of three colours, and a model that learns them in a few steps."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage

from hf_vit.training import tasks
from hf_vit.training.optim import Schedule
from hf_vit.training.recipe import TrainConfig
from hf_vit.training.run import LOG

COLORS = {"blue": (40, 60, 200), "green": (40, 180, 60), "red": (200, 50, 40)}
RECIPE: dict[str, Any] = {
    "model": None,
    "model_config": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "patch_size": 4,
        "hidden_dropout_prob": 0.1,
    },
    "image_size": 8,
    "preprocessing": "original",
    "epochs": 3,
    "batch_size": 16,
    "learning_rate": 3e-3,
    "warmup_epochs": 1,
    "precision": "fp32",
    "log_every": 2,
}


def colored_images(number: int, seed: int) -> tuple[list[PILImage.Image], list[int]]:
    """Return images of 14x10 pixels (height x width), noise on one of `COLORS`, and their labels."""
    noise = np.random.default_rng(seed)
    labels = [index % len(COLORS) for index in range(number)]
    colors = np.array(list(COLORS.values()))[labels][:, None, None]
    pixels = (colors + noise.normal(0, 20, (number, 14, 10, 3))).clip(0, 255).astype(np.uint8)
    return [PILImage.fromarray(image) for image in pixels], labels


def colored_dataset(number: int, seed: int) -> Dataset:
    images, labels = colored_images(number, seed)
    features = Features({"image": Image(), "label": ClassLabel(names=list(COLORS))})
    return Dataset.from_dict({"image": images, "label": labels}, features=features)


def save_photos(folder: Path) -> Path:
    """Write 54 images to learn from and 21 to test, as `save_to_disk` does."""
    DatasetDict({"train": colored_dataset(54, 0), "test": colored_dataset(21, 1)}).save_to_disk(str(folder))
    return folder


def tiny_recipe(photos: Path, output_dir: Path, **fields: Any) -> TrainConfig:
    return TrainConfig(**{**RECIPE, "data": str(photos), "output_dir": str(output_dir), **fields})


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


def at_step(step: int, do: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have something happen as `step`, counted from 0, begins."""
    apply = Schedule.apply

    def do_and_apply(self: Any, optimizer: Any, learning_rate: float, current: int) -> float:
        if current == step:
            do()
        return apply(self, optimizer, learning_rate, current)

    monkeypatch.setattr(Schedule, "apply", do_and_apply)


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch, signum: int = signal.SIGINT) -> None:
    """Have the process get a signal in the middle of `step`."""
    at_step(step, lambda: os.kill(os.getpid(), signum), monkeypatch)


def spoil_loss(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Make the loss of `step`, counted from 0, not a number."""
    measure, spoilt = tasks.Classification.loss, {"now": False}

    def loss(self: Any, *arguments: Any) -> torch.Tensor:
        value = measure(self, *arguments)
        return value * float("nan") if spoilt["now"] else value

    at_step(step, lambda: spoilt.update(now=True), monkeypatch)
    at_step(step + 1, lambda: spoilt.update(now=False), monkeypatch)
    monkeypatch.setattr(tasks.Classification, "loss", loss)
