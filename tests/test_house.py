"""The structure of the package: seven floors with imports from above to below, and limits on files and functions."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import hf_vit

PACKAGE = Path(hf_vit.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
# A package imports from floors below its own, or from itself.
FLOORS = (
    {"model", "system"},
    {"data", "checkpoints", "inference", "hub", "variants"},
    {"graphs"},
    {"prediction", "evaluation", "inspection", "registration"},
    {"training", "benchmark", "demo", "serving"},
    {"studies"},
    {"cli"},
)
DEPRECATED = {"assessment", "finetuning"}
LONGEST_FILE, LONGEST_FUNCTION = 600, 100
LONGEST_LOOP = 120  # lines of `train`, which is read from top to bottom


def imported(path: Path) -> Iterator[str]:
    """Yield the parts of this package that a file imports, in functions too."""
    package = ("hf_vit", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = (*base, *(node.module.split(".") if node.module else ()))
            names = [module] if len(module) > 1 else [(*module, alias.name) for alias in node.names]
        else:
            continue
        yield from (name[1] for name in names if name[0] == "hf_vit" and len(name) > 1)


def floor_of(part: str) -> int:
    return next(number for number, floor in enumerate(FLOORS, start=1) if part in floor)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part in ("__init__", "__main__", *DEPRECATED):  # the faces of the package; they import lazily
        return
    above = {other for other in imported(path) if other != part and not other.startswith(("HFViT", "_"))}
    assert not [other for other in above if floor_of(other) >= floor_of(part)]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= LONGEST_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            most = LONGEST_LOOP if path.name == "loop.py" else LONGEST_FUNCTION
            assert node.end_lineno is not None and node.end_lineno - node.lineno < most, node.name
