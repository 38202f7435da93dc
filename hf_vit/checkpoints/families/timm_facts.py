"""What is known about a timm checkpoint apart from its tensors: its config.json, and facts from timm's code.

A config.json names an architecture. `FACTS` has the facts about it that only timm's code states, neither the tensors
nor config.json; a test compares them with timm. Architectures with another forward for the same tensors are in
`OTHERS`.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ..checkpoint import Options
from ..files import OPEN_CLIP_CONFIG, Source, read_json

KNOWN = r"(vit|deit3?|flexivit|eva_large|eva_giant|eva02|beit(v2|3)?|test_vit\d?)_\w+|test_vit\d?"

MIXED = "rotary positions with learned frequencies"

# Architectures that have the tensor names of a plain ViT but another forward, and what differs.
OTHERS = {
    r"_rpn_": "LayerNorm after attention and MLP (residual post-norm)",
    r"^eva02_enormous": "LayerNorm after attention and MLP (residual post-norm)",
    r"_rope_mixed_": MIXED,
    r"_pe_core_gigantic_": "an attention pooling with an MLP of another width",
    r"^aimv2|_xp_|^test_vit4": "RMSNorm",
    r"^samvit": "another block",
    r"_18x2_|_d?pwee_|_xp_": "attention and MLP in parallel",
    r"_dwee_|_dlittle_": "differential attention",
    r"^naflex|_naflex": "NaFlex",
    r"_r\d+_|_resnet\d+|_hybrid": "a convolutional stem",
}

# Rotary positions of timm's Eva: fields of the config, and the order of rows ("ij") or columns ("xy") first in a head.
BY_INDEX = {"position_embedding_type": "rotary", "rope_coordinates": "index", "rope_theta": 10_000.0}
EVA02 = {
    **BY_INDEX,
    "position_embedding_type": "learned_rotary",
    "rope_axes": "ij",
    "rope_grid": (16, 16),
    "hidden_act": "silu",
    "mlp_gate": "first",
}
ROPE_REG = {**BY_INDEX, "rope_axes": "ij", "rope_grid": (16, 16), "global_pool": "avg"}
ROPE_VIT = {**BY_INDEX, "rope_axes": "xy", "rope_theta": 100.0, "global_pool": "token"}
PERCEPTION = {
    **BY_INDEX,
    "position_embedding_type": "learned_rotary",
    "rope_axes": "xy",
    "rope_offset": 1.0,
    "layer_norm_eps": 1e-5,
}
# Arguments of timm's constructor that replace these facts.
ROPE_ARGUMENTS = {
    "rope_temperature": "rope_theta",
    "rope_grid_offset": "rope_offset",
    "rope_grid_indexing": "rope_axes",
    "ref_feat_shape": "rope_grid",
}
# Facts that are fields of the config.
FIELDS = ("rope_coordinates", "rope_theta", "rope_offset", "rope_grid", "num_pooling_heads")

# Fields that the tensors do not determine. Later rows override earlier ones; other architectures have a `head_dim` of
# 64 and timm's defaults.
FACTS: tuple[tuple[str, dict[str, Any]], ...] = (
    (r"_huge_", {"head_dim": 80}),
    (r"_giant_", {"head_dim": 88}),
    (r"_giant_.*(_dinov2|_tipsv2|_radio_)", {"head_dim": 64}),
    (r"_gigantic_", {"head_dim": 104}),
    (r"_giantopt_", {"head_dim": 96}),
    (r"_so400m_", {"head_dim": 72}),
    (r"^vit_base_patch16_gap_", {"head_dim": 48}),
    (r"^test_vit", {"head_dim": 32}),
    (r"^test_vit3", {"pooling": "attention"}),  # over all tokens: its pool_include_prefix is true
    (r"^vit.*_clip_", {"layer_norm_eps": 1e-5}),
    (r"_clip_quickgelu_", {"hidden_act": "quick_gelu"}),
    (
        r"_(patch32|giantopt_patch16|so400m_patch16)_siglip_|_large_patch16_siglip_(gap_)?512",
        {"hidden_act": "gelu_pytorch_tanh"},
    ),
    (
        r"_dinov3",
        {
            "position_embedding_type": "rotary",
            "head_dim": 64,
            "layer_norm_eps": 1e-5,
            "gated_act": "silu",
            "global_pool": "avg",
        },
    ),
    (r"_7b_.*_dinov3", {"head_dim": 128}),
    (r"^beit3_", {"layer_norm_eps": 1e-5}),
    (r"^beit3_giant_", {"head_dim": 88}),
    (r"^eva02_", {**EVA02, "global_pool": "avg"}),
    (r"^eva02_.*_clip_", {"global_pool": "token"}),
    (r"_rope_reg\d_gap_", ROPE_REG),
    (r"_rope_(ape_)?\d+$", ROPE_VIT),
    (r"_rope_ape_", {"position_embedding_type": "learned_rotary"}),
    (r"_pe_(core|lang|spatial)_", {**PERCEPTION, "global_pool": "avg"}),
    (r"_pe_core_", {"pooling": "attention", "global_pool": "map", "num_pooling_heads": 8}),
    (r"_pe_.*_224$", {"rope_grid": (14, 14)}),
    (r"_pe_.*_3\d\d$", {"rope_grid": (24, 24)}),
    (r"_pe_.*_(448|512)$", {"rope_grid": (32, 32)}),
    (r"_pe_.*_gigantic_", {"rope_offset": 0.0, "head_dim": 96}),
    (r"_giant_patch14(_reg\d)?_(dinov2|tipsv2)", {"hidden_act": "silu", "mlp_gate": "first"}),
)

# timm's names, and the equivalent activation of transformers, epsilon of LayerNorm, or pooling of ours.
SAME_NAME = ("gelu", "quick_gelu", "silu", "relu", "relu6", "leaky_relu", "mish", "sigmoid", "tanh")
ACTIVATIONS = {**{name: name for name in SAME_NAME}, "gelu_tanh": "gelu_pytorch_tanh", "swish": "silu"}
EPSILONS = {"layernorm": 1e-6}
POOLINGS = {"token": "cls", "avg": "mean", "map": "attention"}


# Resize modes of open_clip, and timm's equivalents.
CROP_MODES = {"shortest": "center", "longest": "border", "squash": "squash"}


def with_config_of_open_clip(source: Source) -> Source:
    """Add the config.json that timm would write to an open_clip model whose image tower is a timm model."""
    path = source.folder / OPEN_CLIP_CONFIG if source.folder is not None else None
    config = read_json(path) if path is not None and path.is_file() and not source.config else {}
    vision = config.get("model_cfg", {}).get("vision_cfg", {})
    if "timm_model_name" not in vision:
        return source
    size, preprocessing = vision.get("image_size", 224), config.get("preprocess_cfg", {})
    height, width = (size, size) if isinstance(size, int) else size
    stated = {
        "architecture": vision["timm_model_name"],
        "global_pool": vision.get("timm_pool") or None,
        "pretrained_cfg": {
            "input_size": (3, height, width),
            "mean": preprocessing.get("mean", OPENAI_CLIP_MEAN),
            "std": preprocessing.get("std", OPENAI_CLIP_STD),
            "interpolation": preprocessing.get("interpolation", "bicubic"),
            "crop_pct": 1.0,
            "crop_mode": CROP_MODES.get(preprocessing.get("resize_mode"), "center"),
        },
    }
    return replace(source, config=stated)


class Stated:
    """Facts about a checkpoint apart from its tensors, from options, then `model_args`, then the architecture."""

    def __init__(self, source: Source, options: Options) -> None:
        # Without an architecture, config.json was not written by timm.
        self.config = source.config if "architecture" in source.config else {}
        self.architecture = str(self.config.get("architecture", "")).partition(".")[0]
        self.preprocessing = self.config.get("pretrained_cfg") or self.config
        self.arguments = self.config.get("model_args") or {}
        self.is_known = re.fullmatch(KNOWN, self.architecture) is not None
        self.facts: dict[str, Any] = {"layer_norm_eps": 1e-6} | ({"head_dim": 64} if self.is_known else {})
        for pattern, known in FACTS:
            if self.is_known and re.search(pattern, self.architecture):
                self.facts.update(known)
        for theirs, ours in ROPE_ARGUMENTS.items():
            if theirs in self.arguments and "rope_axes" in self.facts:
                self.facts[ours] = self.arguments[theirs]
        self.options = options
        self.source = source
        self.assumed: list[str] = []
        for pattern, difference in OTHERS.items():
            if re.search(pattern, self.architecture):
                raise ValueError(
                    f"{source.name}: timm's {self.architecture!r} is not a plain ViT: it has {difference}."
                )

    def assume(self, sentence: str) -> None:
        """Record an assumption, unless timm's code for a known architecture confirms it."""
        if not self.is_known:
            self.assumed.append(sentence)

    def named(self, argument: str, names: dict[str, Any], option: str) -> Any:
        """Return our equivalent of a name that one of timm's arguments states; `None` if it is not given.

        Raises:
            ValueError: If the name is unknown; `option` overrides it.
        """
        name = self.arguments.get(argument)
        if name is None:
            return None
        if name not in names:
            raise ValueError(f"{self.source.name}: {argument}={name!r} is unknown: pass {option}.")
        return names[name]

    def note_margin(self, size: tuple[int, int], grid: tuple[int, int], patch: tuple[int, int]) -> None:
        """Record that timm ignores the last pixels of an image whose size the patch does not divide."""
        height, width = grid[0] * patch[0], grid[1] * patch[1]
        if size != (height, width):
            self.assumed.append(
                f"Images are resized to {height}x{width}: timm resizes to {size[0]}x{size[1]} and ignores the pixels "
                "beyond the last patches."
            )

    @property
    def sizes(self) -> Iterator[tuple[int, int]]:
        """Stated image sizes, the most likely first."""
        size = self.arguments.get("img_size")
        if size is not None:
            yield (size, size) if isinstance(size, int) else (size[0], size[1])
        size = self.preprocessing.get("input_size")
        if size is not None:
            yield (size[-2], size[-1])
        if self.options.image_size is not None and self.options.patch_size is None:
            yield self.options.image_size
