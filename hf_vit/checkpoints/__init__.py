"""Checkpoints of every plain Vision Transformer, in and out.

A family is a file: a table of names, and how its config is read from tensors and the files beside them.
`open_checkpoint` finds the family by the tensors' names, never by the file's.
"""

from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint, Family, Options
from .diagnosis import explain
from .families import google, own, timm, transformers, vit_pytorch
from .files import Source, open_source
from .folder import write_checkpoint

FAMILIES = (own.FAMILY, google.FAMILY, transformers.FAMILY, timm.FAMILY, vit_pytorch.FAMILY)


def open_checkpoint(source: str | Path | Source, options: Options | None = None, **hub: Any) -> Checkpoint:
    """Understand a checkpoint of any family without reading its tensors.

    Args:
        source: A file, a folder, a name on the Hub, or a source that is open already.
        options: What the file does not say, and what shall come out other than it lies there.
        hub: How to look on the Hub: `revision`, `subfolder`, `token`, `cache_dir`, `local_files_only`, ...

    Raises:
        ValueError: If it is no checkpoint of a known family, is damaged, or leaves something open that an option must
            say; names the file, and the tensor or the option.
    """
    opened = source if isinstance(source, Source) else open_source(source, **hub)
    try:
        return Checkpoint(_family_of(opened), opened, options or Options())
    except AssertionError:
        raise
    except Exception as error:  # tensors and a config.json that contradict each other can fail in any way
        raise ValueError(explain(opened, error)) from error


def _family_of(source: Source) -> Family:
    for family in FAMILIES:
        if family.recognises(source):
            return family
    names = ", ".join(repr(name) for name in list(source.tensors)[:4])
    known = ", ".join(family.name for family in FAMILIES)
    raise ValueError(
        f"{source.name}: no Vision Transformer of a known family ({known}); it holds {len(source.tensors)} tensors: "
        f"{names}, ..."
    )


__all__ = ["FAMILIES", "Checkpoint", "Options", "Source", "open_checkpoint", "open_source", "write_checkpoint"]
