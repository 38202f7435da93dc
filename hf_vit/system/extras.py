"""Installed packages: optional ones that are missing, and required ones that do not fit each other."""

from importlib.metadata import PackageNotFoundError, distribution, version
from importlib.util import find_spec
from typing import TYPE_CHECKING

from .network import causes_of
from .texts import one_line

if TYPE_CHECKING:
    from packaging.requirements import Requirement


def need(extra: str, *packages: str) -> None:
    """Raise `ValueError` with the command to install an optional extra if one of its packages is missing."""
    if missing := [package for package in packages if find_spec(package) is None]:
        raise ValueError(f'{", ".join(missing)} must be installed for this: pip install "hf-vit[{extra}]"')


def requirements() -> "dict[str, list[Requirement]]":
    """Return what this package needs by extra, and under the empty name what it always needs.

    A source tree that is not installed has no requirements.
    """
    from packaging.requirements import Requirement

    by_extra: dict[str, list[Requirement]] = {"": []}
    try:
        stated = distribution("hf-vit").requires or []
    except PackageNotFoundError:
        stated = []
    for each in map(Requirement, stated):
        extra = str(each.marker or "").rpartition("extra == ")[2].strip("\"'")
        if each.name != "hf-vit":  # an extra that includes another
            by_extra.setdefault(extra, []).append(each)
    return by_extra


def is_from_an_index() -> bool:
    """Return whether this package was installed by its name, not from a file, a folder or a repository (PEP 610)."""
    try:
        return distribution("hf-vit").read_text("direct_url.json") is None
    except PackageNotFoundError:
        return False


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
