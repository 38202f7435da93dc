"""Write predicted masks as PNG files with a palette, one for each image."""

import json
import time
from pathlib import Path

from PIL import Image

from ..data.masks import palette
from ..data.sources import Sources
from ..system.disk import writing
from .predict import Summary, no_images
from .predictor import MaskPredictor
from .shards import Settings
from .table import PredictionTable

NAMES = "id2label.json"


def predict_masks(folder: Path, sources: Sources, settings: Settings, restart: bool = False) -> Summary:
    """Write the mask of every image, and the names of the classes as `id2label.json`, into a folder.

    The value of a pixel is the index of its class; the palette shows it as a colour. A mask has the size of its
    upright image and its name, or its number if the image has none; of images of the same name, a number follows.

    Args:
        folder: New or empty, unless `restart` is true; then files of the same names are replaced.
        sources, settings: As for `predict_to_file`.

    Raises:
        ValueError: If the model is not one for segmentation, the folder is not empty, or there are no images.
    """
    predictor = settings.predictor()
    if not isinstance(predictor, MaskPredictor):
        PredictionTable(folder, settings.has_features)  # raises, since the name has no ending of a table
    if folder.exists() and not (folder.is_dir() and (restart or not any(folder.iterdir()))):
        raise ValueError(f"{folder} is not an empty folder: choose another one, or add --restart to replace masks.")
    folder.mkdir(parents=True, exist_ok=True)
    colors = palette(len(predictor.labels)).flatten().tolist()
    names: set[str] = set()
    broken: list[str] = []
    images, began = 0, time.perf_counter()
    with writing("the masks", folder):
        (folder / NAMES).write_text(json.dumps(predictor.labels, indent=2) + "\n", encoding="utf-8")
        for number, prediction in enumerate(predictor(sources.rows())):
            images += 1
            name = prediction.source["path"] or str(number)
            if prediction.error is not None or prediction.mask is None:
                broken.append(name)
                continue
            stem = Path(name).stem
            stem = stem if stem not in names else f"{stem}-{number}"
            names.add(stem)
            mask = Image.fromarray(prediction.mask, mode="L")
            mask.putpalette(colors)
            mask.save(folder / f"{stem}.png")
    if not images:
        raise no_images(sources)
    return Summary(images, broken, images / (time.perf_counter() - began))
