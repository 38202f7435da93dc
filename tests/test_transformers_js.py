"""The folder for transformers.js: what it holds, what is refused, and what transformers.js answers under Node.

Tests under Node need `HF_VIT_NODE_MODULES`, a folder of npm packages with @huggingface/transformers.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from test_graphs import make, run, save

from hf_vit import (
    HFViTForImageClassification,
    HFViTForSemanticSegmentation,
    HFViTImageProcessor,
    HFViTModel,
)
from hf_vit.checkpoints.models import load_classifier
from hf_vit.graphs import transformers_js
from hf_vit.graphs.kinds import Graph
from hf_vit.graphs.transformers_js import answers_in_node, export_transformers_js, node_modules

needs_node = pytest.mark.skipif(
    node_modules() is None, reason="Node or its package @huggingface/transformers is not found (HF_VIT_NODE_MODULES)"
)
slow = pytest.mark.slow


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_the_folder_is_that_of_a_stock_vit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_js, "node_modules", lambda: None)
    model, out = make(position_embedding_type="relative", pooling="mean"), tmp_path / "web"
    done = run(save(tmp_path / "ours", model), out, "--to", "transformers-js")
    assert done.exit_code == 0, done.output
    assert "Not run in transformers.js, since Node or its package is missing" in done.output
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()) == [
        "README.md", "config.json", "onnx/model.onnx", "preprocessor_config.json",
    ]  # fmt: skip
    config, processor = read(out / "config.json"), read(out / "preprocessor_config.json")
    assert (config["model_type"], config["architectures"]) == ("vit", ["ViTForImageClassification"])
    assert config["id2label"] == {"0": "red", "1": "green", "2": "blue"}
    assert config["transformers.js_config"] == {"dtype": "fp32"}
    assert processor["image_processor_type"] == "ViTImageProcessor"
    assert (processor["size"], processor["image_mean"]) == ({"height": 32, "width": 48}, [0.5, 0.5, 0.5])
    assert "pipeline('image-classification', 'web')" in (out / "README.md").read_text()

    refused = run(tmp_path / "ours", out, "--to", "transformers-js")
    assert refused.exit_code == 2 and "--force" in refused.output
    refused = run(tmp_path / "ours", tmp_path / "8", "--to", "transformers-js", "--int8", "weights")
    assert refused.exit_code == 2 and "use dynamic, or leave --int8 out" in refused.output


@pytest.mark.parametrize(
    ("model", "processor", "reason"),
    [
        ({"problem_type": "multi_label_classification"}, {}, "its outputs are the sigmoids of its logits"),
        ({"problem_type": "regression"}, {}, "its outputs are its logits themselves"),
        ({"num_channels": 1}, {"do_grayscale": True}, "its images have 1 channel"),
        ({}, {"crop_pct": 0.9}, "it crops images to 32x48"),
        ({}, {"packing": 16, "patch_size": 8}, "its image processor has packing=16"),
        ({}, {"value_range": (0, 4095)}, "its image processor has value_range="),
        ({}, {"do_resize": False}, "its image processor does not resize"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)
def test_what_would_answer_wrongly_is_refused(
    model: dict[str, Any], processor: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    make(**model).save_pretrained(tmp_path / "ours")
    HFViTImageProcessor(size={"height": 32, "width": 48}, **processor).save_pretrained(tmp_path / "ours")
    done = run(tmp_path / "ours", tmp_path / "web", "--to", "transformers-js")
    assert done.exit_code == 2 and reason in done.output and "Export it to onnx instead" in done.output
    assert not (tmp_path / "web").exists()


def test_masks_of_a_crop_are_refused(tmp_path: Path) -> None:
    make(HFViTForSemanticSegmentation, image_size=32).save_pretrained(tmp_path)
    HFViTImageProcessor(size={"height": 32, "width": 32}, crop_pct=0.9).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="its masks are those of a crop"):
        export_transformers_js(tmp_path, tmp_path / "web")


@slow
def test_a_crop_is_that_of_transformers_js(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_js, "node_modules", lambda: None)
    make(HFViTModel, image_size=32).save_pretrained(tmp_path / "ours")
    HFViTImageProcessor.from_preset("timm", size=32).save_pretrained(tmp_path / "ours")
    export_transformers_js(tmp_path / "ours", tmp_path / "web", int8="dynamic")
    processor = read(tmp_path / "web" / "preprocessor_config.json")
    assert processor["size"] == {"shortest_edge": 35} and processor["crop_size"] == {"height": 32, "width": 32}
    assert read(tmp_path / "web" / "config.json")["transformers.js_config"] == {"dtype": "q8"}
    session = onnxruntime.InferenceSession(tmp_path / "web" / "onnx" / "model_quantized.onnx")
    pooled, same = session.run(None, {"pixel_values": np.zeros((1, 3, 32, 32), dtype=np.float32)})
    assert [each.name for each in session.get_outputs()] == ["pooler_output", "image_embeds"]
    assert np.array_equal(pooled, same)


@slow
@needs_node
@pytest.mark.parametrize(
    ("model_class", "fields", "int8"),
    [
        (HFViTForImageClassification, {"position_embedding_type": "rotary"}, "dynamic"),
        (HFViTForSemanticSegmentation, {"patch_subdivision": 2}, None),
        (HFViTModel, {"pooling": "attention"}, None),
    ],
)
def test_transformers_js_answers_as_torch(model_class: Any, fields: Any, int8: str | None, tmp_path: Path) -> None:
    source, web = save(tmp_path / "ours", make(model_class, **fields)), tmp_path / "web"
    assert "transformers.js: outputs differ from torch's by at most" in export_transformers_js(source, web, int8)[-1]
    (web / "onnx").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"transformers\.js does not run web: "):
        answers_in_node(web, "image-classification", [])


def test_what_differs_in_transformers_js_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answers(folder: Path, task: str, images: Any) -> list[dict[str, Any]]:
        answer = {"pixel_values": np.zeros((1, 3, 32, 48), np.float32), "outputs": np.ones(3, np.float32)}
        return [answer for _ in images]

    monkeypatch.setattr(transformers_js, "node_modules", lambda: tmp_path)
    monkeypatch.setattr(transformers_js, "answers_in_node", answers)
    monkeypatch.setattr(transformers_js, "export_graph", lambda *arguments, **options: [])
    with pytest.raises(ValueError, match=r"transformers\.js: outputs differ .* Nothing is written"):
        export_transformers_js(save(tmp_path / "ours"), tmp_path / "web")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


@slow
@needs_node
def test_the_class_of_every_photograph_is_that_of_python(shared: Path, tmp_path: Path) -> None:
    """The classifier is a linear one on features of trained weights, with one class for each of 100 photographs."""
    paths = sorted((shared / "data" / "photos").iterdir())
    encoder = shared / "pretrained" / "dinov2-small-saliency"
    classifier, processor = load_classifier(encoder, [path.stem for path in paths], image_size=(112, 112))
    images = [Image.open(path).convert("RGB") for path in paths]
    with torch.no_grad():
        pixel_values = torch.cat([processor(image, return_tensors="pt")["pixel_values"] for image in images])
        features = classifier.vit(pixel_values).pooler_output
        centered = features - features.mean(0)
        weight = torch.linalg.lstsq(centered.T @ centered + torch.eye(features.shape[1]), centered.T).solution.T
        classifier.classifier.weight.copy_(20 * weight)
        classifier.classifier.bias.copy_(-20 * weight @ features.mean(0))
        expected = Graph(classifier)(pixel_values).numpy()
    classifier.save_pretrained(tmp_path / "ours")
    processor.save_pretrained(tmp_path / "ours")
    export_transformers_js(tmp_path / "ours", tmp_path / "web")
    answers = answers_in_node(tmp_path / "web", "image-classification", paths)
    assert [answer["labels"][0] for answer in answers] == [paths[index].stem for index in expected.argmax(1)]
