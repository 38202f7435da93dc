"""This package's own folders and state dicts. Names are the same; sizes and head can change as for every family."""

import json
from typing import Any

from ...model.configuration_hf_vit import CLASSES, HFViTConfig
from ...model.repository_hf_vit import warn_of_other_code
from ..checkpoint import ENCODER, Family, Options, Reading, check_depth, parameters_of, processor_beside
from ..files import Source
from ..layouts import Row
from ..pickles import OWN_CONFIG

ARCHITECTURES = [place.split(".")[1] for auto_class, place in CLASSES.items() if auto_class != "AutoConfig"]


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
    names = parameters_of(architecture, config)
    table = [Row(name.removeprefix("vit."), name) for name in names]
    return Reading(fields, architecture, table, (rf"(.*\.)?{OWN_CONFIG}",), processor=processor_beside(source))


FAMILY = Family("hf_vit", _recognises, _read)
