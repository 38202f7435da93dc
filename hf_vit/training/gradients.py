"""The gradients of a step, in as many parts as memory requires.

When memory runs out, the parts are halved and the step is repeated. The images of the step, its random numbers and its
learning rate stay the same, and so do the gradients, up to rounding.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType, send_to_device
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor

if TYPE_CHECKING:
    from .run import Run


def compute_gradients(run: "Run", batches: list[dict[str, Any]], seed: int) -> Tensor:
    """Compute the gradients of one step, and return the mean loss of this process.

    Args:
        run: The run; its state counts the parts into which each batch is split.
        batches: What the loader gives for this step: one batch per accumulation step.
        seed: Seed of dropout, mixing and masks.

    Raises:
        ValueError: If a single image does not fit into memory, or if memory runs out in one of several processes or
            with CUDA graphs.
    """
    if not run.is_tried:
        _try_out(run, batches[0], seed)
        run.is_tried = True
    while True:
        try:
            return _compute(run, batches, seed)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # Here, outside of the handler, nothing holds the tensors of the failed step any more.
        processes = run.accelerator.num_processes
        if processes > 1:
            raise ValueError(
                f"Memory ran out in one of {processes} processes at step {run.state.step + 1}. The checkpoints are "
                f"intact: run the command again with --accumulation-steps {2 * run.config.accumulation_steps}, or "
                "with --gradient-checkpointing."
            )
        if run.config.compile_mode != "default":
            raise ValueError(
                f"Memory ran out at step {run.state.step + 1}, and CUDA graphs cannot compute a batch in parts. The "
                "checkpoints are intact: run the command again with --compile-mode default."
            )
        _halve(run, len(batches[0]["labels"]))


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether an error of an accelerator or of the CPU's allocator says that memory ran out."""
    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


def split_batch(batch: dict[str, Any], number: int) -> list[dict[str, Any]]:
    """Return the tensors of a batch in up to `number` parts."""
    names, number = list(batch), min(number, len(batch["labels"]))
    parts = zip(*(torch.tensor_split(batch[name], number) for name in names), strict=True)
    return [dict(zip(names, part, strict=True)) for part in parts]


def _compute(run: "Run", batches: list[dict[str, Any]], seed: int) -> Tensor:
    accelerator, model = run.accelerator, run.state.model
    torch.manual_seed(seed)  # for dropout and stochastic depth
    generator = torch.Generator().manual_seed(seed)  # for mixing and masks
    total = sum(len(batch["labels"]) for batch in batches)
    number = sum(min(run.state.split, len(batch["labels"])) for batch in batches)
    accelerator.step, accelerator.gradient_accumulation_steps = 0, number
    step_loss = torch.zeros((), device=accelerator.device)
    for batch in batches:
        on_device = send_to_device(batch, accelerator.device, non_blocking=True)
        for part in split_batch(on_device, run.state.split):
            # Gradients are synchronized between processes in the last part of a batch only.
            with accelerator.accumulate(model):
                loss = run.task.loss(model, run.to_model(part["pixel_values"]), part["labels"], generator)
                if (share := len(part["labels"]) * number / total) != 1:  # parts of unequal sizes
                    loss = loss * share
                accelerator.backward(loss)
            step_loss += loss.detach() / number
    return step_loss


def _halve(run: "Run", batch_size: int) -> None:
    """Split every batch into twice as many parts."""
    run.state.optimizer.zero_grad()
    clear_device_cache(garbage_collection=True)
    if run.state.split >= batch_size:
        raise ValueError(
            "Memory ran out with a single image: use a smaller image_size or model, or gradient_checkpointing."
        )
    run.state.split *= 2
    size = math.ceil(batch_size / run.state.split)
    run.say(
        f"Memory ran out: each batch is computed in parts of {size} from here on. The batch size of "
        f"{run.config.batch_size} and the learning rate stay the same."
    )


def _try_out(run: "Run", batch: dict[str, Any], seed: int) -> None:
    """Have all processes compute and discard the gradients of a part, before the first step.

    First, they split the batches of an accelerator until each can compute a part. A process on its own, and processes
    that share a model, need or allow no trial.
    """
    accelerator = run.accelerator
    is_replicated = accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.NO)
    if not is_replicated or run.division.processes < accelerator.num_processes:
        return
    while accelerator.device.type != "cpu":
        fits = torch.tensor(float(_fits(run, batch, seed)), device=accelerator.device)
        if accelerator.reduce(fits).item() == accelerator.num_processes:
            break
        _halve(run, len(batch["labels"]))
    # DDP sums gradients in buckets, and changes these after its first backward. With more than two processes, the
    # order of summation follows from the buckets, so a resumed run must not begin with other ones.
    _discarded_gradients(run, batch, seed)
    run.state.optimizer.zero_grad()


def _fits(run: "Run", batch: dict[str, Any], seed: int) -> bool:
    """Return whether this process can compute a part; a process that cannot must not leave others waiting."""
    try:
        with run.accelerator.no_sync(run.state.model):
            _discarded_gradients(run, batch, seed)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def _discarded_gradients(run: "Run", batch: dict[str, Any], seed: int) -> None:
    part = split_batch(send_to_device(batch, run.accelerator.device), run.state.split)[0]
    generator = torch.Generator().manual_seed(seed)
    run.task.loss(run.state.model, run.to_model(part["pixel_values"]), part["labels"], generator).backward()
