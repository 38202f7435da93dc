"""Write an image for each image: predicted masks as PNG files with a palette, or drawings of predicted boxes."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..data.boxes import draw_boxes
from ..data.images import read_stored
from ..data.masks import palette
from ..data.sources import Sources
from ..model.image_conversion_hf_vit import convert_to_rgb, pil_of_tensor
from ..model.image_reading_hf_vit import upright
from ..system.disk import writing
from .predict import Summary, no_images
from .predictor import BoxPredictor, MaskPredictor, Prediction
from .shards import Settings
from .table import PredictionTable

NAMES = "id2label.json"


def predict_masks(folder: Path, sources: Sources, settings: Settings, restart: bool = False) -> Summary:
    """Write the mask of every image, and the names of the classes as `id2label.json`, into a folder.

    The value of a pixel is the index of its class; the palette shows it as a colour. A mask has the size of its
    upright image and its name, or its number if the image has none; of images of the same name, a number follows.
    With a model for detection, the images are written with the boxes of their objects.

    Args:
        folder: New or empty, unless `restart` is true; then files of the same names are replaced.
        sources, settings: As for `predict_to_file`.

    Raises:
        ValueError: If the model is not one for segmentation or detection, the folder is not empty, or there are no
            images.
    """
    predictor = settings.predictor(is_to_file=True)
    if not isinstance(predictor, MaskPredictor | BoxPredictor):
        PredictionTable(folder, settings.has_features)  # raises, since the name has no ending of a table
    if folder.exists() and not (folder.is_dir() and (restart or not any(folder.iterdir()))):
        raise ValueError(f"{folder} is not an empty folder: choose another one, or add --restart to replace files.")
    folder.mkdir(parents=True, exist_ok=True)
    save = _save_mask if isinstance(predictor, MaskPredictor) else _save_drawing
    names: set[str] = set()
    broken: list[str] = []
    images, began = 0, time.perf_counter()
    with writing("the images", folder):
        (folder / NAMES).write_text(json.dumps(predictor.labels, indent=2) + "\n", encoding="utf-8")
        for number, prediction in enumerate(predictor(sources.rows())):
            images += 1
            name = prediction.source["path"] or str(number)
            if prediction.error is not None:
                broken.append(name)
                continue
            stem = Path(name).stem
            stem = stem if stem not in names else f"{stem}-{number}"
            names.add(stem)
            save(prediction, folder / stem, predictor.labels)
    if not images:
        raise no_images(sources)
    return Summary(images, broken, images / (time.perf_counter() - began), predictor.runtime)


def _save_mask(prediction: Prediction, path: Path, labels: dict[int, str]) -> None:
    """Write a mask as `path.png`."""
    assert prediction.mask is not None
    mask_picture(prediction.mask, len(labels)).save(f"{path}.png")


def mask_picture(mask: np.ndarray, number: int) -> Image.Image:
    """Return a mask `[H, W]` as an image with a palette that shows each of a number of classes as a colour."""
    picture = Image.fromarray(mask, mode="L")
    picture.putpalette(palette(number).flatten().tolist())
    return picture


def _save_drawing(prediction: Prediction, path: Path, labels: dict[int, str]) -> None:
    """Write an image with its boxes as `path.jpg`."""
    drawn_objects(prediction, read_stored(prediction.source), labels).save(f"{path}.jpg", quality=92)


def drawn_objects(prediction: Prediction, image: Any, labels: dict[int, str]) -> Image.Image:
    """Return an image, as `read_image` returns it, with the boxes, labels and scores of its objects."""
    boxes = np.zeros((0, 4)) if prediction.boxes is None else prediction.boxes
    picture = convert_to_rgb(upright(image) if isinstance(image, Image.Image) else pil_of_tensor(image))
    index = {name: number for number, name in reversed(labels.items())}
    classes = [index[name] for name in prediction.labels]
    texts = [f"{name} {score:.0%}" for name, score in zip(prediction.labels, prediction.scores, strict=True)]
    return draw_boxes(picture, boxes.tolist(), classes, texts, len(labels))
