"""This package's own folders: nothing to convert, but sizes and heads can be changed as for all others."""

from ..model.configuration_hf_vit import HFViTConfig
from .checkpoint import ENCODER, Family, Options, Reading, parameters_of, processor_beside
from .files import Source
from .layouts import Row


def _recognises(source: Source) -> bool:
    return source.config.get("model_type") == HFViTConfig.model_type


def _read(source: Source, options: Options) -> Reading:
    architecture = (source.config.get("architectures") or [ENCODER])[0]
    names = parameters_of(architecture, HFViTConfig.from_dict(dict(source.config)))
    table = [Row(name.removeprefix("vit."), name) for name in names]
    return Reading(source.config, architecture, table, processor=processor_beside(source))


FAMILY = Family("hf_vit", _recognises, _read)
