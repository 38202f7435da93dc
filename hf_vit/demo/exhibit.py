"""A model as the demo page uses it: predictions, masks, attention, other resolutions. It knows nothing of the page.

The model is in memory once and runs in float32. It is used as it was loaded, since attention is read from its layers.
"""

import io
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..checkpoints.checkpoint import CLASSIFIER, DETECTOR, SEGMENTER
from ..checkpoints.models import load_for_figures
from ..checkpoints.opening import open_checkpoint
from ..data.images import normalize, preprocess
from ..data.masks import palette
from ..inspection import attention_maps, attention_rollout, legend_colors, lit, overlay
from ..inspection.gallery import Picture, Subject, at_one_size, name_of, pictures_of_positions
from ..inspection.layers import head_number
from ..model.image_reading_hf_vit import read_image, upright
from ..prediction.masks import drawn_objects
from ..prediction.predictor import BoxPredictor, MaskPredictor, Prediction, Predictor

Size = tuple[int, int]  # (height, width), pixels

FACTORS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)  # image sizes to compare, relative to the model's own
NO_CLASSIFIER = (
    "{} has no classifier, so there are no predictions to show: fine-tune it first, or look at it with hf-vit inspect."
)
SHARP = 480  # least length of the longer side of attention figures, pixels
LARGEST_OVERLAY = 960  # longer side of an overlay, pixels
MOST_LABELS = {"labels": 5, "classes of pixels": 12, "objects": None}  # of an answer
# By architecture: what answers are, and what makes them.
SHOWN: dict[str, tuple[str, type[Predictor]]] = {
    CLASSIFIER: ("labels", Predictor),
    SEGMENTER: ("classes of pixels", MaskPredictor),
    DETECTOR: ("objects", BoxPredictor),
}


class File(NamedTuple):
    """An uploaded file: its path here, and the name that its owner gave it."""

    path: Path
    name: str


class Answer(NamedTuple):
    """A prediction at an image size, and the seconds from the file to the prediction."""

    prediction: Prediction
    size: Size
    seconds: float


class Attention(NamedTuple):
    """An image lit by attention, uint8 `[H, W, 3]`, and the shares of attention where it is darkest and brightest.

    The image keeps its aspect ratio. `even` is the share of every patch if all had the same.
    """

    picture: np.ndarray
    low: float
    high: float
    even: float


def _of_layer(model: Any, pixel_values: Tensor, layer: int, head: int | None) -> np.ndarray:
    maps = attention_maps(model, pixel_values, layer)  # [B, A, h, w]
    return maps.mean(axis=1) if head is None else maps[:, head_number(model, head) - 1]


# From model, pixel values, layer and head to maps `[B, h, w]`.
VIEWS: dict[str, Callable[[Any, Tensor, int, int | None], np.ndarray]] = {
    "rollout": attention_rollout,
    "layer": _of_layer,
}


class Exhibit:
    """A classifier of images or of pixels, or a detector, to show.

    Args:
        source: A file, a folder or a name on the Hub, in any layout.

    Raises:
        ValueError: If the checkpoint has no classifier.
    """

    def __init__(self, source: str) -> None:
        checkpoint = open_checkpoint(source)
        if checkpoint.architecture not in SHOWN or not checkpoint.config.num_labels:
            raise ValueError(NO_CLASSIFIER.format(source))
        self.name = name_of(source)
        self.model, self.processor = load_for_figures(checkpoint)
        self.config, self.device = self.model.config, self.model.device
        self.answers, self._kind = SHOWN[checkpoint.architecture]
        self.has_overlay = self.answers != "labels"

    @property
    def colors(self) -> dict[str, str]:
        """CSS colours of the classes of pixels or objects by name; empty for a classifier of images."""
        if not self.has_overlay:
            return {}
        number = len(self.config.id2label)
        is_drawn = self.answers == "objects"
        colors = (palette(number) if is_drawn else 255 * legend_colors(number)).round().astype(int).tolist()
        return {self.config.id2label[index]: "rgb({} {} {})".format(*color) for index, color in enumerate(colors)}

    @property
    def own_size(self) -> Size:
        return self.config.image_shape

    @property
    def sizes(self) -> list[Size]:
        """Sizes to compare, smallest first: the multiples of the patch nearest to `FACTORS` times the model's own."""
        return sorted({self.own_size, *map(self.near, FACTORS)})

    def near(self, factor: float) -> Size:
        """Return the multiple of the patch that is nearest to the model's own size times a factor."""
        height, width = (
            max(1, round(factor * side / step)) * step
            for side, step in zip(self.own_size, self.config.patch_shape, strict=True)
        )
        return height, width

    def patches(self, size: Size) -> int:
        """Return the number of patches of an image of a size."""
        rows, columns = self.config.grid_of(*size)
        return rows * columns

    def predictor(self, size: Size, top_k: int | None = 5) -> Predictor:
        """Return a predictor that resizes images to a size."""
        return self._kind(
            model=self.model,
            processor=at_one_size(self.processor, size),
            labels=self.config.id2label,
            device=self.device,
            top_k=top_k,
            config=self.config,
        )

    def warm_up(self) -> None:
        """Classify a generated photograph, so that the first user does not wait longer than the others."""
        photo = io.BytesIO()
        Image.new("RGB", (640, 480), "gray").save(photo, "JPEG")
        list(self.predictor(self.own_size)([photo.getvalue()]))

    def answer(self, file: File, size: Size | None = None) -> Answer:
        """Classify an image at a size, (height, width) in pixels; by default the model's own."""
        size = size or self.own_size
        began = time.perf_counter()
        (prediction,) = self.predictor(size, MOST_LABELS[self.answers])([file.path])
        return Answer(_named(prediction, file), size, time.perf_counter() - began)

    def label(self, files: Sequence[File]) -> Iterator[Prediction]:
        """Yield the prediction for each file in order: the most likely label, or those above their thresholds.

        The prediction of a broken file has an `error`.
        """
        is_several = self.config.problem_type == "multi_label_classification" or self.answers == "objects"
        top_k = None if is_several else 1
        predictions = self.predictor(self.own_size, top_k)([file.path for file in files])
        for prediction, file in zip(predictions, files, strict=True):
            yield _named(prediction, file)

    def overlay(self, file: File) -> np.ndarray:
        """Return an image with the colours of the classes of its pixels, or its objects, over it, uint8 `[H, W, 3]`.

        Raises:
            ValueError: If the image cannot be read.
        """
        prediction = self.answer(file).prediction
        if prediction.error is not None:
            raise ValueError(prediction.error)
        if prediction.mask is None:
            return np.asarray(drawn_objects(prediction, read_image(file.path), self.config.id2label))
        scale = min(1, LARGEST_OVERLAY / max(prediction.mask.shape))
        height, width = (max(1, round(scale * side)) for side in prediction.mask.shape)
        pixels = self._pixels(read_image(file.path), (height, width))
        mask = Image.fromarray(prediction.mask).resize((width, height), Image.Resampling.NEAREST)
        return overlay(pixels, torch.from_numpy(np.array(mask)), len(self.config.id2label))

    def attention(self, file: File, view: str = "rollout", layer: int = -1, head: int | None = None) -> Attention:
        """Light an image by the attention that its patches receive.

        Args:
            view: A key of `VIEWS`: through all layers up to `layer`, or in that layer alone.
            layer: Number from 1, or negative from the end.
            head: Number from 1; by default the mean over all heads.

        Raises:
            ValueError: If the image cannot be read, or there is no such layer or head.
        """
        times = -(-SHARP // max(self.own_size))
        large = (times * self.own_size[0], times * self.own_size[1])
        image = read_image(file.path, at_one_size(self.processor, large).least_size)
        pixels = self._pixels(image, self.own_size)[None].to(self.device)
        (values,) = VIEWS[view](self.model, normalize(pixels, self.processor), layer, head)
        shown = self._pixels(image, large)
        picture, (low, high) = lit(shown.byte().cpu().numpy(), values)
        return Attention(self._unsquashed(picture, image), low, high, 1 / values.size)

    def positions(self) -> tuple[Picture | None, str]:
        """Return the figure of the model's positions and how to read it, or `None` and why there is no figure."""
        subject = Subject(self.model, self.name, self.own_size, self.config.num_hidden_layers)
        picture = next(pictures_of_positions(subject), None)
        return picture, " ".join(subject.notes) if picture is None else picture.reading

    def _pixels(self, image: Any, size: Size) -> Tensor:
        return preprocess(image, at_one_size(self.processor, size))

    def _unsquashed(self, picture: np.ndarray, image: Any) -> np.ndarray:
        """Return a picture at the aspect ratio of its image, unless the processor crops instead of squashing."""
        if self.processor.do_center_crop or self.processor.crop_pct is not None:
            return picture
        width, height = (image.shape[-1], image.shape[-2]) if isinstance(image, Tensor) else upright(image).size
        scale = max(picture.shape[:2]) / max(width, height)
        size = max(1, round(scale * width)), max(1, round(scale * height))
        return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))


def _named(prediction: Prediction, file: File) -> Prediction:
    """Replace the path in a prediction and in its error by the owner's name of the file."""
    prediction.source = file.name
    if prediction.error is not None:
        prediction.error = prediction.error.replace(str(file.path), file.name)
    return prediction
