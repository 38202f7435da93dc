"""Checkpoints as training scripts save them: nested, prefixed, with copies, counters and heads of other names."""

import argparse
import collections
import datetime
import json
import os
import pickle
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from hf_vit import HFViTConfig, HFViTForImageClassification
from hf_vit.checkpoints import Options, open_checkpoint
from hf_vit.checkpoints.checkpoint import CLASSIFIER, ENCODER, Checkpoint

State = dict[str, Any]


def state_of(seed: int = 0, num_classes: int = 5) -> State:
    torch.manual_seed(seed)
    model = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=64, depth=1, num_heads=1, mlp_ratio=1, num_classes=num_classes
    )
    return {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}


STATE, OTHER, BODY = state_of(), state_of(1), state_of(num_classes=0)
HEAD = {name: STATE[name] for name in ("head.weight", "head.bias")}
BODY = {name: STATE[name] for name in BODY}


def below(prefix: str, state: State = STATE) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def opened(tmp_path: Path, content: Any, **options: Any) -> Checkpoint:
    torch.save(content, tmp_path / "c.pth")
    return open_checkpoint(tmp_path / "c.pth", Options(**options))


def assert_is(checkpoint: Checkpoint, state: State = STATE) -> None:
    """Assert that a checkpoint has the values of a state, which timm's names identify."""
    values = checkpoint.state_dict()
    prefix = "vit." if checkpoint.architecture == CLASSIFIER else ""
    torch.testing.assert_close(values[f"{prefix}layers.0.mlp.fc1.weight"], state["blocks.0.mlp.fc1.weight"])
    assert (checkpoint.architecture == CLASSIFIER) == ("head.weight" in state)
    if "head.weight" in state:
        torch.testing.assert_close(values["classifier.weight"], state["head.weight"])


WRAPPED: dict[str, Any] = {
    "a key": {"model_state_dict": STATE, "loss": 0.1, "epoch": 3},
    "an unknown key": {"my_best_net": STATE, "history": [1.0, 2.0]},
    "two keys": {"state_dict": {"model": STATE}},
    "a tuple with the accuracy": (STATE, 0.9),
    "a list of dictionaries": [{"epoch": 1}, {"weights": STATE}],
    "a prefix": below("net."),
    "a chain of prefixes": {"state_dict": below("module._orig_mod.model.vit_backbone.")},
    "the first of a Sequential": below("0."),
    "wrappers within the names": {name.replace("blocks.0.", "blocks.0._orig_mod."): STATE[name] for name in STATE},
    "optimizer and scheduler": {
        "model": STATE,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []},
        "lr_scheduler": {"last_epoch": 3},
    },
    "counters": {"n_averaged": torch.tensor(3), **below("module."), "module.blocks.0.total_ops": torch.zeros(1)},
    "the weights of classes in a loss": {**STATE, "loss_fn.weight": torch.ones(5)},
    "DeepSpeed": {"module": STATE, "param_shapes": [{name: tensor.shape for name, tensor in STATE.items()}]},
    "a default dictionary": {"model": collections.defaultdict(list, STATE)},
    "objects of training scripts": {
        "model": STATE,
        "best": np.float64(0.5),
        "step": np.int64(3),
        "curve": np.arange(3.0),
        "type": np.dtype("float32"),
        "path": Path("data"),
        "time": datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
        "args": argparse.Namespace(lr=0.1, out=Path("x")),
        "more": types.SimpleNamespace(a=1),
        "counts": collections.Counter("aab"),
        "classes": {"a", "b"},
        "factory": collections.defaultdict(int, a=1),
    },
    "a running average alone": {"model_ema": below("module.")},
}


@pytest.mark.parametrize("content", WRAPPED.values(), ids=WRAPPED)
def test_the_model_is_found(tmp_path: Path, content: Any) -> None:
    checkpoint = opened(tmp_path, content)
    assert_is(checkpoint)
    assert not checkpoint.left_out
    assert not any("weights are those" in sentence for sentence in checkpoint.assumed)


def test_a_prefix_is_noted_in_every_format(tmp_path: Path) -> None:
    save_file(below("model."), tmp_path / "c.safetensors")
    np.savez(tmp_path / "c.npz", **{name: tensor.numpy() for name, tensor in below("model.").items()})
    for name in ("c.safetensors", "c.npz"):
        checkpoint = open_checkpoint(tmp_path / name)
        assert_is(checkpoint)
        assert checkpoint.notes == [f"The prefix 'model.' is removed from the names of {len(STATE)} tensors."]


# What is taken of several, by default first; a head of self-supervised training is no classifier's.
DINO_HEAD = {
    "mlp.0.weight": torch.randn(8, 64),
    "mlp.2.weight": torch.randn(8, 8),
    "last_layer.weight": torch.ones(9, 8),
}
SELF_SUPERVISED = {**below("backbone.", BODY), **below("head.", DINO_HEAD)}
SEVERAL: dict[str, tuple[Any, str, State, str, State]] = {
    "supervised": ({"teacher": OTHER, "student": STATE}, "student", STATE, "teacher", OTHER),
    "prefixes": (below("model.") | below("ema_model.", OTHER), "model", STATE, "ema_model", OTHER),
    "dictionaries": ({"model": STATE, "model_ema": OTHER}, "model", STATE, "model_ema", OTHER),
    "timm": ({"state_dict": OTHER, "state_dict_ema": STATE}, "state_dict_ema", STATE, "state_dict", OTHER),
    "MoCo v3": (
        {"state_dict": below("module.base_encoder.") | below("module.momentum_encoder.", OTHER)},
        *("base_encoder", STATE, "momentum_encoder", OTHER),
    ),
    "I-JEPA": (
        {"encoder": below("module.", OTHER), "predictor": {"mask": torch.ones(1)}, "target_encoder": below("module.")},
        *("target_encoder", STATE, "encoder", OTHER),
    ),
}


@pytest.mark.parametrize("kind", SEVERAL)
def test_one_of_several_models_is_taken_and_said(tmp_path: Path, kind: str) -> None:
    content, name, state, other, other_state = SEVERAL[kind]
    checkpoint = opened(tmp_path, content)
    assert_is(checkpoint, state)
    (sentence,) = [sentence for sentence in checkpoint.assumed if "weights are those" in sentence]
    assert f"those of {name!r}; the file also has {other!r}" in sentence
    assert_is(opened(tmp_path, content, weights=other), other_state)


def test_dino_takes_the_teacher(tmp_path: Path) -> None:
    student = below("module.", {name: tensor + 1 for name, tensor in SELF_SUPERVISED.items()})
    checkpoint = opened(tmp_path, {"student": student, "teacher": SELF_SUPERVISED, "epoch": 3})
    assert_is(checkpoint, BODY)
    assert "those of 'teacher'" in checkpoint.assumed[0]
    assert checkpoint.left_out == ["head.last_layer.weight", "head.mlp.0.weight", "head.mlp.2.weight"]


def test_unknown_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no weights named 'best'.*'student', 'teacher'"):
        opened(tmp_path, {"student": STATE, "teacher": OTHER}, weights="best")


def test_an_image_tower_beside_text(tmp_path: Path) -> None:
    text = {"blocks.0.mlp.fc1.weight": torch.ones(8, 8), "blocks.1.mlp.fc1.weight": torch.ones(8, 8)}
    content = {**below("visual.trunk.", BODY), **text, "logit_scale": torch.ones(())}
    checkpoint = opened(tmp_path, content)
    assert_is(checkpoint, BODY)
    assert checkpoint.config.num_hidden_layers == 1
    assert sorted(checkpoint.left_out) == [*text, "logit_scale"]


def test_open_clip_states_the_preprocessing_of_a_tower_of_timm(tmp_path: Path) -> None:
    config = {
        "model_cfg": {"vision_cfg": {"timm_model_name": "vit_tiny_patch8", "timm_pool": "avg", "image_size": 16}},
        "preprocess_cfg": {"mean": [0.4, 0.5, 0.6], "std": 0.3, "resize_mode": "squash"},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    torch.save(below("visual.trunk.", BODY), tmp_path / "open_clip_pytorch_model.bin")
    checkpoint = open_checkpoint(tmp_path)
    processor = checkpoint.processor()
    assert checkpoint.config.pooling == "mean" and checkpoint.assumed == []
    assert (processor.image_mean, processor.image_std, processor.crop_pct) == ((0.4, 0.5, 0.6), 0.3, None)


# ----------------------------------------------------------------------------------------------------------- heads

TWO_LAYERS = {
    "classifier.0.weight": torch.ones(8, 64),
    "classifier.0.bias": torch.ones(8),
    "classifier.2.weight": torch.ones(3, 8),
}
HEADS = {
    "beside the encoder": {**below("backbone.", BODY), **HEAD},
    "by another name": {**below("backbone.", BODY), "fc.weight": HEAD["head.weight"], "fc.bias": HEAD["head.bias"]},
    "in a dictionary": {"backbone": BODY, "head": {name[5:]: tensor for name, tensor in HEAD.items()}},
    "in a Sequential": {**BODY, "head.1.weight": HEAD["head.weight"], "head.1.bias": HEAD["head.bias"]},
    "after the encoder": {**below("0.", BODY), "1.weight": HEAD["head.weight"], "1.bias": HEAD["head.bias"]},
    "in a classifier": {**below("m.vit.", BODY), **{f"m.classifier.3.{n[5:]}": t for n, t in HEAD.items()}},
}


@pytest.mark.parametrize("content", HEADS.values(), ids=HEADS)
def test_a_linear_head_is_read_by_any_name(tmp_path: Path, content: State) -> None:
    assert_is(opened(tmp_path, content))


def test_a_head_without_bias(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, {**BODY, "fc.weight": HEAD["head.weight"]})
    assert not checkpoint.state_dict()["classifier.bias"].any()


def test_a_head_of_several_layers_is_left_out(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, {**below("model.", BODY), **below("model.", TWO_LAYERS)})
    assert checkpoint.architecture == ENCODER and set(checkpoint.left_out) == set(TWO_LAYERS)
    assert "not one linear layer of the encoder's output: classifier.0, classifier.2" in checkpoint.lost_head


# ------------------------------------------------------------------------------------------------------ our own


BETWEEN = {
    "LayerNorm": {"norm.weight": torch.ones(64), "norm.bias": torch.ones(64)},
    "a layer": {"proj.weight": torch.ones(64, 64), "proj.bias": torch.ones(64)},
    "an MLP": {"mlp.0.weight": torch.ones(64, 64), "mlp.0.bias": torch.ones(64)},
}


@pytest.mark.parametrize("name", ["head", "fc"])
@pytest.mark.parametrize("between", BETWEEN.values(), ids=BETWEEN)
def test_a_head_behind_other_layers_is_left_out(tmp_path: Path, name: str, between: State) -> None:
    head = {f"{name}.weight": HEAD["head.weight"], f"{name}.bias": HEAD["head.bias"]}
    checkpoint = opened(tmp_path, {**below("backbone.", BODY), **between, **head})
    assert_is(checkpoint, BODY)
    assert "one linear layer of the encoder's output" in checkpoint.lost_head
    assert set(checkpoint.left_out) == {*between, *head}


@pytest.mark.parametrize("name", ["head", "classifier"])
def test_a_batch_norm_beside_the_head_is_folded_into_it(tmp_path: Path, name: str) -> None:
    norm, linear = nn.BatchNorm1d(64), nn.Linear(64, 5, bias=False)
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    state = {**below("base.", BODY), **below("bottleneck.", norm.state_dict()), f"{name}.weight": linear.weight.data}
    values = opened(tmp_path, state).state_dict()
    features = torch.randn(2, 64)
    expected = linear(norm.eval()(features))
    torch.testing.assert_close(features @ values["classifier.weight"].T + values["classifier.bias"], expected)


ADAPTED = ("adapters.0.down.weight", "lora_layers.0.weight", "prompt_embeddings")


@pytest.mark.parametrize("name", ADAPTED)
def test_adapters_outside_of_the_encoder_are_stated(tmp_path: Path, name: str) -> None:
    checkpoint = opened(tmp_path, {**below("backbone."), name: torch.ones(2, 64)})
    assert_is(checkpoint)
    assert any(f"the original code: {name}." in sentence for sentence in checkpoint.assumed)


def test_a_folder_without_config(tmp_path: Path) -> None:
    save_file(below("module."), tmp_path / "model.safetensors")
    model = HFViTForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(model.classifier.weight, STATE["head.weight"])
    HFViTForImageClassification(model.config).save_pretrained(tmp_path / "ours")
    (tmp_path / "ours" / "config.json").unlink()
    config = model.config
    assert HFViTForImageClassification.from_pretrained(tmp_path / "ours", config=config).config.num_labels == 5


def test_tensors_without_values_are_of_zero_3(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"All its tensors are empty, as in files of DeepSpeed.*zero_to_fp32"):
        opened(tmp_path, {"module": {name: torch.empty(0) for name in STATE}})


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"model": state}], ids=["alone", "nested"])
def test_our_own_state_dict_has_its_config(tmp_path: Path, wrap: Any) -> None:
    config = HFViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=16, image_size=16, patch_size=8
    )
    model = HFViTForImageClassification(config).eval()
    nn.init.normal_(model.classifier.weight)
    torch.save(wrap(model.state_dict()), tmp_path / "c.pth")
    pixels = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(
            HFViTForImageClassification.from_pretrained(tmp_path / "c.pth")(pixels).logits, model(pixels).logits
        )
    torch.save(dict(model.state_dict()), tmp_path / "c.pth")
    with pytest.raises(ValueError, match=r"put the model's config.json beside the file"):
        open_checkpoint(tmp_path / "c.pth")


# ------------------------------------------------------------------------------------------------------ pickles


class Code:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


class Config:
    pass


def test_code_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for content in ({"model": STATE, "args": Code()}, {"model": STATE, "path": Path("x"), "list": [Code()]}):
        with pytest.raises(ValueError, match="could run code"):
            opened(tmp_path, content)
    (tmp_path / "c.pth").write_bytes(pickle.dumps(Code()))
    with pytest.raises(ValueError, match="could run code"):
        open_checkpoint(tmp_path / "c.pth")
    assert not (tmp_path / "ran").exists()


def test_other_objects_are_named_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"objects other than tensors \(test_checkpoint_wrappers.Config\).*torch.save"
    ):
        opened(tmp_path, {"model": STATE, "config": Config()})
    with pytest.raises(ValueError, match=r"a whole model, saved by torch.save\(model\).*torch.save\(model.state_dict"):
        opened(tmp_path, nn.Sequential(nn.Linear(2, 2)))


def test_a_dictionary_that_contains_itself(tmp_path: Path) -> None:
    content: dict[str, Any] = {"model": STATE}
    content["again"] = content
    assert_is(opened(tmp_path, content))


# ---------------------------------------------------------------------------------------- beside the encoder


def test_what_is_beside_an_encoder_decides_what_it_is(tmp_path: Path) -> None:
    """A file with nothing but DINO's names is DINO; with a text tower or a user's head it is another model of timm."""
    headless = {name: tensor for name, tensor in STATE.items() if not name.startswith("head.")}
    width = headless["norm.weight"].shape[0]
    assert opened(tmp_path, headless).family == "DINO"
    tower = {f"visual.trunk.{name}": tensor for name, tensor in headless.items()}
    both = opened(
        tmp_path, {**tower, "visual.head.proj.weight": torch.ones(8, width), "text.a.weight": torch.ones(2, 2)}
    )
    assert (both.family, both.architecture) == ("timm", "HFViTModel")
    assert both.left_out == ["head.proj.weight", "text.a.weight"]
    own = {f"backbone.{name}": tensor for name, tensor in headless.items()}
    classifier = opened(tmp_path, {**own, "fc.weight": torch.ones(5, width), "fc.bias": torch.ones(5)})
    assert (classifier.family, classifier.architecture) == ("timm", "HFViTForImageClassification")
    assert classifier.left_out == [] and classifier.config.num_labels == 5
