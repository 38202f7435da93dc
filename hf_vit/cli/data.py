"""Commands for data sets: pack."""

from pathlib import Path
from typing import Annotated

import typer

from ..system.places import check_exist
from ..system.texts import hanging
from .endings import echo


def pack(
    source: Annotated[
        str,
        typer.Argument(metavar="DATA", help="Images: folder, table, archive, parquet, or a name on the Hub."),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    shorter_side: Annotated[int, typer.Option(min=1, help="Pixels to which the shorter side is reduced.")] = 256,
    image_column: Annotated[str | None, typer.Option(help="Image column, if ambiguous.")] = None,
) -> None:
    """Reduce the images of a data set once, for faster training.

    Writes parquet files of all splits, with labels and other columns as they are. Larger photographs become JPEGs of
    quality 95; small images, and images with transparency, 16 bits or more channels, are stored unchanged. Unreadable
    images are skipped and named.

    Example: hf-vit data pack photos/ photos-256 --shorter-side 256
    """
    check_exist([source])
    from ..data.packing import pack

    for line in pack(source, out, shorter_side, image_column, echo).lines():
        echo("\n".join(hanging("", line)))
    echo(f"Wrote {out}. To train on it:  hf-vit train {out}")
