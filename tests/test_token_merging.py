"""Merged tokens stand for the patches that they hold: properties, a plain reference, refusals, the command."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import load_from_disk
from test_evaluate_command import evaluate, save_model
from tiny_run import COLORS, save_photos

import hf_vit
from hf_vit import HFViTBackbone, HFViTForImageClassification, HFViTForMaskedImageModeling, HFViTModel
from hf_vit.inference.token_merging import match_patches, merge_tokens
from hf_vit.model import modeling_hf_vit as modeling
from hf_vit.model.validation_hf_vit import POOLINGS

TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture
def build(tiny_config):
    """Build a classifier of the tiny config, 24 patches in 3 layers, with weights that tell tokens apart."""

    def build(attention: str = "sdpa", **fields: Any) -> HFViTForImageClassification:
        config = tiny_config(**{"initializer_range": 0.3, "num_register_tokens": 2, **fields})
        return HFViTForImageClassification._from_config(config, attn_implementation=attention).eval()

    return build


def sizes_of(model: Any) -> torch.Tensor:
    """Return how many patches every token of the last forward holds, `[B, T]`."""
    return model.base_model.layers[0].merging.sizes


# -------------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("pooling", POOLINGS)
@torch.inference_mode()
def test_equal_patches_merge_without_a_trace(build, pooling):
    model = build(pooling=pooling, position_embedding_type="none", num_register_tokens=1)
    pixel_values = torch.randn(2, 3, 1, 1).expand(-1, -1, 32, 48)
    expected = model(pixel_values).logits
    torch.testing.assert_close(merge_tokens(model, 7)(pixel_values).logits, expected, **TOLERANCE)
    assert sizes_of(model).max() > 2


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("per_layer", "left"), [(1, 21), (5, 9), (8, 4), (100, 3)])
@torch.inference_mode()
def test_tokens_become_fewer_and_hold_all_patches(build, pixel_values, attention, per_layer, left):
    model = merge_tokens(build(attention), per_layer)
    tokens = model.vit(pixel_values).last_hidden_state
    sizes = sizes_of(model)
    assert tokens.shape == (2, 3 + left, 32) and sizes.shape == (2, 3 + left)
    assert torch.equal(sizes.sum(dim=1), torch.full((2,), 3.0 + 24))
    assert torch.equal(sizes[:, :3], torch.ones(2, 3))


@torch.inference_mode()
def test_tokens_before_the_patches_stay_alone_whatever_their_keys(build, pixel_values):
    model = build(pooling="cls", num_register_tokens=3)
    merging = merge_tokens(model, 12).vit.layers[0].merging
    merging.keys = torch.ones(2, 28, 8)  # as if all tokens were the same
    tokens = torch.randn(2, 28, 32)
    merged = merging.merge(tokens)
    assert merged.shape[1] == 16 and torch.equal(merged[:, :4], tokens[:, :4])


@pytest.mark.parametrize("pooling", ["cls_and_mean", "attention"])
@torch.inference_mode()
def test_images_do_not_see_each_other(build, pooling):
    model = merge_tokens(build(pooling=pooling), 4)
    pixel_values = torch.randn(5, 3, 32, 48)
    logits, order = model(pixel_values).logits, torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(model(pixel_values[order]).logits, logits[order], **TOLERANCE)
    torch.testing.assert_close(model(pixel_values[2:3]).logits, logits[2:3], **TOLERANCE)


@pytest.mark.parametrize("pooling", POOLINGS)
@torch.inference_mode()
def test_zero_undoes_it_to_the_bit(build, pixel_values, pooling):
    model = build(pooling=pooling)
    before, parts = model(pixel_values).logits, [type(part) for part in model.modules()]
    merged = merge_tokens(model, 3)(pixel_values).logits
    assert merged.shape == before.shape and not torch.allclose(merged, before)
    assert merge_tokens(merge_tokens(model, 6), 0) is model
    assert torch.equal(model(pixel_values).logits, before)
    assert [type(part) for part in model.modules()] == parts and not model.vit._forward_pre_hooks
    assert model.train()(pixel_values).logits.shape == before.shape


def test_what_is_saved_knows_nothing_of_it(build, pixel_values, tmp_path):
    model = build()
    config, names = model.config.to_dict(), list(model.state_dict())
    with torch.no_grad():
        expected = model(pixel_values).logits
        merge_tokens(model, 4)(pixel_values)
    assert model.config.to_dict() == config and list(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(HFViTForImageClassification.from_pretrained(tmp_path)(pixel_values).logits, expected)


def test_a_copy_merges_by_itself(build, pixel_values):
    model = merge_tokens(build(), 4)
    logits = model(pixel_values).logits  # with a gradient
    twin = copy.deepcopy(model)
    assert torch.equal(twin(pixel_values).logits, logits)
    merge_tokens(twin, 0)
    assert torch.equal(model(pixel_values).logits, logits) and sizes_of(model).shape == (2, 15)


@torch.inference_mode()
def test_every_size_of_image_and_the_base_model_alone(build):
    model = merge_tokens(build(pooling="mean", num_register_tokens=0), 4)
    for height, width, left in ((32, 48, 12), (40, 72, 33), (8, 24, 1), (8, 8, 1)):
        pixel_values = torch.randn(3, 3, height, width)
        assert model.vit(pixel_values).last_hidden_state.shape == (3, left, 32)
    encoder = HFViTModel(model.config).eval()
    encoder.load_state_dict(model.vit.state_dict())
    outputs = merge_tokens(encoder, 4)(pixel_values)
    assert torch.equal(outputs.pooler_output, model.vit(pixel_values).pooler_output)


@torch.inference_mode()
def test_half_precision_merges_and_matches_in_full(build, pixel_values):
    keys = torch.randn(1, 1, 64) + 0.01 * torch.randn(2, 200, 64)  # of cosines that bf16 cannot tell apart
    merged, into = match_patches(keys, 20)
    with torch.autocast("cpu", torch.bfloat16):
        for half, full in zip(match_patches(keys, 20), (merged, into), strict=True):
            assert torch.equal(half, full)
        logits = merge_tokens(build(), 4)(pixel_values).logits
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
    model = merge_tokens(build(pooling="mean").bfloat16(), 4)
    assert model(pixel_values).logits.dtype == torch.bfloat16 and sizes_of(model).dtype == torch.float32


@pytest.mark.slow
@torch.no_grad()
def test_it_compiles_as_one_graph(build, pixel_values):
    model = merge_tokens(build(pooling="attention"), 4)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for images in (pixel_values, pixel_values.flip(0)):
        torch.testing.assert_close(compiled(images).logits, model(images).logits)


# --------------------------------------------------------------------------------------------------- reference


def reference(model: HFViTForImageClassification, image: torch.Tensor, per_layer: int) -> torch.Tensor:
    """Classify one image `[C, H, W]` with loops; a token of some size is as many copies of it.

    The model is a plain one: its attention and its pooling see the copies, and need not know of sizes.
    """
    encoder, prefix = model.vit, model.config.num_prefix_tokens
    tokens = list(encoder.embeddings(image.unsqueeze(0))[0][0])
    sizes = [1] * len(tokens)
    for layer in encoder.layers:
        normed = layer.layernorm_before(torch.stack(tokens))
        copies = torch.tensor(sizes)
        attended = layer.attention(normed.repeat_interleave(copies, dim=0).unsqueeze(0))[0][0]
        firsts = [sum(sizes[:place]) for place in range(len(sizes))]
        tokens = [token + attended[first] for token, first in zip(tokens, firsts, strict=True)]

        heads = layer.attention.qkv(normed).unflatten(-1, (-1, 3, layer.attention.head_dim))
        keys = layer.attention.k_norm(heads[:, :, 1]).mean(dim=1)
        pairs = []
        for source in range(prefix + 1, len(tokens), 2):
            likeness = [
                (F.cosine_similarity(keys[source], keys[target], dim=0).item(), target)
                for target in range(prefix, len(tokens), 2)
            ]
            pairs.append((*max(likeness), source))
        groups = {place: [place] for place in range(len(tokens))}
        for _, target, source in sorted(pairs, reverse=True)[:per_layer]:
            groups[target] += groups.pop(source)
        total = {target: sum(sizes[member] for member in members) for target, members in groups.items()}
        tokens = [
            sum(sizes[member] * tokens[member] for member in members) / total[target]
            for target, members in groups.items()
        ]
        sizes = list(total.values())
        tokens = [token + layer.mlp(layer.layernorm_after(token)) for token in tokens]
    patches = encoder.layernorm(torch.stack(tokens)).repeat_interleave(torch.tensor(sizes), dim=0)
    return model.classifier(encoder.pooler(patches.unsqueeze(0)))[0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("per_layer", [3, 9])
@pytest.mark.parametrize("pooling", POOLINGS)
@torch.no_grad()
def test_it_is_what_loops_over_copies_compute(build, pixel_values, pooling, per_layer, attention):
    model = build(attention, pooling=pooling, use_qk_norm=True)
    expected = torch.stack([reference(model, image, per_layer) for image in pixel_values])
    torch.testing.assert_close(merge_tokens(model, per_layer)(pixel_values).logits, expected, **TOLERANCE)


# ---------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("number", [-1, 2.5, True, None])
def test_a_number_that_is_none_is_refused(build, number):
    with pytest.raises(ValueError, match="per_layer must be a number of patches"):
        merge_tokens(build(), number)


@pytest.mark.parametrize(
    ("positions", "placement"),
    [("relative", "input"), ("rotary", "input"), ("learned_rotary", "input"), ("learned", "every_layer")],
)
def test_layers_that_ask_for_places_are_refused(build, positions, placement):
    with pytest.raises(ValueError, match=f"With '{positions}' positions at '{placement}'"):
        merge_tokens(build(position_embedding_type=positions, position_placement=placement), 2)


@pytest.mark.parametrize("model_class", [HFViTBackbone, HFViTForMaskedImageModeling])
def test_outputs_of_every_patch_are_refused(tiny_config, model_class):
    model = model_class(tiny_config())
    for refused in (model, model.vit):
        with pytest.raises(ValueError, match="an output per patch"):
            merge_tokens(refused, 2)
    assert merge_tokens(model, 0) is model


def test_another_model_or_a_wrapped_one_is_refused(build, monkeypatch):
    with pytest.raises(ValueError, match="got Linear: call merge_tokens before"):
        merge_tokens(torch.nn.Linear(2, 2), 2)
    model = build()
    monkeypatch.setattr(model.vit.layers[1], "forward", lambda *args: args[0])
    with pytest.raises(ValueError, match="HFViTLayer with hooks or shards"):
        merge_tokens(model, 2)
    assert type(model.vit.layers[0]) is modeling.HFViTLayer  # nothing was begun


@pytest.mark.parametrize(
    "wish",
    [
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"attention_mask": torch.ones(2, 27)},
        {"patch_grids": torch.tensor([[4, 6], [4, 6]])},
    ],
    ids=lambda wish: next(iter(wish)),
)
def test_what_is_said_of_every_patch_is_refused(build, pixel_values, wish):
    model = merge_tokens(build(), 4)
    with pytest.raises(ValueError, match=f"{next(iter(wish))} does not work with token merging.*merge_tokens"):
        model(pixel_values, **wish)
    assert model(pixel_values, output_hidden_states=False).hidden_states is None


def test_wishes_of_the_config_and_by_position_are_refused(build, pixel_values):
    model = merge_tokens(build(), 4)
    with pytest.raises(ValueError, match="attention_mask does not work"):
        model.vit(pixel_values, None, torch.ones(2, 27))
    model.config.output_hidden_states = True
    with pytest.raises(ValueError, match="output_hidden_states does not work"):
        model(pixel_values)


def test_training_is_refused(build, pixel_values):
    model = merge_tokens(build(), 4).train()
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):
        model(pixel_values)


def test_an_attention_without_scores_is_refused(build, pixel_values):
    model = merge_tokens(build(), 4)
    model.config._attn_implementation = "flash_attention_2"  # set later, as set_attn_implementation would
    with pytest.raises(ValueError, match="'flash_attention_2' does not support"):
        model(pixel_values)


def test_a_part_of_the_heads_is_refused(build, pixel_values):
    model = merge_tokens(build(), 4)
    model.vit.layers[0].attention.qkv = torch.nn.Linear(32, 48)  # 2 of 4 heads
    with pytest.raises(ValueError, match="mean of 4 heads, but this process has 2"):
        model(pixel_values)


# ----------------------------------------------------------------------------------------------------- command


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_photos(tmp_path_factory.mktemp("data") / "photos")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny", list(COLORS), pooling="mean")


def test_the_cost_stands_beside_the_speed(folder, photos, tmp_path):
    file = tmp_path / "measured.json"
    output = evaluate(folder, photos, "--precision", "fp32", "--merge-tokens", 2, "--json", file)
    measured = json.loads(file.read_text())
    model = merge_tokens(HFViTForImageClassification.from_pretrained(folder), 2)
    images = hf_vit.HFViTImageProcessor.from_pretrained(folder)
    data = load_from_disk(str(photos))["test"]
    with torch.no_grad():
        logits = model(**images(data["image"][:], return_tensors="pt")).logits
    labels = torch.tensor(data["label"][:])
    merged = measured["merged"]
    assert merged["per_layer"] == 2 and merged["figures"]["count"] == 21
    assert merged["figures"]["accuracy"] == (logits.argmax(-1) == labels).double().mean().item()
    assert merged["figures"]["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), abs=1e-5)
    assert merged["figures"]["loss"] != pytest.approx(measured["figures"]["loss"], abs=1e-5)
    assert merged["images_per_second"]["model"] > 0
    assert "all tokens" in output and "2 tokens merged per layer" in output
    assert f"{merged['figures']['loss']:.4f}" in output and f"{merged['figures']['accuracy']:.2%}" in output


def test_without_the_option_nothing_is_merged(folder, photos, tmp_path):
    output = evaluate(folder, photos, "--json", tmp_path / "measured.json")
    assert "merged" not in output and "merged" not in json.loads((tmp_path / "measured.json").read_text())


def test_what_cannot_be_merged_is_a_line(photos, tmp_path):
    relative = save_model(tmp_path / "relative", list(COLORS), position_embedding_type="relative")
    encoder = save_model(tmp_path / "encoder", ["a"], HFViTForMaskedImageModeling)
    for model, words in (
        (relative, "With 'relative' positions"),
        (encoder, "--merge-tokens needs a classifier"),
    ):
        output = evaluate(model, photos, "--merge-tokens", 1, "--probe", "knn", exit_code=2)
        last = output.splitlines()[-1]  # behind the bar of weights that are loaded
        assert words in last and last.startswith("Error: ") and "Traceback" not in output
