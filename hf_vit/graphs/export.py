"""Export a model as a graph that runs without this package, such as ONNX or a program of torch.export.

Batch, height and width are dynamic, in whole patches: positions are resampled inside the graph. A file is kept only if
its outputs are those of the model in torch, for random images and photographs, at several batch and image sizes.

    int8 dynamic: weights per column, activations with one range per call; onnxruntime's quantize_dynamic
    int8 static:  activations with fixed ranges, those of calibration images; onnxruntime's quantize_static, or NNCF
    int8 weights: weights alone, multiplied in float32; onnxruntime's MatMulNBits in blocks, or NNCF per output
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from glob import escape
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from ..checkpoints.checkpoint import MULTI_TASK, Checkpoint
from ..checkpoints.models import load
from ..checkpoints.opening import open_checkpoint
from ..inference.optimize import optimize_for_inference
from ..model.configuration_hf_vit import HFViTConfig
from ..model.detection_hf_vit import SUPPRESSED, HFViTForObjectDetection, HFViTObjectDetectionOutput
from ..model.image_processing_hf_vit import HFViTImageProcessor
from ..model.losses_hf_vit import activation_of
from ..model.validation_hf_vit import OF_CERTAINTY
from ..system.disk import new_file, new_folder
from ..system.extras import need
from .calibration import calibration_images
from .describing import description
from .kinds import KINDS, Kind
from .layers import sentence_on_layers
from .open_sizes import Model, fixed_size
from .preprocessing import PreprocessedGraph
from .tracing import INPUT, Graph, Images, Run, graph_of, quiet

# Largest difference from torch's outputs in float32, as a share of the largest output where that is above 1.
BOUNDS = {"fp32": 1e-4, "fp16": 0.02, "bf16": 0.1, "int8 weights": 0.1, "int8 dynamic": 0.2, "int8 static": 0.5}
PREPROCESSED = 0.01  # least bound with preprocessing inside, since runtimes may round a pixel to another level


class Form(NamedTuple):
    """A graph in one precision: the function that runs it, and the bytes of its files."""

    run: Run
    size: int


def export_graph(
    source: str | Path,
    out: str | Path,
    to: str,
    int8: str | None = None,
    measure: Callable[[Checkpoint, HFViTImageProcessor, dict[str, nn.Module], dict[str, int]], list[str]]
    | None = None,
    force: bool = False,
    *,
    precision: str = "fp32",
    calibration: str | None = None,
    with_preprocessing: bool = False,
    say: Callable[[str], None] = lambda stage: None,
) -> list[str]:
    """Export a model as a graph, and keep it only if its outputs are the model's.

    The file holds label names, preprocessing, config and thresholds of certainty: in `metadata_props` of ONNX, in
    `metadata.json` of torch.export, in the `rt_info` of OpenVINO.

    Args:
        source: A file, a folder, or a name on the Hub, in any layout.
        out: The file, with the suffix of its format; or a folder, which also gets config and preprocessing as JSON.
        to: A key of `KINDS`.
        int8: `"weights"` stores weights in 8 bits, `"dynamic"` and `"static"` also multiply in 8 bits.
        measure: Compares accuracy and speed of the model in torch and as graphs, which are given by name together
            with the bytes of their files, and returns lines to print.
        force: Replace what is there.
        precision: `"fp32"`, `"fp16"` or `"bf16"`.
        calibration: Images for `int8="static"`, as for `load_data`.
        with_preprocessing: Whether the graph takes images, uint8 `[B, H, W, C]`, and returns probabilities.
        say: Prints the stage that begins; several take minutes for a large model.

    Returns:
        Sentences about what was assumed, inputs and outputs, and the difference from torch; then lines of `measure`.

    Raises:
        ValueError: If packages are missing, or outputs differ by more than `BOUNDS`; then nothing is written.
    """
    kind, out = KINDS[to], Path(out)
    _check_form(to, kind, precision, int8, calibration)
    if with_preprocessing:
        _check_preprocessing(to, kind, int8, measure is not None)
    need(kind.extra, *kind.packages)
    checkpoint = open_checkpoint(source)
    if checkpoint.architecture == MULTI_TASK:
        raise ValueError(
            f"{source} has several heads, which are not exported as one graph: make a model of one with "
            "hf-vit convert --head, and export that."
        )
    say("Loading the model.")
    model, processor = load(source, checkpoint=checkpoint)
    model.float()
    graph = (
        PreprocessedGraph(model, processor, precision)
        if with_preprocessing
        else Graph(model, precision, kind.is_bounded)
    )
    if measure is not None and "logits" not in graph.outputs:
        raise ValueError(f"{source} has no head to measure: leave out --data, or fine-tune the model first.")
    form = precision if int8 is None else f"int8 {int8}"
    images = calibration_images(calibration, processor) if calibration is not None else []
    is_file = out.suffix == kind.suffix
    lines = [f"Assumed: {sentence}" for sentence in checkpoint.assumed] + [description(graph)]
    with (new_file if is_file else new_folder)(out, force) as unfinished:
        path = unfinished if is_file else unfinished / f"model{kind.suffix}"
        forms, differences = _write(kind, path, graph, processor, form, images, say)
        lines += differences
        if measure is not None:
            say("Measuring accuracy and speed.")
            models: dict[str, nn.Module] = {
                f"torch {name}": optimize_for_inference(model, name) for name in ("fp32", "bf16")
            }
            models |= {f"{to} {name}": GraphClassifier(form.run) for name, form in forms.items()}
            lines += measure(
                checkpoint, processor, models, {f"{to} {name}": form.size for name, form in forms.items()}
            )
        if not is_file:
            model.config.to_json_file(unfinished / "config.json")
            processor.to_json_file(unfinished / "preprocessor_config.json")
    return lines


def _check_form(to: str, kind: Kind, precision: str, int8: str | None, calibration: str | None) -> None:
    """Raise `ValueError` if a format has no such precision, or if images are missing or have no use."""
    if int8 is not None and int8 not in kind.quantizers:
        able = " or ".join(
            f"{name} with {', '.join(each.quantizers)}" for name, each in KINDS.items() if each.quantizers
        )
        raise ValueError(f"{to} has no int8 {int8!r}: leave it out, or use {able}.")
    if precision not in ("fp32", *kind.precisions):
        raise ValueError(f"{to} has no precision {precision!r}: use {' or '.join(('fp32', *kind.precisions))}.")
    if int8 is not None and precision != "fp32":
        raise ValueError(f"int8 {int8} and {precision} exclude each other: leave one of them out.")
    if int8 == "static" and calibration is None:
        raise ValueError(
            "int8 static takes the ranges of activations from images: give some with --calibration or --data."
        )
    if int8 != "static" and calibration is not None:
        raise ValueError("Images for calibration are used by int8 static only: leave them out, or add --int8 static.")


def _check_preprocessing(to: str, kind: Kind, int8: str | None, is_measured: bool) -> None:
    """Raise `ValueError` if a graph cannot have its preprocessing inside."""
    if kind.is_bounded:
        raise ValueError(
            f"{to} plans memory for the largest image, and images have any size: leave out --with-preprocessing."
        )
    if int8 == "static" or is_measured:
        raise ValueError(
            "A graph with preprocessing is neither calibrated nor measured: leave out --int8 static and --data, or "
            "--with-preprocessing."
        )


def _write(
    kind: Kind,
    path: Path,
    graph: Graph,
    processor: HFViTImageProcessor,
    form: str,
    images: Images,
    say: Callable[[str], None],
) -> tuple[dict[str, Form], list[str]]:
    """Write a file; return it and, for int8, its fp32 original, by precision, and their differences."""
    metadata = {
        "config": graph.config.to_json_string(),
        "preprocessor_config": processor.to_json_string(),
        "id2label": json.dumps(graph.config.id2label),
        "activation": activation_of(graph.config) if graph.output == "logits" else "none",
        **{name: repr(value) for name in OF_CERTAINTY if (value := getattr(graph.config, name)) is not None},
    }
    int8 = form.removeprefix("int8 ") if form.startswith("int8 ") else None
    original, precision = (path, form) if int8 is None else (path.with_name(f"fp32-{path.name}"), "fp32")
    say(f"Tracing the model, and writing the graph in {precision}.")
    kind.write(graph, original, metadata)
    say("Comparing its outputs with torch's on random and real images of several sizes.")
    made, difference = _checked(kind, original, graph, processor, precision)
    forms, differences = {precision: made}, [difference]
    if int8 is not None:
        say(f"Quantizing to {form}, and comparing again.")
        _quantize(kind, int8, original, path, images)
        forms[form], difference = _checked(kind, path, graph, processor, form, images)
        differences.append(difference)
        for part in _files_of(original):
            part.unlink()
    return forms, differences


def _files_of(path: Path) -> list[Path]:
    """Return the files of a graph: some formats write weights beside it."""
    return list(path.parent.glob(f"{escape(path.stem)}*"))


def _quantize(kind: Kind, int8: str, original: Path, path: Path, images: Images) -> None:
    with quiet():
        kind.quantizers[int8](original, path, images)


def _checked(
    kind: Kind, path: Path, graph: Graph, processor: HFViTImageProcessor, form: str, calibration: Images = ()
) -> tuple[Form, str]:
    """Return a file as a form of the model, and a sentence about its difference from torch.

    Raises:
        ValueError: If the difference is above the bound; names the first layer that differs.
    """
    run, bound, reference = kind.read(path), BOUNDS[form], graph.in_float32()
    if isinstance(graph, PreprocessedGraph):
        bound = max(bound, PREPROCESSED)
    found = list(differences_of(run, reference, processor, has_faint=form == "fp32"))
    difference = float(np.max([size for _, size in found]))  # NaN if any is
    names = " and ".join(graph.outputs)
    sentence = f"{form}: {names} differ from torch's by at most {difference:.1e}; the bound is {bound:g}"
    if not difference <= bound:

        def values_of_graph(images: np.ndarray) -> np.ndarray:
            with tempfile.TemporaryDirectory() as folder:
                written, original = Path(folder) / path.name, Path(folder) / f"fp32-{path.name}"
                if form.startswith("int8 "):
                    kind.write(graph, original, {})
                    _quantize(kind, form.removeprefix("int8 "), original, written, calibration)
                else:
                    kind.write(graph, written, {})
                return kind.read(written)(images)

        images = next(images for images, size in found if not size <= bound)
        layer = sentence_on_layers(graph, reference, values_of_graph, images, bound)
        raise ValueError(f"{sentence}. Nothing is written: {_remedy(form, difference)}. {layer}")
    return (
        Form(run, sum(part.stat().st_size for part in _files_of(path))),
        f"{sentence} (as a share of the largest output if that is above 1; on random and real images).",
    )


def _remedy(form: str, difference: float) -> str:
    if form == "fp32":
        return "please report the model"
    if form in ("fp16", "bf16"):
        reason = " (its outputs are not finite: values above 65504 overflow)" if not np.isfinite(difference) else ""
        return f"leave --precision out{reason}"
    return "leave --int8 out, or try its other values"


# ------------------------------------------------------------------------------------------------------ comparison


def trials(config: HFViTConfig, processor: HFViTImageProcessor, has_one_size: bool = False) -> Iterator[np.ndarray]:
    """Yield pixel values to compare outputs on: noise and photographs, one to three per batch, of several sizes.

    Args:
        config, processor: Of the model.
        has_one_size: Whether the graph accepts the size of the config only.
    """
    (height, width), (patch_height, patch_width) = config.image_shape, config.patch_shape
    shapes = [(1, height, width), (3, height, width)]
    if not has_one_size and fixed_size(config) is None:
        low = max(config.grid_size[0] // 2, 2) * patch_height
        shapes += [(2, height + patch_height, width + 2 * patch_width), (1, low, 2 * width)]
    generator = torch.Generator().manual_seed(0)
    for number, *size in shapes:
        yield torch.randn(number, config.num_channels, *size, generator=generator).numpy()
        if config.num_channels in (1, 3):
            yield photographs(processor, (size[0], size[1]), number)


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


def image_trials(graph: PreprocessedGraph) -> Iterator[np.ndarray]:
    """Yield images, uint8 `[B, H, W, C]`, to compare outputs on: noise and photographs of several sizes."""
    channels = graph.preprocessing.num_channels
    generator = np.random.default_rng(0)
    for number, height, width in ((1, *graph.preprocessing.plan.size), (3, 97, 131), (2, 427, 640), (1, 60, 31)):
        yield generator.integers(256, size=(number, height, width, channels), dtype=np.uint8)
        if channels == 3:
            photos = [Image.fromarray(sample_images()[index % 2]) for index in range(number)]
            yield np.stack([np.array(photo.resize((width, height), Image.Resampling.BICUBIC)) for photo in photos])


def faint(config: HFViTConfig) -> np.ndarray:
    """Return pixel values of little contrast, `[2, C, H, W]`: an epsilon of LayerNorm matters where variance is small.

    They are not for graphs of low precision, which may round such images to constants.
    """
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, config.num_channels, *config.image_shape, generator=generator).mul(1e-2).numpy()


@torch.no_grad()
def differences_of(
    run: Run, model: Model | Graph, processor: HFViTImageProcessor, has_faint: bool = False
) -> Iterator[tuple[np.ndarray, float]]:
    """Yield inputs and the largest difference of a graph's outputs from the model's, in the unit of `BOUNDS`."""
    graph = graph_of(model).eval()
    least = 1e-9 if graph.output == "probabilities" else 1.0  # of a thousand classes, all may be small
    if isinstance(graph, PreprocessedGraph):
        inputs = image_trials(graph)
    else:
        inputs = chain(
            trials(graph.config, processor, graph.fixed is not None), [faint(graph.config)] if has_faint else []
        )
    for images in inputs:
        if isinstance(graph, PreprocessedGraph):
            graph.check(images)
        given, answers = torch.from_numpy(images), run(images)
        expected, differences = graph(given), []
        if isinstance(graph.model, HFViTForObjectDetection):
            heatmap = graph.model(graph.preprocessed(given)).heatmap
            differences.append(difference_of_peaks(torch.from_numpy(answers[0]), heatmap))
            expected, answers = expected[1], answers[1]
        several = isinstance(expected, tuple)
        for answer, wanted in zip(answers, expected, strict=True) if several else [(answers, expected)]:
            differences.append(difference_of(answer, wanted.numpy(), least))
        yield images, float(np.max(differences))  # NaN if any is


def largest_difference(run: Run, model: Model | Graph, processor: HFViTImageProcessor) -> float:
    """Return the largest difference of a graph's outputs from the model's, in the unit of `BOUNDS`; NaN if one is."""
    return float(np.max([size for _, size in differences_of(run, model, processor)]))


def difference_of(answer: np.ndarray, expected: np.ndarray, least: float = 1.0) -> float:
    """Return the largest difference, as a share of the largest expected value where that is above `least`."""
    if answer.shape != expected.shape:
        raise ValueError(f"The graph has outputs {list(answer.shape)}, not {list(expected.shape)}.")
    return np.abs(answer - expected).max() / max(least, np.abs(expected).max())


def difference_of_peaks(logits: Tensor, heatmap: Tensor) -> float:
    """Return the largest difference of a detector's logits `[B, h*w, C]` from the heatmap `[B, C, h, w]` of torch.

    Where only one of them has a peak, it is how far the point is from the change: two neighbours may be almost equal.
    """
    if logits.isnan().any():
        return np.nan
    padded = nn.functional.pad(heatmap, (1, 1, 1, 1), value=-torch.inf)
    around = padded.unfold(2, 3, 1).unfold(3, 3, 1).flatten(-2)  # [B, C, h, w, 9]
    others = around[..., [0, 1, 2, 3, 5, 6, 7, 8]].amax(dim=-1)
    own, margin = (each.flatten(2).transpose(1, 2) for each in (heatmap, heatmap - others))
    is_peak = logits > SUPPRESSED / 2
    errors = torch.where(is_peak, (logits - own).abs(), 0.0)
    errors = torch.where(is_peak != (margin >= 0), torch.maximum(errors, margin.abs()), errors)
    return float(errors.max() / heatmap.abs().max().clamp(min=1))


class GraphClassifier(nn.Module):
    """A graph with the inputs and outputs of a classifier, or of a detector."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    def forward(self, pixel_values: Tensor) -> Any:
        answers = self.run(pixel_values.numpy())
        if isinstance(answers, tuple):
            logits, boxes = (torch.from_numpy(answer) for answer in answers)
            return HFViTObjectDetectionOutput(logits=logits, pred_boxes=boxes)
        return ImageClassifierOutput(logits=torch.from_numpy(answers))
