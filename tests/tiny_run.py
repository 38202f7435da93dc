"""A run of seconds: photos of three colours, and a model that learns them in a few steps."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage

from hf_vit.training import TrainConfig

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
