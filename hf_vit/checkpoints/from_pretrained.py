"""`from_pretrained` of our models on checkpoints from other libraries: a folder, a file, or a name on the Hub."""

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.utils import cached_file, logging

from ..model.configuration_hf_vit import HFViTConfig
from ..model.image_processing_pil_hf_vit import HFViTImageProcessorPil
from ..system.texts import hanging
from .checkpoint import CLASSIFIER, ENCODER, KEYWORDS, MULTI_TASK, Checkpoint, Options
from .families import own
from .files import Source, read_json, read_weights
from .opening import open_checkpoint

logger = logging.get_logger(__name__)

OF_THE_HEAD = ("num_labels", "spelling")  # transformers builds a new head
OF_ALL_CONFIGS = ("num_labels", "id2label", "label2id", "problem_type", "output_attentions", "output_hidden_states")
OTHER_WEIGHTS = {"variant", "gguf_file", "use_safetensors"}
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def read_foreign(
    name: str, class_name: str, options: dict[str, Any]
) -> tuple[HFViTConfig, dict[str, Tensor], HFViTImageProcessorPil, dict[str, Any]] | None:
    """Read a checkpoint from another library for a model class of ours.

    Args:
        name: The argument of `from_pretrained`.
        class_name: The model class to fill.
        options: Keywords of `from_pretrained`; config fields among them override the checkpoint's.

    Returns:
        Config, state dict, processor and the remaining keywords. `None` if the checkpoint is our own and needs no
        conversion to other channels or to one head, or if it does not exist; transformers then reads it or raises an
        error.
    """
    stated, rest = options_from(options)
    hub = {option: options[option] for option in HUB_OPTIONS if options.get(option) is not None}
    if not Path(name).is_file():
        found = cached_file(name, "config.json", _raise_exceptions_for_missing_entries=False, **hub)
        if found is None and not _is_foreign_without_config(name, hub, options):
            return None
        stored = read_json(Path(found)) if found else {}
        is_own = stored.get("model_type") == HFViTConfig.model_type
        has_channels = stated.num_channels in (None, stored.get("num_channels", HFViTConfig.num_channels))
        if is_own and has_channels and stated.head is None:
            if Path(name).is_dir() and not OTHER_WEIGHTS.intersection(options):
                read_weights(name, hub)  # rejects corrupt files that transformers accepts or reports without a name
            return None
        if is_own:  # all other fields need no conversion
            stated = Options(num_channels=stated.num_channels, head=stated.head, spelling="python")
    checkpoint = open_checkpoint(name, stated, **hub)
    warn_of_assumptions(checkpoint)
    if class_name == CLASSIFIER and checkpoint.lost_head and not {"num_labels", "id2label"}.intersection(options):
        raise ValueError(
            f"{name}: {checkpoint.lost_head} Load it as HFViTModel, or pass num_labels for a new classifier."
        )
    rest = {option: value for option, value in rest.items() if option not in hub}
    config = rest.pop("config", None)
    if not isinstance(config, HFViTConfig):
        config, rest = config_for(checkpoint, class_name, rest)
    config.dtype = checkpoint.dtype
    processor = checkpoint.processor()
    processor.set_output_size(config.image_shape)
    return config, checkpoint.state_dict(), processor, rest


def _is_foreign_without_config(name: str, hub: dict[str, Any], options: dict[str, Any]) -> bool:
    """Return whether a folder or repository without `config.json` has weights that transformers cannot read."""
    weights = read_weights(name, hub)
    is_described = weights is not None and options.get("config") is not None
    return weights is not None and not (is_described and own.FAMILY.recognises(Source(name, weights[0])))


def options_from(keywords: dict[str, Any]) -> tuple[Options, dict[str, Any]]:
    """Split the keywords of `from_pretrained` into options of the conversion and the others.

    Fields of `HFViTConfig` can be in both. From a given `config`, the conversion reads the numbers of channels and of
    attention heads.
    """
    config = keywords.get("config")
    given = {name: getattr(config, name, None) for name in ("num_channels", "num_attention_heads")} | keywords
    named = {field.name: KEYWORDS.get(field.name, field.name) for field in fields(Options)}
    stated: dict[str, Any] = {
        name: given[keyword] for name, keyword in named.items() if keyword in given and name not in OF_THE_HEAD
    }
    rest = {
        keyword: value
        for keyword, value in keywords.items()
        if keyword not in stated or keyword in HFViTConfig.__annotations__
    }
    return Options(**stated, spelling="python"), rest


def warn_of_assumptions(checkpoint: Checkpoint) -> None:
    """Log the assumptions about a checkpoint, only in the first of several processes."""
    if checkpoint.assumed and os.environ.get("RANK", "0") == "0":
        where = " The options are those of hf-vit convert." if checkpoint.options.spelling == "other" else ""
        lines = [line for sentence in checkpoint.assumed for line in hanging("- ", sentence)]
        start = f"{checkpoint.source.name} does not state everything.{where} Assumed:"
        logger.warning_once("\n".join([*hanging("", start), *lines]))


def config_for(checkpoint: Checkpoint, class_name: str, options: dict[str, Any]) -> tuple[HFViTConfig, dict[str, Any]]:
    """Return the config of a model class filled from a checkpoint, and the options that are not config fields."""
    stored, config = checkpoint.config.to_dict(), checkpoint.config
    labels = options.get("num_labels") or len(options.get("id2label") or config.id2label or ())
    is_new_head = checkpoint.architecture == ENCODER or labels != config.num_labels
    if class_name == CLASSIFIER and is_new_head and checkpoint.family != own.FAMILY.name:
        stored["representation_size"] = None  # pre-logits belong to the head of the pre-training
    if class_name != MULTI_TASK:
        stored["task_heads"] = None
    names = {*HFViTConfig.__annotations__, "out_features", "out_indices", *OF_ALL_CONFIGS}.intersection(options)
    config = HFViTConfig.from_dict(stored, **{name: options[name] for name in names})
    config.dtype = checkpoint.dtype
    checkpoint.config.position_interpolation = config.position_interpolation  # resamples the weights, too
    return config, {option: value for option, value in options.items() if option not in names}
