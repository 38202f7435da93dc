"""Attention weights are the model's own, and what is made of them is known where the weights are."""

import math
import weakref
from typing import Any

import numpy as np
import pytest
import torch

from hf_vit import HFViTBackbone, HFViTForImageClassification, HFViTForMaskedImageModeling, HFViTModel
from hf_vit.inference.optimize import optimize_for_inference
from hf_vit.inference.token_merging import merge_tokens
from hf_vit.inspection import (
    attention_distance,
    attention_maps,
    attention_rollout,
    attention_weights,
    feature_components,
    rollout,
    token_norms,
    uniform_distance,
)
from hf_vit.inspection.attention import READ_BY
from hf_vit.inspection.layers import Scores
from hf_vit.model.validation_hf_vit import POOLINGS, POSITION_EMBEDDINGS, POSITION_PLACEMENTS

VARIANTS: dict[str, dict[str, Any]] = {
    **{f"positions {kind}": {"position_embedding_type": kind} for kind in POSITION_EMBEDDINGS},
    **{f"placement {where}": {"position_placement": where} for where in POSITION_PLACEMENTS},
    **{f"pooling {kind}": {"pooling": kind} for kind in POOLINGS},
    "registers": {"num_register_tokens": 3},
    "relative with prefix": {"position_embedding_type": "relative", "num_prefix_positions": 1},
    "rotary without prefix": {"position_embedding_type": "rotary", "pooling": "mean"},
    "qk norm": {"use_qk_norm": True},
    "head width": {"head_dim": 12},
    "gated": {"use_gated_mlp": True, "hidden_act": "silu"},
    "layer scale": {"layer_scale_init_value": 0.3},
    "norms inside": {"use_attention_layernorm": True, "use_mlp_layernorm": True},
    "norms": {"use_pre_layernorm": True, "use_patch_layernorm": True, "final_layernorm": "pooled"},
    "no projection": {"use_output_projection": False, "qkv_bias": False},
    "hybrid": {"stem_layers": [1], "stem_width": 32},
    "gray": {"num_channels": 1},
}


def twins(config: Any) -> tuple[Any, Any]:
    """Build a classifier twice, with the same weights that tell tokens apart: by sdpa, and by plain products."""
    config.initializer_range = 0.3
    model = HFViTForImageClassification._from_config(config, attn_implementation="sdpa").eval()
    plain = HFViTForImageClassification._from_config(config, attn_implementation="eager").eval()
    plain.load_state_dict(model.state_dict())
    return model, plain


def looking_alike(model: Any) -> Any:
    """Make all queries and keys say nothing, so that attention is uniform."""
    for layer in model.base_model.layers:
        for parameter in layer.attention.qkv.parameters():
            parameter.data.zero_()
    return model


# ------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_are_those_of_plain_products(variant: str, tiny_config: Any) -> None:
    model, plain = twins(tiny_config(**VARIANTS[variant]))
    for size in ((32, 48), (40, 16)):
        pixel_values = torch.randn(2, model.config.num_channels, *size)
        with torch.no_grad():
            expected = plain(pixel_values, output_attentions=True).attentions
        for inspected in (model, plain, model.vit):
            weights = dict(attention_weights(inspected, pixel_values))
            assert list(weights) == [1, 2, 3]
            for number, of_layer in weights.items():
                assert of_layer.dtype == np.float32
                np.testing.assert_allclose(of_layer, expected[number - 1].numpy(), atol=1e-5)


@pytest.mark.parametrize("model_class", [HFViTBackbone, HFViTForMaskedImageModeling])
@torch.inference_mode()
def test_every_class_of_model(model_class: Any, tiny_config: Any, pixel_values: torch.Tensor) -> None:
    model = model_class(tiny_config(pooling="attention"))
    assert len(list(attention_weights(model, pixel_values))) == 3
    assert attention_distance(model, [pixel_values]).shape == (3, 4)
    assert attention_rollout(model, pixel_values).shape == (2, 4, 6)
    assert feature_components(model, pixel_values).shape == (2, 4, 6, 3)


def test_layers_are_chosen_by_number(tiny_config: Any, pixel_values: torch.Tensor) -> None:
    model = HFViTModel(tiny_config())
    every = dict(attention_weights(model, pixel_values))
    chosen = dict(attention_weights(model, pixel_values, [-1, 2]))
    assert list(chosen) == [2, 3] and all(np.array_equal(chosen[number], every[number]) for number in chosen)
    passed = []
    for number, layer in enumerate(model.layers, start=1):
        layer.register_forward_hook(lambda *_, number=number: passed.append(number))
    assert [number for number, _ in attention_weights(model, pixel_values, [-2])] == [2] and passed == [1, 2]
    for layer in (0, 4, -4):
        with pytest.raises(ValueError, match=f"Expected a layer from 1 to 3, or -1 to -3 from the end, got {layer}"):
            next(attention_weights(model, pixel_values, [layer]))
    with pytest.raises(ValueError, match="layers is empty"):
        next(attention_weights(model, pixel_values, []))


def test_one_layer_is_kept_at_a_time(tiny_config: Any, pixel_values: torch.Tensor) -> None:
    model, kept = HFViTModel(tiny_config(num_hidden_layers=6)), []
    for _, weights in attention_weights(model, pixel_values):
        kept.append(weakref.ref(weights))
        assert [reference() is not None for reference in kept] == [False] * (len(kept) - 1) + [True]
    del weights
    assert len(kept) == 6 and not any(reference() is not None for reference in kept)


def test_means_need_one_head_at_a_time(
    tiny_config: Any, pixel_values: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, formed = HFViTModel(tiny_config()), []
    of_part = Scores.weights

    def weights(self: Scores, *parts: slice) -> torch.Tensor:
        alive = [reference() for reference in formed if reference() is not None]
        assert len(alive) <= 1
        result = of_part(self, *parts)
        assert result.shape[1] == 1
        formed.append(weakref.ref(result))
        return result

    monkeypatch.setattr(Scores, "weights", weights)
    attention_distance(model, [pixel_values])
    attention_rollout(model, pixel_values)
    attention_maps(model, pixel_values)
    assert len(formed) == 3 * 4 + 3 * 4 + 4


def test_the_model_stays_as_it_was(tiny_config: Any, pixel_values: torch.Tensor) -> None:
    """Dropout is off for the look, and on again where it was on; nothing of the recording stays."""
    model, plain = twins(tiny_config(hidden_dropout_prob=0.5, patch_dropout_prob=0.5, drop_path_rate=0.5))
    with torch.no_grad():
        expected = plain(pixel_values, output_attentions=True).attentions
    model.train()
    model.vit.layers[1].eval()
    states = [part.training for part in model.modules()]
    for number, weights in attention_weights(model, pixel_values):
        np.testing.assert_allclose(weights, expected[number - 1].numpy(), atol=1e-5)
    assert [part.training for part in model.modules()] == states
    assert all("_attention_function" not in vars(layer.attention) for layer in model.vit.layers)
    unfinished = attention_weights(model, pixel_values)
    next(unfinished)
    unfinished.close()
    assert [part.training for part in model.modules()] == states
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_half_precision_is_inspected_in_full(tiny_config: Any, pixel_values: torch.Tensor) -> None:
    model, plain = twins(tiny_config())
    with torch.no_grad():
        expected = plain(pixel_values, output_attentions=True).attentions[0].numpy()
    ((_, weights),) = attention_weights(model.bfloat16(), pixel_values, [1])
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-5)
    np.testing.assert_allclose(weights, expected, atol=0.05)


def test_what_cannot_be_walked_is_refused(tiny_config: Any, pixel_values: torch.Tensor) -> None:
    model = HFViTModel(tiny_config()).eval()
    with pytest.raises(ValueError, match=r"pixel_values must be \[batch, channels, height, width\], got \[24, 192\]"):
        next(attention_weights(model, torch.randn(24, 192)))
    with pytest.raises(ValueError, match="An image of 33x48 pixels"):
        attention_maps(model, torch.randn(1, 3, 33, 48))
    with pytest.raises(ValueError, match="got InferenceModel: inspect the model before wrapping"):
        attention_distance(optimize_for_inference(model, "fp32"), [pixel_values])
    with pytest.raises(ValueError, match=r"got MergingLayer: .* merge_tokens\(model, 0\)"):
        token_norms(merge_tokens(model, 4), pixel_values)


# ------------------------------------------------------------------------------------------------------ distance


@pytest.mark.parametrize("patch", [(8, 8), (16, 4)])
@pytest.mark.parametrize("registers", [0, 2])
def test_uniform_attention_has_the_mean_distance(patch: tuple[int, int], registers: int, tiny_config: Any) -> None:
    model = looking_alike(HFViTModel(tiny_config(patch_size=patch, num_register_tokens=registers)))
    for height, width in ((32, 48), (16, 80)):
        centres = [(row, column) for row in range(0, height, patch[0]) for column in range(0, width, patch[1])]
        expected = np.mean([math.dist(one, other) for one in centres for other in centres])
        distance = attention_distance(model, [torch.randn(3, 3, height, width), torch.randn(1, 3, height, width)])
        assert distance.shape == (3, 4) and distance.dtype == np.float32
        np.testing.assert_allclose(distance, expected, rtol=1e-5)
        assert uniform_distance((height // patch[0], width // patch[1]), patch) == pytest.approx(expected, rel=1e-6)


def test_attention_to_one_place_has_its_distance(tiny_config: Any) -> None:
    """One head looks at itself, one a patch to the right, one two patches down; the others at all alike."""
    model = looking_alike(HFViTModel(tiny_config(position_embedding_type="relative", num_register_tokens=2)))
    table = model.embeddings.position_embeddings.offsets.weight.data.zero_()  # [layers, 7, 11, A]
    table[0, 3, 5, 0] = table[0, 3, 4, 1] = table[0, 1, 5, 2] = 200.0
    distance = attention_distance(model, [torch.randn(2, 3, 32, 48)])
    rows, columns = np.divmod(np.arange(24), 6)
    of_pairs = 8 * np.hypot(rows[:, None] - rows, columns[:, None] - columns)  # of all patches alike
    at_the_right, at_the_bottom = of_pairs[columns == 5].mean(axis=1), of_pairs[rows >= 2].mean(axis=1)
    expected = [0, (20 * 8 + at_the_right.sum()) / 24, (12 * 16 + at_the_bottom.sum()) / 24, of_pairs.mean()]
    np.testing.assert_allclose(distance[0], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(distance[1:], of_pairs.mean(), rtol=1e-5)


def test_distance_is_the_mean_of_all_images(tiny_config: Any) -> None:
    model, plain = twins(tiny_config(num_register_tokens=1))
    images = torch.randn(5, 3, 32, 48)
    with torch.no_grad():
        attentions = plain(images, output_attentions=True).attentions
    rows, columns = np.divmod(np.arange(24), 6)
    of_pairs = 8 * np.hypot(rows[:, None] - rows, columns[:, None] - columns)
    for number, distance in enumerate(attention_distance(model, images.split(2))):
        weights = attentions[number][:, :, 2:, 2:].double().numpy()
        weights /= weights.sum(axis=-1, keepdims=True)
        np.testing.assert_allclose(distance, (weights * of_pairs).sum(axis=-1).mean(axis=(0, 2)), rtol=1e-4)


def test_distance_of_no_image_and_of_one_patch(tiny_config: Any) -> None:
    model = HFViTModel(tiny_config())
    with pytest.raises(ValueError, match="at least one batch of images, got none"):
        attention_distance(model, [])
    assert not attention_distance(model, [torch.randn(1, 3, 8, 8)]).any()


# ------------------------------------------------------------------------------------------------------- rollout


def test_rollout_of_the_identity_is_the_identity() -> None:
    identity = torch.eye(7).expand(2, -1, -1)
    assert torch.equal(rollout([identity] * 5), identity)


def test_rollout_goes_from_the_last_layer_to_the_first() -> None:
    """The last layer looks from token 0 to 1, the first from 1 to 2: a quarter of token 0 comes from 2."""
    first, last = torch.eye(3), torch.eye(3)
    first[1], last[0] = torch.tensor([0.0, 0, 1]), torch.tensor([0.0, 1, 0])
    expected = torch.tensor([[0.5, 0.25, 0.25], [0, 0.5, 0.5], [0, 0, 1]])
    torch.testing.assert_close(rollout([first[None], last[None]])[0], expected)


def test_every_pooling_says_from_where_it_looks() -> None:
    assert READ_BY.keys() == set(POOLINGS)


@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_rollout_of_uniform_attention(pooling: str, registers: int, tiny_config: Any) -> None:
    """Through 3 layers a token keeps 1/8 of itself, and has the rest from all alike."""
    model = looking_alike(HFViTModel(tiny_config(pooling=pooling, num_register_tokens=registers)))
    if pooling.startswith("attention"):
        for parameter in model.pooler.pooling.query.parameters():
            parameter.data.zero_()
    prefix = model.config.num_prefix_tokens
    of_itself = {
        "cls": 0,
        "cls_and_distillation": 0,
        "cls_and_mean": 0.5 / 24,
        "mean": 1 / 24,
        "attention_patches": 1 / 24,
        "mean_all": 1 / (24 + prefix),
        "attention": 1 / (24 + prefix),
    }[pooling]
    expected = of_itself / 8 + 7 / 8 / (24 + prefix)
    rolled = attention_rollout(model, torch.randn(2, 3, 32, 48))
    assert rolled.shape == (2, 4, 6)
    np.testing.assert_allclose(rolled, expected, rtol=1e-5)


@pytest.mark.parametrize("kind", ["attention", "attention_patches"])
def test_rollout_sees_what_attention_pooling_reads(kind: str, tiny_config: Any, pixel_values: torch.Tensor) -> None:
    """Values in the pool that tell the tokens apart give back the weights that were used."""
    model = HFViTModel(tiny_config(pooling=kind, num_register_tokens=1, initializer_range=0.3)).eval()
    pooling, seen = model.pooler.pooling, []
    attend = torch.nn.functional.scaled_dot_product_attention

    def record(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        identity = torch.eye(key.shape[2]).expand(*key.shape[:2], -1, -1)
        seen.append(attend(query, key, identity).mean(dim=1)[:, 0])
        return attend(query, key, value)

    with pytest.MonkeyPatch.context() as patched, torch.no_grad():
        tokens = model(pixel_values).last_hidden_state
        patched.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
        pooling(tokens)
    read = torch.nn.functional.pad(seen[0], (25 - seen[0].shape[1], 0))
    average = [torch.from_numpy(weights).mean(dim=1) for _, weights in attention_weights(model, pixel_values)]
    expected = (read.unsqueeze(1) @ rollout(average))[:, 0, 1:].unflatten(1, (4, 6))
    np.testing.assert_allclose(attention_rollout(model, pixel_values), expected.numpy(), atol=1e-6)


def test_rollout_ends_at_any_layer_and_its_heads_make_up_the_whole(
    tiny_config: Any, pixel_values: torch.Tensor
) -> None:
    config = tiny_config(initializer_range=0.3, pooling="mean")
    model = HFViTModel(config)
    shallow = HFViTModel(tiny_config(initializer_range=0.3, pooling="mean", num_hidden_layers=2))
    shallow.load_state_dict({name: model.state_dict()[name] for name in shallow.state_dict()})
    whole = attention_rollout(model, pixel_values, 2)
    np.testing.assert_allclose(whole, attention_rollout(shallow, pixel_values), atol=1e-7)
    np.testing.assert_array_equal(attention_rollout(model, pixel_values, -1), attention_rollout(model, pixel_values))
    heads = np.stack([attention_rollout(model, pixel_values, 2, head) for head in (1, 2, 3, 4)])
    np.testing.assert_allclose(heads.mean(axis=0), whole, atol=1e-7)
    assert np.abs(heads - whole).max() > 1e-4
    for layer, head in ((4, None), (0, None), (1, 0), (1, 5)):
        with pytest.raises(ValueError, match=r"Expected a (layer|head) from 1 to"):
            attention_rollout(model, pixel_values, layer, head)


# ---------------------------------------------------------------------------------------------------------- maps


@pytest.mark.parametrize("pooling", ["cls", "cls_and_distillation", "mean"])
def test_maps_are_rows_of_the_weights(pooling: str, tiny_config: Any, pixel_values: torch.Tensor) -> None:
    model = HFViTModel(tiny_config(pooling=pooling, num_register_tokens=2, initializer_range=0.3))
    prefix = model.config.num_prefix_tokens
    ((_, weights),) = attention_weights(model, pixel_values, [2])
    rows = weights[:, :, :1] if model.config.use_cls_token else weights[:, :, prefix:]
    expected = rows.mean(axis=2)[..., prefix:].reshape(2, 4, 4, 6)
    np.testing.assert_allclose(attention_maps(model, pixel_values, 2), expected, atol=1e-6)
    assert np.array_equal(attention_maps(model, pixel_values, -2), attention_maps(model, pixel_values, 2))
