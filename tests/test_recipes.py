"""Recipes: what a file may say, how it is read, and that those of the package are whole and say what to expect."""

import re
from collections.abc import Callable
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import ViTConfig, ViTImageProcessor, ViTModel

from hf_vit import HFViTConfig, HFViTForImageClassification, HFViTForMaskedImageModeling, HFViTImageProcessor
from hf_vit.data.augmentation import AUGMENTATIONS
from hf_vit.data.labelled import ImageData
from hf_vit.training.lejepa import ViewEncoder
from hf_vit.training.optim import OPTIMIZERS, SCHEDULES
from hf_vit.training.recipe import TrainConfig, recipe_path, shipped_recipes
from hf_vit.training.tasks import Classification, build_model
from hf_vit.variants import VARIANTS, config_of

NAMES = list(shipped_recipes())
FIELDS = {item.name for item in fields(TrainConfig)}
WORDS = ("Source", "Command", "Hardware", "Time", "Result")
MODELS: dict[str, Any] = {
    "classification": HFViTForImageClassification,
    "masked_patches": HFViTForMaskedImageModeling,
    "lejepa": ViewEncoder,
}


def header(name: str) -> str:
    """Return the comment that a recipe begins with."""
    lines = shipped_recipes()[name].read_text(encoding="utf-8").splitlines()
    return "\n".join(lines[: next(index for index, line in enumerate(lines) if not line.startswith("#"))])


def section(name: str, word: str) -> str:
    """Return what the header says behind one of `WORDS`, on one line."""
    others = "|".join(WORDS)
    found = re.search(rf"^# {word}: (.*?)(?=^# (?:{others}):|\Z)", header(name), re.MULTILINE | re.DOTALL)
    return re.sub(r"\n#\s*", " ", found[1]).strip() if found else ""


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


# ----------------------------------------------------------------------------------------- those of the package


def test_the_package_has_recipes() -> None:
    assert {
        "digits",
        "flowers",
        "cifar10",
        "imagenet21k-pretrain",
        "imagenet-finetune-384",
        "imagenet1k-augreg",
        "imagenet1k-deit3",
        "imagenet1k-s16-90ep",
        "mim-pretrain",
        "mae-pretrain",
        "lejepa-pretrain",
        "linear-probe",
    } <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_is_read_and_reads_back(name: str, recipe: Callable[[str], Path]) -> None:
    config = TrainConfig.from_recipe(name)
    assert TrainConfig.from_recipe(recipe(config.to_yaml())) == config
    assert TrainConfig.from_recipe(recipe(config.explain())) == config


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_says_what_to_expect(name: str) -> None:
    text = header(name)
    assert text.splitlines()[0].endswith(".")
    assert len(text.splitlines()[0]) <= 59  # fits the list of recipes in 80 columns
    places = [text.find(f"\n# {word}: ") for word in WORDS]
    assert -1 not in places and places == sorted(places)
    assert all(section(name, word) for word in WORDS)
    # A figure comes with its spread, or it is said that there is none.
    assert re.search(r"deviation|spread|two runs|±", section(name, "Result"))
    # What was not run is not claimed: time and result agree on it.
    unmeasured = [bool(re.search(r"not run|not measured", section(name, word))) for word in ("Time", "Result")]
    assert unmeasured[0] == unmeasured[1]


@pytest.mark.parametrize("name", NAMES)
def test_every_option_that_a_header_names_exists(name: str) -> None:
    for option in re.findall(r"(?<!\S)\(?--([a-z][\w.-]*\w)", header(name)):
        field, _, of_model = option.replace("-", "_").partition(".")
        assert field in {*FIELDS, "recipe", "num_processes"}, f"{name}: --{option}"
        assert not of_model or of_model in HFViTConfig.__dataclass_fields__, f"{name}: --{option}"
    command = section(name, "Command")
    assert f"--recipe {name} " in f"{command} " or command == "hf-vit quickstart"


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_states_what_a_run_needs(name: str) -> None:
    stated = yaml.safe_load(recipe_path(name).read_text(encoding="utf-8"))
    assert {"model", "image_size", "batch_size", "learning_rate", "weight_decay", "augmentation"} <= {
        *stated,
        *({"image_size"} if stated["model"] is not None else ()),
    }
    assert {"precision", "output_dir", "eval_every", "log_every"} <= set(stated)
    assert stated["output_dir"] == f"hf-vit-{name}"
    assert "epochs" in stated or "max_steps" in stated


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_names_what_there_is(name: str) -> None:
    config = TrainConfig.from_recipe(name)
    assert config.augmentation in AUGMENTATIONS
    assert config.optimizer in OPTIMIZERS
    assert config.schedule in SCHEDULES
    assert HFViTImageProcessor.from_preset(config.preprocessing, 32) is not None
    assert 0 < config.smallest_crop <= 1
    assert config.max_steps is None or config.warmup_steps is None or config.warmup_steps < config.max_steps
    assert config.warmup_epochs + config.cooldown_epochs < config.epochs
    processes = re.search(r"--num_processes (\d+)", section(name, "Command"))
    assert config.batch_size % (config.accumulation_steps * (int(processes[1]) if processes else 1)) == 0


@pytest.mark.parametrize("name", NAMES)
def test_every_model_can_be_built(name: str) -> None:
    config = TrainConfig.from_recipe(name)
    of_model = {**config.model_config, "image_size": config.image_size}
    # Of a checkpoint, what is stated over it must be valid by itself.
    build = partial(config_of, config.model) if config.model in VARIANTS else HFViTConfig
    model_config = build(**of_model)
    with torch.device("meta"):
        model = MODELS[config.task](model_config)
    assert sum(parameter.numel() for parameter in model.parameters()) > 0
    rows, columns = model_config.grid_size
    assert rows % config.mask_block == columns % config.mask_block == 0


# What the sources say; a change of these is a change of what a recipe claims to follow.
FACTS: dict[str, dict[str, Any]] = {
    "imagenet21k-pretrain": {
        "model": "ViT-B/16",
        "model_config": {"hidden_dropout_prob": 0.1, "representation_size": 768, "zero_init_head": True},
        "epochs": 90,
        "batch_size": 4096,
        "optimizer": "adamw",
        "learning_rate": 1e-3,
        "betas": [0.9, 0.999],
        "weight_decay": 0.03,
        "schedule": "linear",
        "warmup_steps": 10_000,
        "max_grad_norm": 1,
        "image_size": 224,
    },
    "imagenet-finetune-384": {
        "model": "google/vit-base-patch16-224-in21k",
        "optimizer": "sgd",
        "momentum": 0.9,
        "schedule": "cosine",
        "weight_decay": 0,
        "max_grad_norm": 1,
        "batch_size": 512,
        "max_steps": 20_000,
        "warmup_steps": 500,
        "image_size": 384,
        "label_smoothing": 0,
        "mixup": 0,
        "cutmix": 0,
        "layer_decay": 1,
        "trained": "all",
    },
    "imagenet1k-augreg": {
        "epochs": 300,
        "batch_size": 4096,
        "optimizer": "adamw",
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "schedule": "cosine",
        "warmup_steps": 10_000,
        "augmentation": "augreg_medium2",
        "mixup": 0.5,
        "max_grad_norm": 1,
    },
    "imagenet1k-deit3": {
        "epochs": 800,
        "batch_size": 2048,
        "optimizer": "lamb",
        "learning_rate": 4e-3,
        "weight_decay": 0.05,
        "warmup_epochs": 5,
        "augmentation": "three",
        "color_jitter": 0.3,
        "mixup": 0.8,
        "cutmix": 1,
        "label_smoothing": 0,
        "loss": "binary_cross_entropy",
        "ema_decay": None,
    },
    "imagenet1k-s16-90ep": {
        "model": "ViT-S/16",
        "model_config": {"pooling": "mean", "position_embedding_type": "sincos_2d", "zero_init_head": True},
        "epochs": 90,
        "batch_size": 1024,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "warmup_steps": 10_000,
        "augmentation": "augreg_light2",
        "mixup": 0.2,
        "max_grad_norm": 1,
    },
    "mim-pretrain": {
        "task": "masked_patches",
        "model": "ViT-B/16",
        "mask_ratio": 0.6,
        "mask_block": 2,
        "epochs": 800,
        "batch_size": 2048,
        "learning_rate": 4e-4,
        "weight_decay": 0.05,
        "warmup_epochs": 10,
        "max_grad_norm": 5,
        "smallest_crop": 0.67,
    },
    "mae-pretrain": {
        "task": "masked_patches",
        "model": "ViT-B/16",
        "mask_ratio": 0.75,
        "epochs": 800,
        "batch_size": 4096,
        "learning_rate": 1.5e-4 * 4096 / 256,
        "betas": [0.9, 0.95],
        "weight_decay": 0.05,
        "warmup_epochs": 40,
        "max_grad_norm": None,
        "smallest_crop": 0.2,
    },
    "lejepa-pretrain": {
        "task": "lejepa",
        "model": "ViT-L/16",
        "global_views": 2,
        "local_views": 6,
        "epochs": 100,
        "learning_rate": 5e-4,
        "weight_decay": 0.05,
        "precision": "bf16",
        "smallest_crop": 1,
    },
    "linear-probe": {
        "trained": "head",
        "optimizer": "sgd",
        "momentum": 0.9,
        "learning_rate": 0.001 * 1024 / 256,
        "weight_decay": 0,
        "epochs": 100,
        "warmup_epochs": 0,
        "batch_size": 1024,
        "max_grad_norm": None,
        "augmentation": "crop_flip",
    },
}


@pytest.mark.parametrize("name", FACTS)
def test_recipes_keep_to_their_sources(name: str) -> None:
    stated = asdict(TrainConfig.from_recipe(name))
    assert {field: stated[field] for field in FACTS[name]} == FACTS[name]


def test_fine_tuning_begins_with_a_head_of_zeros_and_no_pre_logits() -> None:
    of_model = TrainConfig.from_recipe("imagenet-finetune-384").model_config
    assert of_model["zero_init_head"] is True and of_model["representation_size"] is None
    model_config = HFViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, **of_model
    )
    head = HFViTForImageClassification(model_config).classifier
    assert not any(parameter.any() for parameter in head.parameters())


@pytest.mark.parametrize("has_pooler", [True, False])
@pytest.mark.parametrize("name", ["imagenet-finetune-384", "linear-probe"])
def test_recipes_for_checkpoints_fit_one_of_transformers(name: str, has_pooler: bool, tmp_path: Path) -> None:
    small = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    ViTModel(small, add_pooling_layer=has_pooler).save_pretrained(tmp_path)
    ViTImageProcessor().save_pretrained(tmp_path)
    config = TrainConfig.from_recipe(name, model=str(tmp_path))
    data = ImageData("data", [], [], ("image", "label"), ["a", "b", "c"], "test", 0)
    model, processor = build_model(config, Classification(config, data))
    assert model.config.image_shape == (config.image_size, config.image_size)
    assert (processor.size.height, processor.size.width) == model.config.image_shape
    assert model.config.representation_size is None and not hasattr(model.config, "pooler_act")
    assert not any(parameter.any() for parameter in model.classifier.parameters())
    learned = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert (learned == {"classifier.weight", "classifier.bias"}) == (config.trained == "head")


@pytest.mark.parametrize("has_class_token", [True, False])
def test_a_probe_reads_what_a_mean_pooled_checkpoint_has(has_class_token: bool, tmp_path: Path) -> None:
    small = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=224)
    fields = {"pooling": "mean", "use_cls_token": has_class_token, "final_layernorm": "pooled"}
    HFViTForImageClassification(HFViTConfig(**small, **fields)).save_pretrained(tmp_path)
    config = TrainConfig.from_recipe("linear-probe", model=str(tmp_path))
    data = ImageData("data", [], [], ("image", "label"), ["a", "b", "c"], "test", 0)
    model, _ = build_model(config, Classification(config, data))
    assert model.config.pooling == "mean" and model.classifier.weight.shape == (3, 8)


# ------------------------------------------------------------------------------------------- how they are read


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("learning_rat", "learning_rate"),
        ("epoch", "epochs"),
        ("smoothing", "label_smoothing"),
        ("mask-ratio", "mask_ratio"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(key: str, nearest: str, recipe: Callable[[str], Path]) -> None:
    message = rf"Unknown recipe field '{key}': did you mean '{nearest}'\?"
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_recipe(recipe(f"{key}: 1\n"))
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_recipe("digits", **{key: 1})


def test_an_unknown_recipe_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match=r"Unknown recipe 'digit': give a YAML file .*digits, finetune, flowers"):
        TrainConfig.from_recipe("digit")


@pytest.mark.parametrize("text", ["- epochs\n- 5\n", "epochs\n", "5\n"])
def test_what_is_no_mapping_is_no_recipe(text: str, recipe: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="is not a recipe: expected a YAML file of fields and values"):
        TrainConfig.from_recipe(recipe(text))


def test_an_empty_recipe_is_the_defaults(recipe: Callable[[str], Path]) -> None:
    assert TrainConfig.from_recipe(recipe("# nothing\n")) == TrainConfig()


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("learning_rate: 1e-3", 0.001),  # a text for YAML
        ('learning_rate: "1e-3"', 0.001),
        ("learning_rate: 1", 1.0),
        ("epochs: 5", 5.0),
        ("epochs: 0.5", 0.5),
        ("batch_size: 64.0", 64),
        ("batch_size: 1e2", 100),
        ("max_steps: null", None),
        ("max_steps: 10", 10),
        ("max_grad_norm: null", None),
        ("max_grad_norm: 5", 5.0),
        ("model: null", None),
        ("compile: true", True),
        ("compile: no", False),
        ("betas: [0.9, 1]", [0.9, 1.0]),
        ("betas: [0.9, 99e-2]", [0.9, 0.99]),
        ("image_size: 64", 64),
        ("image_size: [64, 96]", [64, 96]),
        ("model_config: {patch_size: 8}", {"patch_size": 8}),
    ],
)
def test_values_are_read_as_the_types_of_their_fields(line: str, value: Any, recipe: Callable[[str], Path]) -> None:
    read = getattr(TrainConfig.from_recipe(recipe(line)), line.split(":")[0])
    assert read == value and type(read) is type(value)
    if isinstance(value, list):
        assert [type(item) for item in read] == [type(item) for item in value]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("learning_rate: fast", "learning_rate must be a number, got 'fast'"),
        ("learning_rate: true", "learning_rate must be a number, got True"),
        ("learning_rate: null", "learning_rate must be a number, got None"),
        ("batch_size: 1.5", "batch_size must be a whole number, got 1.5"),
        ("max_steps: soon", "max_steps must be a whole number or null, got 'soon'"),
        ("compile: 1", "compile must be true or false, got 1"),
        ('compile: "yes"', "compile must be true or false, got 'yes'"),
        ("betas: 0.9", "betas must be a list of numbers, got 0.9"),
        ("image_size: large", "Expected pixels as H or HxW for image_size, such as 224 or 224x320; got 'large'"),
        ("model_config: cls", "model_config must be a mapping, got 'cls'"),
        ("augmentation: [rand]", "augmentation must be a string, got ['rand']"),
        ("batch_size: 0", "batch_size must be at least 1, got 0"),
        ("compile_mode: reduce-overhead", "compile_mode is reduce-overhead, but nothing is compiled"),
        ("compile: true\ncompile_mode: max-autotune\naccumulation_steps: 2", "set compile_mode to default"),
        ("mask_ratio: 1", "mask_ratio must be between 0 and 1, got 1.0"),
        ("ema_decay: 1", "ema_decay must be between 0 and 1, such as 0.999, got 1.0"),
        ("cache: disk", "cache must be one of none, ram, device, got 'disk'"),
        ("precision: int8", "precision must be one of auto, fp32, bf16, fp16, fp8, got 'int8'"),
        (
            "task: tracking",
            "task must be one of classification, multi_label, regression, segmentation, detection, masked_patches, "
            "distillation, lejepa, got 'tracking'",
        ),
        (
            "{loss: binary_cross_entropy, label_smoothing: 0.1}",
            "label_smoothing=0.1 gives all classes a share: set it to 0",
        ),
        ("loss: hinge", "loss must be one of cross_entropy, binary_cross_entropy, got 'hinge'"),
    ],
)
def test_other_values_are_refused_with_what_is_expected(
    line: str, message: str, recipe: Callable[[str], Path]
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TrainConfig.from_recipe(recipe(line))


def test_overrides_win_over_the_recipe() -> None:
    config = TrainConfig.from_recipe("digits", learning_rate="1e-3", max_steps=7, data="elsewhere")
    assert (config.learning_rate, config.max_steps, config.data) == (0.001, 7, "elsewhere")
    assert config.betas == TrainConfig.from_recipe("digits").betas


def test_another_model_is_not_made_like_the_one_of_the_recipe() -> None:
    assert TrainConfig.from_recipe("flowers").model_config and TrainConfig.from_recipe("flowers").position_std == 0.5
    for model in ("ViT-B/16", "someone/a-vit"):
        config = TrainConfig.from_recipe("flowers", model=model)
        assert (config.model_config, config.position_std, config.image_size) == ({}, None, 160)
    given = {"model_config.pooling": "mean", "model_config.layer_scale_init_value": "1e-4", "position_std": 0.1}
    config = TrainConfig.from_recipe("flowers", model="ViT-B/16", **given)
    assert (config.model_config, config.position_std) == ({"pooling": "mean", "layer_scale_init_value": 1e-4}, 0.1)
    assert TrainConfig.from_recipe("linear-probe", model="someone/a-vit").model_config["pooling"] == "cls_and_mean"


def test_fields_of_the_architecture_are_overridden_one_by_one() -> None:
    before = TrainConfig.from_recipe("digits").model_config
    config = TrainConfig.from_recipe("digits", **{"model_config.hidden_size": 48, "model_config.pooling": "mean"})
    assert config.model_config == {**before, "hidden_size": 48, "pooling": "mean"}
    assert TrainConfig.from_recipe("digits").model_config == before


def test_the_architecture_can_be_overridden_where_a_recipe_states_none(recipe: Callable[[str], Path]) -> None:
    config = TrainConfig.from_recipe(recipe("epochs: 1\n"), **{"model_config.pooling": "mean"})
    assert config.model_config == {"pooling": "mean"}


def test_configs_do_not_share_what_they_hold() -> None:
    first, second = TrainConfig(), TrainConfig()
    first.betas.append(1.0)
    first.model_config["pooling"] = "mean"
    assert second.betas == [0.9, 0.999] and second.model_config == {}


def test_explain_gives_every_field_with_its_meaning(recipe: Callable[[str], Path]) -> None:
    config = TrainConfig.from_recipe("flowers", image_size=[64, 96], max_steps=3, **{"model_config.head_dim": None})
    lines = config.explain().splitlines()
    explained = [item for item in fields(TrainConfig) if item.name != "auto"]  # it is the value of other fields
    for comment, line, item in zip(lines[::2], lines[1::2], explained, strict=True):
        assert comment == f"# {item.metadata['help']}" and item.metadata["help"].endswith(".")
        assert line.startswith(f"{item.name}: ")
    assert TrainConfig.from_recipe(recipe(config.explain())) == config
