"""The machine: processor, cores, memory, precision, versions. Torch is imported when it is needed."""

import os
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# What decides how fast matrices are multiplied.
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd", "bf16", "sve", "i8mm")


DISTRIBUTIONS = (
    *("hf-vit", "torch", "torchvision", "transformers", "timm", "vit-pytorch", "onnxruntime", "openvino", "pillow"),
    "datasets",
)


def processor() -> dict[str, str]:
    """Return what the system says of its first processor, by its own names."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {"model name": platform.processor() or platform.machine()}
    first = path.read_text(encoding="utf-8").split("\n\n")[0]
    return {name.strip(): fact.strip() for name, _, fact in (line.partition(":") for line in first.splitlines())}


def hardware() -> dict[str, Any]:
    """Return the machine: processor, cores that may be used, what it can do, memory, accelerator, other work on it."""
    import torch

    about = processor()
    flags = (about.get("flags") or about.get("Features") or "").split()
    machine: dict[str, Any] = {
        "processor": about.get("model name", platform.machine()),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "flags": [flag for flag in FLAGS if flag in flags],
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        machine["memory"] = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if torch.cuda.is_available():
        machine["accelerator"] = torch.cuda.get_device_name()
        machine["accelerator_memory"] = torch.cuda.get_device_properties(0).total_memory
    if hasattr(os, "getloadavg"):
        machine["load"] = round(os.getloadavg()[0], 2)
    return machine


def versions() -> dict[str, str]:
    """Return the versions of all that is measured, as far as it is installed."""
    found = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def slug(machine: dict[str, Any]) -> str:
    """Return a name of the machine for files."""
    name = machine.get("accelerator") or f"{machine['processor']} {machine['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")


def peak_memory(device: "torch.device") -> int:
    """Return the most bytes that torch has taken of a GPU, or that were resident in this process."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows has none
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def machine() -> str:
    """Return the hardware at hand, in words for a card."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} CPU cores ({platform.machine()})"


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "(source tree)"


def resolve_precision(precision: str) -> str:
    """Return what Accelerate calls a precision; `"auto"` is bf16 on hardware with matrix units for it."""
    import torch

    if precision != "auto":
        return PRECISIONS[precision]
    is_fast = torch.cuda.is_bf16_supported(False) if torch.cuda.is_available() else torch.cpu._is_amx_tile_supported()
    return "bf16" if is_fast else "no"


def precision_name(mixed_precision: str) -> str:
    """Return what a recipe calls the precision that Accelerate calls `mixed_precision`."""
    return next(name for name, theirs in PRECISIONS.items() if theirs == mixed_precision)


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# By what Accelerate calls them.
PRECISIONS = {"auto": "auto", "fp32": "no", "bf16": "bf16", "fp16": "fp16"}
