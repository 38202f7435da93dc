"""The model. The files of this folder are copied, as they are, into every pushed repository; this one is not."""

from importlib import import_module
from typing import Any

from .configuration_hf_vit import CLASSES


def model_class(name: str) -> Any:
    """Return the model class of a name, such as `HFViTBackbone`."""
    (reference,) = {place for place in CLASSES.values() if place.endswith(f".{name}")}
    return getattr(import_module(f".{reference.split('.')[0]}", __name__), name)
