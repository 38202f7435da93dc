"""Parameter groups by kind of module and depth; schedules as functions of the step."""

from itertools import pairwise
from typing import Any

import pytest
import torch

from hf_vit import HFViTForImageClassification
from hf_vit.optim import SCHEDULES, Schedule, build_optimizer, parameter_groups


def settings(model: torch.nn.Module, **options: Any) -> dict[str, tuple[float, float]]:
    """Return (weight decay, learning-rate scale) by the name of the parameter."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, **options)
    listed = [names[id(parameter)] for group in groups for parameter in group["params"]]
    assert sorted(listed) == sorted(names.values())  # each once
    return {
        names[id(parameter)]: (group["weight_decay"], group["lr_scale"])
        for group in groups
        for parameter in group["params"]
    }


def test_only_matrices_decay(tiny_config: Any) -> None:
    config = tiny_config(layer_scale_init_value=0.1, num_register_tokens=2, use_qk_norm=True, representation_size=8)
    decays = settings(HFViTForImageClassification(config), weight_decay=0.1)
    decayed = {name for name, (decay, _) in decays.items() if decay}
    kinds = ("projection.weight", "qkv.weight", "o_proj.weight", "fc1.weight", "fc2.weight", "pre_logits.weight")
    assert decayed == {name for name in decays if name.endswith((*kinds, "classifier.weight"))}
    assert {decays[name][0] for name in decayed} == {0.1}


def test_layers_far_from_the_head_learn_slower(tiny_config: Any) -> None:
    scales = settings(HFViTForImageClassification(tiny_config()), layer_decay=0.5)
    assert scales["classifier.bias"][1] == scales["vit.layernorm.weight"][1] == 1
    assert [scales[f"vit.layers.{index}.mlp.fc1.bias"][1] for index in range(3)] == [0.125, 0.25, 0.5]
    assert scales["vit.embeddings.cls_token"][1] == 0.0625


def test_positions_can_learn_faster(tiny_config: Any) -> None:
    scales = settings(HFViTForImageClassification(tiny_config()), position_lr_scale=10)
    fast = {name for name, (_, scale) in scales.items() if scale == 10}
    assert fast == {name for name in scales if "position_embeddings" in name} != set()


def test_frozen_parameters_stay_out(tiny_config: Any) -> None:
    model = HFViTForImageClassification(tiny_config())
    model.vit.requires_grad_(False)
    groups = parameter_groups(model, weight_decay=0.1)
    assert sum(len(group["params"]) for group in groups) == 2


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_schedule_warms_up_and_stays_between_0_and_1(kind: str) -> None:
    schedule = Schedule(kind, total_steps=100, warmup_steps=10)
    factors = [schedule(step) for step in range(100)]
    rises = [later - earlier for earlier, later in pairwise(factors[:11])]
    assert min(rises) > 0
    assert factors[10] == 1
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert all(0 < factor <= 1 for factor in factors)


def test_schedules_at_known_points() -> None:
    assert Schedule("cosine", 110, 10)(60) == pytest.approx(0.5)
    assert Schedule("linear", 110, 10)(35) == pytest.approx(0.75)
    assert Schedule("constant", 110, 10)(109) == 1
    assert Schedule("constant", 100, cooldown_steps=10)(95) == pytest.approx(0.5)
    assert Schedule("cosine", 1)(0) == 1


def test_a_schedule_sets_every_group(tiny_config: Any) -> None:
    model = HFViTForImageClassification(tiny_config())
    optimizer = build_optimizer("adamw", parameter_groups(model, position_lr_scale=10), 1.0)
    assert Schedule("linear", 10).apply(optimizer, 0.5, step=5) == 0.25
    assert {group["lr"] for group in optimizer.param_groups} == {0.25, 2.5}


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_an_optimizer_makes_the_loss_smaller(name: str, tiny_config: Any, pixel_values: torch.Tensor) -> None:
    model = HFViTForImageClassification(tiny_config())
    optimizer = build_optimizer(name, parameter_groups(model), 1e-2)
    losses = []
    for _ in range(5):
        loss = model(pixel_values, labels=torch.tensor([0, 3])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="Unknown optimizer 'adam': choose one of adamw, sgd"):
        build_optimizer("adam", [], 0.1)
    with pytest.raises(ValueError, match="Unknown schedule 'cosin': choose one of cosine, linear, constant"):
        Schedule("cosin", 10)
