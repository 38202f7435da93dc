"""timm's checkpoints: the living timm gives the expected logits, pixels, and facts of every architecture."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_data_config
from timm.layers import GluMlp, SwiGLU
from timm.models import deit, vision_transformer, vision_transformer_relpos
from timm.models._hub import save_for_hf
from torch import Tensor, nn
from transformers.activations import ACT2FN

from hf_vit.checkpoints import Checkpoint, Options, Source, open_checkpoint
from hf_vit.checkpoints.families.timm_names import table
from hf_vit.checkpoints.files import Stored
from hf_vit.checkpoints.layouts import rules_of
from hf_vit.model import model_class

TINY: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 4,
    "num_classes": 5,
}
VIT, RELPOS = "vit_base_patch16_224", "vit_relpos_base_patch16_224"
NO_CLASS_TOKEN = {"class_token": False, "global_pool": "avg"}


def foreign(architecture: str = VIT, **arguments: Any) -> nn.Module:
    """Build a tiny model of timm's with random numbers in every tensor; in eval."""
    torch.manual_seed(0)
    model = timm.create_model(architecture, **{**TINY, **arguments}).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3)
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter.add_(1)
    return model


def folder_of(model: nn.Module, path: Path, **config: Any) -> Path:
    """Save as timm pushes to the Hub; `config` goes over its config.json."""
    save_for_hf(model, str(path), safe_serialization=True)
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return path


def bare_file_of(model: nn.Module, path: Path) -> Path:
    file = path / "weights.safetensors"
    save_file(model.state_dict(), file)
    return file


def build(checkpoint: Checkpoint) -> nn.Module:
    model = model_class(checkpoint.architecture)(checkpoint.config).eval()
    model.load_state_dict(checkpoint.state_dict(), strict=True)
    return model


@torch.no_grad()
def error(checkpoint: Checkpoint, expected: nn.Module, size: tuple[int, int] | None = None) -> float:
    """Return the relative distance of the outputs, L2."""
    ours = build(checkpoint)
    config = checkpoint.config
    pixels = torch.randn(3, config.num_channels, *(size or config.image_shape), generator=torch.manual_seed(1))
    outputs = ours(pixels)
    is_classifier = checkpoint.architecture == "HFViTForImageClassification"
    actual = outputs.logits if is_classifier else outputs.pooler_output
    wanted = expected(pixels)
    assert actual.shape == wanted.shape and wanted.norm() > 0.1
    return ((actual - wanted).norm() / wanted.norm()).item()


def assert_written_back(checkpoint: Checkpoint) -> None:
    """Every tensor of the file comes back bit for bit."""
    written: dict[str, Tensor] = {}
    for rule in checkpoint.rules:
        theirs = [checkpoint.source.tensors[name].read() for name in rule.theirs]
        written.update(zip(rule.theirs, rule.layout.write(rule.layout.read(theirs)), strict=True))
    assert written.keys() == checkpoint.source.tensors.keys()
    for name, tensor in written.items():
        assert torch.equal(tensor, checkpoint.source.tensors[name].read()), name


# ------------------------------------------------------------------------------------------ folders as on the Hub

FOLDERS: dict[str, dict[str, Any]] = {
    "token": {},
    "token with fc_norm": {"fc_norm": True},
    "avg with fc_norm": {"global_pool": "avg"},
    "avg without fc_norm": {"global_pool": "avg", "fc_norm": False},
    "no class token": NO_CLASS_TOKEN,
    "no class token, no fc_norm": {**NO_CLASS_TOKEN, "fc_norm": False},
    "no final norm": {"final_norm": False},
    "LayerScale": {"init_values": 1e-5},
    "qk_norm": {"qk_norm": True},
    "registers with positions": {"reg_tokens": 3},
    "registers without positions": {"reg_tokens": 3, "no_embed_class": True},
    "registers alone": {"reg_tokens": 4, **NO_CLASS_TOKEN},
    "registers alone, without positions": {"reg_tokens": 4, "no_embed_class": True, **NO_CLASS_TOKEN},
    "pre_norm": {"pre_norm": True},
    "no positions": {"pos_embed": "none"},
    "no positions nor class token": {"pos_embed": "none", **NO_CLASS_TOKEN},
    "no qkv_bias": {"qkv_bias": False},
    "no proj_bias": {"proj_bias": False},
    "rectangle": {"img_size": (24, 40)},
    "rectangular patches": {"img_size": (24, 40), "patch_size": (8, 4)},
    "one channel": {"in_chans": 1},
    "other heads": {"num_heads": 2},
    "other MLP": {"mlp_ratio": 2.5},
    "dynamic_img_size": {"dynamic_img_size": True},
    "map": {"class_token": False, "global_pool": "map"},
    "map of all tokens": {"reg_tokens": 2, "global_pool": "map", "pool_include_prefix": True},
    "map of patches": {"reg_tokens": 2, "global_pool": "map"},
    "map with fc_norm": {"class_token": False, "global_pool": "map", "fc_norm": True},
    "avg of all tokens": {"global_pool": "avg", "pool_include_prefix": True, "reg_tokens": 2},
    "no head": {"num_classes": 0},
    "no head, avg": {"num_classes": 0, "global_pool": "avg"},
    "gelu_tanh": {"act_layer": "gelu_tanh"},
    "quick_gelu": {"act_layer": "quick_gelu"},
    "relu": {"act_layer": "relu"},
    "layernorm": {"architecture": "vit_base_patch16_clip_224", "norm_layer": "layernorm"},
    "clip": {"architecture": "vit_base_patch16_clip_224"},
    "clip quickgelu": {"architecture": "vit_base_patch16_clip_quickgelu_224"},
    "siglip": {"architecture": "vit_base_patch16_siglip_224"},
    "siglip gelu_tanh": {"architecture": "vit_so400m_patch16_siglip_256"},
    "siglip_gap": {"architecture": "vit_so400m_patch16_siglip_gap_256"},
    "dinov2": {"architecture": "vit_base_patch14_dinov2"},
    "dinov2 giant": {"architecture": "vit_giant_patch14_dinov2"},
    "dinov2 giant with registers": {"architecture": "vit_giant_patch14_reg4_dinov2"},
    "flexivit": {"architecture": "flexivit_small"},
    "radio": {"architecture": "vit_base_patch16_radio_v3"},
    "deit": {"architecture": "deit_base_patch16_224"},
    "deit distilled": {"architecture": "deit_base_distilled_patch16_224"},
    "deit3": {"architecture": "deit3_base_patch16_224"},
    "biases": {"architecture": RELPOS, "rel_pos_type": "bias"},
    "biases of a rectangle": {"architecture": RELPOS, "rel_pos_type": "bias", "img_size": (24, 40)},
    "shared biases": {"architecture": "vit_srelpos_small_patch16_224", "rel_pos_type": "bias"},
    "biases, class token": {"architecture": "vit_relpos_base_patch16_cls_224", "rel_pos_type": "bias"},
    "biases, class token, avg": {"architecture": "vit_relpos_base_patch16_clsgap_224", "rel_pos_type": "bias"},
    "shared biases, class token": {
        "architecture": "vit_relpos_base_patch16_cls_224",
        "rel_pos_type": "bias",
        "shared_rel_pos": True,
    },
}
CONTINUOUS: dict[str, dict[str, Any]] = {
    "mlp": {"architecture": RELPOS},
    "mlp of a rectangle": {"architecture": RELPOS, "img_size": (24, 40)},
    "mlp, qk_norm": {"architecture": RELPOS, "qk_norm": True},
    "mlp, class token": {"architecture": "vit_relpos_base_patch16_cls_224"},
    "mlp, class token, avg": {"architecture": "vit_relpos_base_patch16_clsgap_224"},
    "mlp_swin": {"architecture": RELPOS, "rel_pos_type": "mlp_swin"},
    "mlp_swin of a rectangle": {"architecture": RELPOS, "rel_pos_type": "mlp_swin", "img_size": (24, 40)},
    "shared mlp": {"architecture": "vit_srelpos_small_patch16_224"},
    "shared mlp_swin": {"architecture": "vit_srelpos_small_patch16_224", "rel_pos_type": "mlp_swin"},
}


@pytest.mark.parametrize("arguments", FOLDERS.values(), ids=FOLDERS)
def test_a_folder_gives_timm_s_logits_and_writes_back(tmp_path: Path, arguments: dict[str, Any]) -> None:
    model = foreign(**arguments)
    checkpoint = open_checkpoint(folder_of(model, tmp_path))
    assert checkpoint.family == "timm" and checkpoint.assumed == [] and checkpoint.left_out == []
    assert error(checkpoint, model) < 1e-5
    assert_written_back(checkpoint)


@pytest.mark.parametrize("arguments", CONTINUOUS.values(), ids=CONTINUOUS)
def test_an_mlp_of_offsets_becomes_a_table(tmp_path: Path, arguments: dict[str, Any]) -> None:
    model = foreign(**arguments)
    checkpoint = open_checkpoint(folder_of(model, tmp_path))
    assert checkpoint.assumed == []
    assert error(checkpoint, model) < 1e-5
    (rule,) = (rule for rule in checkpoint.rules if "offsets" in rule.ours[-1])
    with pytest.raises(ValueError, match="cannot become an MLP"):
        rule.layout.write(rule.layout.read([checkpoint.source.tensors[name].read() for name in rule.theirs]))


# ------------------------------------------------------------------------------------------------------ bare files

BARE: dict[str, tuple[dict[str, Any], Options, list[str]]] = {
    # Arguments of timm's, options of ours, and how the sentences about what is assumed begin.
    "token": ({}, Options(num_heads=4), ["hidden_act", "pooling cls", "A square", "layer_norm_eps"]),
    "avg": (
        {"global_pool": "avg"},
        Options(num_heads=4, hidden_act="gelu"),
        ["pooling mean", "A square", "layer_norm"],
    ),
    "fc_norm on the token": (
        {"fc_norm": True},
        Options(num_heads=4, pooling="cls", hidden_act="gelu", layer_norm_eps=1e-6),
        ["A square"],
    ),
    "avg without fc_norm": (
        {"global_pool": "avg", "fc_norm": False},
        Options(num_heads=4, pooling="mean"),
        ["hidden_act", "A square", "layer_norm"],
    ),
    "avg of all tokens": (
        {"global_pool": "avg", "pool_include_prefix": True},
        Options(num_heads=4, pooling="mean_all"),
        ["hidden_act", "A square", "layer_norm"],
    ),
    "map of all tokens": (
        {"global_pool": "map", "pool_include_prefix": True},
        Options(num_heads=4, pooling="attention"),
        ["hidden_act", "A square", "layer_norm"],
    ),
    "map": (
        {"class_token": False, "global_pool": "map"},
        Options(num_heads=4),
        ["hidden_act", "A square", "layer_norm"],
    ),
    "64 a head": (
        {"embed_dim": 128, "num_heads": 2},
        Options(),
        ["2 heads", "hidden_act", "pooling", "A square", "layer_norm"],
    ),
    "heads by qk_norm": ({"qk_norm": True}, Options(), ["hidden_act", "pooling", "A square", "layer_norm"]),
    "no positions": (
        {"pos_embed": "none"},
        Options(num_heads=4, image_size=(32, 32)),
        ["hidden_act", "pooling", "layer_norm"],
    ),
    "rectangle": (
        {"img_size": (24, 40)},
        Options(num_heads=4, image_size=(24, 40)),
        ["hidden_act", "pooling", "layer_norm"],
    ),
    "a grid that could be two": (
        {"img_size": 24, "reg_tokens": 4, "no_embed_class": True},
        Options(num_heads=4, image_size=(24, 24)),
        ["hidden_act", "pooling", "layer_norm"],
    ),
    "clip": (
        {"architecture": "vit_base_patch16_clip_quickgelu_224"},
        Options(num_heads=4, hidden_act="quick_gelu", layer_norm_eps=1e-5),
        ["pooling", "A square"],
    ),
    "SwiGLU": (
        {"mlp_layer": SwiGLU, "act_layer": "silu"},
        Options(num_heads=4, hidden_act="silu"),
        ["pooling", "A square", "layer_norm"],
    ),
    "SwiGLU, map": (
        {"mlp_layer": SwiGLU, "act_layer": "silu", "class_token": False, "global_pool": "map"},
        Options(num_heads=4, hidden_act="silu"),
        ["A square", "layer_norm"],
    ),
    "GluMlp": (
        {"mlp_layer": GluMlp, "act_layer": "sigmoid"},
        Options(num_heads=4, hidden_act="sigmoid", mlp_gate="last"),
        ["pooling", "A square", "layer_norm"],
    ),
    "SwiGLUPacked": (
        {"architecture": "vit_giant_patch14_dinov2"},
        Options(num_heads=4, hidden_act="silu", mlp_gate="first"),
        ["pooling", "A square", "layer_norm"],
    ),
    "deit distilled": (
        {"architecture": "deit_base_distilled_patch16_224"},
        Options(num_heads=4),
        ["hidden_act", "A square", "layer_norm"],
    ),
    "biases": ({"architecture": RELPOS, "rel_pos_type": "bias"}, Options(), ["hidden_act", "A square", "layer_norm"]),
    "biases, class token": (
        {"architecture": "vit_relpos_base_patch16_cls_224", "rel_pos_type": "bias"},
        Options(),
        ["hidden_act", "pooling", "A square", "layer_norm"],
    ),
    "mlp of offsets": ({"architecture": RELPOS}, Options(image_size=(32, 32)), ["hidden_act", "layer_norm"]),
}


@pytest.mark.parametrize(("arguments", "options", "assumed"), BARE.values(), ids=BARE)
def test_a_bare_file_gives_timm_s_logits_and_says_what_is_assumed(
    tmp_path: Path, arguments: dict[str, Any], options: Options, assumed: list[str]
) -> None:
    model = foreign(**arguments)
    checkpoint = open_checkpoint(bare_file_of(model, tmp_path), options)
    assert error(checkpoint, model) < 1e-5
    *said, preprocessing = checkpoint.assumed
    assert len(said) == len(assumed) and preprocessing.startswith("Preprocessing")
    assert all(sentence.startswith(start) for sentence, start in zip(said, assumed, strict=True)), said
    assert all(sentence.endswith(".") for sentence in checkpoint.assumed)
    if arguments.get("architecture") != RELPOS or "rel_pos_type" in arguments:
        assert_written_back(checkpoint)


def test_an_architecture_of_another_name_has_its_defaults_assumed(tmp_path: Path) -> None:
    model = foreign()
    checkpoint = open_checkpoint(folder_of(model, tmp_path, architecture="our_own_vit"))
    assert [sentence.split(" ")[0] for sentence in checkpoint.assumed] == ["hidden_act", "layer_norm_eps"]
    assert error(checkpoint, model) < 1e-5


def test_options_win_over_config_and_name(tmp_path: Path) -> None:
    path = folder_of(foreign("vit_base_patch16_clip_224", global_pool="avg", fc_norm=False), tmp_path)
    options = Options(num_heads=2, pooling="cls", hidden_act="relu", layer_norm_eps=1e-3)
    expected = foreign(
        "vit_base_patch16_clip_224", num_heads=2, act_layer="relu", norm_layer=lambda *a, **k: nn.LayerNorm(*a, **k)
    )
    for module in expected.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-3
    checkpoint = open_checkpoint(path, options)
    assert error(checkpoint, expected) < 1e-5
    assert checkpoint.config.layer_norm_eps == 1e-3


@pytest.mark.parametrize("kind", ["training", "bin", "compiled"])
def test_other_files(tmp_path: Path, kind: str) -> None:
    model = foreign()
    options = Options(num_heads=4)
    if kind == "bin":
        save_for_hf(model, str(tmp_path))
        checkpoint = open_checkpoint(tmp_path)
    else:
        wrapper = "module." if kind == "training" else "_orig_mod."
        state = {f"{wrapper}{name}": tensor for name, tensor in model.state_dict().items()}
        other = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        content = {"state_dict": other, "state_dict_ema": state, "epoch": 3, "arch": VIT}
        torch.save(content, tmp_path / "model_best.pth.tar")
        checkpoint = open_checkpoint(tmp_path / "model_best.pth.tar", options)
    assert error(checkpoint, model) < 1e-5


def test_names_of_deit3_s_authors(tmp_path: Path) -> None:
    model = foreign("deit3_base_patch16_224")
    names = {"ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2"}
    state = {name.replace(name[-9:], names.get(name[-9:], name[-9:])): t for name, t in model.state_dict().items()}
    assert "blocks.0.gamma_1" in state
    torch.save({"model": state}, tmp_path / "deit_3.pth")
    checkpoint = open_checkpoint(tmp_path / "deit_3.pth", Options(num_heads=4))
    assert error(checkpoint, model) < 1e-5
    assert_written_back(checkpoint)


@pytest.mark.parametrize("architecture", ["vit_base_patch14_reg4_dinov2", "vit_giant_patch14_reg4_dinov2"])
def test_names_of_dinov2_s_authors(tmp_path: Path, architecture: str) -> None:
    model = foreign(architecture, num_classes=0)
    state = model.state_dict()
    state["register_tokens"] = state.pop("reg_token")
    state["pos_embed"] = torch.cat([torch.randn(1, 1, 32), state["pos_embed"]], dim=1)
    state["mask_token"] = torch.randn(1, 32)
    if "giant" in architecture:
        names = {"mlp.fc1": "mlp.w12", "mlp.fc2": "mlp.w3"}
        for ours, theirs in names.items():
            state = {name.replace(ours, theirs): tensor for name, tensor in state.items()}
    file = tmp_path / "dinov2_pretrain.pth"
    torch.save(state, file)
    model.load_state_dict(vision_transformer.checkpoint_filter_fn(dict(state), model), strict=True)
    checkpoint = open_checkpoint(file, Options(num_heads=4))
    assert checkpoint.left_out == ["mask_token"]
    assert error(checkpoint, model) < 1e-5
    checkpoint.source.tensors.pop("mask_token")
    assert_written_back(checkpoint)


def test_mae_is_read_without_its_decoder(tmp_path: Path) -> None:
    model = foreign(num_classes=0)
    decoder = {"mask_token": torch.ones(1, 1, 16), "decoder_blocks.0.norm1.weight": torch.ones(16)}
    torch.save({"model": {**model.state_dict(), **decoder}}, tmp_path / "mae.pth")
    checkpoint = open_checkpoint(tmp_path / "mae.pth", Options(num_heads=4))
    assert checkpoint.left_out == sorted(decoder)
    assert error(checkpoint, model) < 1e-5


def test_buffers_of_older_versions_are_left_out(tmp_path: Path) -> None:
    model = foreign(RELPOS)
    buffers = {
        f"{name}.rel_coords_log": module.rel_coords_log
        for name, module in model.named_modules()
        if hasattr(module, "rel_coords_log")
    }
    path = folder_of(model, tmp_path)
    save_file({**model.state_dict(), **buffers}, path / "model.safetensors")
    checkpoint = open_checkpoint(path)
    assert checkpoint.left_out == sorted(buffers)
    assert error(checkpoint, model) < 1e-5


@torch.no_grad()
def test_a_distilled_model_without_heads_keeps_both_tokens(tmp_path: Path) -> None:
    model = foreign("deit_base_distilled_patch16_224", num_classes=0)
    checkpoint = open_checkpoint(folder_of(model, tmp_path))
    assert checkpoint.architecture == "HFViTModel"
    pixels = torch.randn(2, 3, 32, 32)
    cls, distillation = build(checkpoint)(pixels).pooler_output.chunk(2, dim=-1)
    torch.testing.assert_close((cls + distillation) / 2, model(pixels), rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------------------------------------- other sizes


@pytest.mark.parametrize("arguments", [{}, {"no_embed_class": True, "reg_tokens": 2}, {"img_size": (24, 40)}])
@pytest.mark.parametrize("size", [(32, 32), (48, 48), (16, 56)])
def test_another_size_is_resampled_as_timm_does(
    tmp_path: Path, arguments: dict[str, Any], size: tuple[int, int]
) -> None:
    path = folder_of(foreign(dynamic_img_size=True, **arguments), tmp_path)
    checkpoint = open_checkpoint(path)
    assert error(checkpoint, foreign(dynamic_img_size=True, **arguments), size) < 1e-5
    resized = foreign(**arguments)
    resized.set_input_size(size)
    converted = open_checkpoint(path, Options(image_size=size))
    assert converted.config.image_shape == size
    assert error(converted, resized) < 1e-5


@torch.no_grad()
def test_pixels_beyond_the_last_patch_are_left_out_and_it_is_said(tmp_path: Path) -> None:
    model = foreign(img_size=37)
    checkpoint = open_checkpoint(folder_of(model, tmp_path))
    assert checkpoint.config.image_shape == (32, 32)
    (sentence,) = checkpoint.assumed
    assert sentence.startswith("Images are resized to 32x32: timm resizes to 37x37")
    pixels = torch.randn(2, 3, 37, 37)
    torch.testing.assert_close(build(checkpoint)(pixels[..., :32, :32]).logits, model(pixels), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["mlp", "mlp_swin"])
def test_an_mlp_of_offsets_is_evaluated_on_another_size(tmp_path: Path, kind: str) -> None:
    path = folder_of(foreign(RELPOS, rel_pos_type=kind), tmp_path)
    resized = foreign(RELPOS, rel_pos_type=kind)
    resized.set_input_size((48, 16))
    assert error(open_checkpoint(path, Options(image_size=(48, 16))), resized) < 1e-5


# ------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize(
    "arguments",
    [arguments for name, arguments in FOLDERS.items() if "shared" not in name and "giant" not in name]
    + [{"mlp_layer": SwiGLU, "act_layer": "silu"}],
)
def test_the_table_alone_writes_what_timm_loads(tmp_path: Path, arguments: dict[str, Any]) -> None:
    """Without a file that says which names it has, the first ones of the table are today's."""
    model = foreign(**arguments)
    options = (
        Options(num_heads=model.blocks[0].attn.num_heads, hidden_act="silu") if "mlp_layer" in arguments else None
    )
    path = bare_file_of(model, tmp_path) if options else folder_of(model, tmp_path)
    checkpoint = open_checkpoint(path, options)
    state, written = checkpoint.state_dict(), {}
    for rule in rules_of(table(checkpoint.config), checkpoint.config, state):
        written.update(zip(rule.theirs, rule.layout.write([state[name] for name in rule.ours]), strict=True))
    model.load_state_dict(written, strict=True)
    stored = load_file(path if path.is_file() else path / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in stored.items())


def test_layers_that_differ_are_no_shared_table(tmp_path: Path) -> None:
    model = foreign("vit_srelpos_small_patch16_224", rel_pos_type="bias")
    checkpoint = open_checkpoint(folder_of(model, tmp_path))
    (rule,) = (rule for rule in checkpoint.rules if "offsets" in rule.ours[-1])
    state = checkpoint.state_dict()
    with pytest.raises(ValueError, match="cannot be stored as one shared table"):
        rule.layout.write([state[name] + torch.arange(2.0).view(2, 1, 1, 1) for name in rule.ours])


# ----------------------------------------------------------------------------------------- facts of architectures

MODULES = (vision_transformer, deit, vision_transformer_relpos)
ARCHITECTURES = [name for module in MODULES for name in timm.list_models(module=module.__name__.rpartition(".")[2])]


def on_meta(architecture: str, **arguments: Any) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(architecture, **{"num_classes": 7, **arguments})


def source_of(model: nn.Module, architecture: str) -> Source:
    """Describe a checkpoint of a model without numbers, as timm's config.json does."""
    tensors = {name: Stored(tuple(t.shape), t.dtype, lambda: torch.empty(0)) for name, t in model.state_dict().items()}
    config = {"architecture": architecture, "pretrained_cfg": {"input_size": model.pretrained_cfg["input_size"]}}
    return Source(architecture, tensors, config)


def is_plain(model: nn.Module) -> bool:
    """Say from timm's own classes whether our model can be equal."""
    block = model.blocks[0]
    if type(block) not in (vision_transformer.Block, vision_transformer_relpos.RelPosBlock):
        return False
    norms = [block.norm1, getattr(model.patch_embed, "norm", nn.Identity())]
    return type(block.attn) in (vision_transformer.Attention, vision_transformer_relpos.RelPosAttention) and all(
        isinstance(norm, nn.LayerNorm | nn.Identity) for norm in norms
    )


def pooling_of(model: nn.Module) -> str:
    if hasattr(model, "dist_token"):
        return "cls_and_distillation"
    includes_prefix = getattr(model, "pool_include_prefix", False)
    mean = "mean_all" if includes_prefix else "mean"
    attention = "attention" if includes_prefix or not model.num_prefix_tokens else "attention_patches"
    return {"token": "cls", "map": attention, "avg": mean}[model.global_pool]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_facts_of_an_architecture_are_timm_s(architecture: str) -> None:
    model = on_meta(architecture, depth=1)
    source = source_of(model, architecture)
    if not is_plain(model):
        with pytest.raises(ValueError, match=architecture):
            open_checkpoint(source)
        return
    checkpoint = open_checkpoint(source)
    config, block = checkpoint.config, model.blocks[0]
    height, width = model.patch_embed.img_size
    assert config.image_shape == (height // config.patch_shape[0] * config.patch_shape[0],) * 2
    assert len(checkpoint.assumed) == ((height, width) != config.image_shape)
    assert {config.layer_norm_eps} == {norm.eps for norm in model.modules() if isinstance(norm, nn.LayerNorm)}
    assert config.num_attention_heads == block.attn.num_heads
    assert config.pooling == pooling_of(model)
    assert config.num_prefix_tokens == model.num_prefix_tokens
    kinds = {"tokens": model.norm, "pooled": model.fc_norm}
    assert [kind for kind, norm in kinds.items() if isinstance(norm, nn.LayerNorm)] == (
        [] if config.final_layernorm == "none" else [config.final_layernorm]
    )
    values = torch.linspace(-5, 5, 1001)
    activations = [block.mlp.act] + ([model.attn_pool.mlp.act] if config.pooling == "attention" else [])
    for activation in activations:
        torch.testing.assert_close(ACT2FN[config.hidden_act](values), activation(values))
    assert config.use_gated_mlp == (not isinstance(block.mlp, vision_transformer.Mlp))
    if isinstance(block.mlp, GluMlp):
        (rule,) = (rule for rule in checkpoint.rules if rule.theirs == ("blocks.0.mlp.fc1.weight",))
        halves = rule.layout.read([torch.arange(2.0)])
        assert rule.ours[0].endswith("gate.weight") and halves[0] == (1 if block.mlp.gate_last else 0)
    if config.position_embedding_type != "relative":
        assert checkpoint.num_parameters == sum(parameter.numel() for parameter in model.parameters())


# Of timm's other files: those whose tensors resemble a plain ViT's most.
STRANGERS = [
    "vit_small_patch16_rope_mixed_224",
    "vit_base_patch16_sapiens2",
    "samvit_base_patch16",
    "naflexvit_base_patch16_gap",
    "vit_tiny_r_s16_p8_224",
    "vit_base_mci_224",
    "qwen3_vit_88m_enc",
    "cait_xxs24_224",
    "xcit_nano_12_p16_224",
    "hiera_tiny_224",
    "swin_tiny_patch4_window7_224",
    "resnet18",
]


@pytest.mark.parametrize("architecture", STRANGERS)
def test_other_architectures_are_refused(architecture: str) -> None:
    with pytest.raises(ValueError, match=architecture):
        open_checkpoint(source_of(on_meta(architecture), architecture))


@pytest.mark.parametrize(
    ("architecture", "culprit"),
    [
        ("vit_base_patch16_xp_224", "blocks.0"),
        ("vit_small_patch16_18x2_224", "blocks.0"),
        ("vit_dwee_patch16_reg1_gap_256", "lambda_"),
        ("vit_dpwee_patch16_reg1_gap_256", "blocks.0"),
        ("test_vit4", "norm1.bias"),
        ("aimv2_large_patch14_224", "norm1.bias"),
        ("vit_small_patch16_rope_mixed_ape_224", "rope.freqs"),
        ("vit_tiny_r_s16_p8_224", "patch_embed.backbone"),
        ("naflexvit_base_patch16_gap", "embeds"),
        ("samvit_base_patch16", "pos_embed"),
    ],
)
def test_a_bare_file_of_another_architecture_names_its_tensors(architecture: str, culprit: str) -> None:
    source = source_of(on_meta(architecture), architecture)
    source.config.clear()
    with pytest.raises(ValueError, match=culprit):
        open_checkpoint(source, Options(num_heads=2, hidden_act="gelu", mlp_gate="first"))


# -------------------------------------------------------------------------------------------------------- errors

REFUSED: dict[str, tuple[dict[str, Any], Options, str]] = {
    "width": ({}, Options(), "--num-heads"),
    "heads that do not divide": ({}, Options(num_heads=5), "--num-heads"),
    "grid": ({"img_size": (24, 48)}, Options(num_heads=4), "--image-size"),
    "two grids": ({"img_size": 24, "reg_tokens": 4, "no_embed_class": True}, Options(num_heads=4), "3x3 or 2x2"),
    "no positions": ({"pos_embed": "none"}, Options(num_heads=4), "--image-size"),
    "mlp of offsets": ({"architecture": RELPOS}, Options(), "--image-size"),
    "SwiGLU": ({"mlp_layer": SwiGLU}, Options(num_heads=4), "--hidden-act"),
    "GluMlp": ({"mlp_layer": GluMlp}, Options(num_heads=4), "--hidden-act"),
    "gate": ({"mlp_layer": GluMlp}, Options(num_heads=4, hidden_act="silu"), "--mlp-gate"),
}


@pytest.mark.parametrize(("arguments", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_a_bare_file_asks_for_what_it_does_not_say(
    tmp_path: Path, arguments: dict[str, Any], options: Options, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        open_checkpoint(bare_file_of(foreign(**arguments), tmp_path), options)


@pytest.mark.parametrize("pooling", ["max", "avgmax", "prr"])
def test_other_poolings_are_refused(tmp_path: Path, pooling: str) -> None:
    with pytest.raises(ValueError, match=f"global_pool='{pooling}'"):
        open_checkpoint(folder_of(foreign(global_pool=pooling), tmp_path))


def test_missing_and_left_over_tensors_are_named(tmp_path: Path) -> None:
    path = folder_of(foreign(), tmp_path)
    state = foreign().state_dict()
    save_file({**state, "blocks.1.attn.lora": torch.ones(1)}, path / "model.safetensors")
    with pytest.raises(ValueError, match=r"no place .*blocks\.1\.attn\.lora"):
        open_checkpoint(path)
    del state["blocks.1.norm2.bias"]
    save_file(state, path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing: .*blocks\.1\.norm2\.bias"):
        open_checkpoint(path)


def test_a_name_that_is_not_known_asks_for_its_option(tmp_path: Path) -> None:
    path = folder_of(foreign(), tmp_path)
    config = json.loads((path / "config.json").read_text())
    for arguments, option in (
        ({"num_heads": 4, "norm_layer": "layernorm2d"}, "--layer-norm-eps"),
        ({"num_heads": 4, "act_layer": "strange"}, "--hidden-act"),
        ({"embed_dim": 32}, "--num-heads"),
    ):
        (path / "config.json").write_text(json.dumps({**config, "model_args": arguments}))
        with pytest.raises(ValueError, match=option):
            open_checkpoint(path)


# --------------------------------------------------------------------------------------- labels and preprocessing


def test_labels(tmp_path: Path) -> None:
    names = ["n01440764", "n01443537", "n01484850", "n01491361", "n01494475"]
    model = foreign()
    for stored in (names, dict(enumerate(names))):
        checkpoint = open_checkpoint(folder_of(model, tmp_path, label_names=stored))
        assert checkpoint.config.id2label == dict(enumerate(names))
        assert checkpoint.config.label2id["n01484850"] == 2
    other = open_checkpoint(folder_of(model, tmp_path, label_names=names[:3]))
    assert other.config.num_labels == 5 and other.config.id2label[0] == "LABEL_0"


PREPROCESSING: dict[str, dict[str, Any]] = {
    "augreg": {},
    "deit": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
    "full": {"crop_pct": 1.0, "interpolation": "bilinear"},
    "rectangle": {"input_size": [3, 48, 80], "crop_pct": 0.875},
    "squash": {"crop_mode": "squash", "crop_pct": 1.0},
    "squash and crop": {"crop_mode": "squash", "crop_pct": 0.8},
    "lanczos": {"interpolation": "lanczos"},
    "box": {"interpolation": "box"},
    "mean of zeros": {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]},
}


@pytest.mark.parametrize("is_flat", [False, True])
@pytest.mark.parametrize("changes", PREPROCESSING.values(), ids=PREPROCESSING)
def test_the_processor_is_timm_s_transform(tmp_path: Path, changes: dict[str, Any], is_flat: bool) -> None:
    size = changes.get("input_size", [3, 64, 64])[1:]
    model = foreign(img_size=tuple(size))
    path = folder_of(model, tmp_path)
    config = json.loads((path / "config.json").read_text())
    config["pretrained_cfg"].update(changes)
    preprocessing = config["pretrained_cfg"]
    if is_flat:
        config = {**config, **config.pop("pretrained_cfg")}
    (path / "config.json").write_text(json.dumps(config))
    transform = create_transform(**resolve_data_config(pretrained_cfg=preprocessing))
    checkpoint = open_checkpoint(path)
    assert checkpoint.assumed == []
    # Where columns shrink most, so that every version of Pillow resizes them first, as the processor does.
    for shape in [(150, 210), (81, 97), (50, 40)]:
        pixels = np.random.default_rng(0).integers(0, 256, size=(*shape, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        actual = checkpoint.processor()(image, return_tensors="pt").pixel_values[0]
        torch.testing.assert_close(actual, transform(image), atol=1e-6, rtol=0)


def test_one_channel_takes_the_luma(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(folder_of(foreign(in_chans=1), tmp_path))
    pixels = np.random.default_rng(0).integers(0, 256, size=(40, 50, 3), dtype=np.uint8)
    processor = checkpoint.processor()
    assert processor(Image.fromarray(pixels), return_tensors="pt").pixel_values.shape == (1, 1, 32, 32)


def test_a_border_is_said(tmp_path: Path) -> None:
    path = folder_of(foreign(), tmp_path)
    config = json.loads((path / "config.json").read_text())
    config["pretrained_cfg"]["crop_mode"] = "border"
    (path / "config.json").write_text(json.dumps(config))
    assert ["border" in sentence for sentence in open_checkpoint(path).assumed] == [True]
