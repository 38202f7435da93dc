"""The model's properties, for every kind of position embedding and pooling."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import hf_vit
from hf_vit import HFViTBackbone, HFViTForImageClassification, HFViTForMaskedImageModeling, HFViTModel
from hf_vit.model import layers_hf_vit, positions_hf_vit, repository_hf_vit
from hf_vit.model import modeling_hf_vit as modeling
from hf_vit.model.layers_hf_vit import HFViTPaperCorruption, HFViTProductAttention, patchify, unpatchify
from hf_vit.model.positions_hf_vit import (
    HFViTRelativePositions,
    HFViTSinCos2DPositions,
    resample_position_embeddings,
)
from hf_vit.model.validation_hf_vit import POOLINGS as POOLING_KINDS
from hf_vit.model.validation_hf_vit import POSITION_EMBEDDINGS, POSITION_INTERPOLATIONS

EVERYTHING = {
    "num_register_tokens": 2,
    "layer_scale_init_value": 0.5,
    "use_qk_norm": True,
    "head_dim": 12,
    "representation_size": 16,
    "drop_path_rate": 0.2,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "patch_dropout_prob": 0.25,
    "initializer_range": 0.2,
}
KINDS = list(itertools.product(POSITION_EMBEDDINGS, POOLING_KINDS))
# What checkpoints of one family or another need, and the paper's model does not.
FAMILY_PARTS = {
    "gated": {"use_gated_mlp": True, "mlp_bias": False, "hidden_act": "silu"},
    "clip": {"use_pre_layernorm": True, "patch_bias": False, "final_layernorm": "pooled"},
    "vit_pytorch": {"use_patch_layernorm": True, "qkv_bias": False, "proj_bias": False, "final_layernorm": "none"},
    "one_head": {"num_attention_heads": 1, "use_output_projection": False},
    "hybrid": {"stem_layers": [2, 1], "stem_width": 32},
    "hybrid_root": {"stem_layers": []},
    "registers_with_place": {"num_register_tokens": 2, "num_prefix_positions": 3},
    "no_prefix_position": {"num_prefix_positions": 0},
    "relative_prefix": {"position_embedding_type": "relative", "num_prefix_positions": 1},
    "rotary": {"position_embedding_type": "rotary", "patch_dropout_prob": 0.5, "num_register_tokens": 1},
    "rotary_by_index": {
        "position_embedding_type": "learned_rotary",
        "rope_coordinates": "index",
        "rope_grid": (3, 5),
        "rope_offset": 1.0,
        "patch_dropout_prob": 0.5,
    },
    "norms_inside": {"use_attention_layernorm": True, "use_mlp_layernorm": True},
    "distilled_one_head": {"use_distillation_token": True},
    "positions_of_layers": {"position_placement": "every_layer", "patch_dropout_prob": 0.5, "num_register_tokens": 1},
    "positions_of_all_layers": {"position_placement": "every_layer_shared", "position_embedding_type": "learned_2d"},
}


def everything(tiny_config, positions, pooling):
    fields = dict(EVERYTHING)
    if pooling == "cls_and_distillation":
        fields["representation_size"] = None
    return tiny_config(position_embedding_type=positions, pooling=pooling, use_cls_token=True, **fields)


def randomised(model: nn.Module) -> nn.Module:
    """Give every parameter a value of its own, so that no zero or one hides a mistake."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


# ---------------------------------------------------------------------------------------------------- patches


@pytest.mark.parametrize("patch_size", [8, (8, 16), (16, 8)])
def test_projection_of_patches_is_the_strided_convolution(tiny_config, pixel_values, patch_size):
    config = tiny_config(patch_size=patch_size)
    embeddings = modeling.HFViTPatchEmbeddings(config)
    weight = embeddings.projection.weight.unflatten(1, (3, *config.patch_shape))
    convolved = F.conv2d(pixel_values, weight, embeddings.projection.bias, stride=config.patch_shape)
    torch.testing.assert_close(embeddings(pixel_values), convolved.flatten(2).transpose(1, 2))


def test_patches_go_back_to_the_image(pixel_values):
    patches = patchify(pixel_values, (8, 16))
    assert patches.shape == (2, 4 * 3, 3 * 8 * 16)
    assert torch.equal(unpatchify(patches, (8, 16), (4, 3)), pixel_values)
    assert torch.equal(patches[0, 4].view(3, 8, 16), pixel_values[0, :, 8:16, 16:32])  # second row, second column


@pytest.mark.parametrize("shape", [(2, 1, 32, 48), (3, 32, 48)])
def test_a_wrong_input_is_refused(tiny_config, shape):
    with pytest.raises(ValueError, match=r"\[batch, 3, height, width\]"):
        HFViTModel(tiny_config())(torch.randn(shape))


def test_missing_pixels_are_refused(tiny_config):
    with pytest.raises(ValueError, match="pixel_values is missing"):
        HFViTModel(tiny_config())()


@pytest.mark.parametrize("size", [(40, 47), (4, 48), (0, 48)])
def test_an_image_that_the_patch_does_not_divide_is_refused(tiny_config, size):
    with pytest.raises(ValueError, match="nearest sizes"):
        HFViTModel(tiny_config())(torch.randn(1, 3, *size))


# -------------------------------------------------------------------------------------------------- positions


def test_resampling_to_the_same_grid_is_the_identity():
    table = torch.randn(1, 24, 8)
    assert resample_position_embeddings(table, (4, 6), (4, 6)) is table


@pytest.mark.parametrize("interpolation", POSITION_INTERPOLATIONS)
def test_resampling_keeps_a_constant_and_turns_with_the_grid(interpolation):
    constant = torch.full((1, 24, 8), 2.5)
    resampled = resample_position_embeddings(constant, (4, 6), (7, 3), interpolation)
    torch.testing.assert_close(resampled, torch.full((1, 21, 8), 2.5))

    table = torch.randn(1, 4, 6, 8)
    wide = resample_position_embeddings(table.flatten(1, 2), (4, 6), (5, 9), interpolation)
    turned = table.transpose(1, 2).flatten(1, 2)
    tall = resample_position_embeddings(turned, (6, 4), (9, 5), interpolation)
    torch.testing.assert_close(tall.unflatten(1, (9, 5)).transpose(1, 2), wide.unflatten(1, (5, 9)))


def weights_along_an_axis(kind: str, old: int, new: int) -> Tensor:
    """Return what every old cell gives to every new one, `[new, old]`, by the definitions of the kernels."""
    scale = (old - 1) / (new - 1) if kind.endswith("corners") else old / (new + 0.1 * kind.endswith("offset"))
    centres = torch.arange(new) * scale if kind.endswith("corners") else (torch.arange(new) + 0.5) * scale - 0.5
    reach = max(scale, 1) if kind.endswith("antialias") else 1
    cells = torch.arange(-8, old + 8)
    x = (centres[:, None] - cells).abs() / reach
    if kind.startswith("bilinear"):
        weights = (1 - x).clamp(min=0)
    else:  # Keys' cubic convolution, with Pillow's constant where it is Pillow's way to resample
        a = -0.5 if kind.endswith("antialias") else -0.75
        near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
        weights = torch.where(x <= 1, near, torch.where(x < 2, far, 0))
    if kind.endswith("antialias"):  # cells beyond the edge do not count
        weights = weights[:, 8:-8]
        return weights / weights.sum(dim=1, keepdim=True)
    return torch.zeros(new, old).index_add(1, cells.clamp(0, old - 1), weights)  # the edge goes on


@pytest.mark.parametrize("grid", [(7, 3), (2, 11), (3, 4)])
@pytest.mark.parametrize("interpolation", POSITION_INTERPOLATIONS)
def test_resampling_is_by_its_kernel(interpolation, grid):
    table = torch.randn(2, 4, 6, 8)
    rows, columns = (weights_along_an_axis(interpolation, old, new) for old, new in zip((4, 6), grid, strict=True))
    expected = torch.einsum("ry, cx, kyxd -> krcd", rows, columns, table).flatten(1, 2)
    actual = resample_position_embeddings(table.flatten(1, 2), (4, 6), grid, interpolation)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_the_same_number_of_patches_in_another_aspect_is_resampled():
    table = torch.randn(1, 24, 8)
    assert not torch.allclose(resample_position_embeddings(table, (4, 6), (6, 4)), table)


def test_resampling_computes_in_float32():
    table = torch.randn(1, 24, 8)
    low = resample_position_embeddings(table.bfloat16(), (4, 6), (8, 12))
    assert low.dtype == torch.bfloat16
    high = resample_position_embeddings(table.bfloat16().float(), (4, 6), (8, 12))
    assert torch.equal(low, high.bfloat16())


def test_sincos_is_big_vision_s():
    """The formula of big_vision's posemb_sincos_2d, in numpy."""
    import numpy as np

    rows, columns = np.mgrid[:3, :5]
    omega = 1.0 / 10_000 ** (np.arange(4) / 3)
    row_angles, column_angles = (np.einsum("m,d->md", part.flatten(), omega) for part in (rows, columns))
    waves = [np.sin(column_angles), np.cos(column_angles), np.sin(row_angles), np.cos(row_angles)]
    positions = HFViTSinCos2DPositions(hf_vit.HFViTConfig(hidden_size=16, num_attention_heads=1))
    expected = torch.from_numpy(np.concatenate(waves, axis=1)).float()[None]
    torch.testing.assert_close(positions.on_grid((3, 5)), expected, rtol=0, atol=1e-7)


def test_relative_bias_depends_on_the_offset_alone(tiny_config):
    positions = randomised(HFViTRelativePositions(tiny_config(position_embedding_type="relative")))
    bias = positions.bias_of_patches((4, 6)).unflatten(2, (4, 6)).unflatten(4, (4, 6))  # [layers, A, h, w, h, w]
    assert bias.shape == (3, 4, 4, 6, 4, 6)
    assert torch.equal(bias[..., 0, 0, 1, 2], bias[..., 2, 3, 3, 5])
    assert not torch.equal(bias[..., 0, 0, 1, 2], bias[..., 1, 2, 0, 0])
    assert torch.equal(bias[:, :, 0, 0, 1, 2], positions.offsets.weight[:, 3 - 1, 5 - 2])


def test_without_positions_patches_are_a_bag(tiny_config):
    model = HFViTModel(tiny_config(position_embedding_type="none")).eval()
    patches = patchify(torch.randn(1, 3, 32, 48), (8, 8))
    shuffled = patches[:, torch.randperm(24)]
    outputs = [model(unpatchify(order, (8, 8), (4, 6))).pooler_output for order in (patches, shuffled)]
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("kind", ["learned", "learned_2d", "sincos_2d", "relative"])
def test_with_positions_the_order_matters(tiny_config, kind):
    model = randomised(HFViTModel(tiny_config(position_embedding_type=kind))).eval()
    patches = patchify(torch.randn(1, 3, 32, 48), (8, 8))
    shuffled = patches[:, torch.randperm(24)]
    outputs = [model(unpatchify(order, (8, 8), (4, 6))).pooler_output for order in (patches, shuffled)]
    assert (outputs[0] - outputs[1]).abs().max() > 1e-4  # rounding alone is below 1e-6


def test_patches_permuted_with_their_positions_permute_the_outputs(tiny_config):
    model = randomised(HFViTModel(tiny_config())).eval()
    permuted = copy.deepcopy(model)
    order = torch.randperm(24)
    table = permuted.embeddings.position_embeddings.table.weight
    table.data = table.data.flatten(1, 2)[:, order].unflatten(1, (4, 6))
    patches = patchify(torch.randn(1, 3, 32, 48), (8, 8))
    plain = model(unpatchify(patches, (8, 8), (4, 6))).last_hidden_state
    moved = permuted(unpatchify(patches[:, order], (8, 8), (4, 6))).last_hidden_state
    torch.testing.assert_close(moved[:, 0], plain[:, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moved[:, 1:], plain[:, 1:][:, order], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["learned", "learned_2d"])
def test_positions_of_every_layer(tiny_config, pixel_values, kind):
    """Only the first layer's: those of the input. All alike: the shared ones. Without any: none."""

    def model_of(placement, kind=kind):
        config = tiny_config(position_embedding_type=kind, position_placement=placement, num_register_tokens=1)
        return randomised(HFViTModel(config)).eval()

    def outputs(model):
        with torch.no_grad():
            return model(pixel_values).last_hidden_state

    at_input = model_of("input")
    for placement in ("every_layer", "every_layer_shared"):
        model = model_of(placement)
        state = at_input.state_dict()
        for name, table in model.named_parameters():
            if "position_embeddings" in name:  # [layers or 1, ...]
                state[name] = torch.cat([state[name], torch.zeros_like(table[1:])])
        model.load_state_dict(state)
        if placement == "every_layer":
            torch.testing.assert_close(outputs(model), outputs(at_input))
            for name, table in model.named_parameters():
                if "position_embeddings" in name:
                    table.data[1:] = table.data[:1]
            alike = outputs(model)
            assert (alike - outputs(at_input)).abs().max() > 1e-3
    torch.testing.assert_close(outputs(model), alike)
    for name, table in model.named_parameters():
        if "position_embeddings" in name:
            table.data.zero_()
    bag = model_of("input", kind="none")
    bag.load_state_dict({k: v for k, v in model.state_dict().items() if "position_embeddings" not in k})
    torch.testing.assert_close(outputs(model), outputs(bag))


# --------------------------------------------------------------------------------------------- any resolution


@pytest.mark.parametrize("kind", POSITION_EMBEDDINGS)
@pytest.mark.parametrize("size", [(64, 48), (24, 80), (8, 8), (48, 32)])
def test_a_forward_takes_any_size(tiny_config, kind, size):
    model = HFViTForImageClassification(tiny_config(position_embedding_type=kind, num_register_tokens=1)).eval()
    assert model(torch.randn(2, 3, *size)).logits.shape == (2, 5)


@pytest.mark.parametrize(
    ("kind", "placement"),
    [
        *((kind, "input") for kind in ("learned", "learned_2d", "sincos_2d", "relative")),
        ("learned", "every_layer"),
        ("learned_2d", "every_layer"),
    ],
)
@pytest.mark.parametrize("size", [64, (48, 80), (48, 32)])
def test_loading_at_another_size_resamples_once(tmp_path, tiny_config, kind, placement, size):
    config = tiny_config(position_embedding_type=kind, position_placement=placement)
    model = randomised(HFViTForImageClassification(config)).eval()
    model.save_pretrained(tmp_path / "small")
    larger = HFViTForImageClassification.from_pretrained(tmp_path / "small", image_size=size).eval()
    pixel_values = torch.randn(2, 3, *larger.config.image_shape)
    with torch.no_grad():
        expected = model(pixel_values).logits
        torch.testing.assert_close(larger(pixel_values).logits, expected, rtol=1e-5, atol=1e-5)

    larger.save_pretrained(tmp_path / "large")
    again = HFViTForImageClassification.from_pretrained(tmp_path / "large").eval()
    assert again.config.image_shape == larger.config.image_shape
    for name, parameter in larger.state_dict().items():
        assert torch.equal(parameter, again.state_dict()[name]), name


def test_a_resampled_table_follows_the_weights(tiny_config):
    model = HFViTModel(tiny_config()).eval()
    table = model.embeddings.position_embeddings.table
    with torch.inference_mode():
        first = table((8, 8))
    with torch.no_grad():
        table.weight.mul_(2)
        torch.testing.assert_close(table((8, 8)), 2 * first)
        assert model.double().embeddings.position_embeddings.table((8, 8)).dtype == torch.float64
    table((8, 8)).sum().backward()
    assert table.weight.grad.abs().sum() > 0


# -------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize(("positions", "pooling"), KINDS)
def test_a_gradient_reaches_every_parameter(tiny_config, positions, pooling):
    config = everything(tiny_config, positions, pooling)
    model = HFViTForImageClassification(config).train()
    # So many images that no layer is dropped for all of them.
    model(torch.randn(12, 3, 32, 48), labels=torch.arange(12) % 5).loss.backward()
    without = {name for name, parameter in model.named_parameters() if not _is_reached(parameter)}
    assert not without


@pytest.mark.parametrize("part", FAMILY_PARTS)
def test_what_a_family_needs_trains_saves_and_loads(tiny_config, tmp_path, part):
    model = randomised(HFViTForImageClassification(tiny_config(**FAMILY_PARTS[part]))).train()
    model(torch.randn(6, 3, 32, 48), labels=torch.arange(6) % 5).loss.backward()
    assert not {name for name, parameter in model.named_parameters() if not _is_reached(parameter)}
    model.eval().save_pretrained(tmp_path)
    loaded = HFViTForImageClassification.from_pretrained(tmp_path)
    pixel_values = torch.randn(2, 3, 48, 32)  # another grid
    with torch.no_grad():
        expected = model(pixel_values).logits
        assert torch.equal(loaded(pixel_values).logits, expected)
        model.set_attn_implementation("eager")
        torch.testing.assert_close(model(pixel_values).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("objective", ["pixels", "mean_color", "autoencoder"])
def test_a_gradient_reaches_every_parameter_of_masked_image_modeling(tiny_config, pixel_values, objective):
    model = HFViTForMaskedImageModeling(tiny_config(mim_objective=objective)).train()
    model(pixel_values, bool_masked_pos=torch.rand(2, 24).argsort(dim=1) < 12).loss.backward()
    assert not {name for name, parameter in model.named_parameters() if not _is_reached(parameter)}


def _is_reached(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and bool(parameter.grad.isfinite().all()) and bool(parameter.grad.any())


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_gradient_checkpointing_changes_nothing(tiny_config, pixel_values):
    model = HFViTForImageClassification(tiny_config(position_embedding_type="relative")).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(pixel_values, labels=torch.tensor([0, 1])).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


# -------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize(("positions", "pooling"), KINDS)
def test_eager_equals_sdpa(tiny_config, pixel_values, positions, pooling):
    config = everything(tiny_config, positions, pooling)
    model = HFViTForImageClassification(config).eval()
    logits = {}
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        with torch.no_grad():
            logits[attention] = model(pixel_values).logits
    torch.testing.assert_close(logits["eager"], logits["sdpa"], rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.slow
def test_flex_equals_sdpa(tiny_config, pixel_values):
    model = HFViTModel(tiny_config(hidden_size=64)).eval()
    with torch.no_grad():
        expected = model(pixel_values).last_hidden_state
        model.set_attn_implementation("flex_attention")
        torch.testing.assert_close(model(pixel_values).last_hidden_state, expected, rtol=1e-4, atol=1e-5)


def test_relative_positions_refuse_an_attention_that_cannot_add_them(tiny_config, pixel_values):
    model = HFViTModel(tiny_config(position_embedding_type="relative", attn_implementation="flex_attention"))
    with pytest.raises(ValueError, match="'sdpa' or 'eager'"):
        model(pixel_values)


def test_attentions_are_given_with_sdpa_too(tiny_config, pixel_values):
    model = HFViTForImageClassification(tiny_config(attn_implementation="sdpa", num_register_tokens=1)).eval()
    with torch.no_grad():
        plain = model(pixel_values)
        asked = model(pixel_values, output_attentions=True)
        model.config.output_attentions = True
        configured = model(pixel_values)
    assert plain.attentions is None
    for outputs in (asked, configured):
        assert [weights.shape for weights in outputs.attentions] == [(2, 4, 26, 26)] * 3
        torch.testing.assert_close(outputs.attentions[0].sum(-1), torch.ones(2, 4, 26))
        torch.testing.assert_close(outputs.logits, plain.logits)


@pytest.mark.parametrize("positions", ["learned", "relative"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_masked_tokens_are_not_attended_to(tiny_config, pixel_values, positions, attention):
    config = tiny_config(position_embedding_type=positions, attn_implementation=attention)
    model = HFViTModel(config).eval()
    attention_mask = torch.ones(2, 25, dtype=torch.long)
    attention_mask[:, -6:] = 0  # the last row of patches
    changed = pixel_values.clone()
    changed[:, :, -8:] += 1
    with torch.no_grad():
        outputs = [model(image, attention_mask=attention_mask).last_hidden_state for image in (pixel_values, changed)]
        weights = model(pixel_values, attention_mask=attention_mask, output_attentions=True).attentions[0]
    torch.testing.assert_close(outputs[0][:, :-6], outputs[1][:, :-6])
    assert weights[..., -6:].max() == 0


# ------------------------------------------------------------------------------------------------ the pooling


def test_poolings_read_what_they_say(tiny_config):
    hidden_states = torch.randn(2, 1 + 2 + 24, 32)
    fields = {"num_register_tokens": 2, "use_cls_token": True}
    cls, mean, attention = (
        randomised(modeling.HFViTPooler(tiny_config(pooling=pooling, **fields)))
        for pooling in ("cls", "mean", "attention")
    )
    assert torch.equal(cls(hidden_states), hidden_states[:, 0])
    torch.testing.assert_close(mean(hidden_states), hidden_states[:, 3:].mean(1))
    torch.testing.assert_close(attention(hidden_states), attention(hidden_states[:, torch.randperm(27)]))


def test_attention_pooling_is_torch_s_multi_head_attention(tiny_config):
    pooling = randomised(modeling.HFViTAttentionPooling(tiny_config(pooling="attention"))).eval()
    reference = nn.MultiheadAttention(32, 4, batch_first=True)
    with torch.no_grad():
        key, value = pooling.key_value.weight.unflatten(0, (4, 2, 8)).unbind(1)
        reference.in_proj_weight.copy_(torch.cat([pooling.query.weight, key.flatten(0, 1), value.flatten(0, 1)]))
        key, value = pooling.key_value.bias.unflatten(0, (4, 2, 8)).unbind(1)
        reference.in_proj_bias.copy_(torch.cat([pooling.query.bias, key.flatten(), value.flatten()]))
        reference.out_proj.load_state_dict(pooling.o_proj.state_dict())
    hidden_states = torch.randn(2, 24, 32)
    pooled, _ = reference(pooling.probe.expand(2, -1, -1), hidden_states, hidden_states)
    expected = (pooled + pooling.mlp(pooling.layernorm(pooled))).squeeze(1)
    torch.testing.assert_close(pooling(hidden_states), expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------- regularisation


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    drop_path = modeling.HFViTDropPath(0.25).train()
    out = drop_path(torch.ones(4000, 2, 3))
    assert set(out.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert torch.equal(out, out[:, :1, :1].expand_as(out))
    assert abs(out.mean().item() - 1) < 0.05
    assert torch.equal(drop_path.eval()(out), out)


def test_drop_path_grows_with_depth(tiny_config):
    layers = HFViTModel(tiny_config(drop_path_rate=0.2)).layers
    assert [layer.drop_path.probability for layer in layers] == pytest.approx([0.0, 0.1, 0.2])


@pytest.mark.parametrize("positions", ["learned", "relative"])
def test_patch_dropout_keeps_a_share_in_training_alone(tiny_config, pixel_values, positions):
    model = HFViTModel(tiny_config(patch_dropout_prob=0.5, position_embedding_type=positions))
    assert model.train()(pixel_values).last_hidden_state.shape == (2, 1 + 12, 32)
    assert model.eval()(pixel_values).last_hidden_state.shape == (2, 1 + 24, 32)


def test_a_dropped_patch_takes_its_relative_bias_along(tiny_config, pixel_values):
    embeddings = randomised(HFViTModel(tiny_config(position_embedding_type="relative")).embeddings)
    whole = embeddings(pixel_values)[1].bias
    kept = torch.tensor([[3, 1, 20], [0, 5, 7]])
    embeddings.patch_dropout.forward = lambda patches: (patches.take_along_dim(kept.unsqueeze(-1), 1), kept)
    bias = embeddings(pixel_values)[1].bias
    assert bias.shape == (3, 2, 4, 4, 4)
    assert torch.equal(bias[:, 0, :, 1, 3], whole[:, 0, :, 1 + 3, 1 + 20])
    assert torch.equal(bias[:, 1, :, 2, 1], whole[:, 0, :, 1 + 5, 1 + 0])
    assert not bias[:, :, :, 0].any()  # the class token has no place


@pytest.mark.parametrize("model_class", [HFViTBackbone, HFViTForMaskedImageModeling])
def test_patch_dropout_is_refused_where_every_patch_counts(tiny_config, model_class):
    with pytest.raises(ValueError, match="patch_dropout_prob=0"):
        model_class(tiny_config(patch_dropout_prob=0.5))


# ---------------------------------------------------------------------------------------------- classification


def classifier(tiny_config, **fields):
    return HFViTForImageClassification(tiny_config(**fields)).eval()


def test_single_label_loss(tiny_config, pixel_values):
    model = classifier(tiny_config)
    labels = torch.tensor([4, 0])
    outputs = model(pixel_values, labels=labels)
    torch.testing.assert_close(outputs.loss, F.cross_entropy(outputs.logits, labels))
    summed = model(pixel_values, labels=labels, num_items_in_batch=8).loss
    torch.testing.assert_close(summed, F.cross_entropy(outputs.logits, labels, reduction="sum") / 8)
    ignored = model(pixel_values, labels=torch.tensor([4, -100])).loss
    torch.testing.assert_close(ignored, F.cross_entropy(outputs.logits[:1], labels[:1]))


@pytest.mark.parametrize("problem_type", [None, "single_label_classification"])
def test_soft_labels_are_cross_entropy_and_leave_the_config_alone(tiny_config, pixel_values, problem_type):
    model = classifier(tiny_config, problem_type=problem_type)
    labels = torch.rand(2, 5).softmax(-1)
    outputs = model(pixel_values, labels=labels)
    torch.testing.assert_close(outputs.loss, F.cross_entropy(outputs.logits, labels))
    assert model.config.problem_type == problem_type
    # Trainer counts the entries of labels, here 5 a sample: 4 accumulated samples are 20 items.
    accumulated = model(pixel_values, labels=labels, num_items_in_batch=20).loss
    torch.testing.assert_close(accumulated, F.cross_entropy(outputs.logits, labels, reduction="sum") / 4)


def test_several_labels_an_image_do_not_pass_for_soft_labels(tiny_config, pixel_values):
    labels = torch.tensor([[1.0, 1, 0, 0, 0], [0, 0, 1, 0, 1]])
    with pytest.raises(ValueError, match="multi_label_classification"):
        classifier(tiny_config)(pixel_values, labels=labels)
    model = classifier(tiny_config, problem_type="multi_label_classification")
    outputs = model(pixel_values, labels=labels)
    torch.testing.assert_close(outputs.loss, F.binary_cross_entropy_with_logits(outputs.logits, labels))
    accumulated = model(pixel_values, labels=labels, num_items_in_batch=20).loss
    torch.testing.assert_close(accumulated, outputs.loss / 2)


@pytest.mark.parametrize("num_labels", [1, 3])
def test_regression(tiny_config, pixel_values, num_labels):
    model = classifier(tiny_config, num_labels=num_labels, problem_type="regression")
    labels = torch.randn(2) if num_labels == 1 else torch.randn(2, 3)
    outputs = model(pixel_values, labels=labels)
    torch.testing.assert_close(outputs.loss, F.mse_loss(outputs.logits, labels.view(2, num_labels)))


def test_labels_of_the_wrong_shape_are_refused(tiny_config, pixel_values):
    with pytest.raises(ValueError, match=r"\[2, 5\]"):
        classifier(tiny_config)(pixel_values, labels=torch.rand(2, 4))


def test_the_head_starts_at_zero_on_request(tiny_config, pixel_values):
    assert not classifier(tiny_config, zero_init_head=True)(pixel_values).logits.any()
    assert classifier(tiny_config)(pixel_values).logits.any()


def test_without_labels_the_head_is_the_pooling(tiny_config, pixel_values):
    model = classifier(tiny_config, num_labels=0)
    assert torch.equal(model(pixel_values).logits, model.vit(pixel_values).pooler_output)


# ------------------------------------------------------------------------------------- masked image modelling


def test_reconstruction_of_pixels(tiny_config):
    model = randomised(HFViTForMaskedImageModeling(tiny_config(num_register_tokens=1))).eval()
    pixel_values, mask = torch.randn(2, 3, 40, 24), torch.rand(2, 15) < 0.5  # another grid than the config's
    outputs = model(pixel_values, bool_masked_pos=mask)
    difference = patchify((outputs.reconstruction - pixel_values).abs(), (8, 8)).mean(-1)
    torch.testing.assert_close(outputs.loss, difference[mask].mean())
    changed = pixel_values.clone()
    flat = patchify(changed, (8, 8))
    flat[mask] += 1
    hidden = model(unpatchify(flat, (8, 8), (5, 3)), bool_masked_pos=mask).reconstruction
    torch.testing.assert_close(hidden, outputs.reconstruction)  # what is masked is not seen


def test_mean_colours_are_three_bits_a_channel(tiny_config):
    model = HFViTForMaskedImageModeling(tiny_config(mim_objective="mean_color")).eval()
    colors = torch.tensor([[-1.0, 0.0, 0.999], [1.0, -0.7, 0.3]])
    pixel_values = colors[:, :, None, None].expand(-1, -1, 32, 48)
    numbers = model.objective.colors(pixel_values)
    assert numbers[:, 0].tolist() == [0 * 64 + 4 * 8 + 7, 7 * 64 + 1 * 8 + 5]
    scores = F.one_hot(numbers, 512).float()
    painted = model.objective.paint(scores, (4, 6))
    assert (painted - pixel_values).abs().max() <= 1 / 8
    outputs = model(pixel_values, bool_masked_pos=torch.ones(2, 24))
    assert outputs.predictions.shape == (2, 24, 512)
    torch.testing.assert_close(outputs.loss, F.cross_entropy(outputs.predictions.flatten(0, 1), numbers.flatten()))


def test_the_paper_s_corruption_is_80_10_10(tiny_config):
    corruption = HFViTPaperCorruption(tiny_config()).train()
    nn.init.constant_(corruption.weight, 7.0)
    patches, mask = torch.arange(20_000.0).view(10, 2000, 1).expand(-1, -1, 32), torch.rand(10, 2000) < 0.5
    corrupted = corruption(patches, mask)[..., 0]
    assert torch.equal(corrupted[~mask], patches[..., 0][~mask])
    token, same = corrupted[mask] == 7, corrupted[mask] == patches[..., 0][mask]
    assert token.float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert same.float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert torch.equal(corruption.eval()(patches, mask)[..., 0][mask], torch.full((int(mask.sum()),), 7.0))


def test_a_mask_of_the_wrong_shape_is_refused(tiny_config, pixel_values):
    with pytest.raises(ValueError, match=r"\[2, 24\]"):
        HFViTForMaskedImageModeling(tiny_config())(pixel_values, bool_masked_pos=torch.ones(2, 25))
    with pytest.raises(ValueError, match="use_mask_token"):
        HFViTModel(tiny_config())(pixel_values, bool_masked_pos=torch.ones(2, 24))


def test_no_masked_patch_is_no_loss(tiny_config, pixel_values):
    outputs = HFViTForMaskedImageModeling(tiny_config())(pixel_values, bool_masked_pos=torch.zeros(2, 24))
    assert outputs.loss == 0
    assert HFViTForMaskedImageModeling(tiny_config())(pixel_values).loss is None


# ------------------------------------------------------------------------------------------------- the backbone


@pytest.mark.parametrize("positions", POSITION_EMBEDDINGS)
def test_feature_maps_are_the_hidden_states_on_the_grid(tiny_config, positions):
    config = tiny_config(
        out_features=["stem", "stage1", "stage3"], num_register_tokens=2, position_embedding_type=positions
    )
    backbone = HFViTBackbone(config).eval()
    with torch.no_grad():
        outputs = backbone(torch.randn(2, 3, 48, 16), output_hidden_states=True)
    assert [feature_map.shape for feature_map in outputs.feature_maps] == [(2, 32, 6, 2)] * 3
    expected = backbone.vit.layernorm(outputs.hidden_states[3])[:, 3:].transpose(1, 2).unflatten(2, (6, 2))
    torch.testing.assert_close(outputs.feature_maps[-1], expected)
    assert backbone.channels == [32] * 3


def test_a_backbone_reads_a_classifier_s_weights(tmp_path, tiny_config, pixel_values):
    model = HFViTForImageClassification(tiny_config()).eval()
    model.save_pretrained(tmp_path)
    backbone = HFViTBackbone.from_pretrained(tmp_path, out_features=["stage2", "stage3"]).eval()
    with torch.no_grad():
        feature_map = backbone(pixel_values).feature_maps[-1]
        expected = model.vit(pixel_values).last_hidden_state[:, 1:].transpose(1, 2).unflatten(2, (4, 6))
    assert torch.equal(feature_map, expected)


# ----------------------------------------------------------------------------------------- loading and saving


@pytest.mark.parametrize(("positions", "pooling"), KINDS)
def test_names_on_disk_are_the_names_in_memory(tmp_path, tiny_config, positions, pooling):
    from safetensors.torch import load_file

    model = HFViTForImageClassification(tiny_config(position_embedding_type=positions, pooling=pooling))
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored.keys() == model.state_dict().keys()
    HFViTForImageClassification(model.config).load_state_dict(stored, strict=True)


def test_another_number_of_labels_is_a_new_head_and_nothing_else(tmp_path, tiny_config):
    model = randomised(HFViTForImageClassification(tiny_config()))
    model.save_pretrained(tmp_path)
    loaded, info = HFViTForImageClassification.from_pretrained(
        tmp_path, num_labels=7, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {key for key, *_ in info["mismatched_keys"]} == {"classifier.weight", "classifier.bias"}
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not loaded.classifier.weight.any() and not loaded.classifier.bias.any()
    for name, parameter in model.vit.state_dict().items():
        assert torch.equal(parameter, loaded.vit.state_dict()[name]), name
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        HFViTForImageClassification.from_pretrained(tmp_path, num_labels=7)


def test_a_built_model_has_the_stated_spread(tiny_config):
    model = HFViTForImageClassification(tiny_config(hidden_size=128, layer_scale_init_value=0.1))
    assert model.vit.embeddings.position_embeddings.table.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.vit.layers[0].attention.qkv.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(model.vit.layers[1].mlp_scale.weight, torch.full((128,), 0.1))


# --------------------------------------------------------------------------------------- compilers and devices


@pytest.mark.parametrize("positions", POSITION_EMBEDDINGS)
def test_a_meta_device_computes_shapes(tiny_config, positions):
    with torch.device("meta"):
        model = HFViTForImageClassification(tiny_config(position_embedding_type=positions))
        assert model(torch.empty(2, 3, 64, 64)).logits.shape == (2, 5)


def test_devices_without_float64_compute_the_same_positions(tiny_config, monkeypatch):
    class WithoutFloat64(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            assert not (isinstance(out, torch.Tensor) and out.dtype == torch.float64), func
            return out

    positions = positions_hf_vit.POSITIONS["sincos_2d"](tiny_config(position_embedding_type="sincos_2d"))
    patches = torch.randn(2, 24, positions.config.hidden_size)
    expected = patches + positions.on_grid((4, 6))
    assert torch.equal(positions(patches, (4, 6)), expected)
    with WithoutFloat64(), pytest.raises(AssertionError):
        positions(patches, (4, 6))
    monkeypatch.setattr(positions_hf_vit, "WITHOUT_FLOAT64", ("cpu",))
    with WithoutFloat64():
        torch.testing.assert_close(positions(patches, (4, 6)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tiny_config, pixel_values, dtype):
    model = HFViTForImageClassification(tiny_config()).eval()
    with torch.no_grad():
        expected = model(pixel_values).logits
        logits = model.to(dtype)(pixel_values).logits  # float32 pixels are brought to the weights' dtype
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.float(), expected, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("positions", POSITION_EMBEDDINGS)
def test_autocast(tiny_config, pixel_values, positions):
    model = HFViTForImageClassification(tiny_config(position_embedding_type=positions)).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(pixel_values, labels=torch.tensor([0, 1])).loss
    assert loss.dtype == torch.float32
    loss.backward()


@pytest.mark.parametrize("positions", POSITION_EMBEDDINGS)
def test_export(tiny_config, positions):
    model = HFViTForImageClassification(tiny_config(position_embedding_type=positions)).eval()
    pixel_values = torch.randn(2, 3, 64, 48)
    exported = torch.export.export(model, (pixel_values,))
    torch.testing.assert_close(exported.module()(pixel_values).logits, model(pixel_values).logits)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("positions", "backend"),
    [
        *(pytest.param(kind, "aot_eager", marks=pytest.mark.full) for kind in ("learned", "learned_2d", "none")),
        *((kind, "aot_eager") for kind in ("sincos_2d", "relative", "rotary")),
        pytest.param("learned", "inductor", marks=pytest.mark.full),  # test_processes trains with inductor
    ],
)
def test_compiles_in_one_graph(tiny_config, positions, backend):
    torch._dynamo.reset()
    config = tiny_config(position_embedding_type=positions, num_hidden_layers=2)
    model = HFViTForImageClassification(config).eval()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    sizes = [(32, 48), (64, 64), (16, 48)]
    if torch.__version__.startswith("2.11"):  # it takes compiling for exporting, see HFViTPositionTable.forward
        sizes = sizes[:1]
    for size in sizes:
        pixel_values = torch.randn(2, 3, *size)
        torch.testing.assert_close(compiled(pixel_values).logits, model(pixel_values).logits, rtol=1e-4, atol=1e-5)
    model.train()
    compiled(torch.randn(2, 3, 32, 48), labels=torch.tensor([0, 1])).loss.backward()
    assert model.classifier.weight.grad.any()


def test_attention_in_products_has_the_right_gradient():
    parts = [torch.randn(2, 3, 7, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *parts: HFViTProductAttention.apply(*parts, 8**-0.5), parts)


@pytest.mark.parametrize("compiler", [None, pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_training_on_matrix_units_learns_the_same(tiny_config, monkeypatch, compiler):
    """Where there are none this is slow, but the same arithmetic."""
    model = HFViTForImageClassification(tiny_config(initializer_range=0.2)).train()
    pixel_values, labels = torch.randn(3, 3, 32, 32), torch.tensor([0, 1, 0])
    applied = []
    apply = HFViTProductAttention.apply
    monkeypatch.setattr(HFViTProductAttention, "apply", lambda *parts: applied.append(parts) or apply(*parts))

    def gradients(has_amx: bool) -> torch.Tensor:
        monkeypatch.setattr(layers_hf_vit, "HAS_AMX", has_amx)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            learner = torch.compile(model, backend=compiler, fullgraph=True) if has_amx and compiler else model
            loss = learner(pixel_values, labels=labels).loss
        loss.backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    expected = gradients(has_amx=False)
    assert not applied
    got = gradients(has_amx=True)
    assert len(applied) == (0 if compiler else model.config.num_hidden_layers)
    assert (got - expected).norm() / expected.norm() < 0.03
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        applied.clear()
        model(pixel_values)
        assert not applied  # nothing is learned here, and the fused kernel is faster


def test_weights_that_were_quantized_are_not_asked_for_their_dtype(tiny_config, pixel_values):
    """torch's dynamic quantization makes a function of `weight`; that of bitsandbytes makes integers of it."""
    model = HFViTForImageClassification(tiny_config(num_labels=3)).eval()
    assert model.num_labels == 3
    expected = model(pixel_values).logits
    model.vit.embeddings.patch_embeddings.projection = _Integers(model.vit.embeddings.patch_embeddings.projection)
    assert torch.equal(model(pixel_values).logits, expected)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half(pixel_values).logits.dtype == torch.bfloat16


class _Integers(nn.Module):
    """A linear layer that stores its weight as integers, as far as their dtype tells."""

    def __init__(self, linear):
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().view(torch.int32), requires_grad=False)
        self.bias = linear.bias

    def forward(self, states):
        return F.linear(states.float(), self.weight.view(torch.float32), self.bias.float()).to(states.dtype)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_dynamic_quantization_of_torch(tiny_config, pixel_values):
    model = HFViTForImageClassification(tiny_config(num_labels=3)).eval()
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    torch.testing.assert_close(quantized(pixel_values).logits, model(pixel_values).logits, atol=0.05, rtol=0)


@pytest.mark.parametrize("bits", ["load_in_8bit", "load_in_4bit"])
@pytest.mark.filterwarnings("ignore")
def test_bitsandbytes(tmp_path, tiny_config, bits):
    pytest.importorskip("bitsandbytes", reason="not installed")
    from transformers import BitsAndBytesConfig

    config = tiny_config(hidden_size=64, intermediate_size=128, num_labels=3)
    HFViTForImageClassification(config).save_pretrained(tmp_path)
    images = torch.randn(4, 3, *config.image_shape)
    expected = HFViTForImageClassification.from_pretrained(tmp_path).vit(images).last_hidden_state
    options = {"quantization_config": BitsAndBytesConfig(**{bits: True}), "device_map": "cpu"}
    model = HFViTForImageClassification.from_pretrained(tmp_path, **options)
    assert (model.vit(images).last_hidden_state.float() - expected).norm() < 0.3 * expected.norm()


def test_saved_over_an_earlier_save(tmp_path, tiny_config):
    """Shards over one file and one file over shards: the weights of the last save are loaded."""
    for number, shards in enumerate(("50MB", "20KB", "50MB")):
        model = HFViTModel(tiny_config())
        nn.init.constant_(model.layernorm.bias, number)
        model.save_pretrained(tmp_path, max_shard_size=shards)
        assert HFViTModel.from_pretrained(tmp_path).layernorm.bias[0] == number
        assert (tmp_path / "model.safetensors").exists() != (tmp_path / "model.safetensors.index.json").exists()


def test_a_model_whose_labels_do_not_fit_its_head_is_not_saved(tmp_path, tiny_config):
    model = HFViTForImageClassification(tiny_config(num_labels=3))
    model.config.id2label = {0: "a", 1: "b"}
    with pytest.raises(ValueError, match="names 2 labels, but the classifier has 3 outputs"):
        model.save_pretrained(tmp_path)


def test_edited_code_beside_a_checkpoint_is_named(tmp_path, tiny_config, monkeypatch):
    said = []
    monkeypatch.setattr(repository_hf_vit.logger, "warning", said.append)
    monkeypatch.setattr(repository_hf_vit.logger, "warning_once", said.append)
    model = HFViTModel(tiny_config())
    model.save_pretrained(tmp_path)
    HFViTModel.from_pretrained(tmp_path)
    assert not said
    (tmp_path / "losses_hf_vit.py").write_text("# edited")
    HFViTModel.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert len(said) == 2 and "has its own losses_hf_vit.py" in said[0] and "Replaced losses_hf_vit.py" in said[1]
