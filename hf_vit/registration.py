"""Make transformers' Auto classes know this package, without importing what nobody has asked for.

The Auto classes take classes, not names, and importing a model class imports most of transformers and torchvision
(about four seconds). So models and processors are registered at the moment when transformers' own registry of them is
imported: at once if it is imported already.
"""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from .model.configuration_hf_vit import CLASSES, HFViTConfig

MODELS = f"{__package__}.model.modeling_hf_vit"
DENSE = f"{__package__}.model.dense_hf_vit"
LAYERS = "transformers.modeling_layers"


def register() -> None:
    """Register config, models, backbone and image processors with the Auto classes."""
    from transformers.models.auto.configuration_auto import AutoConfig

    AutoConfig.register(HFViTConfig.model_type, HFViTConfig, exist_ok=True)
    for module in (MODELS, DENSE):  # each registers its own classes: either may be imported first
        after_import(module, _register_models)
    after_import("transformers.models.auto.modeling_auto", _import_models)
    after_import(LAYERS, _import_models)
    after_import("transformers.models.auto.image_processing_auto", _register_image_processors)


def _import_models(module: ModuleType) -> None:
    if MODELS in sys.modules:  # they are being imported, and the registry with them
        return
    # The registry may have been imported from the midst of what our models need: they wait for the end of that.
    if LAYERS not in sys.modules or hasattr(sys.modules[LAYERS], "GradientCheckpointingLayer"):
        import_module(MODELS)
        if DENSE not in sys.modules:  # else it is being imported, and the models with it
            import_module(DENSE)


def _register_models(module: ModuleType) -> None:
    from transformers.models.auto import modeling_auto

    if module.__name__ == MODELS:
        module.HFViTPreTrainedModel.checkpoint_reader = staticmethod(_read_foreign)
    for auto_class, reference in CLASSES.items():
        file, name = reference.split(".")
        if auto_class != "AutoConfig" and module.__name__.endswith(f".{file}"):
            getattr(modeling_auto, auto_class).register(HFViTConfig, getattr(module, name), exist_ok=True)


def _read_foreign(*arguments: Any) -> Any:
    from .checkpoints.from_pretrained import read_foreign

    return read_foreign(*arguments)


def _register_image_processors(registry: ModuleType) -> None:
    from transformers.utils import is_torchvision_available

    from .model.image_processing_pil_hf_vit import HFViTImageProcessorPil

    classes: dict[str, type] = {"pil": HFViTImageProcessorPil}
    if is_torchvision_available():
        from .model.image_processing_hf_vit import HFViTImageProcessor

        classes["torchvision"] = HFViTImageProcessor
    registry.AutoImageProcessor.register(HFViTConfig, image_processor_classes=classes, exist_ok=True)


def after_import(name: str, function: Callable[[ModuleType], None]) -> None:
    """Call `function` with module `name`: now if it is imported, else as soon as it is."""
    if name in sys.modules:
        function(sys.modules[name])
    else:
        sys.meta_path.insert(0, _AfterImport(name, function))


class _AfterImport(MetaPathFinder):
    """Find one module as Python would, and have a function called behind its execution."""

    def __init__(self, name: str, function: Callable[[ModuleType], None]) -> None:
        self.name = name
        self.function = function

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_then_call(module: ModuleType) -> None:
            execute(module)
            self.function(module)

        spec.loader.exec_module = execute_then_call  # type: ignore[method-assign]
        return spec
