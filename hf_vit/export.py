"""Write a model in the layout of another library: stock transformers, timm, or the npz of the paper's code.

What runs without any library's code, ONNX and torch.export, is in `graphs`.

A target is a table: what fields of the config must be where it has no word for them. Whatever does not fit is an error
that lists it, before anything is written; what a layout cannot carry beside the architecture is said.
"""

import json
import math
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import ViTConfig

from .checkpoints import Checkpoint, Options, google, open_checkpoint, timm, transformers
from .checkpoints.checkpoint import CLASSIFIER, ENCODER, MASKED
from .checkpoints.conversion import checksum, write_safetensors
from .checkpoints.layouts import Row, Rule, rules_of
from .model.configuration_hf_vit import HFViTConfig
from .model.image_processing_pil_hf_vit import HFViTImageProcessorPil, Image
from .system.disk import new_file, new_folder

# What a plain ViT has. A layout that can say more leaves the field out.
PLAIN: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("learned",),
    "position_placement": ("input",),
    "pooling": ("cls",),
    "final_layernorm": ("tokens",),
    "use_distillation_token": (False,),
    "num_register_tokens": (0,),
    "stem_layers": (None,),
    "representation_size": (None,),
    "layer_scale_init_value": (None,),
    "use_qk_norm": (False,),
    "use_gated_mlp": (False,),
    "use_pre_layernorm": (False,),
    "use_patch_layernorm": (False,),
    "use_output_projection": (True,),
    "patch_bias": (True,),
    "qkv_bias": (True,),
    "proj_bias": (True,),
    "mlp_bias": (True,),
}
# What matters in training, or to another class of model, alone.
BESIDE = (
    "drop_path_rate",
    "patch_dropout_prob",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "initializer_range",
    "zero_init_head",
    "problem_type",
    "mim_objective",
    "out_features",
    "apply_layernorm",
    "reshape_hidden_states",
)


class Target(NamedTuple):
    """A layout to write.

    Attributes:
        architectures: Model classes that it has.
        required: What fields must be that it has no word for.
        misfits: Says what else does not fit.
        notes: Says what a user of the layout must know.
        table: The names for a checkpoint.
        write: Writes to a path, given the checkpoint and the rules of its names.
        carries: What it has a word for beside the architecture, and its own way to resample positions.
    """

    architectures: tuple[str, ...]
    required: dict[str, tuple[Any, ...]]
    misfits: Callable[[Checkpoint], list[str]]
    notes: Callable[[Checkpoint], list[str]]
    table: Callable[[Checkpoint], list[Row]]
    write: Callable[[Checkpoint, list[Rule], Path, bool], None]
    carries: tuple[str, ...]


def export(source: str | Path, out: str | Path, to: str, force: bool = False) -> list[str]:
    """Write a model, of this package or of any family that is read, in another library's layout.

    Args:
        source: A file, a folder, or a name on the Hub.
        out: The folder to write; for npz the file.
        to: A key of `TARGETS`.
        force: Replace what lies there.

    Returns:
        Sentences: what was assumed, and what the layout cannot carry beside the architecture.

    Raises:
        ValueError: If the layout has no place for a feature of the model; lists all of them.
    """
    if to not in TARGETS:
        raise ValueError(f"Unknown layout {to!r}: choose one of {', '.join(TARGETS)}.")
    checkpoint, target = open_checkpoint(source), TARGETS[to]
    if misfits := _misfits(checkpoint, target):
        raise ValueError(f"{checkpoint.source.name} does not fit into {to}: {'; '.join(misfits)}.")
    rules = rules_of(target.table(checkpoint), checkpoint.config, checkpoint.shapes)
    target.write(checkpoint, rules, Path(out), force)
    return _left_behind(checkpoint, target)


def _misfits(checkpoint: Checkpoint, target: Target) -> list[str]:
    config = checkpoint.config
    misfits = [
        f"{name}={getattr(config, name)!r} (only {' or '.join(map(repr, values))})"
        for name, values in target.required.items()
        if getattr(config, name) not in values
    ]
    if checkpoint.architecture not in target.architectures:
        misfits.insert(0, f"{checkpoint.architecture} (only {' or '.join(target.architectures)})")
    if config.head_width * config.num_attention_heads != config.hidden_size:
        misfits.append(f"head_dim={config.head_dim} (only hidden_size / num_attention_heads)")
    return misfits + target.misfits(checkpoint)


def _left_behind(checkpoint: Checkpoint, target: Target) -> list[str]:
    """Say what has no place in the layout and does not change what the model computes at its own size."""
    config = checkpoint.config
    plain = HFViTConfig(num_hidden_layers=config.num_hidden_layers)  # stages go by the depth
    said = []
    for name in BESIDE:
        if name not in target.carries and getattr(config, name) != getattr(plain, name):
            said.append(f"{name}={getattr(config, name)!r} has no place there; it does not change the trained model.")
    if config.position_embedding_type == "learned" and config.position_interpolation not in target.carries:
        said.append(f"Positions are resampled there by its own rule, not {config.position_interpolation}.")
    for name in ("labels", "processor"):
        if name not in target.carries and (name == "processor" or checkpoint.architecture == CLASSIFIER):
            said.append(f"The {name} of the model {'have' if name == 'labels' else 'has'} no place there.")
    assumed = [f"Assumed: {sentence}" for sentence in checkpoint.assumed]
    if checkpoint.left_out:
        said.append(
            f"Left out: {', '.join(map(repr, checkpoint.left_out[:3]))}{', ...' * (len(checkpoint.left_out) > 3)}"
        )
    return assumed + said + target.notes(checkpoint)


# ------------------------------------------------------------------------------------------------------ tensors


def translated(checkpoint: Checkpoint, rules: list[Rule], sums: dict[str, int]) -> Iterator[tuple[str, Tensor]]:
    """Give the tensors by their names in the layout, as soon as all that they are made of has come.

    Notes a checksum of every tensor of ours in `sums`.
    """
    rule_of = {name: rule for rule in rules for name in rule.ours}
    waiting: dict[str, Tensor] = {}
    for name, tensor in checkpoint.weights():
        sums[name] = checksum(tensor)
        waiting[name] = tensor
        rule = rule_of[name]
        if all(part in waiting for part in rule.ours):
            parts = [waiting.pop(part) for part in rule.ours]
            yield from zip(rule.theirs, rule.layout.write(parts), strict=True)


COMPARED = (
    "hidden_act",
    "layer_norm_eps",
    "num_attention_heads",
    "num_prefix_positions",
    "use_cls_token",
    "image_shape",
    "patch_shape",
)


def verify(written: Path, options: Options, checkpoint: Checkpoint, sums: dict[str, int]) -> None:
    """Read what was written as a stranger would, and compare it with the model: bit for bit, and the architecture.

    Raises:
        AssertionError: If something differs.
    """
    again = open_checkpoint(written, options)
    assert again.architecture == checkpoint.architecture
    for name in (*PLAIN, *COMPARED):
        ours, theirs = getattr(checkpoint.config, name), getattr(again.config, name)
        assert (ours is None) == (theirs is None) if name == "layer_scale_init_value" else ours == theirs, name
    assert {name: checksum(tensor) for name, tensor in again.weights()} == sums


def _write_folder(checkpoint: Checkpoint, rules: list[Rule], folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shapes: dict[str, torch.Size] = {}
    for rule in rules:
        parts = [torch.empty(checkpoint.shapes[name], device="meta") for name in rule.ours]
        shapes.update(zip(rule.theirs, (part.shape for part in rule.layout.write(parts)), strict=True))
    sums: dict[str, int] = {}
    weights = translated(checkpoint, rules, sums)
    write_safetensors(folder / "model.safetensors", shapes, checkpoint.dtype, weights)
    verify(folder, Options(), checkpoint, sums)


# ------------------------------------------------------------------------------------------------- transformers


STOCK = {CLASSIFIER: "ViTForImageClassification", ENCODER: "ViTModel", MASKED: "ViTForMaskedImageModeling"}
STOCK_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "initializer_range",
    "layer_norm_eps",
    "num_channels",
    "qkv_bias",
    "id2label",
    "label2id",
    "problem_type",
)


# Ours round the margin of a crop as each source does; of an odd margin, half a pixel goes up or down.
ROUNDED_CROP = "A centre crop may lie one pixel further up or left there."


def _transformers_misfits(checkpoint: Checkpoint) -> list[str]:
    config, misfits = checkpoint.config, []
    processor = checkpoint.processor().to_dict()
    if config.use_cls_token and config.position_embedding_type == "learned" and not config.num_prefix_positions:
        misfits.append("num_prefix_positions=0 (only 1)")
    if config.representation_size is not None and checkpoint.architecture != ENCODER:
        misfits.append(f"representation_size={config.representation_size} (only in a model without head)")
    if checkpoint.architecture == MASKED:
        if config.mim_objective != "pixels":
            misfits.append(f"mim_objective={config.mim_objective!r} (only 'pixels')")
        sizes = {"image_size": config.image_shape, "patch_size": config.patch_shape}
        misfits += [
            f"{name}={size} in masked modelling (only squares)" for name, size in sizes.items() if len(set(size)) > 1
        ]
    if processor.get("do_grayscale"):
        misfits.append("do_grayscale of the processor")
    if processor.get("crop_pct") is not None and len(set(config.image_shape)) > 1:
        misfits.append(f"crop_pct={processor['crop_pct']} of the processor (only with square images)")
    resample = Image.Resampling(processor["resample"]).name
    if resample in ("BOX", "HAMMING"):
        misfits.append(f"resample={resample} of the processor")
    return misfits + _size_misfits(processor, config)


def _transformers_notes(checkpoint: Checkpoint) -> list[str]:
    said = []
    if checkpoint.architecture == ENCODER and checkpoint.config.representation_size is None:
        said.append("There is no pooler: load ViTModel with add_pooling_layer=False, or it draws one at random.")
    return said + ([ROUNDED_CROP] if checkpoint.processor().crop_pct is not None else [])


def _size_misfits(processor: dict[str, Any], config: HFViTConfig) -> list[str]:
    """Refuse a processor that leaves the last resize to our model: others take images of their one size alone."""
    size = dict(processor["crop_size"] if processor.get("do_center_crop") else processor["size"])
    is_fitted = processor["do_resize"] or processor.get("do_center_crop")
    if not is_fitted or (size.get("height"), size.get("width")) == config.image_shape:
        return []
    return [f"a processor that gives {size} (only the model's {config.image_shape})"]


def _transformers_table(checkpoint: Checkpoint) -> list[Row]:
    return transformers.table(prefixes=("",) if checkpoint.architecture == ENCODER else ("vit.",))


def _write_transformers(checkpoint: Checkpoint, rules: list[Rule], out: Path, force: bool) -> None:
    config = checkpoint.config
    fields = {name: getattr(config, name) for name in STOCK_FIELDS}
    fields["initializer_range"] = float(config.initializer_range)  # stock takes no integer
    sizes = {name: _number_if_square(getattr(config, f"{name}_shape")) for name in ("image", "patch")}
    stock = ViTConfig(
        **fields,
        image_size=sizes["image"],
        patch_size=sizes["patch"],
        encoder_stride=config.patch_shape[0],
        pooler_output_size=config.representation_size,
        architectures=[STOCK[checkpoint.architecture]],
        dtype=str(checkpoint.dtype).removeprefix("torch."),
    )
    with new_folder(out, force) as folder:
        _write_folder(checkpoint, rules, folder, json.loads(stock.to_json_string(use_diff=False)))
        preprocessing = _stock_preprocessing(checkpoint.processor())
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing, indent=2) + "\n", encoding="utf-8")


def _number_if_square(size: tuple[int, int]) -> int | list[int]:
    return size[0] if size[0] == size[1] else list(size)


def _stock_preprocessing(processor: HFViTImageProcessorPil) -> dict[str, Any]:
    """Return the same preprocessing for a class of transformers: one that resizes, or one that also crops."""
    described = processor.to_dict()
    names = ["do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor"]
    names += ["do_normalize", "image_mean", "image_std", "do_convert_rgb"]
    stock = {name: described[name] for name in names if described.get(name) is not None}
    if described.get("crop_pct") is not None and stock["do_resize"]:
        edge = math.floor(stock["size"]["height"] / described["crop_pct"])
        stock.update(do_center_crop=True, crop_size=stock["size"], size={"shortest_edge": edge})
    crops = stock.get("do_center_crop")
    return {"image_processor_type": "CLIPImageProcessor" if crops else "ViTImageProcessor", **stock}


# --------------------------------------------------------------------------------------------------------- timm


TIMM_ACTIVATIONS = {ours: theirs for theirs, ours in reversed(timm.ACTIVATIONS.items())}
TIMM_POOLINGS = {
    "cls": "token",
    "mean": "avg",
    "mean_all": "avg",
    "attention": "map",
    "attention_patches": "map",
    "cls_and_distillation": "token",
}
# What must be where, in the classes that timm has for these.
TIMM_SPECIAL: dict[str, dict[str, tuple[Any, ...]]] = {
    "relative positions": {
        "pooling": ("cls", "mean"),
        "num_register_tokens": (0,),
        "final_layernorm": ("tokens", "pooled"),
        "hidden_act": ("gelu",),
        "layer_norm_eps": (1e-6,),
        "proj_bias": (True,),
        "use_pre_layernorm": (False,),
    },
    "a distillation token": {
        "position_embedding_type": ("learned",),
        "num_register_tokens": (0,),
        "final_layernorm": ("tokens", "none"),
        "layer_norm_eps": (1e-6,),
    },
    "a gated MLP": {
        "pooling": ("cls", "mean", "mean_all"),  # it would gate the MLP of the attention pooling, too
        "layer_norm_eps": (1e-6,),
    },
}
# An architecture of timm with each epsilon: config.json can name a norm, but not its epsilon.
TIMM_EPSILONS = {1e-6: "vit_base_patch16_224", 1e-5: "vit_base_patch16_clip_224"}


def _timm_misfits(checkpoint: Checkpoint) -> list[str]:
    config, misfits = checkpoint.config, []
    positions, prefix = config.num_prefix_positions, config.num_prefix_tokens
    if config.layer_scale_init_value == 0:
        misfits.append("layer_scale_init_value=0 (which there is none)")
    if config.use_distillation_token and config.pooling != "cls_and_distillation":
        misfits.append("a distillation token without its classifier")
    if config.position_embedding_type in ("learned", "relative") and positions not in (0, prefix):
        misfits.append(f"num_prefix_positions={positions} (only 0 or {prefix})")
    if config.patch_bias == config.use_pre_layernorm:
        misfits.append(f"patch_bias={config.patch_bias} with use_pre_layernorm={config.use_pre_layernorm}")
    if config.proj_bias != config.mlp_bias:
        misfits.append(f"proj_bias={config.proj_bias} with mlp_bias={config.mlp_bias}")
    special = [what for what in TIMM_SPECIAL if _is_special(config, what)]
    for what in special:
        misfits += [
            f"{name}={getattr(config, name)!r} with {what} (only {' or '.join(map(repr, values))})"
            for name, values in TIMM_SPECIAL[what].items()
            if getattr(config, name) not in values
        ]
    if len(special) > 1:
        misfits.append(" and ".join(special))
    if "relative positions" in special and positions != prefix:
        misfits.append("relative positions with a class token that has none")
    if "a distillation token" in special and not positions:
        misfits.append("num_prefix_positions=0 with a distillation token (only 2)")
    return misfits + _timm_processor_misfits(checkpoint.processor().to_dict(), config)


def _is_special(config: HFViTConfig, what: str) -> bool:
    return {
        "relative positions": config.position_embedding_type == "relative",
        "a distillation token": config.pooling == "cls_and_distillation",
        "a gated MLP": config.use_gated_mlp,
    }[what]


def _timm_processor_misfits(processor: dict[str, Any], config: HFViTConfig) -> list[str]:
    misfits = _size_misfits(processor, config)
    if not processor["do_resize"]:
        misfits.append("do_resize=False of the processor")
    if not processor["do_rescale"] or processor["rescale_factor"] != 1 / 255:
        misfits.append("a processor's do_rescale or rescale_factor (only 1/255)")
    if not misfits and _timm_crop(processor, config.image_shape) is None:
        misfits.append(f"a crop of {config.image_shape} from {dict(processor['size'])} by the processor")
    return misfits


def _timm_crop(processor: dict[str, Any], image: tuple[int, int]) -> tuple[float, str] | None:
    """Return timm's crop_pct and crop_mode; `None` if they cannot say what the processor does."""
    if processor.get("crop_pct") is not None:
        return processor["crop_pct"], "center"
    if not processor.get("do_center_crop"):
        return 1.0, "squash"
    size = processor["size"]
    mode = "squash" if size.get("height") else "center"
    edges = (size["height"], size["width"]) if mode == "squash" else (size["shortest_edge"],) * 2
    share = min(side / edge for side, edge in zip(image, edges, strict=True))
    if any(math.floor(side / share) < edge for side, edge in zip(image, edges, strict=True)):  # timm rounds down
        share = math.nextafter(share, 0)
    if mode == "center" and (image[0] != image[1] or size.get("longest_edge")):
        return None
    return (share, mode) if share <= 1 and tuple(math.floor(side / share) for side in image) == edges else None


def _timm_notes(checkpoint: Checkpoint) -> list[str]:
    said, processor = [], checkpoint.processor()
    if processor.do_grayscale:
        said.append("Images must be gray (Pillow's mode L) before they come to its transforms.")
    if processor.do_center_crop:
        said.append(ROUNDED_CROP.replace("up or left", "down or right"))
    if checkpoint.architecture == ENCODER and checkpoint.config.pooling == "cls_and_distillation":
        said.append("Without classifiers it gives the average of both tokens, not one behind the other.")
    return said


def _timm_architecture(config: HFViTConfig) -> str:
    """Return a name that timm's code has what arguments cannot say under."""
    if config.position_embedding_type == "relative":
        return "vit_relpos_base_patch16_224"
    if config.pooling == "cls_and_distillation":
        return "deit_base_distilled_patch16_224"
    return "vit_giant_patch14_dinov2" if config.use_gated_mlp else TIMM_EPSILONS[config.layer_norm_eps]


def _timm_arguments(config: HFViTConfig) -> dict[str, Any]:
    """Return the arguments of timm's constructor."""
    hidden = config.intermediate_size * (2 if config.use_gated_mlp else 1)  # timm counts the gate
    ratio = hidden / config.hidden_size
    if int(config.hidden_size * ratio) != hidden:  # timm rounds down
        ratio = float(np.nextafter(ratio, np.inf))
    arguments: dict[str, Any] = {
        "img_size": list(config.image_shape),
        "patch_size": _number_if_square(config.patch_shape),
        "in_chans": config.num_channels,
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": ratio,
        "qkv_bias": config.qkv_bias,
        "qk_norm": config.use_qk_norm,
        "init_values": config.layer_scale_init_value,
        "class_token": config.use_cls_token,
        "global_pool": TIMM_POOLINGS[config.pooling],
        "fc_norm": config.final_layernorm == "pooled",
    }
    if config.position_embedding_type == "relative":
        return {**arguments, "rel_pos_type": "bias", "shared_rel_pos": False}
    return {
        **arguments,
        "act_layer": TIMM_ACTIVATIONS[config.hidden_act],
        "proj_bias": config.proj_bias,
        "pos_embed": "learn" if config.position_embedding_type == "learned" else "none",
        "no_embed_class": not config.num_prefix_positions,
        "reg_tokens": config.num_register_tokens,
        "pre_norm": config.use_pre_layernorm,
        "final_norm": config.final_layernorm != "none",
        "pool_include_prefix": config.pooling in ("mean_all", "attention"),
    }


def _timm_preprocessing(processor: HFViTImageProcessorPil, config: HFViTConfig) -> dict[str, Any]:
    described, channels = processor.to_dict(), config.num_channels
    crop = _timm_crop(described, config.image_shape)
    assert crop is not None
    mean, std = (described["image_mean"], described["image_std"]) if described["do_normalize"] else (0.0, 1.0)
    return {
        "input_size": [channels, *config.image_shape],
        "fixed_input_size": True,
        "interpolation": Image.Resampling(described["resample"]).name.lower(),
        "crop_pct": crop[0],
        "crop_mode": crop[1],
        "mean": _for_each_channel(mean, channels),
        "std": _for_each_channel(std, channels),
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": ["head", "head_dist"] if config.pooling == "cls_and_distillation" else "head",
    }


def _for_each_channel(values: float | Sequence[float], channels: int) -> list[float]:
    values = [values] if isinstance(values, int | float) else list(values)
    return values[:1] * channels if len(set(values)) == 1 else values


def _write_timm(checkpoint: Checkpoint, rules: list[Rule], out: Path, force: bool) -> None:
    config = checkpoint.config
    preprocessing = _timm_preprocessing(checkpoint.processor(), config)
    number = preprocessing["num_classes"] = config.num_labels if checkpoint.architecture == CLASSIFIER else 0
    if number:
        preprocessing["label_names"] = [name for _, name in sorted((config.id2label or {}).items())]
    described = {
        "architecture": _timm_architecture(config),
        "num_classes": number,
        "num_features": config.hidden_size,
        "global_pool": TIMM_POOLINGS[config.pooling],
        "model_args": _timm_arguments(config),
        "pretrained_cfg": preprocessing,
    }
    with new_folder(out, force) as folder:
        _write_folder(checkpoint, rules, folder, described)


def _timm_table(checkpoint: Checkpoint) -> list[Row]:
    # timm's named architectures pack the gate and the hidden layer, the gate first.
    split = ("blocks.{}.mlp.fc1_g.*", "blocks.{}.mlp.fc1_x.*")
    return [row for row in timm.table(checkpoint.config) if row.theirs not in split]


# ---------------------------------------------------------------------------------------------------------- npz


def _npz_misfits(checkpoint: Checkpoint) -> list[str]:
    config = checkpoint.config
    misfits = []
    if config.pooling in ("mean", "attention") and config.use_cls_token:
        misfits.append(f"pooling={config.pooling!r} beside a class token")
    # Stems are of one of the two codes, these of the other.
    is_of_big_vision = google.is_of_big_vision(config)
    if config.stem_layers is not None and (is_of_big_vision or config.position_embedding_type == "sincos_2d"):
        misfits.append("stem_layers with attention pooling, sincos_2d, or a class token without position")
    return misfits


def _npz_notes(checkpoint: Checkpoint) -> list[str]:
    height, width = checkpoint.config.image_shape
    rows, columns = checkpoint.config.grid_size
    if checkpoint.config.position_embedding_type == "learned" and rows == columns:
        return []
    return [f"The file does not say its grid: read it with --image-size {height}x{width}."]


def _npz_table(checkpoint: Checkpoint) -> list[Row]:
    return google.table(checkpoint.config)


def _write_npz(checkpoint: Checkpoint, rules: list[Rule], out: Path, force: bool) -> None:
    sums: dict[str, int] = {}
    with new_file(out, force) as unfinished:
        with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_STORED) as archive:
            for name, tensor in translated(checkpoint, rules, sums):
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, _array(tensor))
        verify(unfinished, Options(image_size=checkpoint.config.image_shape), checkpoint, sums)


def _array(tensor: Tensor) -> np.ndarray:
    """Return an array; bfloat16, which numpy does not have, as JAX writes it."""
    tensor = tensor.contiguous()
    return tensor.view(torch.int16).numpy().view("V2") if tensor.dtype == torch.bfloat16 else tensor.numpy()


def _without(*names: str, **changed: tuple[Any, ...]) -> dict[str, tuple[Any, ...]]:
    return {**{name: values for name, values in PLAIN.items() if name not in names}, **changed}


TARGETS = {
    "transformers": Target(
        (CLASSIFIER, ENCODER, MASKED),
        _without("qkv_bias", "representation_size"),
        _transformers_misfits,
        _transformers_notes,
        _transformers_table,
        _write_transformers,
        (*STOCK_FIELDS, "labels", "processor", "bicubic"),
    ),
    "timm": Target(
        (CLASSIFIER, ENCODER),
        {
            "position_embedding_type": ("learned", "relative", "none"),
            "pooling": tuple(TIMM_POOLINGS),
            "hidden_act": tuple(TIMM_ACTIVATIONS),
            "layer_norm_eps": tuple(TIMM_EPSILONS),
            "stem_layers": (None,),
            "representation_size": (None,),
            "use_patch_layernorm": (False,),
            "use_output_projection": (True,),
        },
        _timm_misfits,
        _timm_notes,
        _timm_table,
        _write_timm,
        ("labels", "processor", "bicubic_antialias"),
    ),
    "npz": Target(
        (CLASSIFIER, ENCODER),
        _without(
            "stem_layers",
            "representation_size",
            position_embedding_type=("learned", "sincos_2d"),
            pooling=("cls", "mean", "attention"),
            hidden_act=("gelu_pytorch_tanh",),
            layer_norm_eps=(1e-6,),
        ),
        _npz_misfits,
        _npz_notes,
        _npz_table,
        _write_npz,
        ("bilinear_corners",),
    ),
}
