"""Labels of a model and of data: module of version 0.1, whose names have moved. Deprecated since 0.2."""

import warnings

from .system.lazy import lazy_exports

MOVED = {"evaluation.labels": ["match_labels"]}

PLACES = " and ".join(f"hf_vit.{module}" for module in MOVED)
warnings.warn(f"{__name__} is deprecated: import its names from {PLACES}.", FutureWarning, stacklevel=2)

__getattr__, __dir__, __all__ = lazy_exports("hf_vit", MOVED)
