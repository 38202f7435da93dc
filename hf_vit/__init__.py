"""The Vision Transformer (Dosovitskiy et al., 2021) as a plugin of the Hugging Face ecosystem.

Importing this package makes `AutoConfig`, `AutoModel`, `AutoModelForImageClassification`,
`AutoModelForMaskedImageModeling`, `AutoModelForSemanticSegmentation`, `AutoModelForObjectDetection`, `AutoBackbone`,
`AutoImageProcessor` and `pipeline` recognize `model_type="hf_vit"`. Neither torch nor transformers is imported before
it is needed.
"""

from typing import TYPE_CHECKING, Any

from .registration import register
from .system.lazy import lazy_exports

if TYPE_CHECKING:
    from .model.configuration_hf_vit import HFViTConfig
    from .model.dense_hf_vit import HFViTBackbone, HFViTForMaskedImageModeling
    from .model.detection_hf_vit import HFViTForObjectDetection
    from .model.image_processing_hf_vit import HFViTImageProcessor
    from .model.image_processing_pil_hf_vit import HFViTImageProcessorPil
    from .model.modeling_hf_vit import HFViTForImageClassification, HFViTModel
    from .model.multi_task_hf_vit import HFViTForMultiTask
    from .model.pipeline_hf_vit import (
        HFViTImageClassificationPipeline,
        HFViTImageFeatureExtractionPipeline,
        HFViTImageSegmentationPipeline,
        HFViTMultiTaskPipeline,
        HFViTObjectDetectionPipeline,
    )
    from .model.segmentation_hf_vit import HFViTForSemanticSegmentation
    from .prediction.search import FeatureIndex
    from .training.auditing import audit
    from .training.fitting.fit import fit
    from .training.multi_task.run import train_heads
    from .training.trained import TrainedModel, train

    __version__: str

__all__ = [
    "FeatureIndex",
    "HFViTBackbone",
    "HFViTConfig",
    "HFViTForImageClassification",
    "HFViTForMaskedImageModeling",
    "HFViTForMultiTask",
    "HFViTForObjectDetection",
    "HFViTForSemanticSegmentation",
    "HFViTImageClassificationPipeline",
    "HFViTImageFeatureExtractionPipeline",
    "HFViTImageProcessor",
    "HFViTImageProcessorPil",
    "HFViTImageSegmentationPipeline",
    "HFViTModel",
    "HFViTMultiTaskPipeline",
    "HFViTObjectDetectionPipeline",
    "TrainedModel",
    "__version__",
    "audit",
    "fit",
    "train",
    "train_heads",
]

_load = lazy_exports(
    __name__,
    {
        "model.configuration_hf_vit": ["HFViTConfig"],
        "model.modeling_hf_vit": ["HFViTForImageClassification", "HFViTModel"],
        "model.dense_hf_vit": ["HFViTBackbone", "HFViTForMaskedImageModeling"],
        "model.detection_hf_vit": ["HFViTForObjectDetection"],
        "model.image_processing_hf_vit": ["HFViTImageProcessor"],
        "model.image_processing_pil_hf_vit": ["HFViTImageProcessorPil"],
        "model.pipeline_hf_vit": [
            "HFViTImageClassificationPipeline",
            "HFViTImageFeatureExtractionPipeline",
            "HFViTImageSegmentationPipeline",
            "HFViTMultiTaskPipeline",
            "HFViTObjectDetectionPipeline",
        ],
        "model.multi_task_hf_vit": ["HFViTForMultiTask"],
        "model.segmentation_hf_vit": ["HFViTForSemanticSegmentation"],
        "prediction.search": ["FeatureIndex"],
        "training.auditing": ["audit"],
        "training.fitting.fit": ["fit"],
        "training.multi_task.run": ["train_heads"],
        "training.trained": ["TrainedModel", "train"],
    },
)[0]


def __getattr__(name: str) -> Any:
    if name != "__version__":
        return _load(name)
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("hf-vit")
    except PackageNotFoundError:  # a source tree on the path that is not installed
        return "0+unknown"


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register()
