"""Public names of a package that are imported at first use (PEP 562)."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any


def lazy_exports(
    package: str, exports: Mapping[str, Iterable[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return `__getattr__`, `__dir__` and `__all__` for a package that re-exports names of its modules.

    Args:
        package: `__name__` of the package.
        exports: The public names in each module of the package. A name must not be a module of the package too.
    """
    homes = {name: module for module, names in exports.items() for name in names}

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return load, lambda: sorted(homes), sorted(homes)


def moved_exports(
    former: str, package: str, exports: Mapping[str, Iterable[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return the same as `lazy_exports` for a deprecated module, `former`, whose names have moved within a package.

    Importing a name from it warns, and states the modules to import from.
    """
    load, names, every = lazy_exports(package, exports)

    def warn(name: str) -> Any:
        value = load(name)
        modules = " and ".join(f"{package}.{module}" for module in exports)
        warnings.warn(f"{former} is deprecated: import its names from {modules}.", FutureWarning, stacklevel=2)
        return value

    return warn, names, every
