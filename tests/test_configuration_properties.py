"""Whatever a config holds, it is refused by the name of the field, or there is a model that learns and travels."""

import json
import math
from copy import deepcopy
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, get_origin

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForImageClassification

from hf_vit import HFViTBackbone, HFViTConfig, HFViTForImageClassification, HFViTForMaskedImageModeling, HFViTModel
from hf_vit.model.validation_hf_vit import (
    ACTIVATIONS,
    FINAL_LAYERNORMS,
    MIM_OBJECTIVES,
    POOLINGS,
    POSITION_EMBEDDINGS,
    POSITION_INTERPOLATIONS,
    POSITION_PLACEMENTS,
    RANGES,
    ROPE_COORDINATES,
)

REFUSALS = (ValueError, StrictDataclassError)
flags = st.booleans()
probabilities = st.floats(0, 0.9)


def few(most: int, least: int = 1) -> st.SearchStrategy[int]:
    return st.integers(least, most)


def one_or_two(sizes: st.SearchStrategy[int]) -> st.SearchStrategy[Any]:
    return sizes | st.tuples(sizes, sizes) | st.lists(sizes, min_size=2, max_size=2)


# Every field, in values that may be right, and small enough to be built.
SENSIBLE: dict[str, st.SearchStrategy[Any]] = {
    "hidden_size": st.sampled_from([1, 2, 4, 6, 8, 12, 16]),
    "num_hidden_layers": few(3),
    "num_attention_heads": few(4),
    "intermediate_size": few(9),
    "hidden_act": st.sampled_from(ACTIVATIONS),
    "hidden_dropout_prob": probabilities,
    "attention_probs_dropout_prob": probabilities,
    "drop_path_rate": probabilities,
    "patch_dropout_prob": probabilities,
    "layer_scale_init_value": st.none() | st.floats(*RANGES["layer_scale_init_value"]),
    "initializer_range": st.floats(*RANGES["initializer_range"]),
    "layer_norm_eps": st.floats(*RANGES["layer_norm_eps"]),
    "image_size": one_or_two(st.sampled_from([1, 3, 4, 6, 8, 12])),
    "patch_size": one_or_two(st.sampled_from([1, 2, 3, 4])),
    "num_channels": few(4),
    "patch_bias": flags,
    "qkv_bias": flags,
    "proj_bias": flags,
    "mlp_bias": flags,
    "head_dim": st.none() | few(8),
    "use_qk_norm": flags,
    "use_output_projection": flags,
    "use_gated_mlp": flags,
    "use_attention_layernorm": flags,
    "use_mlp_layernorm": flags,
    "use_patch_layernorm": flags,
    "use_pre_layernorm": flags,
    "final_layernorm": st.sampled_from(FINAL_LAYERNORMS),
    "num_register_tokens": few(3, least=0),
    "use_cls_token": st.none() | flags,
    "use_distillation_token": st.none() | flags,
    "stem_layers": st.none() | st.lists(few(2), max_size=2) | st.tuples(few(2)),
    "stem_width": st.sampled_from([32, 64]),
    "position_embedding_type": st.sampled_from(POSITION_EMBEDDINGS),
    "position_placement": st.sampled_from(POSITION_PLACEMENTS),
    "num_prefix_positions": st.none() | few(4, least=0),
    "rope_theta": st.floats(*RANGES["rope_theta"]),
    "rope_coordinates": st.sampled_from(ROPE_COORDINATES),
    "rope_grid": st.none() | few(4) | st.tuples(few(4), few(4)),
    "rope_offset": st.floats(-2, 2),
    "num_pooling_heads": st.none() | few(4),
    "position_interpolation": st.sampled_from(sorted(POSITION_INTERPOLATIONS)),
    "pooling": st.sampled_from(POOLINGS),
    "representation_size": st.none() | few(7),
    "zero_init_head": flags,
    "temperature": st.floats(*RANGES["temperature"]),
    "thresholds": st.none() | st.lists(st.floats(0, 1), min_size=2, max_size=3),
    "abstention_threshold": st.none() | st.floats(0, 1),
    "label_set_threshold": st.none() | st.floats(0, 1),
    "label_set_coverage": st.none() | st.floats(0, 1),
    "target_mean": st.none() | st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=2),
    "target_scale": st.none() | st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=2),
    "mim_objective": st.sampled_from(MIM_OBJECTIVES),
    "decoder_hidden_size": st.sampled_from([8, 12]),
    "decoder_num_hidden_layers": few(2),
    "decoder_num_attention_heads": st.sampled_from([1, 2]),
    "patch_subdivision": few(4),
    "decoder_kernel_size": st.sampled_from([1, 3, 5]),
    "semantic_loss_ignore_index": st.integers(-100, 255),
    "apply_layernorm": flags,
    "reshape_hidden_states": flags,
    "task_heads": st.none() | st.just({"color": {"task": "classification", "id2label": {0: "red", 1: "blue"}}}),
    "feature_strides": st.none() | st.lists(few(16), max_size=2) | st.just([2, 4, 8]),
    "out_features": st.none() | st.lists(st.sampled_from(["stem", "stage1", "stage2"]), max_size=2),
    "out_indices": st.none() | st.lists(st.integers(-3, 2), max_size=2),
    "num_labels": few(4, least=0),
    "problem_type": st.none() | st.just("single_label_classification"),
    "dtype": st.sampled_from([None, "float32", "bfloat16"]),
    "output_hidden_states": flags,
    "output_attentions": flags,
}
# What nobody should write into a config, and somebody does.
SILLY = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 2),
    st.sampled_from([2**31, 2**63, 10**12, 10**400, -(10**30)]),
    st.floats(),
    st.sampled_from([1e300, -1e300, 1e-320, -0.0, 0.999999999999]),
    st.text(max_size=5),
    st.sampled_from(["8", "none", "gelu", "cls", "float32", "nn", "../x", "\0"]),
    st.lists(st.none() | st.integers(-2, 9) | st.floats() | st.text(max_size=2), max_size=4),
    st.lists(st.integers(-2, 9), max_size=4).map(tuple),
    st.dictionaries(st.integers(-1, 2) | st.text(max_size=2), st.integers() | st.text(max_size=2), max_size=3),
)
# A config of many sizes that divides, so that most of what is put beside it is looked at.
BASE = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 6,
    "image_size": 12,
    "patch_size": 4,
}


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Some fields at once, of sensible values."""
    names = draw(st.lists(st.sampled_from(sorted(SENSIBLE)), max_size=12, unique=True))
    return {**BASE, **{name: draw(SENSIBLE[name]) for name in names}}


def built(given: dict[str, Any], named: list[str]) -> HFViTConfig | None:
    """Return the config, or nothing if it is refused by the name of one of the fields."""
    try:
        config = HFViTConfig(**given)
    except REFUSALS as error:
        assert any(name in str(error) for name in named), error
        event("refused")
        return None
    event("built")
    return config


def tensors_in(outputs: Any) -> list[Tensor]:
    """List what a model returns, whatever is put in tuples of tuples."""
    if isinstance(outputs, Tensor):
        return [outputs]
    return [tensor for part in outputs or () for tensor in tensors_in(part)]


@torch.no_grad()
def answers(model: Any, pixels: Tensor) -> list[Tensor]:
    return tensors_in(model.eval()(pixels).to_tuple())


def learn(model: Any, **inputs: Tensor) -> None:
    """Take a gradient, and find numbers in all that there is of it."""
    tensors = tensors_in(model.train()(**inputs).to_tuple())
    sum(tensor.float().sum() for tensor in tensors).backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients
    assert all(tensor.isfinite().all() for tensor in chain(tensors, gradients))


def images(config: HFViTConfig) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, config.num_channels, *config.image_shape)


@given(given=configs())
def test_every_config_is_refused_by_name_or_makes_a_classifier(given: dict[str, Any], tmp_path_factory: Any) -> None:
    if (config := built(given, list(given))) is not None:
        check_classifier(config, tmp_path_factory.mktemp("model"))


@settings(max_examples=4 * settings.default.max_examples)  # most are refused at once
@given(name=st.sampled_from(sorted(SENSIBLE)), value=SILLY)
def test_any_value_is_refused_by_name_or_makes_a_classifier(name: str, value: Any, tmp_path_factory: Any) -> None:
    if (config := built({**BASE, name: value}, [name])) is not None:
        check_classifier(config, tmp_path_factory.mktemp("model"))


def check_classifier(config: HFViTConfig, folder: Path) -> None:
    """Hold that it learns, and that it is the same behind a file."""
    pixels = images(config)
    model = HFViTForImageClassification(config)
    labels = {"labels": torch.arange(2) % config.num_labels} if config.num_labels > 1 else {}
    learn(model, pixel_values=pixels, **labels)
    model.save_pretrained(folder)
    loaded = AutoModelForImageClassification.from_pretrained(folder)
    assert type(loaded) is HFViTForImageClassification
    assert loaded.config.to_dict() == {**model.config.to_dict(), "_name_or_path": str(folder)}
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    # A copy: weights that lie where the file has them, at any address, may be multiplied in another order.
    for expected, got in zip(answers(model, pixels), answers(deepcopy(loaded), pixels), strict=True):
        assert torch.equal(got, expected)


@given(given=configs())
def test_json_gives_the_config_back(given: dict[str, Any]) -> None:
    if (config := built(given, list(given))) is not None:
        again = HFViTConfig.from_dict(json.loads(config.to_json_string()))
        assert again.to_dict() == config.to_dict() and again.to_json_string() == config.to_json_string()


@settings(max_examples=settings.default.max_examples // 3)
@pytest.mark.parametrize("model_class", [HFViTModel, HFViTForMaskedImageModeling, HFViTBackbone])
@given(given=configs())
def test_the_other_classes_learn_too(model_class: Any, given: dict[str, Any]) -> None:
    if (config := built(given, list(given))) is None:
        return
    pixels = images(config)
    if config.patch_dropout_prob and model_class is not HFViTModel:
        with pytest.raises(ValueError, match="patch_dropout_prob"):
            model_class(config)
        return
    model = model_class(config)
    is_masked = {"bool_masked_pos": torch.ones(2, math.prod(config.grid_size), dtype=torch.bool)}
    learn(model, pixel_values=pixels, **(is_masked if model_class is HFViTForMaskedImageModeling else {}))


@pytest.mark.parametrize("name", RANGES)
def test_a_range_has_two_ends(name: str) -> None:
    least, most = RANGES[name]
    for value in (
        math.nextafter(least, -math.inf),
        math.nextafter(most, math.inf),
        math.nan,
        math.inf,
        least - 1,
        most + 1,
    ):
        with pytest.raises(REFUSALS, match=name):
            HFViTConfig(**{name: value})


def test_the_strategy_has_every_field() -> None:
    fields = {name for name, kind in HFViTConfig.__annotations__.items() if get_origin(kind) is not ClassVar}
    assert {name for name in fields if not name.startswith("_")} <= set(SENSIBLE)
