"""One process or many: what Accelerate is told, and the state of a run whole, however it is divided.

How the work is divided is the launcher's to say: `accelerate launch` and its config, or `torchrun` with the variables
that it would set. One copy of the model a process (DDP), shards (FSDP2) and tensor parallelism train the same model.
"""

import os
import tempfile
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    ProjectConfiguration,
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

from ..system.machine import resolve_precision
from .recipe import TrainConfig

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


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
