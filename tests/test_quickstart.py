"""The main job, from the first step to an answer in another process."""

import json
from pathlib import Path

import pytest

from hf_vit.cli.quickstart import quickstart
from hf_vit.hub.folder import check_folder


def run(output_dir: Path, **fields: object) -> str:
    lines: list[str] = []
    quickstart(str(output_dir), seed=0, resume="auto", say=lines.append, **fields)
    return "\n".join(lines)


def test_quickstart_in_little(tmp_path: Path) -> None:
    """A few steps: what is learned is poor, but every part is there and the fresh process agrees."""
    folder = tmp_path / "hf-vit-digits"
    printed = run(folder, max_steps=6)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert f"Accuracy {metrics['eval_accuracy']:.2%}" in printed
    assert "359 of 359 predictions equal those of the model in memory." in printed
    assert f"hf-vit push {folder} YOUR_NAME/hf-vit-digits" in printed
    pictures = {"training.png", "confusion.png", "predictions.png", "positions.png"}
    assert {path.name for path in folder.glob("*.png")} == pictures
    assert "| accuracy" in (folder / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.full
def test_quickstart_reaches_98_percent(tmp_path: Path) -> None:
    folder = tmp_path / "hf-vit-digits"
    run(folder)
    assert json.loads((folder / "metrics.json").read_text())["eval_accuracy"] >= 0.975  # the spread is half a percent
    assert check_folder(folder)
