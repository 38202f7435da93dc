"""What a run learns: to tell images apart, or to fill in patches that are hidden. The loop is the same for both."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object, send_to_device
from torch import Tensor, nn

from ..checkpoints.models import fields_of_labels, load_classifier, load_for_masked_patches
from ..data.augmentation import BatchMixer
from ..data.images import derive_seed
from ..data.labelled import ImageData
from ..evaluation.metrics import ImageResults, classify
from ..model.configuration_hf_vit import HFViTConfig
from ..model.dense_hf_vit import HFViTForMaskedImageModeling
from ..model.image_processing_hf_vit import HFViTImageProcessor
from ..model.modeling_hf_vit import HFViTForImageClassification
from ..variants import VARIANTS, config_of
from .recipe import TrainConfig

# A frozen encoder gives the same features at every visit.
WITHOUT_DROPOUT = dict.fromkeys(
    ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate", "patch_dropout_prob"), 0.0
)


class Classification:
    """Tell images apart by their labels."""

    needs_labels = True
    model_class: Any = HFViTForImageClassification

    def __init__(self, config: TrainConfig, data: ImageData) -> None:
        self.config, self.label_names = config, data.label_names
        self.mixer = BatchMixer(len(data.label_names), config.mixup or 0.0, config.cutmix, config.label_smoothing)
        self.measure = LOSSES[config.loss]

    @property
    def fields(self) -> dict[str, Any]:
        """Fields of the model's config that follow from the data."""
        return fields_of_labels(self.label_names)

    def load(self, source: str, **fields: Any) -> tuple[Any, HFViTImageProcessor]:
        """Return the model of a checkpoint, for these labels, and its processor."""
        return load_classifier(source, self.label_names, **fields)

    def loss(self, model: nn.Module, pixel_values: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Return the mean loss of a batch; `generator` decides how it is mixed."""
        pixel_values, labels = self.mixer(pixel_values, labels, generator)
        return self.measure(model(pixel_values=pixel_values).logits.float(), labels)

    def evaluate(
        self, model: nn.Module, loader: Any, accelerator: Any, normalize: Callable[[Tensor], Tensor]
    ) -> tuple[dict[str, Any], list[str], ImageResults | None]:
        """Return figures, the names of images that could not be read, and the answers that the figures sum up."""
        predictions = classify(model, loader, accelerator, normalize)
        return predictions.metrics(), predictions.broken, predictions


class MaskedPatches:
    """Fill in patches that are hidden: no labels are needed."""

    needs_labels = False
    model_class: Any = HFViTForMaskedImageModeling
    fields: dict[str, Any] = {}

    def __init__(self, config: TrainConfig, data: ImageData) -> None:
        self.config = config

    def load(self, source: str, **fields: Any) -> tuple[Any, HFViTImageProcessor]:
        """Return the encoder of a checkpoint with a decoder of patches, and its processor."""
        return load_for_masked_patches(source, **fields)

    def loss(self, model: nn.Module, pixel_values: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Return the mean loss over hidden patches; `generator` decides which they are."""
        masks = [self._mask(model, pixel_values, generator) for _ in range(len(pixel_values))]
        return model(pixel_values=pixel_values, bool_masked_pos=torch.stack(masks).to(pixel_values.device)).loss

    def evaluate(
        self, model: nn.Module, loader: Any, accelerator: Any, normalize: Callable[[Tensor], Tensor]
    ) -> tuple[dict[str, Any], list[str], None]:
        """Return the mean loss over hidden patches, the same at every evaluation, and names of unreadable images."""
        was_training = model.training
        model.eval()
        total = torch.zeros(2, dtype=torch.float64)  # loss, images
        broken: list[str] = []
        with torch.no_grad():
            for batch in loader:
                broken += batch["broken"]
                pixel_values = normalize(send_to_device(batch["pixel_values"], accelerator.device))
                is_counted = batch["index"].cpu() >= 0
                masks = torch.stack(
                    [
                        self._mask(model, pixel_values, torch.Generator().manual_seed(derive_seed("mask", index)))
                        for index in batch["index"].tolist()
                    ]
                )
                # Every image hides the same number of patches, so that a mean over patches is one over images.
                masks &= is_counted[:, None]
                loss = model(pixel_values=pixel_values, bool_masked_pos=masks.to(pixel_values.device)).loss
                counted = is_counted.sum()
                total += torch.stack([loss.double().cpu() * counted, counted.double()])
        model.train(was_training)
        loss, count = accelerator.reduce(total.float().to(accelerator.device), "sum").tolist()
        broken = gather_object(broken) if accelerator.num_processes > 1 else broken
        return {"loss": loss / max(1, count), "count": round(count)}, sorted(broken), None

    def _mask(self, model: Any, pixel_values: Tensor, generator: torch.Generator) -> Tensor:
        """Return which patches are hidden, `[N]`: squares of `mask_block`, until `mask_ratio` is reached."""
        config = getattr(model, "module", model).config
        rows, columns = config.grid_of(*pixel_values.shape[-2:])
        side = self.config.mask_block
        grid = torch.arange(rows * columns).reshape(rows, columns)
        squares = [square.flatten() for band in grid.split(side, dim=0) for square in band.split(side, dim=1)]
        hidden = max(1, round(self.config.mask_ratio * rows * columns))
        order = torch.cat([squares[index] for index in torch.randperm(len(squares), generator=generator)])
        return torch.zeros(rows * columns, dtype=torch.bool).index_fill_(0, order[:hidden], True)


def _binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Ask of each class by itself whether it is there at all, as DeiT III does (arXiv:2204.07118)."""
    targets = F.one_hot(labels, logits.shape[-1]) if labels.ndim == 1 else labels > 0
    return F.binary_cross_entropy_with_logits(logits, targets.float())


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "binary_cross_entropy": _binary_cross_entropy,
}
TASKS: dict[str, type[Classification | MaskedPatches]] = {
    "classification": Classification,
    "masked_patches": MaskedPatches,
}


def architecture_of(config: TrainConfig, **fields: Any) -> HFViTConfig:
    """Return the config of the model that a recipe describes from scratch; `fields` win over the recipe's."""
    fields = {**_fields_of(config), **fields}
    return HFViTConfig(**fields) if config.model is None else config_of(config.model, **fields)


def build_model(config: TrainConfig, task: Any) -> tuple[Any, HFViTImageProcessor]:
    """Return the model that a recipe describes, and the processor of its images."""
    is_new = config.model is None or config.model in VARIANTS
    if is_new:
        model_config = architecture_of(config, **task.fields)
        model = task.model_class(model_config)
        processor = HFViTImageProcessor.from_preset(
            config.preprocessing, model_config.image_shape, num_channels=model_config.num_channels
        )
    else:
        model, processor = task.load(config.model, **_fields_of(config))
    if not is_new and not config.resample_positions:
        _draw_positions(model, model.config.initializer_range)
    if config.position_std is not None:
        _draw_positions(model, config.position_std)
    if config.trained == "head":
        model.base_model.requires_grad_(False)
    return model, processor


def _fields_of(config: TrainConfig) -> dict[str, Any]:
    height, width = (config.image_size,) * 2 if isinstance(config.image_size, int) else config.image_size
    fields = {"image_size": (height, width), **config.model_config}
    return {**WITHOUT_DROPOUT, **fields} if config.trained == "head" else fields


def _draw_positions(model: Any, std: float) -> None:
    for table in model.base_model.embeddings.position_embeddings.parameters():
        nn.init.trunc_normal_(table, std=std)
