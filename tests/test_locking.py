"""A folder is one process' at a time, and free again however that process ends."""

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore

from hf_vit.system import locking
from hf_vit.system.locking import LOCK, FolderLock, alone_in, without_locks
from hf_vit.system.presence import LONGEST_SILENCE, SignsOfLife

ROOT = Path(__file__).resolve().parents[1]

# Takes a lock, has a child of its own as a run has data workers, and gives it back when its input ends.
HOLDER = """
import os, pathlib, sys, time
sys.path.insert(0, sys.argv[1])
from hf_vit.system.locking import FolderLock
lock = FolderLock(pathlib.Path(sys.argv[2]), int(sys.argv[3]))
assert lock.take()
if os.fork() == 0:
    time.sleep(60)
print("taken", flush=True)
sys.stdin.read()
lock.release()
print("released", flush=True)
"""


@contextmanager
def held(folder: Path, process: int = 0) -> Iterator[Any]:
    """Have another process hold the lock."""
    command = [sys.executable, "-c", HOLDER, str(ROOT), str(folder), str(process)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, start_new_session=True, **pipes) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "taken\n"
        try:
            yield holder
        finally:
            os.killpg(holder.pid, signal.SIGKILL)


def test_the_second_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    with held(folder) as holder:
        sentence = f"run is in use by process {holder.pid} on {socket.gethostname()}: wait until it has ended, stop"
        for _ in range(2):
            with pytest.raises(ValueError, match=sentence):
                FolderLock(folder).take()
        holder.stdin.close()
        assert holder.stdout.readline() == "released\n"
        assert not (folder / LOCK).exists()
        with alone_in(folder, pytest.fail):
            assert (folder / LOCK).exists()


def test_a_killed_process_holds_nothing_though_its_workers_live(tmp_path: Path) -> None:
    with held(tmp_path) as holder:
        holder.kill()
        holder.wait()
        assert (tmp_path / LOCK).exists()
        with alone_in(tmp_path, pytest.fail):
            assert (tmp_path / LOCK).exists()
        assert not (tmp_path / LOCK).exists()


def test_processes_of_one_run_see_each_other(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path, 1)
    assert lock.take()
    with held(tmp_path, 0) as first, held(tmp_path, 2) as third:
        assert [lock.is_held_by(number) for number in (0, 2, 3)] == [True, True, False]
        third.kill()
        third.wait()
        assert [lock.is_held_by(number) for number in (0, 2)] == [True, False]
        with pytest.raises(ValueError, match=f"in use by process {first.pid} on"):
            FolderLock(tmp_path).take()
    lock.release()


def test_a_lock_that_its_holder_removes_meanwhile_is_not_the_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_open, opened = FolderLock._open, []

    def open_late(self: FolderLock) -> Any:
        opened.append(whole_open(self))
        if len(opened) == 1:
            self.path.unlink()
        return opened[-1]

    monkeypatch.setattr(FolderLock, "_open", open_late)
    with alone_in(tmp_path, print) as lock:
        assert len(opened) == 2 and lock.file is opened[1] and opened[0].closed
        assert os.path.samestat(os.fstat(opened[1].fileno()), (tmp_path / LOCK).stat())


@pytest.mark.parametrize("kind", ["system", "disk"])
def test_where_there_are_no_locks_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    if kind == "system":
        monkeypatch.setattr(locking, "fcntl", None)
    else:
        monkeypatch.setattr(locking.fcntl, "lockf", refuse)
    said: list[str] = []
    with alone_in(tmp_path, said.append):
        assert said == [without_locks(tmp_path)] and "without locks" in said[0]


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="file/run must be a writable folder; fix its permissions, or choose"):
        FolderLock(tmp_path / "file" / "run").take()
    assert (tmp_path / "file").read_text() == "mine"


def test_a_process_without_signs_of_life_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LONGEST_SILENCE, "5")
    monkeypatch.setattr("hf_vit.system.presence.SECONDS_BETWEEN_LOOKS", 0.01)
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    first, second = SignsOfLife(0, 2), SignsOfLife(1, 2)
    assert not any(first.look() for _ in range(1000))  # it may take longer to start
    ends = [threading.Event(), threading.Event()]
    threads = [
        threading.Thread(target=signs.exchange, args=(end,)) for signs, end in zip((first, second), ends, strict=True)
    ]
    for thread in threads:
        thread.start()
    while not (first.looks and second.looks):
        time.sleep(0.01)
    ends[1].set()
    threads[1].join()
    monkeypatch.setattr("hf_vit.system.presence.SECONDS_BETWEEN_LOOKS", 2.0)
    messages = [first.look() for _ in range(3)]
    ends[0].set()
    threads[0].join()
    assert messages[:2] == ["", ""]
    assert messages[2].startswith(
        "The process of rank 1 gave no sign of life for 5 seconds: its machine or the network"
    )
