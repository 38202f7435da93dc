"""A saved folder stands alone: without the package it gives the same numbers, and so does what is saved from it."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from isolated import TESTS, python, save_tiny_classifier
from user_of_a_repository import outputs

from hf_vit.hub.folder import check_folder

USER = TESTS / "user_of_a_repository.py"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_classifier(tmp_path_factory.mktemp("saved") / "tiny-vit")


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
    assert check_folder(session.resaved) == sorted(path.name for path in session.resaved.iterdir())
    python(USER, tmp_path / "outputs", *sources, home=tmp_path)
    for number in range(len(sources)):
        assert_same(dict(np.load(tmp_path / "outputs" / f"{number}.npz")), session.outputs)
