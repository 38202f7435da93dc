"""Write a checkpoint of any family as a folder of this package."""

from pathlib import Path

from ..model.image_processing_pil_hf_vit import HFViTImageProcessorPil
from ..model.repository_hf_vit import complete_repository
from ..system.disk import new_folder
from .checkpoint import Checkpoint, Options
from .writing import WEIGHTS, verify, write_safetensors


def write_checkpoint(checkpoint: Checkpoint, folder: str | Path, force: bool = False) -> None:
    """Write weights, config, processor, code and model card, and verify them before the folder gets its name.

    One tensor is in memory at a time.

    Args:
        checkpoint: The checkpoint to write.
        folder: Where to write it; nothing is left there if anything fails.
        force: Replace the model in that folder.

    Raises:
        ValueError: If the folder is not empty, or a tensor contradicts the others.
    """
    with new_folder(folder, force) as unfinished:
        sums = write_safetensors(unfinished / WEIGHTS, checkpoint.shapes, checkpoint.dtype, checkpoint.weights())
        checkpoint.config.dtype = checkpoint.dtype
        checkpoint.config.save_pretrained(unfinished)
        checkpoint.processor().save_pretrained(unfinished)
        complete_repository(unfinished, checkpoint.config)
        verify(unfinished, Options(), checkpoint, sums)
        HFViTImageProcessorPil.from_pretrained(unfinished)
