"""One process or many: what Accelerate is told, and the state of a run whole, however it is divided.

How the work is divided is the launcher's to say: `accelerate launch` and its config, or `torchrun` with the variables
that it would set. One copy of the model a process (DDP), shards (FSDP2) and tensor parallelism train the same model.
"""

import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    ProjectConfiguration,
    gather_object,
)
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from .locking import FolderLock, without_locks
from .recipe import PRECISIONS, TrainConfig

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
# Of a process whose neighbour has ended: how often it looks, how long an error of its own may take to come, and how
# long the lock of a process may outlive its connections.
SECONDS_BETWEEN_LOOKS, SECONDS_TO_END, SECONDS_TO_SEE = 2.0, 10.0, 5.0


def resolve_precision(precision: str) -> str:
    """Return what Accelerate calls a precision; `"auto"` is bf16 on hardware with matrix units for it."""
    if precision != "auto":
        return PRECISIONS[precision]
    is_fast = torch.cuda.is_bf16_supported(False) if torch.cuda.is_available() else torch.cpu._is_amx_tile_supported()
    return "bf16" if is_fast else "no"


def precision_name(mixed_precision: str) -> str:
    """Return what a recipe calls the precision that Accelerate calls `mixed_precision`."""
    return next(name for name, theirs in PRECISIONS.items() if theirs == mixed_precision)


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def build_accelerator(config: TrainConfig) -> Accelerator:
    """Return the Accelerator of a run."""
    output_dir = Path(config.output_dir)
    if config.tracker != "none" and find_spec(config.tracker) is None:  # Accelerate would pass over it
        raise ValueError(f"tracker: {config.tracker} needs a package that is not there: pip install {config.tracker}")
    AcceleratorState._reset_state()  # an earlier run of this process may have had another precision
    accelerator = Accelerator(
        mixed_precision=resolve_precision(config.precision),
        gradient_accumulation_steps=config.accumulation_steps,
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
        # The learning rate is set by the step; Accelerate must not scale it.
        step_scheduler_with_optimizer=False,
        log_with=None if config.tracker == "none" else config.tracker,
        project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / "runs")),
    )
    if accelerator.device.type == "cpu" and accelerator.num_processes > 2:
        # DDP lays gradients out anew behind the first step, and the order in which more than two are added follows
        # from the layout: a run that is resumed would differ in the last bits. With this, the first layout stays.
        accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
    is_fsdp_asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if is_fsdp_asked and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # Accelerate says that it shards on accelerators alone, and passes over the request elsewhere. Its FSDP2 has
        # no such limit.
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    return accelerator


@contextmanager
def alone_as_one(accelerator: Accelerator, folder: Path) -> Iterator[None]:
    """Have a folder for the processes of one run, which end together.

    Raises:
        ValueError: If another run is at work there.
        OSError: If nothing can be written there; `ConnectionError`, which names the rank, if a process has ended.
    """
    lock, has_lock = FolderLock(folder, accelerator.process_index), False
    refusal: Exception | None = None
    try:
        has_lock = lock.take()
    except (ValueError, OSError) as error:
        refusal = error
    try:
        states = gather_object([(has_lock, refusal)])
        if states[0][1] is not None:  # the others write nothing
            raise states[0][1]
        if not states[0][0]:
            accelerator.print(without_locks(folder))
        # Machines that share no disk do not see each other's.
        seen = [rank for rank, (holds, _) in enumerate(states) if has_lock and holds and rank != lock.process]
        with _watching(lock, [rank for rank in seen if lock.is_held_by(rank)]):
            yield
        accelerator.end_training()
    finally:
        lock.release()


@contextmanager
def _watching(lock: FolderLock, others: list[int]) -> Iterator[None]:
    """End with a sentence when another process of the run has ended."""
    is_over = threading.Event()
    watcher = threading.Thread(target=_end_with_others, args=(lock, others, is_over), daemon=True)
    if others:
        watcher.start()
    try:
        yield
    except RuntimeError as error:  # of whatever backend, in whatever collective
        if ended := _ended(lock, others, SECONDS_TO_SEE):
            raise ConnectionError(ended) from error
        raise
    finally:
        is_over.set()
        if others:
            watcher.join()


def _end_with_others(lock: FolderLock, others: list[int], is_over: threading.Event) -> None:
    """End this process when another has ended and no error comes of it: on a GPU a collective may wait for ever."""
    while not is_over.wait(SECONDS_BETWEEN_LOOKS):
        if (ended := _ended(lock, others)) and not is_over.wait(SECONDS_TO_END):
            print(f"Error: {ended}", file=sys.stderr, flush=True)
            os._exit(2)


def _ended(lock: FolderLock, others: list[int], seconds: float = 0.0) -> str:
    """Say which processes of a run are no longer there, if that shows within some seconds."""
    end = time.monotonic() + seconds
    while not (gone := [str(rank) for rank in others if not lock.is_held_by(rank)]):
        if not others or time.monotonic() >= end:
            return ""
        time.sleep(0.1)
    return (
        f"The process of rank {', '.join(gone)} has ended before the run, which cannot go on without it: what was "
        "saved is intact. Start all of them again to go on from there."
    )


def start_tracker(accelerator: Accelerator, config: TrainConfig) -> None:
    """Tell the tracker that a recipe names what the run is; every line of the log goes there too."""
    if config.tracker == "none":
        return
    plain = {name: value if isinstance(value, int | float) else str(value) for name, value in asdict(config).items()}
    folder = Path(config.output_dir, "runs")
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
    options = {"wandb": {"dir": str(folder)}}  # which would write where the command was called
    accelerator.init_trackers(Path(config.output_dir).resolve().name, config=plain, init_kwargs=options)


def tensor_parallel_size(accelerator: Accelerator) -> int:
    """Return over how many processes every matrix is divided."""
    return accelerator.parallelism_config.tp_size if accelerator.parallelism_config is not None else 1


def data_parts(accelerator: Accelerator) -> tuple[int, int]:
    """Return into how many parts the data is divided, and which of them this process takes."""
    size = tensor_parallel_size(accelerator)  # processes that divide a matrix see the same images
    return accelerator.num_processes // size, accelerator.process_index // size


def speaks_for_part(accelerator: Accelerator) -> bool:
    """Return whether what this process measures counts, of those that see the same images."""
    return accelerator.process_index % tensor_parallel_size(accelerator) == 0


def divide_matrices(model: Any, accelerator: Accelerator) -> Any:
    """Return the model by the tensor-parallel plan of its config, if Accelerate's parallelism config asks for that."""
    size = tensor_parallel_size(accelerator)
    if size == 1:
        return model
    from transformers.distributed import DistributedConfig

    with tempfile.TemporaryDirectory() as folder:  # transformers divides what it loads, and nothing else
        model.config.save_pretrained(folder)
        save_file(model.state_dict(), Path(folder) / "model.safetensors", metadata={"format": "pt"})
        divided = type(model).from_pretrained(folder, distributed_config=DistributedConfig(tp_size=size))
    for parameter, whole in zip(divided.parameters(), model.parameters(), strict=True):
        parameter.requires_grad_(whole.requires_grad)
    del divided.config.distributed_config  # it has a save wait for all processes; here one alone writes, and all of it
    return divided


def whole_weights(model: Any) -> dict[str, Tensor]:
    """Return a copy of all weights by their names in the model itself; to be asked for by all processes."""
    weights: dict[str, Any] = get_model_state_dict(model, options=WHOLE)
    return {name: tensor.clone() for name, tensor in weights.items()}


def load_weights(model: Any, weights: dict[str, Any]) -> None:
    """Give every process its part of `weights`."""
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True))


def optimizer_state(model: Any, optimizer: Any) -> dict[str, Any]:
    """Return the whole state of the optimizer by names of parameters; to be asked for by all processes."""
    return get_optimizer_state_dict(model, optimizer.optimizer, options=WHOLE)


def load_optimizer_state(model: Any, optimizer: Any, state: dict[str, Any]) -> None:
    """Give every process its part of the state."""
    set_optimizer_state_dict(model, optimizer.optimizer, state, options=StateDictOptions(full_state_dict=True))
