"""Open a checkpoint of any known family, which is found by the names of its tensors, never by the name of the file."""

import shlex
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint, Family, Options
from .diagnosis import explain
from .families import (
    google,
    mmpretrain,
    named,
    open_clip,
    own,
    perception,
    self_supervised,
    timm,
    torchvision,
    transformers,
    tutorials,
    vit_pytorch,
)
from .families.timm_facts import with_config_of_open_clip
from .files import Source, open_source
from .wrappers import unwrapped, with_head

FAMILIES = (
    own.FAMILY,
    google.FAMILY,
    torchvision.FAMILY,
    perception.FAMILY,
    open_clip.FAMILY,
    mmpretrain.FAMILY,
    *tutorials.FAMILIES,
    transformers.FAMILY,
    *self_supervised.FAMILIES,
    timm.FAMILY,
    vit_pytorch.FAMILY,
    tutorials.TRANSFORMER_ENCODER,
)


def open_checkpoint(source: str | Path | Source, options: Options | None = None, **hub: Any) -> Checkpoint:
    """Identify a checkpoint and check its names and shapes, without reading its tensors.

    Args:
        source: A file, a folder, a name on the Hub, or an open source.
        options: What the file does not state, and changes to sizes or the head.
        hub: Options of the Hub: `revision`, `subfolder`, `token`, `cache_dir`, `local_files_only`, ...

    Raises:
        ValueError: If the source is not a checkpoint of a known family, is corrupt, or needs an option that is not
            given. The message names the file, and the tensor or the option.
    """
    options = options or Options()
    opened = source if isinstance(source, Source) else open_source(source, **hub)
    try:
        opened = unwrapped(with_config_of_open_clip(opened), is_known, options.weights)
        if options.names is not None:
            return Checkpoint(named.FAMILY, opened, options)
        family = _family_of(opened)
        if options.head is not None and family is not own.FAMILY:
            raise own.no_head(opened.name, options.head)
        if family.heads:
            opened = with_head(opened, family.heads, family.head_inputs)
        return Checkpoint(family, opened, options)
    except AssertionError:
        raise
    except Exception as error:  # tensors that contradict config.json can fail in any way
        raise ValueError(options.spelled(explain(opened, error), is_error=True)) from error


def is_known(source: Source) -> bool:
    """Return whether any family recognizes a source."""
    return any(family.recognises(source) for family in FAMILIES)


def _family_of(source: Source) -> Family:
    for family in FAMILIES:
        if family.recognises(source):
            return family
    names = ", ".join(map(repr, list(source.tensors)[:4]))
    if "model_type" in source.config:
        raise ValueError(
            f"{source.name}: config.json states a model of type {source.config['model_type']!r}, which is not "
            f"supported. It holds {len(source.tensors)} tensors: {names}, ..."
        )
    raise ValueError(
        f"{source.name}: not a Vision Transformer of a known family. It holds {len(source.tensors)} tensors: {names}, "
        "... For a ViT with other names, write a table of them to fill in: hf-vit inspect "
        f"{shlex.quote(source.name)} --names-template names.yaml"
    )
