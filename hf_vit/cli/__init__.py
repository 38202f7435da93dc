"""The command line `hf-vit`."""

from ..system.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(__name__, {"main": ["app"]})
