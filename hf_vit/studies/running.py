"""Running a study: its runs side by side in processes, each resumed exactly, results a line of JSON each.

Small models leave most of a GPU idle, and share the cores of a CPU badly, so several runs share the machine. What is
done is never done again: a run that has its line in `results.jsonl` is passed over, and one that was stopped goes on
from its checkpoint.
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
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from ..evaluation.flops import count_flops
from ..hub.card import versions
from ..system.locking import alone_in
from ..system.machine import cores, machine, processor
from ..system.stopping import Interrupted, StopSignals
from ..training.loop import train
from ..training.recipe import FREE_TO_CHANGE, TrainConfig
from ..training.run import METRICS
from .study import Cell, Factors, Results, Study

RESULTS, RUNS = "results.jsonl", "runs"
RUNS_ON_A_GPU = 4  # side by side
# Fields of a recipe in which results may differ: none of them makes a run of a study another one.
NOT_COMPARED = {*FREE_TO_CHANGE, "seed", "data", "model"}

Key = tuple[str, int]
Say = Callable[[str], None]


def key_of(factors: Factors, seed: int) -> Key:
    """Return what tells a run from all others of its study."""
    return json.dumps(dict(factors), sort_keys=True), seed


def name_of(factors: Factors, seed: int) -> str:
    """Return a name for a run that a folder can have."""
    words = [f"{name}={value}" for name, value in factors.items()]
    return re.sub(r"[^\w=.,-]+", "-", ",".join([*words, f"seed={seed}"]))


# ------------------------------------------------------------------------------------------------------- one run


@dataclass(frozen=True)
class Planned:
    """A run of a study that is to be done in `folder`, beginning from the model in `parent`, if from any."""

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
    def is_model_there(self) -> bool:
        return (self.folder / METRICS).is_file()  # written behind the model

    @property
    def recipe(self) -> dict[str, Any]:
        """The fields of its recipe that are not as they are by default, and the name of its data."""
        ours, default = self.cell.config, TrainConfig()
        names = [item.name for item in fields(TrainConfig) if item.name not in NOT_COMPARED]
        others = {name: getattr(ours, name) for name in names if getattr(ours, name) != getattr(default, name)}
        begins_from = self.cell.begins_from and dict(self.cell.begins_from)
        # As a file would have it, which knows no tuples.
        return json.loads(json.dumps({"data": Path(ours.data).name, **others, "begins_from": begins_from}))

    def do(self) -> dict[str, Any]:
        """Train, or go on with it, and return the figures."""
        config = replace(self.cell.config, seed=self.seed, output_dir=str(self.folder))
        if self.cell.begins_from is not None:
            config = replace(config, model=str(self.runs / name_of(self.cell.begins_from, self.seed)))
        run = train(config, build=self.cell.build)
        forward_flops, training_flops = count_flops(run.model, type(run.model))
        images_seen = run.metrics["steps"] * config.batch_size
        evaluations = [row for row in run.log if "eval_loss" in row]
        curve = [[row["epoch"], row.get("eval_accuracy"), row["eval_loss"]] for row in evaluations]
        return {
            "accuracy": run.metrics.get("eval_accuracy"),
            "loss": run.metrics["eval_loss"],
            "curve": curve,
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
    """The rows of a study on the disk, each with what it was measured by."""

    def __init__(self, path: Path, provenance: Mapping[str, str]) -> None:
        self.path, self.provenance = path, dict(provenance)
        self.rows = {key_of(row["factors"], row["seed"]): row for row in read_rows(path)}

    def holds(self, run: Planned) -> bool:
        """Say whether a run is done; raise `ValueError` if another one is done in its place."""
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

    def add(self, run: Planned, figures: dict[str, Any]) -> None:
        """Add a line, if the run has none yet: some are done again for what begins from them."""
        if self.holds(run):
            return
        head = {"study": run.study.name, "factors": dict(run.cell.factors), "seed": run.seed, "failed": None}
        row = {**head, **figures, "recipe": run.recipe, "date": time.strftime("%Y-%m-%d"), **self.provenance}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows[run.key] = row


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the lines of results; one that a crash cut off at the end is removed."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole, newline, rest = text.rpartition("\n")
    if rest:
        path.write_text(whole + newline, encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines()]


def provenance(command: str) -> dict[str, str]:
    """Return what a result is measured by: command, commit, hardware, versions."""
    hardware = machine()
    if not torch.cuda.is_available():
        hardware += f", {processor().get('model name', 'unknown')}"
    return {"command": command, "commit": _commit(), "hardware": hardware, "versions": versions()}


def _commit() -> str:
    """Return the commit of the source tree, with a plus if the package differs from it; empty where there is none."""

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
    """A process that does one run after another."""

    def __init__(self, number: int, log: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.arguments = number, log
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, number, str(log)))
        with _interrupts_waiting():  # which the process inherits: it is told by SIGTERM when to end
            self.process.start()
        theirs.close()
        self.run: Planned | None = None

    def give(self, run: Planned) -> None:
        self.run = run
        self.connection.send(run)

    def take(self) -> tuple[Planned, str, Any]:
        """Return the run that ended, how (`done`, `failed` or `error`), and what it came to."""
        assert self.run is not None
        run, self.run = self.run, None
        try:
            return run, *self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode
            return run, "error", f"its process ended with exit code {code}; the same command goes on with it"

    def end(self) -> None:
        """Let the process end; the run that it does saves where it stands."""
        self.connection.close()
        if self.run is not None:
            self.process.terminate()


def _work(connection: Connection, number: int, log: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for target in (sys.stdout, sys.stderr):
        target.flush()
        os.dup2(stream, target.fileno())
    if gpus := torch.cuda.device_count():
        torch.cuda.set_device(number % gpus)
    try:
        while True:
            run: Planned = connection.recv()
            try:
                outcome: tuple[str, Any] = "done", run.do()
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
    os.kill(os.getpid(), signal.SIGTERM)  # a run saves where it stands


# ------------------------------------------------------------------------------------------------------- the study


class StudySignals(StopSignals):
    """Turn a signal into `Interrupted` at once: what saves is the runs, in processes of their own."""

    def _note(self, signum: int, frame: FrameType | None) -> None:
        name = signal.Signals(signum).name
        raise Interrupted(signum, f"Stopped by {name}: what is done is kept, the rest is saved.")


def run_study(
    study: Study,
    config: TrainConfig,
    output_dir: Path,
    seeds: int,
    command: str,
    jobs: int | None = None,
    say: Say = print,
) -> Results:
    """Do all runs of a study that are not done yet, and return the results of all.

    Args:
        study: What varies.
        config: The recipe around which it does.
        output_dir: Where `results.jsonl` is, and the runs while they last.
        seeds: Number of seeds of every cell, counted from the recipe's.
        command: What the user typed, for the results.
        jobs: Runs side by side; one a core, or four a GPU, if not given.
        say: Prints a line.

    Raises:
        Interrupted: If SIGINT, SIGTERM or SIGHUP came; every run has saved where it stands.
        ValueError: If the folder holds other results or another process is at work there, or a run cannot be done;
            the others are done by then.
    """
    with alone_in(output_dir, say):
        file = ResultsFile(output_dir / RESULTS, provenance(command))
        of_study = range(config.seed, config.seed + seeds)
        every = [Planned(study, cell, seed, output_dir / RUNS) for seed in of_study for cell in study.cells(config)]
        plan = _plan(every, file)
        if plan:
            say(f"{study.title}: {sum(map(file.holds, every))} of {len(every)} runs are done, {len(plan)} are to do.")
            (output_dir / RUNS).mkdir(parents=True, exist_ok=True)
            _do(plan, file, jobs, say)
            _clear(every, output_dir / RUNS)
        return Results(file.rows[run.key] for run in every)


def _clear(done: list[Planned], folder: Path) -> None:
    """Remove what runs left, but for those of other seeds that are to go on."""
    for run in done:
        shutil.rmtree(run.folder, ignore_errors=True)
    for log in folder.glob("worker-*.log"):
        log.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def _plan(every: list[Planned], file: ResultsFile) -> list[Planned]:
    """Return the runs that are not done, and those whose models they begin from where these are gone."""
    by_key = {run.key: run for run in every}
    assert len(by_key) == len(every), "two cells of a study have the same factors"
    needed = set()
    for run in every:
        wanted: Planned | None = None if file.holds(run) else run
        while wanted is not None:
            needed.add(wanted.key)
            parent = None if wanted.parent_key is None else by_key[wanted.parent_key]
            wanted = None if parent is None or (file.holds(parent) and parent.is_model_there) else parent
    return [run for run in every if run.key in needed]


def _do(plan: list[Planned], file: ResultsFile, jobs: int | None, say: Say) -> None:
    jobs = min(jobs or RUNS_ON_A_GPU * torch.cuda.device_count() or cores(), len(plan))
    parents = {run.parent_key for run in plan}
    waiting, undone, errors = list(plan), {run.key for run in plan}, []
    began = time.perf_counter()

    def next_run() -> Planned | None:
        return next((run for run in waiting if run.parent_key not in undone), None)

    with _environment("OMP_NUM_THREADS", str(max(1, cores() // jobs))), StudySignals():
        workers = [Worker(number, plan[0].runs / f"worker-{number}.log") for number in range(jobs)]
        try:
            while True:
                for place, worker in enumerate(workers):
                    if worker.run is None and (run := next_run()) is not None:
                        if not worker.process.is_alive():
                            worker = workers[place] = Worker(*worker.arguments)
                        waiting.remove(run)
                        worker.give(run)
                busy = {worker.connection: worker for worker in workers if worker.run is not None}
                if not busy:
                    break
                for connection in wait(list(busy)):
                    run, kind, outcome = busy[connection].take()  # type: ignore[index]
                    if kind == "error":  # what begins from it cannot be done either
                        errors.append(f"{run.name}: {outcome}")
                        say(f"Error in {errors[-1]}")
                        continue
                    undone.discard(run.key)
                    file.add(run, outcome if kind == "done" else {"failed": outcome})
                    if run.key not in parents:
                        shutil.rmtree(run.folder, ignore_errors=True)
                    left = (time.perf_counter() - began) / (len(plan) - len(undone)) * len(undone)
                    head = f"[{len(plan) - len(undone)}/{len(plan)}] {run.name}"
                    say(f"{head}: {_in_words(kind, outcome)}; {_time(left)} left")
        finally:
            for worker in workers:
                worker.end()
            for worker in workers:
                worker.process.join()
    if errors:
        raise ValueError(
            f"{len(undone)} of {len(plan)} runs could not be done ({'; '.join(errors[:3])}): {plan[0].runs} has the "
            "logs; the same command tries these again."
        )


def _in_words(kind: str, outcome: Any) -> str:
    if kind == "failed":
        return str(outcome)
    accuracy, seconds = outcome["accuracy"], f"{outcome['seconds']:.0f} s"
    return f"loss {outcome['loss']:.4f}, {seconds}" if accuracy is None else f"accuracy {accuracy:.2%}, {seconds}"


def _time(seconds: float) -> str:
    return f"about {seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} s"


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Have a variable for processes that begin within."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


@contextmanager
def _interrupts_waiting() -> Iterator[None]:
    """Let SIGINT wait, where the system can, and come afterwards."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
