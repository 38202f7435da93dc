"""BEiT, data2vec-vision, EVA giant and DINOv3, with the names of timm, of their authors and of transformers."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from family_models import TINY, answers, distance, pixels_of, randomized, written_back
from safetensors.torch import save_file
from scipy.interpolate import RectBivariateSpline
from timm.layers import resize_rel_pos_bias_table
from timm.models._hub import save_for_hf
from timm.models.beit import checkpoint_filter_fn
from torch import Tensor, nn

from hf_vit.checkpoints import Options, Source, open_checkpoint
from hf_vit.checkpoints.files import Stored
from hf_vit.model.positions_hf_vit import resample_table

BEIT, EVA, DINOV3 = "beit_base_patch16_224", "eva_giant_patch14_224", "vit_small_patch16_dinov3_qkvb"
SWIGLU = "vit_small_plus_patch16_dinov3_qkvb"
OF_ALL = {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}

PATTERNS = ("*dinov3*", "beit_*", "beitv2_*", "eva_giant*")
NAMES = [name for pattern in PATTERNS for name in timm.list_models(pattern)]

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "BEiT": (BEIT, {}),
    "BEiT, class token": (BEIT, {"global_pool": "token"}),
    "BEiT without head": (BEIT, {"num_classes": 0}),
    "BEiT, positions of all layers": (BEIT, OF_ALL),
    "BEiT, positions of all layers and of each": (BEIT, {"use_shared_rel_pos_bias": True}),
    "BEiT of a rectangle": (BEIT, {"img_size": (24, 40)}),
    "EVA giant": (EVA, {}),
    "DINOv3": (DINOV3, {}),
    "DINOv3 of class token": (DINOV3, {"global_pool": "token"}),
    "DINOv3 without biases": ("vit_small_patch16_dinov3", {}),
    "DINOv3, SwiGLU": (SWIGLU, {"swiglu_align_to": 8}),
}


def foreign(name: str, **arguments: Any) -> Any:
    return randomized(timm.create_model(name, **{**TINY, **arguments}))


@pytest.mark.parametrize(("name", "arguments"), MODELS.values(), ids=MODELS)
def test_a_folder_of_timm_gives_timm_s_logits(tmp_path: Path, name: str, arguments: dict[str, Any]) -> None:
    model = foreign(name, **arguments)
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.family, checkpoint.assumed, checkpoint.left_out) == ("timm", [], [])
    pixels = pixels_of(checkpoint.config.image_shape)
    assert distance(answers(checkpoint, pixels), model(pixels)) < 1e-5
    is_sum = arguments == {"use_shared_rel_pos_bias": True}
    for theirs, tensor in written_back(checkpoint).items():
        if not (is_sum and "relative_position" in theirs):
            assert torch.equal(tensor, checkpoint.source.tensors[theirs].read()), theirs


@pytest.mark.parametrize("size", [(32, 32), (40, 56)])
def test_dinov3_has_rotary_positions_at_every_size(size: tuple[int, int]) -> None:
    model = foreign(DINOV3, num_classes=0, global_pool="token", dynamic_img_size=True)
    checkpoint = open_checkpoint(saved_as_its_authors(model), Options())
    assert distance(answers(checkpoint, pixels_of(size)), model(pixels_of(size))) < 1e-5


def saved_as_its_authors(model: nn.Module, key_bias: float = 7.0, dtype: torch.dtype = torch.float32) -> Source:
    """Return a source with the names of github.com/facebookresearch/dinov3, and biases of keys that a mask hides."""
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        gated = {"mlp.fc1_g": "mlp.w1", "mlp.fc1_x": "mlp.w2", "mlp.fc2": "mlp.w3"}
        is_gated = "blocks.0.mlp.fc1_g.weight" in model.state_dict()
        for ours, theirs in {"reg_token": "storage_tokens", **(gated if is_gated else {})}.items():
            name = name.replace(ours, theirs)
        state[re.sub(r"gamma_(\d)", r"ls\1.gamma", name)] = tensor
    for layer in range(TINY["depth"]):
        query, value = (state.pop(f"blocks.{layer}.attn.{part}_bias") for part in "qv")
        key = torch.full_like(query, key_bias)
        state[f"blocks.{layer}.attn.qkv.bias"] = torch.cat([query, key, value])
        state[f"blocks.{layer}.attn.qkv.bias_mask"] = torch.ones(3 * len(query))
    head_dim = TINY["embed_dim"] // TINY["num_heads"]
    state["rope_embed.periods"] = (100 ** (torch.arange(head_dim // 4) / (head_dim // 4))).to(dtype)
    state["mask_token"] = torch.ones(1, TINY["embed_dim"])
    state["local_cls_norm.weight"] = torch.ones(TINY["embed_dim"])
    tensors = {name: Stored(tuple(t.shape), t.dtype, lambda t=t: t) for name, t in state.items()}
    return Source("dinov3.pth", tensors)


@pytest.mark.parametrize(("name", "dtype"), [(DINOV3, torch.float32), (SWIGLU, torch.bfloat16)])
def test_dinov3_with_the_names_of_its_authors(name: str, dtype: torch.dtype) -> None:
    aligned = {"swiglu_align_to": 8} if name == SWIGLU else {}
    model = foreign(name, num_classes=0, global_pool="token", **aligned)
    checkpoint = open_checkpoint(saved_as_its_authors(model, dtype=dtype))
    assert checkpoint.family == "DINOv3"
    assert {"rope_embed.periods", "local_cls_norm.weight", "mask_token"} <= set(checkpoint.left_out)
    assert any(sentence.startswith("rope_theta 100") for sentence in checkpoint.assumed) == (dtype != torch.float32)
    assert distance(answers(checkpoint, pixels_of((32, 32))), model(pixels_of((32, 32)))) < 1e-5
    assert checkpoint.config.image_shape == (224, 224)
    processor = checkpoint.processor()
    assert (processor.image_mean[0], processor.resample, processor.crop_pct) == (0.485, 2, None)


def test_dinov3_of_other_wavelengths() -> None:
    source = saved_as_its_authors(foreign(DINOV3, num_classes=0, global_pool="token"))
    stored = source.tensors["rope_embed.periods"]
    source.tensors["rope_embed.periods"] = stored._replace(read=lambda: 50 ** (torch.arange(3) / 3))
    assert open_checkpoint(source).config.rope_theta == pytest.approx(50)
    source.tensors["rope_embed.periods"] = stored._replace(read=lambda: torch.tensor([1.0, 2.0, 3.0]))
    with pytest.raises(ValueError, match="not powers of one base"):
        open_checkpoint(source)


@pytest.mark.parametrize(("name", "family"), [(BEIT, "BEiT"), (DINOV3, "DINOv3")])
def test_bare_files(tmp_path: Path, name: str, family: str) -> None:
    model = foreign(name, **({"num_classes": 0} if family == "DINOv3" else {}))
    extra = {"lm_head.weight": torch.ones(4, 48), "mask_token": torch.ones(1, 1, 48)} if family == "BEiT" else {}
    torch.save({**model.state_dict(), **extra}, tmp_path / "bare.pth")
    options = Options(num_heads=4, pooling="mean", image_size=(32, 32) if family == "DINOv3" else None)
    checkpoint = open_checkpoint(tmp_path / "bare.pth", options)
    assert checkpoint.family == family
    assert any(sentence.startswith(f"Preprocessing of {family}") for sentence in checkpoint.assumed)
    assert distance(answers(checkpoint, pixels_of((32, 32))), model(pixels_of((32, 32)))) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_facts_of_an_architecture_are_timm_s(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, depth=1)
    tensors = {name: Stored(tuple(t.shape), t.dtype, lambda: torch.empty(0)) for name, t in model.state_dict().items()}
    checkpoint = open_checkpoint(Source(name, tensors, {"architecture": name, "pretrained_cfg": model.pretrained_cfg}))
    config = checkpoint.config
    assert checkpoint.assumed == []
    assert config.num_attention_heads == model.blocks[0].attn.num_heads
    assert config.layer_norm_eps == model.blocks[0].norm1.eps
    assert config.image_shape == model.patch_embed.img_size
    assert config.pooling == {"avg": "mean", "token": "cls"}[model.global_pool]


# --------------------------------------------------------------------------------------------------- transformers

HF: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 5,
}
RELATIVE = {"use_relative_position_bias": True}
OF_TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "BEiT": ("Beit", RELATIVE),
    "BEiT, class token": ("Beit", {**RELATIVE, "use_mean_pooling": False}),
    "BEiT, positions of all layers": ("Beit", {"use_shared_relative_position_bias": True}),
    "BEiT, both": ("Beit", {**RELATIVE, "use_shared_relative_position_bias": True}),
    "BEiT, learned": ("Beit", {"use_absolute_position_embeddings": True, "layer_scale_init_value": 0.0}),
    "data2vec": ("Data2VecVision", {**RELATIVE, "layer_norm_eps": 1e-6, "hidden_act": "relu"}),
    "I-JEPA": ("IJepa", {}),
}


@pytest.mark.parametrize("has_new_names", [False, True])
@pytest.mark.parametrize(("name", "arguments"), OF_TRANSFORMERS.values(), ids=OF_TRANSFORMERS)
def test_a_folder_of_transformers(tmp_path: Path, name: str, arguments: dict[str, Any], has_new_names: bool) -> None:
    config = getattr(transformers, f"{name}Config")(**HF, **arguments)
    model = randomized(getattr(transformers, f"{name}ForImageClassification")(config))
    model.save_pretrained(tmp_path)
    if has_new_names:
        save_file(model.state_dict(), tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.family, checkpoint.assumed) == ("transformers", [])
    assert distance(answers(checkpoint, pixels_of((32, 32))), model(pixels_of((32, 32))).logits) < 1e-5
    larger = {"interpolate_pos_encoding": True} if name == "IJepa" else {}
    if name != "Data2VecVision":  # its own code interpolates a table of the wrong size there
        assert distance(answers(checkpoint, pixels_of((40, 40))), model(pixels_of((40, 40)), **larger).logits) < 1e-5
    if arguments != {**RELATIVE, "use_shared_relative_position_bias": True}:
        for theirs, tensor in written_back(checkpoint).items():
            assert torch.equal(tensor, checkpoint.source.tensors[theirs].read()), theirs


def test_encoders_and_pre_training_of_beit(tmp_path: Path) -> None:
    config = transformers.BeitConfig(**HF, **RELATIVE, use_mask_token=True)
    model = randomized(transformers.BeitForMaskedImageModeling(config))
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert {name.rpartition(".")[2] for name in checkpoint.left_out} == {"weight", "bias", "mask_token"}
    with torch.no_grad():
        expected = model.layernorm(model.beit(pixels_of((32, 32))).last_hidden_state)[:, 1:].mean(1)
    assert distance(answers(checkpoint, pixels_of((32, 32))), expected) < 1e-5
    with pytest.raises(ValueError, match="only one kind"):
        both = {**RELATIVE, "use_absolute_position_embeddings": True}
        transformers.BeitModel(transformers.BeitConfig(**HF, **both)).save_pretrained(tmp_path)
        open_checkpoint(tmp_path)


# Warnings about timm's interpolation
OF_TIMM = pytest.mark.filterwarnings("ignore:torch.searchsorted.*contiguous", "ignore:Using a non-tuple sequence")


def enlarged(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return what scipy's spline makes of a table `[2h-1, 2w-1, A]`, as interp2d did in the code of BEiT's authors."""
    axes = [geometric_offsets(size // 2, new - 1) for size, new in zip(table.shape, grid, strict=False)]
    targets = [np.arange(1 - new, new).clip(axis[0], axis[-1]) for axis, new in zip(axes, grid, strict=True)]
    splines = [RectBivariateSpline(*axes, part.numpy(), s=0) for part in table.double().unbind(2)]
    return torch.stack([torch.from_numpy(spline(*targets)) for spline in splines], dim=2)


def geometric_offsets(number: int, largest: int) -> np.ndarray:
    """Return the offsets at which BEiT's code places the entries of a table, found by its bisection."""
    left, right = 1.01, 1.5
    while right - left > 1e-6:
        ratio = (left + right) / 2
        left, right = (left, ratio) if (1 - ratio**number) / (1 - ratio) > largest else (ratio, right)
    side = [sum(ratio**power for power in range(steps)) for steps in range(1, number + 1)]
    return np.array([*(-offset for offset in reversed(side)), 0, *side])


@OF_TIMM
@pytest.mark.parametrize("grid", [(16, 16), (24, 24), (9, 9), (3, 3), (20, 11), (14, 24), (1, 7), (90, 14)])
def test_relative_positions_at_another_grid(grid: tuple[int, int]) -> None:
    table = torch.randn(1, 27, 27, 3)
    rows, columns = 2 * grid[0] - 1, 2 * grid[1] - 1
    of_timm = resize_rel_pos_bias_table(table[0].flatten(0, 1), grid, (rows * columns, 3))
    for how, expected in (
        ("geometric_bilinear", of_timm.unflatten(0, (rows, columns))),
        ("geometric_bicubic", enlarged(table[0], grid)),
    ):
        got = resample_table(table, (rows, columns), how)[0]
        assert (got - expected).norm() / expected.norm() < 1e-5
        if grid == (24, 24):  # what is computed without gradients serves a compiled training step, too
            with torch.inference_mode():
                compiled = torch.compile(resample_table, backend="eager", fullgraph=True)
                assert torch.equal(compiled(table, (rows, columns), how)[0], got)


@OF_TIMM
@pytest.mark.parametrize("size", [(48, 48), (16, 16), (40, 24)])
def test_beit_at_another_size(tmp_path: Path, size: tuple[int, int]) -> None:
    model = foreign(BEIT)
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    checkpoint = open_checkpoint(tmp_path, Options(image_size=size))
    resized = timm.create_model(BEIT, **TINY | {"img_size": size}).eval()
    resized.load_state_dict(checkpoint_filter_fn(model.state_dict(), resized))
    assert distance(answers(checkpoint, pixels_of(size)), resized(pixels_of(size))) < 1e-5
    bare = open_checkpoint(Source("beit.pth", checkpoint.source.tensors), Options(image_size=size))
    assert (checkpoint.config.position_interpolation, bare.config.position_interpolation) == (
        "geometric_bilinear",
        "geometric_bicubic",
    )
