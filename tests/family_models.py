"""Random tiny models of other code, and the distance between their outputs and ours."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_vit.checkpoints import Checkpoint
from hf_vit.model import model_class

TINY: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}


@torch.no_grad()
def randomized(model: nn.Module) -> nn.Module:
    """Put random numbers into every parameter of a model."""
    torch.manual_seed(0)
    for name, parameter in model.eval().named_parameters():
        parameter.normal_(std=0.3)
        if parameter.ndim == 1 and name.endswith("weight"):
            parameter.add_(1)
    return model


def pixels_of(size: tuple[int, int], channels: int = 3) -> Tensor:
    """Return two random images."""
    return torch.randn(2, channels, *size, generator=torch.manual_seed(1))


@torch.no_grad()
def answers(checkpoint: Checkpoint, pixels: Tensor) -> Tensor:
    """Return the logits of a checkpoint, or its pooled output if it has no head."""
    model = model_class(checkpoint.architecture)(checkpoint.config).eval()
    model.load_state_dict(checkpoint.state_dict(), strict=True)
    outputs = model(pixels)
    return outputs.logits if "logits" in outputs else outputs.pooler_output


def distance(actual: Tensor, expected: Tensor) -> float:
    """Return the relative L2 distance."""
    assert actual.shape == expected.shape and expected.norm() > 0.1
    return ((actual - expected).norm() / expected.norm()).item()


def resampled(table: Tensor, grid: tuple[int, int], prefix: int = 1, **how: Any) -> Tensor:
    """Resample positions `[1, P+N, D]` of a square grid by `torch.nn.functional.interpolate`."""
    side = round((table.shape[1] - prefix) ** 0.5)
    cells = table[:, prefix:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    return torch.cat([table[:, :prefix], F.interpolate(cells, **how).flatten(2).transpose(1, 2)], dim=1)


def written_back(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return the tensors of the file, as its rules write them."""
    written: dict[str, Tensor] = {}
    for rule in checkpoint.rules:
        theirs = [checkpoint.source.tensors[name].read() for name in rule.theirs]
        written.update(zip(rule.theirs, rule.layout.write(rule.layout.read(theirs)), strict=True))
    return written
