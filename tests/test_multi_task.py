"""Several heads on one encoder: the model, its saved folder and pipeline, and the cost of a further head."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from isolated import python
from PIL import Image
from sklearn.neighbors import NearestNeighbors
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, pipeline

import hf_vit
from hf_vit import HFViTConfig, HFViTForImageClassification
from hf_vit.checkpoints.models import load
from hf_vit.hub.folder import check_folder
from hf_vit.model.multi_task_hf_vit import HFViTForMultiTask

HEADS: dict[str, dict[str, Any]] = {
    "species": {"task": "classification", "id2label": {0: "cat", 1: "dog", 2: "cow"}, "temperature": 2.0},
    "tags": {
        "task": "multi_label",
        "id2label": {0: "old", 1: "wet"},
        "pooling": "cls_and_mean",
        "thresholds": [0.1, 0.9],
    },
    "box": {
        "task": "regression",
        "id2label": {0: "x", 1: "y"},
        "pooling": "mean",
        "target_mean": [1.0, 2.0],
        "target_scale": [3.0, 4.0],
    },
    "parts": {
        "task": "segmentation",
        "id2label": {0: "ground", 1: "leg"},
        "out_indices": [1, 3],
        "patch_subdivision": 2,
    },
    "things": {"task": "detection", "id2label": {0: "cup"}, "patch_subdivision": 2},
    "odd": {"task": "anomaly", "memory_size": 16, "num_neighbors": 2, "threshold": 0.5},
}
MODULES = {name: "HFViTForImageClassification" for name in ("species", "tags", "box")} | {
    "parts": "HFViTForSemanticSegmentation",
    "things": "HFViTForObjectDetection",
    "odd": "HFViTForMultiTask",
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model(tiny_config: Any) -> HFViTForMultiTask:
    return HFViTForMultiTask(tiny_config(task_heads=HEADS)).eval()


def output_of(outputs: Any, name: str) -> Any:
    return outputs.get(name, outputs)


def assert_same(first: Any, second: Any) -> None:
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key


@torch.no_grad()
def test_every_head_is_the_single_task_model_bit_for_bit(model: HFViTForMultiTask, tmp_path: Path) -> None:
    pixels = torch.rand(2, 3, 40, 24)
    outputs = model(pixels)
    assert list(outputs) == sorted(HEADS) and outputs[0] is outputs["box"] is outputs.box
    assert [type(each) for each in outputs.to_tuple()] == [type(each) for each in outputs.values()]
    model.save_pretrained(tmp_path / "all")
    for name, class_name in MODULES.items():
        single = model.single(name)
        assert type(single).__name__ == class_name
        assert single.vit.layers[0].mlp.fc1.weight is model.vit.layers[0].mlp.fc1.weight
        assert_same(output_of(single(pixels), name), outputs[name])
        single.save_pretrained(tmp_path / name)
        assert_same(output_of(type(single).from_pretrained(tmp_path / name).eval()(pixels), name), outputs[name])
        assert_same(output_of(load(tmp_path / "all", head=name)[0](pixels), name), outputs[name])
    assert_same(model(pixels)["parts"], outputs["parts"])  # after the single models have run


@torch.no_grad()
def test_a_saved_folder_loads_exactly_and_can_be_published(model: HFViTForMultiTask, tmp_path: Path) -> None:
    pixels = torch.rand(2, 3, 32, 48)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["auto_map"]["AutoModel"] == "multi_task_hf_vit.HFViTForMultiTask"
    assert check_folder(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert type(again) is HFViTForMultiTask and again.config.task_heads == model.config.task_heads
    for name, output in again(pixels).items():
        assert_same(output, model(pixels)[name])
    fields = {field: value for field, value in model.config.to_dict().items() if field not in ("architectures",)}
    assert type(AutoModel.from_config(HFViTConfig.from_dict(fields))) is HFViTForMultiTask
    assert type(AutoModel.from_config(HFViTConfig(num_hidden_layers=1))) is hf_vit.HFViTModel
    classifier = HFViTForImageClassification.from_pretrained(tmp_path, head="species")
    assert torch.equal(classifier(pixels).logits, model(pixels).species.logits)
    with pytest.raises(ValueError, match="no head 'ears': choose one of box, odd"):
        load(tmp_path, head="ears")


@pytest.mark.slow
def test_a_folder_stands_alone(model: HFViTForMultiTask, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    image.save(tmp_path / "a.png")
    code = (
        "import sys, json; from transformers import pipeline; "
        "answers = pipeline('multi-task', sys.argv[1], trust_remote_code=True); "
        "found = answers(sys.argv[2]); found = {name: found[name] for name in ('species', 'tags', 'box')}; "
        "print(type(answers.model).__module__.split('.')[0], json.dumps(found))"
    )
    module, _, found = python(code, tmp_path / "model", tmp_path / "a.png", home=tmp_path).stdout.partition(" ")
    ours = pipeline("multi-task", str(tmp_path / "model"))(str(tmp_path / "a.png"))
    assert module == "transformers_modules"
    assert json.loads(found) == {name: ours[name] for name in ("species", "tags", "box")}


@torch.no_grad()
def test_the_pipeline_answers_for_every_head(model: HFViTForMultiTask, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 256, (20, 30, 3), dtype=np.uint8)) for _ in range(3)]
    answers = pipeline("multi-task", str(tmp_path))
    found = answers(images, batch_size=2)[2]
    inputs = answers.image_processor(images[2], return_tensors="pt")
    outputs = model(**inputs)
    probabilities = outputs.species.logits[0].softmax(dim=-1)
    assert found["species"][0]["label"] == HEADS["species"]["id2label"][int(probabilities.argmax())]
    assert found["species"][0]["score"] == pytest.approx(probabilities.max().item(), abs=1e-6)
    assert [each["label"] for each in found["tags"]] == ["old"]  # about 0.5, above 0.1 and below 0.9
    assert found["box"] == pytest.approx(dict(zip("xy", outputs.box.logits[0].tolist(), strict=True)), abs=1e-5)
    masks = {each["label"]: np.asarray(each["mask"]) for each in found["parts"]}
    assert all(mask.shape == (20, 30) for mask in masks.values()) and (sum(masks.values()) == 255).all()
    assert found["things"] == []  # a new head sees no objects
    assert answers(images[2])["things"] == []
    assert found["odd"]["map"].shape == (20, 30)
    assert found["odd"]["is_anomaly"] == (found["odd"]["score"] > 0.5)
    assert len(answers(images[0], top_k=1)["species"]) == 1


@torch.no_grad()
def test_an_anomaly_is_what_is_far_from_all_normal_patches(model: HFViTForMultiTask) -> None:
    pixels = torch.rand(2, 3, 32, 48)
    head, outputs = model.heads["odd"], model(pixels)["odd"]
    patches = model.vit(pixels).last_hidden_state[:, model.config.num_prefix_tokens :].flatten(0, 1).numpy()
    patches /= np.linalg.norm(patches, axis=1, keepdims=True)
    head.memory.copy_(torch.nn.functional.normalize(head.memory, dim=-1))
    expected, _ = NearestNeighbors(n_neighbors=2, metric="cosine").fit(head.memory.numpy()).kneighbors(patches)
    outputs = model(pixels)["odd"]
    np.testing.assert_allclose(outputs.anomaly_maps.flatten(), expected.mean(axis=1), rtol=1e-4)
    torch.testing.assert_close(outputs.scores, outputs.anomaly_maps.flatten(1).amax(dim=1))  # 1 % of 24 patches is 1
    head.memory[:2] = torch.from_numpy(patches[:2])
    assert model(pixels[:1])["odd"].anomaly_maps.flatten()[:2].max() < expected.mean()


def test_losses_of_labelled_heads_are_added(model: HFViTForMultiTask) -> None:
    labels: dict[str, Any] = {"species": torch.tensor([0, 2]), "parts": torch.ones(2, 32, 48, dtype=torch.int64)}
    boxes = torch.tensor([[0.0, 0.5, 0.5, 0.2, 0.4]])
    labels["things"] = torch.stack([boxes, -torch.ones(1, 5)])
    pixels = torch.rand(2, 3, 32, 48)
    outputs = model(pixels, labels=labels)
    torch.testing.assert_close(outputs.loss, sum(outputs[name].loss for name in labels))
    for name in labels:
        torch.testing.assert_close(outputs[name].loss, model.single(name)(pixels, labels=labels[name]).loss)
    outputs.loss.backward()
    assert model.heads["parts"].decode_head.classifier.weight.grad.abs().sum() > 0
    assert model.heads["odd"].memory.grad is None
    with pytest.raises(ValueError, match="no head ears"):
        model(torch.rand(1, 3, 32, 48), labels={"ears": torch.tensor([0])})


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ({"a b": HEADS["box"]}, "needs a name like a variable"),
        ({"keys": HEADS["box"]}, "needs a name like a variable"),
        ({"eyes": {"task": "sight"}}, "must have a task, one of classification"),
        ({"eyes": {"task": "classification"}}, "needs id2label"),
        ({"eyes": {**HEADS["species"], "poling": "mean"}}, "unknown field 'poling'"),
        ({"eyes": {**HEADS["species"], "pooling": "none"}}, r"heads\['eyes'\]: pooling must be one of"),
        ({"eyes": {**HEADS["tags"], "thresholds": [0.5]}}, r"heads\['eyes'\]: thresholds must have a number"),
        ({"eyes": {**HEADS["odd"], "num_neighbors": 17}}, "at most its memory_size, 16"),
        ({"eyes": {**HEADS["odd"], "memory_size": 0.5}}, "memory_size of .* must be a number of at least 1"),
    ],
)
def test_heads_of_a_config_are_checked(tiny_config: Any, heads: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(task_heads=heads)


def test_a_model_needs_heads(tiny_config: Any) -> None:
    with pytest.raises(ValueError, match="needs heads: set task_heads in the config"):
        HFViTForMultiTask(tiny_config())
    with pytest.raises(ValueError, match="cannot be named 'training'"):
        HFViTForMultiTask(tiny_config(task_heads={"training": HEADS["box"]}))


def test_two_further_heads_cost_at_most_five_percent() -> None:
    """ViT-S/14 at 224 pixels, in multiplications and additions, with the defaults of the training of heads."""
    heads = {
        "breed": {"task": "classification", "id2label": dict(enumerate(map(str, range(37))))},
        "parts": {"task": "segmentation", "id2label": dict(enumerate(map(str, range(21))))},
        "odd": {"task": "anomaly"},
    }
    width = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "patch_size": 14}

    def flops(names: list[str]) -> int:
        config = HFViTConfig(**width, task_heads={name: heads[name] for name in names})
        with torch.device("meta"):
            model, pixels = HFViTForMultiTask(config).eval(), torch.empty(1, 3, 224, 224)
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                model(pixels)
        return counter.get_total_flops()

    assert 1 < flops(list(heads)) / flops(["breed"]) < 1.05
