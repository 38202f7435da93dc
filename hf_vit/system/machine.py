"""Hardware and installed versions of this machine, and the precisions that it runs fast.

Torch is imported inside the functions: the command line reads the table of precisions without it.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .texts import counted

if TYPE_CHECKING:
    import torch

# Names of precisions in recipes and options, and Accelerate's names for them.
PRECISIONS = {"auto": "auto", "fp32": "no", "bf16": "bf16", "fp16": "fp16", "fp8": "fp8"}
# CPU flags that decide the speed of matrix products.
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd", "bf16", "sve", "i8mm")
DISTRIBUTIONS = (
    *("hf-vit", "torch", "torchvision", "transformers", "timm", "vit-pytorch", "onnxruntime", "openvino", "pillow"),
    "datasets",
)


def resolve_precision(precision: str) -> str:
    """Return Accelerate's name of a precision; `"auto"` is bf16 on hardware with matrix units for it, else fp32."""
    if precision != "auto":
        return PRECISIONS[precision]
    import torch

    is_fast: dict[str, Callable[[], bool]] = {
        "cuda": lambda: torch.cuda.is_bf16_supported(False),
        "xpu": lambda: torch.xpu.is_bf16_supported(False),
        "cpu": torch.cpu._is_amx_tile_supported,
    }
    device = torch.accelerator.current_accelerator(True)
    return "bf16" if is_fast.get("cpu" if device is None else device.type, lambda: False)() else "no"


def multiplies_in_8_bits(device: torch.device) -> bool:
    """Return whether a device has matrix units for FP8: GPUs from Ada and Hopper, or from AMD's MI300, on."""
    import torch

    if device.type != "cuda":
        return False
    if torch.version.hip is None:
        return torch.cuda.get_device_capability(device) >= (8, 9)
    # Capabilities of AMD GPUs are on another scale: an MI250, which has no FP8, has 9.0.
    name = torch.cuda.get_device_properties(device).gcnArchName
    return name.startswith(("gfx94", "gfx95", "gfx12"))


def precision_name(mixed_precision: str) -> str:
    """Return the name in recipes of the precision that Accelerate calls `mixed_precision`."""
    return next(name for name, theirs in PRECISIONS.items() if theirs == mixed_precision)


@contextmanager
def deterministic_algorithms(is_on: bool = True) -> Iterator[None]:
    """Have torch compute the same bits every time on the same device, if it is on.

    On GPUs, the fastest algorithms add in the order in which threads happen to finish, for example in the backward of
    attention. An operation without a deterministic algorithm raises `RuntimeError`.
    """
    if not is_on:
        yield
        return
    import torch
    from torch._inductor import config as inductor
    from torch.nn.attention import SDPBackend, sdpa_kernel

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        # The other backends have no deterministic backward.
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]), inductor.patch(deterministic=True):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def cores() -> int:
    """Return the number of CPU cores available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory() -> int:
    """Return the bytes of memory that this process can still use: what is available, within the limits of cgroups."""
    import psutil

    return max(0, min([psutil.virtual_memory().available, *_free_in_cgroups()]))


def _free_in_cgroups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[int]:
    """Return the bytes that are left in each cgroup with a limit, of containers and job schedulers."""
    free = []
    with suppress(OSError, ValueError):
        groups = [line.split(":", 2)[1:] for line in own.read_text(encoding="utf-8").splitlines()]
        for controllers, name in groups:
            if controllers == "":
                base, files = root, ("memory.max", "memory.current")
            elif "memory" in controllers.split(","):
                base, files = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
            else:
                continue
            folder = base / name.strip("/")
            for group in [folder, *folder.parents[: len(folder.parts) - len(base.parts)]]:
                with suppress(OSError, ValueError):  # no limit is "max", which is no number
                    limit, used = (int((group / file).read_text()) for file in files)
                    statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                    free.append(limit - used + int(statistics.get("inactive_file", 0)))  # the page cache is given up
    return free


def processor() -> dict[str, str]:
    """Return the fields of `/proc/cpuinfo` for the first CPU; only the model name on systems without that file."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {"model name": platform.processor() or platform.machine()}
    first = path.read_text(encoding="utf-8").split("\n\n")[0]
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}


def hardware() -> dict[str, Any]:
    """Return processor, CPU cores, threads, CPU flags, memory in bytes, accelerator, and the current load average."""
    import torch

    fields = processor()
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    found: dict[str, Any] = {
        "processor": fields.get("model name", platform.machine()),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "flags": [flag for flag in FLAGS if flag in flags],
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory"] = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if torch.cuda.is_available():
        found["accelerator"] = torch.cuda.get_device_name()
        found["accelerator_memory"] = torch.cuda.get_device_properties(0).total_memory
    if hasattr(os, "getloadavg"):
        found["load"] = round(os.getloadavg()[0], 2)
    return found


def machine() -> str:
    """Return the hardware in a few words for a model card, such as `"8 x NVIDIA H200"`."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{cores()} CPU cores ({platform.machine()})"


def device_name(device: torch.device) -> str:
    """Return a device in a few words, such as `"CPU, 2 threads"` or `"NVIDIA H200"`."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {counted(torch.get_num_threads(), 'thread')}" if device.type == "cpu" else device.type.upper()


def slug(hardware: dict[str, Any]) -> str:
    """Return a file name for a machine that `hardware` describes."""
    name = hardware.get("accelerator") or f"{hardware['processor']} {hardware['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")


def installed_versions(distributions: tuple[str, ...] = DISTRIBUTIONS) -> dict[str, str]:
    """Return the versions of Python and of those `distributions` that are installed."""
    found = {"python": platform.python_version()}
    for name in distributions:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def versions() -> str:
    """Return the versions that decide the results of a run, on one line."""
    names = ("hf-vit", "torch", "transformers", "accelerate")
    found = installed_versions(names)
    packages = (f"{name} {found.get(name, '(source tree)')}" for name in names)
    return ", ".join([f"Python {found['python']}", *packages])


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: allocated by torch on a GPU, else resident in this process."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not available on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
