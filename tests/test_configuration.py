"""The config resolves sizes, refuses what cannot work and says what would, and survives a round trip."""

import json

import numpy as np
import pytest

from hf_vit import HFViTConfig
from hf_vit.model import configuration_hf_vit


def test_defaults_are_base_16():
    config = HFViTConfig()
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (768, 12, 12)
    assert (config.image_shape, config.patch_shape, config.grid_size) == ((224, 224), (16, 16), (14, 14))
    assert config.layer_norm_eps == 1e-6


@pytest.mark.parametrize(
    ("image_size", "patch_size", "grid"),
    [(224, 16, (14, 14)), ((96, 160), 16, (6, 10)), ([32, 48], (8, 16), (4, 3)), (32, [4, 8], (8, 4))],
)
def test_sizes_are_height_width(image_size, patch_size, grid):
    assert HFViTConfig(image_size=image_size, patch_size=patch_size).grid_size == grid


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 26, "num_attention_heads": 4}, "hidden_size=24 or 28"),
        ({"image_size": (40, 47)}, r"40x47.*16x16.*32x32, 32x48, 48x32, 48x48"),
        ({"image_size": 8}, "16x16"),
        ({"image_size": [32, 32, 32]}, "image_size"),
        ({"patch_size": 0}, "patch_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1"),
        ({"num_register_tokens": -1}, "num_register_tokens"),
        ({"head_dim": 0}, "head_dim"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate.*\[0, 1\)"),
        ({"hidden_dropout_prob": -0.1}, "hidden_dropout_prob"),
        ({"initializer_range": -1.0}, "initializer_range"),
        ({"pooling": "gap"}, "attention.*cls.*mean.*'gap'"),
        ({"position_embedding_type": "rope"}, "learned_2d.*'rope'"),
        ({"rope_grid": 16}, "rope_coordinates='index'"),
        ({"rope_grid": (16, 0), "rope_coordinates": "index"}, "rope_grid must be 1 to 65536 patches"),
        ({"rope_coordinates": "pixels"}, "centered, index.*'pixels'"),
        ({"pooling": "attention", "num_pooling_heads": 5}, "divisible by its 5 heads"),
        ({"position_placement": "every_layer", "position_embedding_type": "learned_rotary"}, "learned and added"),
        ({"position_placement": "stem"}, "every_layer_shared.*'stem'"),
        ({"position_placement": "every_layer", "position_embedding_type": "none"}, "learned and added, got.*'none'"),
        ({"position_interpolation": "cubic"}, "bicubic_antialias"),
        ({"position_interpolation": "geometric_bilinear"}, "between patches, got position_embedding_type='learned'"),
        ({"mim_objective": "dvae"}, "mean_color"),
        ({"hidden_act": "gleu"}, "gelu"),
        ({"use_cls_token": False}, "pooling='mean'"),
        (
            {"position_embedding_type": "sincos_2d", "hidden_size": 6, "num_attention_heads": 1},
            "divisible by 4.*4 or 8",
        ),
        ({"position_embedding_type": "learned_2d", "hidden_size": 5, "num_attention_heads": 5}, "divisible by 2"),
        ({"pooling": "attention", "hidden_size": 26, "num_attention_heads": 4, "head_dim": 8}, "24 or 28"),
        ({"hiden_size": 64}, "'hidden_size'"),
        ({"drop_path": 0.1}, "'drop_path_rate'"),
        ({"qk_norm": True}, "'use_qk_norm'"),
        ({"depth": 3}, "'num_hidden_layers'"),
        ({"num_classes": 3}, "'num_labels'"),
        ({"out_feature": ["stage1"]}, "'out_features'"),
        ({"out_features": []}, "out_features must name a stage"),
        ({"out_indices": [-14]}, "out_indices must be from -13 to 12"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers.* at most 1024"),
        ({"num_labels": 10**12}, "num_labels.* at most"),
        ({"num_labels": -1}, "num_labels"),
        ({"num_labels": 3, "id2label": {0: "a"}}, "num_labels=3 contradicts id2label"),
        ({"id2label": {0: "a", 7: "b"}}, "id2label must name the classes 0 to 1"),
        ({"stem_layers": [10**9], "patch_size": 4}, "stem_layers"),
        ({"image_size": 2**16, "patch_size": 1}, "image_size.*more than 1048576"),
        ({"mim_objective": "mean_color", "num_channels": 12}, "num_channels of at most 6"),
        ({"hidden_act": "prelu"}, "hidden_act"),  # has a weight, for which no checkpoint has a place
        ({"dtype": "nn"}, "dtype must be one of"),
        ({"torch_dtype": "int8"}, "torch_dtype must be one of"),
        ({"check": 1}, "'check' is a part of HFViTConfig"),
        ({"grid_size": (2, 2)}, "'grid_size' is a part of HFViTConfig"),
        ({"__class__": 1}, "'__class__' is a part of HFViTConfig"),
    ],
)
def test_refuses_and_says_what_would_do(fields, message):
    with pytest.raises(ValueError, match=message):
        HFViTConfig(**fields)


# Fields that transformers takes as they come.
INHERITED = [
    {"architectures": "HFViTModel"},
    {"id2label": ["a"]},
    {"label2id": 1},
    {"num_labels": None},
    {"out_features": "stage1"},
    {"out_indices": ["stage1"]},
    {"output_attentions": 1},
    {"output_hidden_states": "yes"},
    {"per_layer_config": {0: {"hidden_size": 8}}},
    {"problem_type": ["regression"]},
]


@pytest.mark.parametrize("fields", [{"image_size": "224"}, {"hidden_size": 64.0}, {"qkv_bias": "yes"}, *INHERITED])
def test_refuses_wrong_types(fields):
    with pytest.raises(Exception, match=next(iter(fields))):
        HFViTConfig(**fields)


def test_unrelated_keywords_are_kept():
    assert HFViTConfig(my_note="kept").my_note == "kept"


def test_a_head_width_of_its_own():
    assert HFViTConfig(hidden_size=26, num_attention_heads=4, head_dim=8).head_width == 8


def test_the_class_token_follows_the_pooling_unless_told():
    assert HFViTConfig().use_cls_token is True
    assert HFViTConfig(pooling="mean").use_cls_token is False
    assert HFViTConfig(pooling="mean", use_cls_token=True).use_cls_token is True


def test_round_trip(tmp_path, tiny_config):
    config = tiny_config(patch_size=(8, 16), pooling="attention", out_features=["stage1", "stage3"], my_note="kept")
    config.save_pretrained(tmp_path)
    assert HFViTConfig.from_pretrained(tmp_path).to_dict() == {
        **config.to_dict(),
        "image_size": [32, 48],
        "patch_size": [8, 16],
    }


def test_overrides_are_validated_with_the_stored_fields(tmp_path, tiny_config):
    tiny_config(out_features=["stage3"]).save_pretrained(tmp_path)
    config = HFViTConfig.from_pretrained(tmp_path, image_size=(96, 160), num_hidden_layers=2, num_labels=7)
    assert (config.grid_size, config.num_labels, config.out_features) == ((12, 20), 7, ["stage2"])
    with pytest.raises(ValueError, match="does not divide"):
        HFViTConfig.from_pretrained(tmp_path, image_size=(33, 48))


def test_patch_dropout_is_deprecated(tiny_config, monkeypatch):
    said = []
    monkeypatch.setattr(configuration_hf_vit.logger, "warning_once", said.append)
    tiny_config()
    assert not said
    assert tiny_config(patch_dropout_prob=0.5).patch_dropout_prob == 0.5
    assert len(said) == 1 and "patch_dropout_prob is deprecated" in said[0]


def test_a_stored_key_that_nearly_matches_is_kept_and_named(tmp_path, tiny_config, caplog):
    config = tiny_config()
    config.layer_norm_epsilon = 1.0  # as another version or tool may leave it
    config.save_pretrained(tmp_path)
    with caplog.at_level("WARNING", logger="transformers"):
        loaded = HFViTConfig.from_pretrained(tmp_path)
    assert (loaded.layer_norm_epsilon, loaded.layer_norm_eps) == (1.0, 1e-6)


def test_a_stored_key_of_a_newer_version_is_kept_and_named(tmp_path, tiny_config, monkeypatch):
    said = []
    monkeypatch.setattr(configuration_hf_vit.logger, "warning_once", said.append)
    config = tiny_config()
    config.use_cache = False  # as Trainer has it
    config.save_pretrained(tmp_path)
    assert HFViTConfig.from_pretrained(tmp_path).to_dict() and not said
    config.number_of_experts = 8
    config.save_pretrained(tmp_path)
    loaded = HFViTConfig.from_pretrained(tmp_path)
    assert loaded.number_of_experts == 8
    assert len(said) == 1 and "'number_of_experts', without effect" in said[0]


def test_the_file_names_the_code_of_every_class(tmp_path, tiny_config):
    tiny_config().save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForImageClassification",
        "AutoModelForMaskedImageModeling",
        "AutoModelForSemanticSegmentation",
        "AutoModelForObjectDetection",
        "AutoBackbone",
    }


def test_output_attentions_needs_no_particular_attention(tiny_config):
    config = tiny_config(attn_implementation="sdpa")
    config.output_attentions = True
    assert config.output_attentions
    assert tiny_config(attn_implementation="sdpa", output_attentions=True).output_attentions


PAIRS = [
    ({"id2label": {"0": "a", "1": "b", "10": "k", "2": "c", **{str(i): f"n{i}" for i in range(3, 10)}}}, "abc"),
    ({"label2id": {"b": "1", "a": "0", "c": 2}}, "abc"),
    ({"id2label": {1: "b", 0: "a"}, "label2id": {"b": 1, "a": 0}}, "ab"),
    ({"id2label": {0: 0, 1: 1}, "label2id": {0: 0, 1: 1}}, "01"),
    ({"id2label": {np.int64(1): "b", np.int64(0): "a"}, "num_labels": np.int64(2)}, "ab"),
]


@pytest.mark.parametrize(("fields", "first"), PAIRS)
@pytest.mark.parametrize("given_to", ["config", "from_pretrained", "assigned"])
def test_label_names_are_complete_and_in_order(tmp_path, tiny_config, fields, first, given_to):
    """Either half, with text or numbers as keys: both halves are ordered by number, and load again."""
    if given_to == "config":
        config = HFViTConfig(**fields)
    elif given_to == "from_pretrained":
        tiny_config(num_labels=4).save_pretrained(tmp_path)
        config = HFViTConfig.from_pretrained(tmp_path, **fields)
    else:
        config = HFViTConfig(num_labels=4)
        for name in fields.keys() - {"num_labels"}:
            setattr(config, name, fields[name])
    config.save_pretrained(tmp_path / "saved")
    for each in (config, HFViTConfig.from_pretrained(tmp_path / "saved")):
        assert list(each.id2label) == list(range(each.num_labels))
        assert "".join(each.id2label.values()).startswith(first)
        assert each.label2id == {name: index for index, name in each.id2label.items()}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id2label": {1: "a", 2: "b"}}, "must name the classes 0 to 1, got 1, 2: number them from 0"),
        ({"id2label": ["a", "b"]}, r"pass dict\(enumerate\(names\)\)"),
        ({"id2label": {"a": 0, "b": 1}}, "is it the other field"),
        ({"id2label": {0: "a", "0": "b"}}, "name every class once"),
        ({"label2id": {"a": 0, "b": 0}}, "every name a different number"),
    ],
)
def test_label_names_that_would_not_load_are_refused_at_once(tmp_path, tiny_config, fields, message):
    tiny_config(num_labels=2).save_pretrained(tmp_path)
    config = HFViTConfig(id2label={0: "x", 1: "y"})
    with pytest.raises(ValueError, match=message):
        HFViTConfig(**fields)
    with pytest.raises(ValueError, match=message):
        HFViTConfig.from_pretrained(tmp_path, **fields)
    with pytest.raises(ValueError, match=message):
        setattr(config, *next(iter(fields.items())))
    assert config.id2label == {0: "x", 1: "y"} and config.label2id == {"x": 0, "y": 1}


def test_label_names_that_contradict_each_other(tmp_path, tiny_config):
    """Refused if given; of stored ones, which other software may have left, `id2label` counts."""
    with pytest.raises(ValueError, match="'b' is 0 in label2id, but class 0 is 'a' in id2label"):
        HFViTConfig(id2label={0: "a", 1: "b"}, label2id={"a": 1, "b": 0})
    stored = {**tiny_config().to_dict(), "id2label": {"0": "a", "1": "b"}, "label2id": {"x": 0, "y": 1}}
    assert HFViTConfig.from_dict(stored).label2id == {"a": 0, "b": 1}
    assert HFViTConfig.from_dict({**stored, "label2id": {"0": "a", "1": "b"}}).label2id == {"a": 0, "b": 1}
    # Two classes of ImageNet share a name.
    cranes = HFViTConfig(id2label={0: "crane", 1: "crane", 2: "ship"}, label2id={"crane": 0, "ship": 2})
    assert cranes.label2id == {"crane": 0, "ship": 2}
    cranes.num_labels = 2
    assert cranes.label2id == {"LABEL_0": 0, "LABEL_1": 1}
    cranes.id2label[1] = 7
    cranes.save_pretrained(tmp_path)
    assert HFViTConfig.from_pretrained(tmp_path).label2id == {"LABEL_0": 0, "7": 1}


def test_numbers_of_numpy(tmp_path):
    size = (np.int64(32), np.int32(48))
    config = HFViTConfig(
        num_labels=np.int64(5), image_size=size, patch_size=np.array([8, 8]), layer_norm_eps=np.float32(1e-6)
    )
    config.save_pretrained(tmp_path)
    again = HFViTConfig.from_pretrained(tmp_path)
    assert (again.num_labels, again.grid_size, type(again.layer_norm_eps)) == (5, (4, 6), float)
