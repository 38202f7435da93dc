"""Bare files with timm's names: what the tensors determine is read, the rest is stated."""

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from transformers import AutoModelForImageClassification, TimmWrapperConfig

from hf_vit import HFViTForImageClassification
from hf_vit.checkpoints import open_checkpoint
from hf_vit.model import model_class

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1, "num_classes": 5}
ARCHITECTURE, ARGUMENTS = "vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "depth": 1}


@pytest.fixture
def opened(tmp_path):
    """Save the state dict of a model whose tensors are all random, and open it."""

    def open_it(state):
        for tensor in state.values():
            nn.init.normal_(tensor, std=0.2)
        torch.save(state, tmp_path / "model.pth")
        checkpoint = open_checkpoint(tmp_path / "model.pth")
        ours = model_class(checkpoint.architecture)(checkpoint.config).eval()
        ours.load_state_dict(checkpoint.state_dict(), strict=True)
        return checkpoint, ours

    torch.manual_seed(0)
    return open_it


def test_the_epsilon_and_the_pixels_of_clip(opened):
    theirs = VisionTransformer(
        **TINY, pre_norm=True, norm_layer=lambda width, **_: nn.LayerNorm(width, eps=1e-5)
    ).eval()
    checkpoint, ours = opened(theirs.state_dict())
    pixel_values = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = theirs(pixel_values)
        assert (ours(pixel_values).logits - expected).norm() / expected.norm() < 1e-5
    assert checkpoint.config.layer_norm_eps == 1e-5
    assert list(checkpoint.processor().image_mean) == pytest.approx([0.481, 0.458, 0.408], abs=1e-3)
    assert "quick_gelu" in " ".join(checkpoint.assumed)


def test_models_of_videos_are_refused(opened):
    state = VisionTransformer(**TINY).state_dict()
    with pytest.raises(ValueError, match=r"three dimensions, \[2, 8, 8\]: models of videos and volumes"):
        opened({**state, "patch_embed.proj.weight": torch.zeros(64, 3, 2, 8, 8)})


def test_the_wrapper_of_transformers(tmp_path):
    facts = {"input_size": (3, 32, 32), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "architecture": ARCHITECTURE}
    config = TimmWrapperConfig.from_dict(
        {"architecture": ARCHITECTURE, "model_args": ARGUMENTS, "num_classes": 3, "label_names": list("abc")}
        | {"pretrained_cfg": facts}
    )
    theirs = AutoModelForImageClassification.from_config(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = HFViTForImageClassification.from_pretrained(tmp_path).eval()
    pixel_values = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(pixel_values).logits, theirs(pixel_values).logits, rtol=1e-4, atol=1e-5)
    assert ours.config.id2label == {0: "a", 1: "b", 2: "c"}


def test_pre_logits_of_imagenet_21k(opened):
    theirs = VisionTransformer(**TINY).eval()
    pre_logits = nn.Linear(64, 48)
    theirs.head = nn.Linear(48, 5)
    fc = {f"pre_logits.fc.{name}": tensor for name, tensor in pre_logits.state_dict().items()}
    checkpoint, ours = opened({**theirs.state_dict(), **fc})
    pixel_values = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = theirs.head(pre_logits(theirs.forward_features(pixel_values)[:, 0]).tanh())
        assert (ours(pixel_values).logits - expected).norm() / expected.norm() < 1e-5
    assert checkpoint.config.representation_size == 48


def test_one_head_is_singular(opened):
    model = timm.create_model("test_vit")
    checkpoint, _ = opened(model.state_dict())
    assert any(sentence.startswith("1 head:") for sentence in checkpoint.assumed)


def test_grey_images_have_the_average_of_clip_s_pixels(opened):
    theirs = VisionTransformer(**TINY, in_chans=1, pre_norm=True)
    checkpoint, _ = opened(theirs.state_dict())
    assert list(checkpoint.processor().image_mean) == pytest.approx([0.45], abs=0.01)
