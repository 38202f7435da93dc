"""Choose the best classifier that a data set and a number of minutes allow: the steps of `hf-vit fit`."""

from ...system.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "embedding": ["Embeddings", "Encoder", "embed"],
        "fit": ["fit"],
        "heads": ["FittedHead", "LinearHead", "fit_head"],
        "race": ["Candidate", "race"],
    },
)
