"""What transformers' Trainer needs to train a Vision Transformer as `hf-vit train` does.

Augmentation and mixing follow from (seed, epoch, image). So a run that resumes from a checkpoint of Trainer continues
exactly, also in the middle of an epoch and with any number of workers.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer, TrainerCallback

from ..data.augmentation import BatchMixer
from ..data.images import TrainingImages, Visit, collate, derive_seed, normalize
from ..model.modeling_hf_vit import HFViTForImageClassification
from ..system.extras import need
from .optim import DECAYED


class EpochImages(TrainingImages):
    """Training images by index, with another augmentation in every epoch, and a seed for mixing the batch.

    `ViTTrainer` sets `epoch`.
    """

    epoch = 0

    def __getitem__(self, index: int) -> dict[str, Any]:  # type: ignore[override]
        return {**super().__getitem__(Visit(self.epoch, index)), "seed": derive_seed(self.seed, self.epoch, index)}


@dataclass
class Collator:
    """Make a batch: normalized by `processor` and, if it comes from `EpochImages`, mixed by `mixer`.

    Mixed labels are soft, `[B, num_labels]`: set `problem_type="single_label_classification"` in the config.
    """

    processor: Any
    mixer: BatchMixer

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = collate(examples)
        pixel_values, labels = normalize(batch["pixel_values"], self.processor), batch["labels"]
        if "seed" in examples[0]:
            generator = torch.Generator().manual_seed(examples[0]["seed"])
            pixel_values, labels = self.mixer(pixel_values, labels, generator)
        return {"pixel_values": pixel_values, "labels": labels}


class ViTTrainer(Trainer):
    """Trainer for `EpochImages` and `Collator`; needs `remove_unused_columns=False` in its arguments.

    Weight decay excludes tokens and positions, too; Trainer itself excludes biases and norms only.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(_SetEpoch())

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, DECAYED)]


class _SetEpoch(TrainerCallback):
    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        train_dataloader.dataset.epoch = int(state.epoch)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Return the share of correct predictions; for `compute_metrics`."""
    logits = np.asarray(prediction.predictions)
    return {"accuracy": float((logits.argmax(axis=-1) == prediction.label_ids).mean())}


def last_complete_checkpoint(folder: str | Path) -> str | None:
    """Return the newest complete checkpoint of Trainer in a folder, or `None`.

    Trainer writes `trainer_state.json` last. transformers' `get_last_checkpoint` may return a half-written checkpoint.
    """
    paths = sorted(Path(folder).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)
    return next((str(path) for path in paths if _is_complete(path)), None)


def _is_complete(checkpoint: Path) -> bool:
    try:
        return bool(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError):
        return False


def add_lora(model: HFViTForImageClassification, rank: int) -> Any:
    """Freeze a classifier and return it as peft's `PeftModel`, which trains its head and low-rank updates.

    Every linear layer of the blocks, `qkv`, `o_proj`, `fc1`, `fc2` and `gate` of a gated MLP, gets an update of `rank`
    (LoRA, arXiv:2106.09685). The head is trained and saved completely.

    Raises:
        ValueError: If peft is not installed.
    """
    need("lora", "peft")
    from peft import LoraConfig, get_peft_model

    layers: Any = model.base_model.layers
    targets = {name.split(".")[-1] for name, module in layers.named_modules() if isinstance(module, nn.Linear)}
    return get_peft_model(
        model,
        LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(targets), modules_to_save=["classifier"]),
    )
