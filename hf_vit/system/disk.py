"""Files and folders that are written completely or not at all."""

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .texts import shortened

UNFINISHED = ".unfinished-"
# What may lie in the folder of a saved model, which can be replaced: suffixes of files, and names of folders.
MODEL_FILES = (
    *(".json", ".safetensors", ".bin", ".py", ".md", ".txt", ".png", ".jpg", ".svg"),
    *(".onnx", ".data", ".xml", ".pt2", ".pte"),  # of exports
)
MODEL_FOLDERS = ("images", "onnx", "__pycache__", ".cache")
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


def same_place(one: Any, other: Any) -> bool:
    """Return whether two names, or lists of names, are equal or are paths to the same files: `d`, `d/` and `./d`."""
    return one == other or _place(one) == _place(other)


def _place(name: Any) -> Any:
    if isinstance(name, list | tuple):
        return [_place(each) for each in name]
    path = Path(name).expanduser() if isinstance(name, str | os.PathLike) and str(name) else None
    return str(path.resolve()) if path is not None and path.exists() else name


def check_output_folder(folder: str | Path, is_ours: bool, sources: Any = (), option: str = "--output-dir") -> None:
    """Raise `ValueError` if writing into a folder could replace files of the user, or change the data.

    Args:
        folder: The folder to write. A folder that does not exist or is empty may always be written.
        is_ours: Whether the folder holds an earlier result of the same command, which may be replaced or resumed.
        sources: Path of the data, or several. The folder must neither hold a data folder nor lie in one, or its
            figures would be read as data.
        option: Name of the option that gives the folder.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: choose a folder for {option}.")
    if is_ours:
        return
    place = folder.expanduser().resolve()
    for source in [sources] if isinstance(sources, str | os.PathLike) else sources:
        if not str(source) or not Path(source).expanduser().is_dir():
            continue
        data = Path(source).expanduser().resolve()
        relations = {"is": data == place, "holds": place in data.parents, "lies in": data in place.parents}
        if how := next((relation for relation, is_true in relations.items() if is_true), None):
            raise ValueError(
                f"The output folder {folder} {how} the data folder {source}, where results would mix with the data: "
                f"choose another {option}."
            )
    found = sorted(path.name for path in folder.iterdir() if path.name[0] != ".") if folder.is_dir() else []
    if found:
        raise ValueError(
            f"{folder} holds files that this command did not write ({shortened(found)}): choose another {option}, a "
            "new or an empty folder."
        )


def _is_of_a_model(path: Path) -> bool:
    """Return whether a file or folder is one that may lie in the folder of a saved model."""
    if path.is_dir():
        return path.name in MODEL_FOLDERS
    return path.suffix in MODEL_FILES or path.name.startswith(("LICENSE", "."))


@contextmanager
def new_folder(folder: str | Path, force: bool = False) -> Iterator[Path]:
    """Yield a temporary folder; rename it to `folder` on success, remove it on an error.

    Raises:
        ValueError: If `folder` exists, is not empty and `force` is false, or if it holds more than a model.
    """
    folder = Path(folder).resolve()
    exists = folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))
    if exists and not force:
        raise ValueError(f"{folder} exists: choose another folder, or pass --force to replace it.")
    if exists and not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json, so it is not a model's folder and is not replaced.")
    foreign = sorted(path.name for path in folder.iterdir() if not _is_of_a_model(path)) if exists else []
    if foreign:
        raise ValueError(f"{folder} holds more than a model ({shortened(foreign)}), so it is not replaced.")
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


def check_new_file(file: Path, force: bool = False) -> None:
    """Raise `ValueError` if a file exists and `force` is false, or if it is not a regular file."""
    if file.exists() and not (force and file.is_file()):
        raise ValueError(f"{file} exists: choose another file, or pass --force to replace it.")


@contextmanager
def new_file(file: str | Path, force: bool = False) -> Iterator[Path]:
    """Yield a temporary path; on success move it to `file`, together with the files written next to it.

    Raises:
        ValueError: If `file` exists and `force` is false, or if it is not a regular file.
    """
    file = Path(file)
    check_new_file(file, force)
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}-") as temporary:
        unfinished = Path(temporary) / file.name
        yield unfinished
        for path in sorted(Path(temporary).iterdir(), reverse=True):  # the file itself last: it refers to the others
            path.replace(file.parent / path.name)
