"""This package's own folders and state dicts: names are the same; sizes and head can be changed as in every family."""

import json
from typing import Any

from ...model.configuration_hf_vit import CLASSES, HFViTConfig
from ...model.heads_hf_vit import config_of_head
from ...model.multi_task_hf_vit import HEADS
from ...model.repository_hf_vit import warn_of_other_code
from ..checkpoint import ENCODER, MULTI_TASK, Family, Options, Reading, check_depth, parameters_of, processor_beside
from ..files import Source
from ..layouts import Row
from ..pickles import OWN_CONFIG

ARCHITECTURES = [
    *(place.split(".")[1] for auto_class, place in CLASSES.items() if auto_class != "AutoConfig"),
    MULTI_TASK,
]


NAMES = {"embeddings.patch_embeddings.projection.weight", "layers.0.attention.qkv.weight"}


def _recognises(source: Source) -> bool:
    names = {name.removeprefix("vit.") for name in source.tensors}
    return source.config.get("model_type", HFViTConfig.model_type) == HFViTConfig.model_type and (
        "model_type" in source.config or OWN_CONFIG in names or names >= NAMES
    )


def _config(source: Source) -> dict[str, Any]:
    """Return the content of `config.json`, or of the metadata that our models add to their `state_dict()`."""
    if source.config.get("model_type") == HFViTConfig.model_type:
        return source.config
    if OWN_CONFIG not in source.tensors:
        raise ValueError(
            f"{source.name}: it holds weights of an hf_vit model without the config: put the model's "
            "config.json beside the file."
        )
    return json.loads(bytes(source.tensors[OWN_CONFIG].read().tolist()))


def _read(source: Source, options: Options) -> Reading:
    fields = _config(source)
    config = HFViTConfig.from_dict(dict(fields))
    architecture = (config.architectures or [ENCODER])[0]
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{source.name}: config.json names the architecture {architecture!r}, expected one of "
            f"{', '.join(ARCHITECTURES)}."
        )
    check_depth(source, config)
    if source.folder is not None:
        warn_of_other_code(source.folder)
    places: dict[str, str] = {}  # of parameters that have other names in the file
    if options.head is not None:
        fields, architecture = _head(source.name, config, architecture, options.head)
        config, prefix = HFViTConfig.from_dict(dict(fields)), f"heads.{options.head}."
        names = (name.removeprefix(prefix) for name in source.tensors if name.startswith(prefix))
        places = {name: prefix + name for name in names} if architecture != MULTI_TASK else {}
    short = {name.removeprefix("vit."): name for name in parameters_of(architecture, config)}
    table = [Row(ours, places.get(ours, name)) for ours, name in short.items()]
    left_out = [rf"(.*\.)?{OWN_CONFIG}", *([r"heads\..*", r"vit\.pooler\..*"] if options.head is not None else [])]
    return Reading(fields, architecture, table, left_out, processor=processor_beside(source))


def no_head(source: str, name: str) -> ValueError:
    """Return the error for a head's name that is given for a model without named heads."""
    return ValueError(f"{source} is not a model with several heads, so it has no head {name!r}: do not name a head.")


def _head(source: str, config: HFViTConfig, architecture: str, name: str) -> tuple[dict[str, Any], str]:
    """Return the config fields and the architecture of a model with one head of a multi-task model."""
    heads = config.task_heads if architecture == MULTI_TASK else None
    if heads is None:
        raise no_head(source, name)
    if name not in heads:
        raise ValueError(f"{source} has no head {name!r}: choose one of {', '.join(heads)}.")
    single = HEADS[heads[name]["task"]].model_class
    if single is None:  # a multi-task model of this head alone
        return {**config.to_dict(), "task_heads": {name: heads[name]}}, MULTI_TASK
    return {**config_of_head(config, heads[name]).to_dict(), "architectures": [single.__name__]}, single.__name__


FAMILY = Family("hf_vit", _recognises, _read)
