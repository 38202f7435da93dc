"""A model behind HTTP: `hf-vit serve`. Needs the extra `serve`."""

from ..system.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "app": ["build_app"],
        "engine": ["Engine"],
        "running": ["serve"],
    },
)
