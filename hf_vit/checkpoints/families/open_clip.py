"""The image tower of CLIP with the names of its authors: OpenAI, open_clip, MetaCLIP 1 and 2, and DFN.

Names and forwards are those of openai/CLIP, clip/model.py, and of mlfoundations/open_clip, transformer.py. The
projection to the space of the texts does not belong to the encoder and is left out. `open_clip_config.json` beside the
weights states what the tensors do not determine.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ...model.image_processing_pil_hf_vit import BICUBIC
from ..checkpoint import Family, Options, Reading
from ..files import OPEN_CLIP_CONFIG as CONFIG
from ..files import Source, read_json
from ..layouts import Row, convolution, flat_positions, token
from .plain import CLS_TOKEN, POSITIONS, PROJECTION, Library, Preprocessing, multihead_attention, read

LAYER = "transformer.resblocks.{}."
TABLE = [
    Row(CLS_TOKEN, "class_embedding", token),
    Row(POSITIONS, "positional_embedding", flat_positions),
    Row(f"{PROJECTION}.weight", "conv1.weight", convolution),
    Row("pre_layernorm.*", "ln_pre.*"),
    Row("layers.{}.layernorm_before.*", f"{LAYER}ln_1.*"),
    *multihead_attention(f"{LAYER}attn"),
    Row("layers.{}.attention_scale.weight", f"{LAYER}ls_1.gamma"),
    Row("layers.{}.layernorm_after.*", f"{LAYER}ln_2.*"),
    Row("layers.{}.mlp.fc1.*", f"{LAYER}mlp.c_fc.*"),
    Row("layers.{}.mlp.fc2.*", f"{LAYER}mlp.c_proj.*"),
    Row("layers.{}.mlp_scale.weight", f"{LAYER}ls_2.gamma"),
    Row("pooler.layernorm.*", "ln_post.*"),
    Row("layernorm.*", "ln_post.*"),
    Row("classifier.*", "head.*"),
]
# Entries of OpenAI's archives with sizes of the texts and the images.
SIZES = ("input_resolution", "context_length", "vocab_size")


def preprocessing(fields: Mapping[str, Any]) -> Preprocessing:
    """Return the preprocessing of `clip.load`, clip/clip.py `_transform`."""
    arguments = {"crop_pct": 1.0, "resample": BICUBIC, "image_mean": OPENAI_CLIP_MEAN, "image_std": OPENAI_CLIP_STD}
    return {"name": "center_crop", **arguments}, "bicubic, crop_pct 1, OpenAI's mean and standard deviation"


LIBRARY = Library(
    name="open_clip",
    marks=("class_embedding", "positional_embedding", "conv1.weight", f"{LAYER.format(0)}mlp.c_fc.weight"),
    table=TABLE,
    layer_norm_eps=1e-5,
    preprocessing=preprocessing,
    left_out=(
        *("proj", r"text_projection(\..*)?", r"logit_(scale|bias)", r"token_embedding\.weight", r"ln_final\..*"),
        *(r"text\..*", "attn_mask", "|".join(SIZES)),
    ),
    refused={r"attn_pool\..*": "attentional pooling (CoCa)"},
    fields={"final_layernorm": "pooled"},
)


def _read(source: Source, options: Options) -> Reading:
    path = source.folder / CONFIG if source.folder is not None else None
    config = read_json(path) if path is not None and path.is_file() else {}
    library, assumed = LIBRARY, []
    if {"proj", "head.weight"} <= source.tensors.keys():
        assumed.append("The head reads the projection to the space of the texts; both are left out.")
        library = replace(LIBRARY, table=TABLE[:-1], left_out=(*LIBRARY.left_out, r"head\..*"))
    if config:
        if config.get("preprocess_cfg", {}).get("resize_mode") == "longest":
            assumed.append("Images are centre-cropped; open_clip would add borders instead (resize_mode longest).")
        return read(source, options, library, _stated(source, config), _processor(source, config), assumed)
    stated: dict[str, Any] = {}
    has_pre_layernorm = "ln_pre.weight" in source.tensors
    if not has_pre_layernorm and options.pooling is None:
        stated["pooling"] = "mean"
        assumed.append("pooling mean, as in CLIPA, which has no LayerNorm before the layers either (--pooling).")
    if options.hidden_act is None:
        is_openai = has_pre_layernorm and _is_openai(source)
        stated["hidden_act"] = "quick_gelu" if is_openai else "gelu"
        assumed.append(
            "hidden_act quick_gelu, as in OpenAI's models: the file has their dtypes or sizes (--hidden-act)."
            if is_openai
            else "hidden_act gelu: the file does not store it, and models of OpenAI and DFN, of MetaCLIP 1, and those "
            "called quickgelu have another (--hidden-act quick_gelu)."
        )
    return read(source, options, library, stated, assumed=assumed)


def _is_openai(source: Source) -> bool:
    """Return whether a file has OpenAI's sizes, or their dtypes: float16 except for LayerNorm."""
    weight, norm = source.tensors["conv1.weight"], source.tensors["ln_pre.weight"]
    return any(name in source.tensors for name in SIZES) or (weight.dtype, norm.dtype) == (
        torch.float16,
        torch.float32,
    )


def _stated(source: Source, config: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that open_clip's config states.

    Raises:
        ValueError: For an option of open_clip that this package does not have.
    """
    model = config.get("model_cfg", {})
    vision = model.get("vision_cfg", {})
    activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
    activation_options, norm_options = (vision.get(name) or {} for name in ("act_kwargs", "norm_kwargs"))
    if activation_options == {"approximate": "tanh"}:
        activation = "gelu_pytorch_tanh"
    elif activation_options or norm_options.keys() - {"eps"}:
        raise ValueError(f"{source.name}: {CONFIG} has an unknown act_kwargs or norm_kwargs in its vision_cfg.")
    is_mean = vision.get("pool_type") == "avg"
    size = vision.get("image_size", 224)
    return {
        "hidden_act": activation,
        "num_attention_heads": source.shape("conv1.weight")[0] // vision.get("head_width", 64),
        "layer_norm_eps": norm_options.get("eps", LIBRARY.layer_norm_eps),
        "image_size": (size, size) if isinstance(size, int) else tuple(size),
        "pooling": "mean" if is_mean else "cls",
        # For the class token, a LayerNorm before the pooling is the same as one after it.
        "final_layernorm": "tokens" if is_mean and not vision.get("final_ln_after_pool") else "pooled",
    }


def _processor(source: Source, config: dict[str, Any]) -> dict[str, Any]:
    """Return the preprocessing that open_clip's config states, or its defaults."""
    stated = config.get("preprocess_cfg", {})
    arguments, _ = preprocessing({})
    for ours, theirs in (("image_mean", "mean"), ("image_std", "std")):
        arguments[ours] = stated.get(theirs, arguments[ours])
    if interpolation := stated.get("interpolation"):
        if interpolation.upper() not in ("BICUBIC", "BILINEAR"):
            raise ValueError(f"{source.name}: interpolation={interpolation!r} in {CONFIG} is not supported.")
        arguments["resample"] = Image.Resampling[interpolation.upper()]
    if stated.get("resize_mode") == "squash":
        arguments["crop_pct"] = None
    return arguments


FAMILY = Family(LIBRARY.name, LIBRARY.recognises, _read, heads=("head",))
