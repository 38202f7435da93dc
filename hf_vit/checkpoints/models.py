"""Load a model and its image processor from a source: for inference, for fine-tuning, and for figures.

A source is a file, a folder or a name on the Hub, in any layout. Each function opens it once and reads every weight
once, which also detects NaN and infinity.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..model import model_class
from ..model.dense_hf_vit import HFViTForMaskedImageModeling
from ..model.detection_hf_vit import NEW_DETECTOR, HFViTForObjectDetection
from ..model.image_processing_hf_vit import HFViTImageProcessor
from ..model.modeling_hf_vit import HFViTForImageClassification, HFViTModel
from ..model.multi_task_hf_vit import HFViTForMultiTask
from ..model.segmentation_hf_vit import NEW_SEGMENTER, HFViTForSemanticSegmentation
from ..model.validation_hf_vit import OF_CERTAINTY, OF_HEAD
from ..system.progress import no_bars_of_transformers
from ..system.texts import counted, shortened
from .checkpoint import CLASSIFIER, DETECTOR, MULTI_TASK, SEGMENTER, Checkpoint, Options
from .families import own
from .from_pretrained import config_for, options_from, warn_of_assumptions
from .opening import open_checkpoint

logger = logging.get_logger(__name__)

SINGLE_LABEL = "single_label_classification"
# Training is in float32 regardless of the checkpoint's dtype: half precision loses small updates.
FINE_TUNING: dict[str, Any] = {"ignore_mismatched_sizes": True, "dtype": torch.float32}
WHOLE_IMAGES: dict[str, Any] = {"do_resize": True, "crop_pct": None, "do_center_crop": False, "packing": None}


def load(
    source: str | Path,
    image_size: tuple[int, int] | None = None,
    checkpoint: Checkpoint | None = None,
    head: str | None = None,
) -> tuple[Any, HFViTImageProcessor]:
    """Load a model with its heads, or an encoder where the checkpoint has none, and its image processor.

    Args:
        source: A file, a folder or a name on the Hub, in any layout.
        image_size: `(height, width)` in pixels; the checkpoint's own by default.
        checkpoint: The result of `open_checkpoint` for `source`, if it is already open. Otherwise the assumptions
            about it are logged.
        head: Name of a head of a multi-task model, which is then loaded as a model of this task alone.

    Raises:
        ValueError: If weights are missing, NaN or infinite.
    """
    if checkpoint is None:
        checkpoint = open_checkpoint(source, Options(image_size=image_size, head=head))
        warn_of_assumptions(checkpoint)
    has_classes = checkpoint.architecture in (CLASSIFIER, SEGMENTER, DETECTOR, MULTI_TASK)
    loaded: Any = model_class(checkpoint.architecture) if has_classes else HFViTModel
    model, report = _fill(loaded, checkpoint)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"{source} lacks weights of {loaded.__name__}: {shortened(missing)}. A model that was only pre-trained "
            "may have no pooling yet: fine-tune it first."
        )
    return model.eval(), _processor(checkpoint, model.config.image_shape)


def load_for_figures(
    checkpoint: Checkpoint, image_size: tuple[int, int] | None = None
) -> tuple[Any, HFViTImageProcessor]:
    """Load a model of any architecture in float32 on the accelerator, and a processor that gives one image size.

    Args:
        checkpoint: The result of `open_checkpoint`.
        image_size: `(height, width)` in pixels of the processed images; the model's own by default.
    """
    model, _ = _fill(model_class(checkpoint.architecture), checkpoint, dtype=torch.float32)
    processor = _processor(checkpoint, image_size or model.config.image_shape, do_resize=True, packing=None)
    return model.eval().to(torch.accelerator.current_accelerator(True) or "cpu"), processor


def load_classifier(
    source: str | Path, label_names: Sequence[str], **fields: Any
) -> tuple[HFViTForImageClassification, HFViTImageProcessor]:
    """Load a checkpoint as a classifier of `label_names`, with its image processor at the model's size.

    The head is kept, with its temperature, thresholds and units of targets, if it was trained for exactly these
    labels in this order. Otherwise it is replaced by zeros with a warning, even if the number of labels is the same.
    Thresholds of certainty are not kept, since training changes the probabilities.

    Args:
        source: A file, a folder or a name on the Hub, in any layout.
        label_names: Names of the classes, by class index, or of the targets of a regression.
        fields: Fields of `HFViTConfig` that differ from the checkpoint's, such as `image_size`. `problem_type` is one
            label per image by default; `target_mean` and `target_scale` are for a new head. The patch projection and
            the processor are adapted to another `num_channels`. Also options for what the file does not state, as in
            `from_pretrained`, such as `weights="teacher"`.

    Raises:
        ValueError: If weights other than the head are missing, have another shape, or are NaN or infinite.
    """
    label_names = list(label_names)
    checkpoint, fields = _open_for(source, fields)
    stored = list((checkpoint.config.id2label or {}).values())
    of_model = {**fields_of_labels(label_names), **fields}
    is_kept = stored == label_names and (checkpoint.config.problem_type or SINGLE_LABEL) == of_model["problem_type"]
    for name, value in OF_HEAD.items():
        is_stated = is_kept and name not in OF_CERTAINTY
        of_model[name] = getattr(checkpoint.config, name) if is_stated else fields.get(name, value)
    model, report = _fill(HFViTForImageClassification, checkpoint, **FINE_TUNING, **of_model)
    _require_encoder(source, report, "classifier.", fields)
    if not is_kept:
        for parameter in model.classifier.parameters():
            nn.init.zeros_(parameter)
        logger.warning(
            f"New head for {counted(len(label_names), 'label')} ({shortened(label_names)}), since the checkpoint has "
            f"others ({shortened(stored)}):\nclassifier.weight and classifier.bias start at zero."
        )
    return model, _processor(checkpoint, model.config.image_shape)


def load_for_masked_patches(
    source: str | Path, **fields: Any
) -> tuple[HFViTForMaskedImageModeling, HFViTImageProcessor]:
    """Load the encoder of a checkpoint for masked image modeling; the decoder is new if the checkpoint has none.

    Args:
        source: A file, a folder or a name on the Hub, in any layout.
        fields: Fields of `HFViTConfig` that differ from the checkpoint's.

    Raises:
        ValueError: If weights of the encoder are missing, have another shape, or are NaN or infinite.
    """
    checkpoint, fields = _open_for(source, fields)
    model, report = _fill(HFViTForMaskedImageModeling, checkpoint, **FINE_TUNING, **fields)
    _require_encoder(source, report, ("objective.", "vit.embeddings.mask_token."), fields)
    return model, _processor(checkpoint, model.config.image_shape)


def load_encoder(source: str | Path, **fields: Any) -> tuple[HFViTModel, HFViTImageProcessor]:
    """Load the encoder of a checkpoint to train it further; a pooling with weights is new if the checkpoint has none.

    Arguments and errors are as for `load_for_masked_patches`.
    """
    checkpoint, fields = _open_for(source, fields)
    model, report = _fill(HFViTModel, checkpoint, **FINE_TUNING, **fields)
    _require_encoder(source, report, "pooler.", fields)
    return model, _processor(checkpoint, model.config.image_shape)


def load_segmenter(
    source: str | Path, label_names: Sequence[str], **fields: Any
) -> tuple[HFViTForSemanticSegmentation, HFViTImageProcessor]:
    """Load a checkpoint for semantic segmentation; the classifier is new unless it has exactly these classes.

    The processor resizes whole images, even if that of the checkpoint crops them.

    Args:
        source: A file, a folder or a name on the Hub, in any layout.
        label_names: Names of the classes, by class index.
        fields: Fields of `HFViTConfig` that differ from the checkpoint's.

    Raises:
        ValueError: If weights of the encoder are missing, have another shape, or are NaN or infinite.
    """
    return _load_with_classes(HFViTForSemanticSegmentation, "decode_head", source, label_names, fields, NEW_SEGMENTER)


def load_detector(
    source: str | Path, label_names: Sequence[str], **fields: Any
) -> tuple[HFViTForObjectDetection, HFViTImageProcessor]:
    """Load a checkpoint for object detection; the classifier is new unless it has exactly these classes.

    Arguments, processor and errors are as for `load_segmenter`.
    """
    return _load_with_classes(HFViTForObjectDetection, "detection_head", source, label_names, fields, NEW_DETECTOR)


def _load_with_classes(
    loaded: Any,
    head: str,
    source: str | Path,
    label_names: Sequence[str],
    fields: dict[str, Any],
    of_new_head: dict[str, Any],
) -> tuple[Any, HFViTImageProcessor]:
    """Load a model whose `head` has a `classifier`; parts of the head that the checkpoint does not have are new."""
    checkpoint, fields = _open_for(source, fields)
    stored = list((checkpoint.config.id2label or {}).values())
    has_head = checkpoint.architecture == loaded.__name__
    is_kept = has_head and stored == list(label_names)
    fields = fields if has_head else {**of_new_head, **fields}
    of_model = {**OF_HEAD, "feature_strides": None, **fields, **fields_of_labels(label_names, None)}
    model, report = _fill(loaded, checkpoint, **FINE_TUNING, **of_model)
    _require_encoder(source, report, f"{head}.", fields)
    if not is_kept:
        getattr(model, head).classifier.reset(model.config.initializer_range)
    return model, _processor(checkpoint, model.config.image_shape, **WHOLE_IMAGES)


def load_multi_task(
    source: str | Path, heads: dict[str, dict[str, Any]], **fields: Any
) -> tuple[HFViTForMultiTask, HFViTImageProcessor]:
    """Load a checkpoint with new heads, in addition to those that a multi-task model already has.

    Args:
        source: A file, a folder or a name on the Hub, in any layout.
        heads: New heads, as in the config. Their weights are random.
        fields: Fields of `HFViTConfig` that differ from the checkpoint's.

    Raises:
        ValueError: If weights of the encoder are missing, have another shape, or are NaN or infinite.
    """
    checkpoint, fields = _open_for(source, fields)
    known = checkpoint.config.task_heads if checkpoint.architecture == MULTI_TASK else None
    of_model = {**OF_HEAD, **fields, "num_labels": 2, "problem_type": None, "task_heads": {**(known or {}), **heads}}
    model, report = _fill(HFViTForMultiTask, checkpoint, **FINE_TUNING, **of_model)
    _require_encoder(source, report, tuple(f"heads.{name}." for name in heads), fields)
    return model, _processor(checkpoint, model.config.image_shape)


def fields_of_labels(label_names: Sequence[str], problem_type: str | None = SINGLE_LABEL) -> dict[str, Any]:
    """Return the config fields for the labels of a classifier; `problem_type` is that of transformers."""
    return {
        "id2label": dict(enumerate(label_names)),
        # Set explicitly: transformers would infer several labels per image from soft labels in the first batch.
        "problem_type": problem_type,
    }


def _open_for(source: str | Path, fields: dict[str, Any]) -> tuple[Checkpoint, dict[str, Any]]:
    """Open a checkpoint to fine-tune it with other fields; return it and the fields of its config."""
    options, rest = options_from(fields)
    checkpoint = open_checkpoint(source, options)
    warn_of_assumptions(checkpoint)
    return checkpoint, rest


def _fill(loaded: Any, checkpoint: Checkpoint, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Return a model of a class with the weights of a checkpoint, and the report of `from_pretrained`."""
    config, rest = config_for(checkpoint, loaded.__name__, options)
    weights = checkpoint.state_dict()
    with no_bars_of_transformers():
        model, report = loaded.from_pretrained(
            None, config=config, state_dict=weights, output_loading_info=True, **rest
        )
    model.config.name_or_path = model.name_or_path = checkpoint.source.name
    if checkpoint.family != own.FAMILY.name:  # saving a model from our own folder reads the processor from there
        model._image_processor = checkpoint.processor()
        model._image_processor.set_output_size(config.image_shape)
    return model, report


def _require_encoder(
    source: str | Path, report: dict[str, Any], new: str | tuple[str, ...], fields: dict[str, Any]
) -> None:
    """Raise `ValueError` if weights that do not begin with `new` could not be loaded."""
    lost = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
    if lost_encoder := sorted(name for name in lost if not name.startswith(new)):
        raise ValueError(
            f"{source} lacks weights of this model, or has them in a different shape: {', '.join(lost_encoder)}. "
            f"Remove the fields that change the architecture: {', '.join(fields) or 'none was given'}."
        )


def _processor(checkpoint: Checkpoint, image_size: tuple[int, int], **changed: Any) -> HFViTImageProcessor:
    processor = HFViTImageProcessor.from_dict({**checkpoint.processor().to_dict(), **changed})
    processor.set_output_size(image_size)
    return processor
