"""Graphs with one wrong part: each is refused, and the error names the part. Nothing is left on disk."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from test_graphs import TINY
from torch import Tensor, nn

from hf_vit import (
    HFViTConfig,
    HFViTForImageClassification,
    HFViTForSemanticSegmentation,
    HFViTImageProcessor,
)
from hf_vit.graphs.export import export_graph
from hf_vit.graphs.kinds import KINDS, Kind, Run

LAYER_SCALE = {"num_hidden_layers": 3, "layer_scale_init_value": 0.5}
Fault = Callable[[Any], None]


def save(folder: Path, model_class: Any = HFViTForImageClassification, biases: float = 0.1, **fields: Any) -> Path:
    torch.manual_seed(0)
    model = model_class(HFViTConfig(**{**TINY, **LAYER_SCALE, **fields}))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=biases)
    with torch.no_grad():  # one activation is beyond the range of half precision
        mlp = model.get_submodule("vit.layers.1.mlp")
        mlp.fc1.bias[0] = 1e5
        mlp.fc2.weight[:, 0] *= 1e-5
    model.save_pretrained(folder)
    HFViTImageProcessor(size={"height": 32, "width": 48}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("source"))


def copies() -> Kind:
    """Return a kind whose graphs are copies of the model in torch, with the positions of a graph: without a cost."""
    written: dict[str, Any] = {}

    def write(graph: Any, path: Path, metadata: dict[str, str]) -> None:
        path.touch()
        written[str(path)] = copy.deepcopy(graph)

    def read(path: Path) -> Run:
        graph = written[str(path)].eval()

        @torch.no_grad()
        def run(images: np.ndarray) -> np.ndarray:
            with graph.positions():
                return graph(torch.from_numpy(images)).numpy()

        return run

    return Kind(".onnx", (), write, read)


def with_fault(fault: Fault, kind: Kind) -> Kind:
    """Return a kind that writes graphs of models with a fault."""

    def write(graph: Any, path: Path, metadata: dict[str, str]) -> None:
        wrong = copy.deepcopy(graph)
        with torch.no_grad():
            fault(wrong.model)
        kind.write(wrong, path, metadata)

    return kind._replace(write=write)


def error_of(source: Path, folder: Path, to: str = "onnx", **options: Any) -> str:
    """Export, and return the end of the error, after the remedy; nothing may remain in the folder."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(ValueError, match="Nothing is written: ") as caught:
        export_graph(source, folder / f"model{KINDS[to].suffix}", to, **options)
    assert sorted(folder.rglob("*")) == before
    return str(caught.value).partition("Nothing is written: ")[2].partition(". ")[2]


def transposed(model: Any) -> None:
    weight = model.vit.layers[1].attention.o_proj.weight
    weight.copy_(weight.T.clone())


def without_scale(model: Any) -> None:
    model.vit.layers[0].attention_scale.weight.fill_(1)


def with_other_eps(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5


def with_swapped_channels(model: Any) -> None:
    model.register_forward_pre_hook(lambda module, given: (given[0].flip(1),), prepend=True)


def with_other_attention(model: Any) -> None:
    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        return ((query @ key.mT * module.scaling).softmax(dim=2) @ value).transpose(1, 2), None

    for layer in model.vit.layers:
        layer.attention._attention_function = lambda kwargs: attention


def with_other_resampling(model: Any) -> None:
    model.vit.embeddings.position_embeddings.table.interpolation = "bilinear"


def with_swapped_channels_of_weights(model: Any) -> None:
    weight = model.vit.embeddings.patch_embeddings.projection.weight
    weight.copy_(weight.unflatten(1, (3, -1)).flip(1).flatten(1))


def with_tanh(model: Any) -> None:
    model.vit.layers[2].mlp.activation.forward = lambda states: F.gelu(states, approximate="tanh")


def in_half_precision(model: Any) -> None:
    layer = model.vit.layers[1].mlp.fc1
    layer.forward = lambda states: F.linear(states.half(), layer.weight.half(), layer.bias.half()).float()


def without_bias(model: Any) -> None:
    model.vit.layers[0].mlp.fc2.bias.zero_()


def without_scaling(model: Any) -> None:
    model.vit.layers[1].attention.scaling = 1.0


def with_mean_of_tokens(model: Any) -> None:
    model.vit.pooler.pooling.forward = lambda states: states.mean(dim=1)


def with_answers_of_the_first_image(model: Any) -> None:
    classifier = model.classifier
    forward = classifier.forward
    classifier.forward = lambda pooled: forward(pooled[:1]).expand(pooled.shape[0], -1)


def with_the_first_image(model: Any) -> None:
    model.register_forward_pre_hook(lambda module, given: (given[0][:1].expand_as(given[0]),), prepend=True)


FAULTS: dict[str, tuple[Fault, str]] = {
    "transposed weight": (transposed, "vit.layers.1.attention.o_proj ("),
    "dropped scale": (without_scale, "vit.layers.0.attention_scale ("),
    "wrong eps": (with_other_eps, "vit.layers.0.layernorm_before ("),
    "swapped channels": (with_swapped_channels, "The pixel values differ before the first layer ("),
    "swapped channels of weights": (
        with_swapped_channels_of_weights,
        "vit.embeddings.patch_embeddings.projection (",
    ),
    "GELU by tanh": (with_tanh, "vit.layers.2.mlp.activation ("),
    "numbers too large for half precision": (in_half_precision, "vit.layers.1.mlp.fc1 (inf;"),
    "softmax over queries": (with_other_attention, "vit.layers.0.attention, before vit.layers.0.attention."),
    "other resampling of positions": (with_other_resampling, "vit.embeddings.position_embeddings.table ("),
    "missing bias": (without_bias, "vit.layers.0.mlp.fc2 ("),
    "attention without scaling": (without_scaling, "vit.layers.1.attention, before vit.layers.1.attention."),
    "mean instead of class token": (with_mean_of_tokens, "vit.pooler.pooling ("),
    "answers of the first image": (with_answers_of_the_first_image, " classifier ("),
    "first image for all": (with_the_first_image, "The pixel values differ before the first layer ("),
}


# Variance is small in a new model, whose weights have a standard deviation of 0.02; there, the epsilon has an effect.
FIELDS: dict[Fault, dict[str, Any]] = {with_other_eps: {"initializer_range": 0.02, "biases": 0.0}}


@pytest.mark.parametrize("kind", ["copy", pytest.param("onnx", marks=[pytest.mark.full])])
@pytest.mark.parametrize(("fault", "place"), FAULTS.values(), ids=list(FAULTS))
def test_a_fault_is_caught_and_located(
    fault: Fault, place: str, kind: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KINDS, "onnx", with_fault(fault, copies() if kind == "copy" else KINDS["onnx"]))
    fields = FIELDS.get(fault)
    assert place in error_of(source if fields is None else save(tmp_path / "ours", **fields), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnx", "torch-export"])
def test_a_fault_is_located_in_the_runtime(kind: str, source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(KINDS, kind, with_fault(transposed, KINDS[kind]))
    assert "vit.layers.1.attention.o_proj (" in error_of(source, tmp_path, kind)


@pytest.mark.slow
def test_a_fault_of_a_quantizer_is_located(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def quantize(original: Path, path: Path, images: Any) -> None:
        """Write the sign of one bias wrong."""
        model = onnx.load(original)
        (weight,) = (each for each in model.graph.initializer if each.name.endswith("layers.1.mlp.fc1.bias"))
        values = onnx.numpy_helper.to_array(weight)
        weight.CopyFrom(onnx.numpy_helper.from_array(-values, weight.name))
        onnx.save(model, path)

    monkeypatch.setitem(KINDS, "onnx", KINDS["onnx"]._replace(quantizers={"dynamic": quantize}))
    assert "vit.layers.1.mlp.fc1 (" in error_of(source, tmp_path, int8="dynamic")


def test_a_fault_of_a_head_for_every_patch_is_located(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(model: Any) -> None:
        weight = model.decode_head.classifier.weight
        weight.copy_(weight.flip(0))

    source = save(tmp_path / "ours", HFViTForSemanticSegmentation, patch_subdivision=2, out_indices=[1, 3])
    monkeypatch.setitem(KINDS, "onnx", with_fault(fault, copies()))
    assert "The first layer that differs is decode_head.classifier (" in error_of(source, tmp_path)


def test_a_runtime_that_is_wrong_without_a_wrong_layer(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, runs = copies(), iter([np.float32(1), *np.zeros(99, dtype=np.float32)])
    wrong = kind._replace(read=lambda path: lambda pixel_values: kind.read(path)(pixel_values) + next(runs))
    monkeypatch.setitem(KINDS, "onnx", wrong)
    assert "Compared one by one, no layer differs" in error_of(source, tmp_path)
    monkeypatch.setitem(
        KINDS, "onnx", with_fault(transposed, kind)._replace(read=lambda path: lambda _: np.ones((1, 3)))
    )
    with pytest.raises(ValueError, match=r"The graph has outputs \[1, 3\], not \[3, 3\]"):
        export_graph(source, tmp_path / "model.onnx", "onnx")
