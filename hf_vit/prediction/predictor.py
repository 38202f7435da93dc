"""From images to labels and features, using all CPU cores or the GPU.

On a CPU, each core decodes and classifies small batches alone, with one thread: cores that share an operation wait for
each other at its end, and a small batch fits the core's cache. On a GPU, CPU cores decode, images are copied as 8-bit
pixels, and the GPU normalizes and classifies them.
"""

import math
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..checkpoints.models import load
from ..data.images import normalize, preprocess, read_stored
from ..inference.optimize import optimize_for_inference
from ..inference.threads import default_batch_size, on_every_core
from ..model.abstention_hf_vit import UNKNOWN, certainties
from ..model.detection_boxes_hf_vit import MOST_OBJECTS, most_likely_objects
from ..model.image_geometry_hf_vit import corners_of, resize_logits, size_of
from ..model.image_reading_hf_vit import LeastSize, read_image, upright
from ..model.losses_hf_vit import activation_of
from ..system.texts import shortened
from ..system.transfers import HostCopies, has_own_memory

if TYPE_CHECKING:
    from ..model.image_processing_hf_vit import HFViTImageProcessor

Source = str | os.PathLike | bytes | Image.Image | dict[str, Any]
Tag = TypeVar("Tag")

MOST_VALUES = 2**26  # logits of pixels that are in memory at a time


@dataclass
class Prediction:
    """What a model predicts for one image.

    Attributes:
        source: The given image: a path, bytes, a PIL image, or one as `datasets` stores it.
        labels: Names of the most likely classes, the most likely first; with several labels per image, of those above
            their thresholds, which may be none; of a regression, of all targets. None if the image is broken.
        scores: Probabilities of these classes, or values of these targets.
        are_values: Whether `scores` are values of targets.
        error: Why the image could not be read, or `None`.
        features: Input of the classifier, float32 `[pooled_width]`, if requested; `None` if the image is broken.
        mask: Class of every pixel of the upright image, uint8 `[H, W]`, if the model is one for segmentation. Labels
            are then classes in the mask, the largest first, and scores their shares of the pixels.
        boxes: (left, top, right, bottom) of every object in pixels of the upright image, float32 `[n, 4]`, if the
            model is one for detection. Labels and scores are then those of the objects, the highest score first.
        size: (height, width) of the upright image, if there is a mask or there are boxes.
        heads: Answers of a multi-task model by head, as its pipeline gives them; there are no labels then.
        is_unknown: Whether the model abstains, if it has a threshold for this; `labels` are the most likely ones.
        label_set: Names of the labels in the label set, the most likely first, if the model has label sets.
    """

    source: Any
    labels: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    error: str | None = None
    features: np.ndarray | None = None
    are_values: bool = False
    mask: np.ndarray | None = None
    boxes: np.ndarray | None = None
    size: tuple[int, int] | None = None
    heads: dict[str, Any] = field(default_factory=dict)
    is_unknown: bool | None = None
    label_set: list[str] | None = None

    @property
    def answers(self) -> list[str]:
        """Labels with their scores as text, such as `"cat 93.1%"`, `"age 41.5"` for a target, `"3 cat"` for objects.

        An answer that abstains begins with `"unknown"`.
        """
        if self.heads:
            return [f"{name} ({in_words(answer)})" for name, answer in self.heads.items()]
        if self.boxes is not None:
            return [f"{number} {label}" for label, number in Counter(self.labels).most_common()] or ["no objects"]
        form = "{} {:.4g}" if self.are_values else "{} {:.1%}"
        answers = [form.format(*pair) for pair in zip(self.labels, self.scores, strict=True)]
        return [UNKNOWN, *answers] if self.is_unknown else answers

    @property
    def line(self) -> str:
        """The answers, or the error, in one line of text, with the label set if there is one."""
        if self.error is not None:
            return self.error
        answers = ", ".join(self.answers)
        return answers if self.label_set is None else f"{answers}; label set: {shortened(self.label_set, 5)}"


def in_words(answer: Any) -> str:
    """Return the answer of one head of a multi-task model as text."""
    if isinstance(answer, dict) and "map" in answer:  # of a head for anomalies
        verdict = {True: ", an anomaly", False: ", normal"}.get(answer.get("is_anomaly"), "")  # type: ignore[arg-type]
        return f"score {answer['score']:.3g}{verdict}"
    if isinstance(answer, dict):
        return ", ".join(f"{name} {value:.4g}" for name, value in answer.items())
    if any("box" in each for each in answer):
        counted = Counter(each["label"] for each in answer).most_common()
        return ", ".join(f"{number} {label}" for label, number in counted)
    found = [
        (each["score"] if "score" in each else np.asarray(each["mask"]).mean() / 255, each["label"]) for each in answer
    ]
    if any("mask" in each for each in answer):
        found.sort(key=lambda pair: -pair[0])
    return ", ".join(f"{label} {score:.1%}" for score, label in found) or "none"


# What `Predictor.read` returns, and `Predictor.start` computes.
ReadImage = tuple[Prediction, Tensor | None]

# The most likely classes of images, their scores, for each: from logits `[B, num_labels]`, float32.
Answers = list[tuple[list[int], list[float]]]


def most_likely(probabilities: Tensor, number: int) -> Answers:
    """Return the classes with the highest probabilities, the highest first."""
    scores, classes = probabilities.topk(min(number, probabilities.shape[-1]))
    return list(zip(classes.tolist(), scores.tolist(), strict=True))


class ClassAnswers:
    """Answers of a classifier with one label per image: the `top_k` most likely classes, five if not given."""

    are_values = False

    def __init__(self, config: Any, top_k: int | None) -> None:
        self.top_k = 5 if top_k is None else top_k

    def __call__(self, logits: Tensor) -> Answers:
        return most_likely(logits.softmax(dim=-1), self.top_k)


class LabelAnswers:
    """Answers of a classifier with several labels per image.

    These are the labels above their thresholds, 0.5 if the config has none; or the `top_k` most likely ones, whatever
    their thresholds, if their number is given. A model with one output and no `problem_type` always answers.
    """

    are_values = False

    def __init__(self, config: Any, top_k: int | None) -> None:
        self.top_k = 1 if top_k is None and config.problem_type is None else top_k
        self.thresholds = torch.tensor(config.thresholds or [0.5] * config.num_labels)

    def __call__(self, logits: Tensor) -> Answers:
        probabilities = logits.sigmoid()
        if self.top_k is not None:
            return most_likely(probabilities, self.top_k)
        numbers = (probabilities > self.thresholds).sum(dim=-1).tolist()
        # Those above their thresholds come first in the order, since others count as less than any probability.
        kept = probabilities.where(probabilities > self.thresholds, -1.0)
        return [
            (classes[:number], scores[:number])
            for number, (classes, scores) in zip(numbers, most_likely(kept, kept.shape[-1]), strict=True)
        ]


class TargetAnswers:
    """Answers of a regression: all targets in their order."""

    are_values = True

    def __init__(self, config: Any, top_k: int | None) -> None:
        pass

    def __call__(self, logits: Tensor) -> Answers:
        return [(list(range(len(values))), values) for values in logits.tolist()]


ANSWERS: dict[str, Callable[[Any, int | None], Any]] = {
    "softmax": ClassAnswers,
    "sigmoid": LabelAnswers,
    "none": TargetAnswers,
}


def answers_of(config: Any, top_k: int | None) -> Any:
    """Return the function that turns logits into answers, for a model with this config."""
    return ANSWERS["softmax" if config is None else activation_of(config)](config, top_k)


class Predictor:
    """Classify images, or extract their features, in order, while they are read.

    Args:
        model: Maps `pixel_values` to outputs; made by `optimize_for_inference` or `in_runtime`.
        processor: Image processor of the model.
        labels: Label names by class index; empty for a model without a classifier.
        device: Device of the model.
        batch_size: Batch size per worker of a CPU, or of the GPU; chosen for the hardware if not given.
        workers: Number of threads; one per CPU core if not given.
        top_k: Number of labels per image; five if not given, or with several labels per image, those above their
            thresholds. A regression always has all targets.
        has_features: Whether predictions include the pooled features that the classifier reads.
        is_compiled: Whether `model` is compiled for one batch size, so that smaller batches are padded.
        config: Config of the model, which states what its labels are; one label per image if not given.
    """

    outputs: tuple[str, ...] = ("logits",)  # of the model, that answers are made from
    runtime = "torch"  # that computes the model

    def __init__(
        self,
        model: Callable[..., Any],
        processor: "HFViTImageProcessor",
        labels: dict[int, str],
        device: torch.device,
        batch_size: int | None = None,
        workers: int | None = None,
        top_k: int | None = None,
        has_features: bool = False,
        is_compiled: bool = False,
        config: Any = None,
    ) -> None:
        self.model, self.processor, self.labels, self.device = model, processor, labels, device
        self.batch_size = batch_size or default_batch_size(device.type)
        self.workers = workers
        self.answers, self.config = answers_of(config, top_k), config
        self.has_features, self.is_compiled = has_features, is_compiled

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike,
        precision: str = "auto",
        image_size: tuple[int, int] | None = None,
        head: str | None = None,
        **options: Any,
    ) -> Self:
        """Load a model from a file, a folder or the Hub, in any supported layout.

        Args:
            image_size: (height, width) in pixels, if it is not the model's.
            head: Head of a multi-task model; without it, predictions have the answers of all heads.
            precision, options: As for `from_model`, which also lists the errors.
        """
        model, processor = load(str(source), image_size, head=head)
        return cls.from_model(model, processor, precision, name=str(source), **options)

    @classmethod
    def from_model(
        cls,
        model: Any,
        processor: "HFViTImageProcessor",
        precision: str = "auto",
        device: str | torch.device | None = None,
        compile: bool = False,
        name: str = "The model",
        runtime: str = "torch",
        threads: int = 1,
        **options: Any,
    ) -> Self:
        """Prepare a loaded model.

        Args:
            model, processor: As `hf_vit.inference.load` returns them.
            precision, compile: As for `optimize_for_inference`.
            device: Device to run on; an accelerator if there is one.
            runtime: What computes the model: `"torch"`; on a CPU also `"onnxruntime"`, `"openvino"`, or `"auto"` for
                the fastest that is installed.
            threads: Number of threads of each forward in a runtime that is not torch.
            name: Name of the model in errors.
            options: Options of the class.

        Raises:
            ValueError: If the model has no classifier and `has_features` is not set.
        """
        special = next((kind for head, kind in OF_HEADS.items() if hasattr(model, head)), None)
        if special is not None and not issubclass(cls, special):
            return special.from_model(  # type: ignore[return-value]
                model, processor, precision, device, compile, name, runtime, threads, **options
            )
        is_classifier = any(getattr(model, head, None) is not None for head in ("classifier", *OF_HEADS))
        is_classifier = is_classifier and bool(model.config.num_labels)
        if not is_classifier and not options.get("has_features"):
            raise ValueError(
                f"{name} has no classifier: train one first, or extract features with --features or AutoModel."
            )
        chosen = torch.device(device or (torch.accelerator.current_accelerator(True) or "cpu"))
        if runtime == "torch":
            computed, used = optimize_for_inference(model.to(chosen), precision, compile), runtime
        else:
            from ..graphs.runtimes import in_runtime  # with the exporters, which take time to import

            computed, used = in_runtime(model.to(chosen), processor, runtime, precision, chosen.type, compile, threads)
        labels = model.config.id2label if is_classifier else {}
        predictor = cls(computed, processor, labels, chosen, is_compiled=compile, config=model.config, **options)
        predictor.runtime = used
        return predictor

    def __call__(self, images: Iterable[Source]) -> Iterator[Prediction]:
        """Yield a prediction for every image, in order; a broken image has an `error`.

        `images` are paths, bytes of files, PIL images, or images as `datasets` stores them, `{"bytes", "path"}`; they
        are read no further ahead than the workers need.
        """
        rest = iter(images)
        batches = iter(lambda: list(islice(rest, self.batch_size)), [])
        for _, predictions in self.in_batches((None, batch) for batch in batches):
            yield from predictions

    def in_batches(self, batches: Iterable[tuple[Tag, Sequence[Source]]]) -> Iterator[tuple[Tag, list[Prediction]]]:
        """Yield the predictions of every batch, in order, with the tag of the batch.

        Predictions depend on the images of the batch alone, to the last bit, not on other batches or on the worker.

        Args:
            batches: A tag and up to `batch_size` images each.
        """
        if self.device.type == "cpu":
            yield from on_every_core(
                lambda item: (item[0], self._predict(*self._read(item[1]))), batches, self.workers
            )
            return
        # In one thread: CUDA graphs belong to the thread that captured them. The results of a batch are read when the
        # device has the next one to compute.
        waiting: deque[tuple[Tag, Callable[[], list[Prediction]]]] = deque()
        for tag, read in on_every_core(lambda item: (item[0], self._read(item[1])), batches, self.workers):
            waiting.append((tag, self._start(*read)))
            if len(waiting) > 1:
                first, finish = waiting.popleft()
                yield first, finish()
        for first, finish in waiting:
            yield first, finish()

    def read(self, source: Source) -> ReadImage:
        """Return a prediction without an answer, and the pixels of an image, `[C, H, W]`; `None` if it is broken."""
        prediction = Prediction(source)
        try:
            return prediction, self._pixels(prediction)
        except (ValueError, OSError) as error:
            prediction.error = str(error)
            return prediction, None

    def start(self, images: Sequence[ReadImage]) -> Callable[[], list[Prediction]]:
        """Start to compute one batch of what `read` returned, of at most `batch_size` images.

        Returns:
            A function that waits for the results and returns the predictions.
        """
        return self._start(*self._batches(images))

    def _read(self, sources: Sequence[Source]) -> tuple[list[Prediction], list[tuple[list[int], Tensor]]]:
        return self._batches([self.read(source) for source in sources])

    def _batches(self, images: Sequence[ReadImage]) -> tuple[list[Prediction], list[tuple[list[int], Tensor]]]:
        """Return the predictions, and the readable images as batches, uint8 `[B, C, H, W]`, with their indices."""
        by_shape: dict[torch.Size, dict[int, Tensor]] = {}  # one shape, unless the processor keeps the aspect ratio
        for index, (_, pixels) in enumerate(images):
            if pixels is not None:
                by_shape.setdefault(pixels.shape, {})[index] = pixels
        batches = [(list(of_shape), self._batch(list(of_shape.values()))) for of_shape in by_shape.values()]
        return [prediction for prediction, _ in images], batches

    def _batch(self, images: list[Tensor]) -> Tensor:
        batch = torch.stack(images)
        if self.is_compiled:  # for one batch size
            batch = torch.cat([batch, batch[:1].expand(self.batch_size - len(batch), -1, -1, -1)])
        return batch.pin_memory() if has_own_memory(self.device) else batch

    def _pixels(self, prediction: Prediction) -> Tensor:
        return preprocess(read_source(prediction.source, self.processor.least_size), self.processor)

    def _predict(self, predictions: list[Prediction], batches: list[tuple[list[int], Tensor]]) -> list[Prediction]:
        return self._start(predictions, batches)()

    @torch.inference_mode()
    def _start(
        self, predictions: list[Prediction], batches: list[tuple[list[int], Tensor]]
    ) -> Callable[[], list[Prediction]]:
        """Start to compute batches; return a function that waits for the results and returns the predictions."""
        wanted = list(self.outputs) * bool(self.labels) + ["pooler_output"] * self.has_features
        results: list[Tensor] = []
        for indices, batch in batches:
            pixels = batch.to(self.device, non_blocking=has_own_memory(self.device))
            outputs = self._outputs(normalize(pixels, self.processor))
            results += [getattr(outputs, name)[: len(indices)].float() for name in wanted]
        copies = HostCopies(results, self.device)

        def finish() -> list[Prediction]:
            tensors = iter(copies.wait())
            for indices, _ in batches:
                self._fill([predictions[index] for index in indices], **{name: next(tensors) for name in wanted})
            return predictions

        return finish

    def _outputs(self, pixel_values: Tensor) -> Any:
        return self.model(pixel_values)

    def _fill(
        self, predictions: list[Prediction], logits: Tensor | None = None, pooler_output: Tensor | None = None
    ) -> None:
        if logits is not None:
            for prediction, (classes, scores) in zip(predictions, self.answers(logits), strict=True):
                prediction.labels, prediction.scores = [self.labels[index] for index in classes], scores
                prediction.are_values = self.answers.are_values
            for prediction, certainty in zip(predictions, certainties(logits, self.config), strict=True):
                prediction.is_unknown = certainty.is_unknown
                if certainty.label_set is not None:
                    prediction.label_set = [self.labels[index] for index in certainty.label_set]
        if pooler_output is not None:
            # Contiguous: a view would keep the tokens of all images in memory.
            for prediction, row in zip(predictions, pooler_output.contiguous().numpy(), strict=True):
                prediction.features = row


def read_source(source: Source, least_size: LeastSize) -> Image.Image | Tensor:
    """Return a given PIL image as it is, and any other source as `read_image` reads it."""
    if isinstance(source, Image.Image):
        return source
    return read_stored(source, least_size) if isinstance(source, dict) else read_image(source, least_size)


class DensePredictor(Predictor):
    """Predict masks or objects in upright images, whose (height, width) are stored when they are read."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if self.has_features:
            raise ValueError(
                "Segmentation and detection models have no pooled features: use AutoModel for patch features."
            )
        self.top_k = options.get("top_k")
        if not self.processor.do_resize:  # images of any size, one of which fills many windows
            self.batch_size = options.get("batch_size") or 1

    def _pixels(self, prediction: Prediction) -> Tensor:
        sizes: list[tuple[int, int]] = []  # of a JPEG, which may be decoded at another size

        def least_size(size: tuple[int, int]) -> tuple[int, int]:
            sizes.append(size)
            return self.processor.least_size(size)

        image = read_source(prediction.source, least_size)
        sizes.append(size_of(upright(image) if isinstance(image, Image.Image) else image))
        prediction.size = sizes[0]
        return preprocess(image, self.processor)


class MaskPredictor(DensePredictor):
    """Predict the classes of pixels: `Prediction.mask` has the size of the upright image.

    Arguments are those of `Predictor`; `top_k` limits the labels only.
    """

    def _fill(self, predictions: list[Prediction], logits: Tensor | None = None, pooler_output: Any = None) -> None:
        assert logits is not None
        for prediction, of_image in zip(predictions, logits, strict=True):
            assert prediction.size is not None
            prediction.mask = classes_of_pixels(of_image, prediction.size).numpy()
            shares = np.bincount(prediction.mask.ravel(), minlength=len(self.labels)) / prediction.mask.size
            order = [index for index in np.argsort(-shares, kind="stable").tolist() if shares[index]][
                : self.top_k or 5
            ]
            prediction.labels = [self.labels[index] for index in order]
            prediction.scores = [float(shares[index]) for index in order]


def classes_of_pixels(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the most likely class of every pixel, uint8 `[H, W]`, for logits `[num_labels, h, w]`.

    A few classes are resized at a time: 150 classes of 12 million pixels would take 7 GB.
    """
    step = max(1, MOST_VALUES // math.prod(size))
    parts = (
        (first, resize_logits(logits[None, first : first + step], size)[0]) for first in range(0, len(logits), step)
    )
    highest, classes = torch.full(size, -math.inf), torch.zeros(size, dtype=torch.uint8)
    for first, part in parts:
        values, indices = part.max(dim=0)
        classes = torch.where(values > highest, (first + indices).byte(), classes)
        highest = torch.maximum(values, highest)
    return classes


class BoxPredictor(DensePredictor):
    """Detect objects: `Prediction.boxes` are in pixels of the upright image.

    Arguments are those of `Predictor`. Objects are those above the thresholds of their classes in the config, 0.5 if
    it has none; with `top_k`, as many as this with the highest scores, whatever their thresholds.
    """

    outputs = ("objects",)

    def __init__(self, *arguments: Any, config: Any = None, **options: Any) -> None:
        super().__init__(*arguments, config=config, **options)
        self.thresholds = torch.tensor((config and config.thresholds) or [0.5] * len(self.labels))

    def _outputs(self, pixel_values: Tensor) -> Any:
        outputs = self.model(pixel_values)
        return SimpleNamespace(
            objects=most_likely_objects(outputs.logits, outputs.pred_boxes, self.top_k or MOST_OBJECTS)
        )

    def _fill(self, predictions: list[Prediction], objects: Tensor | None = None, pooler_output: Any = None) -> None:
        assert objects is not None
        for prediction, of_image in zip(predictions, objects, strict=True):
            assert prediction.size is not None
            height, width = prediction.size
            scores, classes, boxes = of_image[:, 0], of_image[:, 1].long(), corners_of(of_image[:, 2:]).clamp(0, 1)
            is_kept = scores > (self.thresholds[classes] if self.top_k is None else 0)
            prediction.boxes = (boxes[is_kept] * torch.tensor([width, height, width, height])).numpy()
            prediction.labels = [self.labels[index] for index in classes[is_kept].tolist()]
            prediction.scores = scores[is_kept].tolist()


class MultiTaskPredictor(DensePredictor):
    """Predict the answers of all heads of a multi-task model: `Prediction.heads`."""

    @torch.inference_mode()
    def _start(
        self, predictions: list[Prediction], batches: list[tuple[list[int], Tensor]]
    ) -> Callable[[], list[Prediction]]:
        model: Any = self.model
        for indices, batch in batches:
            outputs = model(normalize(batch.to(self.device), self.processor))
            for row, index in enumerate(indices):
                prediction = predictions[index]
                assert prediction.size is not None
                for name, head in model.heads.items():
                    of_image = {key: tensor[row : row + 1].cpu() for key, tensor in outputs[name].items()}
                    prediction.heads[name] = head.answer(of_image, self.processor, prediction.size, self.top_k)
        return lambda: predictions


# By the name of the head of a model.
OF_HEADS: dict[str, type[DensePredictor]] = {
    "decode_head": MaskPredictor,
    "detection_head": BoxPredictor,
    "heads": MultiTaskPredictor,
}
