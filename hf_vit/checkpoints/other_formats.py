"""Messages for files without readable weights: what the file is, and what to do instead."""

import re
from collections.abc import Collection
from pathlib import Path

from ..system.texts import shortened

SAVE = "Save the weights of the original model: torch.save(model.state_dict(), 'weights.pth')."
# What a file is, judging by its first bytes or the end of its name, and what to do.
BYTES = {
    rb"\Z": ("an empty file", "Download or copy it again."),
    rb"version https://git-lfs": (
        "a Git LFS pointer, which stands for the weights",
        "Run git lfs pull in its repository, or download the file itself.",
    ),
    rb"\s*<(!doctype|html|\?xml)": (
        "a web page, as a failed download leaves it",
        "Download the file itself; on GitHub, its raw version.",
    ),
    rb"\x89HDF": (
        "an HDF5 file of Keras or TensorFlow",
        "Load it with its library, and save the weights under the names of a layout that is read. Repositories on the "
        "Hub often hold safetensors, too.",
    ),
    rb"GGUF": ("a GGUF file of llama.cpp, whose weights are quantized", "Use the safetensors that it was made from."),
    rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!": ("a compressed archive", "Unpack it, and pass the file inside."),
    rb"....TFL3": ("a TensorFlow Lite graph", "Use the checkpoint that it was made from."),
}
ENDINGS = {
    ".msgpack": (
        "a msgpack file of flax",
        "Use the safetensors of its repository; or, if the model is Google's, load it with flax, and save its arrays "
        "with numpy.savez under their names joined by '/'.",
    ),
    ".pb": ("a TensorFlow graph", "Use the checkpoint that it was made from."),
    ".index": ("the index of a TensorFlow checkpoint", "Use a checkpoint of the model in PyTorch or JAX."),
    ".json": ("a JSON file", "Pass the folder, or the file of the weights."),
}
# What a zip archive is, by the name of a member, and what to do.
MEMBERS = {
    "constants.pkl": (
        "a TorchScript archive, which holds a program",
        "If you trust its author, save its weights: torch.save(torch.jit.load({name!r}).state_dict(), 'weights.pth').",
    ),
    "archive_format": (
        "an archive of torch.export, which holds a program",
        "Save its weights: torch.save(torch.export.load({name!r}).state_dict, 'weights.pth').",
    ),
    "model.weights.h5": (
        "a model of Keras",
        "Load it with Keras, and save the weights under the names of a layout that is read.",
    ),
}


def refused(path: Path, head: bytes) -> str:
    """Return why a file is not a checkpoint, given its first bytes."""
    if path.suffix.lower() == ".onnx" or re.match(rb"\x08[\x01-\x1f]\x12", head):
        return _of_onnx(path)
    known = next((entry for start, entry in BYTES.items() if re.match(start, head, re.IGNORECASE | re.DOTALL)), None)
    if known := known or ENDINGS.get(path.suffix.lower()):
        return f"{path}: {known[0]}, not a checkpoint. {known[1]}"
    return f"{path}: not a checkpoint; expected safetensors, npz, or a file written by torch.save."


def refused_archive(path: Path, members: Collection[str]) -> str | None:
    """Return why a zip archive with these members is not a checkpoint; `None` for a file of `torch.save`."""
    names = {member.rpartition("/")[2] for member in members}
    for member, (what, remedy) in MEMBERS.items():
        if member in names:
            return f"{path}: {what}, not a state dict. {remedy.format(name=path.name)}"
    if "data.pkl" in names:
        return None
    return f"{path}: a zip archive of other files ({shortened(sorted(members))}). Unpack it, and pass the file inside."


def _of_onnx(path: Path) -> str:
    try:
        import onnx
    except ImportError:
        return f"{path}: an ONNX graph, not a checkpoint. {SAVE} With the package onnx, its tensors are named here."
    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception:  # a corrupt file can fail in any way
        return f"{path}: a corrupt ONNX graph, and no checkpoint. {SAVE}"
    names = [tensor.name for tensor in graph.initializer if re.search(r"\.(weight|bias)$", tensor.name)]
    named = f"names {len(names)} of them ({shortened(names)})" if names else "has no names for them"
    return (
        f"{path}: an ONNX graph, not a checkpoint: it holds {len(graph.initializer)} tensors and {named}; others are "
        f"transposed or merged with operations. {SAVE}"
    )
