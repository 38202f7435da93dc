"""Checkpoints of a run: a folder each, complete or not there.

A checkpoint is what `save_pretrained` writes, so that `from_pretrained` reads it, and all other state of the run in
one dictionary (`training_state.pt`). It is written under a temporary name; a manifest with size and hash of every file
comes last; everything is synced before the folder gets its name; only then do older ones go. What a kill, a full disk
or a bad disk leaves behind is never mistaken for a checkpoint.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

STATE = "training_state.pt"
MANIFEST = "manifest.json"
UNFINISHED = ".unfinished-"


class CheckpointFolder:
    """The checkpoints of one run, by step.

    Args:
        folder: Made at the first save.
        keep: How many of the newest to keep.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep_checkpoints must be at least 1, got {keep}: a run resumes from the newest.")
        self.folder = folder
        self.keep = keep

    def save(self, step: int, state: dict[str, Any], write_model: Callable[[Path], None]) -> Path:
        """Write the checkpoint of `step`, then remove what is older than the newest `keep`.

        Args:
            step: Number of steps that are done.
            state: Tensors and plain Python values; see `load_state`.
            write_model: Writes the model's own files into a folder.

        Raises:
            OSError: If the disk is full, among others. Earlier checkpoints are untouched then.
        """
        final = self.folder / f"step-{step:08d}"
        unfinished = self.folder / f"{UNFINISHED}{final.name}"
        self.folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            unfinished.mkdir()
            write_model(unfinished)
            torch.save(state, unfinished / STATE)
            files = sorted(path for path in unfinished.rglob("*") if path.is_file())
            manifest = {str(path.relative_to(unfinished)): _describe(path) for path in files}
            (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            for path in [*files, unfinished / MANIFEST, unfinished]:
                _sync(path)
        except OSError as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            if error.errno == errno.ENOSPC:
                raise OSError(
                    errno.ENOSPC, f"No space left for a checkpoint of step {step}; earlier ones are intact", str(final)
                ) from error
            raise
        shutil.rmtree(final, ignore_errors=True)  # there is one only if it was found damaged
        unfinished.rename(final)
        _sync(self.folder)
        for old in self._newest_first()[self.keep :]:
            shutil.rmtree(old)
        return final

    def newest(self, say: Callable[[str], None]) -> Path | None:
        """Return the newest checkpoint that is whole; `say` what was passed over and why."""
        for leftover in self.folder.glob(f"{UNFINISHED}*"):
            say(f"Passed over {leftover.name}: it was not finished.")
        for checkpoint in self._newest_first():
            damage = find_damage(checkpoint)
            if damage is None:
                return checkpoint
            say(f"Passed over {checkpoint.name}: {damage}.")
        return None

    def _newest_first(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"), reverse=True)


def load_state(checkpoint: Path) -> dict[str, Any]:
    """Return the dictionary that was saved; only tensors and plain values are read, no code."""
    return torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)


def find_damage(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint, or `None` if every file is as it was written."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except ValueError:
        return f"its {MANIFEST} cannot be read"
    for name, description in manifest.items():
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        if _describe(checkpoint / name) != description:
            return f"{name} is not what was written"
    return None


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
