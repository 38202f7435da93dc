"""Runs in processes of their own, forked from one that has imported everything: starting one costs no seconds.

They end as the command does: with a sentence and an exit code, or with a traceback and 1 where there is a defect.
"""

import os
import socket
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from multiprocessing import get_context, set_start_method
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from hf_vit.training.recipe import TrainConfig

CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "process_of_a_run",
        "hf_vit.cli.main",
        "hf_vit.training.loop",
        "hf_vit.prediction.predict",
        "timm.optim",
        "torch._dynamo",
    ]
)


def _train(config: TrainConfig) -> None:
    from hf_vit.training.loop import train

    train(config)


def _run(work: Callable[[], object], environment: dict[str, str], output: Path, prepare: Any) -> None:
    import datasets
    from typer import Exit

    from hf_vit.cli.endings import clear_endings

    set_start_method("fork", force=True)  # of workers: what a process has that no forkserver started
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.0  # as in conftest.py
    os.environ.update(environment)
    os.setsid()  # a process group of its own, with its workers
    with output.open("a") as file, redirect_stdout(file), redirect_stderr(file):
        try:
            if prepare is not None:
                prepare()
            with clear_endings():
                work()
        except Exit as ending:
            file.flush()
            os._exit(ending.exit_code)
        except BaseException:
            traceback.print_exc()
            file.flush()
            os._exit(1)
        file.flush()
        os._exit(0)  # as the forkserver's children end; what a run has to write it has written


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(
    config: TrainConfig | Callable[[], object], output: Path, prepare: Any = None, **environment: str
) -> BaseProcess:
    """Start a run, or what else is to be done, in one process; what it prints goes to the file `output`."""
    work = partial(_train, config) if isinstance(config, TrainConfig) else config
    process = CONTEXT.Process(target=_run, args=(work, environment, output, prepare))
    process.start()
    return process


def start_all(
    config: TrainConfig | Callable[[], object], output: Path, number: int = 2, prepare: Any = None, **environment: str
) -> list[BaseProcess]:
    """Start a run in some processes that are one by gloo, as a launcher would."""
    common = {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(free_port()), "ACCELERATE_USE_CPU": "true", **environment}
    return [start(config, output, prepare, **common, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(number)]


def ends(processes: list[BaseProcess], output: Path, code: int = 0, seconds: float = 120) -> str:
    """Wait for the end; return what was printed."""
    for process in processes:
        process.join(seconds)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    printed = output.read_text() if output.exists() else ""
    assert codes == [code] * len(processes), f"{codes}\n{printed[-6000:]}"
    return printed
