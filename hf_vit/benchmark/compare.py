"""A benchmark from its cases to its results: the variants of a case take turns, round by round.

The speed of a machine drifts, of a shared one by half within minutes. So all processes of a case live at the same time
while only one works, and what is compared are times of the same round, next to each other.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from threading import Timer
from typing import Any, NamedTuple, Self

import numpy as np
import torch

from ..system.machine import precision_name, resolve_precision
from . import measure
from .preparation import Prepared, prepare, upright_jpegs
from .suites import BOUNDS, CEILING, SUITES, Case, Job, cases_of, libraries, variants_of

COMMAND = [sys.executable, "-P", measure.__file__]  # -P: the folder of that file is not a place of modules
PATIENCE = 1800.0  # seconds until a process that says nothing is ended; to compile takes minutes
QUARTILES_FROM = 8  # rounds


# --------------------------------------------------------------------------------------------------- statistics


class Spread(NamedTuple):
    """The median of some values, and where half of them lie; of few values, where all of them lie."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Return median and quartiles; below `QUARTILES_FROM` values the smallest and the largest for these."""
    if len(values) < QUARTILES_FROM:
        return Spread(statistics.median(values), min(values), max(values))
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def paired_ratio(baseline: Sequence[float], times: Sequence[float]) -> Spread:
    """Return how many times as fast something is as the baseline, from their times in the same rounds."""
    return spread([before / after for before, after in zip(baseline, times, strict=True)])


def is_told_apart(ratio: Spread) -> bool:
    """Say whether a ratio may be stated: its spread leaves 1 out, and is no wider than the ratio is away from 1."""
    return not ratio.low <= 1 <= ratio.high and ratio.high - ratio.low <= abs(ratio.median - 1)


# ---------------------------------------------------------------------------------------------------- processes


class VariantFailed(Exception):
    """A variant cannot be measured; says why."""


class Worker:
    """The process of one variant, as its parent sees it."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.stderr = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self.process = subprocess.Popen(
            [*COMMAND, json.dumps(job._asdict())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            text=True,
            encoding="utf-8",
            env=environment(job.threads),
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.questions, self.answers = self.process.stdin, self.process.stdout

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.questions, self.answers, self.stderr):
            with suppress(BrokenPipeError):
                stream.close()

    def ready(self) -> dict[str, Any]:
        """Wait until it has answered and is warm; return what it says of itself."""
        return self._hear(lambda: None)

    def round(self) -> list[float]:
        """Have it work for a round; return the seconds of every call."""
        return self._hear(lambda: print("go", file=self.questions, flush=True))["seconds"]

    def finish(self) -> dict[str, Any]:
        """Let it end; return the memory that it needed at its peak."""
        return self._hear(self.questions.close)

    def _hear(self, ask: Callable[[], None]) -> dict[str, Any]:
        timer = Timer(PATIENCE, self.process.kill)
        timer.start()
        try:
            ask()
            line = self.answers.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        said = json.loads(line) if line else {"failed": self._last_words()}
        if "failed" in said:
            raise VariantFailed(said["failed"])
        return said

    def _last_words(self) -> str:
        code = self.process.wait()
        self.stderr.seek(0)
        lines = self.stderr.read().strip().splitlines()
        return f"its process ended with {code}" + (f": {lines[-1]}" if lines else "")


def environment(threads: int) -> dict[str, str]:
    """Return the variables of a measuring process.

    How idle threads of OpenMP wait is left alone: to have them sleep at once (OMP_WAIT_POLICY=passive) makes torch 1.7
    times as slow at one image on two cores, and by themselves they sleep after milliseconds.
    """
    bound = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
    kept = {name: value for name, value in os.environ.items() if name not in bound}
    package = str(Path(measure.__file__).parents[2])
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(filter(None, [package, kept.get("PYTHONPATH", "")])),
        "OMP_NUM_THREADS": str(threads),
        "KMP_BLOCKTIME": kept.get("KMP_BLOCKTIME", "20"),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }


# -------------------------------------------------------------------------------------------------------- rounds


@dataclass
class Measured:
    """What was measured of one variant.

    Attributes:
        failure: Why there is nothing else.
        precision: What it computed in.
        calls: Seconds of every call of every round.
        operations: Floating-point operations of a call, if the process knows them.
        peak_memory: Bytes, if the system tells.
    """

    failure: str | None = None
    precision: str = ""
    calls: list[list[float]] = field(default_factory=list)
    operations: int | None = None
    peak_memory: int | None = None

    @property
    def rounds(self) -> list[float]:
        """Seconds of a call, the median of each round."""
        return [statistics.median(calls) for calls in self.calls]


def take_turns(jobs: Sequence[Job], rounds: int, say: Callable[[str], None]) -> dict[str, Measured]:
    """Start the process of every job of a case, and have them work in turns, forth and back."""
    about: dict[str, dict[str, Any]] = {job.variant: {"calls": []} for job in jobs}
    workers: dict[str, Worker] = {}

    @contextmanager
    def leaving_out_failures(variant: str) -> Iterator[None]:
        try:
            yield
        except VariantFailed as failure:
            about[variant] = {"failure": str(failure)}
            workers.pop(variant, None)

    with ExitStack() as stack:
        for job in jobs:  # one after the other: each has the machine while it warms up
            say(f"  {job.variant} starts")
            worker = stack.enter_context(Worker(job))
            with leaving_out_failures(job.variant):
                about[job.variant] |= worker.ready()
                workers[job.variant] = worker
        for number in range(rounds):
            say(f"  round {number + 1} of {rounds}")
            for variant in list(workers) if number % 2 == 0 else list(reversed(workers)):
                with leaving_out_failures(variant):
                    about[variant]["calls"].append(workers[variant].round())
        for variant in list(workers):
            with leaving_out_failures(variant):
                about[variant] |= workers[variant].finish()
    return {variant: Measured(**found) for variant, found in about.items()}


# ------------------------------------------------------------------------------------------------------- results


def judge(
    case: Case, measured: dict[str, Measured], errors: dict[str, float], operations: int | None
) -> list[dict[str, Any]]:
    """Return a result for each variant, of plain types.

    The baseline is the first variant that agrees with the reference. What disagrees does other work, and is compared
    with nothing.

    Args:
        errors: How far every answer is from the reference.
        operations: Floating-point operations of a call of any variant; without them there is no share of the ceiling.
    """
    bounds = BOUNDS[case.suite][1]
    widest = max(bounds.values())  # for what else a library says that it computes in
    agreeing = [name for name, error in errors.items() if error <= bounds.get(measured[name].precision, widest)]
    results = []
    for variant, found in measured.items():
        result: dict[str, Any] = {"suite": case.suite, "case": case.name, "variant": variant}
        if found.failure is not None:
            results.append({**result, "failure": found.failure})
            continue
        result |= {
            "precision": found.precision,
            "calls": sum(map(len, found.calls)),
            "rounds": found.rounds,
            "seconds": spread(found.rounds)._asdict(),
            "peak_memory": found.peak_memory,
        }
        if variant == CEILING:
            result["operations_per_second"] = spread(_paces(found))._asdict()
        else:
            result["images_per_second"] = spread([case.images / seconds for seconds in found.rounds])._asdict()
            result |= {"error": errors[variant], "agrees": variant in agreeing}
            result |= _compared(variant, measured, agreeing)
            result["share_of_ceiling"] = _share_of_ceiling(found, measured.get(CEILING), operations)
        results.append(result)
    return results


def _compared(variant: str, measured: dict[str, Measured], agreeing: list[str]) -> dict[str, Any]:
    """Return the ratio to the baseline, for what does the same work."""
    if variant not in agreeing or variant == agreeing[0]:
        return {"baseline": None}
    ratio = paired_ratio(measured[agreeing[0]].rounds, measured[variant].rounds)
    return {"baseline": agreeing[0], "ratio": ratio._asdict(), "is_told_apart": is_told_apart(ratio)}


def _paces(limit: Measured) -> list[float]:
    """Return the operations a second of the ceiling, the best of each round."""
    assert limit.operations is not None
    return [limit.operations / min(calls) for calls in limit.calls]


def _share_of_ceiling(found: Measured, limit: Measured | None, operations: int | None) -> float | None:
    """Return what share of the ceiling of the same round a variant reaches, as the median over rounds."""
    if limit is None or limit.failure is not None or operations is None or found.precision != limit.precision:
        return None
    pairs = zip(found.rounds, _paces(limit), strict=True)
    return statistics.median(operations / seconds / pace for seconds, pace in pairs)


# ----------------------------------------------------------------------------------------------------- benchmark


def benchmark(
    suites: Sequence[str] = (),
    *,
    models: Sequence[str] = (),
    batch_size: int | None = None,
    against: Sequence[str] = (),
    precision: str = "auto",
    rounds: int = 7,
    seconds: float = 1.0,
    is_compile_wanted: bool = False,
    photos: Path | None = None,
    is_quick: bool = False,
    say: Callable[[str], None] = print,
) -> Iterator[list[dict[str, Any]]]:
    """Measure this package against other libraries; yield the results of each case, see `judge`.

    Args:
        suites: Of `SUITES`; all if empty.
        models: Names such as `"Ti/16"`, instead of the usual ones.
        batch_size: For training and inference, instead of the usual ones.
        against: Libraries; all if empty. Those that are not installed are left out with a line that says so.
        precision: Of training and models: `"fp32"`, `"bf16"`, or `"auto"`: bf16 on hardware that is fast at it.
        rounds: In which every variant has its turn.
        seconds: Length of a turn.
        is_compile_wanted: Also what torch compiles, which takes minutes.
        photos: Folder of JPEGs, instead of such as are made.
        is_quick: One small case a suite, three short rounds: to see whether all works.
        say: Prints a line on the way.

    Raises:
        ValueError: For names that are not there, and a folder without photos.
    """
    for given, known in ((suites, SUITES), (against, libraries())):
        if unknown := sorted(set(given) - set(known)):
            raise ValueError(f"There is no {', '.join(unknown)}: choose of {', '.join(known)}.")
    if precision not in ("auto", "fp32", "bf16"):
        raise ValueError(f"precision must be auto, fp32 or bf16, got {precision!r}.")
    if is_quick:
        rounds, seconds = 3, 0.1
    device = "cuda" if torch.cuda.is_available() else "cpu"
    resolved = precision_name(resolve_precision(precision))
    paths = [] if photos is None else upright_jpegs(photos)
    chosen = [suite for suite in SUITES if not suites or suite in suites]
    cases = [case for suite in chosen for case in cases_of(suite, device, models, batch_size, paths, is_quick)]
    for _, group in groupby(cases, key=lambda case: case.model):
        with tempfile.TemporaryDirectory(prefix="hf-vit-benchmark-") as folder:
            for case in group:
                variants = variants_of(case.suite, resolved, against, is_compile_wanted)
                say(f"{case.suite}, {case.name}")
                prepared = prepare(case, Path(folder), {variant.split()[0] for variant in variants}, device, paths)
                if device == "cuda":
                    torch.cuda.empty_cache()  # what the reference needed
                yield measure_case(case, prepared, variants, device, resolved, rounds, seconds, say)


def measure_case(
    case: Case,
    prepared: Prepared,
    variants: Sequence[str],
    device: str,
    precision: str,
    rounds: int,
    seconds: float,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Measure the variants of a case that is prepared; return a result for each."""
    why = {variant: prepared.failures.get(variant.split()[0]) for variant in variants}
    jobs = [
        Job(
            case.suite,
            variant,
            str(prepared.models),
            str(prepared.folder),
            str(prepared.folder / f"answer of {variant}.npy"),
            "cpu" if case.uses_one_thread else device,
            precision,
            1 if case.uses_one_thread else torch.get_num_threads(),
            seconds,
            # Threads that are bound leave their mask of one core to the processes that they start.
            list(range(os.cpu_count() or 1)) if os.environ.get("OMP_PROC_BIND") else None,
        )
        for variant in variants
        if why[variant] is None
    ]
    measured = take_turns(jobs, rounds, say)
    distance, _ = BOUNDS[case.suite]
    errors = {
        job.variant: distance(np.load(job.answer), _reference_of(job.variant, prepared))
        for job in jobs
        if job.variant != CEILING and measured[job.variant].failure is None
    }
    every = {variant: measured.get(variant, Measured(failure=why[variant])) for variant in variants}
    return judge(case, every, errors, prepared.operations)


def _reference_of(variant: str, prepared: Prepared) -> np.ndarray:
    return prepared.references.get(variant.split()[0], prepared.references[""])
