"""The model as a graph that runs without this package: ONNX, or a program of torch.export.

Batch, height and width are left open, in whole patches: positions are resampled inside the graph. A file is kept only
if it answers as the model does in torch, for random images and photographs, at several batch sizes and image sizes.

    8 bits, dynamic: weights per column, and activations of every call in one range; onnxruntime's quantize_dynamic
    8 bits, weights: weights in blocks, multiplied in float32; onnxruntime's MatMulNBits
"""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from ..checkpoints import open_checkpoint
from ..checkpoints.models import load
from ..evaluation.throughput import compare
from ..inference.optimize import optimize_for_inference
from ..model.configuration_hf_vit import HFViTConfig
from ..model.image_processing_hf_vit import HFViTImageProcessor
from ..system.disk import new_file, new_folder
from ..system.extras import need
from .kinds import INPUT, KINDS, QUANTIZERS, Answer, Graph, Kind, quiet
from .open_sizes import Model, fixed_size

# How far an answer may be from torch's: the largest difference, as a share of the largest logit where that is above 1.
BOUNDS = {None: 1e-4, "weights": 0.1, "dynamic": 0.2}


# --------------------------------------------------------------------------------------------------- open sizes
# Positions in operations that every runtime has. Resize is not one: versions of exporters and runtimes disagree about
# antialiasing and Keys' a, and some have no cosine of doubles.


# ------------------------------------------------------------------------------------------------------- writing


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
