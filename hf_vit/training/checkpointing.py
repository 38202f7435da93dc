"""Checkpoints of a run: each is a folder that is either complete or ignored.

A checkpoint holds the files of `save_pretrained`, so that `from_pretrained` reads it, and the rest of the run's state
(`training_state.pt`). It is written under a temporary name. A manifest with the size and hash of every file comes
last; everything is synced before the folder gets its name; only then are older checkpoints removed. So what remains
after a kill or on a full or failing disk is never taken for a checkpoint. A thread writes it while the run goes on.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import recursively_apply

from ..system.disk import UNFINISHED, sync, writing

STATE = "training_state.pt"
MANIFEST = "manifest.json"
STEP = "step-" + 8 * "[0-9]"  # matches no other files of a user in the folder


class CheckpointFolder:
    """The checkpoints of one run, by step.

    Args:
        folder: Created by the first save.
        keep: Number of newest checkpoints to keep.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep_checkpoints must be at least 1, got {keep}: a run resumes from the newest.")
        self.folder, self.keep = folder, keep
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.written: Future[Path] | None = None

    def save_later(self, step: int, state: dict[str, Any], write_model: Callable[[Path], None]) -> None:
        """Call `save` in a thread, after the previous checkpoint. The given state must not change from here on."""
        self.wait()
        self.written = self.writer.submit(self.save, step, state, write_model)

    def raise_error(self) -> None:
        """Raise the error of the thread if it could not write the last checkpoint."""
        if self.written is not None and self.written.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the last checkpoint is written, and raise the error if it could not be."""
        written, self.written = self.written, None
        if written is not None:
            written.result()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Wait for the last checkpoint at the end, also after an error."""
        try:
            yield
        finally:
            self.wait()

    def save(self, step: int, state: dict[str, Any], write_model: Callable[[Path], None]) -> Path:
        """Write the checkpoint of `step`, then remove all but the `keep` newest.

        Args:
            step: Number of completed steps.
            state: Tensors and plain Python values; see `load_state`.
            write_model: Writes the model files into a folder.

        Raises:
            OSError: If the disk is full, for example. Earlier checkpoints are intact then.
        """
        final = self.folder / f"step-{step:08d}"
        for pause in (0.1, 1.0, None):
            try:
                self._write(final, step, state, write_model)
                break
            except FileNotFoundError:  # the folder is being removed; its content is still in memory
                if pause is None:
                    raise
                time.sleep(pause)
        # Later checkpoints were corrupt, or the run would have resumed from them: they must not stay the newest.
        kept = [path for path in self._newest_first() if path.name <= final.name][: self.keep]
        for other in self._newest_first():
            if other not in kept:
                shutil.rmtree(other, ignore_errors=True)
        return final

    def _write(self, final: Path, step: int, state: dict[str, Any], write_model: Callable[[Path], None]) -> None:
        unfinished = self.folder / f"{UNFINISHED}{final.name}"
        try:
            with writing(f"a checkpoint of step {step}; earlier ones are intact", final):
                self.folder.mkdir(parents=True, exist_ok=True)
                for leftover in self.folder.glob(f"{UNFINISHED}*"):
                    shutil.rmtree(leftover, ignore_errors=True)
                unfinished.mkdir()
                write_model(unfinished)
                with (unfinished / STATE).open("wb") as file:  # given a path, torch hides why it cannot write
                    torch.save(state, file)
                files = sorted(path for path in unfinished.rglob("*") if path.is_file())
                manifest = {str(path.relative_to(unfinished)): _fingerprint(path) for path in files}
                (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
                for path in [*files, unfinished / MANIFEST, unfinished]:
                    sync(path)
                shutil.rmtree(final, ignore_errors=True)  # exists only if it was found corrupt
                unfinished.rename(final)
                sync(self.folder)
        except Exception:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise

    def newest(self, say: Callable[[str], None]) -> Path | None:
        """Return the newest complete checkpoint; `say` which ones are ignored and why."""
        for leftover in self.folder.glob(f"{UNFINISHED}*"):
            say(f"Ignored {leftover.name}: it was not finished.")
        for checkpoint in self._newest_first():
            damage = find_damage(checkpoint)
            if damage is None:
                return checkpoint
            say(f"Ignored {checkpoint.name}: {damage}.")
        return None

    def _newest_first(self) -> list[Path]:
        return sorted(self.folder.glob(STEP), reverse=True)


def load_state(checkpoint: Path, device: torch.device | None = None) -> dict[str, Any]:
    """Load the state of a checkpoint; only tensors and plain values are read, no code.

    Large tensors for an accelerator stay in the file until they are copied to `device`, so that processes that share a
    machine do not all hold the whole state in memory.
    """
    is_mapped = device is not None and device.type != "cpu"
    state = torch.load(checkpoint / STATE, map_location="cpu", weights_only=True, mmap=is_mapped)
    if is_mapped:  # the file will be removed: what stays on the CPU must not depend on it
        counts = recursively_apply(lambda tensor: tensor if tensor.ndim else tensor.clone(), state["optimizer"])
        state |= {"optimizer": counts, "best": recursively_apply(torch.clone, state.get("best"))}
    return state


def find_damage(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint, or `None` if every file is as it was written."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (ValueError, OSError):
        return f"its {MANIFEST} cannot be read"
    if not isinstance(manifest, dict):
        return f"its {MANIFEST} is corrupt"
    for name in (STATE, *sorted(path.name for path in checkpoint.glob("*.safetensors"))):
        if name not in manifest:
            return f"its {MANIFEST} does not list {name}"
    for name, fingerprint in manifest.items():
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        try:
            if _fingerprint(checkpoint / name) != fingerprint:
                return f"{name} is corrupt"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
