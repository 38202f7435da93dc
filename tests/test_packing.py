"""Packs: images of many sizes in one sequence are to the model what they are one by one."""

import json
import math
import sys
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from isolated import python, save_tiny_classifier
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, pipeline

from hf_vit import (
    HFViTBackbone,
    HFViTForImageClassification,
    HFViTForMaskedImageModeling,
    HFViTImageProcessor,
    HFViTImageProcessorPil,
    HFViTModel,
)
from hf_vit.model import modeling_hf_vit as modeling
from hf_vit.model import packing_hf_vit
from hf_vit.model.image_geometry_hf_vit import packed_grid
from hf_vit.model.layers_hf_vit import patchify
from hf_vit.model.validation_hf_vit import POOLINGS, POSITION_EMBEDDINGS

BACKENDS = {"torchvision": HFViTImageProcessor, "pil": HFViTImageProcessorPil}
both_backends = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
# The table's own grid, twice and apart; equal counts in another aspect; a run of two; one patch; one row.
GRIDS = [(4, 6), (6, 4), (2, 3), (2, 3), (1, 1), (4, 6), (1, 9)]


def photo(height: int, width: int) -> Image.Image:
    pixels = np.random.default_rng(height * 10_000 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def images_of(grids: list[tuple[int, int]], patch_size: int = 8) -> list[Tensor]:
    return [torch.randn(1, 3, rows * patch_size, columns * patch_size) for rows, columns in grids]


def pack_of(images: list[Tensor], patch_size: int = 8) -> dict[str, Tensor]:
    rows = [patchify(image, (patch_size, patch_size))[0] for image in images]
    grids = [[image.shape[2] // patch_size, image.shape[3] // patch_size] for image in images]
    return {"pixel_values": torch.cat(rows), "patch_grids": torch.tensor(grids)}


def randomised(model: Any) -> Any:
    """Give every parameter a value of its own, so that no zero or one hides a mistake."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


# --------------------------------------------------------------------------------------------------- the grids

patches = st.sampled_from([(16, 16), (8, 16), (14, 14)])
sides = st.one_of(st.integers(1, 40), st.integers(1, 3000), st.integers(1, 40).map(lambda number: 16 * number))


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(size=st.tuples(sides, sides), patch_size=patches, most=st.integers(1, 300))
def test_the_grid_is_the_least_reduced_one_that_fits(size, patch_size, most):
    rows, columns = packed_grid(size, patch_size, most)
    in_patches = [Fraction(side, patch) for side, patch in zip(size, patch_size, strict=True)]
    own = tuple(map(math.ceil, in_patches))
    assert 1 <= rows <= own[0] and 1 <= columns <= own[1] and rows * columns <= most
    if math.prod(own) <= most:
        assert (rows, columns) == own
        return
    # At some scale of the whole image both sides are within half a patch of it, a side below one patch aside ...
    half = Fraction(1, 2)
    pairs = list(zip((rows, columns), in_patches, strict=True))
    low = max((0 if number == 1 else number - half) / side for number, side in pairs)
    ends = [(number + half) / side for number, side in pairs]
    high = min(ends)
    assert low <= high and low <= 1
    # ... and the next larger grid, if the image has one, is too large.
    if high < 1:
        assert math.prod(number + (end == high) for (number, _), end in zip(pairs, ends, strict=True)) > most


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((224, 224), (14, 14)),
        ((1000, 1001), (14, 14)),
        ((375, 500), (12, 16)),
        ((500, 375), (16, 12)),
        ((100, 100), (7, 7)),
        ((1, 1), (1, 1)),
        ((1, 2000), (1, 125)),
        ((1, 4000), (1, 196)),
        ((5000, 3), (196, 1)),
    ],
)
def test_grids_of_196_patches(size, grid):
    assert packed_grid(size, (16, 16), 196) == grid


# ----------------------------------------------------------------------------------------------- the processor


@both_backends
@pytest.mark.parametrize("channels", [{}, {"do_grayscale": True, "resample": 3}], ids=["rgb", "gray"])
def test_pixels_are_those_of_a_resize_to_the_grid(backend, channels):
    sizes = [(40, 64), (90, 91), (7, 9), (1, 300), (33, 16), (200, 30)]
    images = [photo(*size) for size in sizes]
    pack = backend(packing=24, patch_size=(8, 16), **channels)(images, return_tensors="pt")
    grids = [tuple(grid) for grid in pack.patch_grids.tolist()]
    assert grids == [packed_grid(size, (8, 16), 24) for size in sizes]
    assert pack.pixel_values.is_contiguous() and pack.patch_grids.dtype == torch.int64
    parts = pack.pixel_values.split([math.prod(grid) for grid in grids])
    for image, grid, rows in zip(images, grids, parts, strict=True):
        size = {"height": grid[0] * 8, "width": grid[1] * 16}
        pixels = backend(size=size, **channels)(image, return_tensors="pt").pixel_values
        assert torch.equal(rows, patchify(pixels, (8, 16))[0])


@both_backends
def test_a_pack_is_without_crop_and_in_the_type_asked_for(backend):
    images = [photo(30, 40), photo(64, 24)]
    processor = backend.from_preset("timm", packing=20, patch_size=8)
    assert processor.crop_pct == 0.9
    plain = backend.from_preset("timm", packing=20, patch_size=8, crop_pct=None)
    torchs, arrays = (processor(images, return_tensors=kind) for kind in ("pt", "np"))
    assert torch.equal(torchs.pixel_values, plain(images, return_tensors="pt").pixel_values)
    assert np.array_equal(torchs.pixel_values, arrays.pixel_values) and arrays.patch_grids.dtype == np.int64
    on_request = backend.from_preset("timm")(images, packing=20, patch_size=8, return_tensors="pt")
    assert torch.equal(on_request.pixel_values, torchs.pixel_values)


@both_backends
def test_a_pack_leaves_the_caller_s_pixels_alone(backend):
    pixels = torch.rand(3, 16, 16)
    kept = pixels.clone()
    backend(packing=4, patch_size=8, do_rescale=False)(pixels, return_tensors="pt")
    assert torch.equal(pixels, kept)


@both_backends
def test_a_saved_processor_packs_again(backend, tmp_path):
    images = [photo(30, 40), photo(64, 24)]
    processor = backend(packing=20, patch_size=8)
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["packing"] == 20 and saved["patch_size"] == [8, 8]
    for name, loaded_class in BACKENDS.items():
        loaded = AutoImageProcessor.from_pretrained(tmp_path, backend=name)
        assert type(loaded) is loaded_class and loaded.packing == 20 and loaded.patch_size == (8, 8)
        if loaded_class is backend:
            packs = [made(images, return_tensors="pt") for made in (processor, loaded)]
            assert torch.equal(packs[0].pixel_values, packs[1].pixel_values)
    assert "patch_size" not in backend().to_dict() and backend(packing=20).patch_size == (16, 16)


@both_backends
def test_processors_say_what_they_cannot_pack(backend):
    image = photo(30, 40)
    for options in ({"packing": 0}, {"packing": 4, "patch_size": 0}, {"packing": 4, "patch_size": (8, 0)}):
        with pytest.raises(ValueError, match="patch_size in pixels of at least 1"):
            backend(**options)
    for most, size in ((20, (16, 20)), (3, (16, 16))):
        with pytest.raises(ValueError, match="leave do_resize on"):
            backend(packing=most, patch_size=8, do_resize=False)(photo(*size), return_tensors="pt")
    whole = backend(packing=4, patch_size=8, do_resize=False)(photo(16, 16), return_tensors="pt")
    assert whole.patch_grids.tolist() == [[2, 2]]
    with pytest.raises(ValueError, match="at least one image"):
        backend(packing=4)([], return_tensors="pt")
    assert backend(packing=4)(image).pixel_values.shape == (4, 768)


# --------------------------------------------------------------------------------------------------- the model

PARTS = {
    "num_register_tokens": 2,
    "layer_scale_init_value": 0.5,
    "use_qk_norm": True,
    "use_gated_mlp": True,
    "head_dim": 12,
    "use_pre_layernorm": True,
    "use_patch_layernorm": True,
}
BARE = {"pooling": "mean", "use_cls_token": False}


def assert_like_one_by_one(model: Any, images: list[Tensor], tolerance: float) -> None:
    with torch.no_grad():
        packed = model(**pack_of(images))
        alone = [model(image) for image in images]
    expected = torch.cat([output.last_hidden_state for output in alone], dim=1)
    torch.testing.assert_close(packed.last_hidden_state, expected, rtol=tolerance, atol=tolerance)
    pooled = torch.cat([output.pooler_output for output in alone])
    torch.testing.assert_close(packed.pooler_output, pooled, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("fields", [PARTS, BARE], ids=["parts", "bare"])
@pytest.mark.parametrize("positions", POSITION_EMBEDDINGS)
def test_a_pack_is_its_images_one_by_one(tiny_config, positions, fields, attention):
    config = tiny_config(position_embedding_type=positions, attn_implementation=attention, **fields)
    assert_like_one_by_one(randomised(HFViTModel(config)).eval(), images_of(GRIDS), tolerance=2e-5)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_pooling_reads_one_image(tiny_config, pooling):
    representation = {} if pooling == "cls_and_distillation" else {"representation_size": 16}
    config = tiny_config(pooling=pooling, use_cls_token=True, num_register_tokens=1, **representation)
    assert_like_one_by_one(randomised(HFViTModel(config)).eval(), images_of(GRIDS), tolerance=2e-5)


@pytest.mark.parametrize("fields", [PARTS, BARE], ids=["parts", "bare"])
@pytest.mark.parametrize("placement", ["every_layer", "every_layer_shared"])
def test_positions_of_layers(tiny_config, placement, fields):
    config = tiny_config(position_placement=placement, **fields)
    assert_like_one_by_one(randomised(HFViTModel(config)).eval(), images_of(GRIDS), tolerance=2e-5)


@pytest.mark.parametrize("fields", [{"num_prefix_positions": 1}, {"num_prefix_positions": 0}], ids=["prefix", "none"])
def test_relative_positions_of_the_prefix(tiny_config, fields):
    config = tiny_config(position_embedding_type="relative", **fields)
    assert_like_one_by_one(randomised(HFViTModel(config)).eval(), images_of(GRIDS), tolerance=2e-5)


@pytest.mark.parametrize("positions", POSITION_EMBEDDINGS)
def test_a_pack_in_bfloat16(tiny_config, positions):
    model = HFViTModel(tiny_config(position_embedding_type=positions, **PARTS)).eval().to(torch.bfloat16)
    assert_like_one_by_one(model, images_of(GRIDS), tolerance=5e-2)


def test_a_pack_under_autocast(tiny_config):
    model = HFViTModel(tiny_config(position_embedding_type="rotary", **PARTS)).eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert_like_one_by_one(model, images_of(GRIDS), tolerance=5e-2)


def test_hidden_states_are_of_all_images(tiny_config):
    model, images = randomised(HFViTModel(tiny_config())).eval(), images_of(GRIDS)
    with torch.no_grad():
        packed = model(**pack_of(images), output_hidden_states=True).hidden_states
        alone = [model(image, output_hidden_states=True).hidden_states for image in images]
    assert len(packed) == 4
    for states, expected in zip(packed, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(states, torch.cat(expected, dim=1), rtol=2e-5, atol=2e-5)


def test_images_of_a_pack_in_another_order_answer_in_that_order(tiny_config):
    model, images = randomised(HFViTModel(tiny_config())).eval(), images_of(GRIDS)
    order = torch.randperm(len(images))
    with torch.no_grad():
        pooled = model(**pack_of(images)).pooler_output
        shuffled = model(**pack_of([images[index] for index in order])).pooler_output
    torch.testing.assert_close(shuffled, pooled[order], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("changed", range(len(GRIDS)))
def test_no_image_sees_another(tiny_config, changed):
    model, images = randomised(HFViTModel(tiny_config(pooling="attention"))).eval(), images_of(GRIDS)
    others = [image + (100 if index == changed else 0) for index, image in enumerate(images)]
    with torch.no_grad():
        before, after = (model(**pack_of(some)).pooler_output for some in (images, others))
    differs = (before - after).abs().amax(dim=1) > 1e-5
    assert differs.tolist() == [index == changed for index in range(len(images))]


def test_a_pack_of_one_size_is_a_batch(tiny_config, pixel_values):
    model = randomised(HFViTForImageClassification(tiny_config())).eval()
    with torch.no_grad():
        logits = model(**pack_of(list(pixel_values.split(1)))).logits
        torch.testing.assert_close(logits, model(pixel_values).logits, rtol=2e-5, atol=2e-5)


# ---------------------------------------------------------------------------------------------------- training


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("positions", POSITION_EMBEDDINGS)
def test_gradients_are_those_of_the_images_one_by_one(tiny_config, positions, checkpointing):
    model = HFViTForImageClassification(tiny_config(position_embedding_type=positions, initializer_range=0.2)).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    images, labels = images_of(GRIDS), torch.arange(len(GRIDS)) % 5
    outputs = model(**pack_of(images), labels=labels)
    assert outputs.logits.shape == (len(GRIDS), 5)
    outputs.loss.backward()
    packed = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    losses = [model(image, labels=label[None]).loss for image, label in zip(images, labels, strict=True)]
    torch.stack(losses).mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(packed[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: n + m)


def test_drop_path_drops_images_as_in_a_batch(tiny_config, pixel_values):
    model = randomised(HFViTModel(tiny_config(drop_path_rate=0.5))).train()
    images = torch.cat([pixel_values] * 4)
    with torch.no_grad():
        torch.manual_seed(1)
        expected = model(images).last_hidden_state
        torch.manual_seed(1)
        packed = model(**pack_of(list(images.split(1)))).last_hidden_state
    torch.testing.assert_close(packed.unflatten(1, (8, -1))[0], expected, rtol=2e-5, atol=2e-5)


def test_drop_path_drops_whole_images_of_any_size(tiny_config):
    packing = packing_hf_vit.HFViTPacking(**pack_of(images_of(GRIDS)), config=tiny_config())
    drop_path = modeling.HFViTDropPath(0.5).train()
    dropped = torch.cat([drop_path(torch.ones(1, 101, 2), packing) for _ in range(50)])
    images = dropped.split([1 + math.prod(grid) for grid in sorted(GRIDS)], dim=1)
    for image in images:
        assert torch.equal(image, image[:, :1, :1].expand_as(image))
        assert set(image.unique().tolist()) == {0.0, 2.0}
    assert not torch.equal(images[4], images[5])


def test_dropouts_act_in_training_alone(tiny_config):
    config = tiny_config(attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.1)
    model, pack = HFViTModel(config), pack_of(images_of(GRIDS))
    with torch.no_grad():
        first, second = (model.train()(**pack).pooler_output for _ in range(2))
        assert not torch.allclose(first, second)
        first, second = (model.eval()(**pack).pooler_output for _ in range(2))
        assert torch.equal(first, second)


# -------------------------------------------------------------------------------------- flash attention on CUDA


def varlen_attention_of_the_documentation(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, ends: Tensor, most: int, most_keys: int, *, scale: float
) -> Tensor:
    """What `torch.nn.attention.varlen.varlen_attn` says that it computes, and asks of its arguments."""
    assert query.ndim == 3 and query.shape == key.shape == value.shape and query.dtype == key.dtype == value.dtype
    assert starts.dtype == torch.int32 and starts is ends and starts[0] == 0 and starts[-1] == len(query)
    assert most == most_keys == starts.diff().max()
    lengths = starts.diff().tolist()
    parts = zip(*(state.transpose(0, 1).split(lengths, dim=1) for state in (query, key, value)), strict=True)
    attended = [F.scaled_dot_product_attention(*part, scale=scale).transpose(0, 1) for part in parts]
    return torch.cat(attended)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_the_call_of_flash_attention(tiny_config, monkeypatch, positions):
    calls = []

    def varlen_attn(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args[0].dtype)
        return varlen_attention_of_the_documentation(*args, **kwargs)

    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", SimpleNamespace(varlen_attn=varlen_attn))
    monkeypatch.setattr(packing_hf_vit, "can_use_flash_attention", lambda params: params.dropout == 0)
    fields = {"position_embedding_type": positions, "use_qk_norm": positions == "rotary"}
    model = randomised(HFViTModel(tiny_config(attention_probs_dropout_prob=0.1, **fields))).eval()
    assert_like_one_by_one(model, images_of(GRIDS), tolerance=2e-5)
    with torch.autocast("cpu", torch.bfloat16):
        model(**pack_of(images_of(GRIDS)))
    assert calls == [torch.float32] * 3 + [torch.bfloat16] * 3
    model.train()(**pack_of(images_of(GRIDS)))  # dropout of the weights
    assert len(calls) == 6


# ----------------------------------------------------------------------------------------------------- refusals


def test_packs_that_do_not_fit_are_refused(tiny_config):
    model, pack = HFViTModel(tiny_config()), pack_of(images_of([(2, 3), (1, 2)]))
    rows, grids = pack["pixel_values"], pack["patch_grids"]
    wrong = {
        "as the image processor returns them": [
            {"pixel_values": rows},
            {"pixel_values": torch.randn(2, 3, 32, 48), "patch_grids": grids},
        ],
        "set patch_size of the image processor": [{"pixel_values": rows[:, :-3], "patch_grids": grids}],
        "must be integers": [{**pack, "patch_grids": grids.flatten()}, {**pack, "patch_grids": grids.float()}],
        "keep all images of a pack": [
            {**pack, "patch_grids": grids[:1]},
            {**pack, "patch_grids": grids[:0]},
            {**pack, "patch_grids": grids * torch.tensor([-1, -1])},
            {"pixel_values": rows[:-1], "patch_grids": grids},
        ],
    }
    for match, packs in wrong.items():
        for inputs in packs:
            with pytest.raises(ValueError, match=match):
                model(**inputs)


def test_what_does_not_go_with_a_pack_is_refused(tiny_config):
    pack = pack_of(images_of([(2, 3), (1, 2)]))
    model = HFViTModel(tiny_config(), use_mask_token=True)
    beside = {
        "bool_masked_pos": torch.zeros(1, 8, dtype=torch.bool),
        "attention_mask": torch.ones(1, 10),
        "output_attentions": True,
    }
    for name, value in beside.items():
        with pytest.raises(ValueError, match=f"does not support {name}"):
            model(**pack, **{name: value})
    with pytest.raises(ValueError, match="does not support stem_layers"):
        HFViTModel(tiny_config(stem_layers=[1], stem_width=32))(**pack)
    dropping = HFViTModel(tiny_config(patch_dropout_prob=0.5))
    with pytest.raises(ValueError, match="does not support patch_dropout_prob"):
        dropping.train()(**pack)
    assert dropping.eval()(**pack).pooler_output.shape == (2, 32)
    for refusing in (HFViTForMaskedImageModeling(tiny_config()), HFViTBackbone(tiny_config())):
        with pytest.raises(ValueError, match="takes images of one size"):
            refusing(**pack)


# -------------------------------------------------------------------------------------------- as others use it


def test_a_pipeline_packs_batches(tiny_config):
    model = randomised(HFViTForImageClassification(tiny_config())).eval()
    classify = pipeline(
        "image-classification", model=model, image_processor=HFViTImageProcessor(packing=24, patch_size=8)
    )
    photos = [photo(30, 40), photo(64, 24), photo(9, 100)]
    together, alone = (classify(photos, batch_size=size) for size in (3, 1))
    for first, second in zip(together, alone, strict=True):
        assert [(row["label"], pytest.approx(row["score"], abs=1e-5)) for row in first] == [
            (row["label"], row["score"]) for row in second
        ]


@pytest.mark.slow
def test_a_pushed_repository_packs_without_the_package(tmp_path):
    folder = save_tiny_classifier(tmp_path / "tiny-vit")
    assert (folder / "packing_hf_vit.py").is_file()
    code = f"""
import numpy as np
from transformers import AutoImageProcessor, AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained({str(folder)!r}, trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained({str(folder)!r}, trust_remote_code=True, packing=24, patch_size=8)
pack = processor([np.zeros((40, 30, 3), np.uint8), np.zeros((9, 70, 3), np.uint8)], return_tensors="pt")
print(list(model(**pack).logits.shape))
"""
    assert python(code, home=tmp_path / "home").stdout.strip().endswith("[2, 5]")
