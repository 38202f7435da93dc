"""A checkpoint is whole or not there."""

import errno
import hashlib
import json
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest
import torch
from safetensors import SafetensorError

from hf_vit.system.disk import UNFINISHED, writing
from hf_vit.training import checkpointing
from hf_vit.training.checkpointing import MANIFEST, STATE, CheckpointFolder, find_damage, load_state

SILENT: Callable[[str], None] = lambda message: None  # noqa: E731


def write_model(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"weights" * 100)


@pytest.fixture
def checkpoints(tmp_path: Path) -> CheckpointFolder:
    folder = CheckpointFolder(tmp_path / "checkpoints", keep=2)
    for step in (1, 2, 3):
        folder.save(step, {"step": step, "momentum": torch.full((3,), float(step))}, write_model)
    return folder


def test_the_newest_is_found_and_read(checkpoints: CheckpointFolder) -> None:
    newest = checkpoints.newest(SILENT)
    assert newest is not None and newest.name == "step-00000003"
    state = load_state(newest)
    assert state["step"] == 3 and state["momentum"].tolist() == [3.0] * 3


def test_older_ones_go(checkpoints: CheckpointFolder) -> None:
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step-00000002", "step-00000003"]


def test_nothing_there_is_no_checkpoint(tmp_path: Path) -> None:
    assert CheckpointFolder(tmp_path / "none").newest(SILENT) is None


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda c: (c / STATE).write_bytes((c / STATE).read_bytes()[:-10]), f"{STATE} is corrupt"),
        (lambda c: (c / "model.safetensors").write_bytes(b"Weights" * 100), "model.safetensors is corrupt"),
        (lambda c: (c / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda c: (c / MANIFEST).unlink(), f"it has no {MANIFEST}"),
        (lambda c: (c / MANIFEST).write_text("{"), f"its {MANIFEST} cannot be read"),
        (lambda c: (c / MANIFEST).write_text("[]"), f"its {MANIFEST} is corrupt"),
        (lambda c: (c / "more.safetensors").write_bytes(b"more"), f"its {MANIFEST} does not list more.safetensors"),
    ],
)
def test_a_damaged_one_is_passed_over(
    checkpoints: CheckpointFolder, damage: Callable[[Path], object], reason: str
) -> None:
    newest = checkpoints.newest(SILENT)
    assert newest is not None and find_damage(newest) is None
    damage(newest)
    said: list[str] = []
    found = checkpoints.newest(said.append)
    assert found is not None and found.name == "step-00000002"
    assert len(said) == 1 and said[0].startswith(f"Ignored step-00000003: {reason}")
    checkpoints.save(3, {"step": 3}, write_model)  # the run comes there again
    assert checkpoints.newest(SILENT) == newest


def test_an_unfinished_one_is_passed_over_and_replaced(checkpoints: CheckpointFolder) -> None:
    unfinished = checkpoints.folder / ".unfinished-step-00000004"
    unfinished.mkdir()
    said: list[str] = []
    newest = checkpoints.newest(said.append)
    assert newest is not None and newest.name == "step-00000003"
    assert said == ["Ignored .unfinished-step-00000004: it was not finished."]
    checkpoints.save(4, {"step": 4}, write_model)
    assert not unfinished.exists()


def test_a_full_disk_leaves_the_others(checkpoints: CheckpointFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(state: object, file: IO[bytes]) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpointing.torch, "save", full)
    with pytest.raises(OSError, match="No space left for a checkpoint of step 4; earlier ones are intact"):
        checkpoints.save(4, {"step": 4}, write_model)
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.ENOSPC, "full"), "[Errno 28] No space left for the log: 'here'"),
        (OSError(errno.EDQUOT, "full"), "[Errno 122] No space left for the log: 'here'"),
        (OSError(errno.EROFS, "no"), "[Errno 30] Read-only file system: cannot write the log: 'here'"),
        (
            SafetensorError("I/O: File too large (os error 27)"),
            "[Errno 27] File too large: cannot write the log",
        ),
    ],
)
@pytest.mark.parametrize("is_behind_another", [False, True])
def test_what_the_system_refuses_is_named(error: Exception, sentence: str, is_behind_another: bool) -> None:
    with pytest.raises(OSError, match=re.escape(sentence)), writing("the log", Path("here")):
        try:
            raise error
        except Exception:
            if is_behind_another:
                raise RuntimeError("unexpected pos 576 vs 470")  # noqa: B904 # as torch does
            raise


def test_other_errors_are_left_as_they_are() -> None:
    with pytest.raises(ValueError, match="shape"), writing("the log", Path("here")):
        raise ValueError("shape")


def test_a_folder_that_is_removed_under_the_run_is_made_again(tmp_path: Path) -> None:
    folder, calls = CheckpointFolder(tmp_path / "run" / "checkpoints"), []

    def removing(unfinished: Path) -> None:
        calls.append(unfinished)
        write_model(unfinished)
        if len(calls) == 1:
            shutil.rmtree(tmp_path / "run")

    newest = folder.save(1, {"step": 1}, removing)
    assert len(calls) == 2 and find_damage(newest) is None and folder.newest(SILENT) == newest
    assert load_state(newest) == {"step": 1}


def test_a_folder_that_is_removed_again_is_named(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")

    def removing(unfinished: Path) -> None:
        shutil.rmtree(unfinished)

    sentence = f"cannot write a checkpoint of step 7; earlier ones are intact: '{folder.folder}/step-00000007'"
    with pytest.raises(OSError, match=re.escape(sentence)):
        folder.save(7, {}, removing)


def test_an_error_is_not_hidden_by_a_folder_that_is_gone(tmp_path: Path) -> None:
    def failing(unfinished: Path) -> None:
        shutil.rmtree(unfinished)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        CheckpointFolder(tmp_path).save(1, {}, failing)


def test_what_cannot_be_removed_stays(checkpoints: CheckpointFolder, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    for name in ("step-00000001", f"{UNFINISHED}step-00000009"):  # a link is not removed with what is behind it
        (checkpoints.folder / name).symlink_to(tmp_path / "elsewhere")
    checkpoints.save(4, {"step": 4}, write_model)
    assert checkpoints.newest(SILENT) == checkpoints.folder / "step-00000004"
    assert (tmp_path / "elsewhere").is_dir()


def test_what_a_user_puts_beside_checkpoints_is_left_alone(checkpoints: CheckpointFolder) -> None:
    copy, packed = checkpoints.folder / "step-00000003-copy", checkpoints.folder / "step-00000003.tar"
    shutil.copytree(checkpoints.folder / "step-00000003", copy)
    packed.write_text("packed")
    checkpoints.save(4, {"step": 4}, write_model)
    assert find_damage(copy) is None and packed.exists()
    assert checkpoints.newest(SILENT) == checkpoints.folder / "step-00000004"


def test_code_in_a_state_is_not_run(checkpoints: CheckpointFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    newest = checkpoints.newest(SILENT)
    assert newest is not None
    torch.save({"step": Path("anything but plain")}, newest / STATE)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # which is for those who do not ask for it
    with pytest.raises(Exception, match="Weights only load failed"):
        load_state(newest)


def test_a_manifest_has_size_and_hash(checkpoints: CheckpointFolder) -> None:
    newest = checkpoints.newest(SILENT)
    assert newest is not None
    weights = b"weights" * 100
    expected = {"size": len(weights), "sha256": hashlib.sha256(weights).hexdigest()}
    assert json.loads((newest / MANIFEST).read_text())["model.safetensors"] == expected


def test_at_least_one_is_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep_checkpoints must be at least 1, got 0"):
        CheckpointFolder(tmp_path, keep=0)
    one, two = CheckpointFolder(tmp_path / "one", keep=1), CheckpointFolder(tmp_path / "two")
    for step in (1, 2, 3):
        one.save(step, {}, write_model)
        two.save(step, {}, write_model)
    assert [path.name for path in one.folder.iterdir()] == ["step-00000003"]
    assert len(list(two.folder.iterdir())) == 2  # unless told


def test_a_thread_writes_while_the_run_goes_on(checkpoints: CheckpointFolder) -> None:
    may_write = threading.Event()

    def write_late(folder: Path) -> None:
        assert may_write.wait(10)
        write_model(folder)

    newest = checkpoints.newest(SILENT)
    with checkpoints.waiting():
        checkpoints.save_later(4, {"step": 4}, write_late)
        checkpoints.raise_error()  # nothing has failed yet
        assert checkpoints.newest(SILENT) == newest
        may_write.set()
    assert checkpoints.newest(SILENT) == checkpoints.folder / "step-00000004"


def test_an_error_of_the_thread_ends_the_run(checkpoints: CheckpointFolder) -> None:
    def fail(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpoints.save_later(4, {}, fail)
    with pytest.raises(OSError, match="No space left for a checkpoint of step 4; earlier ones are intact"):
        for _ in range(1000):
            checkpoints.raise_error()
            time.sleep(0.01)
    checkpoints.save_later(5, {}, fail)
    with pytest.raises(OSError, match="of step 5"):
        checkpoints.save_later(6, {}, write_model)
    checkpoints.wait()  # an error is raised once
