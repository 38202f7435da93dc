"""Inject failures into real runs, in separate processes, and print a table of the results.

    python tests/fault_matrix.py                    (at most an hour on two idle CPU cores)
    python tests/fault_matrix.py --quick            (each failure once)
    python tests/fault_matrix.py killed full_disk   (some of them)

Every run succeeds, or ends with one sentence and an exit code: 2, or 128 plus the number of a signal; never with a
traceback. The same command then resumes from the newest checkpoint, and ends with the weights, log and metrics of an
uninterrupted run. Otherwise the row raises.
"""

import argparse
import ctypes
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from process_of_a_run import CONTEXT, start, start_all
from tiny_run import at_step, colored_dataset, colored_images, log_of, save_photos, spoil_loss, tiny_recipe

from hf_vit.system.disk import UNFINISHED
from hf_vit.training.checkpointing import find_damage
from hf_vit.training.recipe import TrainConfig
from hf_vit.training.run import CHECKPOINTS, LOG, METRICS, TIMING

FIELDS: dict[str, Any] = {
    "augmentation": "trivial", "mixup": 0.3, "cutmix": 0.5, "label_smoothing": 0.1, "accumulation_steps": 2,
    "ema_decay": 0.9, "epochs": 8, "eval_every": 3, "save_every": 2,
}  # fmt: skip
LINES = 15  # of the log of such a run
LEFT = (LOG, METRICS, "model.safetensors", "config.json", "preprocessor_config.json")
SECONDS = 120  # in which anything must have ended


# -------------------------------------------------------------------------------------------------------- the bench


def save_files(folder: Path) -> Path:
    """Write images as files: 54 to learn from, 21 to test."""
    for split, number, seed in (("train", 54, 0), ("test", 21, 1)):
        for place, (image, label) in enumerate(zip(*colored_images(number, seed), strict=True)):
            path = folder / split / ["blue", "green", "red"][label] / f"{place:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    return folder


def save_shards(folder: Path) -> Path:
    """Write three shards of 18 images, and 21 to test."""
    folder.mkdir()
    for number in range(3):
        colored_dataset(18, number).to_parquet(str(folder / f"train-{number}.parquet"))
    colored_dataset(21, 9).to_parquet(str(folder / "test.parquet"))
    return folder


DATA: dict[str, Callable[[Path], Path]] = {"photos": save_photos, "files": save_files, "shards": save_shards}


class Bench:
    """Where runs are made, and what came of them: `lost` counts steps that were saved and had to be done again."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.folder, self.draw, self.cases, self.lost = folder, random.Random(seed), 0, 0
        self.wholes: dict[str, tuple[Path, float]] = {}
        first = CONTEXT.Process(target=int)  # takes as long as the imports; all others are forked
        first.start()
        first.join()

    def case(self, data: str = "photos", processes: int = 1, below: str = "", **fields: Any) -> "Case":
        """Return a run that is to be made, in a folder of its own; the whole one is made if there is none yet."""
        source = self.folder / data
        if not source.exists():
            DATA[data](source)
        fields = {**FIELDS, **fields}
        key = json.dumps([data, processes, {name: fields[name] for name in fields if name != "num_workers"}])
        if key not in self.wholes:
            whole = Case(self, tiny_recipe(source, self.folder / f"whole-{len(self.wholes)}", **fields), processes)
            began = time.monotonic()
            whole.ends(whole.begin())
            self.wholes[key] = whole.folder, time.monotonic() - began
        self.cases += 1
        folder = self.folder / f"case-{self.cases}" / below / "run"
        return Case(self, tiny_recipe(source, folder, **fields), processes, *self.wholes[key])


@dataclass
class Case:
    """A run that something happens to, what it is to be equal to, and how long that took."""

    bench: Bench
    config: TrainConfig
    processes: int = 1
    whole: Path = Path()
    seconds: float = 0.0

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def output(self) -> Path:
        return self.bench.folder / f"{self.folder.relative_to(self.bench.folder).parts[0]}.txt"

    @property
    def printed(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def begin(self, prepare: Any = None) -> list[BaseProcess]:
        """Start the run; `prepare` is called in its processes before."""
        self.output.unlink(missing_ok=True)
        if self.processes == 1:
            return [start(self.config, self.output, prepare, OMP_NUM_THREADS="1")]
        return start_all(self.config, self.output, self.processes, prepare, OMP_NUM_THREADS="1")

    def ends(self, processes: list[BaseProcess], code: int = 0, sentence: str = "") -> str:
        """Wait for the end, by this code and with this in one sentence, no traceback; return what was printed."""
        end = time.monotonic() + SECONDS
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
        printed = self.printed
        assert codes == [code] * len(processes), f"{codes}\n{printed[-6000:]}"
        assert "Traceback" not in printed, printed[-6000:]
        errors = re.findall(r"(?<![A-Za-z])Error: ", printed)  # a bar of a killed process ends no line
        assert len(errors) == (code == 2), printed[-6000:]
        assert sentence in printed, printed[-6000:]
        return printed

    def goes_on(self) -> int:
        """Run it to its end, and hold that it is the whole run; return how many steps it had saved and did again."""
        before = self.newest()
        printed = self.ends(self.begin())
        found = re.findall(r"Resuming from .*step-(\d+):", printed)
        self.is_whole()
        again = before - (int(found[-1]) if found else 0)
        self.bench.lost += again
        return again

    def is_whole(self) -> None:
        """Hold that the run is one that nothing happened to."""
        assert log_of(self.folder) == log_of(self.whole)
        for name in LEFT:
            assert (self.folder / name).read_bytes() == (self.whole / name).read_bytes(), name

    def checkpoints(self) -> list[Path]:
        return sorted((self.folder / CHECKPOINTS).glob("step-*"))

    def newest(self) -> int:
        """Return the step of the newest checkpoint, 0 if there is none."""
        return max((int(path.name.removeprefix("step-")) for path in self.checkpoints()), default=0)

    def until_lines(self, least: int = 1, most: int = LINES - 6) -> None:
        """Wait until the log has a number of lines that is drawn."""
        number = self.bench.draw.randint(least, most)
        log = self.folder / LOG
        wait_for(lambda: log.exists() and log.read_text().count("\n") >= number)

    def until_saved(self, number: int) -> None:
        """Wait until there are so many checkpoints."""
        wait_for(lambda: len(self.checkpoints()) >= number)


def wait_for(condition: Callable[[], Any], seconds: float = SECONDS) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.002)


def kill(process: BaseProcess, send: Callable[[int, int], None] = os.kill, signum: int = signal.SIGKILL) -> None:
    assert process.pid is not None
    has_group = os.getpgid(process.pid) == process.pid  # not yet, if it has only just been forked
    (send if has_group else os.kill)(process.pid, signum)
    if signum == signal.SIGKILL:
        process.join()


# ------------------------------------------------------------------------------------------- what is done to a run


def killed(bench: Bench, times: int) -> str:
    done = 0
    while done < times:
        case = bench.case(num_workers=2)
        while done < times:
            before = case.newest()
            [process] = case.begin()
            process.join(bench.draw.uniform(0.05, 0.5) * case.seconds)
            if process.exitcode is not None:
                break
            kill(process, bench.draw.choice([os.kill, os.killpg]))
            if found := re.findall(r"Resuming from .*step-(\d+):", case.printed):
                bench.lost += before - int(found[-1])
            done += 1
        case.goes_on()
    # Workers whose process was killed alone look every five seconds whether it is there.
    wait_for(lambda: not processes_below(bench.folder), 30)
    return "resumes from the newest checkpoint"


def processes_below(folder: Path) -> list[str]:
    """Return processes with an open file below a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            names = [os.readlink(file) for file in (process / "fd").iterdir()]
        except OSError:
            continue
        found += [process.name] * any(name.startswith(str(folder)) for name in names)
    return [name for name in found if name != str(os.getpid())]


def killed_while_saving(bench: Bench, times: int) -> str:
    for _ in range(times):
        case = bench.case()
        [process] = case.begin(slow_disk)
        case.until_saved(1)
        files = bench.draw.randint(0, 4)
        saving = case.folder / CHECKPOINTS
        wait_for(lambda saving=saving, files=files: any(len(os.listdir(f)) >= files for f in unfinished(saving)))
        kill(process)
        assert not any(find_damage(path) for path in case.checkpoints())
        case.goes_on()
    return "ignores the incomplete checkpoint"


def unfinished(folder: Path) -> list[Path]:
    return [path for path in folder.glob(f"{UNFINISHED}*") if path.is_dir()]


def slow_disk() -> None:
    """Take 30 ms more to sync each file."""
    from hf_vit.training import checkpointing

    sync = checkpointing.sync

    def slowly(path: Path) -> None:
        time.sleep(0.03)
        sync(path)

    checkpointing.sync = slowly


def stopped(signum: int, bench: Bench, times: int) -> str:
    for _ in range(times):
        case = bench.case(num_workers=1)
        [process] = case.begin()
        case.until_lines()
        kill(process, bench.draw.choice([os.kill, os.killpg]), signum)
        case.ends([process], 128 + signum, f"Stopped by {signal.Signals(signum).name} after step")
        case.goes_on()
    return f"saves, exits with {128 + signum}"


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Have a file system of 4 MiB there, and say whether that was allowed."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    is_there = subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield is_there
    finally:
        if is_there:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def full_disk(bench: Bench, times: int) -> str:
    for _ in range(times):
        case = bench.case(below="disk", num_workers=1)
        with small_disk(case.folder.parent) as is_small:
            if not is_small:
                return large_file(bench, times)
            processes = case.begin()
            case.until_saved(2)
            # What room is left decides whether the log, the model, the state or the manifest has none.
            fill(case.folder.parent / "ballast", bench.draw.randrange(case_size(case)))
            case.ends(processes, 2, "No space left for")
            assert not any(find_damage(path) for path in case.checkpoints())
            (case.folder.parent / "ballast").unlink()
            case.goes_on()
    return "exits with 2 and names what could not be written"


def case_size(case: Case) -> int:
    """Return the size of a checkpoint."""
    return sum(path.stat().st_size for path in case.checkpoints()[0].iterdir())


def fill(path: Path, left: int) -> None:
    """Fill a disk with a file, but for some bytes."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(65536))
        except OSError:
            file.truncate(max(0, file.tell() - left))


def large_file(bench: Bench, times: int) -> str:
    for _ in range(times):
        case = bench.case(num_workers=1)
        size = bench.draw.randrange(100, 60_000)
        processes = case.begin(partial(limit_files, size))
        case.ends(processes, 2, "File too large: ")
        case.goes_on()
    return "exits with 2 and names the file"


def limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def read_only(bench: Bench, times: int) -> str:
    for _ in range(times):
        case = bench.case()
        case.folder.parent.mkdir()
        case.folder.parent.chmod(0o555)
        case.ends(case.begin(give_up_privileges), 2, "must be a writable folder")
        case.folder.parent.chmod(0o755)
        processes = case.begin(give_up_privileges)
        case.until_saved(2)
        (case.folder / CHECKPOINTS).chmod(0o555)
        case.ends(processes, 2, "Permission denied: cannot write a checkpoint of step")
        (case.folder / CHECKPOINTS).chmod(0o755)
        case.goes_on()
    return "exits with 2 and names the folder"


def give_up_privileges() -> None:
    """Be a user to whom modes of files apply, also as root: no capability is left."""
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capset(header, none) == 0


def folder_removed(bench: Bench, times: int) -> str:
    for _ in range(times):
        case = bench.case()
        [process] = case.begin(bench.draw.choice([None, slow_disk]))
        case.until_saved(1)
        time.sleep(bench.draw.uniform(0, 0.3))
        shutil.rmtree(case.folder / CHECKPOINTS, ignore_errors=True)
        case.ends([process])
        case.is_whole()
        assert case.newest() and not any(find_damage(path) for path in case.checkpoints())
    return "continues and saves new checkpoints"


def damaged(bench: Bench, times: int) -> str:
    for _ in range(times):
        case = bench.case()
        [process] = case.begin()
        case.until_saved(2)
        case.until_lines(least=5)
        kill(process)
        path = bench.draw.choice(sorted(case.checkpoints()[-1].iterdir()))
        spoil(path, bench.draw)
        before, lost = case.newest(), bench.lost
        again = case.goes_on()
        assert f"Ignored step-{before:08d}: " in case.printed and again > 0
        bench.lost = lost  # this is what the fault itself has taken
    return "resumes from the previous checkpoint and says why"


def spoil(path: Path, draw: random.Random) -> None:
    """Cut a file off somewhere, or change a bit of it."""
    content = bytearray(path.read_bytes())
    place = draw.randrange(len(content))
    if draw.random() < 0.5:
        del content[place:]
    else:
        content[place] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def image_lost(change: Callable[[Path, random.Random], None], bench: Bench, times: int) -> str:
    for number in range(times):
        is_allowed = number % 2 == 0
        case = bench.case("files", max_broken=0.1 * is_allowed)
        path = bench.draw.choice(sorted((bench.folder / "files" / "train").rglob("*.png")))
        kept = path.read_bytes()
        processes = case.begin()
        case.until_lines(most=LINES // 2)
        change(path, bench.draw)
        if is_allowed:
            case.ends(processes, 0, f"Skipped an image that cannot be read: {path.parent.name}/{path.name}")
            broken = json.loads((case.folder / METRICS).read_text())["broken_images"]
            assert broken == [f"{path.parent.name}/{path.name}"]
            path.write_bytes(kept)
        else:
            case.ends(processes, 2, "images of the training data cannot be read, more than max_broken allows")
            path.write_bytes(kept)
            case.goes_on()
    return "skips and names the image; exits with 2 beyond `max_broken`"


def remove(path: Path, draw: random.Random) -> None:
    path.unlink()


def make_unreadable(path: Path, draw: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(draw.choice([b"", b"<!DOCTYPE html>", content[: len(content) // 2], draw.randbytes(500)]))


def shard_lost(bench: Bench, times: int) -> str:
    for _ in range(times):
        case = bench.case("shards", streaming=True, shuffle_buffer=7, epochs=16, num_workers=1)
        path = bench.folder / "shards" / f"train-{bench.draw.randrange(3)}.parquet"
        kept = path.read_bytes()
        processes = case.begin()
        case.until_lines(most=3)  # 256 images are read ahead
        path.unlink()
        try:
            case.ends(processes, 2, path.name)
        finally:
            path.write_bytes(kept)
        case.goes_on()
    return "exits with 2 and names the file"


def worker_killed(bench: Bench, times: int) -> str:
    for _ in range(times):
        case = bench.case(num_workers=2)
        [process] = case.begin()
        case.until_lines()
        os.kill(bench.draw.choice(children(process.pid)), signal.SIGKILL)
        case.ends([process], 2, "A data loading process was killed (DataLoader worker (pid")
        case.goes_on()
    return "exits with 2 and names the process"


def children(pid: int | None) -> list[int]:
    """Return the processes that one has started."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(status.parent.name))
    return found


def rank_killed(hang: Any, bench: Bench, times: int) -> str:
    slowest = 0.0
    for _ in range(times):
        case = bench.case(processes=2, accumulation_steps=1)
        processes = case.begin(hang)
        case.until_lines(most=5)
        wait_for(lambda case=case: hang is None or "hanging" in case.printed)
        rank = bench.draw.randrange(2) if hang is None else 1
        kill(processes[rank])
        began = time.monotonic()
        case.ends([processes[1 - rank]], 2, f"The process of rank {rank} died before the run")
        slowest = max(slowest, time.monotonic() - began)
        assert slowest < 30
        case.goes_on()
    return f"the other names the rank and exits with 2 within {slowest:.0f} s"


def hang_in_the_first() -> None:
    """Have the first of two processes wait for ever behind some steps, as one on a GPU does for a lost neighbour."""
    if os.environ["RANK"] == "0":
        at_step(12, hang_for_ever, pytest.MonkeyPatch())


def hang_for_ever() -> None:
    print("hanging", flush=True)
    time.sleep(1000)


def not_finite(bench: Bench, times: int) -> str:
    for _ in range(times):
        case = bench.case()
        step = bench.draw.randrange(1, 20)
        case.ends(case.begin(partial(spoil_a_step, step)), 2, f"The loss or gradient of step {step + 1} is not finite")
        case.goes_on()
    return "exits with 2 and names the step, which is not saved"


def spoil_a_step(step: int) -> None:
    spoil_loss(pytest.MonkeyPatch(), step)


def clock_jumps(bench: Bench, times: int) -> str:
    for _ in range(times):
        case = bench.case(num_workers=1)
        case.ends(case.begin(partial(jump, bench.draw.randrange(2**32))))
        case.is_whole()
        timing = json.loads((case.folder / TIMING).read_text())
        assert 0 < timing["seconds"] < SECONDS and 0 <= timing["data_wait_share"] <= 1, timing
    return "no effect: intervals use the monotonic clock"


def jump(seed: int) -> None:
    """Have the clock of the wall jump by up to ten days, forwards and backwards, whenever it is read."""
    import tqdm.std

    draw, real = random.Random(seed), time.time
    time.time = lambda: real() + draw.uniform(-864000, 864000)
    tqdm.std.time = time.time


def two_in_one_folder(bench: Bench, times: int) -> str:
    for number in range(times):
        case = bench.case()
        first = case.begin(slow_disk)
        case.until_saved(1)
        second = bench.case()
        second.config.output_dir, second.config.resume = str(case.folder), ["auto", "never"][number % 2]
        output = bench.folder / "second.txt"
        output.unlink(missing_ok=True)
        process = start(second.config, output, OMP_NUM_THREADS="1")
        process.join(SECONDS)
        printed = output.read_text()
        assert process.exitcode == 2 and first[0].is_alive(), printed
        assert f"is in use by process {first[0].pid} on {socket.gethostname()}: " in printed, printed
        assert "Traceback" not in printed
        case.ends(first)
        case.is_whole()
    return "the second exits with 2 and names the first"


# -------------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Row:
    """A fault, how it is made, what does it, and how often in the long form and in the quick one."""

    fault: str
    how: str
    do: Callable[[Bench, int], str]
    times: int = 10
    quick: int = 1


ROWS = {
    "killed": Row("SIGKILL", "at any moment, with two data workers; one process or its group", killed, 60),
    "killed_while_saving": Row("SIGKILL while saving", "after any file of a checkpoint", killed_while_saving, 15),
    "sigterm": Row("SIGTERM", "at any step, to the process or its group", partial(stopped, signal.SIGTERM)),
    "sigint": Row("SIGINT (Ctrl-C)", "at any step, to the process or its group", partial(stopped, signal.SIGINT)),
    "sighup": Row(
        "SIGHUP (closed terminal)", "at any step, to the process or its group", partial(stopped, signal.SIGHUP)
    ),
    "full_disk": Row("disk full", "a file system of 4 MiB, filled by another file", full_disk),
    "large_file": Row("file too large", "RLIMIT_FSIZE, between 100 bytes and 60 kB", large_file),
    "read_only": Row("read-only output folder", "permissions of folders, from the start and later", read_only),
    "folder_removed": Row("checkpoints removed", "rm -r during the run, also while it saves", folder_removed),
    "damaged": Row("corrupt checkpoint", "a file of the newest one truncated, or one bit flipped", damaged, 20),
    "image_removed": Row("image file removed", "in the middle of an epoch", partial(image_lost, remove), quick=2),
    "image_unreadable": Row(
        "unreadable image", "empty, HTML, truncated, noise", partial(image_lost, make_unreadable), quick=2
    ),
    "shard_lost": Row("parquet shard removed", "while it is streamed", shard_lost),
    "worker_killed": Row("data worker killed", "SIGKILL to one of two, as the OOM killer does", worker_killed),
    "rank_killed": Row("one of two ranks killed", "SIGKILL to either, with gloo", partial(rank_killed, None)),
    "rank_lost": Row(
        "one rank killed, the other hangs",
        "it sleeps, as a GPU waits for a lost peer",
        partial(rank_killed, hang_in_the_first),
        3,
    ),
    "not_finite": Row("NaN", "in the loss of any step", not_finite),
    "clock_jumps": Row("clock jumps", "by up to ten days, in both directions, at every reading", clock_jumps),
    "two_in_one_folder": Row("two runs in one folder", "also with --resume never", two_in_one_folder),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; all if not given")
    parser.add_argument("--quick", action="store_true", help="each once")
    parser.add_argument("--times", type=int, help="how often, instead of what each row has")
    parser.add_argument("--seed", type=int, default=0, help="of moments and places")
    arguments = parser.parse_args()
    print("| failure | how it is injected | times | result | saved steps lost |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="hf-vit-faults-") as folder:
        bench = Bench(Path(folder), arguments.seed)
        for name in arguments.rows or ROWS:
            row, bench.lost = ROWS[name], 0
            times = row.quick if arguments.quick else arguments.times or row.times
            began = time.monotonic()
            happens = row.do(bench, times)
            print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
            print(f"| {row.fault} | {row.how} | {times} | {happens} | {bench.lost} |", flush=True)


if __name__ == "__main__":
    main()
