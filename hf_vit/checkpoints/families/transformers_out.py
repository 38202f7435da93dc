"""Write a checkpoint for the ViT classes of transformers."""

import json
import math
from pathlib import Path
from typing import Any

from transformers import ViTConfig

from ...model.configuration_hf_vit import HFViTConfig
from ...model.image_processing_pil_hf_vit import HFViTImageProcessorPil, Image
from ...system.disk import new_folder
from ..checkpoint import CLASSIFIER, ENCODER, MASKED, Checkpoint
from ..layouts import Rule
from ..writing import Target, plain_except, write_layout
from . import transformers

CLASSES = {CLASSIFIER: "ViTForImageClassification", ENCODER: "ViTModel", MASKED: "ViTForMaskedImageModeling"}
FIELDS = (*transformers.STOCK_FIELDS, "id2label", "label2id", "problem_type")
PREPROCESSING = (
    *("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor"),
    *("do_normalize", "image_mean", "image_std", "do_convert_rgb"),
)
# Our processors round an odd margin as their source does: by half a pixel up or down.
ROUNDED_CROP = "A centre crop may start one pixel further up or left there."


def unsupported(checkpoint: Checkpoint) -> list[str]:
    """Return the features of model and processor that transformers' ViT does not have."""
    config, features = checkpoint.config, []
    processor = checkpoint.processor().to_dict()
    if config.use_cls_token and config.position_embedding_type == "learned" and not config.num_prefix_positions:
        features.append("num_prefix_positions=0 (only 1)")
    if config.representation_size is not None and checkpoint.architecture != ENCODER:
        features.append(f"representation_size={config.representation_size} (only in a model without head)")
    if checkpoint.architecture == MASKED:
        if config.mim_objective != "pixels":
            features.append(f"mim_objective={config.mim_objective!r} (only 'pixels')")
        sizes = {"image_size": config.image_shape, "patch_size": config.patch_shape}
        features += [
            f"{name}={size} in masked image modelling (only squares)"
            for name, size in sizes.items()
            if len(set(size)) > 1
        ]
    if processor.get("do_grayscale"):
        features.append("do_grayscale of the processor")
    if processor.get("crop_pct") is not None and len(set(config.image_shape)) > 1:
        features.append(f"crop_pct={processor['crop_pct']} of the processor (only with square images)")
    resample = Image.Resampling(processor["resample"]).name
    if resample in ("BOX", "HAMMING"):
        features.append(f"resample={resample} of the processor")
    return features + unsupported_size(processor, config)


def unsupported_size(processor: dict[str, Any], config: HFViTConfig) -> list[str]:
    """Return a processor's output size if it is not the model's image size: other libraries accept only one size."""
    size = dict(processor["crop_size"] if processor.get("do_center_crop") else processor["size"])
    is_fitted = processor["do_resize"] or processor.get("do_center_crop")
    if not is_fitted or (size.get("height"), size.get("width")) == config.image_shape:
        return []
    return [f"a processor that gives {size} (only the model's {config.image_shape})"]


def notes(checkpoint: Checkpoint) -> list[str]:
    """Return what a user of transformers must know."""
    sentences = []
    if checkpoint.architecture == ENCODER and checkpoint.config.representation_size is None:
        sentences.append(
            "The model has no pooler: load ViTModel with add_pooling_layer=False, or its pooler is random."
        )
    return sentences + ([ROUNDED_CROP] if checkpoint.processor().crop_pct is not None else [])


def write(checkpoint: Checkpoint, rules: list[Rule], out: Path, force: bool) -> None:
    """Write weights, config and preprocessing, and verify them."""
    config = checkpoint.config
    fields = {name: getattr(config, name) for name in FIELDS}
    fields["initializer_range"] = float(config.initializer_range)  # ViTConfig rejects an integer
    stock = ViTConfig(
        **fields,
        image_size=number_if_square(config.image_shape),
        patch_size=number_if_square(config.patch_shape),
        encoder_stride=config.patch_shape[0],
        pooler_output_size=config.representation_size,
        architectures=[CLASSES[checkpoint.architecture]],
        dtype=str(checkpoint.dtype).removeprefix("torch."),
    )
    with new_folder(out, force) as folder:
        write_layout(checkpoint, rules, folder, json.loads(stock.to_json_string(use_diff=False)))
        stated = json.dumps(preprocessing(checkpoint.processor()), indent=2)
        (folder / "preprocessor_config.json").write_text(f"{stated}\n", encoding="utf-8")


def number_if_square(size: tuple[int, int]) -> int | list[int]:
    """Return one number for a square, as other libraries write sizes."""
    return size[0] if size[0] == size[1] else list(size)


def preprocessing(processor: HFViTImageProcessorPil) -> dict[str, Any]:
    """Return the same preprocessing for a processor of transformers: one that crops, or one that only resizes."""
    ours = processor.to_dict()
    stock = {name: ours[name] for name in PREPROCESSING if ours.get(name) is not None}
    if ours.get("crop_pct") is not None and stock["do_resize"]:
        edge = math.floor(stock["size"]["height"] / ours["crop_pct"])
        stock.update(do_center_crop=True, crop_size=stock["size"], size={"shortest_edge": edge})
    crops = stock.get("do_center_crop")
    return {"image_processor_type": "CLIPImageProcessor" if crops else "ViTImageProcessor", **stock}


TARGET = Target(
    architectures=(CLASSIFIER, ENCODER, MASKED),
    required=plain_except("qkv_bias", "representation_size"),
    unsupported=unsupported,
    notes=notes,
    table=lambda checkpoint: transformers.table(prefixes=("" if checkpoint.architecture == ENCODER else "vit.",)),
    write=write,
    carries=(*FIELDS, "labels", "processor", "bicubic"),
)
