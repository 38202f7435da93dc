"""Read and write the checkpoints of every library that has a plain Vision Transformer."""

from .checkpoint import Checkpoint, Options
from .files import Source, open_source
from .folder import write_checkpoint
from .opening import FAMILIES, open_checkpoint

__all__ = ["FAMILIES", "Checkpoint", "Options", "Source", "open_checkpoint", "open_source", "write_checkpoint"]
