"""Exported models compute in stock transformers and timm what they compute here, and come back bit for bit."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import family
import numpy as np
import pytest
import timm
import torch
import transformers
from isolated import python
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_sample_image
from timm.data import create_transform, resolve_model_data_config
from timm.models._hub import save_for_hf
from torch import Tensor, nn
from transformers import AutoImageProcessor, ViTConfig
from transformers.utils import is_torchvision_greater_or_equal
from typer.testing import CliRunner

import hf_vit
from hf_vit import HFViTConfig, HFViTImageProcessorPil, HFViTModel
from hf_vit.checkpoints import Checkpoint, Options, open_checkpoint, write_checkpoint, writing
from hf_vit.checkpoints.export import export_checkpoint
from hf_vit.checkpoints.families import google_out, timm_out
from hf_vit.cli.main import app

CLASSIFIER, ENCODER, MASKED = "HFViTForImageClassification", "HFViTModel", "HFViTForMaskedImageModeling"
TINY = {**family.TINY, "num_labels": 5}
# What each target has a word for beside the architecture, so that a config can come back equal.
OF_A_TARGET: dict[str, dict[str, Any]] = {
    "transformers": {"position_interpolation": "bicubic"},
    "timm": {},
    "npz": {"hidden_act": "gelu_pytorch_tanh", "position_interpolation": "bilinear_corners"},
}
TOLERANCE = 1e-5


def make(architecture: str = CLASSIFIER, dtype: torch.dtype = torch.float32, **fields: Any) -> nn.Module:
    """Build a tiny model of ours with random numbers in every tensor; in eval."""
    model = getattr(hf_vit, architecture)(HFViTConfig(**{**TINY, **fields})).eval()
    model.config.architectures = [architecture]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=float("norm" in name and name.endswith("weight")), std=0.3 / fill(parameter))
    return model.to(dtype)


def write(folder: Path, model: nn.Module) -> Path:
    """Write a model as `save_pretrained` does, but for the code; return the folder."""
    folder.mkdir()
    (folder / "config.json").write_text(model.config.to_json_string(use_diff=False))
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def save(folder: Path, processor: HFViTImageProcessorPil | None = None, **fields: Any) -> Path:
    """Write a tiny model, and its processor if one is given; return the folder."""
    write(folder, make(**fields))
    if processor is not None:
        processor.save_pretrained(folder)
    return folder


def fill(parameter: Tensor) -> float:
    """Return how many times wider than the tiny model a matrix is, as a standard deviation."""
    return max(parameter.shape[-1] / 64, 1) ** 0.5 if parameter.ndim == 2 else 1.0


def pixels_for(model: nn.Module) -> Tensor:
    config = model.config
    return torch.randn(2, config.num_channels, *config.image_shape, generator=torch.Generator().manual_seed(1))


def distance(actual: Tensor, expected: Tensor) -> float:
    """Return the relative distance, L2."""
    assert actual.shape == expected.shape and expected.norm() > 0.1
    return ((actual - expected).norm() / expected.norm()).item()


def assert_same_model(written: Checkpoint, source: Checkpoint | nn.Module) -> None:
    """All fields of the config and all tensors are equal, bit for bit."""
    assert facts(written.config) == facts(source.config)
    assert written.architecture == source.config.architectures[0]
    if written.architecture == CLASSIFIER:
        assert written.config.id2label == source.config.id2label
    assert_same_tensors(written.state_dict(), source.state_dict())


def facts(config: HFViTConfig) -> dict[str, Any]:
    """Return all fields of a config, however they are said."""
    said = {"image_size": "image_shape", "patch_size": "patch_shape", "head_dim": "head_width"}
    names = [name for name in HFViTConfig.__annotations__ if not name.startswith(("_", "model_type"))]
    return {name: getattr(config, said.get(name, name)) for name in names}


def assert_same_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    """A photograph of 400x640 pixels."""
    return Image.fromarray(load_sample_image("china.jpg")[:400])


# ------------------------------------------------------------------------------------------------- transformers

STOCK: dict[str, dict[str, Any]] = {
    "classifier": {},
    "no qkv_bias, relu, head_dim": {"qkv_bias": False, "hidden_act": "relu", "head_dim": 8, "initializer_range": 1},
    "rectangular patches, stock's epsilon": {"image_size": (24, 40), "patch_size": (8, 4), "layer_norm_eps": 1e-12},
    "one pixel size, other patches": {"image_size": 32, "patch_size": (16, 8)},
    "encoder": {"architecture": ENCODER},
    "encoder with pre-logits": {"architecture": ENCODER, "representation_size": 24},
    "encoder with pre-logits of the model's width": {"architecture": ENCODER, "representation_size": 32},
    "masked, five channels": {"architecture": MASKED, "num_channels": 5},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16 encoder": {"architecture": ENCODER, "dtype": torch.float16},
}
STOCK_CLASSES = {
    CLASSIFIER: "AutoModelForImageClassification",
    ENCODER: "AutoModel",
    MASKED: "AutoModelForMaskedImageModeling",
}


@pytest.mark.parametrize("fields", STOCK.values(), ids=STOCK)
def test_stock_vit_computes_the_same(tmp_path: Path, fields: dict[str, Any]) -> None:
    ours = make(**{**OF_A_TARGET["transformers"], **fields})
    notes = export_checkpoint(write(tmp_path / "ours", ours), tmp_path / "out", "transformers")
    assert_same_model(open_checkpoint(tmp_path / "out"), ours)
    ours = ours.float()
    has_pooler = fields.get("architecture") != ENCODER or "representation_size" in fields
    arguments = {} if has_pooler else {"add_pooling_layer": False}
    assert notes == ([] if has_pooler else [note for note in notes if "add_pooling_layer=False" in note])
    auto_class = getattr(transformers, STOCK_CLASSES[fields.get("architecture", CLASSIFIER)])
    stock, info = auto_class.from_pretrained(tmp_path / "out", output_loading_info=True, dtype="auto", **arguments)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert stock.config.model_type == "vit" and stock.dtype == fields.get("dtype", torch.float32)
    stock = stock.float().eval()
    pixels = pixels_for(ours)
    given = {}
    if fields.get("architecture") == MASKED:
        given = {"bool_masked_pos": torch.rand(2, 16) > 0.5}
    with torch.no_grad():
        expected, actual = (model(pixels, output_hidden_states=True, **given) for model in (ours, stock))
    names = ["logits", "reconstruction", "last_hidden_state"] + ["pooler_output"] * has_pooler
    pairs = [(actual[name], expected[name]) for name in names if name in expected]
    assert pairs
    for got, wanted in [*pairs, *zip(actual.hidden_states, expected.hidden_states, strict=True)]:
        assert distance(got, wanted) < TOLERANCE


PIPELINE = """
import json, sys
from pathlib import Path
import numpy as np
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, pipeline

picture, *folders = sys.argv[1:]
for folder in folders:
    assert AutoConfig.from_pretrained(folder).model_type == "vit"
    pixels = AutoImageProcessor.from_pretrained(folder)(Image.open(picture), return_tensors="np").pixel_values
    np.save(Path(folder) / "pixels.npy", pixels)
    if Path(folder).name in ("original", "timm", "center_crop"):
        answer = pipeline("image-classification", model=folder, top_k=None)(picture)
        (Path(folder) / "answer.json").write_text(json.dumps(answer))
assert "hf_vit" not in sys.modules
"""
LABELS = {0: "temple", 1: "lake", 2: "tree", 3: "Straße", 4: "boat"}
IDS = {name: number for number, name in LABELS.items()}
# Processors of a model of 32x32 pixels, and by how many pixels stock's crop may be off.
PROCESSORS: dict[str, tuple[dict[str, Any], int]] = {
    "original": ({"name": "original"}, 0),
    "timm": ({"name": "timm", "size": (36, 36)}, 0),  # of 40
    "timm with an odd margin": ({"name": "timm"}, 1),  # of 35
    "center_crop": ({"name": "center_crop"}, 0),  # of 36
    "rectangle": ({"name": "original", "size": (24, 40)}, 0),
    "shorter side and crop": (
        {"name": "original", "size": {"shortest_edge": 48}, "do_center_crop": True, "crop_size": (24, 40)},
        0,
    ),
    "squash and crop": ({"name": "center_crop", "crop_pct": None, "size": 45, "do_center_crop": True}, 0),
    "crop alone": ({"name": "original", "do_resize": False, "do_center_crop": True}, 0),
    "bicubic, own numbers": ({"name": "original", "resample": 3, "image_mean": [0.1, 0.2, 0.3]}, 0),
    "not normalised": ({"name": "original", "do_normalize": False}, 0),
    "other factor": ({"name": "original", "rescale_factor": 1 / 127.5}, 0),
    "nearest": ({"name": "original", "resample": 0}, 0),
    "lanczos": ({"name": "original", "resample": 1}, 0),
}


def processor_of(case: dict[str, Any], image: tuple[int, int] = (32, 32)) -> HFViTImageProcessorPil:
    arguments = {"size": image, **case}
    if arguments.get("do_center_crop"):
        arguments.setdefault("crop_size", image)
    size = arguments.pop("size")
    return HFViTImageProcessorPil.from_preset(arguments.pop("name"), size, **arguments)


def image_of(case: dict[str, Any]) -> tuple[int, int]:
    sizes = (case.get("crop_size"), case.get("size"))
    return next((size for size in sizes if isinstance(size, tuple)), (32, 32))


def levels(pixels: np.ndarray, processor: HFViTImageProcessorPil) -> np.ndarray:
    """Undo the normalisation: pixels of 0 to 255."""
    if processor.do_normalize:
        std, mean = (np.array(values).reshape(-1, 1, 1) for values in (processor.image_std, processor.image_mean))
        pixels = pixels * std + mean
    return pixels / (processor.rescale_factor if processor.do_rescale else 1)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory, picture: Image.Image) -> Path:
    """Export a classifier for every processor, and use it in a process that cannot import this package."""
    home = tmp_path_factory.mktemp("elsewhere")
    picture.save(home / "picture.png")
    torch.manual_seed(0)
    for name, (case, _) in PROCESSORS.items():
        patch = 12 if "size" in case and case["size"] == (36, 36) else 8
        fields = {"image_size": image_of(case), "patch_size": patch, "id2label": LABELS, "label2id": IDS}
        source = save(home / f"ours {name}", processor=processor_of(case, image_of(case)), **fields)
        export_checkpoint(source, home / name, "transformers")
    python(PIPELINE, home / "picture.png", *(home / name for name in PROCESSORS), home=home)
    return home


@pytest.mark.parametrize("name", PROCESSORS)
def test_stock_processor_gives_the_pixels(elsewhere: Path, picture: Image.Image, name: str) -> None:
    case, may_be_off = PROCESSORS[name]
    if name == "lanczos" and not is_torchvision_greater_or_equal("0.27"):
        case = {**case, "resample": 3}  # the stock processor takes bicubic there, and says so
    processor = processor_of(case, image_of(case))
    expected = levels(processor(picture, return_tensors="np").pixel_values, processor)
    actual = levels(np.load(elsewhere / name / "pixels.npy"), processor)
    assert actual.shape == expected.shape
    near = abs(actual - expected).max()
    if may_be_off:
        size, inner = expected.shape[-1], expected[..., :-1, :-1]
        shifts = [(y, x) for y in range(2) for x in range(2)]
        near = min(abs(actual[..., y : size - 1 + y, x : size - 1 + x] - inner).max() for y, x in shifts)
    assert near < 1.01


@pytest.mark.parametrize("name", ["original", "timm", "center_crop"])
def test_pipeline_gives_the_same_answers_without_this_package(elsewhere: Path, name: str) -> None:
    pipeline = transformers.pipeline("image-classification", model=str(elsewhere / f"ours {name}"), top_k=None)
    expected = {answer["label"]: answer["score"] for answer in pipeline(str(elsewhere / "picture.png"))}
    answer = {
        answer["label"]: answer["score"] for answer in json.loads((elsewhere / name / "answer.json").read_text())
    }
    assert list(answer) == list(expected) and answer.keys() == set(LABELS.values())
    assert answer == pytest.approx(expected, abs=1e-3)
    assert ViTConfig.from_pretrained(elsewhere / name).id2label == LABELS


# --------------------------------------------------------------------------------------------------------- timm

NO_CLASS_TOKEN = {"pooling": "mean"}
RELATIVE = {"position_embedding_type": "relative", "position_interpolation": "geometric_bilinear"}
DISTILLED = {"pooling": "cls_and_distillation"}
GATED = {"use_gated_mlp": True, "hidden_act": "silu"}
TIMM: dict[str, dict[str, Any]] = {
    "cls": {},
    "mean": NO_CLASS_TOKEN,
    "mean beside a class token": {**NO_CLASS_TOKEN, "use_cls_token": True},
    "mean of all": {"pooling": "mean_all", "use_cls_token": True},
    "attention": {"pooling": "attention"},
    "attention of all": {"pooling": "attention", "use_cls_token": True, "num_register_tokens": 2}
    | {"num_prefix_positions": 3},
    "attention of patches": {"pooling": "attention_patches", "use_cls_token": True},
    "distilled": DISTILLED,
    "distilled, encoder": {**DISTILLED, "architecture": ENCODER},
    "distilled, pre-norm, no final norm": {**DISTILLED, "use_pre_layernorm": True, "patch_bias": False}
    | {"final_layernorm": "none", "use_qk_norm": True, "layer_scale_init_value": 0.1},
    "registers": {"num_register_tokens": 3, "num_prefix_positions": 0},
    "registers with positions": {"num_register_tokens": 3, "num_prefix_positions": 4},
    "class token without position": {"num_prefix_positions": 0},
    "pre-norm": {"use_pre_layernorm": True, "patch_bias": False},
    "pre-norm of CLIP": {"use_pre_layernorm": True, "patch_bias": False, "layer_norm_eps": 1e-5},
    "norm pooled": {"final_layernorm": "pooled"},
    "no norm": {"final_layernorm": "none"},
    "other epsilon, attention, qk-norm": {"layer_norm_eps": 1e-5, "pooling": "attention", "use_qk_norm": True},
    "norms inside": {"use_attention_layernorm": True, "use_mlp_layernorm": True},
    "no positions, registers": {"position_embedding_type": "none", "num_register_tokens": 2},
    "relative, rectangle": {**RELATIVE, **NO_CLASS_TOKEN, "image_size": (24, 40)},
    "relative with biases of the prefix": {**RELATIVE, "num_prefix_positions": 1},
    "relative, everything": {**RELATIVE, "pooling": "mean", "use_cls_token": True, "num_prefix_positions": 1}
    | {"layer_scale_init_value": 0.1, "use_qk_norm": True, "qkv_bias": False, "final_layernorm": "pooled"},
    "relative, encoder": {**RELATIVE, **NO_CLASS_TOKEN, "architecture": ENCODER},
    "gated": GATED,
    "gated by gelu": {**GATED, "hidden_act": "gelu", "layer_scale_init_value": 0.1},
    "gated, odd width": {**GATED, "intermediate_size": 37},
    "gated, everything": {**GATED, "num_register_tokens": 2, "num_prefix_positions": 0, "use_qk_norm": True}
    | {"proj_bias": False, "mlp_bias": False, "qkv_bias": False, "pooling": "mean_all", "use_cls_token": True},
    "no qkv_bias": {"qkv_bias": False},
    "no other biases": {"proj_bias": False, "mlp_bias": False},
    "no biases, attention": {"qkv_bias": False, "proj_bias": False, "mlp_bias": False, "pooling": "attention"},
    "rectangular patches": {"image_size": (24, 40), "patch_size": (8, 4)},
    "one channel": {"num_channels": 1},
    "so400m's ratio": {
        "hidden_size": 288,
        "intermediate_size": 1076,
        "num_attention_heads": 4,
        "pooling": "attention",
    },
    "odd MLP": {"intermediate_size": 61},
    "encoder": {"architecture": ENCODER},
    "encoder, norm pooled": {"architecture": ENCODER, "pooling": "mean", "final_layernorm": "pooled"},
    "bfloat16": {"dtype": torch.bfloat16},
    "another activation": {"hidden_act": "quick_gelu"},
}


@pytest.mark.parametrize("fields", TIMM.values(), ids=TIMM)
def test_timm_computes_the_same(tmp_path: Path, fields: dict[str, Any]) -> None:
    ours = make(**fields)
    notes = export_checkpoint(write(tmp_path / "ours", ours), tmp_path / "out", "timm")
    assert_same_model(open_checkpoint(tmp_path / "out"), ours)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    stored = {name for name in theirs.state_dict() if "relative_position_index" not in name}
    assert tensors.keys() == stored and all(tensor.dtype == ours.dtype for tensor in tensors.values())
    ours = ours.float()
    pixels = pixels_for(ours)
    with torch.no_grad():
        expected, actual = ours(pixels), theirs(pixels)
    if "architecture" not in fields:
        assert theirs.num_classes == 5 and theirs.pretrained_cfg["label_names"] == [f"LABEL_{n}" for n in range(5)]
        assert distance(actual, expected.logits) < TOLERANCE
    elif fields.get("pooling") == "cls_and_distillation":
        assert theirs.num_classes == 0 and any("average of both tokens" in note for note in notes)
        assert distance(actual, expected.pooler_output.unflatten(1, (2, -1)).mean(dim=1)) < TOLERANCE
    else:
        assert theirs.num_classes == 0 and distance(actual, expected.pooler_output) < TOLERANCE


@pytest.mark.parametrize("name", timm_out.ACTIVATIONS)
def test_activations_are_timm_s(name: str) -> None:
    inputs = torch.linspace(-6, 6, 999)
    theirs = timm.layers.get_act_layer(timm_out.ACTIVATIONS[name])()
    torch.testing.assert_close(theirs(inputs.clone()), transformers.activations.ACT2FN[name](inputs))


@pytest.mark.parametrize(
    "fields", [{}, DISTILLED, {**RELATIVE, **NO_CLASS_TOKEN}], ids=["plain", "distilled", "relative"]
)
def test_timm_finetunes_the_folder(tmp_path: Path, fields: dict[str, Any]) -> None:
    export_checkpoint(save(tmp_path / "ours", **fields), tmp_path / "out", "timm")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=7)
    assert model(torch.randn(2, 3, 32, 32)).shape[-1] == 7
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(model.state_dict()["blocks.0.mlp.fc1.weight"], stored["blocks.0.mlp.fc1.weight"])


TIMM_PROCESSORS: dict[str, tuple[dict[str, Any], int]] = {
    "original": ({"name": "original"}, 0),
    "timm": ({"name": "timm"}, 0),
    "center_crop": ({"name": "center_crop"}, 0),
    "rectangle": ({"name": "original", "size": (24, 40)}, 0),
    "crop to a rectangle": ({"name": "timm", "size": (24, 40)}, 0),
    "shorter side and crop": (
        {"name": "center_crop", "crop_pct": None, "size": {"shortest_edge": 36}, "do_center_crop": True},
        0,
    ),
    "shorter side, no margin": (
        {"name": "center_crop", "crop_pct": None, "size": {"shortest_edge": 32}, "do_center_crop": True},
        1,
    ),
    "squash and crop": ({"name": "center_crop", "crop_pct": None, "size": 36, "do_center_crop": True}, 0),
    "squash and crop to a rectangle": (
        {"name": "original", "size": (30, 50), "do_center_crop": True, "crop_size": (24, 40)},
        0,
    ),
    "not normalised": ({"name": "original", "do_normalize": False}, 0),
    "lanczos": ({"name": "timm", "resample": 1}, 0),
    "nearest": ({"name": "timm", "resample": 0}, 0),
    "box": ({"name": "timm", "resample": 4}, 0),
    "gray": ({"name": "original", "do_grayscale": True}, 0),
}


@pytest.mark.parametrize("name", TIMM_PROCESSORS)
def test_timm_s_transforms_give_the_pixels(tmp_path: Path, picture: Image.Image, name: str) -> None:
    case, may_be_off = TIMM_PROCESSORS[name]
    image = image_of(case)
    processor = processor_of(case, image)
    channels = 1 if processor.do_grayscale else 3
    source = save(tmp_path / "ours", processor=processor, image_size=image, num_channels=channels)
    notes = export_checkpoint(source, tmp_path / "out", "timm")
    assert any("pixel further" in note for note in notes) == bool(processor.do_center_crop)
    assert any("mode L" in note for note in notes) == (channels == 1)
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    transform = create_transform(**resolve_model_data_config(model))
    actual = transform(picture.convert("L") if channels == 1 else picture)
    expected = torch.from_numpy(processor(picture, return_tensors="np").pixel_values[0])
    assert actual.shape == expected.shape == (channels, *image)
    if may_be_off:
        actual, expected = actual[..., :-1], expected[..., 1:]
    assert (actual - expected).abs().max() < 1e-5
    again = open_checkpoint(tmp_path / "out").processor()(picture, return_tensors="np").pixel_values[0]
    assert may_be_off or np.allclose(again, processor(picture, return_tensors="np").pixel_values[0], atol=1e-6)


def test_every_crop_of_a_shorter_side_is_said() -> None:
    for edge in range(32, 999):
        share, mode = hf_vit.checkpoints.families.timm_out.crop(
            {"do_center_crop": True, "size": {"shortest_edge": edge}}, (32, 32)
        )
        assert mode == "center" and np.floor(32 / share) == edge


# ---------------------------------------------------------------------------------------------------------- npz

BLOCK = "Transformer/encoderblock_{}"
NAMES = {
    "embedding/kernel",
    "embedding/bias",
    "Transformer/encoder_norm/scale",
    "Transformer/encoder_norm/bias",
    *(
        f"{BLOCK.format(block)}/{part}"
        for block in range(2)
        for part in (
            *("LayerNorm_0/scale", "LayerNorm_0/bias", "LayerNorm_1/scale", "LayerNorm_1/bias"),
            *(
                f"MultiHeadDotProductAttention_0/{name}/{kind}"
                for name in ("query", "key", "value", "out")
                for kind in ("kernel", "bias")
            ),
            *(f"MlpBlock_0/Dense_{number}/{kind}" for number in range(2) for kind in ("kernel", "bias")),
        )
    ),
}
HEAD, PRE_LOGITS = {"head/kernel", "head/bias"}, {"pre_logits/kernel", "pre_logits/bias"}
OLD_PLACE, PLACE = {"Transformer/posembed_input/pos_embedding"}, {"pos_embedding"}
MAP_HEAD = {
    "MAPHead_0/probe",
    *(
        f"MAPHead_0/{part}"
        for part in (
            *("LayerNorm_0/scale", "LayerNorm_0/bias"),
            *(
                f"MultiHeadDotProductAttention_0/{name}/{kind}"
                for name in ("query", "key", "value", "out")
                for kind in ("kernel", "bias")
            ),
            *(f"MlpBlock_0/Dense_{number}/{kind}" for number in range(2) for kind in ("kernel", "bias")),
        )
    ),
}
ROOT = {"conv_root/kernel", "gn_root/scale", "gn_root/bias"}
UNITS = {
    f"block{block}/unit1/{part}"
    for block in (1, 2)
    for part in (
        *(f"conv{number}/kernel" for number in (1, 2, 3)),
        *(f"gn{number}/{kind}" for number in (1, 2, 3) for kind in ("scale", "bias")),
        *("conv_proj/kernel", "gn_proj/scale", "gn_proj/bias"),
    )
}
SINCOS = {"position_embedding_type": "sincos_2d", "position_interpolation": "bicubic_antialias"}
NPZ: dict[str, tuple[dict[str, Any], set[str]]] = {
    "token": ({}, {"cls"} | HEAD | OLD_PLACE),
    "token with pre-logits": ({"representation_size": 24}, {"cls"} | HEAD | OLD_PLACE | PRE_LOGITS),
    "token, no head": ({"architecture": ENCODER}, {"cls"} | OLD_PLACE),
    "token, rectangle": ({"image_size": (24, 40), "patch_size": (8, 4)}, {"cls"} | HEAD | OLD_PLACE),
    "token without position": ({"num_prefix_positions": 0}, {"cls"} | HEAD | PLACE),
    "gap": ({"pooling": "mean"}, HEAD | OLD_PLACE),
    "gap, rectangle": ({"pooling": "mean", "image_size": (24, 40)}, HEAD | OLD_PLACE),
    "map": ({"pooling": "attention"}, HEAD | PLACE | MAP_HEAD),
    "map, no head": ({"pooling": "attention", "architecture": ENCODER}, PLACE | MAP_HEAD),
    "sincos, gap": ({**SINCOS, "pooling": "mean"}, HEAD),
    "sincos, token": (SINCOS, {"cls"} | HEAD),
    "sincos, map": ({**SINCOS, "pooling": "attention", "image_size": (24, 40)}, HEAD | MAP_HEAD),
    "hybrid": ({"stem_layers": [1, 1], "stem_width": 32}, {"cls"} | HEAD | OLD_PLACE | ROOT | UNITS),
    "hybrid of a root": ({"stem_layers": [], "stem_width": 32, "pooling": "mean"}, HEAD | OLD_PLACE | ROOT),
    "bfloat16": ({"dtype": torch.bfloat16}, {"cls"} | HEAD | OLD_PLACE),
    "float16, four channels": ({"dtype": torch.float16, "num_channels": 4}, {"cls"} | HEAD | OLD_PLACE),
}


@pytest.mark.parametrize("case", NPZ)
def test_npz_has_the_names_of_its_source(tmp_path: Path, case: str) -> None:
    fields, names = NPZ[case]
    ours, out = make(**{**OF_A_TARGET["npz"], **fields}), tmp_path / "out.npz"
    notes = export_checkpoint(write(tmp_path / "ours", ours), out, "npz")
    arrays = dict(np.load(out))
    assert arrays.keys() == NAMES | names
    kinds = {torch.bfloat16: "V2", torch.float16: "f2", torch.float32: "f4"}
    assert {array.dtype for array in arrays.values()} == {np.dtype(kinds[ours.dtype])}
    assert arrays[f"{BLOCK.format(1)}/MultiHeadDotProductAttention_0/out/kernel"].shape == (4, 8, 32)
    rows, columns = ours.config.grid_size
    is_open = rows != columns or "sincos" in case
    assert any("--image-size" in note for note in notes) == is_open
    assert any("labels" in note for note in notes) == ("architecture" not in fields)
    assert any("processor" in note for note in notes)
    again = open_checkpoint(out, Options(image_size=ours.config.image_shape) if is_open else None)
    assert_same_model(again, ours)


# ------------------------------------------------------------------------------------------------------ misfits

MISFITS: dict[str, dict[str, dict[str, Any]]] = {
    # What the message must say: the fields of the model.
    "transformers": {
        "position_placement='every_layer'": {"position_placement": "every_layer"},
        "position_embedding_type='sincos_2d'": {"position_embedding_type": "sincos_2d"},
        "position_embedding_type='learned_2d'": {"position_embedding_type": "learned_2d"},
        "position_embedding_type='rotary'": {"position_embedding_type": "rotary"},
        "position_embedding_type='relative'": RELATIVE,
        "position_embedding_type='none'": {"position_embedding_type": "none"},
        "pooling='mean'": {"pooling": "mean", "use_cls_token": True},
        "pooling='mean_all'": {"pooling": "mean_all", "architecture": ENCODER},
        "pooling='attention'": {"pooling": "attention"},
        "pooling='attention_patches'": {"pooling": "attention_patches"},
        "pooling='cls_and_mean'": {"pooling": "cls_and_mean"},
        "use_distillation_token=True": {"use_distillation_token": True},
        "num_register_tokens=2": {"num_register_tokens": 2},
        "num_prefix_positions=0": {"num_prefix_positions": 0},
        "final_layernorm='pooled'": {"final_layernorm": "pooled"},
        "final_layernorm='none'": {"final_layernorm": "none"},
        "stem_layers=[1]": {"stem_layers": [1], "stem_width": 32},
        "representation_size=24": {"representation_size": 24},
        "layer_scale_init_value=0.1": {"layer_scale_init_value": 0.1},
        "use_qk_norm=True": {"use_qk_norm": True},
        "use_mlp_layernorm=True": {"use_mlp_layernorm": True},
        "use_gated_mlp=True": {"use_gated_mlp": True},
        "use_pre_layernorm=True": {"use_pre_layernorm": True},
        "use_patch_layernorm=True": {"use_patch_layernorm": True},
        "use_output_projection=False": {"use_output_projection": False},
        "patch_bias=False": {"patch_bias": False},
        "proj_bias=False": {"proj_bias": False},
        "mlp_bias=False": {"mlp_bias": False},
        "head_dim=16": {"head_dim": 16},
        "HFViTBackbone": {"architecture": "HFViTBackbone"},
        "mim_objective='mean_color'": {"architecture": MASKED, "mim_objective": "mean_color", "num_channels": 1},
        "patch_size=(8, 4) in masked": {"architecture": MASKED, "patch_size": (8, 4)},
        "image_size=(24, 40) in masked": {"architecture": MASKED, "image_size": (24, 40)},
        "do_grayscale": {"num_channels": 1},
        "crop_pct=0.9": {"image_size": (24, 40), "processor": {"name": "timm", "size": (24, 40)}},
        "resample=BOX": {"processor": {"name": "original", "resample": 4}},
        "a processor that gives": {"processor": {"name": "original", "size": 40}},
    },
    "timm": {
        "position_embedding_type='sincos_2d'": {"position_embedding_type": "sincos_2d"},
        "position_embedding_type='learned_2d'": {"position_embedding_type": "learned_2d"},
        "position_embedding_type='rotary'": {"position_embedding_type": "rotary"},
        "pooling='cls_and_mean'": {"pooling": "cls_and_mean"},
        "distillation token without": {"use_distillation_token": True},
        "num_prefix_positions=1": {"num_register_tokens": 2},
        "stem_layers=[1]": {"stem_layers": [1], "stem_width": 32},
        "num_pooling_heads=2": {"num_pooling_heads": 2, "pooling": "attention"},
        "representation_size=24": {"representation_size": 24},
        "use_patch_layernorm=True": {"use_patch_layernorm": True},
        "use_output_projection=False": {"use_output_projection": False},
        "patch_bias=False": {"patch_bias": False},
        "patch_bias=True with use_pre_layernorm=True": {"use_pre_layernorm": True},
        "proj_bias=False with mlp_bias=True": {"proj_bias": False},
        "proj_bias=True with mlp_bias=False": {"mlp_bias": False},
        "head_dim=16": {"head_dim": 16},
        "hidden_act='hardswish'": {"hidden_act": "hardswish"},
        "layer_norm_eps=1e-12": {"layer_norm_eps": 1e-12},
        "layer_scale_init_value=0": {"layer_scale_init_value": 0},
        "HFViTForMaskedImageModeling": {"architecture": MASKED},
        "num_register_tokens=2 with relative": {**RELATIVE, "pooling": "mean", "num_register_tokens": 2}
        | {"num_prefix_positions": 2},
        "pooling='attention' with relative": {**RELATIVE, "pooling": "attention"},
        "pooling='mean_all' with relative": {**RELATIVE, "pooling": "mean_all"},
        "final_layernorm='none' with relative": {**RELATIVE, "pooling": "mean", "final_layernorm": "none"},
        "proj_bias=False with relative": {**RELATIVE, "pooling": "mean", "proj_bias": False, "mlp_bias": False},
        "layer_norm_eps=1e-05 with relative": {**RELATIVE, "pooling": "mean", "layer_norm_eps": 1e-5},
        "hidden_act='relu' with relative": {**RELATIVE, "pooling": "mean", "hidden_act": "relu"},
        "use_pre_layernorm=True with relative": {**RELATIVE, "pooling": "mean"}
        | {"use_pre_layernorm": True, "patch_bias": False},
        "relative positions with a class token": RELATIVE,
        "relative positions and a gated MLP": {**RELATIVE, **GATED, "hidden_act": "gelu", "pooling": "mean"},
        "a distillation token and a gated MLP": {**DISTILLED, **GATED},
        "num_register_tokens=2 with a distillation": {**DISTILLED, "num_register_tokens": 2}
        | {"num_prefix_positions": 4},
        "final_layernorm='pooled' with a distillation": {**DISTILLED, "final_layernorm": "pooled"},
        "position_embedding_type='none' with a dist": {**DISTILLED, "position_embedding_type": "none"},
        "layer_norm_eps=1e-05 with a distillation": {**DISTILLED, "layer_norm_eps": 1e-5},
        "num_prefix_positions=0 with a distillation": {**DISTILLED, "num_prefix_positions": 0},
        "pooling='attention' with a gated MLP": {**GATED, "pooling": "attention"},
        "layer_norm_eps=1e-05 with a gated MLP": {**GATED, "layer_norm_eps": 1e-5},
        "do_resize=False": {"processor": {"name": "original", "do_resize": False}},
        "rescale_factor": {"processor": {"name": "original", "rescale_factor": 1 / 127.5}},
        "a processor that gives": {"processor": {"name": "original", "size": 37}},
        "a crop of (24, 40)": {
            "image_size": (24, 40),
            "processor": {"name": "original", "size": {"shortest_edge": 48}, "do_center_crop": True}
            | {"crop_size": (24, 40)},
        },
        "a crop of (32, 32)": {
            "processor": {"name": "original", "size": (36, 64), "do_center_crop": True, "crop_size": 32}
        },
        "a crop of (32, 32) from {'shortest_edge': 24}": {
            "processor": {"name": "original", "size": {"shortest_edge": 24}, "do_center_crop": True, "crop_size": 32}
        },
    },
    "npz": {
        "position_embedding_type='learned_2d'": {"position_embedding_type": "learned_2d"},
        "position_embedding_type='rotary'": {"position_embedding_type": "rotary"},
        "position_embedding_type='relative'": RELATIVE,
        "position_embedding_type='none'": {"position_embedding_type": "none"},
        "pooling='mean_all'": {"pooling": "mean_all"},
        "pooling='attention_patches'": {"pooling": "attention_patches"},
        "pooling='cls_and_mean'": {"pooling": "cls_and_mean"},
        "pooling='cls_and_distillation'": DISTILLED,
        "pooling='mean' with a class token": {"pooling": "mean", "use_cls_token": True},
        "pooling='attention' with a class token": {"pooling": "attention", "use_cls_token": True},
        "num_register_tokens=2": {"num_register_tokens": 2},
        "final_layernorm='none'": {"final_layernorm": "none"},
        "final_layernorm='pooled'": {"final_layernorm": "pooled"},
        "layer_scale_init_value=0.1": {"layer_scale_init_value": 0.1},
        "use_qk_norm=True": {"use_qk_norm": True},
        "use_mlp_layernorm=True": {"use_mlp_layernorm": True},
        "use_gated_mlp=True": {"use_gated_mlp": True},
        "use_pre_layernorm=True": {"use_pre_layernorm": True},
        "use_patch_layernorm=True": {"use_patch_layernorm": True},
        "use_output_projection=False": {"use_output_projection": False},
        "patch_bias=False": {"patch_bias": False},
        "qkv_bias=False": {"qkv_bias": False},
        "proj_bias=False": {"proj_bias": False},
        "mlp_bias=False": {"mlp_bias": False},
        "head_dim=16": {"head_dim": 16},
        "hidden_act='gelu'": {"hidden_act": "gelu"},
        "layer_norm_eps=1e-05": {"layer_norm_eps": 1e-5},
        "HFViTForMaskedImageModeling": {"architecture": MASKED},
        "stem_layers with attention": {"stem_layers": [1], "stem_width": 32, "pooling": "attention"},
    },
}


@pytest.mark.parametrize(("to", "said"), [(to, said) for to, cases in MISFITS.items() for said in cases])
def test_a_misfit_is_named(tmp_path: Path, to: str, said: str) -> None:
    fields = {**OF_A_TARGET[to], **MISFITS[to][said]}
    if "processor" in fields:
        fields["processor"] = processor_of(fields["processor"])
    source = save(tmp_path / "ours", **fields)
    with pytest.raises(ValueError, match=f"does not fit into {to}: ") as error:
        export_checkpoint(source, tmp_path / "out", to)
    misfits = str(error.value).partition(f"into {to}: ")[2].split("; ")
    assert any(said in misfit for misfit in misfits)
    # The class tokens of DeiT come as two features.
    assert len(misfits) <= 2
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


@pytest.mark.parametrize("to", MISFITS)
def test_all_misfits_are_named_at_once(tmp_path: Path, to: str) -> None:
    fields = {"use_patch_layernorm": True, "position_embedding_type": "rotary", "head_dim": 16}
    source = save(tmp_path / "ours", **{**OF_A_TARGET[to], **fields})
    with pytest.raises(ValueError) as error:
        export_checkpoint(source, tmp_path / "out", to)
    misfits = str(error.value).partition(f"into {to}: ")[2].removesuffix(".").split("; ")
    assert len(misfits) == 3
    for name in fields:
        assert any(misfit.startswith(f"{name}=") for misfit in misfits)


@pytest.mark.parametrize("to", MISFITS)
def test_what_does_not_change_the_model_is_noted(tmp_path: Path, to: str) -> None:
    beside = {
        "drop_path_rate": 0.1,
        "patch_dropout_prob": 0.1,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "initializer_range": 0.01,
        "zero_init_head": True,
        "problem_type": "multi_label_classification",
        "mim_objective": "mean_color",
        "out_features": ["stage1"],
        "apply_layernorm": False,
        "reshape_hidden_states": False,
        "position_interpolation": "bilinear",
    }
    carried = ["hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range", "problem_type"]
    fields = {**OF_A_TARGET[to], **beside}
    notes = export_checkpoint(save(tmp_path / "ours", **fields), tmp_path / "out", to)
    for name in beside:
        said = "not by bilinear" if name == "position_interpolation" else f"{name}="
        assert any(said in note for note in notes) != (to == "transformers" and name in carried), name
    if to == "transformers":
        config = ViTConfig.from_pretrained(tmp_path / "out")
        assert all(getattr(config, name) == beside[name] for name in carried)


# ------------------------------------------------------------------------------------------- from other libraries

STOCK_TINY = {name: value for name, value in TINY.items() if name != "num_labels"}
STOCK_SOURCES: dict[str, tuple[str, dict[str, Any]]] = {
    "ViTModel": ("ViTModel", {}),
    "ViTModel with narrow pooler": ("ViTModel", {"pooler_output_size": 24}),
    "ViTModel without pooler": ("ViTModel", {"add_pooling_layer": False}),
    "classifier": ("ViTForImageClassification", {"num_labels": 5, "layer_norm_eps": 1e-6}),
    "rectangle": ("ViTForImageClassification", {"image_size": (24, 40), "patch_size": (8, 4), "qkv_bias": False}),
    "masked": ("ViTForMaskedImageModeling", {"encoder_stride": 8}),
    "MSN": ("ViTMSNForImageClassification", {"num_labels": 5}),
}


def fill_randomly(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def stock(case: str) -> nn.Module:
    name, fields = STOCK_SOURCES[case]
    arguments = {"add_pooling_layer": False} if "add_pooling_layer" in fields else {}
    fields = {name: value for name, value in fields.items() if name not in arguments}
    model_class = getattr(transformers, name)
    return fill_randomly(model_class(model_class.config_class(**{**STOCK_TINY, **fields}), **arguments))


@pytest.mark.parametrize("case", STOCK_SOURCES)
def test_stock_comes_back(tmp_path: Path, case: str) -> None:
    model = stock(case)
    model.save_pretrained(tmp_path / "stock")
    source = open_checkpoint(tmp_path / "stock")
    write_checkpoint(source, tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "out", "transformers")
    assert_same_model(open_checkpoint(tmp_path / "out"), source)
    if case == "MSN":  # has another name of the model before its tensors
        again = transformers.ViTForImageClassification.from_pretrained(tmp_path / "out").eval()
        pixels = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            assert distance(again(pixels).logits, model(pixels).logits) < TOLERANCE
        return
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("stock", "out")]
    assert_same_tensors(*files)
    configs = [ViTConfig.from_pretrained(tmp_path / name) for name in ("stock", "out")]
    for name in ("hidden_size", "layer_norm_eps", "pooler_output_size", "id2label", "architectures", "dtype"):
        ours, theirs = (getattr(config, name) for config in configs)
        assert ours == theirs, name


TIMM_TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5}
TIMM_SOURCES: dict[str, tuple[str, dict[str, Any]]] = {
    "token": ("vit_base_patch16_224", {}),
    "clip": ("vit_base_patch16_clip_quickgelu_224", {}),
    "siglip": ("vit_base_patch16_siglip_224", {}),
    "deit distilled": ("deit_base_distilled_patch16_224", {}),
    "deit distilled, no head": ("deit_base_distilled_patch16_224", {"num_classes": 0}),
    "deit3": ("deit3_base_patch16_224", {}),
    "dinov2": ("vit_base_patch14_reg4_dinov2", {"num_classes": 0}),
    "dinov2 giant": ("vit_giant_patch14_reg4_dinov2", {}),
    "relative": ("vit_relpos_base_patch16_cls_224", {"rel_pos_type": "bias"}),
    "no positions": ("vit_base_patch16_224", {"pos_embed": "none"}),
    "rectangle": ("vit_base_patch16_224", {"img_size": (24, 40), "patch_size": (8, 4)}),
}


def timm_folder(case: str, folder: Path) -> nn.Module:
    architecture, arguments = TIMM_SOURCES[case]
    model = fill_randomly(timm.create_model(architecture, **{**TIMM_TINY, **arguments}))
    save_for_hf(model, str(folder), safe_serialization=True)
    return model


@pytest.mark.parametrize("case", TIMM_SOURCES)
def test_timm_comes_back(tmp_path: Path, case: str) -> None:
    timm_folder(case, tmp_path / "timm")
    source = open_checkpoint(tmp_path / "timm")
    write_checkpoint(source, tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "out", "timm")
    assert_same_model(open_checkpoint(tmp_path / "out"), source)
    stored, written = (load_file(tmp_path / name / "model.safetensors") for name in ("timm", "out"))
    assert_same_tensors(written, {name: stored[name] for name in stored if "relative_position_index" not in name})
    transforms = []
    for name in ("timm", "out"):
        model = timm.create_model(f"local-dir:{tmp_path / name}", pretrained=True)
        transforms.append(str(create_transform(**resolve_model_data_config(model))))
    assert transforms[0] == transforms[1]


def test_the_ending_of_a_file_names_the_format(tmp_path: Path) -> None:
    source = save(tmp_path / "ours", **{**OF_A_TARGET["npz"], **NPZ["token"][0]})
    failed = run(source, tmp_path / "out.bin")
    assert (
        failed.exit_code == 2
        and "does not end in .onnx, .xml, .pte, .pt2, .npz: add --to, one of onnx, " in failed.output
    )
    done = run(source, tmp_path / "out.npz")
    assert done.exit_code == 0 and (tmp_path / "out.npz").is_file(), done.output


def test_timm_resamples_positions_for_the_images_of_the_processor(tmp_path: Path) -> None:
    """As DINOv2: positions for 518x518 pixels, and a processor that crops 224x224."""
    timm_folder("dinov2", tmp_path / "timm")
    write_checkpoint(open_checkpoint(tmp_path / "timm"), tmp_path / "ours")
    stated = json.loads((tmp_path / "ours/preprocessor_config.json").read_text())
    stated |= {"crop_pct": None, "do_center_crop": True}
    stated |= {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}}
    (tmp_path / "ours/preprocessor_config.json").write_text(json.dumps(stated))
    sentences = export_checkpoint(tmp_path / "ours", tmp_path / "out", "timm")
    assert any("images of 16x16 pixels" in sentence and "of 32x32 pixels" in sentence for sentence in sentences)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    config = resolve_model_data_config(theirs)
    assert config["input_size"] == (3, 16, 16) and config["crop_pct"] == 0.8
    ours = HFViTModel.from_pretrained(tmp_path / "ours").eval()
    for side in (16, 32):
        pixels = torch.randn(2, 3, side, side)
        with torch.no_grad():
            assert distance(theirs(pixels), ours(pixels).pooler_output) < TOLERANCE
    again = open_checkpoint(tmp_path / "out")
    assert again.config.image_shape == (32, 32) and again.processor().crop_pct == 0.8


@pytest.mark.parametrize("case", ["token", "sincos, token", "bfloat16"])
def test_npz_comes_back(tmp_path: Path, case: str) -> None:
    export_checkpoint(save(tmp_path / "first", **{**OF_A_TARGET["npz"], **NPZ[case][0]}), tmp_path / "in.npz", "npz")
    options = Options(image_size=(32, 32)) if "sincos" in case else None
    source = open_checkpoint(tmp_path / "in.npz", options)
    write_checkpoint(source, tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "out.npz", "npz")
    assert_same_model(open_checkpoint(tmp_path / "out.npz", options), source)
    stored, written = (dict(np.load(tmp_path / name)) for name in ("in.npz", "out.npz"))
    assert stored.keys() == written.keys()
    assert all(stored[name].tobytes() == array.tobytes() for name, array in written.items())


def test_stock_s_epsilon_does_not_fit_into_timm(tmp_path: Path) -> None:
    stock("rectangle").save_pretrained(tmp_path / "stock")
    with pytest.raises(ValueError, match=r"layer_norm_eps=1e-12 \(only 1e-06 or 1e-05\)\.$"):
        export_checkpoint(tmp_path / "stock", tmp_path / "out", "timm")
    stock("classifier").save_pretrained(tmp_path / "stock")
    export_checkpoint(tmp_path / "stock", tmp_path / "out", "timm")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    theirs = transformers.ViTForImageClassification.from_pretrained(tmp_path / "stock").eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert distance(model(pixels), theirs(pixels).logits) < TOLERANCE


def test_timm_becomes_stock(tmp_path: Path, picture: Image.Image) -> None:
    model = timm_folder("token", tmp_path / "timm")
    export_checkpoint(tmp_path / "timm", tmp_path / "out", "transformers")
    theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    assert type(theirs).__name__ == "ViTForImageClassification" and theirs.config.layer_norm_eps == 1e-6
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert type(processor).__name__ == "CLIPImageProcessor" and processor.size.shortest_edge == 35  # of 0.9
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert distance(theirs(pixels).logits, model(pixels)) < TOLERANCE


# ------------------------------------------------------------------------------------------------------ the command

OUT = {"transformers": "out", "timm": "out", "npz": "out.npz"}


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


def content(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    return {file.name: file.read_bytes() for file in files}


@pytest.mark.parametrize("to", OUT)
def test_what_lies_there_is_replaced_by_force_alone(tmp_path: Path, to: str) -> None:
    source, other = (save(tmp_path / name, **OF_A_TARGET[to]) for name in ("ours", "other"))
    out = tmp_path / OUT[to]
    first = run(source, out, "--to", to)
    assert first.exit_code == 0 and f"Wrote {out}" in first.output
    before = content(out)
    refused = run(other, out, "--to", to)
    assert refused.exit_code == 2 and "--force" in refused.output and len(refused.output.splitlines()) == 1
    assert content(out) == before
    assert run(other, out, "--to", to, "--force").exit_code == 0
    assert content(out).keys() == before.keys() and content(out) != before
    assert_same_tensors(open_checkpoint(out).state_dict(), open_checkpoint(other).state_dict())
    assert {path.name for path in tmp_path.iterdir()} == {"ours", "other", OUT[to]}


@pytest.mark.parametrize("to", OUT)
def test_what_is_no_model_is_never_replaced(tmp_path: Path, to: str) -> None:
    source, out = save(tmp_path / "ours", **OF_A_TARGET[to]), tmp_path / "photos"
    out.mkdir()
    (out / "photo.jpg").write_text("dear")
    refused = run(source, out, "--to", to, "--force")
    assert refused.exit_code == 2 and len(refused.output.splitlines()) == 1
    assert content(out) == {"photo.jpg": b"dear"} and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("to", OUT)
@pytest.mark.parametrize("force", [False, True])
def test_a_failure_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, force: bool
) -> None:
    source, out = save(tmp_path / "ours", **OF_A_TARGET[to]), tmp_path / OUT[to]
    before = {}
    if force:
        export_checkpoint(source, out, to)
        before = content(out)

    def fail(*arguments: Any) -> None:
        raise OSError("No space left on device")

    for module in (writing, google_out):
        monkeypatch.setattr(module, "verify", fail)
    failed = run(source, out, "--to", to, *(["--force"] * force))
    assert failed.exit_code == 2 and "No space left" in failed.output
    assert content(out) == before if force else not out.exists()
    assert len(list(tmp_path.iterdir())) == 1 + force


@pytest.mark.parametrize("to", OUT)
def test_a_wrong_tensor_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str) -> None:
    source = save(tmp_path / "ours", **OF_A_TARGET[to])
    translated = writing.translated

    def wrong(*arguments: Any) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in translated(*arguments):
            yield name, tensor.flip(0) if "cls" in name or tensor.ndim == 1 else tensor

    for module in (writing, google_out):
        monkeypatch.setattr(module, "translated", wrong)
    with pytest.raises(AssertionError):
        export_checkpoint(source, tmp_path / OUT[to], to)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_the_command_says_what_is_wrong_in_a_line(tmp_path: Path) -> None:
    source = save(tmp_path / "ours", num_register_tokens=2)
    for arguments, said in {
        (
            source,
            "--to",
            "tflite",
        ): "Unknown format 'tflite' for --to: choose one of onnx, openvino, executorch, torch-export, ",
        (
            source,
            "--to",
            "timm",
            "--int8",
            "weights",
        ): "--int8, --precision, --data, --calibration and --with-preprocessing apply only to onnx",
        (source, "--to", "transformers"): "does not fit into transformers: num_register_tokens=2",
        (tmp_path / "nothing", "--to", "timm"): "nothing",
    }.items():
        result = run(arguments[0], tmp_path / "out", *arguments[1:])
        assert result.exit_code == 2 and said in result.output and len(result.output.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_what_was_assumed_and_left_out_is_said(tmp_path: Path) -> None:
    export_checkpoint(save(tmp_path / "ours"), tmp_path / "timm", "timm")
    tensors = load_file(tmp_path / "timm" / "model.safetensors")
    save_file({**tensors, "mask_token": torch.zeros(1, 1, 32)}, tmp_path / "timm" / "model.safetensors")
    config = json.loads((tmp_path / "timm" / "config.json").read_text())
    (tmp_path / "timm" / "config.json").write_text(json.dumps({**config, "architecture": "my_vit"}))
    notes = export_checkpoint(tmp_path / "timm", tmp_path / "out", "transformers")
    assert any(note.startswith("Assumed: ") and "layer_norm_eps" in note for note in notes)
    assert any(note.startswith("Left out: ") and "'mask_token'" in note for note in notes)


def test_a_model_can_be_exported_over_itself(tmp_path: Path) -> None:
    folder = save(tmp_path / "model")
    before = open_checkpoint(folder).state_dict()
    assert run(folder, folder, "--to", "timm", "--force").exit_code == 0
    assert_same_tensors(open_checkpoint(folder).state_dict(), before)
    assert json.loads((folder / "config.json").read_text())["architecture"] == "vit_base_patch16_224"
