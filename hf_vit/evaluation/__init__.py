"""Accuracy, calibration, speed and feature quality of a model on labeled images."""

from ..system.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "evaluate": ["evaluate_checkpoint"],
        "metrics": ["classify", "evaluate_images", "extract_features"],
        "results": ["ImageResults", "LabelResults", "Predictions", "TargetResults"],
        "calibration": ["fit_temperature"],
        "flops": ["count_flops", "count_parameters"],
        "probing": ["few_shot", "knn", "linear_probe"],
    },
)
