"""Lock an output folder for the processes of one run.

Each process locks one byte of a lock file with POSIX record locks (`lockf`). The system releases them when the process
ends, for whatever reason. They belong to one process, also on NFS; locks of `flock` would be inherited by forked
workers, which outlive a killed process by seconds. A process loses its lock when it closes the file anywhere, so no
other code opens it.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import IO

from accelerate import Accelerator
from accelerate.utils import gather_object

from .presence import SECONDS_BETWEEN_LOOKS, SignsOfLife

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"  # exists in the folder while a run uses it


class ProcessDiedError(ConnectionError):
    """Another process of the same run has died."""


class FolderLock:
    """The lock of one process on a folder.

    Args:
        folder: Created if it does not exist.
        process: Rank of this process in its run. Rank 0 owns the folder.
    """

    def __init__(self, folder: Path, process: int = 0) -> None:
        self.folder, self.path, self.process = folder, folder / LOCK, process
        self.file: IO[bytes] | None = None

    def take(self) -> bool:
        """Acquire the lock; return whether the file system supports locks.

        Raises:
            ValueError: If another process holds it.
            OSError: If the folder cannot be written to.
        """
        if fcntl is None:
            return False
        while self.file is None:
            file = self._open()
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, self.process)
                if os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                    self.file = file
            except FileNotFoundError:
                continue
            except (BlockingIOError, PermissionError):
                raise ValueError(
                    f"{self.folder} is in use by {self._holder()}: wait until it has ended, stop it, or choose "
                    "another output folder."
                ) from None
            except OSError:
                return False
            finally:
                if self.file is None:  # not acquired, or the file was removed by its former owner: try again
                    file.close()
        if self.process == 0:
            name = json.dumps({"process": os.getpid(), "host": socket.gethostname()})
            with self._errors_with_folder():
                self.file.truncate(0)
                os.write(self.file.fileno(), name.encode())
        return True

    def release(self) -> None:
        """Release the lock, if it was acquired; rank 0 removes the file."""
        if self.file is not None:
            if self.process == 0:
                self.path.unlink(missing_ok=True)
            self.file.close()
            self.file = None

    def is_held_by(self, process: int) -> bool:
        """Return whether another process holds the lock of rank `process`."""
        assert self.file is not None
        try:
            fcntl.lockf(self.file, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, process)  # shared: others may test too
        except (BlockingIOError, PermissionError):
            return True
        fcntl.lockf(self.file, fcntl.LOCK_UN, 1, process)
        return False

    def _open(self) -> IO[bytes]:
        with self._errors_with_folder():
            self.folder.mkdir(parents=True, exist_ok=True)
            return self.path.open("ab+")

    @contextmanager
    def _errors_with_folder(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = f"{error.strerror}: {self.folder} must be a writable folder; fix its permissions, or choose"
            raise OSError(error.errno, f"{reason} another output folder") from error

    def _holder(self) -> str:
        try:
            holder = json.loads(self.path.read_text(encoding="utf-8"))
            return f"process {holder['process']} on {holder['host']}"
        except (OSError, ValueError):
            return "another process"


@contextmanager
def alone_in(folder: Path, say: Callable[[str], None]) -> Iterator[FolderLock]:
    """Lock a folder for this process alone; raises the errors of `FolderLock.take`."""
    lock, is_new = FolderLock(folder), not folder.exists()
    if not lock.take():
        say(without_locks(folder))
    try:
        yield lock
    finally:
        lock.release()
        if is_new:
            with suppress(OSError):  # nothing was written
                folder.rmdir()


def without_locks(folder: Path) -> str:
    """Return the message for file systems without locks."""
    return f"{folder} is on a file system without locks: make sure that no other process writes there."


# Time-out of a process that waits for the others: the first one may prepare data for hours, and NCCL's own time-out is
# 10 minutes.
LONGEST_WAIT = timedelta(days=1)
# When another process of the run has died: how long to wait for an error of our own, and how long the lock of a
# process may outlive its connections.
SECONDS_TO_END, SECONDS_TO_SEE = 10.0, 5.0


@contextmanager
def lock_folder_together(accelerator: Accelerator, folder: Path) -> Iterator[None]:
    """Lock a folder for all processes of one run, and end all of them when one dies or cannot be reached.

    Raises:
        ValueError: If another run uses the folder.
        OSError: If the folder cannot be written to.
        ProcessDiedError: If another process of the run has died; names its rank.
    """
    lock, has_lock = FolderLock(folder, accelerator.process_index), False
    refusal: Exception | None = None
    try:
        has_lock = lock.take()
    except (ValueError, OSError) as error:
        refusal = error
    try:
        states = gather_object([(has_lock, refusal)])
        if states[0][1] is not None:  # the main process decides: the others write nothing
            raise states[0][1]
        if not states[0][0]:
            accelerator.print(without_locks(folder))
        # Machines that share no disk do not see each other's locks.
        locked = [rank for rank, (holds, _) in enumerate(states) if has_lock and holds and rank != lock.process]
        signs = SignsOfLife(accelerator.process_index, accelerator.num_processes)
        with _watching(lock, [rank for rank in locked if lock.is_held_by(rank)], signs):
            yield
        accelerator.end_training()
    finally:
        lock.release()


@contextmanager
def _watching(lock: FolderLock, others: list[int], signs: SignsOfLife) -> Iterator[None]:
    """End with a clear error when another process of the run has died or is silent."""
    is_over = threading.Event()
    watcher = threading.Thread(target=_end_with_others, args=(lock, others, signs, is_over), daemon=True)
    if signs.others:
        threading.Thread(target=signs.exchange, args=(is_over,), daemon=True).start()
        watcher.start()
    try:
        yield
    except RuntimeError as error:  # raised by any backend, in any collective
        if message := _dead_processes(lock, others, SECONDS_TO_SEE):
            raise ProcessDiedError(message) from error
        raise
    finally:
        is_over.set()
        if signs.others:
            watcher.join()


def _end_with_others(lock: FolderLock, others: list[int], signs: SignsOfLife, is_over: threading.Event) -> None:
    """Exit if another process has died or is silent, and no error follows: a collective operation would hang."""
    while not is_over.wait(SECONDS_BETWEEN_LOOKS):
        message = _dead_processes(lock, others)
        if message and is_over.wait(SECONDS_TO_END):
            return
        if message := message or signs.look():
            print(f"Error: {message}", file=sys.stderr, flush=True)
            os._exit(2)


def _dead_processes(lock: FolderLock, others: list[int], seconds: float = 0.0) -> str:
    """Return an error message that names dead processes, or an empty string if all are alive after some seconds."""
    end = time.monotonic() + seconds
    while not (gone := [str(rank) for rank in others if not lock.is_held_by(rank)]):
        if not others or time.monotonic() >= end:
            return ""
        time.sleep(0.1)
    return (
        f"The process of rank {', '.join(gone)} died before the run was finished. Saved checkpoints are intact: start "
        "all processes again to resume."
    )
