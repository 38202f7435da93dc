"""From files to labels, as fast as the machine reads and computes: what `hf-vit predict` does.

On a CPU every core works alone, from the file to the answer, on a few images at a time with one thread: cores that
share an operation wait for each other at its end, and what a few images need stays in the core's cache. On a GPU the
cores read, images travel as 8-bit pixels, and the GPU normalises and answers.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor

from .inference import BATCH_OF_CPU, BATCH_OF_GPU, load, on_every_core, optimize_for_inference
from .loading import as_seen, normalize
from .model.image_processing_hf_vit import HFViTImageProcessor
from .model.image_reading_hf_vit import read_image

Source = str | os.PathLike | bytes | Image.Image


@dataclass
class Prediction:
    """What a classifier says of one image.

    Attributes:
        source: What was given: a path, bytes or an image.
        labels: Names of the likeliest classes, the likeliest first; none if the image is broken.
        scores: Their probabilities.
        error: Why the image could not be read, or `None`.
    """

    source: Any
    labels: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    error: str | None = None


class Predictor:
    """Classify images, in their order, while they come.

    Args:
        model: Answers for `pixel_values`, as `optimize_for_inference` made it.
        processor: Of its images.
        labels: Names of its classes.
        batch_size: Images at a time, for each worker of a CPU; chosen by the hardware if not given.
        workers: Threads; one for each core if not given.
        top_k: How many labels to give.
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
        is_compiled: bool = False,
    ) -> None:
        self.model, self.processor, self.labels, self.device = model, processor, labels, device
        self.batch_size = batch_size or (BATCH_OF_CPU if device.type == "cpu" else BATCH_OF_GPU)
        self.workers = workers
        self.top_k = min(top_k, len(labels))
        self.is_compiled = is_compiled

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
        """Load a classifier from a file, a folder or a name on the Hub, in any layout.

        Args:
            precision, compile: As for `optimize_for_inference`.
            image_size: (height, width) in pixels, where it is not the model's own.
            device: Where it answers; an accelerator if there is one.
            options: Those of the class.

        Raises:
            ValueError: If the model is no classifier.
        """
        model, processor = load(str(source), image_size)
        config = model.config
        if getattr(model, "classifier", None) is None or not config.num_labels:
            raise ValueError(f"{source} has no classifier: train one on it, or take its features from AutoModel.")
        chosen = torch.device(device or (torch.accelerator.current_accelerator(True) or "cpu"))
        optimized = optimize_for_inference(model.to(chosen), precision, compile)
        return cls(optimized, processor, config.id2label, chosen, is_compiled=compile, **options)

    def __call__(self, images: Iterable[Source]) -> Iterator[Prediction]:
        """Yield a prediction for every image, in their order; a broken one has an `error` and stops nothing.

        `images` are paths, bytes of files, or PIL images; they are read no further ahead than the workers need.
        """
        rest = iter(images)
        batches = iter(lambda: list(islice(rest, self.batch_size)), [])
        if self.device.type == "cpu":
            answers = on_every_core(lambda batch: self._answer(*self._read(batch)), batches, self.workers)
        else:  # asked by one thread: CUDA graphs belong to the thread that made them
            answers = (self._answer(*read) for read in on_every_core(self._read, batches, self.workers))
        for of_batch in answers:
            yield from of_batch

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
            logits = self.model(normalize(batch.to(self.device), self.processor)).logits[: len(numbers)]
            scores, classes = logits.float().softmax(dim=-1).topk(self.top_k)
            for number, best, which in zip(numbers, scores.tolist(), classes.tolist(), strict=True):
                predictions[number].labels = [self.labels[index] for index in which]
                predictions[number].scores = best
        return predictions


def files_of(sources: Iterable[str]) -> Iterator[Path]:
    """Yield the files that paths and folders name; of folders all files whose name is that of an image.

    Raises:
        ValueError: If there is no such file or folder.
    """
    extensions = set(Image.registered_extensions())
    for source in sources:
        path = Path(source)
        if path.is_dir():
            yield from sorted(file for file in path.rglob("*") if file.suffix.lower() in extensions and file.is_file())
        elif path.is_file():
            yield path
        else:
            raise ValueError(f"There is no file or folder {source}.")
