"""Low-rank updates of linear layers (LoRA, arXiv:2106.09685), for training few parameters of a large encoder.

A layer keeps the names of its weight and bias, and gets two small matrices beside them. `merged` adds these to the
weights, so that what a run saves is a plain model. For adapters in peft's format, see `trainer.add_lora`.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DOWN, UP = "lora_down", "lora_up"


class LowRankLinear(nn.Linear):
    """A frozen linear layer with a trained update of low rank, zero at the start."""

    lora_down: nn.Parameter
    lora_up: nn.Parameter

    def forward(self, states: Tensor) -> Tensor:
        return super().forward(states) + F.linear(F.linear(states, self.lora_down), self.lora_up)


def add_low_rank_updates(model: Any, rank: int) -> Any:
    """Freeze the encoder of a model but for updates of every linear layer of its blocks; a head stays trained."""
    encoder = model.base_model
    encoder.requires_grad_(False)
    for layer in encoder.layers.modules():
        if type(layer) is not nn.Linear:
            continue
        layer.__class__ = LowRankLinear
        layer.register_parameter(DOWN, nn.Parameter(layer.weight.new_empty(rank, layer.in_features)))
        layer.register_parameter(UP, nn.Parameter(layer.weight.new_zeros(layer.out_features, rank)))
        nn.init.kaiming_uniform_(layer.get_parameter(DOWN), a=math.sqrt(5))
    return model


def merge_low_rank_updates(model: Any) -> None:
    """Add the updates to the weights, which turns every layer into a plain linear one again."""
    for layer in model.modules():
        if type(layer) is LowRankLinear:
            with torch.no_grad():
                layer.weight += layer.lora_up @ layer.lora_down
            del layer.lora_down, layer.lora_up
            layer.__class__ = nn.Linear  # type: ignore[assignment]


def merged(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of the plain model, by the names of its parameters."""
    plain = {name: tensor for name, tensor in weights.items() if not name.endswith((DOWN, UP))}
    for name, up in weights.items():
        if name.endswith(UP):
            layer = name.removesuffix(UP)
            plain[f"{layer}weight"] = plain[f"{layer}weight"] + up @ weights[f"{layer}{DOWN}"]
    return plain
