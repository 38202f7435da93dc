"""Archives of images: a zip or tar of anything that a folder may hold, unpacked once into the cache of `datasets`."""

import hashlib
import os
import shutil
import tarfile
import zipfile
from itertools import islice
from pathlib import Path, PurePosixPath
from tempfile import mkdtemp

from ..system.texts import one_line
from .folders import is_image_file

ENDINGS = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
OF_WEBDATASET = (".cls", ".json", ".txt")  # endings of the files with the label of an image
LOOKED_AT = 200  # members of a tar, to tell a webdataset shard from a folder


def is_archive(path: Path) -> bool:
    """Return whether a file is an archive of a folder; a webdataset shard is not."""
    name = path.name.lower()
    return path.is_file() and name.endswith(ENDINGS) and not (name.endswith(".tar") and _is_shard(path))


def stem_of(path: Path) -> str:
    """Return the name of an archive without its ending."""
    ending = max((ending for ending in ENDINGS if path.name.lower().endswith(ending)), key=len)
    return path.name[: -len(ending)]


def unpacked(path: Path) -> Path:
    """Return the folder with the files of an archive, which is unpacked unless it has been before.

    Raises:
        ValueError: If the archive is corrupt, or has members outside of it.
    """
    from datasets import config

    state = path.stat()
    key = f"{path.resolve()} {state.st_size} {state.st_mtime_ns}"
    digest = hashlib.blake2b(key.encode("utf-8", "backslashreplace"), digest_size=12).hexdigest()
    folder = Path(config.HF_DATASETS_CACHE) / "hf_vit_archives" / digest / stem_of(path)
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(mkdtemp(prefix="unpacking-", dir=folder.parent))
    try:
        if path.suffix.lower() == ".zip":
            with zipfile.ZipFile(path) as zipped:
                zipped.extractall(work)
        else:
            with tarfile.open(path) as tar:
                tar.extractall(work, filter="data")
        if not folder.is_dir():  # another process may have been faster
            os.replace(work, folder)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be unpacked: {one_line(str(error))}. Copy or download it again.") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _is_shard(path: Path) -> bool:
    """Return whether a tar is a shard of webdataset: images and labels of the same name, or images in no folder."""
    try:
        with tarfile.open(path) as tar:
            names = [PurePosixPath(member.name) for member in islice(tar, LOOKED_AT) if member.isfile()]
    except (tarfile.TarError, EOFError):
        return True  # the error of `datasets` names the fault
    keys = {name.with_suffix("") for name in names if is_image_file(name.name)}
    has_labels = any(name.suffix.lower() in OF_WEBDATASET and name.with_suffix("") in keys for name in names)
    return has_labels or all(len(name.parts) == 1 for name in names)
