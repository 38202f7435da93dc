"""Read files of `torch.save` as tensors only (`weights_only`), never as code."""

import json
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

OWN_CONFIG = "hf_vit_config"  # key of the config in the metadata of our own state dicts
BELOW = " > "  # between the keys of nested dictionaries, in the names of tensors
# Keys that contain these words hold the state of the training, not weights.
OF_TRAINING = ("optim", "sched", "scaler", "rng", "random", "callbacks", "loops")


class Unread:
    """Stand-in for a value of a known harmless class. It replaces the class, so that no code of the class runs."""

    def __new__(cls, *arguments: Any, **keywords: Any) -> "Unread":
        return super().__new__(cls)

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class Entries:
    """Stand-in for a dictionary class that builds an `OrderedDict`, whose entries torch fills in."""

    def __new__(cls, *arguments: Any) -> OrderedDict[Any, Any]:  # type: ignore[misc]
        return OrderedDict()


# Classes of the values that training scripts store besides the weights.
VALUES = (
    *("argparse.Namespace", "types.SimpleNamespace", "collections.deque"),
    *(f"builtins.{name}" for name in ("dict", "list", "tuple", "int", "float", "str", "bool", "frozenset", "slice")),
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *("numpy.dtype", "numpy.ndarray", "numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer"),
    *(f"numpy.{name}" for name in ("bool_", "int32", "int64", "float16", "float32", "float64")),
    *(f"numpy.dtypes.{name}DType" for name in ("Bool", "Int32", "Int64", "Float16", "Float32", "Float64")),
    *(
        f"pathlib.{local}{pure}{name}"
        for local in ("", "_local.")
        for pure in ("", "Pure")
        for name in ("Path", "PosixPath", "WindowsPath")
    ),
    *(f"datetime.{name}" for name in ("datetime", "date", "time", "timedelta", "timezone")),
    *("decimal.Decimal", "fractions.Fraction", "uuid.UUID", "torch.torch_version.TorchVersion", "typing.Any"),
    *(f"omegaconf.{name}" for name in ("dictconfig.DictConfig", "listconfig.ListConfig")),
    *(f"omegaconf.base.{name}" for name in ("ContainerMetadata", "Metadata")),
    *(f"omegaconf.nodes.{name}Node" for name in ("Any", "Boolean", "Float", "Integer", "String")),
    "mmengine.logging.history_buffer.HistoryBuffer",
)
DICTIONARIES = (
    *("collections.defaultdict", "yacs.config.CfgNode", "easydict.EasyDict", "addict.addict.Dict", "addict.Dict"),
    *("ml_collections.config_dict.ConfigDict", "ml_collections.config_dict.config_dict.ConfigDict"),
    *("mmengine.config.config.ConfigDict", "lightning_fabric.utilities.data.AttributeDict"),
    *("pytorch_lightning.utilities.parsing.AttributeDict", "lightning.pytorch.utilities.parsing.AttributeDict"),
    "lightning.fabric.utilities.data.AttributeDict",
)
STAND_INS: list[Any] = [(Unread, name) for name in VALUES] + [(Entries, name) for name in DICTIONARIES]


class TorchFile:
    """The tensors of a file, mapped into memory. Data that was read stays in memory until the file is mapped again."""

    LIMIT = 128 * 2**20  # bytes

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content = _load(path)
        self.bytes_read = 0

    def read(self, name: str) -> Tensor:
        """Return a copy of one tensor."""
        if self.bytes_read > self.LIMIT and zipfile.is_zipfile(self.path):
            self.content, self.bytes_read = _load(self.path), 0
        tensor = self.content[name].detach().clone()
        self.bytes_read += tensor.nbytes
        return tensor


def _load(path: Path) -> dict[str, Any]:
    """Load all tensors of a file by name; a zip is mapped into memory, the older format is read completely.

    Raises:
        ValueError: If it holds objects of other classes, or no dictionary.
    """
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": True, "mmap": zipfile.is_zipfile(path)}
    with torch.serialization.safe_globals(STAND_INS), warnings.catch_warnings(action="ignore"):
        try:
            content = torch.load(path, **options)  # where its warnings matter, it also raises an error
        except UnpicklingError as error:
            raise ValueError(_refusal(path, error)) from error
    if not isinstance(content, dict | list | tuple):
        raise ValueError(f"{path}: it holds a {type(content).__name__}, expected a state dict.")
    return dict(_tensors_in(content, "", set()))


def _refusal(path: Path, error: Exception) -> str:
    """Return the error message for a file with objects other than tensors; it names their classes if known."""
    try:
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    except Exception:  # the older format, or a corrupt file, which can fail in any way
        _, found, rest = str(error).partition("Unsupported global: GLOBAL ")
        names = [rest.split()[0]] if found else []
    if not names:
        return (
            f"{path}: it is corrupt, or holds objects other than tensors, which could run code, and is not loaded. If "
            "you trust its author, load it yourself and save its state_dict with safetensors."
        )
    is_model = any(name.startswith("torch.nn.modules.") for name in names)
    what = "a whole model, saved by torch.save(model)" if is_model else "objects other than tensors"
    state = "state_dict()" if is_model else "its tensors"
    example = ", ".join(names[:4]) + ", ..." * (len(names) > 4)
    saved = "model.state_dict()" if is_model else "content['model']"
    loaded = "model" if is_model else "content"
    return (
        f"{path}: it holds {what} ({example}), which could run code, and is not loaded. If you trust its author, save "
        f"only {state} where its code is installed: {loaded} = torch.load({path.name!r}, weights_only=False); "
        f"torch.save({saved}, 'weights.pth')."
    )


def _tensors_in(content: Any, place: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Yield the tensors in nested dictionaries, lists and tuples, named by the keys on the way.

    Entries with a parameter's name that are not tensors are also yielded, so that they do not count as missing.
    `torch.Size` entries are not yielded; DeepSpeed stores them under the same names.

    Args:
        content: The dictionary, list or tuple.
        place: Beginning of the names.
        seen: Identities of the visited objects: a file can refer to the same dictionary several times.
    """
    if id(content) in seen:
        return
    seen.add(id(content))
    for module, metadata in getattr(content, "_metadata", {}).items():
        if OWN_CONFIG in metadata:  # as bytes of JSON, so that it shares the names and prefixes of the tensors
            stated = json.dumps(metadata[OWN_CONFIG]).encode()
            yield f"{place}{module}{'.' if module else ''}{OWN_CONFIG}", torch.tensor(list(stated), dtype=torch.uint8)
    entries = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in entries:
        name = f"{place}{key}"
        if isinstance(value, torch.Size):
            continue
        if isinstance(value, Tensor) or str(key).endswith((".weight", ".bias")):
            yield name, value
        elif isinstance(value, dict | list | tuple) and not _is_of_training(str(key)):
            yield from _tensors_in(value, f"{name}{BELOW}", seen)


def _is_of_training(key: str) -> bool:
    return key.lower() in ("opt", "amp") or any(word in key.lower() for word in OF_TRAINING)
