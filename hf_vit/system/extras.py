"""Optional dependencies."""

from importlib.util import find_spec


def need(extra: str, *packages: str) -> None:
    """Raise `ValueError` with the command to install an optional extra if one of its packages is missing."""
    if missing := [package for package in packages if find_spec(package) is None]:
        raise ValueError(f'{", ".join(missing)} must be installed for this: pip install "hf-vit[{extra}]"')
