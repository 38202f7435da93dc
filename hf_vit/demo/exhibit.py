"""A classifier as the page asks of it: answers, what it looks at, other sizes, many files. It knows no page.

The model is in memory once, as it was loaded, since attention is read from its layers; it answers in float32.
"""

import io
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..checkpoints.models import load
from ..data.images import normalize, preprocess
from ..inspection import attention_maps, attention_rollout, lit
from ..inspection.gallery import Picture, Subject, name_of, pictures_of_positions
from ..inspection.layers import head_number
from ..model.image_processing_hf_vit import HFViTImageProcessor
from ..model.image_reading_hf_vit import read_image
from ..prediction.predictor import Prediction, Predictor

Size = tuple[int, int]  # (height, width), pixels

FACTORS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)  # of the model's own size, for what another resolution does
NO_CLASSIFIER = (
    "{} has no classifier, so it has no answers to show: train one on it, or see what it learned by hf-vit inspect."
)
SHARP = 480  # pixels that pictures have along their longer side, at least


class File(NamedTuple):
    """A file that was uploaded: where it lies, and what its owner calls it."""

    path: Path
    name: str


class Answer(NamedTuple):
    """What a model says of an image at a size, and the seconds from the file to the answer."""

    prediction: Prediction
    size: Size
    seconds: float


class Attention(NamedTuple):
    """An image in the light of attention, uint8 `[H, W, 3]`, and the shares where it is darkest and brightest.

    `even` is the share of every patch if all had the same.
    """

    picture: np.ndarray
    low: float
    high: float
    even: float


def _of_layer(model: Any, pixel_values: Tensor, layer: int, head: int | None) -> np.ndarray:
    maps = attention_maps(model, pixel_values, layer)  # [B, A, h, w]
    return maps.mean(axis=1) if head is None else maps[:, head_number(model, head) - 1]


# From model, pixel values, layer and head to `[B, h, w]`.
VIEWS: dict[str, Callable[[Any, Tensor, int, int | None], np.ndarray]] = {
    "rollout": attention_rollout,
    "layer": _of_layer,
}


class Exhibit:
    """A classifier to be shown.

    Args:
        source: A file, a folder or a name on the Hub, in any layout.

    Raises:
        ValueError: If it is no classifier.
    """

    def __init__(self, source: str) -> None:
        model, processor = load(source)
        if getattr(model, "classifier", None) is None or not model.config.num_labels:
            raise ValueError(NO_CLASSIFIER.format(source))
        self.name = name_of(source)
        self.config = model.config
        self.device = torch.accelerator.current_accelerator(True) or torch.device("cpu")
        self.model = model.float().to(self.device)
        stated = {**processor.to_dict(), "do_resize": True, "packing": None}  # all images to one size
        self.processor = HFViTImageProcessor.from_dict(stated)

    @property
    def own_size(self) -> Size:
        return self.config.image_shape

    @property
    def sizes(self) -> list[Size]:
        """Sizes to compare, the smallest first: those near `FACTORS` of the model's own."""
        return sorted({self.own_size, *map(self.near, FACTORS)})

    def near(self, factor: float) -> Size:
        """Return the size of whole patches that is nearest to the model's own times a factor."""
        height, width = (
            max(1, round(factor * side / step)) * step
            for side, step in zip(self.own_size, self.config.patch_shape, strict=True)
        )
        return height, width

    def patches(self, size: Size) -> int:
        """Return the number of patches in images of a size."""
        rows, columns = self.config.grid_of(*size)
        return rows * columns

    def predictor(self, size: Size, top_k: int = 5) -> Predictor:
        """Return what answers for images brought to a size."""
        return Predictor(
            model=self.model,
            processor=self._processor(size),
            labels=self.config.id2label,
            device=self.device,
            top_k=top_k,
        )

    def warm_up(self) -> None:
        """Answer once for a photograph, so that nobody's first image takes longer than the others."""
        photo = io.BytesIO()
        Image.new("RGB", (640, 480), "gray").save(photo, "JPEG")
        list(self.predictor(self.own_size)([photo.getvalue()]))

    def answer(self, file: File, size: Size | None = None) -> Answer:
        """Classify an image at a size, (height, width) in pixels; the model's own if not given."""
        size = size or self.own_size
        began = time.perf_counter()
        (prediction,) = self.predictor(size)([file.path])
        return Answer(_named(prediction, file), size, time.perf_counter() - began)

    def label(self, files: Sequence[File]) -> Iterator[Prediction]:
        """Yield the likeliest label of each file, in their order; a broken one has an `error`."""
        predictions = self.predictor(self.own_size, top_k=1)([file.path for file in files])
        for prediction, file in zip(predictions, files, strict=True):
            yield _named(prediction, file)

    def attention(self, file: File, view: str = "rollout", layer: int = -1, head: int | None = None) -> Attention:
        """Show which patches a layer looks at, through those below it or by itself.

        Args:
            view: A key of `VIEWS`.
            layer: Number from 1, or negative from the end.
            head: Number from 1; all, averaged, if not given.

        Raises:
            ValueError: If the image is broken, or there is no such layer or head.
        """
        pixels = self._pixels(file, self.own_size)[None].to(self.device)
        (values,) = VIEWS[view](self.model, normalize(pixels, self.processor), layer, head)
        times = -(-SHARP // max(self.own_size))
        shown = self._pixels(file, (times * self.own_size[0], times * self.own_size[1]))
        picture, (low, high) = lit(shown.cpu().numpy(), values)
        return Attention(picture, low, high, 1 / values.size)

    def positions(self) -> tuple[Picture | None, str]:
        """Draw what positions have learned, and say how to read it; of those that cannot be drawn, why."""
        subject = Subject(self.model, self.name, self.own_size, self.config.num_hidden_layers)
        picture = next(pictures_of_positions(subject), None)
        return picture, " ".join(subject.notes) if picture is None else picture.reading

    def _processor(self, size: Size) -> HFViTImageProcessor:
        processor = deepcopy(self.processor)
        processor.set_output_size(size)
        return processor

    def _pixels(self, file: File, size: Size) -> Tensor:
        processor = self._processor(size)
        return preprocess(read_image(file.path, processor.least_size), processor)


def _named(prediction: Prediction, file: File) -> Prediction:
    """Call an image what its owner calls it, also where the reader names the path."""
    prediction.source = file.name
    if prediction.error is not None:
        prediction.error = prediction.error.replace(str(file.path), file.name)
    return prediction
