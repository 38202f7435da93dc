"""Answers of teachers on disk, computed once for a number of augmented views of every training image.

The augmentation of an image follows from its seed, so epoch `e` sees view `e % teacher_views` again, and the stored
answers fit it. A file holds the answers for up to `CHUNK` images in one view, in half precision. It gets its name once
it is complete. The folder's name is a digest of all that decides the answers.
"""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..data.images import NO_IMAGE, Visit, collate, image_digest
from ..system.disk import new_file, sync, writing
from ..system.progress import progress_bar
from .recipe import TrainConfig
from .teachers import Answers, Teachers

CHUNK = 1024  # images per file
BATCH = 32
# Fields of a recipe that decide what a view shows.
OF_A_VIEW = (
    *("seed", "image_size", "augmentation", "smallest_crop", "color_jitter", "erasing", "shorter_side"),
    *("teacher_channels", "teacher_image_size"),
)
NAME = "answers"


class TeacherCache:
    """The stored answers for the training images of a run.

    Args:
        config: The recipe.
        teachers: The teachers.
        run: The run, with its images.
        grid: (rows, columns) of the student's patches.

    Raises:
        ValueError: If views cannot be repeated, or the disk is too small.
    """

    def __init__(self, config: TrainConfig, teachers: Teachers, run: Any, grid: tuple[int, int]) -> None:
        if run.data.is_stream:
            raise ValueError("teacher_cache needs images that can be read in any order: set streaming: false.")
        if config.cache == "device" and run.images.is_on_device:
            raise ValueError("teacher_cache needs views that are made one by one: set cache to ram or none.")
        if config.train_repeats != 1:
            raise ValueError(
                f"teacher_cache repeats whole epochs: set train_repeats to 1, got {config.train_repeats}."
            )
        self.run, self.grid, self.number = run, grid, len(run.images)
        self.views = config.teacher_views
        self.width = sum(teachers.summary_widths) + sum(teachers.label_numbers)
        self.width += grid[0] * grid[1] * sum(teachers.patch_widths)
        digest = hashlib.blake2b(digest_size=16)
        described = [getattr(config, name) for name in OF_A_VIEW], grid, teachers.has_logits
        for part in (described, [teacher.digest() for teacher in teachers.each], run.processor.to_dict()):
            digest.update(repr(part).encode())
        for stored in run.images.split.select_columns([run.images.columns[0]]):
            digest.update(image_digest(stored[run.images.columns[0]] or NO_IMAGE).to_bytes(8, "little"))
        self.folder = Path(str(config.teacher_cache)) / digest.hexdigest()
        self.opened: dict[Path, Any] = {}

    def __getstate__(self) -> dict[str, Any]:  # for data loader processes
        return {**self.__dict__, "opened": {}, "run": None}

    def of_visit(self, visit: Visit) -> Tensor:
        """Return the answers for a visit, half precision `[width]`."""
        file = self._file(visit.epoch % self.views, visit.index // CHUNK)
        if file not in self.opened:
            self.opened[file] = safe_open(file, framework="pt").get_slice(NAME)
        return self.opened[file][visit.index % CHUNK]

    def fill(self, answer: Callable[[Tensor, tuple[int, int]], Answers]) -> None:
        """Compute and write all files that are missing; processes share the work.

        Args:
            answer: Returns the answers for normalized images, given the student's grid.
        """
        accelerator = self.run.accelerator
        chunks = [(view, chunk) for view in range(self.views) for chunk in range(-(-self.number // CHUNK))]
        missing = [each for each in chunks if not self._is_complete(*each)]
        accelerator.wait_for_everyone()  # all have looked before one writes
        if not missing:
            return
        self._check_space(len(missing))
        self.run.say(f"Storing the answers of the teachers in {self.folder}.")
        mine = missing[accelerator.process_index :: accelerator.num_processes]
        with progress_bar(len(mine), "files of answers", disable=not accelerator.is_main_process) as bar:
            for view, chunk in mine:
                file = self._file(view, chunk)
                with (
                    writing("answers of the teachers; complete files are kept", file),
                    new_file(file, True) as unfinished,
                ):
                    save_file({NAME: self._computed(answer, view, chunk)}, unfinished)
                    sync(unfinished)
                bar.update()
        accelerator.wait_for_everyone()

    def _computed(self, answer: Callable[[Tensor, tuple[int, int]], Answers], view: int, chunk: int) -> Tensor:
        """Return the answers for the images of a chunk, `[n, width]`; those for unreadable images are not used."""
        run, rows = self.run, []
        for first in range(chunk * CHUNK, min((chunk + 1) * CHUNK, self.number), BATCH):
            last = min(first + BATCH, (chunk + 1) * CHUNK, self.number)
            batch = collate([run.images[Visit(view, index)] for index in range(first, last)])
            pixels = batch["pixel_values"].to(run.accelerator.device)
            rows.append(answer(run.to_model(pixels), self.grid).packed().to("cpu", torch.float16))
        return torch.cat(rows)

    def _check_space(self, missing: int) -> None:
        folder = next(each for each in self.folder.resolve().parents if each.exists())
        needed, free = missing * min(CHUNK, self.number) * self.width * 2, shutil.disk_usage(folder).free
        if needed > free:
            raise ValueError(
                f"teacher_cache needs {needed / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB are free in "
                f"{self.folder.parent}: use fewer teacher_views, distill: labels, or no teacher_cache."
            )

    def _file(self, view: int, chunk: int) -> Path:
        return self.folder / f"view-{view:04d}-images-{chunk * CHUNK:09d}.safetensors"

    def _is_complete(self, view: int, chunk: int) -> bool:
        """Return whether a file has the answers for all images of its chunk."""
        expected = [min(CHUNK, self.number - chunk * CHUNK), self.width]
        try:
            with safe_open(self._file(view, chunk), framework="pt") as file:
                return file.get_slice(NAME).get_shape() == expected
        except Exception:  # missing, cut off, or another file
            return False
