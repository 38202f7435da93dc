"""Heads that users put on a stock `ViTModel` or `Dinov2Model` read what the tensors say, and the rest is stated."""

import pytest
import torch
from family import TINY
from torch import nn
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from hf_vit import HFViTForImageClassification
from hf_vit.checkpoints import Options, open_checkpoint


class UserModel(nn.Module):
    """A stock encoder with a head on one of its outputs."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.vit = encoder
        self.classifier = nn.Linear(32, 5)

    def forward(self, pixel_values: torch.Tensor, output: str) -> torch.Tensor:
        outputs = self.vit(pixel_values)
        return self.classifier(outputs.pooler_output if output == "pooler" else outputs.last_hidden_state[:, 0])


@pytest.fixture
def user_model():
    torch.manual_seed(0)
    model = UserModel(ViTModel(ViTConfig(**TINY))).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def error_and_assumptions(model, path, expected, **options):
    torch.save(model.state_dict(), path)
    checkpoint = open_checkpoint(path, Options(num_heads=4, **options))
    ours = HFViTForImageClassification(checkpoint.config).eval()
    ours.load_state_dict(checkpoint.state_dict(), strict=True)
    torch.manual_seed(1)
    with torch.no_grad():
        pixel_values = torch.randn(2, 3, 32, 32)
        got, expected = ours(pixel_values).logits, model(pixel_values, expected)
    return float((got - expected).norm() / expected.norm()), " ".join(checkpoint.assumed)


def test_a_head_beside_a_trained_pooler_reads_its_output(user_model, tmp_path):
    error, assumed = error_and_assumptions(user_model, tmp_path / "model.pt", "pooler")
    assert error < 1e-5
    assert "reads pooler_output" in assumed and "--pooling cls" in assumed


def test_an_option_says_that_the_head_reads_the_class_token(user_model, tmp_path):
    error, assumed = error_and_assumptions(user_model, tmp_path / "model.pt", "class token", pooling="cls")
    assert error < 1e-5
    assert "pooler" not in assumed


def test_a_head_beside_an_untrained_pooler_reads_the_class_token(user_model, tmp_path):
    nn.init.zeros_(user_model.vit.pooler.dense.bias)
    error, assumed = error_and_assumptions(user_model, tmp_path / "model.pt", "class token")
    assert error < 1e-5
    assert "never trained" in assumed


@pytest.mark.parametrize(
    ("norm", "eps"), [(nn.BatchNorm1d(32, affine=False, eps=1e-6), "1e-06"), (nn.BatchNorm1d(32), "1e-05")]
)
def test_a_batch_norm_before_the_head_is_folded_into_it(norm, eps, user_model, tmp_path):
    nn.init.zeros_(user_model.vit.pooler.dense.bias)
    for _, tensor in [*norm.named_parameters(), ("mean", norm.running_mean)]:
        nn.init.normal_(tensor)
    nn.init.uniform_(norm.running_var, 0.01, 2)
    user_model.classifier = nn.Sequential(norm.eval(), user_model.classifier)
    error, assumed = error_and_assumptions(user_model, tmp_path / "model.pt", "class token")
    assert error < 1e-5 and f"eps {eps} of the BatchNorm" in assumed


def test_a_head_on_the_class_token_of_dinov2(tmp_path):
    torch.manual_seed(0)
    model = UserModel(Dinov2Model(Dinov2Config(**TINY, mlp_ratio=2))).eval()
    state = {name.replace("vit.", "dinov2.", 1): tensor for name, tensor in model.state_dict().items()}
    model.vit.config.save_pretrained(tmp_path)
    torch.save(state, tmp_path / "pytorch_model.bin")
    checkpoint = open_checkpoint(tmp_path)
    ours = HFViTForImageClassification(checkpoint.config).eval()
    ours.load_state_dict(checkpoint.state_dict(), strict=True)
    pixel_values = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(pixel_values).logits, model(pixel_values, "class token"), rtol=1e-4, atol=1e-5)
