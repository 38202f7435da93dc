"""What the choice of defaults depends on: facts of the data, of the model, and of the machine."""

import os
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image as PILImage

from ..checkpoints.checkpoint import usual_size
from ..checkpoints.opening import open_checkpoint
from ..data.labelled import ImageData
from ..data.opening import as_stored
from ..model.modeling_hf_vit import HFViTModel
from ..system.machine import cores, free_memory
from ..variants import VARIANTS, is_from_scratch
from .recipe import TrainConfig
from .tasks import architecture_of

SAMPLE = 64  # images whose sizes are read


@dataclass(frozen=True)
class Facts:
    """Facts of a run.

    Attributes:
        images, evaluation_images: Numbers of images; 0 for an evaluation split of unknown length.
        problem_type: transformers' name for what the labels are.
        is_stream: Whether the data is read as a stream.
        stored_size: Mean (height, width) in pixels of the stored images; `None` if unknown.
        is_checkpoint: Whether the model is a checkpoint, not a model from scratch.
        image_size: (height, width) for which the checkpoint was made; `None` from scratch.
        patch_size: (height, width) of a patch in pixels.
        width, depth: Hidden size and number of layers.
        parameters: Number of parameters.
        device: Type of the device, such as `"cuda"`.
        is_half: Whether activations are in half precision.
        memory, device_memory: Bytes of free memory of the machine and of the device; the latter is 0 for the CPU.
        cores: CPU cores of this machine.
        processes, local_processes: Training processes, and those on this machine.
    """

    images: int
    evaluation_images: int = 0
    problem_type: str | None = "single_label_classification"
    is_stream: bool = False
    stored_size: tuple[float, float] | None = None
    is_checkpoint: bool = True
    image_size: tuple[int, int] | None = None
    patch_size: tuple[int, int] = (16, 16)
    width: int = 384
    depth: int = 12
    parameters: int = 22_000_000
    device: str = "cpu"
    is_half: bool = False
    memory: int = 16 * 2**30
    device_memory: int = 0
    cores: int = 8
    processes: int = 1
    local_processes: int = 1

    @property
    def memory_of_process(self) -> int:
        """The free bytes for the activations of one process."""
        return self.device_memory or self.memory // self.local_processes


def facts_of(config: TrainConfig, data: ImageData, accelerator: Accelerator) -> Facts:
    """Return the facts of a run; of a checkpoint, only names, shapes and configs are read."""
    device = accelerator.device.type
    return Facts(
        images=data.train_length,
        evaluation_images=len(data.evaluation) if hasattr(data.evaluation, "__len__") else 0,
        problem_type=data.problem_type,
        is_stream=data.is_stream,
        stored_size=None if data.is_stream else stored_size(data.train, data.columns),
        **_facts_of_model(config),
        device=device,
        is_half=accelerator.mixed_precision != "no",
        memory=free_memory(),
        device_memory=torch.cuda.mem_get_info(accelerator.device)[0] if device == "cuda" else 0,
        cores=cores(),
        processes=accelerator.num_processes,
        local_processes=processes_here(accelerator),
    )


def processes_here(accelerator: Accelerator) -> int:
    """Return the number of training processes on this machine, as the launcher states it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))


def _facts_of_model(config: TrainConfig) -> dict[str, Any]:
    is_checkpoint = not is_from_scratch(config.model)
    if is_checkpoint:
        checkpoint = open_checkpoint(str(config.model))
        model_config, parameters = checkpoint.config, checkpoint.num_parameters
        image_size = usual_size(checkpoint)
    else:
        fields = {}
        if "image_size" in config.auto:  # any size that is divisible into patches
            patch = config.model_config.get("patch_size") or (
                VARIANTS[config.model].patch_size if config.model is not None else 16
            )
            fields["image_size"] = [14 * side for side in ([patch] * 2 if isinstance(patch, int) else patch)]
        model_config, image_size = architecture_of(config, **fields), None
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in HFViTModel(model_config).parameters())
    return {
        "is_checkpoint": is_checkpoint,
        "image_size": image_size,
        "patch_size": tuple(model_config.patch_shape),
        "width": model_config.hidden_size,
        "depth": model_config.num_hidden_layers,
        "parameters": parameters,
    }


def stored_size(split: Any, columns: tuple[str, str | None]) -> tuple[float, float] | None:
    """Return the mean (height, width) of some images of a split, from their headers; `None` if none can be read."""
    rows, sizes = as_stored(split, columns), []
    for index in range(0, len(rows), max(1, len(rows) // SAMPLE))[:SAMPLE]:
        with suppress(Exception):  # what cannot be read is counted later
            stored = rows[index][columns[0]]
            with PILImage.open(BytesIO(stored["bytes"]) if stored["bytes"] else stored["path"]) as image:
                sizes.append((image.height, image.width))
    if not sizes:
        return None
    heights, widths = zip(*sizes, strict=True)
    return sum(heights) / len(sizes), sum(widths) / len(sizes)
