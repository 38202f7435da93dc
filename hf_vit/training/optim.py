"""Optimizers, parameter groups, and learning rate schedules."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

# Weight decay applies to the matrices of these modules, not to biases, norms, tokens, positions and LayerScale.
DECAYED = (nn.Linear, nn.Conv2d)


def parameter_groups(
    model: Any, weight_decay: float = 0.0, layer_decay: float = 1.0, position_lr_scale: float = 1.0
) -> list[dict[str, Any]]:
    """Group the trainable parameters of a model by their optimizer settings.

    Args:
        model: An encoder, or a model that holds one under its `base_model_prefix`. If the encoder has no `embeddings`
            and `layers`, as in other architectures, all parameters have one learning rate.
        weight_decay: Weight decay of matrices.
        layer_decay: Factor on the learning rate per layer, counted from the head (arXiv:2106.08254).
        position_lr_scale: Factor on the learning rate of learned positions.

    Returns:
        Groups with `params`, `weight_decay`, `lr_scale` and `use_fallback`. The `lr` of a group is to be `lr_scale`
        times the learning rate. Muon reads `use_fallback`, which is true for all but the encoder's matrices.
    """
    encoder = getattr(model, model.base_model_prefix, model)
    head, depths, positions = 0, {}, set()
    if hasattr(encoder, "layers"):
        head = len(encoder.layers) + 1
        first = (*encoder.embeddings.parameters(), *encoder.pre_layernorm.parameters())
        depths = {id(parameter): 0 for parameter in first}
        for depth, layer in enumerate(encoder.layers, start=1):
            depths.update((id(parameter), depth) for parameter in layer.parameters())
        positions = {id(parameter) for parameter in encoder.embeddings.position_embeddings.parameters()}
        is_in_layers = encoder.config.position_placement != "input"
        if is_in_layers or encoder.config.position_embedding_type == "relative":  # learn with the head, as in BEiT
            depths.update(dict.fromkeys(positions, head))
    elif (layer_decay, position_lr_scale) != (1.0, 1.0):
        raise ValueError(
            f"{type(model).__name__} has no layers and positions with separate learning rates: set layer_decay and "
            f"position_lr_scale to 1, got {layer_decay} and {position_lr_scale}."
        )
    in_encoder = {id(parameter) for parameter in encoder.parameters()}

    groups: dict[tuple[float, float, bool, bool], dict[str, Any]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            is_matrix = isinstance(module, DECAYED) and name == "weight"
            decay = weight_decay if is_matrix else 0.0
            scale = layer_decay ** (head - depths.get(id(parameter), head))
            scale *= position_lr_scale if id(parameter) in positions else 1.0
            is_fallback = not (is_matrix and id(parameter) in in_encoder)
            settings = {"weight_decay": decay, "lr_scale": scale, "use_fallback": is_fallback}
            is_sharded = isinstance(parameter, DTensor)  # fused optimizers do not mix them with plain tensors
            group = groups.setdefault((decay, scale, is_fallback, is_sharded), {"params": [], **settings})
            group["params"].append(parameter)
    return list(groups.values())


def _timm() -> Any:
    try:
        from timm import optim
    except ImportError as error:
        raise ValueError("Lion, LAMB and Muon need timm: pip install timm.") from error
    return optim


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda groups, lr, betas, momentum: torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True),
    "sgd": lambda groups, lr, betas, momentum: torch.optim.SGD(groups, lr=lr, momentum=momentum),
    "lion": lambda groups, lr, betas, momentum: _timm().Lion(groups, lr=lr, betas=betas),
    # timm's own clipping is off: the loop clips gradients in the same way for every optimizer.
    "lamb": lambda groups, lr, betas, momentum: _timm().Lamb(groups, lr=lr, betas=betas, max_grad_norm=None),
    "muon": lambda groups, lr, betas, momentum: _timm().Muon(groups, lr=lr, betas=betas, momentum=momentum),
}


def build_optimizer(
    name: str,
    groups: list[dict[str, Any]],
    learning_rate: float,
    betas: Iterable[float] = (0.9, 0.999),
    momentum: float = 0.9,
) -> torch.optim.Optimizer:
    """Return an optimizer by name, for groups from `parameter_groups`.

    Args:
        name: `"adamw"`, `"sgd"`, or from timm `"lion"` (arXiv:2302.06675), `"lamb"` (arXiv:1904.00962), which scales
            the step by the norm of decayed parameters only, and `"muon"` (arXiv:2502.16982), which uses AdamW's
            learning rates, and AdamW itself for groups with `use_fallback`.
        groups: Parameter groups, each with `weight_decay`.
        learning_rate: Learning rate of groups with `lr_scale` 1; `Schedule.apply` sets it in every step.
        betas: Decay rates for AdamW, LAMB, Lion (0.9 and 0.99 in its paper), and the AdamW inside Muon.
        momentum: Momentum of SGD and Muon (0.95 in its paper).

    Raises:
        ValueError: If the name is unknown, or the optimizer needs timm, which is not installed.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"Unknown optimizer {name!r}: choose one of {', '.join(OPTIMIZERS)}.")
    return OPTIMIZERS[name](groups, learning_rate, tuple(betas), momentum)


# Each maps the progress after warm-up, 0 to 1, to a factor on the learning rate.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
}


class Schedule:
    """The factor on the learning rate as a function of the step alone, so that it has no state to save.

    Args:
        kind: A key of `SCHEDULES`.
        total_steps: Number of steps of the run.
        warmup_steps: Number of steps in which the factor rises linearly to 1.
        cooldown_steps: Number of final steps in which the factor falls linearly to 0, from its value at their start.

    Example:
        >>> schedule = Schedule("cosine", total_steps=110, warmup_steps=10)
        >>> [round(schedule(step), 2) for step in (0, 9, 10, 60, 110)]
        [0.09, 0.91, 1.0, 0.5, 0.0]
    """

    def __init__(self, kind: str, total_steps: int, warmup_steps: int = 0, cooldown_steps: int = 0) -> None:
        if kind not in SCHEDULES:
            raise ValueError(f"Unknown schedule {kind!r}: choose one of {', '.join(SCHEDULES)}.")
        self.curve = SCHEDULES[kind]
        self.total_steps, self.warmup_steps = total_steps, warmup_steps
        self.cooldown_steps = min(cooldown_steps, total_steps)

    def __call__(self, step: int) -> float:
        """Return the factor at `step`, counted from 0."""
        left = self.total_steps - step
        cooldown = min(1.0, left / self.cooldown_steps) if self.cooldown_steps else 1.0
        if step < self.warmup_steps:
            return cooldown * (step + 1) / (self.warmup_steps + 1)
        on_curve = max(min(step, self.total_steps - self.cooldown_steps), self.warmup_steps)  # fixed during cooldown
        progress = (on_curve - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return cooldown * self.curve(progress)

    def apply(self, optimizer: Any, learning_rate: float, step: int) -> float:
        """Set the learning rate of every group for `step`, and return that of groups with `lr_scale` 1."""
        current = learning_rate * self(step)
        for group in optimizer.param_groups:
            group["lr"] = current * group["lr_scale"]
        return current
