"""A checkpoint for the labels of other data, or for more pre-training: how fine-tuning begins."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..model.dense_hf_vit import HFViTForMaskedImageModeling
from ..model.image_processing_hf_vit import HFViTImageProcessor
from ..model.modeling_hf_vit import HFViTForImageClassification, HFViTModel
from . import Checkpoint, Options, open_checkpoint
from .checkpoint import CLASSIFIER, refuse_not_finite

logger = logging.get_logger(__name__)

# What is learned is float32, whatever was stored: a small step is lost in half precision.
LOADING: dict[str, Any] = {"ignore_mismatched_sizes": True, "output_loading_info": True, "dtype": torch.float32}


def fields_of_labels(label_names: Sequence[str]) -> dict[str, Any]:
    """Return the fields of a config that say what the classes are, each image having one of them."""
    return {
        "id2label": dict(enumerate(label_names)),
        "label2id": {name: index for index, name in enumerate(label_names)},
        # Stated, not guessed from the first batch: transformers takes soft labels for several labels an image.
        "problem_type": "single_label_classification",
    }


def load_classifier(
    source: str | Path, label_names: Sequence[str], **fields: Any
) -> tuple[HFViTForImageClassification, HFViTImageProcessor]:
    """Load a checkpoint as a classifier of `label_names`, with the processor of its images at the model's size.

    A head that was made for exactly these labels, in this order, is kept. Any other is replaced by one of zeros, and
    it is said, even where the number of labels happens to be the same.

    Args:
        source: A folder, a file or a name on the Hub, of this package or another library.
        label_names: What the classes of the data are called.
        fields: Fields of `HFViTConfig` that are to be others than the checkpoint's, such as `image_size`.

    Raises:
        ValueError: If anything but the head is missing in the checkpoint, has another shape there, or is no number.
    """
    label_names = list(label_names)
    checkpoint = open_checkpoint(source)
    stored = list((checkpoint.config.id2label or {}).values())
    loaded: Any = HFViTForImageClassification.from_pretrained(
        source, **LOADING, **{**fields_of_labels(label_names), **fields}
    )
    model, report = loaded
    _refuse_other_architecture(source, report, "classifier.", fields)
    if stored != label_names:
        for parameter in model.classifier.parameters():
            nn.init.zeros_(parameter)
        logger.warning(
            f"New head for {len(label_names)} labels ({_some(label_names)}): classifier.weight and classifier.bias "
            f"start at zero, since {source} tells others apart ({_some(stored)})."
        )
    refuse_not_finite(str(source), model.state_dict())
    return model, _processor(checkpoint, model)


def load_for_masked_patches(
    source: str | Path, **fields: Any
) -> tuple[HFViTForMaskedImageModeling, HFViTImageProcessor]:
    """Load the encoder of a checkpoint to learn from masked patches; a decoder is new where it has none.

    Args:
        source, fields: As for `load_classifier`, which says what is raised.
    """
    checkpoint = open_checkpoint(source)
    loaded: Any = HFViTForMaskedImageModeling.from_pretrained(source, **LOADING, **fields)
    model, report = loaded
    _refuse_other_architecture(source, report, ("objective.", "vit.embeddings.mask_token."), fields)
    refuse_not_finite(str(source), model.state_dict())
    return model, _processor(checkpoint, model)


def _refuse_other_architecture(
    source: str | Path, report: dict[str, Any], head: str | tuple[str, ...], fields: dict[str, Any]
) -> None:
    lost = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
    if foreign := sorted(name for name in lost if not name.startswith(head)):
        raise ValueError(
            f"{source} lacks weights of this model, or has them in another shape: {', '.join(foreign)}. Leave out the "
            f"fields that change the architecture: {', '.join(fields) or 'none was given'}."
        )


def _processor(checkpoint: Any, model: Any) -> HFViTImageProcessor:
    processor = HFViTImageProcessor.from_dict(checkpoint.processor().to_dict())
    processor.set_output_size(model.config.image_shape)
    return processor


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def load(
    source: str, image_size: tuple[int, int] | None = None, checkpoint: Checkpoint | None = None
) -> tuple[Any, HFViTImageProcessor]:
    """Load a classifier, or the encoder of a checkpoint without one, and the processor of its images.

    Args:
        source: A file, a folder or a name on the Hub, in any layout.
        image_size: (height, width) in pixels, where it is not the checkpoint's own.
        checkpoint: What `open_checkpoint` gave for `source`, if it is open already.

    Raises:
        ValueError: If weights are missing, or are no numbers.
    """
    checkpoint = checkpoint or open_checkpoint(source, Options(image_size=image_size))
    model_class: Any = HFViTForImageClassification if checkpoint.architecture == CLASSIFIER else HFViTModel
    fields = {} if image_size is None else {"image_size": image_size}
    model, report = model_class.from_pretrained(source, output_loading_info=True, **fields)
    if missing := sorted(report["missing_keys"]):
        some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ValueError(
            f"{source} lacks weights of {model_class.__name__}: {some}. What was only pre-trained may have no pooling "
            "yet: train it first."
        )
    refuse_not_finite(source, model.state_dict())
    processor = HFViTImageProcessor.from_dict(checkpoint.processor().to_dict())
    processor.set_output_size(model.config.image_shape)
    return model.eval(), processor
