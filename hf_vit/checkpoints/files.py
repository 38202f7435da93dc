"""Open a file, a folder or a name on the Hub as tensors that are read on request.

Names and paths that the files of a folder state are checked before they are used.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import _CACHED_NO_EXIST, constants, try_to_load_from_cache
from transformers.utils import cached_file

from ..system.network import sentence_of
from ..system.places import is_path, missing
from ..system.texts import one_line
from .formats import Stored, Tensors, format_of, read_tensors

__all__ = ["Source", "Stored", "Tensors", "open_source"]

# Folders in which runs keep their state, and their commands; only an unfinished run has no weights next to them.
OF_RUNS = {"fit": "fit", "checkpoints": "train"}
WEIGHTS = (
    *("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"),
    *("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
)
OPEN_CLIP_CONFIG = "open_clip_config.json"
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
SIDE_FILES = ("config.json", *PROCESSOR_FILES)
ADAPTER = "adapter_config.json"
ENDINGS_OF_WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".npz", ".tar", ".h5", ".msgpack", ".onnx")


@dataclass
class Source:
    """A checkpoint as stored.

    Attributes:
        name: The file, folder or name on the Hub that was opened, for errors and reports.
        tensors: The tensors by their names in the file.
        config: Content of `config.json` in the folder of the weights; empty if there is none.
        folder: Folder of the weights, or of the other files of the checkpoint.
        outside: Tensors outside of the encoder. A family may read those that are also in `tensors`, such as a head.
        assumed: Sentences about a choice among the weights in the file.
        notes: Sentences about how names were changed.
        head_layers: Modules of a head that is not one linear layer.
    """

    name: str
    tensors: Tensors
    config: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    outside: Tensors = field(default_factory=dict)
    assumed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    head_layers: list[str] = field(default_factory=list)

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
        if path.name.startswith("adapter_model.") and (path.parent / ADAPTER).is_file():
            raise ValueError(_adapter_of(str(path.parent), read_json(path.parent / ADAPTER)))
        names = () if format_of(path) == "npz" else SIDE_FILES
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
        if adapter := _find(str(name), hub, ADAPTER):
            raise ValueError(_adapter_of(str(name), read_json(adapter)))
        if command := next((command for part, command in OF_RUNS.items() if (path / part).is_dir()), None):
            raise ValueError(f"{name} holds an unfinished run: repeat its hf-vit {command} command to finish it.")
        raise ValueError(f"{name}: no weights found; expected one of {', '.join(WEIGHTS)}. {_instead(path)}")
    find = partial(_find, str(name), hub)
    side_files = (*SIDE_FILES, OPEN_CLIP_CONFIG) if read[1].name.startswith("open_clip") else SIDE_FILES
    return _source(str(name), *read, {file: found for file in side_files if (found := find(file))})


def _instead(folder: Path) -> str:
    """Return advice on what to pass instead of a folder that has no weights of a known name."""
    if next(folder.glob("*.distcp"), None) or next(folder.glob("*/*.distcp"), None):
        return (
            "It is a distributed checkpoint of torch. Merge it: python -m torch.distributed.checkpoint.format_utils "
            f"dcp_to_torch {folder} weights.pth"
        )
    if (script := folder / "zero_to_fp32.py").is_file():
        return f"It is a checkpoint of DeepSpeed. Merge it: python {script} {folder} NEW_FOLDER"
    below = [file.parent for weights in WEIGHTS for file in folder.glob(f"*/{weights}")]
    others = sorted([*(file for file in folder.glob("*") if file.suffix in ENDINGS_OF_WEIGHTS), *below])
    return f"Pass the path of a file or folder{f', such as {others[-1]}' if others else ''}."


def _adapter_of(name: str, config: dict[str, Any]) -> str:
    base = config.get("base_model_name_or_path") or "its base model"
    return (
        f"{name}: an adapter of {base}, not a whole model. Load both with peft, and save the result: "
        f"PeftModel.from_pretrained(model, {name!r}).merge_and_unload().save_pretrained('merged'), where model is "
        f"{base}."
    )


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
            if constants.HF_HUB_OFFLINE:
                reason = "it is not in the cache, and HF_HUB_OFFLINE is set."
            raise ValueError(f"{missing(name)}. It was not loaded from the Hub either: {reason}") from error
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
        if lost := {tensor for tensor, shard in shards.items() if shard == name} - here.keys():
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
