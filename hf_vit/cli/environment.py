"""The command `hf-vit env`."""

import platform
from collections.abc import Iterator

from .endings import announce, echo

# Extras for work on this package, not for its use.
OF_DEVELOPERS = {"docs", "test"}


def env() -> None:
    """Print versions and hardware, for a bug report.

    Prints no user names, file names or tokens.

    Example: hf-vit env
    """
    announce("Looking for accelerators.")
    for line in (*_software(), *_hardware()):
        echo(line)


def _software() -> Iterator[str]:
    """Yield the versions of Python, of this package and of what it needs, and a line for each of its extras."""
    from ..system.extras import requirements
    from ..system.machine import installed_versions

    needed = {extra: [each.name for each in group] for extra, group in requirements().items()}
    installed = installed_versions(("hf-vit", *(name for names in needed.values() for name in names)))
    yield f"python {installed['python']}, {platform.system()} {platform.machine()}"
    yield f"hf-vit {installed.get('hf-vit', 'is not installed, but a source tree')}"
    for extra, names in needed.items():
        if not extra:
            yield from (f"{name} {installed.get(name, 'is not installed')}" for name in names)
        elif extra not in OF_DEVELOPERS:
            found = [f"{name} {installed[name]}" for name in names if name in installed]
            if missing := [name for name in names if name not in installed]:
                found.append(f"not installed: {' '.join(missing)}")
            yield f"extra {extra}: {', '.join(found)}"


def _hardware() -> Iterator[str]:
    """Yield the CPU and the accelerators; torch may be missing or broken where this command is needed most."""
    from ..benchmark.table import describe
    from ..system.machine import hardware

    try:
        import torch

        machine = hardware()
        device = torch.accelerator.current_accelerator(True)
        count = torch.accelerator.device_count()
    except Exception as error:  # also OSError of a library that does not load, whose message has paths
        yield f'torch cannot be used ({type(error).__name__}): python -c "import torch" shows why'
        return
    yield describe({name: value for name, value in machine.items() if name != "load"}, {})[0]
    yield "no accelerator" if device is None else f"accelerators: {count} x {device.type}"
