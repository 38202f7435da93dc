"""Open a file, a folder or a name on the Hub as tensors that are read on request.

The first bytes of a file determine its format, not its name: safetensors, numpy's npz, or torch's zip and older
pickle, which are read as tensors only (`weights_only`), never as code. What a file states about itself, such as sizes,
names and paths, is checked against the file before it is used.
"""

import json
import struct
import warnings
import zipfile
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache
from safetensors import safe_open
from torch import Tensor
from transformers.utils import cached_file

from ..system.network import sentence_of
from ..system.places import is_path, missing
from ..system.texts import one_line

WEIGHTS = (
    *("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"),
    *("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
)
OPEN_CLIP_CONFIG = "open_clip_config.json"
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
SIDE_FILES = ("config.json", *PROCESSOR_FILES)
# Keys of the weights in a training checkpoint; averaged weights come first, as in timm.
STATE_DICTS = ("state_dict_ema", "model_ema", "ema", "state_dict", "model", "module", "teacher", "net")

# Bytes of a safetensors header; ten thousand tensors need fewer.
LARGEST_HEADER = 2**22
# An archive that unpacks to more bytes, and to more times its size, is an attack on memory or disk: trained weights
# hardly compress.
LARGEST_UNPACKED, MOST_UNPACKED = 2**26, 50

SAFETENSORS_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U8": torch.uint8, "BOOL": torch.bool},
}


class Stored(NamedTuple):
    """A tensor of a checkpoint that is read on request."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


Tensors = dict[str, Stored]


@dataclass
class Source:
    """A checkpoint as stored.

    Attributes:
        name: The file, folder or name on the Hub that was opened, for errors and reports.
        tensors: The tensors by their names in the file.
        config: Content of `config.json` in the folder of the weights; empty if there is none.
        folder: Folder of the weights, or of the other files of the checkpoint.
    """

    name: str
    tensors: Tensors
    config: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None

    def shape(self, name: str, dimensions: int | None = None) -> tuple[int, ...]:
        """Return the shape of a required tensor.

        Raises:
            ValueError: If the tensor is missing, or does not have `dimensions`; names file and tensor.
        """
        if name not in self.tensors:
            raise ValueError(f"{self.name}: the tensor {name!r} is missing.")
        shape = self.tensors[name].shape
        if dimensions is not None and len(shape) != dimensions:
            raise ValueError(f"{self.name}: {name!r} has the shape {list(shape)}, expected {dimensions} dimensions.")
        return shape


def open_source(name: str | Path, **hub: Any) -> Source:
    """Open a checkpoint without reading its tensors.

    Args:
        name: A file, a folder, or a name on the Hub.
        hub: Options of the Hub: `revision`, `subfolder`, `token`, `cache_dir`, `local_files_only`, ...

    Raises:
        ValueError: If it does not exist, or is not a checkpoint.
    """
    path = Path(name)
    if path.is_file():
        names = () if _format_of(path) == "npz" else SIDE_FILES
        beside = {file: path.parent / file for file in names if (path.parent / file).is_file()}
        for file in beside.values():
            _check_inside(path.parent, file)
        return _source(str(name), read_tensors(path), path, beside)
    if not path.is_dir() and is_path(str(name)):
        raise ValueError(missing(str(name)))
    read = read_weights(str(name), hub)
    if read is None:
        if not path.is_dir():  # raises the reason: no such name, no connection, no permission
            _find(str(name), hub, WEIGHTS[0], is_optional=False)
        raise ValueError(f"{name}: no weights found; expected one of {', '.join(WEIGHTS)}, or the path of a file.")
    find = partial(_find, str(name), hub)
    side_files = (*SIDE_FILES, OPEN_CLIP_CONFIG) if read[1].name.startswith("open_clip") else SIDE_FILES
    return _source(str(name), *read, {file: found for file in side_files if (found := find(file))})


def read_weights(name: str, hub: dict[str, Any]) -> tuple[Tensors, Path] | None:
    """List the tensors of a folder or a name on the Hub, in one file or in shards; return `None` without weights.

    Returns:
        The tensors, and the file of the weights or of their index.

    Raises:
        ValueError: If a file is corrupt or missing; names it.
    """
    find = partial(_find, name, hub)
    weights = next((found for file in WEIGHTS if (found := find(file))), None)
    if weights is None:
        return None
    return read_tensors(weights) if weights.suffix != ".json" else _of_shards(weights, find), weights


def _find(name: str, hub: dict[str, Any], file: str, is_optional: bool = True) -> Path | None:
    """Return a file of a folder or a repository; `None` only if it is known to be missing, not if a request failed."""
    try:
        found = cached_file(name, file, **hub)
    except OSError as error:
        if is_optional and (sentence_of(error) is None or _is_known_to_miss(name, hub, file)):
            return None
        reason = sentence_of(error) or one_line(str(error))
        if not Path(name).is_dir():
            raise ValueError(f"{missing(name)}; and not read from the Hub: {reason}") from error
        raise ValueError(f"{name}: {reason}") from error
    if found and Path(name).is_dir():
        _check_inside(Path(name), Path(found))
    return Path(found) if found else None


def _is_known_to_miss(name: str, hub: dict[str, Any], file: str) -> bool:
    """Return whether the cache records that a repository does not have a file."""
    options = {option: hub[option] for option in ("cache_dir", "revision") if hub.get(option)}
    return try_to_load_from_cache(name, str(Path(hub.get("subfolder") or "", file)), **options) is _CACHED_NO_EXIST


def _check_inside(folder: Path, file: Path) -> None:
    """Raise `ValueError` for a link that leaves the folder: it could make the user read and publish any file.

    A snapshot in the Hub's cache consists of links to the blobs of its repository, which are allowed.
    """
    inside, target = folder.resolve(), file.resolve()
    blobs = [(parent.parent / "blobs").resolve() for parent in inside.parents if parent.name == "snapshots"]
    if not any(target.is_relative_to(allowed) for allowed in (inside, *blobs)):
        raise ValueError(
            f"{file}: the link to {target}, outside of the folder, is not followed: pass the path of that file, or "
            "replace the link with a copy."
        )


def _of_shards(index: Path, find: Callable[[str], Path | None]) -> Tensors:
    shards = read_json(index).get("weight_map", {})
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{index}: expected a weight_map from tensor names to file names.")
    names = sorted(set(shards.values()))
    for name in names:
        if Path(name).name != name or name == "..":
            raise ValueError(f"{index}: the shard {name!r} is outside of the folder.")
    found = {name: find(name) for name in names}
    missing = [name for name, path in found.items() if path is None]
    if missing or not names:
        raise ValueError(f"{index}: these shards are missing: {', '.join(missing) or 'all, since it names none'}.")
    tensors: Tensors = {}
    for name, path in found.items():
        assert path is not None
        here = read_tensors(path)
        if twice := tensors.keys() & here.keys():
            raise ValueError(f"{path}: {min(twice)!r} is also in another shard.")
        if lost := {_without_wrappers(tensor) for tensor, shard in shards.items() if shard == name} - here.keys():
            raise ValueError(f"{path}: {min(lost)!r} is not in this file, contrary to {index.name}.")
        tensors.update(here)
    return tensors


def _source(name: str, tensors: Tensors, weights: Path, beside: dict[str, Path]) -> Source:
    if not tensors:
        raise ValueError(f"{name}: it holds no tensors.")
    config = read_json(beside["config.json"]) if "config.json" in beside else {}
    return Source(name, tensors, config, next((path.parent for path in beside.values()), weights.parent))


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        ValueError: If the file holds something else; names it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object.")
    return content


# ------------------------------------------------------------------------------------------------------- formats


def read_tensors(path: Path) -> Tensors:
    """List the tensors of one file in any of the formats.

    Raises:
        ValueError: If it has another format, is corrupt, or holds more than tensors; names the file.
    """
    readers = {"safetensors": _of_safetensors, "npz": _of_npz, "torch": _of_torch}
    name = _format_of(path)
    try:
        return readers[name](path)
    except Exception as error:  # a corrupt file can fail in any way
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise ValueError(f"{path}: corrupt, or not a {name} file ({reason[0]}).") from error


def _format_of(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(9)
    if head[8:] == b"{":  # eight bytes of length, then JSON
        return "safetensors"
    if head.startswith(b"PK"):
        try:
            members = zipfile.ZipFile(path).infolist()
        except Exception as error:  # a corrupt directory can fail in any way
            raise ValueError(f"{path}: a corrupt or truncated zip file ({error}).") from error
        packed, unpacked = path.stat().st_size, sum(member.file_size for member in members)
        if unpacked > max(LARGEST_UNPACKED, MOST_UNPACKED * packed):
            raise ValueError(f"{path}: {packed} bytes unpack to {unpacked}, far more than any weights: not read.")
        return "npz" if any(member.filename.endswith(".npy") for member in members) else "torch"
    if head[:1] == b"\x80":  # pickle, as torch wrote it before version 1.6
        return "torch"
    raise ValueError(f"{path}: not a checkpoint; expected safetensors, npz, or a file written by torch.save.")


def _of_safetensors(path: Path) -> Tensors:
    with path.open("rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        if length > min(LARGEST_HEADER, path.stat().st_size):
            raise ValueError(f"{path}: corrupt: its header states a length of {length} bytes.")
        header = raw.read(length)
    tensors = {}
    with safe_open(path, framework="pt") as file:
        json.loads(header, object_pairs_hook=partial(_check_unique, path))  # the library uses the last of duplicates
        for name in list(file.keys()):
            view = file.get_slice(name)
            if view.get_dtype() not in SAFETENSORS_DTYPES:
                raise ValueError(f"{path}: {name!r} has the type {view.get_dtype()}, which is not supported.")
            dtype = SAFETENSORS_DTYPES[view.get_dtype()]
            tensors[name] = Stored(tuple(view.get_shape()), dtype, partial(read_safetensor, path, name))
    return tensors


def _check_unique(path: Path, pairs: list[tuple[str, Any]]) -> None:
    (name, number), *_ = Counter(name for name, _ in pairs).most_common(1) or [("", 0)]
    if number > 1:
        raise ValueError(f"{path}: {name!r} occurs twice.")


def read_safetensor(path: Path, name: str) -> Tensor:
    """Read one tensor. The file is opened each time, since all tensors read from an open file stay in memory."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def _of_npz(path: Path) -> Tensors:
    archive = zipfile.ZipFile(path)
    members = archive.infolist()
    _check_unique(path, [(member.filename, None) for member in members])
    tensors = {}
    for member in members:
        with archive.open(member) as file:
            version = np.lib.format.read_magic(file)
            read_header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
            if version[0] not in read_header:
                raise ValueError(f"{path}: {member.filename!r} has version {version} of the npy format.")
            shape, is_fortran, dtype = read_header[version[0]](file)
            header_size = file.tell()
        name = member.filename.removesuffix(".npy")
        if dtype.kind not in "biufcV":
            raise ValueError(f"{path}: {name!r} holds {dtype}, expected numbers.")
        if header_size + dtype.itemsize * prod(shape) != member.file_size:
            raise ValueError(f"{path}: corrupt: {name!r} has {member.file_size} bytes, but the shape {list(shape)}.")
        if member.compress_type == zipfile.ZIP_STORED:
            # The numbers start after the member's header, whose two variable lengths are in its bytes 26 to 30.
            with path.open("rb") as raw:
                raw.seek(member.header_offset + 26)
                start = member.header_offset + 30 + sum(struct.unpack("<HH", raw.read(4))) + header_size
            if start + dtype.itemsize * prod(shape) > path.stat().st_size:
                raise ValueError(f"{path}: truncated in {name!r}.")
            read = partial(_map_array, path, start, shape, dtype, "F" if is_fortran else "C")
        else:
            read = partial(_unpack_array, path, member.filename)
        tensors[name] = Stored(tuple(shape), _tensor(np.empty(0, dtype)).dtype, read)
    return tensors


def _map_array(path: Path, start: int, shape: tuple[int, ...], dtype: np.dtype, order: Any) -> Tensor:
    if 0 in shape:
        return _tensor(np.empty(shape, dtype))
    return _tensor(np.memmap(path, dtype, mode="c", offset=start, shape=shape, order=order))  # "c": copy on write


def _unpack_array(path: Path, member: str) -> Tensor:
    with zipfile.ZipFile(path).open(member) as file:
        return _tensor(np.lib.format.read_array(file))


def _tensor(array: np.ndarray) -> Tensor:
    if array.dtype == np.dtype("V2"):  # bfloat16, for which numpy has no type
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


def _of_torch(path: Path) -> Tensors:
    if zipfile.is_zipfile(path):
        for member in zipfile.ZipFile(path).infolist():
            if member.compress_type != zipfile.ZIP_STORED:  # mapped into memory, it would be read as numbers
                raise ValueError(f"{path}: {member.filename!r} is compressed, unlike files of torch: save it again.")
    file, tensors = TorchFile(path), {}
    for name, value in file.content.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{path}: {name!r} is a {type(value).__name__}, expected a tensor.")
        if value.layout != torch.strided or value.is_nested or value.device.type != "cpu":
            raise ValueError(f"{path}: {name!r} is {value.layout} on {value.device}, expected a dense tensor.")
        if value.numel() * value.itemsize > path.stat().st_size:
            raise ValueError(f"{path}: {name!r} has the shape {list(value.shape)}, which is larger than the file.")
        tensors[name] = Stored(tuple(value.shape), value.dtype, partial(file.read, name))
    return tensors


class TorchFile:
    """A state dict of torch, mapped into memory. It is mapped again after some reads, since they stay in memory."""

    LIMIT = 128 * 2**20  # bytes

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content = _load_torch(path)
        self.bytes_read = 0

    def read(self, name: str) -> Tensor:
        """Return a copy of one tensor."""
        if self.bytes_read > self.LIMIT and zipfile.is_zipfile(self.path):
            self.content, self.bytes_read = _load_torch(self.path), 0
        tensor = self.content[name].detach().clone()
        self.bytes_read += tensor.nbytes
        return tensor


def _load_torch(path: Path) -> dict[str, Any]:
    """Load the state dict of a file; a zip is mapped into memory, the older format is read completely."""
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": True, "mmap": zipfile.is_zipfile(path)}
    try:
        # Training scripts store their arguments with the weights. torch raises where its warnings matter.
        with torch.serialization.safe_globals([Namespace]), warnings.catch_warnings(action="ignore"):
            content = torch.load(path, **options)
    except UnpicklingError as error:
        raise ValueError(
            f"{path}: it is corrupt, or holds objects other than tensors, which could run code, and is not loaded. If "
            "you trust its author, load it yourself and save its state_dict with safetensors."
        ) from error
    for name in STATE_DICTS:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
            break
    if not isinstance(content, dict):
        raise ValueError(f"{path}: it holds a {type(content).__name__}, expected a state dict.")
    return {_without_wrappers(str(name)): value for name, value in content.items()}


def _without_wrappers(name: str) -> str:
    """Remove the prefixes of DataParallel, torch.compile and averaging from a name."""
    for wrapper in ("module.", "_orig_mod."):
        name = name.removeprefix(wrapper)
    return name
