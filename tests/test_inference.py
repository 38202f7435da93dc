"""A model made ready to answer gives the outputs of the model, of every architecture."""

from types import SimpleNamespace

import pytest
import torch

from hf_vit import HFViTForImageClassification, HFViTModel
from hf_vit.inference import optimize as inference
from hf_vit.inference.optimize import PackedLinear, optimize_for_inference
from hf_vit.system.machine import multiplies_in_8_bits

ARCHITECTURES = {
    "plain": {},
    "bare": {"qkv_bias": False, "proj_bias": False, "mlp_bias": False, "patch_bias": False},
    "gated": {"use_gated_mlp": True, "hidden_act": "silu"},
    "tanh": {"hidden_act": "gelu_pytorch_tanh"},
    "of transformers": {"hidden_act": "quick_gelu"},
    "normed and scaled": {"use_qk_norm": True, "layer_scale_init_value": 0.5, "use_pre_layernorm": True},
    "norms inside": {"use_attention_layernorm": True, "use_mlp_layernorm": True, "use_gated_mlp": True},
    "rotary": {"position_embedding_type": "rotary", "num_register_tokens": 2},
    "relative": {"position_embedding_type": "relative", "pooling": "mean", "final_layernorm": "pooled"},
    "positions of layers": {"position_placement": "every_layer"},
    "one head": {"num_attention_heads": 1, "use_output_projection": False},
    "attention": {"pooling": "attention", "representation_size": 12},
    "hybrid": {"stem_layers": [1], "stem_width": 32, "patch_size": 16},
}


@pytest.fixture(params=[PackedLinear, lambda linear: linear], ids=["packed", "as they are"])
def kind(request, monkeypatch):
    """Bring weights into either order, whatever suits this hardware."""
    monkeypatch.setattr(inference, "linear_kind", lambda device, dtype: request.param)


@pytest.mark.parametrize("fields", ARCHITECTURES.values(), ids=ARCHITECTURES)
@torch.no_grad()
def test_outputs_are_the_model_s(tiny_config, kind, fields):
    model = HFViTForImageClassification(tiny_config(initializer_range=0.2, **fields)).eval()
    optimized = optimize_for_inference(model, "fp32")
    for size in ((32, 32), (64, 32)):  # the second resamples positions
        pixel_values = torch.randn(2, 3, *size)
        expected = model(pixel_values).logits
        assert expected.std() > 0.01
        torch.testing.assert_close(optimized(pixel_values=pixel_values).logits, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_an_encoder_gives_tokens_and_what_it_pools(tiny_config, kind):
    model = HFViTModel(tiny_config()).eval()
    pixel_values = torch.randn(2, 3, 32, 32)
    expected, got = model(pixel_values), optimize_for_inference(model, "fp32")(pixel_values)
    torch.testing.assert_close(got.last_hidden_state, expected.last_hidden_state)
    torch.testing.assert_close(got.pooler_output, expected.pooler_output)
    without = optimize_for_inference(HFViTModel(tiny_config(), add_pooling_layer=False), "fp32")(pixel_values)
    assert without.pooler_output is None


@torch.no_grad()
def test_the_model_stays_as_it_is(tiny_config):
    model = HFViTForImageClassification(tiny_config()).train()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimized = optimize_for_inference(model, "bf16")
    optimized(torch.randn(1, 3, 32, 32))
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in optimized.parameters())
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=0)


@torch.no_grad()
def test_bf16_rounds_the_weights(tiny_config):
    model = HFViTForImageClassification(tiny_config(initializer_range=0.2)).eval()
    pixel_values = torch.randn(2, 3, 32, 32)
    logits = optimize_for_inference(model, "bf16")(pixel_values).logits
    assert logits.dtype == torch.bfloat16
    expected = model.to(torch.bfloat16)(pixel_values).logits
    torch.testing.assert_close(logits, expected, rtol=0.05, atol=0.05)


@torch.no_grad()
def test_it_compiles_as_one_graph(tiny_config):
    model = HFViTForImageClassification(tiny_config()).eval()
    optimized = optimize_for_inference(model, "fp32")
    pixel_values = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(optimized, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(pixel_values).logits, model(pixel_values).logits, rtol=1e-5, atol=1e-5)


def test_auto_is_bf16_where_it_is_fast(monkeypatch):
    device = None
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: device)
    for is_fast, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda is_fast=is_fast: is_fast)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated, is_fast=is_fast: is_fast)
        monkeypatch.setattr(torch.xpu, "is_bf16_supported", lambda emulated, is_fast=is_fast: is_fast)
        for kind in (None, "cuda", "xpu"):
            device = None if kind is None else torch.device(kind)
            assert inference.inference_precision("auto") == expected
        device = torch.device("mps")
        assert inference.inference_precision("auto") == "fp32"
    assert inference.inference_precision("fp8") == "fp8"


@pytest.mark.parametrize(
    ("architecture", "capability", "is_able"),
    [
        (None, (8, 6), False),
        (None, (8, 9), True),
        (None, (9, 0), True),
        ("gfx90a:sramecc+:xnack-", (9, 0), False),  # MI250
        ("gfx942:sramecc+:xnack-", (9, 4), True),  # MI300
    ],
)
def test_fp8_is_for_gpus_that_have_it(monkeypatch, architecture, capability, is_able):
    monkeypatch.setattr(torch.version, "hip", architecture and "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    properties = SimpleNamespace(gcnArchName=architecture)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert multiplies_in_8_bits(torch.device("cuda", 0)) == is_able


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_fp8_without_such_hardware_is_an_error(tiny_config):
    with pytest.raises(ValueError, match="fp8 needs a GPU"):
        optimize_for_inference(HFViTForImageClassification(tiny_config()), "fp8")
