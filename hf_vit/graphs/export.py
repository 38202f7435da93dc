"""Export a model as a graph that runs without this package: ONNX, or a program of torch.export.

Batch, height and width are dynamic, in whole patches: positions are resampled inside the graph. A file is kept only if
its outputs are those of the model in torch, for random images and photographs, at several batch and image sizes.

    int8 dynamic: weights per column, activations with one range per call; onnxruntime's quantize_dynamic
    int8 weights: weights in blocks, multiplied in float32; onnxruntime's MatMulNBits
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from ..checkpoints.checkpoint import DETECTOR, MULTI_TASK, Checkpoint
from ..checkpoints.models import load
from ..checkpoints.opening import open_checkpoint
from ..inference.optimize import optimize_for_inference
from ..model.configuration_hf_vit import HFViTConfig
from ..model.image_processing_hf_vit import HFViTImageProcessor
from ..model.losses_hf_vit import activation_of
from ..model.segmentation_hf_vit import HFViTForSemanticSegmentation
from ..system.disk import new_file, new_folder
from ..system.extras import need
from .kinds import INPUT, KINDS, QUANTIZERS, Graph, Kind, Run, quiet
from .layers import sentence_on_layers
from .open_sizes import Model, fixed_size

# Largest difference from torch's outputs, as a share of the largest output where that is above 1.
BOUNDS = {None: 1e-4, "weights": 0.1, "dynamic": 0.2}
# What the logits become, by `activation_of`. The temperature is in the graph.
SCORES = {
    "softmax": "The probabilities of the classes are the softmax of the logits.",
    "sigmoid": "The probability of each label is the sigmoid of its logit.",
    "none": "The logits are the values of the targets.",
}


def export_graph(
    source: str | Path,
    out: str | Path,
    to: str,
    int8: str | None = None,
    measure: Callable[[Checkpoint, HFViTImageProcessor, dict[str, nn.Module]], list[str]] | None = None,
    force: bool = False,
) -> list[str]:
    """Export a model as a graph, and keep it only if its outputs are the model's.

    The file holds label names, preprocessing and config: in `metadata_props` of ONNX, in `metadata.json` of
    torch.export.

    Args:
        source: A file, a folder, or a name on the Hub, in any layout.
        out: The file, with the suffix of its format; or a folder, which also gets config and preprocessing as JSON.
        to: A key of `KINDS`.
        int8: For ONNX: `"weights"` stores weights in 8 bits, `"dynamic"` also multiplies in 8 bits.
        measure: Compares accuracy and speed of the model in torch and as graphs, which are given by name, and returns
            lines to print.
        force: Replace what is there.

    Returns:
        Sentences about what was assumed, inputs and outputs, and the difference from torch; then lines of `measure`.

    Raises:
        ValueError: If packages are missing, or outputs differ by more than `BOUNDS`; then nothing is written.
    """
    kind, out = KINDS[to], Path(out)
    if int8 is not None and to != "onnx":
        raise ValueError(f"{to} has no int8: leave it out, or export to onnx.")
    if int8 is not None and int8 not in QUANTIZERS:
        raise ValueError(f"Unknown int8 {int8!r}: choose one of {', '.join(QUANTIZERS)}.")
    need("onnx", *kind.packages)
    checkpoint = open_checkpoint(source)
    if checkpoint.architecture == MULTI_TASK:
        raise ValueError(
            f"{source} has several heads, which are not exported as one graph: make a model of one with "
            "hf-vit convert --head, and export that."
        )
    if checkpoint.architecture == DETECTOR:
        raise ValueError(f"{source} is a model for detection, which is not exported as a graph: use it in torch.")
    model, processor = load(source, checkpoint=checkpoint)
    model.float()
    is_file = out.suffix == kind.suffix
    lines = [f"Assumed: {sentence}" for sentence in checkpoint.assumed] + [_description(model)]
    with (new_file if is_file else new_folder)(out, force) as unfinished:
        path = unfinished if is_file else unfinished / f"model{kind.suffix}"
        graphs, differences = _write(kind, path, model, processor, int8)
        lines += differences
        if measure is not None:
            models: dict[str, nn.Module] = {
                f"torch {precision}": optimize_for_inference(model, precision) for precision in ("fp32", "bf16")
            }
            models |= {f"{to} {name}": GraphClassifier(run) for name, run in graphs.items()}
            lines += measure(checkpoint, processor, models)
        if not is_file:
            model.config.to_json_file(unfinished / "config.json")
            processor.to_json_file(unfinished / "preprocessor_config.json")
    return lines


def _description(model: Model) -> str:
    height, width = model.config.patch_shape
    output = Graph(model).output
    columns = str(model.config.num_labels) if output == "logits" else "features"
    sizes = fixed_size(model.config) or (
        f"The height is any multiple of {height}, the width of {width}, from {2 * height}x{2 * width} on."
    )
    scores = f" {SCORES[activation_of(model.config)]}" if output == "logits" else ""
    if isinstance(model, HFViTForSemanticSegmentation):
        parts = model.config.patch_subdivision
        columns += ", rows, columns"
        scores = (
            f" Each patch has {parts}x{parts} logits per class. Resize them bilinearly to the image (without aligned "
            "corners); the class of a pixel is that of the largest logit."
        )
    return (
        f"Input: {INPUT} [batch, {model.config.num_channels}, height, width]; output: {output} [batch, {columns}]; "
        f"both float32. {sizes}{scores}"
    )


def _write(
    kind: Kind, path: Path, model: Model, processor: HFViTImageProcessor, int8: str | None
) -> tuple[dict[str, Run], list[str]]:
    """Write a file; return the functions that run it and its fp32 original, by precision, and their differences."""
    metadata = {
        "config": model.config.to_json_string(),
        "preprocessor_config": processor.to_json_string(),
        "id2label": json.dumps(model.config.id2label),
        "activation": activation_of(model.config) if Graph(model).output == "logits" else "none",
    }
    original = path if int8 is None else path.with_name(f"fp32-{path.name}")
    kind.write(model, original, metadata)
    run, difference = _checked(kind, original, model, processor, None)
    runs, differences = {"fp32": run}, [difference]
    if int8 is not None:
        _quantize(int8, original, path)
        runs[f"int8 {int8}"], difference = _checked(kind, path, model, processor, int8)
        differences.append(difference)
        for part in original.parent.glob(f"{original.name}*"):
            part.unlink()
    return runs, differences


def _quantize(int8: str, original: Path, path: Path) -> None:
    with quiet():
        QUANTIZERS[int8](original, path)


def _checked(
    kind: Kind, path: Path, model: Model, processor: HFViTImageProcessor, int8: str | None
) -> tuple[Run, str]:
    """Return the function that runs a file, and a sentence about its difference from torch.

    Raises:
        ValueError: If the difference is above the bound; names the first layer that differs.
    """
    run, bound = kind.read(path), BOUNDS[int8]
    found = list(differences_of(run, model, processor, has_faint=int8 is None))
    difference = float(np.max([size for _, size in found]))  # NaN if any is
    precision = "fp32" if int8 is None else f"int8 {int8}"
    sentence = (
        f"{precision}: {Graph(model).output} differ from torch's by at most {difference:.1e}; the bound is {bound:g}"
    )
    if not difference <= bound:
        images = next(images for images, size in found if not size <= bound)

        def outputs_of_graph() -> np.ndarray:
            with tempfile.TemporaryDirectory() as folder:
                written, original = Path(folder) / path.name, Path(folder) / f"fp32-{path.name}"
                kind.write(model, written if int8 is None else original, {})
                if int8 is not None:
                    _quantize(int8, original, written)
                return kind.read(written)(images)

        remedy = "please report the model" if int8 is None else "leave --int8 out, or try its other value"
        layer = sentence_on_layers(model, outputs_of_graph, images, bound)
        raise ValueError(f"{sentence}. Nothing is written: {remedy}. {layer}")
    return run, f"{sentence} (as a share of the largest output if that is above 1; on random and real images)."


# ------------------------------------------------------------------------------------------------------ comparison


def trials(config: HFViTConfig, processor: HFViTImageProcessor) -> Iterator[np.ndarray]:
    """Yield pixel values to compare outputs on: noise and photographs, one to three per batch, of several sizes."""
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


def faint(config: HFViTConfig) -> np.ndarray:
    """Return pixel values of little contrast, `[2, C, H, W]`: an epsilon of LayerNorm matters where variance is small.

    They are not for graphs of low precision, which may round such images to constants.
    """
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, config.num_channels, *config.image_shape, generator=generator).mul(1e-2).numpy()


@cache
def sample_images() -> list[np.ndarray]:
    """Read the two photographs of scikit-learn, uint8 `[427, 640, 3]`."""
    from sklearn.datasets import load_sample_images

    return load_sample_images().images


def photographs(processor: HFViTImageProcessor, size: tuple[int, int], number: int) -> np.ndarray:
    """Return pixel values of parts of scikit-learn's two photographs, float32 `[number, C, H, W]`."""
    photos = [Image.fromarray(photo) for photo in sample_images()]
    parts = [
        photos[index % 2].resize(size[::-1], Image.Resampling.BICUBIC, (60 * index, 40 * index, 400, 400))
        for index in range(number)
    ]
    unchanged: dict[str, Any] = {"do_resize": False, "do_center_crop": False, "packing": None}
    return processor(parts, **unchanged, return_tensors="pt")[INPUT].numpy()


@torch.no_grad()
def differences_of(
    run: Run, model: Model, processor: HFViTImageProcessor, has_faint: bool = False
) -> Iterator[tuple[np.ndarray, float]]:
    """Yield pixel values and the difference of a graph's outputs from the model's, in the unit of `BOUNDS`."""
    graph = Graph(model).eval()
    for pixel_values in chain(trials(model.config, processor), [faint(model.config)] if has_faint else []):
        expected, outputs = graph(torch.from_numpy(pixel_values)).numpy(), run(pixel_values)
        if outputs.shape != expected.shape:
            raise ValueError(f"The graph has outputs {list(outputs.shape)}, not {list(expected.shape)}.")
        yield pixel_values, float(np.abs(outputs - expected).max() / max(1.0, np.abs(expected).max()))


def largest_difference(run: Run, model: Model, processor: HFViTImageProcessor) -> float:
    """Return the largest difference of a graph's outputs from the model's, in the unit of `BOUNDS`; NaN if one is."""
    return float(np.max([size for _, size in differences_of(run, model, processor)]))


class GraphClassifier(nn.Module):
    """A graph with the inputs and outputs of a classifier."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    def forward(self, pixel_values: Tensor) -> ImageClassifierOutput:
        logits: Any = torch.from_numpy(self.run(pixel_values.numpy()))
        return ImageClassifierOutput(logits=logits)
