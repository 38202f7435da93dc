"""What a user states about a checkpoint acts before its conversion, in Python as on the command line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel
from transformers import ViTForImageClassification as StockClassifier
from typer.testing import CliRunner
from vit_pytorch import ViT

from hf_vit import HFViTConfig, HFViTForImageClassification, HFViTModel
from hf_vit.checkpoints import Options, open_checkpoint
from hf_vit.checkpoints.models import load_classifier
from hf_vit.cli.main import app
from hf_vit.model.positions_hf_vit import resample_table

PIXELS = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LABELS = [f"LABEL_{label}" for label in range(5)]


def timm() -> nn.Module:
    return VisionTransformer(img_size=16, patch_size=8, embed_dim=64, depth=1, num_heads=4, num_classes=5)


def stock() -> nn.Module:
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    return StockClassifier(ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=5))


def vit_pytorch() -> nn.Module:
    return ViT(image_size=16, patch_size=8, num_classes=5, dim=64, depth=1, heads=4, dim_head=16, mlp_dim=32)


def saved(build: Callable[[], nn.Module], path: Path) -> Tensor:
    """Save the random weights of a model, and return its logits."""
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
        torch.save(model.state_dict(), path)
        output = model(PIXELS)
    return output if isinstance(output, Tensor) else output.logits


def distance(model: nn.Module, expected: Tensor) -> float:
    with torch.no_grad():
        return float((model.eval()(PIXELS).logits - expected).norm() / expected.norm())


@pytest.mark.parametrize("build", [timm, stock, vit_pytorch])
def test_heads_are_stated_before_conversion(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    logits = saved(build, path)
    assert distance(HFViTForImageClassification.from_pretrained(path, num_attention_heads=4), logits) < 1e-5
    assert distance(load_classifier(path, LABELS, num_attention_heads=4)[0], logits) < 1e-5
    runner = CliRunner()
    result = runner.invoke(app, ["convert", str(path), str(tmp_path / "out"), "--num-heads", "4"])
    assert result.exit_code == 0, result.output
    assert distance(HFViTForImageClassification.from_pretrained(tmp_path / "out"), logits) < 1e-5
    wrong = HFViTForImageClassification.from_pretrained(path, num_attention_heads=2)
    assert distance(wrong, logits) > 0.01


def test_a_config_states_the_heads(tmp_path: Path) -> None:
    logits = saved(timm, tmp_path / "c.pth")
    config = open_checkpoint(tmp_path / "c.pth", Options(num_heads=4)).config
    model = HFViTForImageClassification.from_pretrained(tmp_path / "c.pth", config=config)
    assert distance(model, logits) < 1e-5


def test_other_options_reach_the_conversion(tmp_path: Path) -> None:
    saved(timm, tmp_path / "c.pth")
    model = HFViTForImageClassification.from_pretrained(
        tmp_path / "c.pth",
        image_size=32,
        hidden_act="relu",
        layer_norm_eps=1e-5,
        pooling="mean",
        mean=0.1,
        std=[1, 2, 3],
    )
    config = model.config
    assert (config.image_shape, config.hidden_act, config.layer_norm_eps) == ((32, 32), "relu", 1e-5)
    assert config.pooling == "mean"
    processor: Any = model._image_processor
    assert (processor.image_mean, processor.image_std) == ([0.1] * 3, [1, 2, 3])


def test_the_interpolation_of_positions_is_the_one_asked_for(tmp_path: Path) -> None:
    saved(timm, tmp_path / "c.pth")
    tables = {
        how: HFViTForImageClassification.from_pretrained(
            tmp_path / "c.pth", image_size=48, position_interpolation=how
        ).vit.embeddings.position_embeddings.table.weight
        for how in ("bilinear", "bicubic_antialias")
    }
    stored = open_checkpoint(tmp_path / "c.pth").state_dict()["vit.embeddings.position_embeddings.table.weight"]
    grid = tuple(tables["bilinear"].shape[1:3])
    for how, table in tables.items():
        assert torch.equal(table, resample_table(stored, grid, how))


def test_one_of_several_models_is_chosen(tmp_path: Path) -> None:
    states = [{name: torch.randn_like(tensor) for name, tensor in timm().state_dict().items()} for _ in range(2)]
    torch.save({"model": states[0], "ema": states[1]}, tmp_path / "c.pth")
    model = HFViTForImageClassification.from_pretrained(tmp_path / "c.pth", weights="ema")
    assert torch.equal(model.classifier.weight, states[1]["head.weight"])


def test_messages_name_the_options_that_the_user_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[str] = []
    monkeypatch.setattr("hf_vit.checkpoints.from_pretrained.logger.warning_once", logged.append)
    path = tmp_path / "c.pth"
    saved(vit_pytorch, path)
    HFViTForImageClassification.from_pretrained(path)
    heads = "--num-heads"
    assert any("num_attention_heads" in text for text in logged) and not any(heads in text for text in logged)
    assert any(heads in text for text in open_checkpoint(path, Options(spelling="command")).assumed)
    torch.save({name: tensor for name, tensor in timm().state_dict().items() if name != "pos_embed"}, path)
    with pytest.raises(ValueError, match=r"pass image_size=\(height, width\)"):
        HFViTForImageClassification.from_pretrained(path)
    with pytest.raises(ValueError, match=r"pass --image-size HxW\. hf-vit convert has this option\."):
        open_checkpoint(path)
    result = CliRunner().invoke(app, ["inspect", str(path)])
    assert result.output.rstrip().endswith("pass --image-size HxW.")


def test_heads_that_the_file_states_cannot_be_changed(tmp_path: Path) -> None:
    stock().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has 4 attention heads, and num_attention_heads 2 would mix"):
        HFViTModel.from_pretrained(tmp_path, num_attention_heads=2)


def test_preprocessing_is_stated(tmp_path: Path) -> None:
    saved(timm, tmp_path / "c.pth")
    command = ["convert", str(tmp_path / "c.pth"), str(tmp_path / "out"), "--num-heads", "4"]
    result = CliRunner().invoke(
        app, [*command, "--preprocessing", "center_crop", "--mean", "0.1,0.2,0.3", "--std", "0.5"]
    )
    assert result.exit_code == 0 and "Preprocessing" not in result.output, result.output
    processor = open_checkpoint(tmp_path / "out").processor()
    assert [*processor.image_mean, *processor.image_std, processor.crop_pct] == [0.1, 0.2, 0.3, *[0.5] * 3, 0.875]
    for arguments, message in ((["--mean", "a"], "--mean expects numbers"), (["--std", "1,2"], "--std has 2 numbers")):
        assert message in CliRunner().invoke(app, ["inspect", str(tmp_path / "c.pth"), *arguments]).output


def test_a_head_of_several_layers_is_no_classifier(tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in timm().state_dict().items() if not name.startswith("head.")}
    state |= {"head.0.weight": torch.ones(8, 64), "head.2.weight": torch.ones(5, 8)}
    torch.save(state, tmp_path / "c.pth")
    with pytest.raises(
        ValueError,
        match=r"not one linear layer of the encoder's output: head.0, head.2. Load it as HFViTModel, or pass",
    ):
        HFViTForImageClassification.from_pretrained(tmp_path / "c.pth")
    assert isinstance(HFViTModel.from_pretrained(tmp_path / "c.pth").config, HFViTConfig)
    assert load_classifier(tmp_path / "c.pth", ["a", "b"])[0].config.num_labels == 2


def test_another_pooling_does_not_change_how_a_file_is_read(tmp_path: Path) -> None:
    """The class token and the pooler of a stock ViT stay theirs; the model of another pooling has no pre-logits."""
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTModel(ViTConfig(**small, image_size=16, patch_size=8)).save_pretrained(tmp_path)
    for pooling, width in (("cls", 16), ("mean", 16), ("cls_and_mean", 32)):
        encoder = HFViTModel.from_pretrained(tmp_path, pooling=pooling)
        assert encoder(torch.randn(1, 3, 16, 16)).pooler_output.shape == (1, width)
        assert encoder.config.use_cls_token and encoder.config.pooling == pooling
        classifier = HFViTForImageClassification.from_pretrained(tmp_path, pooling=pooling, num_labels=3)
        assert classifier.classifier.weight.shape == (3, width)
