"""Images that show the range of activations, for 8 bits with ranges that are fixed."""

import numpy as np
import torch

from ..data.images import EvaluationImages, normalize
from ..data.labelled import load_data
from ..model.image_processing_hf_vit import HFViTImageProcessor

NUMBER = 128  # images
BATCH = 8


def calibration_images(source: str, processor: HFViTImageProcessor, number: int = NUMBER) -> list[np.ndarray]:
    """Return pixel values, float32 `[B, C, H, W]`, of training images that are spread evenly over a data set.

    Args:
        source: As for `load_data`; labels are not needed.
        processor: The image processor of the model.
        number: The largest number of images.
    """
    data = load_data(source, needs_labels=False, needs_train=False, holds_out=False)
    split = data.evaluation if data.train is None else data.train
    images = EvaluationImages(split, (data.columns[0], None), processor)
    rows = sorted({int(row) for row in np.linspace(0, len(images) - 1, number)})
    examples = [images[row] for row in rows]
    pixels = [example["pixel_values"] for example in examples if example["broken"] is None]
    if not pixels:
        raise ValueError(f"No image of {source} can be read: give other images for --calibration.")
    return [
        normalize(torch.stack(pixels[start : start + BATCH]), processor).numpy()
        for start in range(0, len(pixels), BATCH)
    ]
