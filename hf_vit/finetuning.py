"""Loading a model for fine-tuning: a module of version 0.1, whose names have moved. Deprecated since 0.2."""

from .system.lazy import moved_exports

__getattr__, __dir__, __all__ = moved_exports(
    __name__,
    "hf_vit",
    {
        "checkpoints.models": ["fields_of_labels", "load_classifier", "load_for_masked_patches"],
        "training.trainer": ["add_lora"],
    },
)
