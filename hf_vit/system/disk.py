"""Files and folders that are written whole or not at all."""

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
    """Turn what writers raise when the system refuses, each something else, into an `OSError` that names `what`."""
    try:
        yield
    except Exception as error:
        number = _number_of(error)
        if number is None:
            raise
        reason = "No space left for" if number in FULL else f"{os.strerror(number)}: cannot write"
        raise OSError(number, f"{reason} {what}", str(path)) from error


def _number_of(error: BaseException | None) -> int | None:
    """Return the number of the system's error behind an exception, if there is one."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        if said := re.search(r"os error (\d+)", str(error)):  # safetensors says it in words
            return int(said.group(1))
        error = error.__cause__ or error.__context__  # torch fails behind the error that says it
    return None


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_folder(folder: str | Path, force: bool = False) -> Iterator[Path]:
    """Give a temporary folder that takes the name of `folder` when all went well, and vanishes when not.

    Raises:
        ValueError: If something other than an empty folder lies there and is not to be replaced, or is no model.
    """
    folder = Path(folder).resolve()
    is_there = folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))
    if is_there and not force:
        raise ValueError(f"{folder} exists: choose another folder, or pass --force to replace it.")
    if is_there and not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json, so it is no model's folder, and is not replaced.")
    made = [parent for parent in folder.parents if not parent.exists()]
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
        with suppress(OSError):  # somebody put something there
            for parent in made:
                parent.rmdir()
        raise


@contextmanager
def new_file(file: str | Path, force: bool = False) -> Iterator[Path]:
    """Give a temporary path for what takes the place of `file`, with what is written beside it, when all went well.

    Raises:
        ValueError: If something lies there already and is not to be replaced, or is no file.
    """
    file = Path(file)
    if file.exists() and not (force and file.is_file()):
        raise ValueError(f"{file} exists: choose another file, or pass --force to replace a file.")
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}-") as temporary:
        unfinished = Path(temporary) / file.name
        yield unfinished
        for path in sorted(Path(temporary).iterdir(), reverse=True):  # the file comes last: it needs the others
            path.replace(file.parent / path.name)
