"""Labels of a model and of data: a module of version 0.1, whose names have moved. Deprecated since 0.2."""

from .system.lazy import moved_exports

__getattr__, __dir__, __all__ = moved_exports(
    __name__,
    "hf_vit",
    {"evaluation.labels": ["match_labels"]},
)
