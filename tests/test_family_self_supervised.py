"""Self-supervised models with timm's names: their facts, and timm's forward with positions of the original code."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from family_models import TINY, answers, distance, pixels_of, randomized, resampled, written_back
from torch import Tensor, nn

from hf_vit.checkpoints import Options, open_checkpoint
from hf_vit.checkpoints.files import Source, Stored

DINOV2 = {"init_values": 1e-5}
LARGER = (40, 56)


def encoder(**arguments: Any) -> nn.Module:
    return randomized(timm.create_model("vit_base_patch16_224", **{**TINY, "num_classes": 0, **arguments}))


def sines(width: int, side: int, is_row_first: bool, has_cls_token: bool = True) -> Tensor:
    """The fixed positions of MAE and I-JEPA (columns first) or MoCo v3 (rows first)."""
    omega = 10_000 ** -(np.arange(width // 4) / (width / 4))
    rows, columns = (axis.reshape(-1, 1) * omega for axis in np.mgrid[:side, :side])
    halves = [np.concatenate([np.sin(angles), np.cos(angles)], 1) for angles in (columns, rows)]
    table = np.concatenate(halves[::-1] if is_row_first else halves, 1)
    return torch.from_numpy(np.concatenate([np.zeros([int(has_cls_token), width]), table])).float().unsqueeze(0)


def file_of(model: nn.Module, path: Path, **extra: Tensor) -> Path:
    torch.save({**model.state_dict(), **extra}, path / "model.pth")
    return path / "model.pth"


def check(file: Path, model: Any, family: str, sampling: dict[str, Any], prefix: int = 1, mean: float = 0.485) -> Any:
    """Compare both sizes with a model of timm's whose positions are resampled by `sampling`."""
    options = Options(num_heads=4)
    checkpoint = open_checkpoint(file, options)
    assert checkpoint.family == family
    assert any(family in sentence and sentence.startswith("Preprocessing") for sentence in checkpoint.assumed)
    assert distance(answers(checkpoint, pixels_of((32, 32))), model(pixels_of((32, 32)))) < 1e-5
    with torch.no_grad():
        table = model.pos_embed.data
        model.set_input_size(LARGER)
        model.pos_embed.data = resampled(table, (5, 7), prefix, **sampling)
        assert distance(answers(checkpoint, pixels_of(LARGER)), model(pixels_of(LARGER))) < 1e-5
        converted = open_checkpoint(file, Options(num_heads=4, image_size=LARGER))
        assert distance(answers(converted, pixels_of(LARGER)), model(pixels_of(LARGER))) < 1e-5
    assert checkpoint.processor().image_mean[0] == mean
    written = written_back(checkpoint)
    for name, tensor in written.items():
        assert torch.equal(tensor, checkpoint.source.tensors[name].read()), name
    return checkpoint


OFFSET = {"mode": "bicubic", "scale_factor": (5.1 / 4, 7.1 / 4)}
BICUBIC = {"mode": "bicubic", "size": (5, 7)}
ANTIALIAS = {**BICUBIC, "antialias": True}


def test_dino_resamples_with_an_offset(tmp_path: Path) -> None:
    model = encoder()
    head = {"head.mlp.0.weight": torch.ones(3, 3), "head.last_layer.weight_v": torch.ones(3, 3)}
    checkpoint = check(file_of(model, tmp_path, **head), model, "DINO", OFFSET)
    assert checkpoint.left_out == sorted(head)
    processor = checkpoint.processor()
    assert (processor.crop_pct, processor.resample, processor.image_std[2]) == (0.875, 3, 0.225)


@pytest.mark.parametrize("chunked", [False, True])
def test_dinov2_resamples_with_an_offset_also_from_chunks(tmp_path: Path, chunked: bool) -> None:
    model = encoder(**DINOV2)
    state = {**model.state_dict(), "mask_token": torch.ones(1, 48)}
    if chunked:
        state = {name.replace("blocks.", "blocks.0."): tensor for name, tensor in state.items()}
        state = {name.replace("blocks.0.1.", "blocks.1.1."): tensor for name, tensor in state.items()}
    torch.save(state, tmp_path / "dinov2.pth")
    check(tmp_path / "dinov2.pth", model, "DINOv2", OFFSET)


@pytest.mark.parametrize(("family", "registers"), [("DINOv2 with registers", 4), ("TIPS", 1)])
def test_dinov2_with_registers_resamples_with_antialias(tmp_path: Path, family: str, registers: int) -> None:
    model = encoder(**DINOV2, reg_tokens=registers, no_embed_class=True)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["register_tokens"] = state.pop("reg_token")
    of_class = torch.randn(1, 1, 48)
    state["pos_embed"] = torch.cat([of_class, state["pos_embed"]], dim=1)
    model.cls_token.data += of_class
    if family == "TIPS":
        np.savez(tmp_path / "model.npz", **{name: tensor.numpy() for name, tensor in state.items()})
    else:
        torch.save(state, tmp_path / "model.npz")
    check(tmp_path / "model.npz", model, family, ANTIALIAS, prefix=0, mean=0.0 if family == "TIPS" else 0.485)


def test_dinov2_is_evaluated_at_224_pixels(tmp_path: Path) -> None:
    model = encoder(**DINOV2, img_size=518, patch_size=14)
    processor = open_checkpoint(
        file_of(model, tmp_path, mask_token=torch.ones(1, 48)), Options(num_heads=4)
    ).processor()
    assert dict(processor.size) == {"height": 224, "width": 224} and processor.crop_pct == 0.875


@pytest.mark.parametrize("family", ["MAE", "MoCo v3", "I-JEPA"])
def test_fixed_positions_tell_the_origin(tmp_path: Path, family: str) -> None:
    has_cls_token = family != "I-JEPA"
    model = encoder(**({} if has_cls_token else {"class_token": False, "global_pool": "avg", "fc_norm": False}))
    model.pos_embed.data = sines(48, 4, family == "MoCo v3", has_cls_token)
    extra = {"MAE": {"mask_token": torch.ones(1, 1, 16)}, "MoCo v3": {"predictor.0.weight": torch.ones(2, 2)}}
    file = file_of(model, tmp_path, **extra.get(family, {}))
    checkpoint = check(file, model, family, BICUBIC, prefix=int(has_cls_token))
    assert checkpoint.processor().resample == (2 if family == "MoCo v3" else 3)
    assert checkpoint.config.pooling == ("cls" if has_cls_token else "mean")


@pytest.mark.parametrize(
    ("width", "family", "heads"), [(384, "DINO", 6), (384, "MoCo v3", 12), (1280, "MAE", 16), (1408, "I-JEPA", 16)]
)
def test_heads_that_the_file_does_not_state(width: int, family: str, heads: int) -> None:
    has_cls_token = family != "I-JEPA"
    arguments = {} if has_cls_token else {"class_token": False, "global_pool": "avg"}
    with torch.device("meta"):
        model = timm.create_model(
            "vit_base_patch16_224", **{**TINY, "embed_dim": width, "num_classes": 0, **arguments}
        )
    tensors = {}
    for name, tensor in model.state_dict().items():
        tensors[name] = Stored(tuple(tensor.shape), tensor.dtype, lambda shape=tensor.shape: torch.ones(shape))
    if not has_cls_token:
        tensors["norm.weight"], tensors["norm.bias"] = tensors.pop("fc_norm.weight"), tensors.pop("fc_norm.bias")
    if family != "DINO":
        table = sines(width, 4, family == "MoCo v3", has_cls_token)
        tensors["pos_embed"] = Stored(tuple(table.shape), table.dtype, lambda: table)
    checkpoint = open_checkpoint(Source("file.pth", tensors))
    assert (checkpoint.family, checkpoint.config.num_attention_heads) == (family, heads)
    assert any(sentence.startswith(f"{heads} heads") for sentence in checkpoint.assumed)


# ------------------------------------------------------------------------------------------- training checkpoints


def test_training_checkpoints_of_the_original_code(tmp_path: Path) -> None:
    """DINO saves student and teacher with heads, MoCo v3 two encoders, I-JEPA an encoder and its target."""
    model, other = encoder(), encoder()
    for parameter in other.parameters():
        parameter.data.mul_(0.5)
    head = {"head.mlp.0.weight": torch.ones(3, 48), "head.last_layer.weight_v": torch.ones(3, 3)}

    def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {prefix + name: tensor for name, tensor in state.items()}

    def of_dino(network: nn.Module) -> dict[str, Tensor]:
        return {**prefixed("module.backbone.", network.state_dict()), **prefixed("module.", head)}

    torch.save({"student": of_dino(other), "teacher": of_dino(model), "epoch": 3}, tmp_path / "dino.pth")
    torch.save({"student": of_dino(model), "epoch": 3}, tmp_path / "student.pth")
    for name in ("dino.pth", "student.pth"):
        checkpoint = open_checkpoint(tmp_path / name, Options(num_heads=4))
        assert checkpoint.family == "DINO"
        assert distance(answers(checkpoint, pixels_of((32, 32))), model(pixels_of((32, 32)))) < 1e-5

    for network in (model, other):
        network.pos_embed.data = sines(48, 4, is_row_first=True)
    predictor = {"head.0.weight": torch.ones(4, 48), "head.3.weight": torch.ones(4, 4)}
    base = prefixed("module.base_encoder.", {**model.state_dict(), **predictor})
    momentum = prefixed("module.momentum_encoder.", {**other.state_dict(), **predictor})
    projection = {"module.predictor.0.weight": torch.ones(4, 4)}
    torch.save({"arch": "vit_small", "state_dict": {**base, **momentum, **projection}}, tmp_path / "moco.pth")
    checkpoint = open_checkpoint(tmp_path / "moco.pth", Options(num_heads=4))
    assert checkpoint.family == "MoCo v3"
    assert distance(answers(checkpoint, pixels_of((32, 32))), model(pixels_of((32, 32)))) < 1e-5


def test_a_linear_classifier_of_dinov2(tmp_path: Path) -> None:
    model = encoder(**DINOV2, num_classes=0)
    weight = torch.randn(5, 96)
    state = {f"backbone.{name}": tensor for name, tensor in model.state_dict().items()}
    state |= {
        "backbone.mask_token": torch.ones(1, 48),
        "linear_head.weight": weight,
        "linear_head.bias": torch.ones(5),
    }
    torch.save(state, tmp_path / "dinov2_vits14_lc.pth")
    checkpoint = open_checkpoint(tmp_path / "dinov2_vits14_lc.pth", Options(num_heads=4))
    with torch.no_grad():
        tokens = model.forward_features(pixels_of((32, 32)))
    prefix = model.num_prefix_tokens
    expected = torch.cat([tokens[:, 0], tokens[:, prefix:].mean(dim=1)], dim=1) @ weight.T + 1
    assert distance(answers(checkpoint, pixels_of((32, 32))), expected) < 1e-5


def test_a_user_s_classifier_on_dinov2(tmp_path: Path) -> None:
    model = encoder(**DINOV2, num_classes=5)
    state = {f"backbone.{name}": tensor for name, tensor in model.state_dict().items() if not name.startswith("head")}
    state |= {"backbone.mask_token": torch.ones(1, 48), "fc.weight": model.head.weight, "fc.bias": model.head.bias}
    torch.save(state, tmp_path / "finetuned.pth")
    checkpoint = open_checkpoint(tmp_path / "finetuned.pth", Options(num_heads=4))
    assert (checkpoint.family, checkpoint.config.num_labels) == ("DINOv2", 5)
    assert distance(answers(checkpoint, pixels_of((32, 32))), model(pixels_of((32, 32)))) < 1e-5
