"""Optimizers: which parameters are treated how, and how the learning rate goes over the steps."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

# What weight decay applies to: matrices of these. Biases, norms, tokens, positions and LayerScale stay free.
DECAYED = (nn.Linear, nn.Conv2d)


def parameter_groups(
    model: Any, weight_decay: float = 0.0, layer_decay: float = 1.0, position_lr_scale: float = 1.0
) -> list[dict[str, Any]]:
    """Sort the trainable parameters of a model with `embeddings` and `layers` by how they are optimized.

    Args:
        model: The encoder, or a head that finds it by `base_model_prefix`.
        weight_decay: Of matrices.
        layer_decay: Factor on the learning rate for each layer further from the head (arXiv:2106.08254).
        position_lr_scale: Factor on the learning rate of learned positions.

    Returns:
        Groups of `params`, `weight_decay` and `lr_scale`; `group_lr` is to be `lr_scale` times the learning rate.
    """
    encoder = getattr(model, model.base_model_prefix, model)
    head = len(encoder.layers) + 1
    before = (*encoder.embeddings.parameters(), *encoder.pre_layernorm.parameters())
    depths = {id(parameter): 0 for parameter in before}
    for depth, layer in enumerate(encoder.layers, start=1):
        depths.update((id(parameter), depth) for parameter in layer.parameters())
    positions = {id(parameter) for parameter in encoder.embeddings.position_embeddings.parameters()}

    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            decay = weight_decay if isinstance(module, DECAYED) and name == "weight" else 0.0
            scale = layer_decay ** (head - depths.get(id(parameter), head))
            scale *= position_lr_scale if id(parameter) in positions else 1.0
            group = groups.setdefault((decay, scale), {"params": [], "weight_decay": decay, "lr_scale": scale})
            group["params"].append(parameter)
    return list(groups.values())


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda groups, lr, betas, momentum: torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True),
    "sgd": lambda groups, lr, betas, momentum: torch.optim.SGD(groups, lr=lr, momentum=momentum),
}


def build_optimizer(
    name: str,
    groups: list[dict[str, Any]],
    learning_rate: float,
    betas: Iterable[float] = (0.9, 0.999),
    momentum: float = 0.9,
) -> torch.optim.Optimizer:
    """Return the optimizer called `name`; `betas` are AdamW's, `momentum` is SGD's."""
    if name not in OPTIMIZERS:
        raise ValueError(f"Unknown optimizer {name!r}: choose one of {', '.join(OPTIMIZERS)}.")
    return OPTIMIZERS[name](groups, learning_rate, tuple(betas), momentum)


# Each maps progress behind the warm-up, 0 to 1, to a factor on the learning rate.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
}


class Schedule:
    """Give the factor on the learning rate as a function of the step alone, so that there is nothing to save.

    Args:
        kind: A key of `SCHEDULES`.
        total_steps: Length of the run.
        warmup_steps: Steps in which the factor rises linearly to 1.
        cooldown_steps: Steps at the end in which it falls linearly to 0, whatever the kind.
    """

    def __init__(self, kind: str, total_steps: int, warmup_steps: int = 0, cooldown_steps: int = 0) -> None:
        if kind not in SCHEDULES:
            raise ValueError(f"Unknown schedule {kind!r}: choose one of {', '.join(SCHEDULES)}.")
        self.curve = SCHEDULES[kind]
        self.total_steps, self.warmup_steps, self.cooldown_steps = total_steps, warmup_steps, cooldown_steps

    def __call__(self, step: int) -> float:
        """Return the factor at `step`, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        factor = self.curve((step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        if self.cooldown_steps:
            factor *= min(1.0, (self.total_steps - step) / self.cooldown_steps)
        return factor

    def apply(self, optimizer: Any, learning_rate: float, step: int) -> float:
        """Set the learning rate of every group for `step`, and return the one of groups with `lr_scale` 1."""
        current = learning_rate * self(step)
        for group in optimizer.param_groups:
            group["lr"] = current * group["lr_scale"]
        return current
