"""Runs of a benchmark: the variants of a case are measured in turns, round by round.

The speed of a shared machine can drift by half within minutes. So all processes of a case live at the same time, one
of them works at a time, and ratios are computed from times of the same round.
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
from .measure import CEILING, Job
from .preparation import Prepared, prepare, upright_jpegs
from .suites import BOUNDS, SUITES, Case, cases_of, libraries, library_of, variants_of

COMMAND = [sys.executable, "-P", measure.__file__]  # -P: modules in the folder of that file must not be importable
TIMEOUT = 1800.0  # seconds without output until a process is ended; compilation takes minutes
QUARTILES_FROM = 8  # rounds


class Spread(NamedTuple):
    """A median with quartiles, or with minimum and maximum of few values."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Return median and quartiles; minimum and maximum instead of quartiles below `QUARTILES_FROM` values."""
    if len(values) < QUARTILES_FROM:
        return Spread(statistics.median(values), min(values), max(values))
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def speedup(baseline: Sequence[float], times: Sequence[float]) -> Spread:
    """Return the speed relative to a baseline, from the times of both in the same rounds."""
    return spread([before / after for before, after in zip(baseline, times, strict=True)])


def is_significant(ratio: Spread) -> bool:
    """Return whether the spread of a ratio excludes 1 and is at most as wide as its distance from 1."""
    return not ratio.low <= 1 <= ratio.high and ratio.high - ratio.low <= abs(ratio.median - 1)


class VariantFailed(Exception):
    """A variant cannot be measured; the message is the reason."""


class Worker:
    """Control the process that measures one variant."""

    def __init__(self, job: Job) -> None:
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
        self.stdin, self.stdout = self.process.stdin, self.process.stdout

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.stdin, self.stdout, self.stderr):
            with suppress(BrokenPipeError):
                stream.close()

    def ready(self) -> dict[str, Any]:
        """Wait until the process has warmed up; return precision and operations."""
        return self._receive(lambda: None)

    def round(self) -> list[float]:
        """Run one round; return the seconds of each call."""
        return self._receive(lambda: print("go", file=self.stdin, flush=True))["seconds"]

    def finish(self) -> dict[str, Any]:
        """End the process; return its peak memory."""
        return self._receive(self.stdin.close)

    def _receive(self, request: Callable[[], None]) -> dict[str, Any]:
        timer = Timer(TIMEOUT, self.process.kill)
        timer.start()
        try:
            request()
            line = self.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        message = json.loads(line) if line else {"failed": self._exit_reason()}
        if "failed" in message:
            raise VariantFailed(message["failed"])
        return message

    def _exit_reason(self) -> str:
        code = self.process.wait()
        self.stderr.seek(0)
        lines = self.stderr.read().strip().splitlines()
        return f"its process ended with exit code {code}" + (f": {lines[-1]}" if lines else "")


def environment(threads: int) -> dict[str, str]:
    """Return the environment variables of a measuring process.

    OMP_WAIT_POLICY stays unset: "passive", which makes idle threads sleep at once, slows torch by a factor of 1.7 at
    one image on two CPU cores. By default they sleep after milliseconds.
    """
    binding = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
    kept = {name: value for name, value in os.environ.items() if name not in binding}
    package = str(Path(measure.__file__).parents[2])
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(filter(None, [package, kept.get("PYTHONPATH", "")])),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "KMP_BLOCKTIME": kept.get("KMP_BLOCKTIME", "20"),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }


@dataclass
class Measured:
    """Measurements of one variant.

    Attributes:
        failure: Reason why the other fields are empty.
        precision: `"fp32"`, `"bf16"`, or another name that the library reports.
        calls: Seconds of each call of each round.
        operations: Floating-point operations per call, if only the process knows them.
        peak_memory: Bytes, if the system reports them.
    """

    failure: str | None = None
    precision: str = ""
    calls: list[list[float]] = field(default_factory=list)
    operations: int | None = None
    peak_memory: int | None = None

    @property
    def rounds(self) -> list[float]:
        """Seconds per call, the median of each round."""
        return [statistics.median(calls) for calls in self.calls]

    @property
    def operations_per_second(self) -> list[float]:
        """Speed of the fastest call of each round, for the ceiling."""
        assert self.operations is not None
        return [self.operations / min(calls) for calls in self.calls]


def take_turns(jobs: Sequence[Job], rounds: int, say: Callable[[str], None]) -> dict[str, Measured]:
    """Start a process for each job of a case and measure them in turns, in alternating order."""
    found: dict[str, dict[str, Any]] = {job.variant: {"calls": []} for job in jobs}
    workers: dict[str, Worker] = {}

    @contextmanager
    def skipping_failures(variant: str) -> Iterator[None]:
        try:
            yield
        except VariantFailed as failure:
            found[variant] = {"failure": str(failure)}
            workers.pop(variant, None)

    with ExitStack() as stack:
        for job in jobs:  # one at a time, so that each warms up alone
            say(f"  starting {job.variant}")
            worker = stack.enter_context(Worker(job))
            with skipping_failures(job.variant):
                found[job.variant] |= worker.ready()
                workers[job.variant] = worker
        for number in range(rounds):
            say(f"  round {number + 1} of {rounds}")
            for variant in list(workers) if number % 2 == 0 else list(reversed(workers)):
                with skipping_failures(variant):
                    found[variant]["calls"].append(workers[variant].round())
        for variant in list(workers):
            with skipping_failures(variant):
                found[variant] |= workers[variant].finish()
    return {variant: Measured(**fields) for variant, fields in found.items()}


def judge(
    case: Case, measured: dict[str, Measured], errors: dict[str, float], operations: int | None
) -> list[dict[str, Any]]:
    """Return a JSON-serializable result for each variant.

    The baseline is the first variant whose outputs agree with the reference. Variants whose outputs disagree do
    different work and get no ratio.

    Args:
        errors: Distance of each variant's outputs from the reference.
        operations: Floating-point operations per call; `None` for no share of the ceiling.
    """
    bounds = BOUNDS[case.suite][1]
    widest = max(bounds.values())  # for precisions that only a library knows
    agreeing = [name for name, error in errors.items() if error <= bounds.get(measured[name].precision, widest)]
    results = []
    for variant, found in measured.items():
        result: dict[str, Any] = {"suite": case.suite, "case": case.name, "variant": variant}
        results.append(result)
        if found.failure is not None:
            result["failure"] = found.failure
            continue
        result |= {
            "precision": found.precision,
            "calls": sum(map(len, found.calls)),
            "rounds": found.rounds,
            "seconds": spread(found.rounds)._asdict(),
            "peak_memory": found.peak_memory,
        }
        if variant == CEILING:
            result["operations_per_second"] = spread(found.operations_per_second)._asdict()
            continue
        result["images_per_second"] = spread([case.images / seconds for seconds in found.rounds])._asdict()
        result |= {"error": errors[variant], "agrees": variant in agreeing, "baseline": None}
        if variant in agreeing[1:]:
            ratio = speedup(measured[agreeing[0]].rounds, found.rounds)
            result |= {"baseline": agreeing[0], "ratio": ratio._asdict(), "is_told_apart": is_significant(ratio)}
        result["share_of_ceiling"] = _share_of_ceiling(found, measured.get(CEILING), operations)
    return results


def _share_of_ceiling(found: Measured, ceiling: Measured | None, operations: int | None) -> float | None:
    """Return the median over rounds of a variant's speed, as a share of the ceiling of the same round."""
    if ceiling is None or ceiling.failure is not None or operations is None or found.precision != ceiling.precision:
        return None
    pairs = zip(found.rounds, ceiling.operations_per_second, strict=True)
    return statistics.median(operations / seconds / highest for seconds, highest in pairs)


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
    """Measure this package and other libraries; yield the results of each case, see `judge`.

    Args:
        suites: Names from `SUITES`; all by default.
        models: Names such as `"Ti/16"` instead of the default models.
        batch_size: Batch size of training and inference instead of the defaults.
        against: Other libraries; all by default. A line of the results names those that are not installed.
        precision: Precision of models: `"fp32"`, `"bf16"`, or `"auto"` for bf16 on hardware with fast bf16.
        rounds: Number of rounds; each variant is measured once per round.
        seconds: Duration of each measurement.
        is_compile_wanted: Whether to measure torch.compile too, which takes minutes.
        photos: Folder of JPEG files instead of generated ones.
        is_quick: Whether to run one small case per suite in three short rounds, as a functional check.
        say: Prints a progress line.

    Raises:
        ValueError: For unknown names, and for a folder without JPEG files.
    """
    for kind, given, known in (("suite", suites, SUITES), ("library", against, libraries())):
        if unknown := sorted(set(given) - set(known)):
            raise ValueError(f"Unknown {kind} {', '.join(map(repr, unknown))}: choose one of {', '.join(known)}.")
    if precision not in ("auto", "fp32", "bf16"):
        raise ValueError(f"precision must be auto, fp32 or bf16, got {precision!r}.")
    if is_quick:
        rounds, seconds = 3, 0.1
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = precision_name(resolve_precision(precision))
    # Bound threads pass their affinity to one core on to the processes that they start.
    cores = list(range(os.cpu_count() or 1)) if os.environ.get("OMP_PROC_BIND") else None
    paths = [] if photos is None else upright_jpegs(photos)
    chosen = [suite for suite in SUITES if not suites or suite in suites]
    cases = [case for suite in chosen for case in cases_of(suite, device, models, batch_size, paths, is_quick)]
    for _, group in groupby(cases, key=lambda case: case.model):
        with tempfile.TemporaryDirectory(prefix="hf-vit-benchmark-") as folder:
            for case in group:
                variants = variants_of(case.suite, precision, against, is_compile_wanted)
                say(f"{case.suite}, {case.name}")
                prepared = prepare(case, Path(folder), {library_of(variant) for variant in variants}, device, paths)
                if device == "cuda":
                    torch.cuda.empty_cache()  # memory of the reference
                target, threads = ("cpu", 1) if case.uses_one_thread else (device, torch.get_num_threads())
                folders = str(prepared.models), str(prepared.folder)
                jobs = [
                    Job(case.suite, variant, *folders, target, precision, threads, seconds, cores)
                    for variant in variants
                ]
                yield measure_case(case, prepared, jobs, rounds, say)


def measure_case(
    case: Case, prepared: Prepared, jobs: Sequence[Job], rounds: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Measure the variants of a prepared case; return a result for each."""
    failures = {job.variant: prepared.failures.get(library_of(job.variant)) for job in jobs}
    measured = take_turns([job for job in jobs if failures[job.variant] is None], rounds, say)
    distance, _ = BOUNDS[case.suite]
    errors = {
        job.variant: distance(np.load(job.output_file), reference_of(job.variant, prepared))
        for job in jobs
        if job.variant != CEILING and job.variant in measured and measured[job.variant].failure is None
    }
    every = {variant: measured.get(variant, Measured(failure=failure)) for variant, failure in failures.items()}
    return judge(case, every, errors, prepared.operations)


def reference_of(variant: str, prepared: Prepared) -> np.ndarray:
    """Return the reference outputs for a variant."""
    return prepared.references.get(library_of(variant), prepared.references[""])
