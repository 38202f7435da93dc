"""timm's names of tensors, and its layouts of relative positions.

Names are those of timm 1.0.31, models/vision_transformer.py, deit.py and vision_transformer_relpos.py. The authors of
DeiT III, MAE and DINOv2 use the same names with a few exceptions, which the table includes.
"""

from collections.abc import Callable
from functools import partial
from math import log

import torch
from torch import Tensor

from ...model.configuration_hf_vit import HFViTConfig
from ..layouts import (
    Layout,
    Row,
    convolution,
    halves,
    heads_first,
    heads_together,
    packed,
    positions,
    rotated_pairs,
    same,
)
from .relative import BIASES, RELATIVE, offsets, relative_rows, shared_offsets
from .transformers import ZERO_KEY_BIAS

POSITIONS = ("embeddings.position_embeddings.prefix", "embeddings.position_embeddings.table.weight")
OF_A_LAYER = {
    "layernorm_before.*": ("norm1.*",),
    "layernorm_after.*": ("norm2.*",),
    "attention.q_norm.*": ("attn.q_norm.*",),
    "attention.k_norm.*": ("attn.k_norm.*",),
    "attention.o_proj.*": ("attn.proj.*",),
    "attention_scale.weight": ("ls1.gamma", "gamma_1"),  # the second: DeiT III
    "mlp_scale.weight": ("ls2.gamma", "gamma_2"),
    "mlp.fc2.*": ("mlp.fc2.*", "mlp.w3.*"),  # the second: DINOv2 and DINOv3
    "attention.layernorm.*": ("attn.norm.*", "attn.inner_attn_ln.*"),  # the second: the authors of EVA-02
    "mlp.layernorm.*": ("mlp.norm.*", "mlp.ffn_ln.*"),
}
OF_THE_POOLING = {
    "probe": "latent",
    "query.*": "q.*",
    "o_proj.*": "proj.*",
    "layernorm.*": "norm.*",
    "mlp.fc1.*": "mlp.fc1.*",
    "mlp.fc2.*": "mlp.fc2.*",
}
# Buffers that older versions saved, and the decoder of masked pre-training.
LEFT_OUT = (r".*\.relative_position_index", r".*\.rel_coords_log", r"mask_token", r"decoder_.*")


# Order of the dimensions of queries and keys, by timm's rope_grid_indexing if its positions rotate adjacent pairs.
ORDERS: dict[str | None, Callable[[HFViTConfig], Layout]] = {
    None: same,
    "ij": rotated_pairs,
    "xy": partial(rotated_pairs, columns_first=True),
}


def table(
    config: HFViTConfig, is_gate_first: bool = True, has_bias_mask: bool = False, rope_axes: str | None = None
) -> list[Row]:
    """Return our names and timm's; if several rows have the same names of ours, timm now writes the first.

    Args:
        config: The architecture; its positions and MLP determine some of the rows.
        is_gate_first: Whether the first half of a packed projection is the gate.
        has_bias_mask: Whether a mask sets the biases of keys to 0 (DINOv3).
        rope_axes: A key of `ORDERS`.
    """
    rows = [
        Row("embeddings.cls_token", "cls_token"),
        Row("embeddings.distillation_token", "dist_token"),
        Row("embeddings.register_tokens", "reg_token"),
        Row("embeddings.register_tokens", "register_tokens"),  # DINOv2
        Row("embeddings.register_tokens", "storage_tokens"),  # DINOv3
        Row("embeddings.patch_embeddings.projection.weight", "patch_embed.proj.weight", convolution),
        Row("embeddings.patch_embeddings.projection.bias", "patch_embed.proj.bias"),
        Row("pre_layernorm.*", "norm_pre.*"),
        Row("layernorm.*", "norm.*"),
        Row("pooler.layernorm.*", "fc_norm.*"),
        Row("pooler.pre_logits.*", "pre_logits.fc.*"),  # ImageNet-21k of timm before 0.6
        Row("classifier.*", "head.*"),
        Row("classifier.cls.*", "head.*"),
        Row("classifier.distillation.*", "head_dist.*"),
        *_attention_rows(has_bias_mask, ORDERS[rope_axes]),
        Row("pooler.pooling.key_value.*", "attn_pool.kv.*", partial(heads_first, parts=2)),
    ]
    rows += [Row(f"pooler.pooling.{ours}", f"attn_pool.{theirs}") for ours, theirs in OF_THE_POOLING.items()]
    for ours, names in OF_A_LAYER.items():
        rows += [Row(f"layers.{{}}.{ours}", f"blocks.{{}}.{theirs}") for theirs in names]
    if config.use_gated_mlp:
        both = ("layers.{}.mlp.gate.*", "layers.{}.mlp.fc1.*")
        rows += [
            Row("layers.{}.mlp.gate.*", "blocks.{}.mlp.fc1_g.*"),
            Row("layers.{}.mlp.fc1.*", "blocks.{}.mlp.fc1_x.*"),
            Row(both, "blocks.{}.mlp.fc1.*", halves if is_gate_first else gate_last),
            Row(both, "blocks.{}.mlp.w12.*", halves),  # DINOv2
            Row("layers.{}.mlp.gate.*", "blocks.{}.mlp.w1.*"),  # DINOv3
            Row("layers.{}.mlp.fc1.*", "blocks.{}.mlp.w2.*"),
        ]
    else:
        rows.append(Row("layers.{}.mlp.fc1.*", "blocks.{}.mlp.fc1.*"))
    if config.position_embedding_type in ("learned", "learned_rotary"):
        rows.append(Row(POSITIONS, "pos_embed", positions))
    if config.position_embedding_type == "relative":
        of_layers = tuple(f"blocks.{layer}.attn.rel_pos" for layer in range(config.num_hidden_layers))
        rows += _relative_rows(of_layers, offsets) + _relative_rows(("shared_rel_pos",), shared_offsets)
        biases = [f"blocks.{layer}.attn.{BIASES}" for layer in range(config.num_hidden_layers)]
        rows += relative_rows(biases, f"rel_pos_bias.{BIASES}")
    return rows


def _attention_rows(has_bias_mask: bool, order: Callable[[HFViTConfig], Layout]) -> list[Row]:
    """Return the rows of queries, keys and values, in one projection or in three."""

    def ordered(before: Layout) -> Callable[[HFViTConfig], Layout]:
        return lambda config: before.then(order(config)).then(heads_together(config))

    def parts(name: str, letters: str = "qkv") -> tuple[str, ...]:
        return tuple(f"blocks.{{}}.attn.{letter}_{name}" for letter in letters)

    ours, apart = "layers.{}.attention.qkv.", Layout(list, list)
    return [
        Row(f"{ours}weight", "blocks.{}.attn.qkv.weight", ordered(packed(3))),
        Row(f"{ours}bias", "blocks.{}.attn.qkv.bias", masked_bias if has_bias_mask else ordered(packed(3))),
        Row(f"{ours}bias", parts("bias", "qv"), ordered(ZERO_KEY_BIAS)),  # BEiT and EVA
        Row(f"{ours}weight", parts("proj.weight"), ordered(apart)),
        Row(f"{ours}bias", parts("proj.bias"), ordered(apart)),
        Row(f"{ours}bias", parts("proj.bias", "qv"), ordered(ZERO_KEY_BIAS)),  # EVA-02
    ]


def _relative_rows(modules: tuple[str, ...], biases: Callable[[HFViTConfig], Layout]) -> list[Row]:
    """Return the rows of relative positions stored in `modules`: a table, or one of two kinds of MLP."""
    layouts = {
        (BIASES,): biases,
        ("mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"): continuous_offsets,
        ("mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight"): swin_offsets,
    }
    return [
        Row(RELATIVE, tuple(f"{module}.{kind}" for module in modules for kind in kinds), layout)
        for kinds, layout in layouts.items()
    ]


def gate_last(config: HFViTConfig) -> Layout:
    """Split a projection of the hidden layer and the gate of an MLP, the gate last."""
    swapped = Layout(lambda theirs: theirs[::-1], lambda ours: ours[::-1])
    return packed(2).then(swapped)


def masked_bias(config: HFViTConfig) -> Layout:
    """Convert biases of queries, keys and values. Those of keys are masked, so ours are zeros."""
    together = heads_together(config)

    def read(theirs: list[Tensor]) -> list[Tensor]:
        query, key, value = theirs[0].chunk(3)
        return together.read([query, torch.zeros_like(key), value])

    return Layout(read, heads_first(config).write)


def continuous_offsets(config: HFViTConfig, is_swin: bool = False) -> Layout:
    """Evaluate an MLP of log-spaced offsets (arXiv:2111.09883), one per layer or one for all, on the grid."""
    grid = config.grid_size
    layers, parts = config.num_hidden_layers, 3 if is_swin else 4

    def read(theirs: list[Tensor]) -> list[Tensor]:
        tables = [_evaluate(theirs[start : start + parts], grid) for start in range(0, len(theirs), parts)]
        return [torch.stack(tables).expand(layers, -1, -1, -1)]

    def write(ours: list[Tensor]) -> list[Tensor]:
        raise ValueError("Relative positions are stored as a table and cannot become an MLP of offsets again.")

    return Layout(read, write)


def swin_offsets(config: HFViTConfig) -> Layout:
    """Evaluate the MLP of Swin V2: offsets are relative to the grid, and biases are between 0 and 16."""
    return continuous_offsets(config, is_swin=True)


def _evaluate(mlp: list[Tensor], grid: tuple[int, int]) -> Tensor:
    """Return the biases of all offsets, float32 `[2h-1, 2w-1, A]`."""
    weight, bias, out_weight, *out_bias = (tensor.float() for tensor in mlp)
    axes = [torch.arange(1 - size, size, dtype=torch.float32, device=weight.device) for size in grid]
    if not out_bias:
        axes = [8 * axis / (size - 1) for axis, size in zip(axes, grid, strict=True)]
    logarithms = [axis.sign() * (1 + axis.abs()).log() for axis in axes]
    if not out_bias:
        logarithms = [axis / log(8) for axis in logarithms]
    coordinates = torch.stack(torch.meshgrid(*logarithms, indexing="ij"), dim=-1)  # [2h-1, 2w-1, 2]
    biases = (coordinates @ weight.T + bias).relu() @ out_weight.T
    return biases + out_bias[0] if out_bias else 16 * biases.sigmoid()
