"""A model on a web page, and that page as a Space of the Hub: `hf-vit demo`. Needs the extra `demo`."""

from ..system.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "exhibit": ["Exhibit"],
        "serving": ["serve"],
        "space": ["export_space"],
    },
)
