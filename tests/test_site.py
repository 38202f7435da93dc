"""The site in docs/: what its pages and diagrams say follows from the code. `.ci/run` builds it without warnings."""

import importlib.util
import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from test_house import FLOORS

import hf_vit

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    """Import `docs/tables.py`, which is part of no package."""
    spec = importlib.util.spec_from_file_location("tables_of_docs", DOCS / "tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_of_pages_follow_from_their_sources(tables: ModuleType) -> None:
    found = 0
    for page in tables.pages():
        text = page.read_text(encoding="utf-8")
        assert tables.renewed(text) == text, f"{page.name}: run `python docs/tables.py` and review its diff"
        found += text.count("<!-- table: ")
    assert found == len(tables.TABLES)


def test_every_trained_model_is_in_the_zoo(tables: ModuleType) -> None:
    for recipe in ROOT.glob("model_cards/*/recipe.yaml"):
        assert f"[{recipe.parent.name}]" in tables.models()


def test_every_claim_of_a_study_is_listed(tables: ModuleType) -> None:
    claims = sum(page.read_text().count("| **") for page in ROOT.glob("model_cards/studies/*/README.md"))
    rows = re.findall(r"^\| \[", tables.claims(), re.MULTILINE)
    assert len(rows) == claims > 0
    assert sum(map(int, re.findall(r": (\d+) claims", tables.claims()))) == claims


def test_every_command_has_a_section(tables: ModuleType) -> None:
    commands = re.findall(r"^\$ (hf-vit.*)$", (ROOT / "tests/golden/help.txt").read_text(), re.MULTILINE)
    assert re.findall(r"^## (hf-vit.*)$", tables.commands(), re.MULTILINE) == [name.rstrip() for name in commands]
    for shown in (
        "`--int8 .weights.dynamic.static.`",
        "`--resume .auto.never.`",
        r"\[default: fp32",
        r"\[default: 10",
    ):
        assert re.search(shown, tables.commands()), shown  # brackets depend on the version of typer


def test_the_diagram_of_the_floors_is_that_of_the_house() -> None:
    drawn = (DOCS / "static" / "floors.svg").read_text()
    for number, packages in enumerate(FLOORS, start=1):
        texts = re.findall(rf">{number} · ([^<]+)<", drawn)
        assert {name for text in texts for name in text.split(", ")} == packages


def test_every_package_with_public_names_is_in_the_reference() -> None:
    documented = set(
        re.findall(r"automodule:: (\S+)", "".join(page.read_text() for page in (DOCS / "reference").glob("*.md")))
    )
    packages = {f"hf_vit.{path.parent.name}" for path in Path(hf_vit.__file__).parent.glob("*/__init__.py")}
    assert documented == packages - {f"hf_vit.{name}" for name in ("cli", "model", "system")} | {
        "hf_vit",
        "hf_vit.variants",
    }


@pytest.mark.parametrize("picture", sorted(DOCS.glob("static/*.svg")), ids=lambda path: path.name)
def test_a_diagram_is_readable_in_light_and_dark_without_other_files(picture: Path) -> None:
    text = picture.read_text()
    assert "prefers-color-scheme: dark" in text and "<title" in text and "<desc" in text
    assert not re.findall(r"""(?:href|src|url\()["']?\s*(?!http://www.w3.org)[^)"'\s]""", text)
    light, dark = text.split("@media")
    for name in re.findall(r"\.([a-z]+) \{", light):
        assert f".{name}" in dark, f"{name} has no color in the dark"


def test_badges_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    drawn = re.findall(r"<text[^>]*>([^<]+)</text>", (DOCS / "static" / "badges.svg").read_text())
    stated = {"Python": project["requires-python"], **dict(each.split(">=") for each in project["dependencies"])}
    for name, value in zip(drawn[0:6:2], drawn[1:6:2], strict=True):
        assert value == stated[name].removeprefix(">=") + "+"
    assert drawn[6:] == ["licence", project["license"]]


def test_no_line_of_a_page_is_a_comment() -> None:
    """MyST drops a line that begins with a percent sign, as after "98" at the end of a line."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "model_cards").rglob("*.md")]
    found = {path.name: line for path in pages for line in path.read_text().splitlines() if re.match(r"\s*%", line)}
    assert not found


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) < 1200


def test_pages_request_nothing_from_other_machines() -> None:
    for page in (*DOCS.rglob("*.md"), *DOCS.rglob("*.css"), *ROOT.glob("*.md")):
        assert not re.findall(r"!\[[^\]]*\]\(\w+://|<img[^>]+src=\"\w+://|url\(\w+://", page.read_text()), page.name
