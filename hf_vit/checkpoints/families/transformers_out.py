"""Write a checkpoint for the ViT classes of transformers."""

import json
import math
from pathlib import Path
from typing import Any

from transformers import ViTConfig

from ...model.configuration_hf_vit import HFViTConfig
from ...model.image_processing_pil_hf_vit import HFViTImageProcessorPil, Image
from ...system.disk import new_folder
from .. import Checkpoint
from ..checkpoint import CLASSIFIER, ENCODER, MASKED
from ..layouts import Row, Rule
from ..writing import _write_folder
from . import transformers

STOCK = {CLASSIFIER: "ViTForImageClassification", ENCODER: "ViTModel", MASKED: "ViTForMaskedImageModeling"}


STOCK_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "initializer_range",
    "layer_norm_eps",
    "num_channels",
    "qkv_bias",
    "id2label",
    "label2id",
    "problem_type",
)


# Ours round the margin of a crop as each source does; of an odd margin, half a pixel goes up or down.
ROUNDED_CROP = "A centre crop may lie one pixel further up or left there."


def _transformers_misfits(checkpoint: Checkpoint) -> list[str]:
    config, misfits = checkpoint.config, []
    processor = checkpoint.processor().to_dict()
    if config.use_cls_token and config.position_embedding_type == "learned" and not config.num_prefix_positions:
        misfits.append("num_prefix_positions=0 (only 1)")
    if config.representation_size is not None and checkpoint.architecture != ENCODER:
        misfits.append(f"representation_size={config.representation_size} (only in a model without head)")
    if checkpoint.architecture == MASKED:
        if config.mim_objective != "pixels":
            misfits.append(f"mim_objective={config.mim_objective!r} (only 'pixels')")
        sizes = {"image_size": config.image_shape, "patch_size": config.patch_shape}
        misfits += [
            f"{name}={size} in masked modelling (only squares)" for name, size in sizes.items() if len(set(size)) > 1
        ]
    if processor.get("do_grayscale"):
        misfits.append("do_grayscale of the processor")
    if processor.get("crop_pct") is not None and len(set(config.image_shape)) > 1:
        misfits.append(f"crop_pct={processor['crop_pct']} of the processor (only with square images)")
    resample = Image.Resampling(processor["resample"]).name
    if resample in ("BOX", "HAMMING"):
        misfits.append(f"resample={resample} of the processor")
    return misfits + _size_misfits(processor, config)


def _transformers_notes(checkpoint: Checkpoint) -> list[str]:
    said = []
    if checkpoint.architecture == ENCODER and checkpoint.config.representation_size is None:
        said.append("There is no pooler: load ViTModel with add_pooling_layer=False, or it draws one at random.")
    return said + ([ROUNDED_CROP] if checkpoint.processor().crop_pct is not None else [])


def _size_misfits(processor: dict[str, Any], config: HFViTConfig) -> list[str]:
    """Refuse a processor that leaves the last resize to our model: others take images of their one size alone."""
    size = dict(processor["crop_size"] if processor.get("do_center_crop") else processor["size"])
    is_fitted = processor["do_resize"] or processor.get("do_center_crop")
    if not is_fitted or (size.get("height"), size.get("width")) == config.image_shape:
        return []
    return [f"a processor that gives {size} (only the model's {config.image_shape})"]


def _transformers_table(checkpoint: Checkpoint) -> list[Row]:
    return transformers.table(prefixes=("",) if checkpoint.architecture == ENCODER else ("vit.",))


def _write_transformers(checkpoint: Checkpoint, rules: list[Rule], out: Path, force: bool) -> None:
    config = checkpoint.config
    fields = {name: getattr(config, name) for name in STOCK_FIELDS}
    fields["initializer_range"] = float(config.initializer_range)  # stock takes no integer
    sizes = {name: _number_if_square(getattr(config, f"{name}_shape")) for name in ("image", "patch")}
    stock = ViTConfig(
        **fields,
        image_size=sizes["image"],
        patch_size=sizes["patch"],
        encoder_stride=config.patch_shape[0],
        pooler_output_size=config.representation_size,
        architectures=[STOCK[checkpoint.architecture]],
        dtype=str(checkpoint.dtype).removeprefix("torch."),
    )
    with new_folder(out, force) as folder:
        _write_folder(checkpoint, rules, folder, json.loads(stock.to_json_string(use_diff=False)))
        preprocessing = _stock_preprocessing(checkpoint.processor())
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing, indent=2) + "\n", encoding="utf-8")


def _number_if_square(size: tuple[int, int]) -> int | list[int]:
    return size[0] if size[0] == size[1] else list(size)


def _stock_preprocessing(processor: HFViTImageProcessorPil) -> dict[str, Any]:
    """Return the same preprocessing for a class of transformers: one that resizes, or one that also crops."""
    described = processor.to_dict()
    names = ["do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor"]
    names += ["do_normalize", "image_mean", "image_std", "do_convert_rgb"]
    stock = {name: described[name] for name in names if described.get(name) is not None}
    if described.get("crop_pct") is not None and stock["do_resize"]:
        edge = math.floor(stock["size"]["height"] / described["crop_pct"])
        stock.update(do_center_crop=True, crop_size=stock["size"], size={"shortest_edge": edge})
    crops = stock.get("do_center_crop")
    return {"image_processor_type": "CLIPImageProcessor" if crops else "ViTImageProcessor", **stock}
