"""Parameters and FLOPs of a model."""

from copy import deepcopy
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(model: Any) -> tuple[int, int]:
    """Return the numbers of parameters that learn and that are frozen, of the whole model if it is sharded."""
    numbers = {True: 0, False: 0}
    for parameter in model.parameters():
        numbers[parameter.requires_grad] += parameter.numel()
    return numbers[True], numbers[False]


def count_flops(model: Any, model_class: Any) -> tuple[int, int]:
    """Return the FLOPs of one image, in evaluation and in training, forward and backward.

    Args:
        model: Its config says what is computed, its parameters which of them learn. It may be sharded.
        model_class: Of the model before it was.
    """
    config = deepcopy(model.config)
    config._attn_implementation = "eager"  # matrix products one by one, on any device
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
