"""The model. All other files of this folder are copied into every saved repository."""

from importlib import import_module
from typing import Any

from .configuration_hf_vit import CLASSES, MULTI_TASK


def model_class(name: str) -> Any:
    """Return the model class with this name, such as `HFViTBackbone`."""
    (reference,) = {reference for reference in (*CLASSES.values(), MULTI_TASK) if reference.endswith(f".{name}")}
    return getattr(import_module(f".{reference.split('.')[0]}", __name__), name)
