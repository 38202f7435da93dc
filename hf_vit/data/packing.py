"""Pack a data set for training: images reduced once, in parquet files that `--data` reads.

A model of 224 pixels needs none of the pixels of large photographs, and decoding these limits the speed of training on
a GPU. Reduced JPEGs decode many times faster.
"""

import io
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage
from torch import Tensor

from ..model.image_reading_hf_vit import upright
from ..system.disk import check_output_folder, new_folder
from ..system.machine import cores
from ..system.texts import counted, shortened
from .images import NO_IMAGE, name_of, read_stored, stored_source
from .opening import IMAGE_COLUMNS, as_stored, choose, image_columns, open_source

QUALITY = 95  # of JPEG; 4:4:4, since subsampled colours would be lost a second time
ROWS_PER_FILE, AT_ONCE = 2048, 64
REDUCED, UNCHANGED, UNREADABLE = "reduced", "unchanged", "unreadable"


@dataclass
class Packed:
    """What was packed.

    Attributes:
        splits: Number of images by split.
        images: Number of images by what was done: `REDUCED`, `UNCHANGED`, or `UNREADABLE`, which are left out.
        bytes_before, bytes_after: Bytes of the encoded images that were kept.
        unreadable: Names of unreadable images.
        notes: Sentences about the data.
    """

    splits: dict[str, int] = field(default_factory=dict)
    images: Counter[str] = field(default_factory=Counter)
    bytes_before: int = 0
    bytes_after: int = 0
    unreadable: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Return the result as sentences."""
        splits = ", ".join(f"{number:,} {name}" for name, number in self.splits.items())
        sizes = f"{self.bytes_before / 2**20:,.1f} MiB before, {self.bytes_after / 2**20:,.1f} MiB now"
        number = self.images[REDUCED] + self.images[UNCHANGED]
        lines = [f"{counted(number, 'image')} ({splits}), {self.images[REDUCED]:,} of them reduced; {sizes}."]
        if self.unreadable:
            broken = counted(len(self.unreadable), "unreadable image")
            lines.append(f"Skipped {broken}: {shortened(self.unreadable)}.")
        return [*self.notes, *lines]


def pack(
    source: str,
    folder: Path,
    shorter_side: int,
    image_column: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Packed:
    """Write all splits of a data set as parquet files, with images whose shorter side is at most `shorter_side`.

    Photographs that are larger are reduced as in training with the recipe's `shorter_side`, and become JPEGs. All
    others are stored as they are: images that are small enough, and those that a JPEG cannot hold, such as images with
    transparency, 16 bits or further channels. Other columns are not changed.

    Args:
        source: See `load_data`.
        folder: Folder to write, which must not exist or be empty.
        shorter_side: Largest length of the shorter side in pixels.
        image_column: Image column; the only one, or the one with a usual name, if not given.
        say: Prints a line for each split.

    Raises:
        ValueError: If the source is not a data set, or no image of a split can be read.
        OSError: If a file cannot be written.
    """
    check_output_folder(folder, is_ours=False, sources=source, option="OUT")
    opened = open_source(source, streaming=False, image_column=image_column)
    packed = Packed(notes=opened.notes)
    with new_folder(folder) as unfinished:
        for name, split in opened.splits.items():
            column = choose("image_column", image_columns(split.features), image_column, IMAGE_COLUMNS)
            say(f"{name}: {counted(len(split), 'image')}")
            _pack_split(name, as_stored(split, (column, None)), column, unfinished, shorter_side, packed)
    return packed


def _pack_split(name: str, split: Any, column: str, folder: Path, shorter_side: int, packed: Packed) -> None:
    from datasets import Image

    files = max(1, math.ceil(len(split) / ROWS_PER_FILE))
    packed.splits[name] = 0
    for number in range(files):
        first = number * ROWS_PER_FILE
        rows = split.select(range(first, min(first + ROWS_PER_FILE, len(split))))
        kept, images = [], []
        for index, (before, (what, image, size)) in enumerate(_all_reduced(rows, column, shorter_side)):
            packed.images[what] += 1
            if image is None:
                packed.unreadable.append(before or f"image {first + index} of {name}")
                continue
            packed.bytes_before += size
            packed.bytes_after += len(image["bytes"])
            kept.append(index)
            images.append(image)
        packed.splits[name] += len(images)
        new = f"{column} packed"  # before the old column goes: a table without columns has no rows
        table = rows.select(kept).add_column(new, images, feature=Image())
        table = table.remove_columns(column).rename_column(new, column)
        path = folder / f"{name}-{number:05d}-of-{files:05d}.parquet"
        # A group of rows is read at once, so it is small.
        table.select_columns(rows.column_names).to_parquet(path, batch_size=AT_ONCE)
    if not packed.splits[name]:
        raise ValueError(f"No image of the split {name} can be read: {shortened(packed.unreadable)}.")


def _all_reduced(rows: Any, column: str, shorter_side: int) -> Iterator[tuple[str, Any]]:
    """Yield the name of each image, and what `reduced` returns for it."""
    with ThreadPoolExecutor(cores()) as threads:  # decoding, resizing and encoding release the GIL
        for first in range(0, len(rows), AT_ONCE):  # large images fill the memory
            stored = [each or NO_IMAGE for each in rows[first : first + AT_ONCE][column]]
            results = threads.map(partial(reduced, shorter_side=shorter_side), stored)
            yield from zip(map(name_of, stored), results, strict=True)


def reduced(stored: dict[str, Any], shorter_side: int) -> tuple[str, dict[str, Any] | None, int]:
    """Return what was done with an image, the image to store, `None` if it is unreadable, and its bytes before."""
    try:
        source = stored_source(stored)
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
        name = os.path.basename(stored["path"] or "") or None
        image = read_stored({"bytes": data, "path": None})
        photograph = _photograph(image)
    except (ValueError, OSError):
        return UNREADABLE, None, 0
    unchanged = UNCHANGED, {"bytes": data, "path": name}, len(data)
    if photograph is None or min(photograph.size) <= shorter_side:
        return unchanged
    encoded = io.BytesIO()
    _resized(photograph, shorter_side).save(encoded, "JPEG", quality=QUALITY, subsampling=0)
    path = None if name is None else f"{Path(name).stem}.jpg"
    return REDUCED, {"bytes": encoded.getvalue(), "path": path}, len(data)


def _photograph(image: PILImage.Image | Tensor) -> PILImage.Image | None:
    """Return an upright image of 8 bits in color or gray; `None` for one that a JPEG does not hold."""
    if isinstance(image, Tensor):
        if image.element_size() != 1 or image.shape[0] not in (1, 3):
            return None
        pixels = image.permute(1, 2, 0).numpy()
        return PILImage.fromarray(np.ascontiguousarray(pixels[..., 0] if len(image) == 1 else pixels))
    image = upright(image)
    return image if image.mode in ("RGB", "L") and "transparency" not in image.info else None


def _resized(image: PILImage.Image, shorter_side: int) -> PILImage.Image:
    """Return an image of a shorter side, filtered as in training."""
    from torchvision.transforms.v2 import functional as tvF

    return tvF.resize(image, [shorter_side], antialias=True)
