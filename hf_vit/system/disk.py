"""Files and folders that are written completely or not at all."""

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

UNFINISHED = ".unfinished-"
FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def writing(what: str, path: Path) -> Iterator[None]:
    """Convert errors of the operating system to an `OSError` that names `what` could not be written.

    torch, safetensors and the standard library each raise something else when a disk is full or read-only.
    """
    try:
        yield
    except Exception as error:
        number = _errno_of(error)
        if number is None:
            raise
        reason = "No space left for" if number in FULL else f"{os.strerror(number)}: cannot write"
        raise OSError(number, f"{reason} {what}", str(path)) from error


def _errno_of(error: BaseException | None) -> int | None:
    """Return the `errno` of an exception or of one of its causes."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        if match := re.search(r"os error (\d+)", str(error)):  # safetensors has it in its message
            return int(match.group(1))
        error = error.__cause__ or error.__context__  # torch raises its own error while handling the first
    return None


def sync(path: Path) -> None:
    """Flush a file, or the directory entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_folder(folder: str | Path, force: bool = False) -> Iterator[Path]:
    """Yield a temporary folder; rename it to `folder` on success, remove it on an error.

    Raises:
        ValueError: If `folder` exists, is not empty and `force` is false, or if it is not a model's folder.
    """
    folder = Path(folder).resolve()
    exists = folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))
    if exists and not force:
        raise ValueError(f"{folder} exists: choose another folder, or pass --force to replace it.")
    if exists and not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json, so it is not a model's folder and is not replaced.")
    created = [parent for parent in folder.parents if not parent.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
            unfinished, old = Path(temporary) / folder.name, Path(temporary) / ".old"
            unfinished.mkdir()
            yield unfinished
            if folder.exists():
                folder.rename(old)
            unfinished.rename(folder)
    except BaseException:
        with suppress(OSError):  # not empty: another process has written there
            for parent in created:
                parent.rmdir()
        raise


@contextmanager
def new_file(file: str | Path, force: bool = False) -> Iterator[Path]:
    """Yield a temporary path; on success move it to `file`, together with the files written next to it.

    Raises:
        ValueError: If `file` exists and `force` is false, or if it is not a regular file.
    """
    file = Path(file)
    if file.exists() and not (force and file.is_file()):
        raise ValueError(f"{file} exists: choose another file, or pass --force to replace it.")
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}-") as temporary:
        unfinished = Path(temporary) / file.name
        yield unfinished
        for path in sorted(Path(temporary).iterdir(), reverse=True):  # the file itself last: it refers to the others
            path.replace(file.parent / path.name)
