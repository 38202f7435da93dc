"""Checkpoints of torchvision's `VisionTransformer` give what the library computes."""

import numpy as np
import pytest
import torch
from family import assert_rules_give_back, error_of, filled, opened
from PIL import Image
from torch import nn
from torchvision.models import ViT_B_16_Weights
from torchvision.models.vision_transformer import ConvStemConfig, VisionTransformer

from hf_vit.checkpoints import Options, open_checkpoint
from hf_vit.model.positions_hf_vit import resample_position_embeddings

FIELDS = {
    "image_size": 32,
    "patch_size": 8,
    "num_layers": 2,
    "num_heads": 1,
    "hidden_dim": 64,
    "mlp_dim": 96,
    "num_classes": 5,
}


def model(**fields):
    return filled(VisionTransformer(**{**FIELDS, **fields}))


def old(state):
    """Return the names of the MLP before torchvision 0.14, which the published files have."""
    for new, name in ((".mlp.0.", ".mlp.linear_1."), (".mlp.3.", ".mlp.linear_2.")):
        state = {key.replace(new, name): tensor for key, tensor in state.items()}
    return state


@pytest.mark.parametrize("era", [dict, old], ids=["new", "old"])
@pytest.mark.parametrize("representation_size", [None, 48])
def test_logits_are_the_library_s(tmp_path, era, representation_size):
    theirs = model(representation_size=representation_size)
    checkpoint, ours = opened(tmp_path / "vit.pth", era(theirs.state_dict()))
    assert checkpoint.family == "torchvision"
    assert error_of(ours, theirs, 2, 3, 32, 32) < 1e-5
    assert_rules_give_back(checkpoint, era(theirs.state_dict()))


@pytest.mark.parametrize(
    ("name", "heads"),
    [("heads.0", nn.Sequential(nn.Linear(64, 3))), ("heads", nn.Linear(64, 3)), (None, nn.Identity())],
)
def test_heads_that_users_put_on_it(tmp_path, name, heads):
    theirs = model()
    theirs.heads = filled(heads)
    checkpoint, ours = opened(tmp_path / "vit.pth", theirs.state_dict())
    assert error_of(ours, theirs, 2, 3, 32, 32, output="logits" if name else "pooler_output") < 1e-5
    assert checkpoint.config.num_labels == 3 or name is None


def test_another_size_has_resampled_positions(tmp_path):
    state = model().state_dict()
    checkpoint, ours = opened(tmp_path / "vit.pth", state, image_size=(48, 48))
    larger = VisionTransformer(**{**FIELDS, "image_size": 48}).eval()
    prefix, grid = state["encoder.pos_embedding"].split([1, 16], dim=1)
    grid = resample_position_embeddings(grid, (4, 4), (6, 6), "bicubic_antialias")
    larger.load_state_dict({**state, "encoder.pos_embedding": torch.cat([prefix, grid], dim=1)})
    assert checkpoint.config.grid_size == (6, 6)
    assert error_of(ours, larger, 2, 3, 48, 48) < 1e-5


def test_heads_activation_and_preprocessing_are_stated(tmp_path):
    checkpoint, _ = opened(tmp_path / "vit.pth", model().state_dict())
    stated = " ".join(checkpoint.assumed)
    assert "1 head:" in stated and "--hidden-act" in stated and "ImageNet's mean" in stated


def test_the_preprocessing_is_that_of_the_published_weights(tmp_path):
    theirs = ViT_B_16_Weights.IMAGENET1K_V1.transforms()
    state = model(image_size=224, patch_size=112).state_dict()
    torch.save(state, tmp_path / "vit.pth")
    processor = open_checkpoint(tmp_path / "vit.pth", Options()).processor()
    pixels = np.random.default_rng(0).integers(0, 255, (301, 260, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((520, 602), Image.Resampling.BICUBIC)
    ours = torch.as_tensor(processor(image, return_tensors="pt").pixel_values[0])
    torch.testing.assert_close(ours, theirs(image), rtol=0, atol=0.02)


def test_a_convolutional_stem_is_refused(tmp_path):
    stem = [ConvStemConfig(out_channels=8, kernel_size=3, stride=2) for _ in range(3)]
    with pytest.raises(ValueError, match="convolutional stem"):
        opened(tmp_path / "vit.pth", model(conv_stem_configs=stem).state_dict())
