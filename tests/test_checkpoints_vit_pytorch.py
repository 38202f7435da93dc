"""Checkpoints of vit-pytorch give what the library's own models compute: those of today, and of older releases."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from vit_pytorch import deepvit, parallel_vit, simple_vit, vit
from vit_pytorch.cait import CaiT
from vit_pytorch.distill import DistillableViT
from vit_pytorch.learnable_memory_vit import ViT as ViTWithMemory
from vit_pytorch.simple_vit_with_patch_dropout import SimpleViT as SimpleViTWithPatchDropout
from vit_pytorch.simple_vit_with_qk_norm import SimpleViT as SimpleViTWithQKNorm
from vit_pytorch.simple_vit_with_register_tokens import SimpleViT as SimpleViTWithRegisters
from vit_pytorch.vit_detpool import ViTDetPool
from vit_pytorch.vit_for_small_dataset import ViT as ViTForSmallDataset

from hf_vit.checkpoints import Checkpoint, Options, open_checkpoint
from hf_vit.model import model_class

FIELDS = {
    "image_size": 32,
    "patch_size": 8,
    "num_classes": 5,
    "dim": 48,
    "depth": 2,
    "heads": 2,
    "dim_head": 16,
    "mlp_dim": 40,
}


def filled(model: nn.Module) -> nn.Module:
    """Make every tensor random, LayerNorms too, so that none can be swapped or left out unseen."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


@pytest.fixture
def converted(tmp_path):
    """Save a state dict, open it, and return the checkpoint and our model with its weights."""

    def convert(state: dict[str, Tensor], **options) -> tuple[Checkpoint, nn.Module]:
        torch.save(state, tmp_path / "model.pt")
        checkpoint = open_checkpoint(tmp_path / "model.pt", Options(**options))
        ours = model_class(checkpoint.architecture)(checkpoint.config).eval()
        ours.load_state_dict(checkpoint.state_dict(), strict=True)
        return checkpoint, ours

    return convert


def relative_error(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return float((got.detach() - expected).norm() / expected.norm())


# ----------------------------------------------------------------------------------------------- releases of today


@pytest.mark.parametrize(
    ("model_class", "fields", "options"),
    [
        pytest.param(vit.ViT, {}, {}, id="ViT"),
        pytest.param(vit.ViT, {"pool": "mean"}, {}, id="ViT, mean"),
        pytest.param(vit.ViT, {"dim_head": 24}, {}, id="ViT, heads as wide as the model"),
        pytest.param(vit.ViT, {"heads": 1, "dim_head": 48}, {"num_heads": None}, id="ViT, no output projection"),
        pytest.param(vit.ViT, {"image_size": (16, 40)}, {"image_size": (16, 40)}, id="ViT, rectangle"),
        pytest.param(vit.ViT, {"image_size": (16, 64)}, {"image_size": (16, 64)}, id="ViT, rectangle of a square"),
        pytest.param(vit.ViT, {"patch_size": (4, 16)}, {"patch_size": (4, 16), "image_size": (32, 32)}, id="4x16"),
        pytest.param(vit.ViT, {"channels": 1}, {}, id="ViT, grey"),
        pytest.param(vit.ViT, {"channels": 2}, {"patch_size": (8, 8)}, id="ViT, 2 channels"),
        pytest.param(vit.ViT, {"channels": 4}, {"num_channels": 4}, id="ViT, 4 channels"),
        pytest.param(DistillableViT, {}, {}, id="DistillableViT without its token"),
        pytest.param(simple_vit.SimpleViT, {}, {"image_size": (32, 32)}, id="SimpleViT"),
        pytest.param(simple_vit.SimpleViT, {"image_size": (16, 40)}, {"image_size": (16, 40)}, id="SimpleViT, 16x40"),
        pytest.param(
            SimpleViTWithPatchDropout, {"patch_dropout": 0.5}, {"image_size": (32, 32)}, id="SimpleViT, patch dropout"
        ),
    ],
)
def test_logits_are_the_library_s(converted, model_class, fields, options):
    fields = {**FIELDS, **fields}
    theirs = filled(model_class(**fields))
    checkpoint, ours = converted(theirs.state_dict(), **{"num_heads": 2, **options})
    pixel_values = torch.randn(3, fields.get("channels", 3), *checkpoint.config.image_shape)
    with torch.no_grad():
        assert relative_error(ours(pixel_values).logits, theirs(pixel_values)) < 1e-5
    assert checkpoint.family == "vit-pytorch"
    assert checkpoint.config.layer_norm_eps == 1e-5


def test_a_vit_without_classes_is_an_encoder(converted):
    theirs = filled(vit.ViT(**{**FIELDS, "num_classes": 0}))
    checkpoint, ours = converted(theirs.state_dict(), num_heads=2)
    pixel_values = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert relative_error(ours(pixel_values).last_hidden_state, theirs(pixel_values)) < 1e-5
    assert checkpoint.architecture == "HFViTModel"


@pytest.mark.parametrize("pool", ["cls", "mean"])  # the class token of "mean" is empty
def test_safetensors_are_read_too(tmp_path, pool):
    state = filled(vit.ViT(**FIELDS, pool=pool)).state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    torch.save(state, tmp_path / "weights.pth")
    of_safetensors, of_torch = (
        open_checkpoint(tmp_path / name, Options(num_heads=2)).state_dict()
        for name in ("weights.safetensors", "weights.pth")
    )
    torch.testing.assert_close(of_safetensors, of_torch, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------- older releases


def old_state(wrapper: str, has_patch_layernorm: bool, kind: str) -> dict[str, Tensor]:
    """Return a random state dict with names and shapes of an older release.

    Args:
        wrapper: What stood around a layer's halves: `"fn."` (`PreNorm`, 0.10 to 1.2), `"fn.fn."` (`Residual(PreNorm)`,
            0.7 to 0.9), or `""` (`SimpleViT`, whose halves had their LayerNorm inside from the start).
        has_patch_layernorm: From 1.0 on.
        kind: "ViT" or "SimpleViT", until 1.2.
    """
    width, inner, hidden, pixels = 48, 32, 40, 8 * 8 * 3
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, size_out: int, size_in: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (size_out, size_in)
        if bias:
            shapes[f"{name}.bias"] = (size_out,)

    def norm(name: str, size: int) -> None:
        shapes.update({f"{name}.weight": (size,), f"{name}.bias": (size,)})

    if has_patch_layernorm:
        norm("to_patch_embedding.1", pixels)
        norm("to_patch_embedding.3", width)
    linear(f"to_patch_embedding.{2 if has_patch_layernorm else 1}", width, pixels)
    for layer in range(2):
        attention, mlp = (f"transformer.layers.{layer}.{half}." for half in (0, 1))
        before = wrapper.removesuffix("fn.")
        norm(f"{attention}{before}norm", width)
        norm(f"{mlp}{before}norm" if wrapper else f"{mlp}net.0", width)
        linear(f"{attention}{wrapper}to_qkv", 3 * inner, width, bias=False)
        linear(f"{attention}{wrapper}to_out{'.0' if wrapper else ''}", width, inner, bias=bool(wrapper))
        linear(f"{mlp}{wrapper}net.{0 if wrapper else 1}", hidden, width)
        linear(f"{mlp}{wrapper}net.3", width, hidden)
    head = "mlp_head" if kind == "ViT" else "linear_head"
    norm(f"{head}.0", width)
    linear(f"{head}.1", 5, width)
    if kind == "ViT":
        shapes.update(pos_embedding=(1, 17, width), cls_token=(1, 1, width))
    return {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}


def old_logits(state: dict[str, Tensor], wrapper: str, pixel_values: Tensor, pool: str) -> Tensor:
    """Compute what the older releases did, with 2 heads, on a grid of 4x4; without `pos_embedding` it is SimpleViT."""

    def linear(name: str, tokens: Tensor) -> Tensor:
        return F.linear(tokens, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(name: str, tokens: Tensor) -> Tensor:
        return F.layer_norm(tokens, tokens.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    images = pixel_values.unflatten(3, (4, 8)).unflatten(2, (4, 8))  # [B, C, h, p1, w, p2]
    tokens = images.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # [B, (h w), (p1 p2 c)]
    if "to_patch_embedding.2.weight" in state:
        tokens = norm("to_patch_embedding.1", tokens)
        tokens = norm("to_patch_embedding.3", linear("to_patch_embedding.2", tokens))
    else:
        tokens = linear("to_patch_embedding.1", tokens)
    if "pos_embedding" in state:
        tokens = torch.cat([state["cls_token"].expand(len(tokens), -1, -1), tokens], dim=1) + state["pos_embedding"]
    else:
        tokens = tokens + simple_vit.posemb_sincos_2d(4, 4, tokens.shape[-1])
    before = wrapper.removesuffix("fn.")
    for layer in range(2):
        attention, mlp = (f"transformer.layers.{layer}.{half}." for half in (0, 1))
        parts = linear(f"{attention}{wrapper}to_qkv", norm(f"{attention}{before}norm", tokens)).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in parts)  # [B, A, N, d]
        weights = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(dim=-1)
        attended = (weights @ value).transpose(1, 2).flatten(2)
        tokens = tokens + linear(f"{attention}{wrapper}to_out{'.0' if wrapper else ''}", attended)
        hidden = norm(f"{mlp}{before}norm" if wrapper else f"{mlp}net.0", tokens)
        hidden = F.gelu(linear(f"{mlp}{wrapper}net.{0 if wrapper else 1}", hidden))
        tokens = tokens + linear(f"{mlp}{wrapper}net.3", hidden)
    pooled = tokens[:, 0] if pool == "cls" else tokens.mean(dim=1)
    head = "mlp_head" if "pos_embedding" in state else "linear_head"
    return linear(f"{head}.1", norm(f"{head}.0", pooled))


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize(("wrapper", "has_patch_layernorm"), [("fn.fn.", False), ("fn.", False), ("fn.", True)])
def test_older_vits_are_read(converted, wrapper, has_patch_layernorm, pool):
    state = old_state(wrapper, has_patch_layernorm, "ViT")
    checkpoint, ours = converted(state, num_heads=2, pooling={"cls": None, "mean": "mean_all"}[pool])
    pixel_values = torch.randn(3, 3, 32, 32)
    assert relative_error(ours(pixel_values).logits, old_logits(state, wrapper, pixel_values, pool)) < 1e-5
    assert any("--pooling mean_all" in sentence for sentence in checkpoint.assumed) == (pool == "cls")


@pytest.mark.parametrize("has_patch_layernorm", [False, True])
def test_older_simple_vits_are_read(converted, has_patch_layernorm):
    state = old_state("", has_patch_layernorm, "SimpleViT")
    _, ours = converted(state, num_heads=2, image_size=(32, 32))
    pixel_values = torch.randn(3, 3, 32, 32)
    assert relative_error(ours(pixel_values).logits, old_logits(state, "", pixel_values, "mean")) < 1e-5


def test_releases_with_three_dimensional_tokens_leave_the_pooling_open(converted):
    state = filled(vit.ViT(**FIELDS)).state_dict()
    now, _ = converted(state, num_heads=2)
    state.update(cls_token=state["cls_token"][None], pos_embedding=state["pos_embedding"][None])
    before, _ = converted(state, num_heads=2)
    assert [any("--pooling" in sentence for sentence in each.assumed) for each in (now, before)] == [False, True]
    torch.testing.assert_close(now.state_dict(), before.state_dict(), rtol=0, atol=0)


def test_releases_before_0_7_are_refused(converted):
    state = old_state("fn.fn.", False, "ViT")
    for kind in ("weight", "bias"):
        state[f"patch_to_embedding.{kind}"] = state.pop(f"to_patch_embedding.1.{kind}")
    with pytest.raises(ValueError, match=r"before 0\.7"):
        converted(state, num_heads=2)


# ------------------------------------------------------------------------------------------ what the file leaves open


def test_heads_are_assumed_to_be_64_wide(converted):
    theirs = filled(vit.ViT(**{**FIELDS, "heads": 3, "dim_head": 64}))
    checkpoint, ours = converted(theirs.state_dict())
    pixel_values = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert relative_error(ours(pixel_values).logits, theirs(pixel_values)) < 1e-5
    assert checkpoint.config.num_attention_heads == 3
    assert any("--hidden-act" in sentence for sentence in checkpoint.assumed)
    assert any("3 heads" in sentence and "--num-heads" in sentence for sentence in checkpoint.assumed)


def test_what_an_option_says_is_not_assumed(converted):
    state = filled(vit.ViT(**FIELDS)).state_dict()
    checkpoint, _ = converted(state, num_heads=2, pooling="mean", hidden_act="relu", layer_norm_eps=1e-6)
    config = checkpoint.config
    assert (config.pooling, config.hidden_act, config.layer_norm_eps) == ("mean", "relu", 1e-6)
    assert len(checkpoint.assumed) == 1 and "mean and standard deviation" in checkpoint.assumed[0]
    assert list(checkpoint.processor().image_mean) == [0.5] * 3


@pytest.mark.parametrize(
    ("model_class", "fields", "options", "remedy"),
    [
        (vit.ViT, {}, {}, "--num-heads"),  # 32 wide: no multiple of 64
        (vit.ViT, {}, {"num_heads": 3}, "--num-heads"),
        (vit.ViT, {"heads": 1, "dim_head": 48}, {"num_heads": 2}, "--num-heads"),
        (vit.ViT, {"image_size": (16, 40)}, {"num_heads": 2}, "--image-size"),
        (vit.ViT, {"patch_size": (4, 8)}, {"num_heads": 2}, "--patch-size"),
        (vit.ViT, {"channels": 2}, {"num_heads": 2}, "--patch-size"),
        (simple_vit.SimpleViT, {}, {"num_heads": 2}, "--image-size"),
        (
            simple_vit.SimpleViT,
            {},
            {"num_heads": 2, "image_size": (32, 32), "patch_size": (16, 16)},
            "--patch-size",
        ),
    ],
)
def test_what_stays_open_is_an_error_that_names_the_option(converted, model_class, fields, options, remedy):
    state = model_class(**{**FIELDS, **fields}).state_dict()
    with pytest.raises(ValueError, match=rf"model\.pt: .*{remedy}"):
        converted(state, **options)


def test_positions_are_resampled_to_another_size(converted):
    state = filled(vit.ViT(**FIELDS)).state_dict()
    checkpoint, ours = converted(state, num_heads=2, image_size=(48, 64))
    _, unchanged = converted(state, num_heads=2)
    assert checkpoint.config.grid_size == (6, 8)
    pixel_values = torch.randn(2, 3, 48, 64)
    with torch.no_grad():
        assert relative_error(ours(pixel_values).logits, unchanged(pixel_values).logits) < 1e-5


# -------------------------------------------------------------------------------------------------- back, and others


@pytest.mark.parametrize(
    ("state", "options"),
    [
        pytest.param(lambda: vit.ViT(**FIELDS).state_dict(), {}, id="ViT"),
        pytest.param(lambda: simple_vit.SimpleViT(**FIELDS).state_dict(), {"image_size": (32, 32)}, id="SimpleViT"),
        pytest.param(lambda: old_state("fn.", True, "ViT"), {}, id="ViT 1.0"),
        pytest.param(lambda: old_state("fn.fn.", False, "ViT"), {}, id="ViT 0.7"),
    ],
)
def test_rules_give_the_file_back_bit_for_bit(converted, state, options):
    state = state()
    checkpoint, _ = converted(state, num_heads=2, **options)
    ours = checkpoint.state_dict()
    back = {}
    for rule in checkpoint.rules:
        written = rule.layout.write([ours[name] for name in rule.ours])
        back.update(zip(rule.theirs, written, strict=True))
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor), name


@pytest.mark.parametrize(
    ("model_class", "fields"),
    [
        (SimpleViTWithRegisters, {"num_register_tokens": 2}),
        (SimpleViTWithQKNorm, {}),
        (deepvit.DeepViT, {}),
        (parallel_vit.ViT, {}),
        (ViTWithMemory, {}),
        (ViTForSmallDataset, {}),
        (CaiT, {"cls_depth": 1}),
        (ViTDetPool, {}),
    ],
    ids=lambda case: case.__module__ if isinstance(case, type) else "",
)
def test_other_models_of_the_library_are_refused(converted, model_class, fields):
    state = model_class(**{**FIELDS, **fields}).state_dict()
    with pytest.raises(ValueError, match=r"model\.pt: (not a |neither |vit-pytorch |.*: no ViT)"):
        converted(state, num_heads=2, image_size=(32, 32))
