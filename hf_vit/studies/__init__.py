"""The paper's experiments, at a size that a laptop or one GPU can run."""

from typing import TYPE_CHECKING, Any

from .catalogue import CATALOGUE, SIZES, load_study

if TYPE_CHECKING:
    from .page import write_page
    from .running import read_rows, run_study
    from .study import Results, Study

    STUDIES: dict[str, Study]

__all__ = ["CATALOGUE", "SIZES", "STUDIES", "Results", "Study", "load_study", "read_rows", "run_study", "write_page"]

LOCATIONS = {
    "Results": "study",
    "Study": "study",
    "read_rows": "running",
    "run_study": "running",
    "write_page": "page",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "STUDIES":
        return {known: load_study(known) for known in CATALOGUE}
    if name in LOCATIONS:
        return getattr(import_module(f".{LOCATIONS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
