"""Read the tensors of one file on request, in any of the formats.

The first bytes of a file determine its format, not its name: safetensors, numpy's npz, or torch's zip and older
pickle. What a file states about itself, such as sizes and names, is checked against the file before it is used.
"""

import json
import struct
import zipfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from .other_formats import refused, refused_archive
from .pickles import TorchFile

# Maximum size of a safetensors header in bytes; ten thousand tensors need less.
LARGEST_HEADER = 2**22
# An archive that unpacks to more bytes than the first and to more times its size than the second is an attack on
# memory or disk: trained weights hardly compress.
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


def read_tensors(path: Path) -> Tensors:
    """List the tensors of one file in any of the formats.

    Raises:
        ValueError: If it has another format, is corrupt, or holds more than tensors; names the file.
    """
    readers = {"safetensors": _of_safetensors, "npz": _of_npz, "torch": _of_torch}
    name = format_of(path)
    try:
        return readers[name](path)
    except Exception as error:  # a corrupt file can fail in any way
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise ValueError(f"{path}: corrupt, or not a {name} file ({reason[0]}).") from error


def format_of(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(64)
    if head[8:9] == b"{":  # eight bytes of length, then JSON
        return "safetensors"
    if head.startswith(b"PK"):
        try:
            members = zipfile.ZipFile(path).infolist()
        except Exception as error:  # a corrupt directory can fail in any way
            raise ValueError(f"{path}: a corrupt or truncated zip file ({error}).") from error
        packed, unpacked = path.stat().st_size, sum(member.file_size for member in members)
        if unpacked > max(LARGEST_UNPACKED, MOST_UNPACKED * packed):
            raise ValueError(f"{path}: {packed} bytes unpack to {unpacked}, far more than any weights: not read.")
        if any(member.filename.endswith(".npy") for member in members):
            return "npz"
        if reason := refused_archive(path, [member.filename for member in members]):
            raise ValueError(reason)
        return "torch"
    if head[:1] == b"\x80":  # pickle, as torch wrote it before version 1.6
        return "torch"
    raise ValueError(refused(path, head))


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
            if member.compress_type != zipfile.ZIP_STORED:  # mapping it would read compressed bytes as numbers
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
