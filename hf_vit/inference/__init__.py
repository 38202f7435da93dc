"""Faster inference with the same outputs."""

from ..system.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "optimize": ["PackedLinear", "optimize_for_inference"],
        "token_merging": ["merge_tokens"],
        "windows": ["sliding_window_logits"],
    },
)
