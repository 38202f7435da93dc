"""With the same weights, the model computes what transformers' own ViT computes: outputs and gradients."""

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification
from transformers import ViTModel as StockViTModel

from hf_vit import HFViTForImageClassification, HFViTModel
from hf_vit.checkpoints import Source, open_checkpoint
from hf_vit.checkpoints.files import Stored


def transplanted(stock: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights of a stock ViT under this package's names and in its layouts."""
    tensors = {
        name: Stored(tuple(tensor.shape), tensor.dtype, tensor.clone) for name, tensor in stock.state_dict().items()
    }
    return open_checkpoint(Source("stock", tensors, stock.config.to_dict())).state_dict()


@pytest.fixture
def stock_fields():
    return {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "image_size": 32,
        "patch_size": 8,
        "layer_norm_eps": 1e-6,
        "num_labels": 5,
        "initializer_range": 0.2,  # large enough that every part shows in the outputs
    }


@pytest.fixture
def pair(stock_fields, tiny_config):
    """Build the stock model and ours, with equal weights; in eval."""

    def build(attention: str) -> tuple[torch.nn.Module, torch.nn.Module]:
        stock = ViTForImageClassification(ViTConfig(**stock_fields, attn_implementation=attention)).eval()
        ours = HFViTForImageClassification(tiny_config(**stock_fields, attn_implementation=attention)).eval()
        ours.load_state_dict(transplanted(stock), strict=True)
        return stock, ours

    return build


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.bfloat16, 3e-2)])
def test_outputs_and_gradients_are_stock_vit_s(pair, attention, dtype, tolerance):
    stock, ours = (model.to(dtype) for model in pair(attention))
    pixel_values, labels = torch.randn(3, 3, 32, 32, dtype=dtype), torch.tensor([0, 3, 1])
    expected, got = stock(pixel_values, labels=labels), ours(pixel_values, labels=labels)
    assert expected.logits.float().std() > 0.1  # the comparison is of something
    torch.testing.assert_close(got.logits.float(), expected.logits.float(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got.loss.float(), expected.loss.float(), rtol=tolerance, atol=tolerance)

    expected.loss.backward()
    got.loss.backward()
    gradients = {name: parameter.grad for name, parameter in stock.named_parameters()}
    stock.load_state_dict(gradients)  # transplanting knows the layouts of weights: let the gradients be weights
    expected_gradients = transplanted(stock)
    for name, parameter in ours.named_parameters():
        scale = expected_gradients[name].float().abs().max().clamp(min=1e-3)
        difference = (parameter.grad.float() - expected_gradients[name].float()).abs().max()
        assert difference / scale < 10 * tolerance, name


def test_hidden_states_and_attentions_are_stock_vit_s(pair):
    stock, ours = pair("eager")
    pixel_values = torch.randn(2, 3, 32, 32)
    wanted = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        expected, got = stock(pixel_values, **wanted), ours(pixel_values, **wanted)
    for name in ("hidden_states", "attentions"):
        assert len(got[name]) == len(expected[name])
        for ours_tensor, stock_tensor in zip(got[name], expected[name], strict=True):
            torch.testing.assert_close(ours_tensor, stock_tensor, rtol=1e-5, atol=1e-5)


def test_stock_resampling_is_one_of_the_kinds(pair):
    stock, ours = pair("sdpa")
    for module in ours.modules():
        if hasattr(module, "interpolation"):
            module.interpolation = "bicubic"
    pixel_values = torch.randn(1, 3, 48, 64)
    with torch.no_grad():
        expected = stock(pixel_values, interpolate_pos_encoding=True).logits
        torch.testing.assert_close(ours(pixel_values).logits, expected, rtol=2e-6, atol=2e-6)


def test_the_pre_logits_layer_is_stock_vit_s_pooler(stock_fields, tiny_config):
    stock = StockViTModel(ViTConfig(**stock_fields)).eval()
    ours = HFViTModel(tiny_config(**stock_fields, representation_size=32)).eval()
    ours.load_state_dict(transplanted(stock), strict=True)
    pixel_values = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(pixel_values).pooler_output, stock(pixel_values).pooler_output)
