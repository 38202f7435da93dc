"""This package's own folders. Names are the same; sizes and head can be changed as for every family."""

from ...model.configuration_hf_vit import CLASSES, HFViTConfig
from ...model.repository_hf_vit import warn_of_other_code
from ..checkpoint import ENCODER, Family, Options, Reading, check_depth, parameters_of, processor_beside
from ..files import Source
from ..layouts import Row

ARCHITECTURES = [place.split(".")[1] for auto_class, place in CLASSES.items() if auto_class != "AutoConfig"]


def _recognises(source: Source) -> bool:
    return source.config.get("model_type") == HFViTConfig.model_type


def _read(source: Source, options: Options) -> Reading:
    config = HFViTConfig.from_dict(dict(source.config))
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
    return Reading(source.config, architecture, table, processor=processor_beside(source))


FAMILY = Family("hf_vit", _recognises, _read)
