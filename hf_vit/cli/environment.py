"""The command `hf-vit env`."""

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires

from .endings import announce, echo

# Extras for work on this package, not for its use.
OF_DEVELOPERS = {"docs", "test"}


def env() -> None:
    """Print the installed versions and the hardware, for a bug report.

    Prints no names of users or files, and no tokens.

    Example: hf-vit env
    """
    announce("Looking for accelerators.")
    for line in (*_software(), *_hardware()):
        echo(line)


def _software() -> Iterator[str]:
    """Yield the versions of Python, this package and what it needs, and a line for each of its extras."""
    from packaging.requirements import Requirement

    from ..system.machine import installed_versions

    try:
        needed = [Requirement(text) for text in requires("hf-vit") or []]
    except PackageNotFoundError:
        needed = []
    # By extra; what is always needed is under the empty name.
    groups: dict[str, list[str]] = {"": ["hf-vit"]}
    for each in needed:
        extra = str(each.marker).partition("extra == ")[2].strip("\"'") if each.marker else ""
        if extra not in OF_DEVELOPERS and (not extra or each.name != "hf-vit"):
            groups.setdefault(extra, []).append(each.name)
    installed = installed_versions(tuple({name: None for names in groups.values() for name in names}))
    yield f"python {installed['python']}, {platform.system()} {platform.machine()}"
    if not needed:
        yield "hf-vit: a source tree that is not installed"
    for extra, names in groups.items():
        found = [f"{name} {installed.get(name, 'not installed')}" for name in names]
        if extra:
            yield f"extra {extra}: {', '.join(found)}"
        elif needed:
            yield from found


def _hardware() -> Iterator[str]:
    """Yield the CPU and the accelerators; torch may be missing or broken where this command is needed most."""
    from ..benchmark.table import describe
    from ..system.machine import hardware

    try:
        import torch

        machine = hardware()
        count = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
        kind = torch.accelerator.current_accelerator() if count else None
    except Exception as error:  # also OSError of a library that does not load; its message has paths
        yield f'torch cannot be used ({type(error).__name__}): python -c "import torch" shows why'
        return
    yield describe({name: value for name, value in machine.items() if name != "load"}, {})[0]
    yield f"{count} x {kind.type}" if kind is not None else "no accelerator"
