"""A model as ONNX and as a program of torch.export: its answers at every size, and what the file holds."""

import itertools
import json
import sys
import zipfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from hf_vit import HFViTConfig, HFViTForImageClassification, HFViTImageProcessor, HFViTModel
from hf_vit.cli.main import app
from hf_vit.graphs import export as graphs
from hf_vit.graphs import onnx_files
from hf_vit.graphs.kinds import KINDS, Graph, Kind, Run, read_onnx, write_onnx
from hf_vit.graphs.open_sizes import fixed_size, resampling_weights
from hf_vit.model.validation_hf_vit import POSITION_EMBEDDINGS, POSITION_INTERPOLATIONS

NAMES = ["red", "green", "blue"]
TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": (32, 48),
    "patch_size": 8,
    "id2label": dict(enumerate(NAMES)),
    "label2id": {name: index for index, name in enumerate(NAMES)},
    "initializer_range": 0.2,
}
# One at a time and several; the model's own size, and two others.
SHAPES = [(1, 3, 32, 48), (3, 3, 32, 48), (2, 3, 64, 24), (1, 3, 16, 80)]


def make(model_class: Any = HFViTForImageClassification, **fields: Any) -> Any:
    return model_class(HFViTConfig(**{**TINY, **fields})).eval()


def save(folder: Path, model: Any = None) -> Path:
    """Write a tiny model with its processor; return the folder."""
    model = model or make()
    model.save_pretrained(folder)
    HFViTImageProcessor(size={"height": 32, "width": 48}).save_pretrained(folder)
    return folder


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


@torch.no_grad()
def assert_same_answers(answer: Run, model: Any, shapes: list[tuple[int, ...]] = SHAPES, bound: float = 1e-5) -> None:
    for shape in shapes:
        pixel_values = torch.randn(shape)
        expected: Tensor = Graph(model)(pixel_values)
        assert expected.std() > 0.01
        torch.testing.assert_close(torch.from_numpy(answer(pixel_values.numpy())), expected, rtol=bound, atol=bound)


slow, full = pytest.mark.slow, pytest.mark.full
# The export to ONNX runs torch.export first: learned and rotary positions prove the latter.
POSITIONS = [
    *(pytest.param("onnx", each, marks=[full] * (each in ("none", "learned_rotary"))) for each in POSITION_EMBEDDINGS),
    *(
        pytest.param("openvino", each, marks=[slow] if each in ("learned", "relative", "rotary") else [slow, full])
        for each in POSITION_EMBEDDINGS  # OpenVINO reads the ONNX
    ),
    *(
        pytest.param("torch-export", each, marks=[slow] if each in ("learned", "rotary") else [slow, full])
        for each in POSITION_EMBEDDINGS
    ),
]


@pytest.mark.parametrize(("kind", "positions"), POSITIONS)
def test_answers_are_torch_s_at_every_size(kind: str, positions: str, tmp_path: Path) -> None:
    model = make(position_embedding_type=positions)
    path = tmp_path / f"graph{KINDS[kind].suffix}"
    KINDS[kind].write(model, path, {})
    assert_same_answers(KINDS[kind].read(path), model)
    with zipfile.ZipFile(path) if kind == "torch-export" else nullcontext() as archive:
        parts = [archive.read(name) for name in archive.namelist()] if archive else [path.read_bytes()]
    assert not [part for part in parts if str(Path(graphs.__file__).parent).encode() in part]  # nobody's folders
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("interpolation", POSITION_INTERPOLATIONS)
def test_products_resample_as_torch_does(interpolation: str) -> None:
    how = POSITION_INTERPOLATIONS[interpolation]
    for old, new in itertools.product((1, 2, 3, 5, 14, 27), (1, 2, 3, 4, 9, 14, 37)):
        cells = torch.randn(1, 4, old, old + 1)
        rows, columns = (resampling_weights(size, new, **how) for size in (old, old + 1))
        if "offset" in how:
            expected = F.interpolate(cells, scale_factor=((new + 0.1) / old, (new + 0.1) / (old + 1)), mode="bicubic")
        else:
            expected = F.interpolate(cells, (new, new), **how)
        torch.testing.assert_close(rows @ cells @ columns.T, expected, rtol=1e-5, atol=1e-5)
        if old == new and "offset" not in how:
            assert torch.equal(rows, torch.eye(old))


def test_splines_of_relative_positions_need_a_fixed_size() -> None:
    config = make(position_embedding_type="relative", position_interpolation="geometric_bicubic").config
    assert "(geometric_bicubic) depends on the image size: the graph accepts" in str(fixed_size(config))


OTHERS: dict[str, dict[str, Any]] = {
    "attention": {"pooling": "attention", "position_interpolation": "bilinear_corners"},
    "class and mean": {"pooling": "cls_and_mean", "position_interpolation": "bicubic"},
    "of DINO": {"position_interpolation": "bicubic_offset"},
    "distillation": {"pooling": "cls_and_distillation", "use_distillation_token": True},
    "every layer": {"position_placement": "every_layer", "num_register_tokens": 2, "final_layernorm": "pooled"},
    "2-D in every layer": {"position_placement": "every_layer", "position_embedding_type": "learned_2d"},
    "gated": {"use_gated_mlp": True, "hidden_act": "silu", "use_qk_norm": True, "layer_scale_init_value": 0.5},
    "of transformers": {"hidden_act": "quick_gelu", "use_pre_layernorm": True, "representation_size": 12},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        pytest.param(fields, marks=[full] * (name in ("class and mean", "every layer")), id=name)
        for name, fields in OTHERS.items()
    ],
)
def test_onnx_answers_as_torch_for_every_architecture(fields: dict[str, Any], tmp_path: Path) -> None:
    model = make(**fields)
    write_onnx(model, tmp_path / "model.onnx")
    assert_same_answers(read_onnx(tmp_path / "model.onnx"), model, [*SHAPES, (1, 3, 8, 8), (1, 3, 112, 112)], 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnx", pytest.param("torch-export", marks=full)])
def test_a_hybrid_is_for_its_own_size(kind: str, tmp_path: Path) -> None:
    fields = {"stem_layers": [1], "stem_width": 32, "patch_size": 16}
    source, out = save(tmp_path / "ours", make(**fields)), tmp_path / "graph"
    done = run(source, out, "--to", kind)
    assert done.exit_code == 0 and "ResNet stem depends on the image size: the graph accepts 32x48 only" in done.output
    model = HFViTForImageClassification.from_pretrained(source).eval()
    assert_same_answers(KINDS[kind].read(out / f"model{KINDS[kind].suffix}"), model, SHAPES[:2])


@pytest.mark.slow
def test_onnx_in_8_bits_says_what_it_is(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for name in NAMES:
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(5):
            pixels = generator.integers(256, size=(40, 52, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{index}.png")
    model, out = make(hidden_size=64, intermediate_size=256), tmp_path / "onnx"
    source = save(tmp_path / "ours", model)
    done = run(source, out, "--to", "onnx", "--int8", "dynamic", "--data", tmp_path / "data")
    assert done.exit_code == 0, done.output
    assert "Height and width are multiples of 8, from 16x16 upwards" in done.output
    assert (
        "fp32: logits differ from torch's by at most" in done.output and "int8 dynamic: logits differ" in done.output
    )
    rows = {line[:28].strip(): line[28:].split() for line in done.output.splitlines() if line[28:36].strip()}
    assert {"torch fp32", "torch bf16", "onnx fp32", "onnx int8 dynamic"} < rows.keys()
    assert rows["onnx fp32"][:2] == [rows["torch fp32"][0], "100.00%"]

    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.onnx", "preprocessor_config.json"]
    assert HFViTConfig.from_pretrained(out).id2label == model.config.id2label
    assert HFViTImageProcessor.from_pretrained(out).size == {"height": 32, "width": 48}
    session = onnxruntime.InferenceSession(out / "model.onnx")
    (given,), (answer,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape) == ("pixel_values", "tensor(float)", ["batch", 3, "height", "width"])
    assert (answer.name, answer.type, answer.shape) == ("logits", "tensor(float)", ["batch", 3])
    metadata = session.get_modelmeta().custom_metadata_map
    said = {name: json.loads(metadata[name]) for name in ("id2label", "config", "preprocessor_config")}
    assert metadata["activation"] == "softmax"
    assert said["id2label"] == {"0": "red", "1": "green", "2": "blue"}
    assert said["config"]["model_type"] == "hf_vit"
    assert said["preprocessor_config"]["size"] == {"height": 32, "width": 48}
    stored = onnx.load(out / "model.onnx")
    onnx.checker.check_model(stored)
    assert [each.version for each in stored.opset_import if not each.domain] == [onnx_files.OPSET]
    weights = [each for each in stored.graph.initializer if np.prod(each.dims) == 64 * 256]
    assert len(weights) == 2 and all(each.data_type == onnx.TensorProto.UINT8 for each in weights)


@pytest.mark.slow
def test_onnx_of_weights_in_8_bits(tmp_path: Path) -> None:
    model = make(hidden_size=64, intermediate_size=256, num_hidden_layers=3)
    source, out = save(tmp_path / "ours", model), tmp_path / "some" / "model.onnx"
    done = run(source, out, "--to", "onnx", "--int8", "weights")
    assert done.exit_code == 0 and "int8 weights: logits differ from torch's by at most" in done.output
    assert [path.name for path in out.parent.iterdir()] == ["model.onnx"]
    write_onnx(model, tmp_path / "whole.onnx")
    assert out.stat().st_size < 0.45 * (tmp_path / "whole.onnx").stat().st_size
    assert_same_answers(read_onnx(out), model, bound=0.15)


@pytest.mark.slow
def test_a_program_of_an_encoder(tmp_path: Path) -> None:
    source, out = save(tmp_path / "ours", make(HFViTModel)), tmp_path / "encoder.pt2"
    done = run(source, out, "--to", "torch-export")
    assert done.exit_code == 0, done.output
    assert "output: pooler_output [batch, features]" in done.output
    stored = {"metadata.json": ""}
    program = torch.export.load(out, extra_files=stored)
    assert json.loads(json.loads(stored["metadata.json"])["config"])["hidden_size"] == 32
    pixel_values = torch.randn(2, 3, 16, 64)
    expected = HFViTModel.from_pretrained(source).eval()(pixel_values).pooler_output
    torch.testing.assert_close(program.module()(pixel_values), expected, rtol=1e-5, atol=1e-5)

    refused = run(source, out, "--to", "torch-export")
    assert refused.exit_code == 2 and "--force" in refused.output
    assert run(source, tmp_path / "small", "--to", "torch-export", "--int8", "weights").exit_code == 2


@pytest.mark.slow
def test_a_folder_of_a_graph_is_replaced_only_by_force(tmp_path: Path) -> None:
    source, out = save(tmp_path / "ours"), tmp_path / "exported"
    for to in ("torch-export", "onnx", "transformers-js", "transformers-js"):
        if out.exists():
            refused = run(source, out, "--to", to)
            assert refused.exit_code == 2 and "pass --force to replace it" in refused.output
        done = run(source, out, "--to", to, "--force")
        assert done.exit_code == 0, done.output
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "config.json", "onnx", "preprocessor_config.json",
    ]  # fmt: skip
    (out / "mine.csv").touch()
    assert "holds more than a model (mine.csv)" in run(source, out, "--to", "onnx", "--force").output


def test_what_differs_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save(tmp_path / "ours")
    model = HFViTForImageClassification.from_pretrained(source).eval()

    @torch.no_grad()
    def answer(pixel_values: np.ndarray) -> np.ndarray:
        return Graph(model)(torch.from_numpy(pixel_values)).numpy() + np.float32(2e-4)

    wrong = Kind(".pt2", (), lambda model, path, metadata: path.touch(), lambda path: answer)
    monkeypatch.setitem(KINDS, "torch-export", wrong)
    done = run(source, tmp_path / "model.pt2", "--to", "torch-export")
    assert done.exit_code == 2 and "the bound is 0.0001. Nothing is written" in done.output.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


@torch.no_grad()
def test_what_is_no_number_differs_most() -> None:
    model, answers = make(), iter([np.float32("nan"), *np.zeros(99, dtype=np.float32)])

    def answer(pixel_values: np.ndarray) -> np.ndarray:
        return Graph(model)(torch.from_numpy(pixel_values)).numpy() + next(answers)

    processor = HFViTImageProcessor.from_preset("original", size=(32, 48))
    assert np.isnan(graphs.largest_difference(answer, model, processor))
    assert graphs.largest_difference(answer, model, processor) == 0


@pytest.mark.full
def test_weights_beyond_the_limit_lie_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_files, "MOST_BYTES_INSIDE", 1000)
    source, out = save(tmp_path / "ours"), tmp_path / "model.onnx"
    for int8 in ((), ("--int8", "weights"), ("--int8", "dynamic")):
        done = run(source, out, "--to", "onnx", "--force", *int8)
        assert done.exit_code == 0, done.output
        assert {path.name for path in tmp_path.iterdir()} == {"ours", "model.onnx", "model.onnx.data"}
        assert b"model.onnx.data" in out.read_bytes()
        model = HFViTForImageClassification.from_pretrained(source).eval()
        assert_same_answers(read_onnx(out), model, bound=0.1 if int8 else 1e-5)


def test_a_missing_package_is_an_error_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    done = run(save(tmp_path / "ours"), tmp_path / "model.onnx", "--to", "onnx")
    assert done.exit_code == 2 and len(done.output.splitlines()) == 1
    assert 'onnxscript must be installed for this: pip install "hf-vit[onnx]"' in done.output


@pytest.mark.parametrize(("channels", "packing"), [(1, None), (3, 16), (5, None)])
def test_a_model_is_tried_on_photographs_if_it_can_see_them(channels: int, packing: int | None) -> None:
    config = HFViTConfig(**{**TINY, "num_channels": channels})
    processor = HFViTImageProcessor.from_preset("original", size=(32, 48), num_channels=channels)
    processor.packing = packing
    shapes = [pixel_values.shape for pixel_values in graphs.trials(config, processor)]
    assert shapes[::2 if channels < 5 else 1] == [
        (1, channels, 32, 48), (3, channels, 32, 48), (2, channels, 40, 64), (1, channels, 16, 96),
    ]  # fmt: skip
    assert len(shapes) == (4 if channels == 5 else 8)


@pytest.mark.parametrize(
    "fields",
    [{"num_register_tokens": 2, "pooling": "attention"}, {"position_embedding_type": "rotary"}, {}],
    ids=["registers and attention pooling", "rotary", "learned"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::torch.jit.TracerWarning")
def test_the_older_exporter_of_torch_keeps_the_batch_dynamic(fields: dict[str, Any], tmp_path: Path) -> None:
    path, graph, images = tmp_path / "model.onnx", Graph(make(**fields)), torch.randn(5, 3, 32, 48)
    axes = {"x": {0: "batch"}, "y": {0: "batch"}}
    with torch.no_grad():
        example = (images[:2],)
        torch.onnx.export(graph, example, path, dynamo=False, input_names=["x"], output_names=["y"], dynamic_axes=axes)
        expected = graph(images)
    (outputs,) = onnxruntime.InferenceSession(path).run(None, {"x": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(outputs), expected, atol=1e-5, rtol=1e-5)
