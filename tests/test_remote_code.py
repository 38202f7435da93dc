"""A saved folder stands alone: without the package it gives the same numbers, and so does what is saved from it."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from isolated import TESTS, python, save_tiny_classifier
from transformers import AutoConfig
from user_of_a_repository import outputs

from hf_vit import HFViTConfig, HFViTForImageClassification, HFViTForMaskedImageModeling, model
from hf_vit.hub.folder import check_folder
from hf_vit.model import model_class
from hf_vit.model.configuration_hf_vit import CLASSES

CODE = {path.name for path in Path(model.__file__).parent.glob("*_hf_vit.py")}
USER = TESTS / "user_of_a_repository.py"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_classifier(tmp_path_factory.mktemp("saved") / "tiny-vit")


def test_all_files_have_the_same_permissions(folder: Path) -> None:
    assert len({file.stat().st_mode for file in folder.iterdir() if file.is_file()}) == 1


class Session(NamedTuple):
    """What a user without the package had of a folder, and what that user saved."""

    outputs: dict[str, np.ndarray]
    resaved: Path
    trained: Path


@pytest.fixture(scope="module")
def session(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Session:
    home = tmp_path_factory.mktemp("user")
    resaved, trained = home / "resaved", home / "trained"
    python(USER, home / "outputs", folder, "--save-again", resaved, trained, home=home)
    return Session(dict(np.load(home / "outputs" / "0.npz")), resaved, trained)


def assert_same(remote: dict[str, np.ndarray], local: dict[str, np.ndarray]) -> None:
    assert set(remote["modules"]) == {"transformers_modules"}
    assert remote.keys() == local.keys()
    for name in local.keys() - {"modules"}:
        np.testing.assert_array_equal(remote[name], local[name], err_msg=name)


def test_same_numbers_without_the_package(folder: Path, session: Session) -> None:
    local = outputs(str(folder))
    assert set(local["modules"]) == {"hf_vit"}
    assert_same(session.outputs, local)


def test_what_is_saved_without_the_package_stands_alone(session: Session, tmp_path: Path) -> None:
    sources = [session.resaved, session.trained / "checkpoint-1"]
    assert all({path.name for path in source.iterdir()} >= CODE for source in sources)
    assert check_folder(session.resaved) == sorted(path.name for path in session.resaved.iterdir())
    python(USER, tmp_path / "outputs", *sources, home=tmp_path)
    for number in range(len(sources)):
        assert_same(dict(np.load(tmp_path / "outputs" / f"{number}.npz")), session.outputs)


@pytest.mark.parametrize(
    "name", [reference.split(".")[1] for reference in CLASSES.values() if "Config" not in reference]
)
def test_every_class_saves_all_of_the_code(tiny_config: Any, tmp_path: Path, name: str) -> None:
    model_class(name)(tiny_config()).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= CODE
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == CLASSES


def test_a_repository_with_one_modeling_file_loads_and_is_repaired(folder: Path, tmp_path: Path) -> None:
    """Up to 0.1, all classes were in modeling_hf_vit.py."""
    old = tmp_path / "old"
    HFViTForImageClassification.from_pretrained(folder).save_pretrained(old)
    config = json.loads((old / "config.json").read_text())
    config["auto_map"] = {name: place.replace("dense_hf_vit", "modeling_hf_vit") for name, place in CLASSES.items()}
    (old / "config.json").write_text(json.dumps(config))
    for path in old.glob("*_hf_vit.py"):
        path.unlink()
    loaded, expected = outputs(str(old)), outputs(str(folder))
    np.testing.assert_equal(loaded, expected)
    HFViTForMaskedImageModeling.from_pretrained(old).save_pretrained(tmp_path / "new")
    assert {path.name for path in (tmp_path / "new").iterdir()} >= CODE
    assert json.loads((tmp_path / "new" / "config.json").read_text())["auto_map"] == CLASSES


def test_the_code_of_a_repository_has_the_pipeline_of_its_task(folder: Path) -> None:
    """Trusted code names it, and the package does not: `pipeline` would require trust for it."""
    code = (
        "import sys; from transformers import AutoConfig; "
        "print(AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True).custom_pipelines)"
    )
    trusted = python(code, folder, home=folder.parent).stdout
    assert "{'image-classification': {'impl': 'pipeline_hf_vit.HFViTImageClassificationPipeline'" in trusted
    assert AutoConfig.from_pretrained(folder).custom_pipelines == {}
    stored = {"image-classification": {"impl": "own.Pipeline", "pt": []}}  # as a user's own pipeline stores it
    assert HFViTConfig(custom_pipelines=stored).custom_pipelines == stored
