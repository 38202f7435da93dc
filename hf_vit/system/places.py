"""Distinguish paths from names on the Hub, and a user's files from files that operating systems leave in folders."""

import glob
import os
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path, PurePath

from .texts import nearest

# Endings that names on the Hub do not have.
OF_FILES = (
    ".npz", ".npy", ".safetensors", ".pth", ".pt", ".pt2", ".bin", ".ckpt", ".onnx", ".csv", ".tsv", ".json", ".jsonl",
    ".ndjson", ".parquet", ".zip", ".tar", ".tgz", ".gz", ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif",
    ".tiff", ".avif", ".heic", ".heif", ".svg", ".yaml", ".yml", ".xml", ".pte", ".xlsx", ".txt", ".md", ".html",
    ".pdf", ".mp4", ".mov",
)  # fmt: skip
JUNK = (
    ".ds_store", "._*", "thumbs.db", "ehthumbs.db", "desktop.ini", ".ipynb_checkpoints", "__macosx", "__pycache__",
    "@eadir", "$recycle*", ".spotlight-v100", ".trashes", ".fseventsd", ".directory",
)  # fmt: skip


def cache_folder() -> Path:
    """Return the folder for cached results, inside the cache folder of Hugging Face."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "hf_vit"


def is_path(name: str) -> bool:
    """Return whether a name can only be a file or folder, since no repository on the Hub has such a name."""
    is_nested = name.count("/") > 1 or name.endswith("/") or "\\" in name
    return is_nested or name.startswith((".", "/", "~")) or PurePath(name).suffix.lower() in OF_FILES


def similar(name: str) -> PurePath | None:
    """Return the file or folder beside a missing one whose name is most similar; `None` if none is similar."""
    path = PurePath(name)
    try:
        beside = os.listdir(os.path.expanduser(path.parent))
    except OSError:
        beside = []
    near = nearest(path.name, beside)
    return path.parent / near if near else None


def missing(name: str) -> str:
    """Return a sentence that there is no such file or folder, with the most similar name beside it."""
    near = similar(name)
    return f"No such file or folder: {name}" + (f" (did you mean {near}?)" if near else "")


def check_exist(names: Iterable[str | None], model: str | None = None) -> None:
    """Raise `ValueError` for the first name that can only be a file or folder, and does not exist.

    A command calls this before it imports the libraries that would find it out much later.

    Args:
        names: Names of data or models.
        model: Name of a trained model. Without a slash it is a misspelled folder if a similar one exists, since all
            names on the Hub have one.
    """
    for name in filter(None, (*names, model)):
        if glob.has_magic(name) or os.path.exists(os.path.expanduser(name)):
            continue
        is_misspelled = name == model and "/" not in name and similar(name) is not None
        if is_misspelled or is_path(name):
            raise ValueError(f"{missing(name)}.")


def is_junk(name: str) -> bool:
    """Return whether a file or folder is one that an operating system, a viewer or an editor leaves behind."""
    return any(fnmatch(name.lower(), pattern) for pattern in JUNK)
