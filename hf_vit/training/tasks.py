"""Training objectives: labels, numbers, masks, boxes, masked patches, teachers, views. All share one loop."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoints.models import (
    fields_of_labels,
    load_classifier,
    load_detector,
    load_for_masked_patches,
    load_segmenter,
)
from ..checkpoints.opening import open_checkpoint
from ..data.augmentation import BatchMixer, one_hot
from ..data.classes import DETECTION, SEGMENTATION
from ..data.labelled import ImageData
from ..evaluation.detection import need_pycocotools
from ..evaluation.metrics import Results, classify, detect, recognize, regress, segment
from ..model.configuration_hf_vit import HFViTConfig
from ..model.dense_hf_vit import HFViTForMaskedImageModeling
from ..model.detection_hf_vit import NEW_DETECTOR, HFViTForObjectDetection, object_losses
from ..model.image_processing_hf_vit import HFViTImageProcessor
from ..model.losses_hf_vit import classification_loss, pixel_losses
from ..model.modeling_hf_vit import HFViTForImageClassification
from ..model.segmentation_hf_vit import NEW_SEGMENTER, HFViTForSemanticSegmentation
from ..model.validation_hf_vit import POOLINGS_OF_CLS
from ..system.texts import one_line
from ..system.transfers import to_device
from ..variants import config_of, is_from_scratch
from .distillation import Distillation
from .lejepa import LeJEPA
from .objective import Objective, generators_of, means_over_images, refuse_mixing, without_wrapper
from .recipe import TrainConfig

# With these, a frozen encoder gives the same features for an image every time.
WITHOUT_DROPOUT = dict.fromkeys(
    ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate", "patch_dropout_prob"), 0.0
)
SINGLE_LABEL = HFViTConfig(problem_type="single_label_classification")
MULTI_LABEL = HFViTConfig(problem_type="multi_label_classification")
# Cui et al. (arXiv:1901.05555) count each further image of a class less, by this factor: the limit is 1,000 images.
NEW_SHARE = 0.999


def cross_entropy(logits: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Return the mean cross-entropy, as the model itself computes it for Trainer."""
    return classification_loss(labels, logits, SINGLE_LABEL, class_weights=class_weights)


def binary_cross_entropy(logits: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Return the mean of one binary cross-entropy per class, as in DeiT III (arXiv:2204.07118).

    An image is weighted by the weight of its class; with mixed labels, by the mean weight of its classes.
    """
    shares = one_hot(labels, logits.shape[-1]) if labels.ndim == 1 else labels
    if class_weights is None:
        return classification_loss(shares > 0, logits, MULTI_LABEL)
    losses = F.binary_cross_entropy_with_logits(logits.float(), (shares > 0).float(), reduction="none")
    return (losses.mean(dim=1) * (shares @ class_weights)).mean()


LOSSES: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": cross_entropy,
    "binary_cross_entropy": binary_cross_entropy,
}


def effective_number(counts: Tensor) -> Tensor:
    """Return the effective number of samples (Cui et al., arXiv:1901.05555) for each number of images."""
    return (1 - NEW_SHARE**counts) / (1 - NEW_SHARE)


NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {"balanced": lambda counts: counts, "effective": effective_number}


def weights_of_classes(how: str, data: ImageData) -> Tensor | None:
    """Return the weight of every class in the loss, float32 `[num_labels]`; `None` for equal weights.

    With one label per image, weights are inverse to the numbers of images, and their mean over the training images
    is 1, so that they do not change the learning rate. A class without images has the weight 0. With several labels,
    they are the weights of the positives of each label: the number of images without it for each one with it; 1 for
    a label that no image or every image has.

    Args:
        how: `"none"`, `"balanced"`, or `"effective"` for `effective_number` instead of the number of images.
        data: The training images.

    Raises:
        ValueError: If the numbers of images per class are not known.
    """
    if how == "none":
        return None
    counts = data.class_counts()
    if counts is None:
        raise ValueError(
            f"class_weights={how} needs the number of training images per class, which a stream does not tell: set "
            "class_weights: none, or streaming: false."
        )
    images, number_of = torch.tensor(counts, dtype=torch.float64), NUMBERS[how]
    if data.problem_type == "multi_label_classification":
        others = len(data.train) - images
        weights = torch.where((images > 0) & (others > 0), number_of(others) / number_of(images), 1.0)
    else:
        weights = torch.where(images > 0, 1 / number_of(images), 0.0)
        weights = weights * images.sum() / (weights * images).sum()
    return weights.float()


class Classification(Objective):
    """Assign one of several labels to an image."""

    needs_labels = True
    best_metric = "accuracy"
    metric_names: tuple[str, ...] = (
        "accuracy",
        "top5_accuracy",
        "balanced_accuracy",
        "macro_f1",
        "loss",
        "calibration_error",
    )
    problem_type = "single_label_classification"
    model_class: Any = HFViTForImageClassification

    def __init__(self, config: TrainConfig, data: ImageData) -> None:
        self.label_names = data.label_names
        self.mixer = BatchMixer(len(data.label_names), config.mixup or 0.0, config.cutmix, config.label_smoothing)
        self.measure = LOSSES[config.loss]
        self.class_weights = weights_of_classes(config.class_weights, data)

    @property
    def fields(self) -> dict[str, Any]:
        """Fields of the model's config that follow from the data."""
        return fields_of_labels(self.label_names, self.problem_type)

    def load(self, source: str, **fields: Any) -> tuple[Any, HFViTImageProcessor]:
        """Load the model of a checkpoint, with a head for these labels, and its processor."""
        return load_classifier(source, self.label_names, **{**self.fields, **fields})

    def loss(self, model: nn.Module, pixel_values: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Return the mean loss of a batch, after mixing it with random numbers from `generator`."""
        pixel_values, labels = self.mixer(pixel_values, labels, generator)
        logits = model(pixel_values=pixel_values).logits
        if self.class_weights is not None:
            self.class_weights = self.class_weights.to(logits.device)  # once: copying waits for a GPU
        return self.measure(logits, labels, self.class_weights)

    def evaluate(
        self, model: nn.Module, loader: Any, accelerator: Any, normalize: Callable[[Tensor], Tensor]
    ) -> tuple[dict[str, Any], list[str], Any]:
        """Return metrics, the names of images that cannot be read, and the results per image."""
        results = self.results(model, loader, accelerator, normalize)
        return results.metrics(), results.broken, results

    def results(self, model: nn.Module, *evaluation: Any) -> Results:
        """Return the results per image; further arguments as for `evaluate`."""
        return classify(model, *evaluation)

    def adopt(self, model: nn.Module, results: Any) -> None:
        """Set what follows from the results of an evaluation in the config of the evaluated model."""


class MultiLabel(Classification):
    """Find which of several labels an image has.

    Mixed images have shares of the labels of both. An unknown label, -100, is ignored in the loss.
    """

    best_metric = "mean_average_precision"
    metric_names = ("mean_average_precision", "micro_f1", "macro_f1", "loss")
    problem_type = "multi_label_classification"

    def __init__(self, config: TrainConfig, data: ImageData) -> None:
        super().__init__(config, data)
        self.measure = binary_cross_entropy_of_labels

    def results(self, model: nn.Module, *evaluation: Any) -> Results:
        """Return the results at the best thresholds for these images, which the model's config gets."""
        results = recognize(model, *evaluation)
        results.thresholds = results.best_thresholds()
        self.adopt(model, results)
        return results

    def adopt(self, model: nn.Module, results: Any) -> None:
        """Set the thresholds of the results in the config of the evaluated model."""
        _config_of(model).thresholds = results.thresholds


def binary_cross_entropy_of_labels(logits: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Return the mean binary cross-entropy, as the model itself computes it for Trainer."""
    return classification_loss(labels, logits, MULTI_LABEL, class_weights=class_weights)


class Regression(Classification):
    """Predict one or several numbers for an image; the model standardizes them by the training images."""

    best_metric = "r2"
    metric_names = ("r2", "mae", "rmse", "loss")
    problem_type = "regression"

    def __init__(self, config: TrainConfig, data: ImageData) -> None:
        refuse_mixing(config, "A regression has no classes to mix or to weigh")
        self.label_names = data.label_names
        self.mean, self.std = moments_of_targets(data)

    @property
    def fields(self) -> dict[str, Any]:
        return {**super().fields, "target_mean": self.mean, "target_scale": self.std}

    def loss(self, model: nn.Module, pixel_values: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Return the mean squared error of the standardized targets of a batch."""
        return classification_loss(labels, model(pixel_values=pixel_values).logits, _config_of(model))

    def results(self, model: nn.Module, *evaluation: Any) -> Results:
        """Return the results per image, with the loss of training."""
        return partial(regress, scale=_config_of(model).target_scale)(model, *evaluation)


class Segmentation(Classification):
    """Assign a class to every pixel.

    The loss is the mean over images of the mean over their known pixels. So the gradients of a batch do not depend on
    how it is divided.
    """

    best_metric = "mean_iou"
    metric_names = ("mean_iou", "pixel_accuracy", "loss")
    problem_type = SEGMENTATION
    model_class: Any = HFViTForSemanticSegmentation

    def __init__(self, config: TrainConfig, data: ImageData) -> None:
        refuse_mixing(config, "Segmentation does not mix images or weigh classes")
        if config.loss != "cross_entropy":
            raise ValueError(f"Segmentation has the loss cross_entropy of pixels: remove loss={config.loss}.")
        self.label_names = data.label_names

    @property
    def fields(self) -> dict[str, Any]:
        return {"id2label": dict(enumerate(self.label_names))}

    def load(self, source: str, **fields: Any) -> tuple[Any, HFViTImageProcessor]:
        return load_segmenter(source, self.label_names, **fields)

    def loss(self, model: nn.Module, pixel_values: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        ignored = _config_of(model).semantic_loss_ignore_index
        losses, is_known = pixel_losses(model(pixel_values=pixel_values).logits, labels, ignored)
        return (losses.sum(dim=(1, 2)) / is_known.sum(dim=(1, 2)).clamp(min=1)).mean()

    def results(self, model: nn.Module, *evaluation: Any) -> Results:
        return partial(segment, ignore_index=_config_of(model).semantic_loss_ignore_index)(model, *evaluation)


class Detection(Classification):
    """Find objects: a box and a class for each. The loss is the mean over images, so that divided batches have it."""

    best_metric = "map"
    metric_names = ("map", "map_50", "map_75", "loss")
    problem_type = DETECTION
    model_class: Any = HFViTForObjectDetection

    def __init__(self, config: TrainConfig, data: ImageData) -> None:
        refuse_mixing(config, "Detection does not mix images or weigh classes")
        if config.loss != "cross_entropy":
            raise ValueError(f"Detection has a loss of its own: remove loss={config.loss}.")
        need_pycocotools()  # now, instead of after the first epoch
        self.label_names = data.label_names

    @property
    def fields(self) -> dict[str, Any]:
        return {"id2label": dict(enumerate(self.label_names))}

    def load(self, source: str, **fields: Any) -> tuple[Any, HFViTImageProcessor]:
        return load_detector(source, self.label_names, **fields)

    def loss(self, model: nn.Module, pixel_values: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        return object_losses(model(pixel_values=pixel_values), labels).mean()

    def results(self, model: nn.Module, *evaluation: Any) -> Results:
        """Return the results at the scores with the best F1 for these images, which the model's config gets."""
        results = detect(model, *evaluation)
        results.thresholds = results.best_thresholds()
        self.adopt(model, results)
        return results

    def adopt(self, model: nn.Module, results: Any) -> None:
        """Set the thresholds of the results in the config of the evaluated model."""
        _config_of(model).thresholds = results.thresholds


def moments_of_targets(data: ImageData) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of every target over the training images; 1 for a constant target.

    Raises:
        ValueError: If the training images are a stream.
    """
    if data.is_stream:
        raise ValueError(
            "Regression needs the mean and standard deviation of its targets at the start: set streaming: false."
        )
    targets = torch.tensor(data.train[data.columns[1]][:], dtype=torch.float64).view(-1, len(data.label_names))
    mean, std = moments_of(targets)
    return mean.tolist(), std.tolist()


def moments_of(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of targets `[N, num_labels]`; the deviation of a constant target is 1."""
    std, mean = torch.std_mean(targets, dim=0, correction=0)
    return mean, std.where(std > 0, 1.0)


def _config_of(model: Any) -> HFViTConfig:
    return without_wrapper(model).config


class MaskedPatches(Objective):
    """Fill in masked patches; needs no labels."""

    needs_labels = False
    best_metric = "loss"
    metric_names = ("loss",)
    problem_type = None
    model_class: Any = HFViTForMaskedImageModeling
    fields: dict[str, Any] = {}

    def __init__(self, config: TrainConfig, data: ImageData) -> None:
        self.config = config

    def load(self, source: str, **fields: Any) -> tuple[Any, HFViTImageProcessor]:
        """Load the encoder of a checkpoint, with a decoder for patches, and its processor."""
        return load_for_masked_patches(source, **fields)

    def loss(self, model: nn.Module, pixel_values: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Return the mean loss over masked patches, which `generator` chooses."""
        masks = self._masks(model, pixel_values, [generator] * len(pixel_values))
        return model(pixel_values=pixel_values, bool_masked_pos=to_device(masks, pixel_values.device)).loss

    def evaluate(
        self, model: nn.Module, loader: Any, accelerator: Any, normalize: Callable[[Tensor], Tensor]
    ) -> tuple[dict[str, Any], list[str], None]:
        """Return the mean loss over masked patches, and names of images that cannot be read.

        The mask of an image is the same in every evaluation.
        """

        def losses(pixel_values: Tensor, indices: Tensor) -> tuple[Tensor]:
            generators = generators_of("mask", indices)
            masks = to_device(self._masks(model, pixel_values, generators), pixel_values.device)
            predictions = model(pixel_values=pixel_values, bool_masked_pos=masks).predictions
            of_patches = without_wrapper(model).objective.loss(predictions, pixel_values)
            return ((of_patches * masks).sum(1) / masks.sum(1),)

        (loss,), count, broken = means_over_images(losses, model, loader, accelerator, normalize)
        return {"loss": loss, "count": count}, broken, None

    def _masks(self, model: Any, pixel_values: Tensor, generators: list[torch.Generator]) -> Tensor:
        """Return which patches are masked, `[B, N]` on the CPU: random squares, up to exactly `mask_ratio`.

        The squares have sides of `mask_block` patches; each image draws their order from its generator.
        """
        rows, columns = _config_of(model).grid_of(*pixel_values.shape[-2:])
        side = self.config.mask_block
        across = math.ceil(columns / side)
        number = math.ceil(rows / side) * across
        square_of = torch.arange(rows)[:, None] // side * across + torch.arange(columns) // side  # [h, w]
        orders = torch.stack([torch.randperm(number, generator=generator) for generator in generators])
        turns = orders.argsort(dim=1)[:, square_of.flatten()]  # when the square of a patch is masked
        masked = max(1, round(self.config.mask_ratio * rows * columns))
        first = turns.sort(dim=1, stable=True).indices[:, :masked]  # within the last square, in reading order
        return torch.zeros_like(turns, dtype=torch.bool).scatter_(1, first, True)


TASKS: dict[str, Any] = {
    "classification": Classification,
    "multi_label": MultiLabel,
    "regression": Regression,
    "segmentation": Segmentation,
    "detection": Detection,
    "masked_patches": MaskedPatches,
    "distillation": Distillation,
    "lejepa": LeJEPA,
}


# Fields of a model with a new head, by task, unless the recipe states them.
NEW_HEADS: dict[str, dict[str, Any]] = {"segmentation": NEW_SEGMENTER, "detection": NEW_DETECTOR}


def architecture_of(config: TrainConfig, **fields: Any) -> HFViTConfig:
    """Return the model config of a recipe that trains from scratch; `fields` override the recipe's."""
    fields = {**NEW_HEADS.get(config.task, {}), **_fields_of(config), **fields}
    return HFViTConfig(**fields) if config.model is None else config_of(config.model, **fields)


def build_model(config: TrainConfig, task: Any) -> tuple[Any, HFViTImageProcessor]:
    """Build or load the model of a recipe, and the processor of its images."""
    if is_from_scratch(config.model):
        model_config = architecture_of(config, **task.fields)
        with _naming_attention(config):
            model = task.model_class(model_config)
        processor = HFViTImageProcessor.from_preset(
            config.preprocessing, model_config.image_shape, num_channels=model_config.num_channels
        )
    else:
        with _naming_attention(config):
            model, processor = task.load(config.model, **_fields_of(config))
        if not config.resample_positions:
            _draw_positions(model, model.config.initializer_range)
    if config.position_std is not None:
        _draw_positions(model, config.position_std)
    if config.trained == "head":
        model.base_model.requires_grad_(False)
    return model, processor


@contextmanager
def _naming_attention(config: TrainConfig) -> Iterator[None]:
    """Name the attention of a recipe in the error about its missing package."""
    try:
        yield
    except ImportError as error:
        if (name := config.model_config.get("attn_implementation")) is None:
            raise
        raise ValueError(
            f"attn_implementation: {name} needs a package that is not installed: pip install kernels, or leave it out "
            f"for torch's own attention. transformers says: {one_line(str(error))}"
        ) from None


def _fields_of(config: TrainConfig) -> dict[str, Any]:
    height, width = (config.image_size,) * 2 if isinstance(config.image_size, int) else config.image_size
    fields = {"image_size": (height, width), **config.model_config}
    if config.trained != "head":
        return fields
    if str(fields.get("pooling")) in POOLINGS_OF_CLS and not _reads_class_token(config.model):
        del fields["pooling"]  # a probe reads the features that the checkpoint has
    return {**WITHOUT_DROPOUT, **fields}


def _reads_class_token(model: str | None) -> bool:
    """Return whether an encoder has a class token that a head may read; a model from scratch has."""
    if is_from_scratch(model):
        return True
    config = open_checkpoint(str(model)).config
    return bool(config.use_cls_token) and config.final_layernorm != "pooled"


def _draw_positions(model: Any, std: float) -> None:
    for table in model.base_model.embeddings.position_embeddings.parameters():
        nn.init.trunc_normal_(table, std=std)
