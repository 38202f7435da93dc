"""Google's and big_vision's npz checkpoints: what the original code computed with them, and the way back to npz.

The cases of golden/google were written by the original code; its README says how.
"""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_vit.checkpoints import Checkpoint, Options, open_checkpoint, write_checkpoint
from hf_vit.checkpoints.export import export_checkpoint
from hf_vit.checkpoints.families.google import ROOTS
from hf_vit.checkpoints.layouts import resample_patch_projection
from hf_vit.model import model_class

GOLDEN = Path(__file__).parent / "golden" / "google"
TOLERANCE = 1e-5  # of the golden cases: the other form of GELU gives 1e-4
COMMON = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "patch_shape": (8, 8),
    "image_shape": (32, 32),
    "num_labels": 5,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "position_embedding_type": "learned",
    "position_interpolation": "bilinear_corners",
    "representation_size": None,
    "stem_layers": None,
}
TOKEN = {"pooling": "cls", "use_cls_token": True, "num_prefix_positions": 1}
TOKEN_WITHOUT_POSITION = {**TOKEN, "num_prefix_positions": 0}
GAP = {"pooling": "mean", "use_cls_token": False, "num_prefix_positions": 0}
MAP = {"pooling": "attention", "use_cls_token": False, "num_prefix_positions": 0}
FACTS: dict[str, dict[str, Any]] = {
    "google_token": TOKEN,
    "google_token_pre_logits": {**TOKEN, "num_attention_heads": 2, "representation_size": 24},
    "google_gap": {**GAP, "patch_shape": (16, 16)},
    "google_headless": {**TOKEN, "num_labels": 2},  # transformers' default: there is no head
    "google_hybrid": {**TOKEN, "patch_shape": (8, 8), "stem_layers": [1, 1], "stem_width": 32},
    "google_rectangle": {**TOKEN, "image_shape": (16, 32), "grid_size": (2, 4)},
    "big_vision_gap": GAP,
    "big_vision_tok": TOKEN_WITHOUT_POSITION,
    "big_vision_map_training": MAP,
    "big_vision_scan": GAP,
    "big_vision_sincos": {
        **TOKEN_WITHOUT_POSITION,
        "position_embedding_type": "sincos_2d",
        "position_interpolation": "bicubic_antialias",  # the default: there is nothing to resample
        "image_shape": (24, 40),
        "grid_size": (3, 5),
    },
    "big_vision_cls_position": TOKEN,
    "big_vision_inline_probe": MAP,
    "big_vision_opt_target": GAP,
    "big_vision_bfloat16": GAP,
    "siglip": {**MAP, "num_labels": 2},
    "flexi_gap": GAP,
}
HEADLESS = ("google_headless", "siglip")
NAMES_OF_TODAY = (
    "google_token_pre_logits",
    "google_headless",
    "big_vision_tok",
    "big_vision_map_training",
    "big_vision_sincos",
    "siglip",
)


class Golden:
    """A case as the original code wrote it: the arrays of its file, and inputs with outputs."""

    def __init__(self, name: str) -> None:
        with np.load(GOLDEN / f"{name}.npz") as stored:
            meta = json.loads(str(stored["meta"]))
            values = stored["values"]
            self.runs = [
                (Options(**{option: tuple(value) for option, value in run.items()}), *self._tensors(stored, number))
                for number, run in enumerate(meta["runs"])
            ]
        self.name = name
        self.arrays: dict[str, np.ndarray] = {}
        start = 0
        for array, dtype, shape in meta["arrays"]:
            end = start + int(np.prod(shape))
            self.arrays[array] = _as_stored(values[start:end].reshape(shape), dtype)
            start = end
        assert start == len(values)

    @staticmethod
    def _tensors(stored: Any, number: int) -> tuple[Tensor, Tensor]:
        pixels = torch.from_numpy(stored[f"input_{number}"]).float()  # [B, H, W, C]
        return pixels.permute(0, 3, 1, 2), torch.from_numpy(stored[f"expected_{number}"])

    @property
    def root(self) -> str:
        """What stands before the names of the model."""
        return next(root for root in ROOTS if f"{root}embedding/kernel" in self.arrays)

    @property
    def options(self) -> Options:
        """What must be said to read the file as it is."""
        return self.runs[0][0]

    def write(self, folder: Path, save: Callable[..., None] = np.savez, **changed: np.ndarray | None) -> Path:
        """Write the checkpoint, with arrays changed, added, or left out where `None` is given."""
        arrays = {name: array for name, array in {**self.arrays, **changed}.items() if array is not None}
        path = folder / f"{self.name}.npz"
        save(path, **arrays)
        return path


def _as_stored(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":  # numpy has no name for it, and JAX saves it so
        return torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view("V2")
    return values.astype(dtype)


def build(checkpoint: Checkpoint) -> nn.Module:
    model = model_class(checkpoint.architecture)(checkpoint.config).eval()
    model.load_state_dict(checkpoint.state_dict(), strict=True)
    return model


@torch.no_grad()
def outputs(model: nn.Module, pixels: Tensor) -> Tensor:
    result = model(pixels)
    return result.logits if "logits" in result else result.pooler_output


def distance(actual: Tensor, expected: Tensor) -> float:
    """Return the relative distance, L2."""
    assert actual.shape == expected.shape and expected.std() > 0.3
    return ((actual - expected).norm() / expected.norm()).item()


def assert_same_weights(first: Checkpoint, second: Checkpoint) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


# ------------------------------------------------------------------------------------------------- what it computes


def test_every_golden_case_is_tested():
    assert {path.stem for path in GOLDEN.glob("*.npz")} == FACTS.keys()


@pytest.mark.parametrize("name", FACTS)
def test_outputs_are_those_of_the_original_code(name, tmp_path):
    golden = Golden(name)
    path = golden.write(tmp_path)
    for options, pixels, expected in golden.runs:
        model = build(open_checkpoint(path, options))
        assert distance(outputs(model, pixels), expected) < TOLERANCE, options


@pytest.mark.parametrize("name", FACTS)
def test_the_config_is_that_of_the_original_model(name, tmp_path):
    golden = Golden(name)
    checkpoint = open_checkpoint(golden.write(tmp_path), golden.options)
    for field, value in {**COMMON, **FACTS[name]}.items():
        assert getattr(checkpoint.config, field) == value, field
    assert checkpoint.family == "google npz" and not checkpoint.assumed
    assert checkpoint.architecture == ("HFViTModel" if name in HEADLESS else "HFViTForImageClassification")
    assert checkpoint.dtype == (torch.bfloat16 if name == "big_vision_bfloat16" else torch.float32)
    processor = checkpoint.processor()
    assert list(processor.image_mean) == list(processor.image_std) == [0.5] * 3


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("google_token", "layer_norm_eps", 1e-5),
        ("google_gap", "hidden_act", "gelu"),
        ("big_vision_map_training", "hidden_act", "gelu"),
        ("google_token_pre_logits", "position_interpolation", "bilinear"),
        ("flexi_gap", "position_interpolation", "bilinear_corners"),
    ],
)
def test_the_golden_cases_show_a_wrong_config(name, field, value, tmp_path):
    golden, errors = Golden(name), []
    path = golden.write(tmp_path)
    for options, pixels, expected in golden.runs:
        checkpoint = open_checkpoint(path, options)
        setattr(checkpoint.config, field, value)
        errors.append(distance(outputs(build(checkpoint), pixels), expected))
    assert max(errors) > 10 * TOLERANCE


@pytest.mark.parametrize("name", ["google_vit", "google_hybrid", "bigvision_map_sincos"])
def test_reference_checkpoints_give_their_logits(name, shared):
    folder = shared / "reference" / name
    meta = json.loads((folder / "meta.json").read_text())
    sizes = [int(size) for size in meta["cli_args"][1:]]
    assert meta["cli_args"][:1] in ([], ["--image-size"])
    options = Options(image_size=(sizes[0], sizes[-1])) if sizes else Options()
    checkpoint = open_checkpoint(folder / "model.npz", options)
    pixels = torch.from_numpy(np.load(folder / "input.npy")).permute(0, 3, 1, 2)
    expected = torch.from_numpy(np.load(folder / "logits.npy"))
    assert distance(outputs(build(checkpoint), pixels), expected) < meta["tolerance_rel_l2"] == 1e-4
    processor = checkpoint.processor()
    assert list(processor.image_mean) == list(processor.image_std) == [0.5] * 3


# ---------------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("name", FACTS)
def test_converted_and_exported_weights_are_the_file_s_bit_for_bit(name, tmp_path):
    golden = Golden(name)
    checkpoint = open_checkpoint(golden.write(tmp_path), golden.options)
    write_checkpoint(checkpoint, tmp_path / "ours")
    said = export_checkpoint(tmp_path / "ours", tmp_path / "again.npz", "npz")
    assert any("processor" in sentence for sentence in said)
    again = open_checkpoint(tmp_path / "again.npz", Options(image_size=checkpoint.config.image_shape))
    assert_same_weights(checkpoint, again)
    assert again.architecture == checkpoint.architecture
    for field in {**COMMON, **FACTS[name]}:
        assert getattr(again.config, field) == getattr(checkpoint.config, field), field


@pytest.mark.parametrize("name", NAMES_OF_TODAY)
def test_exported_files_have_the_names_and_arrays_of_the_original(name, tmp_path):
    golden = Golden(name)
    write_checkpoint(open_checkpoint(golden.write(tmp_path), golden.options), tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "again.npz", "npz")
    expected = {
        array.removeprefix(golden.root): values
        for array, values in golden.arrays.items()
        if array.startswith(golden.root)
    }
    with np.load(tmp_path / "again.npz") as again:
        assert set(again.files) == expected.keys()
        for array, values in expected.items():
            assert again[array].dtype == values.dtype and np.array_equal(again[array], values), array


def test_blocks_of_a_scan_are_written_apart(tmp_path):
    golden = Golden("big_vision_scan")
    write_checkpoint(open_checkpoint(golden.write(tmp_path)), tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "again.npz", "npz")
    stacks = {name: array for name, array in golden.arrays.items() if "/encoderblock/" in name}
    with np.load(tmp_path / "again.npz") as again:
        for name, stack in stacks.items():
            for number, block in enumerate(stack):
                single = name.removeprefix("params/").replace("/encoderblock/", f"/encoderblock_{number}/")
                assert np.array_equal(again[single], block), single
    assert len(stacks) == 16


# ------------------------------------------------------------------------------------------------- what a file may be


def in_fortran_order(path: Path, **arrays: np.ndarray) -> None:
    np.savez(path, **{name: np.asfortranarray(array) for name, array in arrays.items()})
    with zipfile.ZipFile(path) as archive:
        assert b"'fortran_order': True" in archive.read("embedding/kernel.npy")[:128]


def big_endian(path: Path, **arrays: np.ndarray) -> None:
    np.savez(path, **{name: array.astype(array.dtype.newbyteorder(">")) for name, array in arrays.items()})


@pytest.mark.parametrize("save", [np.savez_compressed, in_fortran_order, big_endian])
def test_other_ways_to_store_give_the_same_weights(save, tmp_path):
    golden = Golden("google_token")
    (tmp_path / "other").mkdir()
    plain, other = golden.write(tmp_path), golden.write(tmp_path / "other", save)
    assert plain.read_bytes() != other.read_bytes()
    assert_same_weights(open_checkpoint(plain), open_checkpoint(other))


@pytest.mark.parametrize("name", ["big_vision_map_training", "big_vision_opt_target", "siglip"])
def test_what_is_not_the_image_model_is_left_out(name, tmp_path):
    golden = Golden(name)
    checkpoint = open_checkpoint(golden.write(tmp_path))
    beside = sorted(array for array in golden.arrays if not array.startswith(golden.root))
    assert checkpoint.left_out == beside and len(beside) > 10


def test_a_row_for_a_class_token_that_is_not_there_is_dropped(tmp_path):
    golden = Golden("big_vision_gap")
    positions = np.concatenate([np.full((1, 1, 32), 7, np.float32), golden.arrays["pos_embedding"]], axis=1)
    checkpoint = open_checkpoint(golden.write(tmp_path, pos_embedding=positions))
    _, pixels, expected = golden.runs[0]
    assert distance(outputs(build(checkpoint), pixels), expected) < TOLERANCE


def test_a_stated_size_wins_over_the_guess_of_a_square(tmp_path):
    golden = Golden("big_vision_gap")
    positions = golden.arrays["pos_embedding"][:, :10]  # 2 x 5, or 3 x 3 and one of a class token
    checkpoint = open_checkpoint(golden.write(tmp_path, pos_embedding=positions), Options(image_size=(16, 40)))
    assert checkpoint.config.grid_size == (2, 5)
    table = checkpoint.state_dict()["vit.embeddings.position_embeddings.table.weight"]
    assert np.array_equal(table.flatten(1, 2), positions)


# ----------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(("name", "cause"), [("big_vision_sincos", "sines and cosines"), ("google_rectangle", "8")])
def test_a_grid_that_the_file_does_not_say_must_be_said(name, cause, tmp_path):
    path = Golden(name).write(tmp_path)
    with pytest.raises(ValueError, match="--image-size") as error:
        open_checkpoint(path)
    assert str(path) in str(error.value) and cause in str(error.value)


def test_patches_of_fixed_positions_are_not_resized(tmp_path):
    path = Golden("big_vision_sincos").write(tmp_path)
    with pytest.raises(ValueError, match="--patch-size resamples learned positions"):
        open_checkpoint(path, Options(image_size=(24, 40), patch_size=(4, 4)))


@pytest.mark.parametrize(
    "key",
    [
        "Transformer/encoderblock_1/MlpBlock_3/Dense_0/kernel",
        "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel",
        "Transformer/encoder_norm/scale",
        "embedding/bias",
        "head/bias",
        "cls",
    ],
)
def test_a_missing_array_is_named(key, tmp_path):
    path = Golden("google_token").write(tmp_path, **{key: None})
    with pytest.raises(ValueError, match="missing") as error:
        open_checkpoint(path)
    assert str(path) in str(error.value) and key in str(error.value)


@pytest.mark.parametrize(
    "key", ["Transformer/encoderblock_0/LayerScale_0/gamma", "head_2/kernel", "Transformer/encoder_norm/extra"]
)
def test_an_array_without_a_place_is_named(key, tmp_path):
    path = Golden("google_token").write(tmp_path, **{key: np.zeros((32,), np.float32)})
    with pytest.raises(ValueError, match="no place") as error:
        open_checkpoint(path)
    assert str(path) in str(error.value) and key in str(error.value)


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("head/bias", (6,)),
        ("Transformer/encoderblock_1/MlpBlock_3/Dense_1/kernel", (32, 16)),
        ("Transformer/encoderblock_1/MultiHeadDotProductAttention_1/out/kernel", (3, 8, 32)),
        ("Transformer/posembed_input/pos_embedding", (1, 17, 31)),
        ("cls", (1, 2, 32)),
    ],
)
def test_an_array_that_contradicts_the_others_is_named(key, shape, tmp_path):
    path = Golden("google_token").write(tmp_path, **{key: np.zeros(shape, np.float32)})
    with pytest.raises(ValueError, match="shape") as error:
        write_checkpoint(open_checkpoint(path), tmp_path / "ours")
    assert str(path) in str(error.value) and key in str(error.value)
    assert list(tmp_path.iterdir()) == [path]  # nothing is left of the attempt


def test_objects_are_refused(tmp_path):
    path = Golden("google_token").write(tmp_path, **{"head/bias": np.array([{"code": print}], dtype=object)})
    with pytest.raises(ValueError, match="holds object") as error:
        open_checkpoint(path)
    assert str(path) in str(error.value) and "head/bias" in str(error.value)


@pytest.mark.parametrize("share", [0.2, 0.9, 0.999])
def test_a_truncated_file_is_refused(share, tmp_path):
    path = Golden("google_token").write(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match="truncated") as error:
        open_checkpoint(path)
    assert str(path) in str(error.value)


def test_export_refuses_what_npz_has_no_word_for(tmp_path):
    golden = Golden("google_token")
    checkpoint = open_checkpoint(golden.write(tmp_path), Options(hidden_act="gelu", layer_norm_eps=1e-12))
    write_checkpoint(checkpoint, tmp_path / "ours")
    with pytest.raises(ValueError, match=r"hidden_act='gelu'.*layer_norm_eps=1e-12"):
        export_checkpoint(tmp_path / "ours", tmp_path / "again.npz", "npz")
    assert not (tmp_path / "again.npz").exists()


# ------------------------------------------------------------------------------------------------------- FlexiViT


@pytest.mark.parametrize("new", [(8, 8), (12, 12), (16, 16), (9, 20), (32, 8)])
def test_tokens_of_enlarged_patches_are_those_of_the_patches(new):
    old, width = (8, 8), 6
    weight = torch.randn(width, 3 * old[0] * old[1], dtype=torch.float64)
    images = torch.randn(5, 3, *old, dtype=torch.float64)
    enlarged = F.interpolate(images, size=new, mode="bilinear")
    tokens = enlarged.flatten(1) @ resample_patch_projection(weight, old, new).T
    torch.testing.assert_close(tokens, images.flatten(1) @ weight.T, rtol=0, atol=1e-11)


def test_patches_that_shrink_are_the_nearest_in_least_squares():
    old, new = (8, 8), (5, 6)
    weight = torch.randn(4, 64, dtype=torch.float64)
    resize = F.interpolate(torch.eye(64, dtype=torch.float64).view(64, 1, *old), size=new, mode="bilinear").flatten(1)
    resampled = resample_patch_projection(weight, old, new)
    residual = resampled @ resize.T - weight  # of tokens, for white noise in the patches
    torch.testing.assert_close(residual @ resize, torch.zeros(4, 30, dtype=torch.float64), rtol=0, atol=1e-11)
    assert residual.norm() > 0.1
