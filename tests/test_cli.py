"""The command line: parse, call one function, print."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer
from tiny_run import save_photos, tiny_recipe
from typer.testing import CliRunner

import hf_vit.hub.upload
import hf_vit.training.report
from hf_vit.checkpoints import Options
from hf_vit.cli.main import app
from hf_vit.cli.models import CHECKPOINT_OPTIONS
from hf_vit.system.stopping import Interrupted
from hf_vit.training.recipe import TrainConfig, shipped_recipes

runner = CliRunner()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    photos = save_photos(folder / "photos")
    path = folder / "tiny.yaml"
    path.write_text(tiny_recipe(photos, folder / "unused", max_steps=3).to_yaml())
    return path


COMMANDS = list(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", [[], *([command] for command in COMMANDS)])
def test_help(command: list[str]) -> None:
    result = runner.invoke(app, [*command, "--help"])
    assert result.exit_code == 0 and "Usage" in result.output


# Commands that print without any work, and what they must not import.
INSTANT = ["--help", "--version", "recipes", "recipes digits", "study", *(f"{command} --help" for command in COMMANDS)]
HEAVY = {
    "torch",
    "torchvision",
    "transformers",
    "datasets",
    "accelerate",
    "pyarrow",
    "matplotlib",
    "sklearn",
    "numpy",
    "PIL",
}
NAMES_OF_IMPORTS = """
import runpy, sys
before, sys.argv = {*sys.modules}, ["hf-vit", *sys.argv[1:]]
try: runpy.run_module("hf_vit.cli", run_name="__main__")
finally: print(*{name.split(".")[0] for name in {*sys.modules} - before})
"""


@pytest.mark.parametrize("command", INSTANT)
def test_instant_commands_import_nothing_heavy(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", NAMES_OF_IMPORTS, *command.split()], capture_output=True, text=True, check=True
    )
    imported = {*done.stdout.splitlines()[-1].split()}
    assert "hf_vit" in imported and imported.isdisjoint(HEAVY)


def test_the_app_is_importable_from_the_package() -> None:
    from hf_vit import cli

    assert cli.app is app and cli.__all__ == ["app"]


def test_options_of_a_checkpoint_are_those_of_its_class() -> None:
    assert {field.name for field in fields(Options)} >= {*CHECKPOINT_OPTIONS}
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for command in ("convert", "inspect"):
        assert {*CHECKPOINT_OPTIONS} <= {parameter.name for parameter in commands[command].params}


def test_train_writes_a_folder_that_can_be_looked_at(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    result = runner.invoke(
        app, ["train", "--recipe", str(recipe), "--output-dir", str(out), "--model-config.hidden-size", "24"]
    )
    assert result.exit_code == 0, result.output
    assert "Accuracy" in result.output and f"hf-vit push {out} YOUR_NAME/model" in result.output
    names = {path.name for path in out.iterdir()}
    assert {"model.safetensors", "config.json", "preprocessor_config.json", "README.md", "recipe.yaml"} <= names
    assert {"training.png", "predictions.png", "positions.png", "metrics.json", "log.jsonl"} <= names
    card = (out / "README.md").read_text()
    assert "accuracy" in card and "model_config" in card and "training.png" in card
    assert hf_vit.HFViTConfig.from_pretrained(out).hidden_size == 24


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("export vit vit.onnx", "vit.onnx exists: choose another file, or pass --force"),
        ("export vit vit.onxx", "vit.onxx does not end in .onnx, .xml, .pte, .pt2, .npz: add --to, one of onnx, "),
        ("export encodr vit.onnx --force", "No such file or folder: encodr (did you mean encoder?)."),
        ("fit vit --model encodr", "No such file or folder: encodr (did you mean encoder?)."),
    ],
)
def test_what_needs_no_model_is_refused_before_heavy_imports(command: str, message: str, tmp_path: Path) -> None:
    for folder in ("vit", "encoder"):
        (tmp_path / folder).mkdir()
    (tmp_path / "vit.onnx").touch()
    program = [sys.executable, "-c", NAMES_OF_IMPORTS, *command.split()]
    done = subprocess.run(program, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr
    assert {*done.stdout.splitlines()[-1].split()}.isdisjoint(HEAVY)


def test_the_formats_of_an_export_are_those_of_the_help() -> None:
    from hf_vit.checkpoints.export import TARGETS
    from hf_vit.cli.models import FORMATS
    from hf_vit.graphs.kinds import KINDS
    from hf_vit.graphs.transformers_js import NAME

    assert FORMATS.split(", ") == [*KINDS, NAME, *TARGETS]


@pytest.mark.parametrize(("part", "command"), [("fit", "fit"), ("checkpoints", "train")])
def test_an_unfinished_run_is_named(part: str, command: str, tmp_path: Path) -> None:
    (tmp_path / "run" / part).mkdir(parents=True)
    result = runner.invoke(app, ["inspect", str(tmp_path / "run")])
    assert f"run holds an unfinished run: repeat its hf-vit {command} command to finish it." in result.stderr


def test_a_name_that_is_not_in_the_cache_is_no_fault_of_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = runner.invoke(app, ["inspect", "nobody/no-such-vit"])
    assert "No such file or folder: nobody/no-such-vit." in result.stderr
    assert result.stderr.rstrip().endswith("it is not in the cache, and HF_HUB_OFFLINE is set.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epoch", "3"], "There is no option --epoch: did you mean --epochs?"),
        (["--epochs", "many"], "epochs must be a number, got 'many'"),
        (["--compile=maybe"], "compile must be true or false, got 'maybe'"),
        (["--model-config.hidden-sise", "3"], "hidden_size"),
        (["/no/such/place"], "No such file or folder: /no/such/place"),
        (["--data", "/no/such/place"], "No such file or folder: /no/such/place"),
        (["--recipe", "nothing"], "Unknown recipe 'nothing'"),
        (["--resume", "maybe"], "resume must be one of auto, never, got 'maybe'"),
    ],
)
def test_what_a_user_can_mend_is_one_line(arguments: list[str], message: str, recipe: Path, tmp_path: Path) -> None:
    options = ["--output-dir", str(tmp_path / "out"), *arguments]
    if "--recipe" not in arguments:
        options += ["--recipe", str(recipe)]
    result = runner.invoke(app, ["train", *options])
    assert result.exit_code == 2
    assert "Error: " in result.stderr and message in result.stderr


def test_a_stopped_run_says_how_to_go_on(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(config: Any, publish: Any) -> None:
        raise Interrupted(2, "Stopped by SIGINT after step 1 of 3.")

    monkeypatch.setattr(hf_vit.training.report, "train", stop)
    command, never = ["/usr/bin/hf-vit", "train", "--recipe", "a b.yaml"], ["--resume", "never"]
    for arguments, said in (
        ([], "The same command resumes the run:"),
        (never, "This command, without --resume never, resumes the run:"),
        (["--resume=never"], "This command, without --resume never, resumes the run:"),
    ):
        monkeypatch.setattr(sys, "argv", [*command[:2], *arguments, *command[2:]])
        result = runner.invoke(app, ["train", "--recipe", str(recipe)])
        assert result.exit_code == 130
        assert "Stopped by SIGINT" in result.stderr
        assert f"{said}  hf-vit train --recipe 'a b.yaml'\n" in result.stderr


def test_recipes_are_listed_and_explained(tmp_path: Path) -> None:
    listed = runner.invoke(app, ["recipes"]).output
    assert [line.split()[0] for line in listed.splitlines()] == list(shipped_recipes())
    explained = runner.invoke(app, ["recipes", "digits"]).output
    (tmp_path / "mine.yaml").write_text(explained)
    assert TrainConfig.from_recipe(tmp_path / "mine.yaml") == TrainConfig.from_recipe("digits")
    assert "# Result:" in explained and "# Peak learning rate.\nlearning_rate: 0.002\n" in explained


def test_push_calls_push(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []

    def push(folder: Path, repo_id: str, *, private: bool, license: str | None, with_handler: bool) -> str:
        calls.append((folder, repo_id, private, license, with_handler))
        return f"https://huggingface.co/{repo_id}"

    monkeypatch.setattr(hf_vit.hub.upload, "push", push)
    result = runner.invoke(app, ["push", str(tmp_path), "me/digits", "--private", "--license", "mit"])
    assert result.exit_code == 0, result.output
    assert calls == [(tmp_path, "me/digits", True, "mit", False)]
    assert result.output.strip() == "Published at https://huggingface.co/me/digits"
