"""Folders that commands write: a folder of the user, or one within the data, is never written."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_run import save_photos, stop_at, tiny_recipe

from hf_vit.system.disk import check_output_folder, new_folder, same_place
from hf_vit.system.stopping import Interrupted
from hf_vit.training.loop import train
from hf_vit.training.recipe import TrainConfig
from hf_vit.training.run import LOG, METRICS, check_output_dir, clear_output


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder of the user with data in it."""
    (tmp_path / "photos" / "cats").mkdir(parents=True)
    (tmp_path / "photos" / "cats" / "1.png").touch()
    (tmp_path / "README.md").write_text("mine")
    return tmp_path


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        (".", "holds the data folder"),
        ("photos", "is the data folder"),
        ("photos/run", "lies in the data folder"),
        ("photos/cats", "lies in the data folder"),
    ],
)
def test_an_output_folder_does_not_mix_with_the_data(folder: str, said: str, files: Path) -> None:
    with pytest.raises(ValueError, match=said):
        check_output_folder(files / folder, False, ["digits", files / "photos"])


def test_a_folder_of_the_user_is_not_written(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    with pytest.raises(ValueError, match=r"did not write \(README.md, photos\): choose another --output-dir"):
        check_output_dir(TrainConfig(data="digits", output_dir="."))
    with pytest.raises(ValueError, match="is a file"):
        check_output_folder("README.md", False)
    (files / "new").mkdir()
    (files / "new" / ".gitattributes").touch()
    for allowed in ("new", "not there"):
        check_output_folder(allowed, False, "photos")
    Path(LOG).write_text("")  # a run of an earlier version
    check_output_dir(TrainConfig(data="photos", output_dir="."))
    assert Path("README.md").read_text() == "mine"


def test_a_folder_with_more_than_a_model_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors", "thesis.tex"):
        (tmp_path / "model" / name).touch()
    with pytest.raises(ValueError, match=r"more than a model \(thesis.tex\)"), new_folder(tmp_path / "model", True):
        pass
    (tmp_path / "model" / "thesis.tex").unlink()
    with new_folder(tmp_path / "model", force=True) as folder:
        (folder / "config.json").touch()
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["config.json"]


def test_a_run_is_known_from_its_start_and_when_it_begins_anew(tmp_path: Path) -> None:
    (tmp_path / LOG).write_text("{}\n")
    (tmp_path / METRICS).touch()
    clear_output(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [LOG]
    clear_output(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_paths_are_compared_as_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("d").mkdir()
    assert same_place("d", "d/") and same_place("./d", str(tmp_path / "d")) and same_place(["d", "x"], ["./d", "x"])
    assert not same_place("d", "e") and not same_place(1, 2) and not same_place(None, "d") and same_place("", "")


def test_a_run_resumes_whatever_the_spelling_of_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_photos(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_at(1, patch)
        train(tiny_recipe(Path("photos"), tmp_path / "run", max_steps=3))
    with pytest.raises(ValueError, match="holds a run with another recipe") as refused:
        train(tiny_recipe(Path("photos"), tmp_path / "run", max_steps=4))
    assert "never" not in str(refused.value)
    fields: dict[str, Any] = {"max_steps": 3}
    run = train(tiny_recipe(Path("x"), tmp_path / "run", **fields, data="./photos/"))
    assert run.state.step == 3
    assert json.loads((tmp_path / "run" / METRICS).read_text())["precision"] == "fp32"
