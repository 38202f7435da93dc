"""The model as a graph that runs without this package: ONNX, or a program of torch.export.

Batch, height and width are left open, in whole patches: positions are resampled inside the graph. A file is kept only
if it answers as the model does in torch, for random images and photographs, at several batch sizes and image sizes.

    8 bits, dynamic: weights per column, and activations of every call in one range; onnxruntime's quantize_dynamic
    8 bits, weights: weights in blocks, multiplied in float32; onnxruntime's MatMulNBits
"""

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from .checkpoints import open_checkpoint
from .checkpoints.models import load
from .evaluation.pace import compare
from .inference.optimize import optimize_for_inference
from .model.configuration_hf_vit import POSITION_INTERPOLATIONS, HFViTConfig
from .model.image_processing_hf_vit import HFViTImageProcessor
from .model.modeling_hf_vit import HFViTForImageClassification, HFViTModel, HFViTPositionTable, HFViTSinCos2DPositions
from .system.disk import new_file, new_folder
from .system.extras import need

Model = HFViTForImageClassification | HFViTModel
Answer = Callable[[np.ndarray], np.ndarray]  # from pixel values, float32 [B, C, H, W], to logits or features

OPSET = 20  # the first with GELU as one operation
INPUT = "pixel_values"
# Of a protobuf, 2 GiB; what is not weights is small.
MOST_BYTES_INSIDE = 2**31 - 2**24
# How far an answer may be from torch's: the largest difference, as a share of the largest logit where that is above 1.
BOUNDS = {None: 1e-4, "weights": 0.1, "dynamic": 0.2}
BLOCK = 64  # weights that share a scale


class Graph(nn.Module):
    """From pixel values to one tensor: the logits of a classifier, or what an encoder pools."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        self.output = "logits" if isinstance(model, HFViTForImageClassification) else "pooler_output"

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values)[self.output]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep to themselves what exporters say of their own insides; an error still comes through."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


# --------------------------------------------------------------------------------------------------- open sizes
# Positions in operations that every runtime has. Resize is not one: versions of exporters and runtimes disagree about
# antialiasing and Keys' a, and some have no cosine of doubles.

# Of a bicubic kernel in torch, with antialiasing and without.
KEYS = {True: -0.5, False: -0.75}


def resampling_weights(old: int, new: int, mode: str, antialias: bool = False, align_corners: bool = False) -> Tensor:
    """Return the matrix `[new, old]` that resamples a line as `torch.nn.functional.interpolate` does.

    `new` may be a symbol. Arguments are those of `interpolate`.
    """
    places = torch.arange(new, dtype=torch.float32)  # [new]
    number = places[-1:] + 1  # as a tensor: a symbol has no minimum everywhere
    corners = places * (old - 1) / (number - 1).clamp(min=1)
    centers = corners if align_corners else (places + 0.5) * old / number - 0.5
    taps = torch.arange(-2, old + 2)
    distances = (centers.unsqueeze(1) - taps).abs()  # [new, old + 4]
    if antialias:
        weights = kernel(distances * number.clamp(max=old) / old, mode, antialias)[:, 2:-2]
        return weights / weights.sum(dim=1, keepdim=True)
    outside_in = nn.functional.one_hot(taps.clamp(0, old - 1), old).float()  # what lies outside is the border's cell
    return (outside_in.T @ kernel(distances, mode, antialias).T).T


def kernel(distances: Tensor, mode: str, antialias: bool) -> Tensor:
    """Return the weights of cells that are so far away: Keys' cubic convolution, or a triangle."""
    if mode == "bilinear":
        return (1 - distances).clamp(min=0)
    a = KEYS[antialias]
    near = ((a + 2) * distances - (a + 3)) * distances * distances + 1
    far = ((distances - 5) * distances + 8) * distances * a - 4 * a
    return torch.where(distances <= 1, near, torch.where(distances < 2, far, torch.zeros_like(far)))


class OpenPositionTable(HFViTPositionTable):
    """The same table, resampled by products of matrices to a grid of symbols."""

    def forward(self, grid: tuple[int, int]) -> Tensor:
        cells = self.weight.permute(0, 3, 1, 2)  # [K, D, rows, columns]
        how = POSITION_INTERPOLATIONS[self.interpolation]
        # The table is a left factor, as all constants here: right ones are what int8 takes for weights.
        if cells.shape[3] > 1:
            cells = cells @ resampling_weights(cells.shape[3], grid[1], **how).T
        if cells.shape[2] > 1:
            cells = resampling_weights(cells.shape[2], grid[0], **how) @ cells
        return cells.permute(0, 2, 3, 1)


class OpenSinCos2DPositions(HFViTSinCos2DPositions):
    """The same angles, in float32: off by some 1e-6, where doubles have no sine."""

    ANGLES = torch.float32


OPEN: dict[type[nn.Module], type[nn.Module]] = {
    HFViTPositionTable: OpenPositionTable,
    HFViTSinCos2DPositions: OpenSinCos2DPositions,
}


@contextmanager
def opened(model: Model) -> Iterator[None]:
    """Let positions of a model be those for open sizes."""
    changed = [(module, type(module)) for module in model.modules() if type(module) in OPEN]
    for module, kind in changed:
        module.__class__ = OPEN[kind]
    try:
        yield
    finally:
        for module, kind in changed:
            module.__class__ = kind


# ------------------------------------------------------------------------------------------------------- writing


def fixed_size(config: HFViTConfig) -> str | None:
    """Say why a graph of this model is for its own size alone; `None` where it takes any."""
    height, width = config.image_shape
    if config.stem_layers is not None:
        return (
            f"The padding of the ResNet stem goes by the size of the image: the graph is for {height}x{width} alone."
        )
    if min(config.grid_size) < 2:
        return f"The model's own grid is one patch wide or high: the graph is for {height}x{width} alone."
    return None


def trace(model: Model) -> Any:
    """Return a model, of float32, as a `torch.export.ExportedProgram`; batch and, if it can be, size left open."""
    config, Dim = model.config, torch.export.Dim
    positions: AbstractContextManager[None]
    rows, columns = config.grid_size
    height, width = config.patch_shape
    open_sizes: dict[int, Any] = {0: Dim("batch")}
    example, positions = torch.zeros(2, config.num_channels, *config.image_shape), nullcontext()
    if fixed_size(config) is None:
        # An example with sides of their own: equal ones would be taken for one.
        example = torch.zeros(2, config.num_channels, (rows + 1) * height, (rows + columns + 2) * width)
        open_sizes |= {2: height * Dim("rows", min=2), 3: width * Dim("columns", min=2)}
        positions = opened(model)
    with torch.no_grad(), quiet(), positions:
        program = torch.export.export(Graph(model).eval(), (example,), dynamic_shapes={INPUT: open_sizes})
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names of this machine's folders
    return program


def write_onnx(model: Model, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a model as ONNX, weights inside; beyond 2 GB they lie beside, in `path` with `.data`."""
    import onnx_ir

    attention = model.config._attn_implementation
    model.set_attn_implementation("eager")  # other kinds become the same products, with more around them
    program = trace(model)
    model.set_attn_implementation(attention)
    with quiet():
        written = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[Graph(model).output],
            verbose=False,
        )
    assert written is not None
    graph: Any = written.model.graph
    for node in graph:
        node.metadata_props.clear()  # how it was made, longer than the graph
    (given,), (answer,) = graph.inputs, graph.outputs
    sides = zip(given.shape, ["batch", "channels", "height", "width"], strict=True)
    given.shape = onnx_ir.Shape([side if isinstance(side, int) else name for side, name in sides])
    answer.shape = onnx_ir.Shape(["batch", *answer.shape[1:]])
    written.model.metadata_props.update(metadata or {})
    size = sum(parameter.nbytes for parameter in model.parameters())
    written.save(path, external_data=size > MOST_BYTES_INSIDE)


def write_torch_export(model: Model, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a model as a program that `torch.export.load` reads, with `metadata` as JSON in its `metadata.json`."""
    with quiet():
        torch.export.save(trace(model), path, extra_files={"metadata.json": json.dumps(metadata or {})})


def bytes_of(model: Any) -> int:
    """Return the bytes of an ONNX model's weights."""
    return sum(len(tensor.raw_data) for tensor in model.graph.initializer)


def quantize_dynamic(source: Path, path: Path) -> None:
    """Write an ONNX file with products in 8 bits: of weights, and of activations by the range of every call."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(source)
    is_large = bytes_of(model) > MOST_BYTES_INSIDE
    del model.graph.value_info[:]  # it transposes weights, and would take their old shapes for a contradiction
    quantize_dynamic(
        model,
        path,
        op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=True,
        weight_type=QuantType.QUInt8,  # signed, sums overflow in 16 bits on processors without VNNI
        use_external_data_format=is_large,
        extra_options={"MatMulConstBOnly": True},
    )


def quantize_weights(source: Path, path: Path) -> None:
    """Write an ONNX file with the weights of products in 8 bits, `BLOCK` of them with a scale."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(onnx.load(source), bits=8, block_size=BLOCK, is_symmetric=True)
    quantizer.process()
    quantizer.model.save_model_to_file(str(path), bytes_of(quantizer.model.model) > MOST_BYTES_INSIDE)


QUANTIZERS = {"weights": quantize_weights, "dynamic": quantize_dynamic}


def read_onnx(path: Path) -> Answer:
    """Return what answers by onnxruntime, on as many cores as torch uses."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda pixel_values: session.run(None, {INPUT: pixel_values})[0]


def read_torch_export(path: Path) -> Answer:
    """Return what answers by the program of a file."""
    with quiet():
        program = torch.export.load(path).module()

    @torch.no_grad()
    def answer(pixel_values: np.ndarray) -> np.ndarray:
        return program(torch.from_numpy(pixel_values)).numpy()

    return answer


class Kind(NamedTuple):
    """A file that a model can be: what its name ends with, packages that it needs, and how it is written and read."""

    suffix: str
    packages: tuple[str, ...]
    write: Callable[[Model, Path, dict[str, str]], None]
    read: Callable[[Path], Answer]


KINDS = {
    "onnx": Kind(".onnx", ("onnx", "onnxruntime", "onnxscript"), write_onnx, read_onnx),
    "torch-export": Kind(".pt2", (), write_torch_export, read_torch_export),
}


# ------------------------------------------------------------------------------------------------------ comparing


def trials(config: HFViTConfig, processor: HFViTImageProcessor) -> Iterator[np.ndarray]:
    """Give pixel values to compare answers on: noise and photographs, one to three of them, of the sizes it takes."""
    (height, width), (patch_height, patch_width) = config.image_shape, config.patch_shape
    shapes = [(1, height, width), (3, height, width)]
    if fixed_size(config) is None:
        low = max(config.grid_size[0] // 2, 2) * patch_height
        shapes += [(2, height + patch_height, width + 2 * patch_width), (1, low, 2 * width)]
    generator = torch.Generator().manual_seed(0)
    for number, *size in shapes:
        yield torch.randn(number, config.num_channels, *size, generator=generator).numpy()
        if config.num_channels in (1, 3):
            yield photographs(processor, (size[0], size[1]), number)


@cache
def sample_images() -> list[np.ndarray]:
    """Read the two photographs that come with scikit-learn, uint8 `[427, 640, 3]`."""
    from sklearn.datasets import load_sample_images

    return load_sample_images().images


def photographs(processor: HFViTImageProcessor, size: tuple[int, int], number: int) -> np.ndarray:
    """Return pixel values of parts of scikit-learn's two photographs, float32 `[number, C, H, W]`."""
    photos = [Image.fromarray(photo) for photo in sample_images()]
    parts = [
        photos[index % 2].resize(size[::-1], Image.Resampling.BICUBIC, (60 * index, 40 * index, 400, 400))
        for index in range(number)
    ]
    as_they_are: dict[str, Any] = {"do_resize": False, "do_center_crop": False, "packing": None}
    return processor(parts, **as_they_are, return_tensors="pt")[INPUT].numpy()


@torch.no_grad()
def largest_difference(answer: Answer, model: Model, processor: HFViTImageProcessor) -> float:
    """Return how far an answer is from the model's at most, as `BOUNDS` counts it."""
    graph, differences = Graph(model).eval(), []
    for pixel_values in trials(model.config, processor):
        wanted = graph(torch.from_numpy(pixel_values)).numpy()
        differences.append(np.abs(answer(pixel_values) - wanted).max() / max(1.0, np.abs(wanted).max()))
    return float(np.max(differences))  # what is not a number is the largest


class Answering(nn.Module):
    """A file that answers in the place of a classifier."""

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, pixel_values: Tensor) -> ImageClassifierOutput:
        logits: Any = torch.from_numpy(self.answer(pixel_values.numpy()))
        return ImageClassifierOutput(logits=logits)


# ---------------------------------------------------------------------------------------------------------- whole


def export_graph(
    source: str | Path,
    out: str | Path,
    to: str,
    int8: str | None = None,
    data: str | None = None,
    force: bool = False,
) -> list[str]:
    """Write a model as a graph, once it answers as the model does.

    Labels, preprocessing and config are in the file: as `metadata_props` of ONNX, in `metadata.json` of torch.export.

    Args:
        source: A file, a folder, or a name on the Hub, in any layout.
        out: The file, by the suffix of its kind; or a folder, that gets config and preprocessing as JSON, too.
        to: A key of `KINDS`.
        int8: For ONNX: `"weights"` keeps weights in 8 bits, `"dynamic"` also multiplies in them.
        data: Labelled images as for `load_data`, to measure accuracy and speed on beside torch.
        force: Replace what lies there.

    Returns:
        Sentences: what was assumed, what the graph takes and gives, how far it is from torch, what was measured.

    Raises:
        ValueError: If packages are missing, or answers differ by more than `BOUNDS`; nothing is left then.
    """
    kind, out = KINDS[to], Path(out)
    if int8 is not None and to != "onnx":
        raise ValueError(f"There is no int8 for {to}: leave it out, or export to onnx.")
    if int8 is not None and int8 not in QUANTIZERS:
        raise ValueError(f"There is no int8 {int8!r}: choose one of {', '.join(QUANTIZERS)}.")
    need("onnx", *kind.packages)
    checkpoint = open_checkpoint(source)
    model, processor = load(str(source), checkpoint=checkpoint)
    model.float()
    is_file = out.suffix == kind.suffix
    said = [f"Assumed: {sentence}" for sentence in checkpoint.assumed] + [_description(model)]
    with (new_file if is_file else new_folder)(out, force) as unfinished:
        path = unfinished if is_file else unfinished / f"model{kind.suffix}"
        answers = _write(kind, path, model, processor, int8, said)
        if data is not None:
            models: dict[str, nn.Module] = {
                f"torch {precision}": optimize_for_inference(model, precision) for precision in ("fp32", "bf16")
            }
            models |= {f"{to} {name}": Answering(answer) for name, answer in answers.items()}
            said += compare(str(source), checkpoint, data, processor, models)
        if not is_file:
            model.config.to_json_file(unfinished / "config.json")
            processor.to_json_file(unfinished / "preprocessor_config.json")
    return said


def _description(model: Model) -> str:
    height, width = model.config.patch_shape
    output = Graph(model).output
    numbers = model.config.num_labels if output == "logits" else "features"
    sizes = fixed_size(model.config) or (
        f"Height and width may be any multiples of {height} and {width}, from {2 * height}x{2 * width} on."
    )
    return (
        f"It takes {INPUT} [batch, {model.config.num_channels}, height, width] and gives {output} "
        f"[batch, {numbers}], both float32. {sizes}"
    )


def _write(
    kind: Kind, path: Path, model: Model, processor: HFViTImageProcessor, int8: str | None, said: list[str]
) -> dict[str, Answer]:
    """Write a file, and return what answers by it, and by the one in fp32 that it was made of, by their precisions."""
    metadata = {
        "config": model.config.to_json_string(),
        "preprocessor_config": processor.to_json_string(),
        "id2label": json.dumps(model.config.id2label),
    }
    whole = path if int8 is None else path.with_name(f"fp32-{path.name}")
    kind.write(model, whole, metadata)
    answers = {"fp32": _checked(kind, whole, model, processor, None, said)}
    if int8 is not None:
        with quiet():
            QUANTIZERS[int8](whole, path)
        answers[f"int8 {int8}"] = _checked(kind, path, model, processor, int8, said)
        for part in whole.parent.glob(f"{whole.name}*"):
            part.unlink()
    return answers


def _checked(
    kind: Kind, path: Path, model: Model, processor: HFViTImageProcessor, int8: str | None, said: list[str]
) -> Answer:
    answer, bound = kind.read(path), BOUNDS[int8]
    difference = largest_difference(answer, model, processor)
    what = "fp32" if int8 is None else f"int8 {int8}"
    sentence = f"In {what} {Graph(model).output} are at most {difference:.1e} from torch's, {bound:g} is the bound"
    if not difference <= bound:
        remedy = "report the model, please" if int8 is None else "leave --int8 out, or take its other kind"
        raise ValueError(f"{sentence}: nothing is written; {remedy}.")
    said.append(f"{sentence} (as a share of the largest, if that is above 1; random and real images).")
    return answer
