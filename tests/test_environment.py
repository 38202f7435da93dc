"""`hf-vit env` prints versions and hardware and nothing personal, also where torch does not work."""

import getpass
import socket
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hf_vit.cli.main import app
from hf_vit.system import extras


def lines() -> list[str]:
    ended = CliRunner().invoke(app, ["env"])
    assert ended.exit_code == 0, ended.output
    return ended.stdout.splitlines()


def test_versions_and_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    said = lines()
    assert said[0].startswith(f"python {sys.version.split()[0]}, ") and said[1].startswith("hf-vit ")
    for name in ("torch", "transformers", "accelerate", "datasets", "extra demo: gradio", "extra onnx: onnx"):
        assert sum(line.startswith(f"{name} ") for line in said) == 1, name
    assert not any(line.startswith(("extra test", "extra docs")) for line in said)
    assert "CPU core" in said[-2] and "GiB" in said[-2] and "accelerator" in said[-1]


def test_nothing_personal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 34)
    text = "\n".join(lines())
    assert "hf_a" not in text and "/" not in text.replace("https://", "")
    for name in (getpass.getuser(), socket.gethostname(), str(Path.home()), str(Path.cwd())):
        assert name not in text.split()


def test_a_torch_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert lines()[-1] == 'torch cannot be used (ModuleNotFoundError): python -c "import torch" shows why'


def test_a_source_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise extras.PackageNotFoundError(name)

    monkeypatch.setattr(extras, "distribution", missing)
    assert extras.requirements() == {"": []} and not extras.is_from_an_index()
    assert lines()[1].startswith("hf-vit ")


def test_requirements_are_those_of_the_project() -> None:
    needed = extras.requirements()
    assert {"torch", "transformers"} <= {each.name for each in needed[""]}
    assert [each.name for each in needed["demo"]] == ["gradio"]
    assert "hf-vit" not in {each.name for group in needed.values() for each in group}
