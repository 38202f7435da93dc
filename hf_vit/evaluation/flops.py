"""Count the parameters and FLOPs of a model."""

from copy import deepcopy
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(model: Any) -> tuple[int, int]:
    """Return the numbers of trainable and frozen parameters, of the complete model if it is sharded."""
    numbers = {True: 0, False: 0}
    for parameter in model.parameters():
        numbers[parameter.requires_grad] += parameter.numel()
    return numbers[True], numbers[False]


def count_flops(model: Any, model_class: Any) -> tuple[int, int]:
    """Return the FLOPs per image of a forward pass, and of a forward and backward pass in training.

    Args:
        model: A model, which may be sharded; parameters without `requires_grad` have no gradient.
        model_class: Class of the model before it was sharded.
    """
    config = deepcopy(model.config)
    config._attn_implementation = "eager"  # countable matrix products on any device
    with torch.device("meta"):
        twin = model_class(config)
        pixels = torch.empty(1, config.num_channels, *config.image_shape)
    for parameter, own in zip(twin.parameters(), model.parameters(), strict=True):
        parameter.requires_grad_(own.requires_grad)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        twin.eval()(pixel_values=pixels)
    with FlopCounterMode(display=False) as training:
        outputs = twin.train()(pixel_values=pixels)
        outputs["predictions" if "predictions" in outputs else "logits"].sum().backward()
    return forward.get_total_flops(), training.get_total_flops()
