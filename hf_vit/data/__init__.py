"""From the name of a data set to a batch."""

from ..system.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "augmentation": ["AUGMENTATIONS", "BatchMixer", "build_augmentation"],
        "folders": ["image_endings", "is_image_file"],
        "images": ["EvaluationImages", "TrainingImages", "stored_rows"],
        "labelled": ["ImageData", "load_data", "split_evenly"],
        "loaders": ["evaluation_loader", "training_loader"],
        "opening": ["as_stored", "open_splits"],
        "sources": ["Sources"],
    },
)
