"""What the tests of families share: random tensors, a checkpoint of a state dict, errors and the way back."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_vit.checkpoints import Checkpoint, Options, open_checkpoint
from hf_vit.model import model_class

# Sizes of a tiny model, by the names in the configs of transformers.
TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}


def filled(model: nn.Module) -> nn.Module:
    """Make every tensor random, LayerNorms too, so that none can be swapped or left out unseen."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def opened(path: Path, state: dict[str, Any], **options: Any) -> tuple[Checkpoint, nn.Module]:
    """Save a state dict, and return the checkpoint and our model with its weights."""
    torch.save(state, path)
    checkpoint = open_checkpoint(path, Options(**options))
    ours = model_class(checkpoint.architecture)(checkpoint.config).eval()
    ours.load_state_dict(checkpoint.state_dict(), strict=True)
    return checkpoint, ours


@torch.no_grad()
def error_of(ours: nn.Module, theirs: nn.Module, *shape: int, output: str = "logits") -> float:
    """Return the relative L2 distance of an output of ours to that of the original, for noise of a shape."""
    pixel_values = torch.randn(*shape)
    expected, got = theirs(pixel_values), ours(pixel_values)[output]
    assert got.shape == expected.shape
    return float((got - expected).norm() / expected.norm())


def assert_rules_give_back(checkpoint: Checkpoint, state: dict[str, Tensor]) -> None:
    """Assert that the family's rules write the file's tensors bit for bit, except those left out."""
    ours = checkpoint.state_dict()
    back: dict[str, Tensor] = {}
    for rule in checkpoint.rules:
        back.update(zip(rule.theirs, rule.layout.write([ours[name] for name in rule.ours]), strict=True))
    assert back.keys() == state.keys() - set(checkpoint.left_out)
    for name, tensor in back.items():
        assert torch.equal(tensor, state[name]), name
