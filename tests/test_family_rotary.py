"""EVA-02, Perception Encoder, RoPE-ViT and BEiT-3 of timm: rotary positions by index, and LayerNorms inside."""

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from family_models import TINY, answers, distance, pixels_of, randomized, resampled, written_back
from timm.layers import RotaryEmbeddingCat
from timm.models._hub import save_for_hf

from hf_vit.checkpoints import Options, Source, open_checkpoint
from hf_vit.checkpoints.files import Stored

EVA02, CLIP, PERCEPTION = "eva02_tiny_patch14_224", "eva02_base_patch16_clip_224", "vit_pe_core_tiny_patch16_384"
APE = "vit_small_patch16_rope_ape_224"

# Architectures, and the family that their bare files are.
MODELS = {
    EVA02: "EVA-02",
    "eva02_base_patch14_224": "EVA-02",
    CLIP: "EVA-02",
    "vit_medium_patch16_rope_reg1_gap_256": "timm's ViT with registers and rotary positions",
    "vit_mediumd_patch16_rope_reg1_gap_256": "timm's ViT with registers and rotary positions",
    "vit_small_patch16_rope_224": "RoPE-ViT",
    APE: "RoPE-ViT with learned positions",
    PERCEPTION: "Perception Encoder",
    "vit_pe_spatial_tiny_patch16_512": "Perception Encoder",
    "vit_pe_lang_large_patch14_448": "Perception Encoder",
    "vit_pe_spatial_gigantic_patch14_448": "Perception Encoder",
    "beit3_base_patch16_224": "BEiT-3",
}
PATTERNS = ("eva02_*", "vit_*_rope_*", "vit_pe_*")
NAMES = [name for pattern in PATTERNS for name in timm.list_models(pattern)]


def foreign(name: str, **arguments: Any) -> Any:
    ratio = {"mlp_ratio": 2} if "gigantic" in name else {}
    return randomized(timm.create_model(name, **{**TINY, **ratio, **arguments}))


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_of_timm_gives_timm_s_outputs_at_every_size(tmp_path: Path, name: str) -> None:
    model = foreign(name)
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.family, checkpoint.assumed, checkpoint.left_out) == ("timm", [], [])
    assert distance(answers(checkpoint, pixels_of((32, 32))), model(pixels_of((32, 32)))) < 1e-5
    for theirs, tensor in written_back(checkpoint).items():
        assert torch.equal(tensor, checkpoint.source.tensors[theirs].read()), theirs
    model.set_input_size((40, 56))
    assert distance(answers(checkpoint, pixels_of((40, 56))), model(pixels_of((40, 56)))) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_a_bare_file(tmp_path: Path, name: str) -> None:
    grid = {"ref_feat_shape": 4} if "_pe_" in name else {}  # assumed to be the grid of the positions
    model = foreign(name, num_classes=0, **grid)
    path = tmp_path / f"{name}.pth"
    torch.save(model.state_dict(), path)
    has_table = "pos_embed" in model.state_dict()
    checkpoint = open_checkpoint(path, Options(num_heads=4, image_size=None if has_table else (32, 32)))
    assert checkpoint.family == MODELS[name]
    assert ("Rotary positions of" in " ".join(checkpoint.assumed)) == (name != "beit3_base_patch16_224")
    assert distance(answers(checkpoint, pixels_of((32, 32))), model(pixels_of((32, 32)))) < 1e-5


def test_eva02_with_the_names_of_its_authors(tmp_path: Path) -> None:
    model, state = foreign(CLIP, patch_size=8), {}
    renamed = {"attn.norm": "attn.inner_attn_ln", "mlp.norm": "mlp.ffn_ln"}
    renamed |= {"mlp.fc1_g": "mlp.w1", "mlp.fc1_x": "mlp.w2", "mlp.fc2": "mlp.w3"}
    renamed |= {"q_proj.bias": "q_bias", "v_proj.bias": "v_bias"}
    for name, tensor in model.state_dict().items():
        for theirs, authors in renamed.items():
            name = name.replace(theirs, authors)
        state[name] = tensor
    state |= {"rope.freqs_cos": torch.ones(16, 12), "blocks.0.attn.rope.freqs_sin": torch.ones(16, 12)}
    torch.save(state, tmp_path / "eva.pt")
    checkpoint = open_checkpoint(tmp_path / "eva.pt", Options(num_heads=4))
    assert len(checkpoint.left_out) == 2
    assert distance(answers(checkpoint, pixels_of((32, 32))), model(pixels_of((32, 32)))) < 1e-5


def test_the_tensors_of_rope_vit_and_deit_3_are_the_same(tmp_path: Path) -> None:
    torch.save(foreign(APE).state_dict(), tmp_path / "model.pth")
    checkpoint = open_checkpoint(tmp_path / "model.pth", Options(num_heads=4))
    assert checkpoint.family == "DeiT III"
    assert "no rotary positions" in " ".join(checkpoint.assumed)


@pytest.mark.parametrize("name", NAMES)
def test_facts_of_an_architecture_are_timm_s(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, depth=1)
    tensors = {name: Stored(tuple(t.shape), t.dtype, lambda: torch.empty(0)) for name, t in model.state_dict().items()}
    described = {"architecture": name, "global_pool": model.global_pool, "pretrained_cfg": model.pretrained_cfg}
    source = Source(name, tensors, described)
    if any(word in name for word in ("enormous", "mixed", "pe_core_gigantic")):
        with pytest.raises(ValueError, match="not a plain ViT"):
            open_checkpoint(source)
        return
    checkpoint, rope = open_checkpoint(source), model.rope
    config, block = checkpoint.config, model.blocks[0]
    assert isinstance(rope, RotaryEmbeddingCat)
    assert checkpoint.assumed == []
    assert (config.rope_theta, config.rope_offset, config.rope_grid and tuple(config.rope_grid)) == (
        rope.temperature,
        rope.grid_offset,
        None if rope.ref_feat_shape is None else tuple(rope.ref_feat_shape),
    )
    assert config.position_embedding_type == ("rotary" if model.pos_embed is None else "learned_rotary")
    assert (config.num_attention_heads, config.layer_norm_eps) == (block.attn.num_heads, block.norm1.eps)
    assert config.pooling == {"avg": "mean", "token": "cls", "map": "attention"}[model.global_pool]
    assert checkpoint.num_parameters == sum(parameter.numel() for parameter in model.parameters()) + sum(
        config.hidden_size * ("q_bias" in name or "q_proj.bias" in name) for name in tensors
    )


def test_arguments_replace_the_facts_of_an_architecture(tmp_path: Path) -> None:
    arguments = {
        "ref_feat_shape": (3, 5),
        "rope_grid_offset": 2.0,
        "rope_temperature": 50.0,
        "rope_grid_indexing": "xy",
    }
    model = foreign(EVA02, **arguments)
    save_for_hf(model, str(tmp_path), model_args=arguments, safe_serialization=True)
    checkpoint = open_checkpoint(tmp_path, Options(num_heads=4))
    assert distance(answers(checkpoint, pixels_of((32, 32))), model(pixels_of((32, 32)))) < 1e-5


def with_the_names_of_its_authors(model: Any) -> dict[str, Any]:
    """Return the state of a Perception Encoder with the names of facebookresearch/perception_models."""
    names = {"patch_embed.proj": "conv1", "norm_pre": "ln_pre", "blocks.": "transformer.resblocks."}
    names |= {r"^norm\.": "ln_post.", r"(?<=\d)\.norm": ".ln_", r"gamma_(\d)": r"ls_\1.gamma"}
    names |= {r"(\d\.attn\.)qkv\.": r"\1in_proj_", r"(\d\.attn\.)proj": r"\1out_proj", "fc1": "c_fc", "fc2": "c_proj"}
    names |= {"attn_pool.latent": "attn_pool.probe", "attn_pool.norm": "attn_pool.layernorm"}
    names |= {"attn_pool.proj": "attn_pool.attn.out_proj", "pos_embed": "positional_embedding"}
    state = {}
    for name, tensor in model.state_dict().items():
        for theirs, authors in names.items():
            name = re.sub(theirs, authors, name)
        state[name] = tensor[0] if name == "positional_embedding" else tensor
    if "cls_token" in state:
        state["class_embedding"] = state.pop("cls_token").flatten()
    for kind in ("weight", "bias"):
        if f"attn_pool.q.{kind}" in state:
            parts = [state.pop(f"attn_pool.{part}.{kind}") for part in ("q", "kv")]
            state[f"attn_pool.attn.in_proj_{kind}"] = torch.cat(parts)
    return {f"visual.{name}": tensor for name, tensor in state.items()} | {"visual.proj": torch.ones(48, 8)}


@pytest.mark.parametrize("name", [name for name in MODELS if "_pe_" in name])
def test_a_perception_encoder_with_the_names_of_its_authors(tmp_path: Path, name: str) -> None:
    model = foreign(name, num_classes=0, ref_feat_shape=4)
    state = with_the_names_of_its_authors(model)
    torch.save(state, tmp_path / "PE.pt")
    checkpoint = open_checkpoint(tmp_path / "PE.pt", Options(num_heads=4))
    assert (checkpoint.family, checkpoint.left_out) == ("Perception Encoder", ["proj"])
    assert distance(answers(checkpoint, pixels_of((32, 32))), model(pixels_of((32, 32)))) < 1e-5
    assert written_back(checkpoint).keys() == {name.removeprefix("visual.") for name in state} - {"proj"}
    # The authors count rows and columns on without scaling, and resample learned positions bilinearly.
    table = resampled(model.pos_embed, (5, 7), "cls_token" in model.state_dict(), size=(5, 7), mode="bilinear")
    model.rope.ref_feat_shape = None
    model.set_input_size((40, 56))
    model.pos_embed = torch.nn.Parameter(table)
    assert distance(answers(checkpoint, pixels_of((40, 56))), model(pixels_of((40, 56)))) < 1e-5
