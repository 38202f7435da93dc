"""What transformers' Trainer needs to train a Vision Transformer as `hf-vit train` does.

Augmentation and mixing follow from (seed, epoch, image). So a run that resumes from a checkpoint of Trainer continues
exactly, also in the middle of an epoch and with any number of workers.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer, TrainerCallback

from ..data.augmentation import BatchMixer
from ..data.images import TrainingImages, Visit, collate, derive_seed, normalize
from ..evaluation.metrics import results_of
from ..evaluation.results import LabelResults
from ..model.configuration_hf_vit import HFViTConfig
from ..model.losses_hf_vit import classification_loss
from ..model.modeling_hf_vit import HFViTForImageClassification
from ..system.extras import need
from .optim import DECAYED, parameter_groups


class EpochImages(TrainingImages):
    """Training images by index, with another augmentation in every epoch, and a seed for mixing the batch.

    `ViTTrainer` sets `epoch`.
    """

    epoch = 0

    def __getitem__(self, index: int) -> dict[str, Any]:  # type: ignore[override]
        return {**super().__getitem__(Visit(self.epoch, index)), "seed": derive_seed(self.seed, self.epoch, index)}


@dataclass
class Collator:
    """Make a batch of uint8 `pixels`, which `ViTTrainer` normalizes by `processor` on the device.

    Batches of `EpochImages` are mixed by `mixer`. Their labels are soft, `[B, num_labels]`: set
    `problem_type="single_label_classification"` in the config.
    """

    processor: Any
    mixer: BatchMixer

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = collate(examples)
        pixels, labels = batch["pixel_values"], batch["labels"]
        if "seed" not in examples[0]:
            return {"pixels": pixels, "labels": labels}
        seed = examples[0]["seed"]
        # Trainer counts the labels of all accumulated batches before it prepares their inputs, so only the pixels are
        # mixed later.
        _, labels = self.mixer(pixels.to("meta"), labels, torch.Generator().manual_seed(seed))
        return {"pixels": pixels, "labels": labels, "seed": seed}

    def inputs_of(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the inputs of a model for a batch, on its device."""
        pixel_values, labels = normalize(batch["pixels"], self.processor), batch["labels"]
        if "seed" in batch:
            pixel_values, _ = self.mixer(pixel_values, labels, torch.Generator().manual_seed(batch["seed"]))
        return {"pixel_values": pixel_values, "labels": labels}


class ViTTrainer(Trainer):
    """Trainer for `EpochImages` and `Collator`; needs `remove_unused_columns=False` in its arguments.

    Weight decay excludes tokens and positions, too; Trainer itself excludes biases and norms only.

    Args:
        args, kwargs: As for Trainer.
        layer_decay: Factor on the learning rate per layer, counted from the head (arXiv:2106.08254).
        class_weights: Weight of every class in the loss, float32 `[num_labels]`, such as from
            `tasks.weights_of_classes`; equal weights if not given.
    """

    def __init__(
        self, *args: Any, layer_decay: float = 1.0, class_weights: Tensor | None = None, **kwargs: Any
    ) -> None:
        self.layer_decay, self.class_weights = layer_decay, class_weights
        if class_weights is not None:
            kwargs["compute_loss_func"] = self._weighted_loss
        super().__init__(*args, **kwargs)
        self.add_callback(_SetEpoch())

    def _weighted_loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        model: Any = self.model
        logits, weights = outputs.logits, self.class_weights
        weights = weights if weights is None else weights.to(logits.device)
        return classification_loss(labels, logits, model.config, num_items_in_batch, weights)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)  # on the device
        return self.data_collator.inputs_of(inputs) if isinstance(self.data_collator, Collator) else inputs

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, DECAYED)]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        if self.optimizer is None and self.layer_decay != 1:
            model: Any = next((model for model in (*args, *kwargs.values()) if model is not None), self.model)
            kind, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, model)
            groups = parameter_groups(model, self.args.weight_decay, self.layer_decay)
            groups.sort(key=lambda group: -group["lr_scale"])  # Trainer logs the learning rate of the first group
            groups = [{**group, "lr": self.args.learning_rate * group["lr_scale"]} for group in groups]
            self.optimizer_cls_and_kwargs = kind, {**options, "params": groups}
        return super().create_optimizer(*args, **kwargs)


class _SetEpoch(TrainerCallback):
    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        train_dataloader.dataset.epoch = int(state.epoch)


def metrics_of(config: HFViTConfig) -> Callable[[EvalPrediction], dict[str, float]]:
    """Return the function for `compute_metrics`: the metrics of `hf-vit evaluate` for what the labels are.

    Args:
        config: Config of the model. With several labels per image, every evaluation sets its thresholds to those with
            the highest F1 on the evaluation images.
    """

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits, labels = (
            torch.from_numpy(np.asarray(each)) for each in (prediction.predictions, prediction.label_ids)
        )
        results = results_of(logits, labels, config)
        if isinstance(results, LabelResults):
            results.thresholds = config.thresholds = results.best_thresholds()
        return results.metrics()

    return compute_metrics


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
