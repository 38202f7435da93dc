"""From images to labels and features, as fast as the machine reads and computes: what `hf-vit predict` does with each.

On a CPU every core works alone, from the file to the answer, on a few images at a time with one thread: cores that
share an operation wait for each other at its end, and what a few images need stays in the core's cache. On a GPU the
cores read, images travel as 8-bit pixels, and the GPU normalises and answers.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Self, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..checkpoints.models import load
from ..data.images import as_seen, content_of, normalize
from ..inference.optimize import optimize_for_inference
from ..inference.threads import default_batch_size, on_every_core
from ..model.image_processing_hf_vit import HFViTImageProcessor
from ..model.image_reading_hf_vit import read_image
from ..system.texts import without_tokens

Source = str | os.PathLike | bytes | Image.Image | dict[str, Any]
Tag = TypeVar("Tag")


@dataclass
class Prediction:
    """What a model says of one image.

    Attributes:
        source: What was given: a path, bytes, an image, or one as `datasets` stores it.
        labels: Names of the likeliest classes, the likeliest first; none if the image is broken.
        scores: Their probabilities.
        error: Why the image could not be read, or `None`.
        features: What the classifier reads, float32 `[pooled_width]`, where it is asked for and the image is whole.
    """

    source: Any
    labels: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    error: str | None = None
    features: np.ndarray | None = None


class Predictor:
    """Classify images, or give their features, in their order, while they come.

    Args:
        model: Answers for `pixel_values`, as `optimize_for_inference` made it.
        processor: Of its images.
        labels: Names of its classes; none of a model without classifier.
        batch_size: Images at a time, for each worker of a CPU; chosen by the hardware if not given.
        workers: Threads; one for each core if not given.
        top_k: How many labels to give.
        has_features: Whether predictions have the pooled features that the classifier reads.
        is_compiled: Whether `model` is compiled for one size of batches, so that all must have it.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        processor: HFViTImageProcessor,
        labels: dict[int, str],
        device: torch.device,
        batch_size: int | None = None,
        workers: int | None = None,
        top_k: int = 5,
        has_features: bool = False,
        is_compiled: bool = False,
    ) -> None:
        self.model, self.processor, self.labels, self.device = model, processor, labels, device
        self.batch_size = batch_size or default_batch_size(device.type)
        self.workers = workers
        self.top_k = min(top_k, len(labels))
        self.is_compiled = is_compiled
        self.readings = [self._label] * bool(labels) + [self._keep_features] * has_features

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike,
        precision: str = "auto",
        image_size: tuple[int, int] | None = None,
        device: str | torch.device | None = None,
        compile: bool = False,
        **options: Any,
    ) -> Self:
        """Load a model from a file, a folder or a name on the Hub, in any layout.

        Args:
            image_size: (height, width) in pixels, where it is not the model's own.
            precision, device, compile, options: As for `from_model`.

        Raises:
            ValueError: If the model is no classifier and `has_features` is not set, among others.
        """
        model, processor = load(str(source), image_size)
        return cls.from_model(model, processor, precision, device, compile, name=str(source), **options)

    @classmethod
    def from_model(
        cls,
        model: Any,
        processor: HFViTImageProcessor,
        precision: str = "auto",
        device: str | torch.device | None = None,
        compile: bool = False,
        name: str = "The model",
        **options: Any,
    ) -> Self:
        """Make a model that is loaded ready to answer.

        Args:
            model, processor: As `hf_vit.inference.load` gives them.
            precision, compile: As for `optimize_for_inference`.
            device: Where it answers; an accelerator if there is one.
            name: What errors call the model.
            options: Those of the class.

        Raises:
            ValueError: If the model is no classifier and `has_features` is not set.
        """
        is_classifier = getattr(model, "classifier", None) is not None and bool(model.config.num_labels)
        if not is_classifier and not options.get("has_features"):
            raise ValueError(
                f"{name} has no classifier: train one on it, or take its features, by --features or AutoModel."
            )
        chosen = torch.device(device or (torch.accelerator.current_accelerator(True) or "cpu"))
        optimized = optimize_for_inference(model.to(chosen), precision, compile)
        labels = model.config.id2label if is_classifier else {}
        return cls(optimized, processor, labels, chosen, is_compiled=compile, **options)

    def __call__(self, images: Iterable[Source]) -> Iterator[Prediction]:
        """Yield a prediction for every image, in their order; a broken one has an `error` and stops nothing.

        `images` are paths, bytes of files, PIL images, or images as `datasets` stores them, `{"bytes", "path"}`; they
        are read no further ahead than the workers need.
        """
        rest = iter(images)
        batches = iter(lambda: list(islice(rest, self.batch_size)), [])
        for _, of_batch in self.in_batches((None, batch) for batch in batches):
            yield from of_batch

    def in_batches(self, batches: Iterable[tuple[Tag, list[Source]]]) -> Iterator[tuple[Tag, list[Prediction]]]:
        """Yield the predictions of whole batches, in their order, each with the tag that it came with.

        The last bits of an answer depend on its batch alone: not on the batches beside it, nor on who works on them.

        Args:
            batches: Of up to `batch_size` images.
        """
        if self.device.type == "cpu":
            yield from on_every_core(lambda item: (item[0], self._answer(*self._read(item[1]))), batches, self.workers)
        else:  # asked by one thread: CUDA graphs belong to the thread that made them
            for tag, read in on_every_core(lambda item: (item[0], self._read(item[1])), batches, self.workers):
                yield tag, self._answer(*read)

    def _read(self, sources: list[Source]) -> tuple[list[Prediction], dict[int, Tensor]]:
        """Return blank predictions, and by their numbers the pixels of those that could be read, uint8 `[C, H, W]`."""
        predictions = [Prediction(source) for source in sources]
        pixels = {}
        for number, prediction in enumerate(predictions):
            try:
                pixels[number] = self._pixels(prediction.source)
            except (ValueError, OSError) as error:
                prediction.error = str(error)
        return predictions, pixels

    def _pixels(self, source: Source) -> Tensor:
        if isinstance(source, dict):
            source = _content_of(source)
        image = source if isinstance(source, Image.Image) else read_image(source, self.processor.least_size)
        return as_seen(image, self.processor)

    @torch.inference_mode()
    def _answer(self, predictions: list[Prediction], pixels: dict[int, Tensor]) -> list[Prediction]:
        of_shape: dict[torch.Size, list[int]] = {}  # one, unless the processor keeps the aspect of images
        for number, of_image in pixels.items():
            of_shape.setdefault(of_image.shape, []).append(number)
        for numbers in of_shape.values():
            batch = torch.stack([pixels[number] for number in numbers])
            if self.is_compiled:  # for one size of batches
                batch = torch.cat([batch, batch[:1].expand(self.batch_size - len(batch), -1, -1, -1)])
            outputs = self.model(normalize(batch.to(self.device), self.processor))
            for read in self.readings:
                read(outputs, [predictions[number] for number in numbers])
        return predictions

    def _label(self, outputs: Any, predictions: list[Prediction]) -> None:
        scores, classes = outputs.logits[: len(predictions)].float().softmax(dim=-1).topk(self.top_k)
        for prediction, best, which in zip(predictions, scores.tolist(), classes.tolist(), strict=True):
            prediction.labels = [self.labels[index] for index in which]
            prediction.scores = best

    def _keep_features(self, outputs: Any, predictions: list[Prediction]) -> None:
        # Contiguous: what is kept must not be a view of all tokens.
        features = outputs.pooler_output[: len(predictions)].float().cpu().contiguous().numpy()
        for prediction, of_image in zip(predictions, features, strict=True):
            prediction.features = of_image


def _content_of(stored: dict[str, Any]) -> str | bytes:
    """Return what `read_image` takes of a stored image.

    Raises:
        ValueError: If there is none, or it cannot be fetched.
    """
    if stored["bytes"] is None and stored["path"] is None:
        raise ValueError("The table has no image here.")
    try:
        return content_of(stored)
    except Exception as error:  # networks raise almost anything
        raise ValueError(without_tokens(f"{stored['path']} could not be fetched: {error}")) from error
