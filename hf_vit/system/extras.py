"""Installed packages: optional ones that are missing, and required ones that do not fit each other."""

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from .network import causes_of
from .texts import one_line


def need(extra: str, *packages: str) -> None:
    """Raise `ValueError` with the command to install an optional extra if one of its packages is missing."""
    if missing := [package for package in packages if find_spec(package) is None]:
        raise ValueError(f'{", ".join(missing)} must be installed for this: pip install "hf-vit[{extra}]"')


def broken_installation(error: BaseException) -> str | None:
    """Return a sentence if an error comes from a package that is missing or was built for another version of torch."""
    for cause in causes_of(error):
        is_missing = isinstance(cause, ImportError) and not (cause.name or "").startswith("hf_vit")
        if is_missing or (isinstance(cause, RuntimeError) and "operator torchvision::" in str(cause)):
            found = ", ".join(map(_installed, ("torch", "torchvision")))
            return (
                f"An installed package is missing or does not fit ({one_line(str(cause))}; {found}): install torch "
                "and torchvision from the same index, then hf-vit again."
            )
    return None


def _installed(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"no {package}"
