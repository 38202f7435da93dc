"""The Vision Transformer (Dosovitskiy et al., 2021) as a plugin of the Hugging Face ecosystem.

Importing this package makes `AutoConfig`, `AutoModel`, `AutoModelForImageClassification`,
`AutoModelForMaskedImageModeling`, `AutoBackbone` and `AutoImageProcessor` know `model_type="hf_vit"`.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from .model.configuration_hf_vit import HFViTConfig
from .registration import register

if TYPE_CHECKING:
    from .model.dense_hf_vit import HFViTBackbone, HFViTForMaskedImageModeling
    from .model.image_processing_hf_vit import HFViTImageProcessor
    from .model.image_processing_pil_hf_vit import HFViTImageProcessorPil
    from .model.modeling_hf_vit import HFViTForImageClassification, HFViTModel
    from .prediction.pipeline import HFViTImageClassificationPipeline

try:
    __version__ = version("hf-vit")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+unknown"

# Imported at first use: model classes bring most of transformers with them.
_HOMES = {
    "HFViTModel": ".model.modeling_hf_vit",
    "HFViTForImageClassification": ".model.modeling_hf_vit",
    "HFViTForMaskedImageModeling": ".model.dense_hf_vit",
    "HFViTBackbone": ".model.dense_hf_vit",
    "HFViTImageProcessor": ".model.image_processing_hf_vit",
    "HFViTImageProcessorPil": ".model.image_processing_pil_hf_vit",
    "HFViTImageClassificationPipeline": ".prediction.pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


register()

__all__ = [
    "HFViTBackbone",
    "HFViTConfig",
    "HFViTForImageClassification",
    "HFViTForMaskedImageModeling",
    "HFViTImageClassificationPipeline",
    "HFViTImageProcessor",
    "HFViTImageProcessorPil",
    "HFViTModel",
    "__version__",
]
