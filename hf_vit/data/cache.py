"""Decoded images in memory, in a few large tensors.

Every tensor that a data loader process gets takes a file handle where processes are not forked (macOS, and Python from
3.14 on), so one tensor per image would exceed the limit of a process.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

LEAST_BLOCK = 64 << 20  # bytes
ALIGNMENT = 8  # bytes, so that every dtype can begin at an offset
DTYPES = (torch.uint8, torch.float32)  # of levels, as `preprocess` returns them


class CachedImages:
    """Images `[C, H, W]` by position; `None` for one that could not be read.

    Args:
        images: What to copy.
        device: Where to.
        limit: Bytes that they may take; more raise `MemoryError`.
    """

    def __init__(self, images: Iterable[Tensor | None], device: torch.device, limit: float = math.inf) -> None:
        # Bytes of many images each: a new block has an eighth of all bytes so far, so that there are few.
        self.blocks: list[Tensor] = []
        self.nbytes = 0
        # Of every image its block, offset, dtype, shape and strides; the block of no image is -1.
        places: list[list[int]] = []
        used = size = 0  # of the last block
        for image in images:
            if image is None:
                places.append([-1] * 9)
                continue
            number = _aligned(image.nbytes)
            self.nbytes += image.nbytes
            if self.nbytes > limit:
                raise MemoryError
            if used + number > size:
                self._trim(used)
                used, size = 0, max(LEAST_BLOCK, _aligned(self.nbytes // 8), number)
                self.blocks.append(torch.empty(size, dtype=torch.uint8, device=device))
            # Strides stay as they are: torchvision is faster where the channels come last.
            strides = torch.empty_like(image, device="meta").stride()
            places.append([len(self.blocks) - 1, used, DTYPES.index(image.dtype), *image.shape, *strides])
            self._at(places[-1]).copy_(image)
            used += number
        self._trim(used)
        self.places = torch.tensor(places, dtype=torch.int64).view(-1, 9)  # [N, 9]

    def _trim(self, used: int) -> None:
        """Give up what the last block does not use."""
        if self.blocks:
            self.blocks[-1] = self.blocks[-1][:used].clone()

    def _at(self, place: list[int]) -> Tensor:
        block, offset, dtype, *layout = place
        values = self.blocks[block].view(DTYPES[dtype])
        return values.as_strided(layout[:3], layout[3:], offset // values.itemsize)

    @property
    def shapes(self) -> Tensor:
        """The shapes of the images, `[N, 3]`; zeros where there is none."""
        return self.places[:, 3:6].clamp(min=0)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Tensor | None:
        place = self.places[index].tolist()
        return None if place[0] < 0 else self._at(place)


def _aligned(number: int) -> int:
    return -(-number // ALIGNMENT) * ALIGNMENT
