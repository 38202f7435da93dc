"""Packages that only some uses need."""

from importlib.util import find_spec


def need(extra: str, *packages: str) -> None:
    """Raise a `ValueError` with its remedy if a package of an optional extra is missing."""
    if missing := [package for package in packages if find_spec(package) is None]:
        raise ValueError(f'This needs what is not installed ({", ".join(missing)}): pip install "hf-vit[{extra}]"')
