"""`predict --runtime`: other runtimes predict what torch predicts, and the fastest one is measured once."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_graphs import TINY
from typer.testing import CliRunner

from hf_vit import (
    HFViTConfig,
    HFViTForImageClassification,
    HFViTForObjectDetection,
    HFViTForSemanticSegmentation,
    HFViTImageProcessor,
    HFViTModel,
)
from hf_vit.cli.main import app
from hf_vit.graphs import runtimes
from hf_vit.graphs.runtimes import RUNTIMES, fastest, in_runtime
from hf_vit.inference.windows import slide
from hf_vit.model.multi_task_hf_vit import HFViTForMultiTask
from hf_vit.prediction.predictor import Predictor

PROCESSOR: Any = HFViTImageProcessor(size={"height": 32, "width": 48})
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "classifier": (HFViTForImageClassification, {"temperature": 1.5}),
    "several labels": (HFViTForImageClassification, {"problem_type": "multi_label_classification"}),
    "encoder": (HFViTModel, {}),
    "segmenter": (HFViTForSemanticSegmentation, {"patch_subdivision": 2, "decoder_kernel_size": 3}),
    "detector": (HFViTForObjectDetection, {"patch_subdivision": 2, "thresholds": [0.0, 0.0, 0.0]}),
}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(runtimes, "cache_folder", lambda: folder)
    yield folder


def make(kind: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    model_class, own = MODELS[kind]
    return model_class(HFViTConfig(**{**TINY, **own, **fields})).eval()


def images(number: int = 5) -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(256, size=(40 + index, 60, 3), dtype=np.uint8)) for index in range(number)]


SLOW, REPEATED = (pytest.mark.slow,), (pytest.mark.full,)
MARKS = {
    ("detector", "onnxruntime"): SLOW,
    ("detector", "openvino"): SLOW,
    ("encoder", "openvino"): REPEATED,
    ("segmenter", "onnxruntime"): REPEATED,
    ("segmenter", "openvino"): SLOW,
    ("several labels", "openvino"): REPEATED,
}


@pytest.mark.parametrize(
    ("kind", "runtime"),
    [pytest.param(kind, runtime, marks=MARKS.get((kind, runtime), ())) for kind in MODELS for runtime in RUNTIMES],
)
def test_predictions_are_those_of_torch(kind: str, runtime: str, cache: Path) -> None:
    model = make(kind)
    options: dict[str, Any] = {"precision": "fp32", "batch_size": 2}
    if kind in ("classifier", "encoder"):
        options["has_features"] = True
    expected = list(Predictor.from_model(model, PROCESSOR, **options)(images()))
    predictor = Predictor.from_model(model, PROCESSOR, runtime=runtime, **options)
    assert predictor.runtime == runtime
    for found, wanted in zip(predictor(images()), expected, strict=True):
        assert found.labels == wanted.labels
        for name in ("scores", "features", "boxes", "mask"):
            one, other = getattr(found, name), getattr(wanted, name)
            assert (one is None) == (other is None)
            if one is not None:
                np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    assert [path.name for path in (cache / "graphs").glob("*/*")] == ["model.onnx"]


def test_a_graph_is_written_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("classifier")
    in_runtime(model, PROCESSOR, "onnxruntime", "fp32")
    monkeypatch.setattr(runtimes, "write_onnx", None)
    again, _ = in_runtime(model, PROCESSOR, "onnxruntime", "fp32", threads=2)
    pixel_values = torch.randn(2, 3, 40, 64)
    torch.testing.assert_close(again(pixel_values).logits, model(pixel_values).logits, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        model.classifier.bias.add_(1)
    with pytest.raises(TypeError):  # another model has another graph
        in_runtime(model, PROCESSOR, "onnxruntime", "fp32")


@pytest.mark.slow
def test_the_fastest_is_measured_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, measured = make("classifier"), []

    def throughputs(models: dict[str, Any], pixel_values: torch.Tensor) -> dict[str, float]:
        measured.append(list(models))
        return {name: float(name == "onnxruntime") for name in models}

    monkeypatch.setattr(runtimes, "throughputs", throughputs)
    for _ in range(2):
        assert in_runtime(model, PROCESSOR, "auto", "fp32")[1] == "onnxruntime"
    assert measured == [["torch", "onnxruntime", "openvino"]]
    (known,) = (cache / "runtimes").iterdir()
    assert json.loads(known.read_text())["images_per_second"]["torch"] == 0
    assert fastest(model, PROCESSOR, "fp16") == "torch" and measured[1] == ["torch"]  # the others have no fp16
    monkeypatch.setattr(runtimes, "optimize_for_inference", lambda *_: model)
    assert in_runtime(model, PROCESSOR, "auto", "fp32", compile=True)[1] == "torch" and len(measured) == 2


def test_throughputs_alternate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "SECONDS", 0.01)
    calls: list[str] = []
    models = {name: lambda batch, name=name: calls.append(name) for name in ("a", "b")}
    speeds = runtimes.throughputs(models, torch.zeros(2, 3, 8, 8))
    assert speeds.keys() == models.keys() and all(speed > 0 for speed in speeds.values())
    assert calls[0] == "a" and calls[-1] == "b"


@pytest.mark.slow
def test_a_wrong_graph_is_not_used(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = runtimes.write_onnx

    def write_another(graph: Any, path: Path) -> None:
        with torch.no_grad():
            graph.model.classifier.bias.add_(1)
            write(graph, path)
            graph.model.classifier.bias.sub_(1)

    monkeypatch.setattr(runtimes, "write_onnx", write_another)
    with pytest.raises(ValueError, match=r"The outputs of onnxruntime differ from torch's by .*; the bound is 0.0001"):
        in_runtime(make("classifier"), PROCESSOR, "onnxruntime", "fp32")
    assert not list(cache.rglob("*.onnx"))
    monkeypatch.setattr(runtimes, "throughputs", lambda models, pixel_values: dict.fromkeys(models, 1.0))
    assert fastest(make("classifier"), PROCESSOR, "fp32") == "torch"


def test_what_needs_torch_is_refused(tmp_path: Path) -> None:
    model = make("classifier")
    with pytest.raises(ValueError, match="onnxruntime computes in fp32, not in bf16: change --precision or --runtime"):
        in_runtime(model, PROCESSOR, "onnxruntime", "bf16")
    with pytest.raises(ValueError, match="on CPUs, and --compile is for torch: leave --runtime out"):
        in_runtime(model, PROCESSOR, "openvino", compile=True)
    with pytest.raises(ValueError, match="the model is on cuda"):
        in_runtime(model, PROCESSOR, "openvino", device="cuda")
    several = HFViTForMultiTask(HFViTConfig(**TINY, task_heads={"a": {"task": "regression", "id2label": {0: "x"}}}))
    with pytest.raises(ValueError, match="the model has several heads"):
        in_runtime(several, PROCESSOR, "openvino")
    segmenter = make("segmenter")
    slide(segmenter, HFViTImageProcessor(size={"height": 32, "width": 48}))
    with pytest.raises(ValueError, match="windows slide in torch"):
        in_runtime(segmenter, PROCESSOR, "onnxruntime")
    assert in_runtime(segmenter, PROCESSOR, "auto")[1] == "torch"


def test_the_command_predicts_in_a_runtime(tmp_path: Path) -> None:
    make("classifier").save_pretrained(tmp_path / "model")
    PROCESSOR.save_pretrained(tmp_path / "model")
    (tmp_path / "images").mkdir()
    for index, image in enumerate(images(3)):
        image.save(tmp_path / "images" / f"{index}.png")
    tables = []
    for runtime in ("torch", "openvino"):
        table = tmp_path / f"{runtime}.csv"
        command = ["predict", tmp_path / "model", tmp_path / "images", "-o", table, "--runtime", runtime]
        done = CliRunner().invoke(app, [*map(str, command), "--precision", "fp32"])
        assert done.exit_code == 0, done.output
        tables.append([line.split(",")[1] for line in table.read_text().splitlines()])
    assert tables[0] == tables[1] and len(tables[0]) == 4
