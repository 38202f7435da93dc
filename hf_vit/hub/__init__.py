"""Model cards, and uploads to the Hugging Face Hub."""

from ..system.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "card": ["write_card"],
        "folder": ["check_folder"],
        "upload": ["BackgroundPush", "push"],
    },
)
