"""Running a study: its runs in parallel processes, each with exact resume, and one line of JSON per result.

Small models leave most of a GPU idle and use the cores of a CPU badly, so several runs share the machine. No run is
repeated: a run that has a line in `results.jsonl` is skipped, and an interrupted run resumes from its checkpoint.
"""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from ..evaluation.flops import count_flops
from ..system.disk import check_output_folder
from ..system.locking import alone_in
from ..system.machine import cores, machine, processor, versions
from ..system.stopping import Interrupted, StopSignals
from ..training.loop import train
from ..training.recipe import FREE_TO_CHANGE, TrainConfig
from ..training.run import METRICS
from .study import Cell, Factors, Results, Study

RESULTS, RUNS = "results.jsonl", "runs"
RUNS_PER_GPU = 4
SAME_ERRORS = 3  # after which a study ends in which no run has succeeded
# Recipe fields that may differ between rows of one study: none of them changes which run of the study it is.
NOT_COMPARED = {*FREE_TO_CHANGE, "seed", "data", "model"}

Key = tuple[str, int]
Say = Callable[[str], None]


def key_of(factors: Factors, seed: int) -> Key:
    """Return the key that identifies a run within its study."""
    return json.dumps(dict(factors), sort_keys=True), seed


def name_of(factors: Factors, seed: int) -> str:
    """Return a name for a run that is valid as a folder name."""
    parts = [f"{name}={value}" for name, value in {**factors, "seed": seed}.items()]
    return re.sub(r"[^\w=.,-]+", "-", ",".join(parts))


# ------------------------------------------------------------------------------------------------------- one run


@dataclass(frozen=True)
class PlannedRun:
    """A cell of a study with one seed, trained in a subfolder of `runs`."""

    study: Study
    cell: Cell
    seed: int
    runs: Path

    @property
    def key(self) -> Key:
        return key_of(self.cell.factors, self.seed)

    @property
    def parent_key(self) -> Key | None:
        return None if self.cell.begins_from is None else key_of(self.cell.begins_from, self.seed)

    @property
    def name(self) -> str:
        return name_of(self.cell.factors, self.seed)

    @property
    def folder(self) -> Path:
        return self.runs / self.name

    @property
    def has_model(self) -> bool:
        return (self.folder / METRICS).is_file()  # written after the model

    @property
    def recipe(self) -> dict[str, Any]:
        """Recipe fields that are not defaults, with the name of the data, as JSON stores them."""
        ours, default = self.cell.config, TrainConfig()
        names = [item.name for item in fields(TrainConfig) if item.name not in NOT_COMPARED]
        others = {name: getattr(ours, name) for name in names if getattr(ours, name) != getattr(default, name)}
        begins_from = self.cell.begins_from and dict(self.cell.begins_from)
        return json.loads(json.dumps({"data": Path(str(ours.data)).name, **others, "begins_from": begins_from}))

    def execute(self) -> dict[str, Any]:
        """Train, or resume training, and return the measurements."""
        config = replace(self.cell.config, seed=self.seed, output_dir=str(self.folder))
        if self.cell.begins_from is not None:
            config = replace(config, model=str(self.runs / name_of(self.cell.begins_from, self.seed)))
        run = train(config, build=self.cell.build)
        forward_flops, training_flops = count_flops(run.model, type(run.model))
        images_seen = run.metrics["steps"] * config.batch_size
        evaluations = [row for row in run.log if "eval_loss" in row]
        return {
            "accuracy": run.metrics.get("eval_accuracy"),
            "loss": run.metrics["eval_loss"],
            "curve": [[row["epoch"], row.get("eval_accuracy"), row["eval_loss"]] for row in evaluations],
            "train_images": round(run.data.train_length / config.train_repeats),  # each counted once
            "test_images": run.metrics["eval_count"],
            "images_seen": images_seen,
            "parameters": run.metrics["parameters"],
            "forward_flops": forward_flops,
            "training_flops": training_flops * images_seen,
            "seconds": run.timing["seconds"],
            "images_per_second": run.timing["images_per_second"],
            **self.study.measure(run),
        }


# ---------------------------------------------------------------------------------------------------- the results


class ResultsFile:
    """The rows of a study on disk, each with its provenance."""

    def __init__(self, path: Path, provenance: Mapping[str, str]) -> None:
        self.path, self.provenance = path, dict(provenance)
        self.rows = {key_of(row["factors"], row["seed"]): row for row in read_rows(path)}

    def is_done(self, run: PlannedRun) -> bool:
        """Return whether a run has a row; raise `ValueError` if that row has other settings."""
        row = self.rows.get(run.key)
        if row is None:
            return False
        theirs, ours = {"study": row["study"], **row["recipe"]}, {"study": run.study.name, **run.recipe}
        names = [name for name in dict.fromkeys([*theirs, *ours]) if theirs.get(name) != ours.get(name)]
        if names:
            different = "; ".join(f"{name} {theirs.get(name)!r} -> {ours.get(name)!r}" for name in names)
            raise ValueError(
                f"{self.path} holds results of other settings ({different}): choose another --output-dir."
            )
        return True

    def add(self, run: PlannedRun, measurements: dict[str, Any]) -> None:
        """Add a row, unless the run has one already: some are repeated only for the runs that start from them."""
        if self.is_done(run):
            return
        head = {"study": run.study.name, "factors": dict(run.cell.factors), "seed": run.seed, "failed": None}
        row = {**head, **measurements, "recipe": run.recipe, "date": time.strftime("%Y-%m-%d"), **self.provenance}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows[run.key] = row


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the lines of results, and remove a last line that a crash cut off."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    complete, newline, rest = text.rpartition("\n")
    if rest:
        path.write_text(complete + newline, encoding="utf-8")
    return [json.loads(line) for line in complete.splitlines()]


def provenance(command: str) -> dict[str, str]:
    """Return the command, commit, hardware and versions of a measurement."""
    hardware = machine()
    if not torch.cuda.is_available():
        hardware += f", {processor().get('model name', 'unknown')}"
    return {"command": command, "commit": _commit(), "hardware": hardware, "versions": versions()}


def _commit() -> str:
    """Return the commit of the source tree, with a plus if the package has changes; empty without a repository."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--", "..") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


# ---------------------------------------------------------------------------------------------------- the processes


class Worker:
    """A process that executes one run after another, with a number of threads."""

    def __init__(self, number: int, threads: int, log: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.arguments = number, threads, log
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, number, str(log)))
        with _inherited(threads):
            self.process.start()
        theirs.close()
        self.run: PlannedRun | None = None

    def give(self, run: PlannedRun) -> None:
        self.run = run
        self.connection.send(run)

    def take(self) -> tuple[PlannedRun, str, Any]:
        """Return the run that ended, its outcome (`done`, `failed` or `error`), and its measurements or a message."""
        assert self.run is not None
        run, self.run = self.run, None
        try:
            return run, *self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            message = f"its process ended with exit code {self.process.exitcode}; run the same command to resume it"
            return run, "error", message

    def end(self) -> None:
        """Ask the process to end; an unfinished run saves a checkpoint first."""
        self.connection.close()
        if self.run is not None:
            self.process.terminate()


@contextmanager
def _inherited(threads: int) -> Iterator[None]:
    """Start processes with a number of threads and with SIGINT blocked: SIGTERM tells them when to end."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    can_block = hasattr(signal, "pthread_sigmask")  # not on Windows
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if can_block else set()
    try:
        yield
    finally:
        if can_block:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        del os.environ["OMP_NUM_THREADS"]
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before


def _work(connection: Connection, number: int, log: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for target in (sys.stdout, sys.stderr):
        target.flush()
        os.dup2(stream, target.fileno())
    if (gpus := torch.accelerator.device_count()) > 1:
        torch.accelerator.set_device_index(number % gpus)
    try:
        while True:
            run: PlannedRun = connection.recv()
            try:
                outcome: tuple[str, Any] = "done", run.execute()
            except FloatingPointError as error:
                outcome = "failed", str(error)
            except Exception as error:
                traceback.print_exc()
                outcome = "error", f"{type(error).__name__}: {error}"
            connection.send(outcome)
    except (EOFError, Interrupted):
        return


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)  # training saves a checkpoint


# ------------------------------------------------------------------------------------------------------- the study


class StudySignals(StopSignals):
    """Raise `Interrupted` immediately on a signal; the runs save their checkpoints in their own processes."""

    def _note(self, signum: int, frame: FrameType | None) -> None:
        name = signal.Signals(signum).name
        raise Interrupted(signum, f"Interrupted by {name}: finished runs are recorded, others saved a checkpoint.")


def run_study(
    study: Study,
    config: TrainConfig,
    output_dir: Path,
    seeds: int,
    command: str,
    jobs: int | None = None,
    say: Say = print,
) -> Results:
    """Execute all runs of a study that are not done yet, and return the results of all runs.

    Args:
        study: The study to run.
        config: The recipe that it varies.
        output_dir: Folder of `results.jsonl`, and of the runs until they are done.
        seeds: Number of seeds per cell, counted from the recipe's seed.
        command: The user's command line, recorded with the results.
        jobs: Number of parallel runs; by default one per CPU core, or four per GPU.
        say: Prints a line.

    Raises:
        Interrupted: If SIGINT, SIGTERM or SIGHUP came; every unfinished run has saved a checkpoint.
        ValueError: If the folder holds other results, another process is using it, or a run cannot be completed; all
            other runs are done by then.
    """
    check_output_folder(output_dir, any((output_dir / name).exists() for name in (RESULTS, RUNS)), config.data)
    with alone_in(output_dir, say):
        file, runs = ResultsFile(output_dir / RESULTS, provenance(command)), output_dir / RUNS
        of_study = range(config.seed, config.seed + seeds)
        every = [PlannedRun(study, cell, seed, runs) for seed in of_study for cell in study.cells(config)]
        assert len({run.key for run in every}) == len(every), "two cells of a study have the same factors"
        if plan := _plan(every, file):
            say(f"{study.title}: {sum(map(file.is_done, every))} of {len(every)} runs done, {len(plan)} to run.")
            runs.mkdir(parents=True, exist_ok=True)
            _execute(plan, file, jobs, say)
            for item in (*(run.folder for run in every), *runs.glob("worker-*.log")):
                item.unlink() if item.is_file() else shutil.rmtree(item, ignore_errors=True)
            if not any(runs.iterdir()):  # interrupted runs of other seeds stay
                runs.rmdir()
        return Results(file.rows[run.key] for run in every)


def _plan(every: list[PlannedRun], file: ResultsFile) -> list[PlannedRun]:
    """Return the runs that are not done, and those whose model is needed again to start from."""
    plan, parents = [], set()
    for run in reversed(every):  # a run comes after the one that it starts from
        if not file.is_done(run) or (run.key in parents and not run.has_model):
            plan.append(run)
            parents.add(run.parent_key)
    return plan[::-1]


def _execute(plan: list[PlannedRun], file: ResultsFile, jobs: int | None, say: Say) -> None:
    jobs = min(jobs or RUNS_PER_GPU * torch.accelerator.device_count() or cores(), len(plan))
    threads = max(1, cores() // jobs)
    parents = {run.parent_key for run in plan}
    waiting, undone = list(plan), {run.key for run in plan}
    errors: dict[str, list[str]] = {}  # names of the runs by message
    began = time.perf_counter()
    with StudySignals():
        workers = [Worker(number, threads, plan[0].runs / f"worker-{number}.log") for number in range(jobs)]
        try:
            while True:
                for place, worker in enumerate(workers):
                    ready = next((run for run in waiting if run.parent_key not in undone), None)
                    if worker.run is None and ready is not None:
                        if not worker.process.is_alive():
                            worker = workers[place] = Worker(*worker.arguments)
                        waiting.remove(ready)
                        worker.give(ready)
                busy = {worker.connection: worker for worker in workers if worker.run is not None}
                if not busy:
                    break
                for connection in wait(list(busy)):
                    run, outcome, result = busy[connection].take()  # type: ignore[index]
                    if outcome == "error":  # runs that start from it cannot be executed either
                        same = errors.setdefault(result, [])
                        same.append(run.name)
                        if len(same) == 1:
                            say(f"Error in {run.name}: {result}")
                        if len(same) == SAME_ERRORS and len(undone) == len(plan):
                            waiting.clear()  # every run has failed in the same way, as for data that cannot be read
                        continue
                    undone.discard(run.key)
                    file.add(run, result if outcome == "done" else {"failed": result})
                    if run.key not in parents:
                        shutil.rmtree(run.folder, ignore_errors=True)
                    done = len(plan) - len(undone)
                    left = timedelta(seconds=round((time.perf_counter() - began) / done * len(undone)))
                    say(f"[{done}/{len(plan)}] {run.name}: {_line(outcome, result)}; {left} left")
        finally:
            for worker in workers:
                worker.end()
            for worker in workers:
                worker.process.join()
    if errors:
        more = {why: f" and {len(names) - 1} more" if len(names) > 1 else "" for why, names in errors.items()}
        causes = [f"{names[0]}{more[why]}: {why}" for why, names in errors.items()]
        raise ValueError(
            f"{len(undone)} of {len(plan)} runs could not be completed ({'; '.join(causes[:3])}). Their logs are in "
            f"{plan[0].runs}; run the same command to try them again."
        )


def _line(outcome: str, result: Any) -> str:
    if outcome == "failed":
        return str(result)
    accuracy, loss = result["accuracy"], f"loss {result['loss']:.4f}"
    return f"{loss if accuracy is None else f'accuracy {accuracy:.2%}'}, {result['seconds']:.0f} s"
