"""Predictions for many images, in memory or as a table on disk."""

from ..system.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "predict": ["predict_each", "predict_to_file"],
        "predictor": ["Prediction", "Predictor"],
        "shards": ["Settings"],
    },
)
