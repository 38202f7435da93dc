"""One process or many: setting up Accelerate, and gathering or loading the complete state of a run.

The launcher decides how the work is divided: `accelerate launch` and its config, or `torchrun` with the variables that
`accelerate launch` would set. Data parallelism (DDP), sharding (FSDP2) and tensor parallelism train the same model.
"""

import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    AORecipeKwargs,
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
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
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from ..model.modeling_hf_vit import HFViTLayer
from ..system.locking import LONGEST_WAIT
from ..system.machine import device_name, multiplies_in_8_bits, resolve_precision
from ..system.transfers import copied_to_host
from .recipe import TrainConfig


def build_accelerator(config: TrainConfig) -> Accelerator:
    """Return the Accelerator of a run.

    Raises:
        ValueError: If its tracker is not installed, or the device does not compute in its precision.
    """
    if config.tracker != "none" and find_spec(config.tracker) is None:  # Accelerate would ignore it
        raise ValueError(f"tracker: {config.tracker} is not installed: pip install {config.tracker}")
    AcceleratorState._reset_state()  # an earlier run in this process may have used another precision
    precision = resolve_precision(config.precision)
    in_8_bits = [_training_in_8_bits()] if precision == "fp8" else []
    sharding = _sharding(precision)
    accelerator = Accelerator(
        mixed_precision=precision,
        gradient_accumulation_steps=config.accumulation_steps,
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
        step_scheduler_with_optimizer=False,  # the learning rate follows from the step
        log_with=None if config.tracker == "none" else config.tracker,
        project_config=ProjectConfiguration(project_dir=config.output_dir, logging_dir=str(_tracker_folder(config))),
        fsdp_plugin=sharding,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=LONGEST_WAIT),
            # Gradients are parts of DDP's buckets, not copies, which saves memory for one set of gradients.
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            *in_8_bits,
        ],
    )
    if precision == "fp16" and accelerator.device.type == "cpu":  # Accelerate would compute in float32
        raise ValueError("precision: fp16 needs a GPU, and this run is on the CPU: set precision to bf16 or fp32.")
    if sharding is not None and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # Accelerate ignores the request on CPUs, though its FSDP2 works there.
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = sharding
    return accelerator


def _training_in_8_bits() -> AORecipeKwargs:
    """Return how Accelerate converts linear layers to FP8, but for the first, the last, and sizes not divisible by 16.

    Weights, gradients and the optimizer's state stay in float32. Each factor is scaled by its largest value.

    Raises:
        ValueError: If the device does not multiply in FP8, or torchao is not installed.
    """
    device = torch.accelerator.current_accelerator(True) or torch.device("cpu")
    if not multiplies_in_8_bits(device):
        raise ValueError(
            f"precision: fp8 needs a GPU of compute capability 8.9 or later, and this run is on {device_name(device)}"
            ": set precision to bf16."
        )
    if find_spec("torchao") is None:
        raise ValueError("precision: fp8 needs torchao, which is not installed: pip install torchao")
    from torchao.float8 import Float8LinearConfig

    # Accelerate's own config gathers shards in FP8, so the weights in a checkpoint would not be plain tensors.
    return AORecipeKwargs(config=Float8LinearConfig())


def _sharding(precision: str) -> FullyShardedDataParallelPlugin | None:
    """Return how a model is sharded, if the launcher asks for FSDP: by layer, unless it states another policy.

    Layers are gathered while others compute. Gradients are summed in float32.
    """
    if not _is_fsdp_wanted():
        return None
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}.get(precision)
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy=os.environ.get("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP"),
        mixed_precision_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
        # Otherwise transformers leaves new weights, such as those of a head, without values on all but the first
        # process. `accelerate launch` asks for that by default.
        cpu_ram_efficient_loading=False,
    )


def _is_fsdp_wanted() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def _tracker_folder(config: TrainConfig) -> Path:
    return Path(config.output_dir, "runs")


def start_tracker(accelerator: Accelerator, config: TrainConfig) -> None:
    """Start the tracker of the recipe, if any, with the recipe as its config."""
    if config.tracker == "none":
        return
    plain = {name: value if isinstance(value, int | float) else str(value) for name, value in asdict(config).items()}
    folder = _tracker_folder(config)
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
    options = {"wandb": {"dir": str(folder)}}  # by default, it writes into the current directory
    accelerator.init_trackers(Path(config.output_dir).resolve().name, config=plain, init_kwargs=options)


def _tensor_parallel_size(accelerator: Accelerator) -> int:
    return accelerator.parallelism_config.tp_size if accelerator.parallelism_config is not None else 1


def data_parts(accelerator: Accelerator) -> tuple[int, int]:
    """Return the number of parts that the data is divided into, and the part of this process."""
    size = _tensor_parallel_size(accelerator)  # processes that share a matrix see the same images
    return accelerator.num_processes // size, accelerator.process_index // size


def counts_in_evaluation(accelerator: Accelerator) -> bool:
    """Return whether this process is the one that counts among those that see the same images."""
    return accelerator.process_index % _tensor_parallel_size(accelerator) == 0


def shard_matrices(model: Any, accelerator: Accelerator) -> Any:
    """Return the model sharded by its tensor-parallel plan, if Accelerate's parallelism config asks for that."""
    size = _tensor_parallel_size(accelerator)
    if size == 1:
        return model
    from transformers.distributed import DistributedConfig

    with tempfile.TemporaryDirectory() as folder:  # transformers shards only while loading
        model.config.save_pretrained(folder)
        save_file(model.state_dict(), Path(folder) / "model.safetensors", metadata={"format": "pt"})
        sharded = type(model).from_pretrained(folder, distributed_config=DistributedConfig(tp_size=size))
    for parameter, original in zip(sharded.parameters(), model.parameters(), strict=True):
        parameter.requires_grad_(original.requires_grad)
    # With this attribute, saving waits for all processes; here the main process alone saves the complete weights.
    del sharded.config.distributed_config
    return sharded


class _DropPath(torch.nn.Module):
    """Drop a residual branch per sample, as `HFViTDropPath` does, but with the probability as a tensor.

    As a number, it would be part of a compiled graph, so that every layer needed its own.
    """

    def __init__(self, probability: float, device: torch.device) -> None:
        super().__init__()
        self.keep = torch.tensor(1 - probability, device=device)  # not a buffer, which DDP would send in every step

    def forward(self, hidden_states: Tensor, packing: None = None) -> Tensor:
        if not self.training:
            return hidden_states
        kept = torch.rand(len(hidden_states), 1, 1, device=hidden_states.device) < self.keep
        return hidden_states * kept / self.keep


def compile_layers(model: Any, device: torch.device, mode: str = "default") -> None:
    """Compile the layers of a model, or a model without layers as a whole.

    One graph serves all layers. DDP and FSDP communicate the gradients of a layer while earlier ones compute theirs:
    those of a graph are all ready at its end.

    Args:
        model: Each forward is followed by its backward, or has none.
        device: Device of the model.
        mode: Mode of `torch.compile`; all but the default one replay CUDA graphs.

    Raises:
        ValueError: If the device has no CUDA graphs, or weights do not stay where they are.
    """
    if mode != "default":
        if device.type != "cuda" or _is_fsdp_wanted():
            where = "uses FSDP" if _is_fsdp_wanted() else f"is on {device.type}"
            raise ValueError(
                f"compile_mode: {mode} replays CUDA graphs, and this run {where}: set compile_mode to default."
            )
        # Without this, a replay may free what the layer before has computed.
        model.register_forward_pre_hook(lambda *given: torch.compiler.cudagraph_mark_step_begin())
    layers = getattr(getattr(model, model.base_model_prefix, model), "layers", [])
    drop_paths = [layer.drop_path for layer in layers if isinstance(layer, HFViTLayer)]
    if any(drop_path.probability for drop_path in drop_paths):
        for layer in layers:
            layer.drop_path = _DropPath(layer.drop_path.probability, device)
    # Dynamo looks at `.grad` of what a layer gets, which torch warns about.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    for part in layers or [model]:
        part.compile(mode=mode)


def whole_weights(model: Any) -> dict[str, Tensor]:
    """Return a copy of all weights by their names in the unwrapped model; called by all processes together."""
    return _complete(model, partial(get_model_state_dict, model))


def _complete(model: Any, state: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """Return a copy of a complete state on the CPU of the main process, and `{}` on the others.

    Shards are gathered one after the other, so that the whole state need not fit on a device.
    """
    parameters = list(model.parameters())
    is_sharded = any(isinstance(parameter, DTensor) for parameter in parameters)
    whole = state(options=StateDictOptions(full_state_dict=True, cpu_offload=is_sharded))
    if not PartialState().is_main_process:
        return {}
    is_copied = is_sharded and parameters[0].device.type != "cpu"
    return whole if is_copied else copied_to_host(whole)


def load_weights(model: Any, weights: dict[str, Any]) -> None:
    """Load complete weights, or those of some parameters; each process takes its shards."""
    is_strict = len(weights) == len(model.state_dict())
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, strict=is_strict))


def load_weights_of_main(model: Any, weights: dict[str, Any]) -> None:
    """Load complete weights that the main process alone holds; called by all processes together."""
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=torch.distributed.is_initialized())
    set_model_state_dict(model, weights, options=options)


def optimizer_state(model: Any, optimizer: Any) -> dict[str, Any]:
    """Return a copy of the complete optimizer state by parameter names; called by all processes together."""
    return _complete(model, partial(get_optimizer_state_dict, model, optimizer.optimizer))


def load_optimizer_state(model: Any, optimizer: Any, state: dict[str, Any]) -> None:
    """Load a complete optimizer state; each process takes its shards."""
    set_optimizer_state_dict(model, optimizer.optimizer, state, options=StateDictOptions(full_state_dict=True))
