"""Register this package with transformers' Auto classes and pipelines without importing transformers or torch.

The Auto classes take classes, not names, and importing a model class imports torch and most of transformers (several
seconds). So an import hook waits for transformers' registries: importing one of them imports our classes, too, and
registers them. What is imported already is registered at once.
"""

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

CONFIG = f"{__package__}.model.configuration_hf_vit"
MODELS = f"{__package__}.model.modeling_hf_vit"
DENSE = f"{__package__}.model.dense_hf_vit"  # imports MODELS
SEGMENTATION = f"{__package__}.model.segmentation_hf_vit"  # imports DENSE
DETECTION = f"{__package__}.model.detection_hf_vit"  # imports DENSE
MULTI_TASK = f"{__package__}.model.multi_task_hf_vit"  # imports SEGMENTATION and DETECTION
PROCESSOR = f"{__package__}.model.image_processing_hf_vit"  # imports PIL_PROCESSOR
PIL_PROCESSOR = f"{__package__}.model.image_processing_pil_hf_vit"
PIPELINE = f"{__package__}.model.pipeline_hf_vit"
AUTO = "transformers.models.auto"


def register() -> None:
    """Register config, models, backbone, image processors and pipelines once transformers' registries are imported."""
    processor = PROCESSOR if find_spec("torchvision") else PIL_PROCESSOR
    ImportHook(
        [
            Registration(f"{AUTO}.configuration_auto", CONFIG, _register_config),
            # transformers may import this registry while it imports modeling_layers, which our models need.
            Registration(
                f"{AUTO}.modeling_auto",
                MULTI_TASK,
                _register_models,
                ("transformers.modeling_layers", MODELS, DENSE, DETECTION, SEGMENTATION),
            ),
            Registration(f"{AUTO}.image_processing_auto", processor, _register_processors, (PIL_PROCESSOR,)),
            Registration("transformers.pipelines", PIPELINE, _register_pipelines),
            Registration(MODELS, MODELS, _read_other_checkpoints),
        ]
    ).install()


def when_imported(module: str, act: Callable[[], None]) -> None:
    """Call a function as soon as a module is imported, which may be now."""
    waiting = [each for hook in sys.meta_path if _is_hook(hook) for each in hook.registrations]  # type: ignore[attr-defined]
    ImportHook([*waiting, Registration(module, module, act)]).install()


def _register_config() -> None:
    from transformers.models.auto.configuration_auto import AutoConfig

    from .model.configuration_hf_vit import HFViTConfig

    AutoConfig.register(HFViTConfig.model_type, HFViTConfig, exist_ok=True)
    HFViTConfig.custom_pipelines = {}  # `pipeline` requires trust for those, and none for registered ones


def _register_models() -> None:
    from transformers.models.auto import modeling_auto

    from .model import model_class
    from .model.configuration_hf_vit import CLASSES, MULTI_TASK, HFViTConfig

    for auto_class, reference in CLASSES.items():
        if auto_class != "AutoConfig":
            registered = model_class(reference.split(".")[1])
            if auto_class == "AutoModel":  # of several classes, the one that the config names as its architecture
                registered = (registered, model_class(MULTI_TASK.split(".")[1]))
            getattr(modeling_auto, auto_class).register(HFViTConfig, registered, exist_ok=True)
    _read_backbones_from_folders(modeling_auto.AutoBackbone)


def _read_backbones_from_folders(auto_backbone: Any) -> None:
    """Let `AutoBackbone.from_pretrained` read folders: transformers 5.24 looks for every name on the Hub only."""
    from_hub = auto_backbone.from_pretrained
    from_folder = super(auto_backbone.__mro__[1], auto_backbone).from_pretrained  # that of all Auto classes

    def from_pretrained(cls: type, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        read = from_folder if os.path.isdir(pretrained_model_name_or_path) else from_hub
        return read(pretrained_model_name_or_path, *args, **kwargs)

    auto_backbone.from_pretrained = classmethod(from_pretrained)


def _register_processors() -> None:
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    from .model.configuration_hf_vit import HFViTConfig

    classes = {"pil": sys.modules[PIL_PROCESSOR].HFViTImageProcessorPil}
    if PROCESSOR in sys.modules:
        classes["torchvision"] = sys.modules[PROCESSOR].HFViTImageProcessor
    AutoImageProcessor.register(HFViTConfig, image_processor_classes=classes, exist_ok=True)


def _register_pipelines() -> None:
    import transformers
    from transformers.pipelines import PIPELINE_REGISTRY

    from .model import pipeline_hf_vit
    from .model.configuration_hf_vit import PIPELINES

    for task, (name, auto_class) in PIPELINES.items():
        ours, entry = getattr(pipeline_hf_vit, name), PIPELINE_REGISTRY.supported_tasks.get(task)
        if entry is None:  # a task of ours
            PIPELINE_REGISTRY.register_pipeline(task, ours, getattr(transformers, auto_class), type="image")
        else:
            entry["impl"] = _choice_of_pipeline(ours, entry["impl"])


def _choice_of_pipeline(ours: Any, registered: Any) -> type:
    """Return a class that constructs `ours` for our models, and for all others the pipeline that was registered."""
    if isinstance(registered, str):  # transformers 5.24 registers names of classes
        module, _, name = registered.rpartition(".")
        registered = getattr(import_module(module), name)

    def construct(cls: type, *args: Any, **kwargs: Any) -> Any:
        model = kwargs["model"] if "model" in kwargs else args[0]
        is_ours = model.config.model_type == "hf_vit"
        return (ours if is_ours else registered)(*args, **kwargs)  # no instance of `cls`: not initialized again

    return type(registered.__name__, (registered,), {"__new__": construct, "__doc__": registered.__doc__})


def _read_other_checkpoints() -> None:
    """Let `from_pretrained` read checkpoints of other libraries, which the model's own files know nothing about."""

    def read_foreign(*arguments: Any) -> Any:
        from .checkpoints.from_pretrained import read_foreign

        return read_foreign(*arguments)

    sys.modules[MODELS].HFViTPreTrainedModel.checkpoint_reader = staticmethod(read_foreign)


class Registration:
    """A function to call once a registry and our classes are both imported.

    Args:
        registry: Module of transformers; importing it imports our classes.
        ours: Module of our classes.
        act: What to call then.
        needed: Modules that `ours` or `act` imports. While one of them is being imported, `ours` waits for it.
    """

    def __init__(self, registry: str, ours: str, act: Callable[[], None], needed: Sequence[str] = ()) -> None:
        self.registry = registry
        self.ours = ours
        self.act = act
        self.needed = {*needed} - {ours}
        self.missing = {registry, ours, *needed}

    def arrive(self, name: str) -> bool:
        """Take note that a module is imported; return whether that completes the registration."""
        self.missing.discard(name)
        if self.ours in self.missing and self.registry not in self.missing:
            if not self.needed & self.missing & {*sys.modules}:
                import_module(self.ours)  # calls `arrive` again at its end
            return False
        if self.missing & {self.registry, self.ours}:
            return False
        self.act()
        return True


class ImportHook:
    """Find modules as the other finders do, and notify registrations when these modules are imported.

    It forgets a registration once it is complete, and removes itself after the last one.
    """

    def __init__(self, registrations: Sequence[Registration]) -> None:
        self.registrations = list(registrations)

    def install(self) -> None:
        """Start to watch imports; modules that are imported already count at once."""
        # A new list: another thread may be iterating over the old one, and would skip a finder.
        sys.meta_path = [self, *(finder for finder in sys.meta_path if not _is_hook(finder))]
        for name in {name for registration in self.registrations for name in registration.missing} & {*sys.modules}:
            import_module(name)  # waits for another thread that is importing it
            self.arrive(name)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not any(fullname in registration.missing for registration in self.registrations):
            return None
        for finder in sys.meta_path:
            if not _is_hook(finder) and (spec := finder.find_spec(fullname, path, target)) is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _TellingLoader(spec.loader, self)  # type: ignore[assignment]
                return spec
        return None

    def arrive(self, name: str) -> None:
        """Notify the registrations that wait for a module that it is imported."""
        for registration in [each for each in self.registrations if name in each.missing]:
            if registration.arrive(name):
                self.registrations = [each for each in self.registrations if each is not registration]
        if not self.registrations:
            sys.meta_path = [finder for finder in sys.meta_path if finder is not self]


def _is_hook(finder: Any) -> bool:
    """Return whether a finder is an `ImportHook`, also one of a copy of this package that was imported before."""
    return (type(finder).__module__, type(finder).__name__) == (__name__, ImportHook.__name__)


class _TellingLoader:
    """Load a module by its own loader, then tell the hook. No trace of this loader stays in the module."""

    def __init__(self, loader: Any, hook: ImportHook) -> None:
        self.loader = loader
        self.hook = hook

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        self.hook.arrive(module.__name__)
