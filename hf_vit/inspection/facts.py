"""The facts about a checkpoint that `hf-vit inspect` and `hf-vit convert` print."""

from collections.abc import Sequence
from typing import Any

from PIL import Image

from ..checkpoints.checkpoint import CLASSIFIER, DETECTOR, MULTI_TASK, SEGMENTER, Checkpoint
from ..model.configuration_hf_vit import HFViTConfig
from ..model.image_processing_pil_hf_vit import HFViTImageProcessorPil
from ..variants import variant_of

# Config fields that have a line in `facts`, or that follow from fields that do.
LISTED = {
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "intermediate_size", "hidden_act"),
    *("use_gated_mlp", "image_size", "patch_size", "position_embedding_type", "position_interpolation"),
    *("num_prefix_positions", "use_cls_token", "use_distillation_token", "num_register_tokens", "pooling"),
    *("layer_norm_eps", "_out_features", "_out_indices", "task_heads"),
}


def facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the family, architecture, sizes and number of parameters of a checkpoint, by the names to print."""
    config = checkpoint.config
    listed: dict[str, Any] = {
        "family": checkpoint.family,
        "variant": variant_of(config),
        "architecture": checkpoint.architecture,
        "image size": dimensions(config.image_shape),
        "patch size": f"{dimensions(config.patch_shape)}, a grid of {dimensions(config.grid_size)}",
        "width": config.hidden_size,
        "layers": config.num_hidden_layers,
        "heads": f"{config.num_attention_heads}, width {config.head_width} each",
        "MLP": f"{config.intermediate_size}, {'gated ' if config.use_gated_mlp else ''}{config.hidden_act}",
        "positions": _positions(config),
        "tokens before patches": _prefix(config),
        "pooling": config.pooling,
        "LayerNorm eps": f"{config.layer_norm_eps:g}",
        "preprocessing": _preprocessing(checkpoint.processor()),
        **_heads(checkpoint),
        "parameters": f"{checkpoint.num_parameters:,} ({str(checkpoint.dtype).removeprefix('torch.')})",
    }
    default = HFViTConfig()
    names = [name for name in HFViTConfig.__annotations__ if name not in LISTED]
    changed = [name for name in names if getattr(config, name) != getattr(default, name)]
    if changed:
        listed["also"] = ", ".join(f"{name}={getattr(config, name)}" for name in changed)
    return listed


def _heads(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the number of labels, or the heads of a multi-task model."""
    config = checkpoint.config
    if checkpoint.architecture == MULTI_TASK:
        number = {name: len(head.get("id2label", ())) for name, head in (config.task_heads or {}).items()}
        heads = config.task_heads or {}
        stated = [f"{name} ({heads[name]['task']}{f' of {labels}' * bool(labels)})" for name, labels in number.items()]
        return {"task heads": ", ".join(stated)}
    has_labels = checkpoint.architecture in (CLASSIFIER, SEGMENTER, DETECTOR)
    return {"labels": config.num_labels if has_labels else "no head"}


def dimensions(size: Sequence[int]) -> str:
    """Return a size as `"224x320"`."""
    return "x".join(map(str, size))


def _positions(config: HFViTConfig) -> str:
    kind = config.position_embedding_type
    has_table = kind in ("learned", "learned_2d", "learned_rotary", "relative")
    return f"{kind}, resampled {config.position_interpolation}" if has_table else kind


def _preprocessing(processor: HFViTImageProcessorPil) -> str:
    """Return the steps from an image to pixel values."""
    steps = []
    if processor.do_resize:
        share = processor.crop_pct
        kept = "" if share is None else f", center crop {share:.4g}"
        steps.append(f"{Image.Resampling(processor.resample).name.lower()} to {_pixels(processor.size)}{kept}")
    if processor.do_center_crop:
        steps.append(f"center crop {_pixels(processor.crop_size)}")
    if processor.do_normalize:
        mean, std = (_numbers(values) for values in (processor.image_mean, processor.image_std))
        steps.append(f"mean {mean}, std {std}")
    return "; ".join(steps)


def _pixels(size: Any) -> str:
    """Return a size of an image processor as text."""
    stated = {name: pixels for name, pixels in dict(size).items() if pixels}
    return dimensions([size.height, size.width]) if size.height else " ".join(map(str, *stated.items()))


def _numbers(values: float | Sequence[float]) -> str:
    """Return the values of the channels as text, a single value if all are equal."""
    values = [values] if isinstance(values, int | float) else list(values)
    return " ".join(f"{value:.4g}" for value in (values[:1] if len(set(values)) == 1 else values))


def _prefix(config: HFViTConfig) -> str:
    counts = {
        "class": config.use_cls_token,
        "distillation": config.use_distillation_token,
        "register": config.num_register_tokens,
    }
    return ", ".join(f"{int(number)} {name}" for name, number in counts.items() if number) or "none"
