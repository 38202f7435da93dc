"""Read files of `torch.save` as tensors only (`weights_only`), never as code."""

import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

BELOW = " > "  # between the keys of nested dictionaries, in the names of tensors
DEEPEST = 12  # levels of nested dictionaries
# Beside the weights, such keys hold the state of training.
OF_TRAINING = ("optim", "sched", "scaler", "rng", "random", "callbacks", "loops")


class Unread(dict[Any, Any]):
    """Stand-in for an object of a known harmless class: a dictionary's entries are kept, everything else is ignored.

    Since it takes the place of the class, no code of the class runs.
    """

    def __new__(cls, *arguments: Any, **keywords: Any) -> "Unread":
        return super().__new__(cls)

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass

    __hash__ = object.__hash__  # type: ignore[assignment]


# What training scripts store beside the weights. Each of these names is read as `Unread`.
HARMLESS = (
    *("argparse.Namespace", "types.SimpleNamespace", "collections.defaultdict", "collections.deque"),
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
    *("yacs.config.CfgNode", "easydict.EasyDict", "addict.addict.Dict", "addict.Dict"),
    *(f"{name}.config_dict.ConfigDict" for name in ("ml_collections", "ml_collections.config_dict")),
    *(f"{name}.AttributeDict" for name in ("pytorch_lightning.utilities.parsing", "lightning.fabric.utilities.data")),
    *("lightning.pytorch.utilities.parsing.AttributeDict", "lightning_fabric.utilities.data.AttributeDict"),
    *("mmengine.logging.history_buffer.HistoryBuffer", "mmengine.config.config.ConfigDict"),
)


class TorchFile:
    """The tensors of a file, mapped into memory. It is mapped again after some reads, since they stay in memory."""

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
    harmless: list[Any] = [(Unread, name) for name in HARMLESS]
    with torch.serialization.safe_globals(harmless), warnings.catch_warnings(action="ignore"):
        try:
            content = torch.load(path, **options)  # raises where its warnings matter
        except UnpicklingError as error:
            raise ValueError(_refusal(path, error)) from error
    if not isinstance(content, dict | list | tuple):
        raise ValueError(f"{path}: it holds a {type(content).__name__}, expected a state dict.")
    return dict(_tensors_in(content, "", 0))


def _refusal(path: Path, error: Exception) -> str:
    """Return what a file holds besides tensors, by name."""
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


def _tensors_in(content: Any, place: str, level: int) -> Iterator[tuple[str, Any]]:
    """Yield the tensors in nested dictionaries, lists and tuples, named by the keys on the way.

    What has a parameter's name, but is no tensor, is also yielded, so that it is not taken for missing.
    """
    entries = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in entries:
        name = f"{place}{key}"
        if isinstance(value, Tensor) or str(key).endswith((".weight", ".bias")):
            yield name, value
        elif isinstance(value, dict | list | tuple) and level < DEEPEST and not _is_of_training(str(key)):
            yield from _tensors_in(value, f"{name}{BELOW}", level + 1)


def _is_of_training(key: str) -> bool:
    return key.lower() in ("opt", "amp") or any(word in key.lower() for word in OF_TRAINING)
