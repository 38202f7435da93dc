"""Graphs in their runtimes: precisions, 8 bits with calibration, several outputs, and preprocessing inside."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from isolated import python
from PIL import Image
from test_graphs import NAMES, TINY, make, run, save

from hf_vit import HFViTBackbone, HFViTConfig, HFViTForImageClassification, HFViTImageProcessor, HFViTModel
from hf_vit.graphs import export as graphs
from hf_vit.graphs.describing import description
from hf_vit.graphs.kinds import KINDS
from hf_vit.graphs.preprocessing import PreprocessedGraph, Preprocessing
from hf_vit.graphs.tracing import Graph
from hf_vit.model.detection_hf_vit import SUPPRESSED, HFViTForObjectDetection
from hf_vit.model.segmentation_hf_vit import HFViTForSemanticSegmentation

slow, full = pytest.mark.slow, pytest.mark.full
PROCESSOR = HFViTImageProcessor(size={"height": 32, "width": 48})


def pictures(folder: Path, number: int = 5) -> Path:
    generator = np.random.default_rng(0)
    for name in NAMES:
        (folder / name).mkdir(parents=True)
        for index in range(number):
            pixels = generator.integers(256, size=(40, 52, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


def written(kind: str, graph: Graph, path: Path) -> Any:
    """Write a graph, and return the function that runs it."""
    KINDS[kind].write(graph, path / f"graph{KINDS[kind].suffix}", {})
    return KINDS[kind].read(path / f"graph{KINDS[kind].suffix}")


# ------------------------------------------------------------------------------------------------ precisions, 8 bits


@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        *(
            pytest.param(*each, marks=slow)
            for each in [("openvino", "fp16"), ("onnx", "fp16"), ("torch-export", "bf16")]
        ),
        pytest.param("torch-export", "fp16", marks=full),
    ],
)
def test_half_precision_is_smaller_and_near(kind: str, precision: str, tmp_path: Path) -> None:
    model = make(hidden_size=64, intermediate_size=256, initializer_range=0.05)
    source, out = save(tmp_path / "ours", model), tmp_path / f"model{KINDS[kind].suffix}"
    done = run(source, out, "--precision", precision)
    assert done.exit_code == 0, done.output
    assert f"{precision}: logits differ from torch's by at most" in done.output
    weights = sum(parameter.nbytes for parameter in model.parameters())
    if kind != "torch-export":  # a program of a tiny model is longer than its weights
        assert sum(path.stat().st_size for path in tmp_path.glob("model.*")) < 0.5 * weights + 150_000
    pixel_values = torch.randn(2, 3, 32, 48)
    answer = KINDS[kind].read(out)(pixel_values.numpy())
    assert answer.dtype == np.float32
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(answer), model(pixel_values).logits, rtol=0.05, atol=0.05)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize("kind", [pytest.param("onnx", marks=slow), "openvino"])
def test_static_8_bits_take_ranges_from_images(kind: str, tmp_path: Path) -> None:
    model = make(hidden_size=64, intermediate_size=256, initializer_range=0.05)
    source, data, out = save(tmp_path / "ours", model), pictures(tmp_path / "data"), tmp_path / "graph"
    done = run(source, out, "--to", kind, "--int8", "static", "--data", data)
    assert done.exit_code == 0, done.output
    assert "int8 static: logits differ from torch's by at most" in done.output
    rows = {line[:28].strip(): line[28:].split() for line in done.output.splitlines() if line[28:36].strip()}
    assert float(rows[f"{kind} int8 static"][2]) < float(rows[f"{kind} fp32"][2])  # megabytes
    assert rows[f"{kind} fp32"][:2] == [rows["torch fp32"][0], "100.00%"]
    assert not [path for path in out.iterdir() if path.name.startswith("fp32-")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--to", "onnx", "--int8", "static"), "ranges of activations from images: give some with --calibration"),
        (("--to", "onnx", "--calibration", "{data}"), "used by int8 static only"),
        (("--to", "onnx", "--precision", "bf16"), "onnx has no precision 'bf16': use fp32 or fp16"),
        (("--to", "openvino", "--int8", "dynamic"), "openvino has no int8 'dynamic': leave it out, or use onnx with"),
        (("--to", "onnx", "--int8", "weights", "--precision", "fp16"), "exclude each other"),
        (("--to", "onnx", "--with-preprocessing", "--data", "{data}"), "neither calibrated nor measured"),
        (("--to", "timm", "--with-preprocessing"), "apply only to onnx, openvino"),
    ],
)
def test_what_has_no_meaning_is_refused(options: tuple[str, ...], message: str, tmp_path: Path) -> None:
    source, data = save(tmp_path / "ours"), pictures(tmp_path / "data", 1)
    done = run(source, tmp_path / "out", *(option.format(data=data) for option in options))
    assert done.exit_code == 2 and message in " ".join(done.output.split()), done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "ours"]


def test_an_encoder_is_not_measured(tmp_path: Path) -> None:
    source, data = save(tmp_path / "ours", make(HFViTModel)), pictures(tmp_path / "data", 1)
    done = run(source, tmp_path / "encoder.onnx", "--data", data)
    assert done.exit_code == 2 and "has no head to measure: leave out --data" in done.output


def test_overflow_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    with torch.no_grad():
        model.classifier.weight.fill_(7e4)  # infinite in half precision
    done = run(save(tmp_path / "ours", model), tmp_path / "model.pt2", "--precision", "fp16")
    assert done.exit_code == 2 and "values above 65504 overflow" in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


# --------------------------------------------------------------------------------------------------- several outputs

DENSE = {
    "detector": (HFViTForObjectDetection, {"patch_subdivision": 2}),
    "segmenter": (HFViTForSemanticSegmentation, {"patch_subdivision": 2}),
    "backbone": (HFViTBackbone, {"num_hidden_layers": 2, "out_features": ["stage1", "stage2"]}),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("detector", "onnx"),
        *(pytest.param(*each, marks=slow) for each in [("detector", "openvino"), ("segmenter", "openvino")]),
        *(pytest.param(*each, marks=slow) for each in [("backbone", "onnx"), ("detector", "torch-export")]),
    ],
)
def test_every_output_is_torch_s(name: str, kind: str, tmp_path: Path) -> None:
    model_class, fields = DENSE[name]
    model = make(model_class, **fields)
    answer = written(kind, Graph(model), tmp_path)
    assert graphs.largest_difference(answer, model, PROCESSOR) < 1e-5


@slow
@pytest.mark.parametrize("name", [None, *DENSE])
def test_executorch_answers_as_torch_within_its_bounds(name: str | None, tmp_path: Path) -> None:
    pytest.importorskip("executorch", reason="needs executorch, which brings torchao")
    model_class, fields = (HFViTForImageClassification, {}) if name is None else DENSE[name]
    model = make(model_class, **fields)
    answer = written("executorch", Graph(model), tmp_path)
    assert graphs.largest_difference(answer, model, PROCESSOR) < 1e-5
    assert "to 112x112. A batch has at most 16 images." in description(Graph(model, is_bounded=True))


@pytest.mark.parametrize(("heads", "most_images"), [(1, 16), (6, 16), (16, 8), (64, 2)])
def test_planned_memory_has_a_bound(heads: int, most_images: int) -> None:
    model = make(HFViTModel, hidden_size=4 * heads, num_attention_heads=heads, image_size=518, patch_size=14)
    graph = Graph(model, is_bounded=True)
    assert graph.most_images == most_images
    assert "gigabytes of memory: the graph accepts 518x518 only" in description(graph)
    assert Graph(model).fixed is None


@pytest.mark.slow
def test_a_detector_keeps_its_objects(tmp_path: Path) -> None:
    model = make(HFViTForObjectDetection, patch_subdivision=2)
    done = run(save(tmp_path / "ours", model), tmp_path / "detector.onnx")
    assert done.exit_code == 0, done.output
    assert "logits [batch, points, 3] and pred_boxes [batch, points, 4]; all float32" in done.output
    pixel_values = torch.randn(2, 3, 40, 64)
    logits, boxes = KINDS["onnx"].read(tmp_path / "detector.onnx")(pixel_values.numpy())
    with torch.no_grad():
        outputs = model(pixel_values)
    torch.testing.assert_close(torch.from_numpy(logits), outputs.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.from_numpy(boxes), outputs.pred_boxes, rtol=1e-4, atol=1e-4)


def test_a_peak_of_two_equal_points_may_be_either() -> None:
    heatmap = torch.tensor([0.0, 2.0, 2.0 - 1e-6, -3.0]).view(1, 1, 1, 4)

    def difference(point: int, value: float) -> float:
        logits = torch.full((1, 4, 1), SUPPRESSED)
        logits[0, point] = value
        return graphs.difference_of_peaks(logits, heatmap)

    assert difference(1, 2.0) == 0
    assert 0 < difference(2, 2.0 - 1e-6) < 1e-6
    assert difference(1, 2.5) == pytest.approx(0.5 / 3)
    assert difference(3, -3.0) > 1
    assert np.isnan(difference(1, float("nan")))


# ----------------------------------------------------------------------------------------------------- preprocessing

PROCESSORS: dict[str, tuple[int, HFViTImageProcessor]] = {
    "bilinear": (3, PROCESSOR),
    "bicubic": (3, HFViTImageProcessor(size={"height": 32, "width": 48}, resample=3)),
    "crop of a rectangle": (3, HFViTImageProcessor.from_preset("timm", size=(32, 48))),
    "crop of a square": (3, HFViTImageProcessor.from_preset("center_crop", size=48)),
    "shortest edge": (
        3,
        HFViTImageProcessor(size={"shortest_edge": 40}, do_center_crop=True, crop_size={"height": 48, "width": 32}),
    ),
    "luma": (1, HFViTImageProcessor.from_preset("original", size=(32, 48), num_channels=1)),
    "five channels": (5, HFViTImageProcessor.from_preset("original", size=(32, 48), num_channels=5)),
    "not normalized": (3, HFViTImageProcessor(size={"height": 32, "width": 48}, do_normalize=False)),
    "not rescaled": (
        3,
        HFViTImageProcessor(size={"height": 32, "width": 48}, do_normalize=False, do_rescale=False),
    ),
}


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("size", [(32, 48), (33, 47), (64, 96), (7, 5), (2, 300), (427, 640), (31, 200)])
def test_pixels_are_those_of_the_processor(name: str, size: tuple[int, int]) -> None:
    channels, processor = PROCESSORS[name]
    preprocessing = Preprocessing(processor, channels)
    images = np.random.default_rng(0).integers(256, size=(2, *size, preprocessing.num_channels), dtype=np.uint8)
    expected = processor(list(images), return_tensors="pt", input_data_format="channels_last")["pixel_values"]
    levels = (preprocessing(torch.from_numpy(images)) - expected) * preprocessing.std
    assert levels.abs().max() < 1.01
    if channels <= 3:  # others are not rounded between the two sides
        assert (levels.abs() > 0.5).float().mean() < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing": 16}, "packs patches"),
        ({"value_range": (0, 4095)}, "maps a range of values"),
        ({"do_resize": False}, "does not resize"),
        ({"resample": 0}, "resample=0, neither bilinear"),
        ({"size": {"shortest_edge": 32}}, "images of different sizes"),
        ({"do_rescale": False}, "normalizes without do_rescale"),
    ],
)
def test_a_processor_that_no_graph_can_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocessing(HFViTImageProcessor(**options), 3)


@pytest.mark.parametrize(
    "kind", ["onnx", pytest.param("openvino", marks=slow), pytest.param("torch-export", marks=slow)]
)
def test_images_to_probabilities(kind: str, tmp_path: Path) -> None:
    model, out = make(), tmp_path / f"model{KINDS[kind].suffix}"
    source = save(tmp_path / "ours", model)
    done = run(source, out, "--with-preprocessing")
    assert done.exit_code == 0, done.output
    assert "Input: images [batch, height, width, 3], uint8; output: probabilities [batch, 3]" in done.output
    answer = KINDS[kind].read(out)
    for size in [(61, 33), (32, 48), (9, 100)]:
        images = np.random.default_rng(0).integers(256, size=(3, *size, 3), dtype=np.uint8)
        pixel_values = PROCESSOR(list(images), return_tensors="pt", input_data_format="channels_last")
        with torch.no_grad():
            expected = model(**pixel_values).logits.softmax(dim=-1)
        probabilities = torch.from_numpy(answer(images))
        torch.testing.assert_close(probabilities, expected, rtol=0, atol=0.01)
        torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(3))
    if kind == "onnx":
        import onnxruntime

        metadata = onnxruntime.InferenceSession(out).get_modelmeta().custom_metadata_map
        assert json.loads(metadata["id2label"]) == dict(zip("012", NAMES, strict=True))


@pytest.mark.parametrize(
    ("fields", "name"),
    [({"problem_type": "multi_label_classification"}, "probabilities"), ({"problem_type": "regression"}, "values")],
)
def test_scores_follow_the_activation(fields: dict[str, Any], name: str) -> None:
    model = HFViTForImageClassification(HFViTConfig(**TINY, **fields)).eval()
    graph = PreprocessedGraph(model, PROCESSOR)
    images = torch.randint(256, (2, 40, 30, 3), dtype=torch.uint8)
    with torch.no_grad():
        logits, scores = model(graph.preprocessed(images)).logits, graph(images)
    assert graph.outputs == (name,)
    assert torch.equal(scores, logits.sigmoid() if name == "probabilities" else logits)


# ---------------------------------------------------------------------------------------------------------- TensorRT

# Operators that TensorRT 10.15 supports (opsets 9 to 24), of those that a ViT may use:
# https://github.com/onnx/onnx-tensorrt/blob/main/docs/operators.md
SUPPORTED_BY_TENSORRT = {
    "Abs", "Add", "And", "Cast", "Clip", "Concat", "Constant", "Conv", "Cos", "Div", "Equal", "Exp", "Expand",
    "Flatten", "Floor", "Gather", "GatherND", "Gelu", "Gemm", "Greater", "GreaterOrEqual", "Identity",
    "LayerNormalization", "Less", "LessOrEqual", "MatMul", "Max", "MaxPool", "Min", "Mul", "Neg", "Pad",
    "Pow", "Range", "ReduceMax", "ReduceMean", "ReduceSum", "Reshape", "Shape", "Sigmoid", "Sin", "Slice",
    "Softmax", "Split", "Sqrt", "Squeeze", "Sub", "Tanh", "Tile", "Transpose", "Unsqueeze", "Where",
}  # fmt: skip


@pytest.mark.parametrize("fields", [{}, pytest.param({"position_embedding_type": "relative"}, marks=[slow, full])])
def test_tensorrt_can_read_the_onnx(fields: dict[str, Any], tmp_path: Path) -> None:
    import onnx

    KINDS["onnx"].write(make(**fields), tmp_path / "model.onnx", {})
    model = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "model.onnx"))
    assert {node.op_type for node in model.graph.node} <= SUPPORTED_BY_TENSORRT
    assert {node.domain for node in model.graph.node} == {""} and not model.functions
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    types |= {value.name: value.data_type for value in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Range":  # up to TensorRT 8, floating point only with constant ends
            assert types[node.input[1]] in (onnx.TensorProto.INT64, onnx.TensorProto.INT32)
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.HasField("shape")


SIGNAL = """
import faulthandler, gc, os, signal, sys, threading
import numpy as np
from hf_vit.graphs.openvino_files import read_openvino

faulthandler.enable()  # handlers then run on another stack
run = read_openvino(sys.argv[1])
run(np.zeros((1, 3, 32, 48), np.float32))

def drop():
    global run
    run = None
    gc.collect()

thread = threading.Thread(target=drop)
thread.start()
thread.join()
signal.signal(signal.SIGINT, lambda *_: print("caught"))
os.kill(os.getpid(), signal.SIGINT)
"""


@slow
def test_a_signal_after_openvino_is_caught(tmp_path: Path) -> None:
    KINDS["onnx"].write(make(), tmp_path / "model.onnx", {})
    assert python(SIGNAL, tmp_path / "model.onnx", home=tmp_path / "home", has_package=True).stdout == "caught\n"


# -------------------------------------------------------------------------------------------------------------- speed


@slow
def test_the_benchmark_of_exports_has_a_row_for_each_form(tmp_path: Path) -> None:
    script = Path(__file__).resolve().parents[1] / "scripts" / "benchmark_exports.py"
    model = make(hidden_size=64, intermediate_size=256, initializer_range=0.05)
    source, rows = save(tmp_path / "ours", model), tmp_path / "rows.jsonl"
    options = ["--images", pictures(tmp_path / "pictures"), "--formats", "onnx", "--turns", "1", "--output", rows]
    done = subprocess.run([sys.executable, script, source, *options], capture_output=True, text=True, check=True)
    forms = ["torch fp32", "onnx fp32", "onnx int8 dynamic", "onnx int8 static"]
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["form"] for row in found] == forms
    assert found[1]["difference"] < 1e-5 < found[2]["difference"]
    assert all(row["images/s at 16"] > 0 < row["bytes"] for row in found)
    assert [line.split(" | ")[1] for line in done.stdout.splitlines()[2:]] == forms
