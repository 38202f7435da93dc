"""Read checkpoints of every plain Vision Transformer, and write them for other libraries.

`open_checkpoint` recognizes the layout of a checkpoint by the names of its tensors, never by the name of its file.
"""

from ..system.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "opening": ["FAMILIES", "open_checkpoint"],
        "checkpoint": ["Checkpoint", "Options"],
        "files": ["Source", "open_source"],
        "families.names_template": ["names_template"],
        "folder": ["write_checkpoint"],
        "export": ["TARGETS", "export_checkpoint"],
        "models": ["load", "load_classifier", "load_for_masked_patches"],
    },
)
