"""Run the examples of the README, of the pages in docs/ and of the docstrings."""

import doctest
import importlib
import pkgutil
import re
import shlex
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import transformers
import typer
import yaml
from hub_server import Hub
from PIL import Image
from tiny_run import colored_images
from typer.testing import CliRunner

import hf_vit
from hf_vit import (
    HFViTConfig,
    HFViTForImageClassification,
    HFViTForMultiTask,
    HFViTForObjectDetection,
    HFViTForSemanticSegmentation,
    HFViTImageProcessor,
)
from hf_vit.checkpoints.export import export_checkpoint
from hf_vit.cli.main import app
from hf_vit.training.recipe import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODULES = [module.name for module in pkgutil.walk_packages(hf_vit.__path__, "hf_vit.")]
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands_of(page: Path) -> list[str]:
    """Return the commands of a page, without comments; `a && b` is two commands."""
    text = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    return [
        command.strip() for line in text.splitlines() for command in line.split("#")[0].split("&&") if command.strip()
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with the images that the pages name, and tiny models under the names of large ones."""
    folder = tmp_path_factory.mktemp("documents")
    images, labels = colored_images(12, 0)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        for pictures in ("my_pictures", "test_pictures"):
            path = folder / pictures / f"kind {label}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    for name in ("a.png", "b.png", "photos/1.png", "photos/2.jpg", "new/1.jpg"):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 30), "red").save(folder / name)
    size = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    for name, image_size, patch_size in (("hf-vit-digits", 16, 2), ("my-vit", 32, 8), ("vit-b16", 224, 16)):
        labels_of = (
            {"id2label": {index: f"kind {index}" for index in range(3)}} if name == "my-vit" else {"num_labels": 10}
        )
        config = HFViTConfig(
            **size, hidden_act="gelu_pytorch_tanh", image_size=image_size, patch_size=patch_size, **labels_of
        )
        HFViTForImageClassification(config).save_pretrained(folder / name)
        HFViTImageProcessor.from_preset("original", image_size).save_pretrained(folder / name)
    export_checkpoint(str(folder / "vit-b16"), folder / "ViT-B_16.npz", "npz")
    for name in ("scenes", "test_scenes", "new_scenes"):
        for number in range(8):
            for kind, color in (("images", (255, 255 * (number % 2), 0)), ("masks", number % 2)):
                (folder / name / kind).mkdir(parents=True, exist_ok=True)
                mode = "RGB" if kind == "images" else "L"
                Image.new(mode, (40, 30), color).save(folder / name / kind / f"{number}.png")
    for name in ("cells", "test_cells", "new_cells"):
        (folder / name).mkdir()
        for number in range(8):
            Image.new("RGB", (40, 30), (0, 255 * (number % 2), 0)).save(folder / name / f"{number}.png")
            (folder / name / f"{number}.txt").write_text(f"{number % 2} 0.5 0.5 0.5 0.4")
    config = HFViTConfig(**size, image_size=32, patch_size=8, id2label={0: "0", 1: "1"})
    for name, of_pixels in (("my-segmenter", HFViTForSemanticSegmentation), ("my-detector", HFViTForObjectDetection)):
        of_pixels(config).save_pretrained(folder / name)
        HFViTImageProcessor.from_preset("original", 32).save_pretrained(folder / name)
    heads = {
        "breed": {"task": "classification", "id2label": {0: "Bengal", 1: "pug"}},
        "animal": {"task": "segmentation", "id2label": {0: "background", 1: "cat"}},
        "head_box": {"task": "regression", "id2label": {0: "center_x", 1: "width"}},
    }
    HFViTForMultiTask(HFViTConfig(**size, image_size=32, patch_size=8, task_heads=heads)).save_pretrained(
        folder / "my-heads"
    )
    stock: dict[str, Any] = {
        "google/vit-base-patch16-224": (transformers.ViTConfig, transformers.ViTForImageClassification),
        "facebook/deit-base-distilled-patch16-224": (
            transformers.DeiTConfig,
            transformers.DeiTForImageClassificationWithTeacher,
        ),
        "facebook/dinov2-small": (partial(transformers.Dinov2Config, patch_size=16), transformers.Dinov2Model),
    }
    for name, (config_class, model_class) in stock.items():
        model_class(config_class(**size)).save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # raised in huggingface_hub
def test_python_of_a_page_runs(page: Path, place: Path, client: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    names: dict[str, Any] = {}
    for block in blocks(page, "python"):  # with the names of the blocks above
        quick = block.replace("minutes=10", "minutes=0").replace("YOUR_NAME", "tester").replace('"my-vit"', '"fitted"')
        exec(compile(quick, str(page), "exec"), names)


@pytest.mark.parametrize("module", MODULES)
def test_examples_of_docstrings_give_what_they_say(module: str) -> None:
    assert doctest.testmod(importlib.import_module(module)).failed == 0


# ------------------------------------------------------------------------------------------------------- commands

# Appended to the options of a run, so that it takes a second.
SMALL = shlex.split("--max-steps 1 --batch-size 4 --precision fp32 --image-size 32 --eval-fraction 0.3 --data")
# Commands and options that are only parsed here, with the reason.
READ_ONLY = {
    "quickstart": "tests/test_quickstart.py",
    "benchmark": "tests/test_benchmark.py",
    "demo": "a server: tests/test_demo.py",
    "serve": "a server: tests/test_serving.py",
}
ELSEWHERE = {
    " --quick ": "minutes of training: tests/test_studies.py",
    " --seeds 5": "hours of training on a GPU",
    " --engine ray ": "tests/test_predicting.py",
    " --names": "needs a file without known names: tests/test_family_names.py",
    ".pte": "executorch is not in the extra test: tests/test_runtimes.py",
    "my-heads": "tests/test_multi_task_training.py",
    "--model student": "tests/test_distillation.py",
    "--calibrate": "needs more images than there are here: tests/test_certainty.py",
    "--max-error": "needs more images than there are here: tests/test_certainty.py",
}
# First words of other commands, which are not run here, with the reason.
OTHERS = {
    "pip": "installs packages; `.ci/run` and `scripts/release` do",
    "curl": "asks a server: tests/test_serving.py",
    "accelerate": "several processes: tests/test_distributed.py; the recipe is checked below",
    "torchrun": "several processes: tests/test_processes.py",
}


# The page on which a command is run: the last that has it, so that no command is run twice.
PAGE_OF = {command: page for page in PAGES for command in commands_of(page)}


def parse(command: str) -> tuple[str, list[str]]:
    """Parse a command as `hf-vit` does; an unknown option or an invalid value raises."""
    name, *arguments = shlex.split(command)[1:]
    with COMMANDS[name].make_context(name, list(arguments)):
        return name, arguments


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_a_page_is_run_or_has_a_reason(page: Path) -> None:
    for command in commands_of(page):
        name, *words = command.split()
        assert name in OTHERS or (name == "hf-vit" and words[0] in COMMANDS) or command == "pytest", command


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # raised in huggingface_hub
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_a_page_work(
    page: Path, place: Path, client: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(shutil.copytree(place, tmp_path / "place"))  # pages write files of the same names
    for number, command in enumerate(commands_of(page)):
        if not command.startswith("hf-vit ") or PAGE_OF[command] != page:
            continue
        command, _, file = command.replace("YOUR_NAME", "tester").partition(" > ")
        name, arguments = parse(command)
        if name in READ_ONLY or any(option in command for option in ELSEWHERE):
            continue
        if name == "fit":
            arguments += ["--minutes", "0", "--output-dir", str(tmp_path / f"fitted-{number}")]
        if name == "train":
            tasks = {"segmentation": "scenes/", "detection": "cells/"}
            data = next((data for task, data in tasks.items() if task in command), "my_pictures/")
            arguments += [*SMALL, data, "--output-dir", str(tmp_path / f"trained-{number}")]
        ended = CliRunner().invoke(app, [name, *arguments])
        assert ended.exit_code == 0, f"{command}\n{ended.output}"
        if file:
            Path(file).write_text(ended.stdout)


def test_a_launched_run_of_a_page_is_one_of_the_recipes() -> None:
    launched = [
        line.split("scripts/train.py")[1] for page in PAGES for line in commands_of(page) if "train.py" in line
    ]
    assert launched
    for options in launched:
        _, words = parse(f"hf-vit train {options}")
        TrainConfig.from_recipe(words[words.index("--recipe") + 1])


@pytest.mark.parametrize("name", COMMANDS)
def test_help_reads_well_in_80_columns(name: str) -> None:
    said = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "80"}).output
    assert max(map(len, said.splitlines())) <= 80
    example = re.search(r"Example: (hf-vit .*?)\n\n", re.sub(r"(?<=\S)\n  (?=\S)", " ", said), re.DOTALL)
    assert example, "every command shows an example"
    for command in example.group(1).split(" && "):
        parse(command.split(" > ")[0])
    listed = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "80"}).output
    assert re.search(rf"^  {name} +\S.*[^.]\.$", listed, re.MULTILINE)  # a whole sentence


def test_completion_knows_commands_and_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    def complete(words: str) -> list[str]:
        typed = {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1), "_HF_VIT_COMPLETE": "complete_bash"}
        return CliRunner().invoke(app, [], env=typed, prog_name="hf-vit").output.split()

    assert complete("hf-vit tra") == ["train"]
    assert complete("hf-vit train --recipe dig") == ["digits"]


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "license", "references"} <= citation.keys()
    project = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{citation["version"]}"' in project


def test_links_of_a_page_lead_somewhere() -> None:
    for page in (*PAGES, ROOT / "CONTRIBUTING.md", *ROOT.glob("model_cards/**/README.md")):
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"
