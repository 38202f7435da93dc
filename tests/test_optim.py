"""Parameter groups by kind of module and depth; optimizers that resume exactly; schedules as functions of the step."""

import io
import sys
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

from hf_vit import HFViTBackbone, HFViTForImageClassification, HFViTForMaskedImageModeling, HFViTModel
from hf_vit.training import optim
from hf_vit.training.optim import OPTIMIZERS, SCHEDULES, Schedule, build_optimizer, parameter_groups

# Configs that together have every kind of parameter.
ZOO: dict[str, dict[str, Any]] = {
    "paper": {"representation_size": 8},
    "dino": {"layer_scale_init_value": 0.1, "num_register_tokens": 2, "use_gated_mlp": True, "use_qk_norm": True},
    "dino_v3": {"position_embedding_type": "rotary", "num_register_tokens": 4, "pooling": "cls_and_mean"},
    "eva_02": {
        "position_embedding_type": "learned_rotary",
        "use_attention_layernorm": True,
        "use_mlp_layernorm": True,
    },
    "beit": {"position_embedding_type": "relative", "layer_scale_init_value": 0.1},
    "clip": {"use_pre_layernorm": True, "patch_bias": False, "final_layernorm": "pooled"},
    "siglip": {"use_cls_token": False, "pooling": "attention"},
    "deit": {"pooling": "cls_and_distillation"},
    "simple": {"use_cls_token": False, "pooling": "mean", "position_embedding_type": "sincos_2d"},
    "rows_and_columns": {"position_embedding_type": "learned_2d", "use_patch_layernorm": True},
    "hybrid": {"stem_layers": [1], "stem_width": 32},
}


def settings(model: nn.Module, **options: Any) -> dict[str, tuple[float, float]]:
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
    assert {scale for name, (_, scale) in scales.items() if "position_embeddings" in name} == {0.0625}


def test_positions_can_learn_faster(tiny_config: Any) -> None:
    scales = settings(HFViTForImageClassification(tiny_config()), position_lr_scale=10)
    fast = {name for name, (_, scale) in scales.items() if scale == 10}
    assert fast == {name for name in scales if "position_embeddings" in name} != set()


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("model_class", [HFViTForImageClassification, HFViTForMaskedImageModeling, HFViTModel])
def test_every_parameter_is_in_the_right_group(name: str, model_class: Any, tiny_config: Any) -> None:
    """Matrices decay; biases, norms, tokens, positions, scales and probes do not. Muon has those of the encoder."""
    model = model_class(tiny_config(**ZOO[name]))
    by_name = settings(model, weight_decay=0.1, layer_decay=0.5)  # and each once
    matrices = {
        f"{path}.weight" for path, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)
    }
    assert {path for path, (decay, _) in by_name.items() if decay} == matrices
    free = set(by_name) - matrices
    words = ("bias", "norm", "token", "position", "scale", "probe")  # a norm of the stem may be called shortcut.1
    assert all(any(word in path for word in words) or model.get_parameter(path).ndim == 1 for path in free)

    muon = {id(p) for group in parameter_groups(model) if not group["use_fallback"] for p in group["params"]}
    heads = ("classifier", "objective")
    in_muon = {path for path, parameter in model.named_parameters() if id(parameter) in muon}
    assert in_muon == {path for path in matrices if not path.startswith(heads)} != set()


def test_a_backbone_has_groups(tiny_config: Any) -> None:
    settings(HFViTBackbone(tiny_config()), weight_decay=0.1, layer_decay=0.5)


def test_relative_positions_learn_as_the_head(tiny_config: Any) -> None:
    """One table holds the offsets of all layers; BEiT's shared table is at the head's rate, too."""
    model = HFViTForImageClassification(tiny_config(position_embedding_type="relative"))
    scales = settings(model, layer_decay=0.5, position_lr_scale=3)
    assert {scale for name, (_, scale) in scales.items() if "position_embeddings" in name} == {3}
    assert scales["vit.embeddings.cls_token"][1] == 0.0625


@pytest.mark.parametrize("placement", ["every_layer", "every_layer_shared"])
def test_positions_of_every_layer_learn_as_the_head(tiny_config: Any, placement: str) -> None:
    scales = settings(HFViTForImageClassification(tiny_config(position_placement=placement)), layer_decay=0.5)
    assert {scale for name, (_, scale) in scales.items() if "position_embeddings" in name} == {1}


def test_all_learn_at_one_rate_unless_told(tiny_config: Any) -> None:
    settled = settings(HFViTForImageClassification(tiny_config()))
    assert set(settled.values()) == {(0.0, 1.0)}


def test_another_architecture_learns_at_one_rate() -> None:
    small = {"hidden_sizes": [4], "depths": [1], "embedding_size": 4, "layer_type": "basic", "num_labels": 2}
    model = ResNetForImageClassification(ResNetConfig(**small))
    decays = settings(model, weight_decay=0.1)
    assert {scale for _, scale in decays.values()} == {1.0}
    assert {name for name, (decay, _) in decays.items() if decay} >= {"classifier.1.weight"}
    for options in ({"layer_decay": 0.5}, {"position_lr_scale": 2.0}):
        with pytest.raises(
            ValueError, match=r"^ResNetForImageClassification has no layers and positions with separate"
        ):
            parameter_groups(model, **options)


def test_what_is_behind_a_frozen_parameter_learns(tiny_config: Any) -> None:
    model = HFViTForImageClassification(tiny_config())
    model.requires_grad_(False)
    model.classifier.bias.requires_grad_(True)
    [group] = parameter_groups(model)
    assert group["params"] == [model.classifier.bias]


def test_divided_parameters_are_in_groups_of_their_own(tiny_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Divided(nn.Parameter):
        """Stands for what FSDP divides among processes."""

    monkeypatch.setattr(optim, "DTensor", Divided)
    model = HFViTForImageClassification(tiny_config())
    model.classifier.bias = Divided(torch.zeros(4))
    groups = parameter_groups(model)
    assert [{type(parameter) for parameter in group["params"]} == {Divided} for group in groups].count(True) == 1
    assert all(len({type(parameter) for parameter in group["params"]}) == 1 for group in groups)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_frozen_encoder_stays_as_it_is(name: str, tiny_config: Any, pixel_values: torch.Tensor) -> None:
    model = HFViTForImageClassification(tiny_config())
    model.vit.requires_grad_(False)
    groups = parameter_groups(model, weight_decay=0.1, layer_decay=0.5)
    assert {id(parameter) for group in groups for parameter in group["params"]} == {
        id(parameter) for parameter in model.classifier.parameters()
    }
    assert sum(len(group["params"]) for group in groups) == 2
    encoder = {name: value.clone() for name, value in model.vit.state_dict().items()}
    before = model.classifier.weight.clone()
    train(model, build_optimizer(name, groups, 1e-2), pixel_values, range(2))
    assert all(torch.equal(value, encoder[name]) for name, value in model.vit.state_dict().items())
    assert not torch.equal(model.classifier.weight, before)


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
    assert Schedule("constant", 10)(10) == 1
    assert [Schedule("linear", 5, 4)(step) for step in (4, 5)] == [1, 0]


def test_a_schedule_sets_every_group(tiny_config: Any) -> None:
    model = HFViTForImageClassification(tiny_config())
    optimizer = build_optimizer("adamw", parameter_groups(model, position_lr_scale=10), 1.0)
    assert Schedule("linear", 10).apply(optimizer, 0.5, step=5) == 0.25
    assert {group["lr"] for group in optimizer.param_groups} == {0.25, 2.5}


def test_warm_up_and_cooldown_meet_the_ends() -> None:
    for kind in SCHEDULES:
        schedule = Schedule(kind, 40, warmup_steps=4, cooldown_steps=8)
        assert [schedule(step) for step in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
        cooldown = [schedule(step) for step in range(32, 41)]
        assert cooldown[-1] == 0
        assert cooldown == pytest.approx([cooldown[0] * left / 8 for left in range(8, -1, -1)])
    assert Schedule("cosine", 40, 4)(40) == pytest.approx(0)
    linear, cooled = Schedule("linear", 40, 4), Schedule("linear", 40, 4, cooldown_steps=8)
    assert [cooled(step) for step in range(41)] == pytest.approx([linear(step) for step in range(41)])


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize(("warmup", "cooldown"), [(10, 0), (15, 0), (8, 5), (10, 10), (0, 10), (0, 15), (15, 15)])
def test_a_run_may_be_shorter_than_its_parts(kind: str, warmup: int, cooldown: int) -> None:
    factors = [Schedule(kind, 10, warmup, cooldown)(step) for step in range(10)]
    assert all(0 < factor <= 1 for factor in factors)
    highest = factors.index(max(factors))
    assert factors[: highest + 1] == sorted(factors[: highest + 1])
    assert factors[highest:] == sorted(factors[highest:], reverse=True)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, pixel_values: torch.Tensor, steps: range) -> list[float]:
    schedule = Schedule("cosine", 10, warmup_steps=2)
    losses = []
    for step in steps:
        schedule.apply(optimizer, optimizer.defaults["lr"], step)
        loss = model(pixel_values, labels=torch.tensor([0, 3])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


RATES = {"adamw": 1e-2, "sgd": 1e-2, "lion": 1e-3, "lamb": 1e-2, "muon": 1e-2}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_makes_the_loss_smaller(name: str, tiny_config: Any, pixel_values: torch.Tensor) -> None:
    model = HFViTForImageClassification(tiny_config())
    losses = train(model, build_optimizer(name, parameter_groups(model, 0.1), RATES[name]), pixel_values, range(6))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_resumes_to_the_bit(name: str, tiny_config: Any, pixel_values: torch.Tensor) -> None:
    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(1)
        config = tiny_config(layer_scale_init_value=0.1, num_register_tokens=2, position_embedding_type="relative")
        model = HFViTForImageClassification(config)
        groups = parameter_groups(model, 0.1, layer_decay=0.8, position_lr_scale=3)
        return model, build_optimizer(name, groups, RATES[name], betas=(0.8, 0.95), momentum=0.7)

    model, optimizer = fresh()
    train(model, optimizer, pixel_values, range(6))

    stopped, its_optimizer = fresh()
    train(stopped, its_optimizer, pixel_values, range(3))
    file = io.BytesIO()
    torch.save((stopped.state_dict(), its_optimizer.state_dict()), file)
    file.seek(0)
    resumed, optimizer_of_resumed = fresh()
    weights, state = torch.load(file, weights_only=True)
    resumed.load_state_dict(weights)
    optimizer_of_resumed.load_state_dict(state)
    train(resumed, optimizer_of_resumed, pixel_values, range(3, 6))

    for path, value in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[path], value), path
    assert not torch.equal(stopped.classifier.weight, model.classifier.weight)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_takes_its_settings(name: str, tiny_config: Any) -> None:
    model = HFViTForImageClassification(tiny_config())
    optimizer = build_optimizer(name, parameter_groups(model, 0.3, 0.5), 0.1, betas=[0.8, 0.95], momentum=0.7)
    for group in optimizer.param_groups:
        assert group["betas"] == (0.8, 0.95) if name != "sgd" else "betas" not in group
        assert group["momentum"] == 0.7 if name in ("sgd", "muon") else "momentum" not in group
        assert group["weight_decay"] in (0, 0.3) and "lr_scale" in group
    assert name != "adamw" or optimizer.defaults["fused"]
    assert name != "lamb" or optimizer.defaults["max_grad_norm"] is None


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_rate_of_zero_changes_nothing(name: str, tiny_config: Any, pixel_values: torch.Tensor) -> None:
    """All of an optimizer's rates are the group's, which the schedule sets."""
    model = HFViTForImageClassification(tiny_config())
    optimizer = build_optimizer(name, parameter_groups(model, 0.1), 1e-2)
    before = {path: value.clone() for path, value in model.state_dict().items()}
    Schedule("linear", 10).apply(optimizer, 1e-2, step=10)
    model(pixel_values, labels=torch.tensor([0, 3])).loss.backward()
    optimizer.step()
    assert all(torch.equal(value, before[path]) for path, value in model.state_dict().items())


def test_muon_is_for_the_matrices_of_the_encoder(tiny_config: Any) -> None:
    """A first step of Muon has singular values of about one size; one of AdamW has numbers of one size."""
    model = HFViTForImageClassification(tiny_config(position_embedding_type="relative", num_register_tokens=2))
    optimizer = build_optimizer("muon", parameter_groups(model), 1e-2)
    before = {path: value.detach().clone() for path, value in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()

    layer = ("attention.qkv", "attention.o_proj", "mlp.fc1", "mlp.fc2")
    matrices = {f"vit.layers.{number}.{part}.weight" for number in range(3) for part in layer}
    matrices.add("vit.embeddings.patch_embeddings.projection.weight")
    for path, parameter in model.named_parameters():
        move = (parameter.detach() - before[path]) / 1e-2
        if path in matrices:
            spectrum = torch.linalg.svdvals(move) / (0.2 * max(move.shape) ** 0.5)
            assert spectrum.median() > 0.7 and spectrum.max() < 1.3, path
        else:
            assert torch.allclose(move.abs(), torch.ones_like(move), atol=1e-2), path


def test_timm_is_asked_for_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    groups = [{"params": [nn.Parameter(torch.ones(2, 2))], "weight_decay": 0.0, "lr_scale": 1.0}]
    build_optimizer("adamw", groups, 0.1)
    for name in ("lion", "lamb", "muon"):
        with pytest.raises(ValueError, match=r"^Lion, LAMB and Muon need timm: pip install timm.$"):
            build_optimizer(name, groups, 0.1)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="Unknown optimizer 'adam': choose one of adamw, sgd, lion, lamb, muon"):
        build_optimizer("adam", [], 0.1)
    with pytest.raises(ValueError, match="Unknown schedule 'cosin': choose one of cosine, linear, constant"):
        Schedule("cosin", 10)
