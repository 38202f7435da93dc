"""Weights, inputs and reference outputs that the variants of a case share, all generated from a seed.

The reference is this package's plain model in fp32, and Pillow for images. A library with other outputs than the
reference computes something else.
"""

import json
import os
import warnings
from collections.abc import Callable, Collection, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from ..checkpoints.export import export_checkpoint
from ..checkpoints.families.vit_pytorch import ERAS, table
from ..checkpoints.layouts import rules_of
from ..data.images import derive_seed
from ..evaluation.flops import count_flops
from ..graphs.onnx_files import write_onnx
from ..model.configuration_hf_vit import HFViTConfig
from ..model.image_processing_pil_hf_vit import HFViTImageProcessorPil
from ..model.modeling_hf_vit import HFViTForImageClassification
from .measure import CHECKED_STEPS, LEARNING_RATE, PROCESSING, Job, augmentation_by_torchvision
from .suites import Case, model_fields

SEED = 0
References = dict[str, np.ndarray]
REFERENCE_BATCH = 16  # images
# vit-pytorch's ViT is another architecture, with its own reference.
VIT_PYTORCH_FIELDS = {"qkv_bias": False, "use_patch_layernorm": True, "layer_norm_eps": 1e-5}


class Prepared(NamedTuple):
    """Paths and reference outputs of a case.

    Attributes:
        models, folder: See `Job`.
        references: Reference outputs for `"vit-pytorch"`, and for all others under `""`.
        operations: Floating-point operations per call; `None` unless a model is the only work.
        failures: By library, the reason why it cannot be measured.
    """

    models: Path
    folder: Path
    references: References
    operations: int | None
    failures: dict[str, str]


def prepare(
    case: Case, folder: Path, libraries: Collection[str], device: str = "cpu", photos: Sequence[Path] = ()
) -> Prepared:
    """Write the files that the variants of a case need; the weights only if they do not exist yet.

    Args:
        folder: Folder for the files.
        libraries: Libraries to write weights for.
        device: Device that computes the reference.
        photos: Files to use instead of generated photos.
    """
    models, own_folder = folder / "models", folder / f"{case.suite} {case.name}".replace("/", "-")
    own_folder.mkdir()
    failures = {} if case.model is None else write_models(case.model, models, libraries)
    if case.photos is not None:
        write_photos(own_folder / "photos", case, photos)
    references = REFERENCES[case.suite](case, own_folder, device, libraries)
    if case.suite in ("inference", "prediction") and {"onnxruntime", "openvino"}.intersection(libraries):
        failure = _failure_of(lambda: write_onnx(random_model(str(case.model)), own_folder / "model.onnx"))
        failures |= {name: f"export to ONNX: {failure}" for name in ("onnxruntime", "openvino") if failure}
    operations = None
    if case.suite in ("training", "inference"):
        operations = count_operations(str(case.model)) * case.images * (3 if case.suite == "training" else 1)
    return Prepared(models, own_folder, references, operations, failures)


def _failure_of(write: Callable[[], Any]) -> str | None:
    """Return the message of any exception, so that one library cannot stop the others."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            write()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def random_model(name: str, **fields: Any) -> Any:
    """Return a model with random values in every tensor, so that a swapped or missing tensor changes the outputs."""
    generator = torch.Generator().manual_seed(SEED)
    config = HFViTConfig(**{**model_fields(name), **fields})
    with torch.device("meta"):
        model = HFViTForImageClassification(config)
    assert not list(model.buffers())  # the loop below fills parameters only
    model.to_empty(device="cpu")
    with torch.no_grad():
        for module in model.modules():
            for kind, parameter in module.named_parameters(recurse=False):
                is_matrix = isinstance(module, nn.Linear) and kind == "weight"
                parameter.normal_(std=parameter.shape[1] ** -0.5 if is_matrix else 0.1, generator=generator)
                if isinstance(module, nn.LayerNorm) and kind == "weight":
                    parameter.add_(1)
    return model.eval()


def write_models(name: str, folder: Path, libraries: Collection[str]) -> dict[str, str]:
    """Write the weights of a model in our layout and the layouts of `libraries`; return the failures."""
    ours = folder / "ours"
    if not ours.exists():
        model = random_model(name)
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(ours)
        save_file(model.state_dict(), ours / "model.safetensors", metadata={"format": "pt"})
        height, width = model.config.image_shape
        HFViTImageProcessorPil(**{**PROCESSING, "size": {"height": height, "width": width}}).save_pretrained(ours)
    writers: dict[str, Callable[[Path], Any]] = {
        "timm": lambda out: export_checkpoint(ours, out, "timm"),
        "transformers": lambda out: export_checkpoint(ours, out, "transformers"),
        "vit-pytorch": lambda out: write_vit_pytorch(name, out),
    }
    failures: dict[str, str] = {}
    for library, write in writers.items():
        if library in libraries and not (folder / library).exists():
            failure = _failure_of(partial(write, folder / library))
            failures |= {library: failure} if failure else {}
    return failures


def write_vit_pytorch(name: str, folder: Path) -> None:
    """Write weights for vit-pytorch's architecture, and the arguments of its ViT."""
    model = random_model(name, **VIT_PYTORCH_FIELDS)
    config, state, fields = model.config, model.state_dict(), model_fields(name)
    theirs: dict[str, Tensor] = {}
    for rule in rules_of(table(ERAS[0], is_pooled=False, has_patch_layernorm=True, leading=()), config, state):
        theirs.update(zip(rule.theirs, rule.layout.write([state[part] for part in rule.ours]), strict=True))
    arguments = {
        "image_size": fields["image_size"],
        "patch_size": fields["patch_size"],
        "num_classes": config.num_labels,
        "dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "dim_head": config.head_width,
        "mlp_dim": config.intermediate_size,
    }
    folder.mkdir()
    (folder / "arguments.json").write_text(json.dumps(arguments), encoding="utf-8")
    save_file({part: tensor.contiguous() for part, tensor in theirs.items()}, folder / "model.safetensors")


def count_operations(name: str) -> int:
    """Return the floating-point operations of the forward of one image; a multiply-add counts as two."""
    with torch.device("meta"):
        model = HFViTForImageClassification(HFViTConfig(**model_fields(name)))
    forward, _ = count_flops(model, HFViTForImageClassification)
    return forward


def write_photos(folder: Path, case: Case, photos: Sequence[Path]) -> None:
    """Write the photos of a case, links to `photos` or generated ones, into a folder."""
    folder.mkdir()
    for number in range(case.images):
        path = folder / f"{number:04d}.jpg"
        if photos:
            os.symlink(photos[number].absolute(), path)
        else:
            assert case.photos is not None
            path.write_bytes(photo_like(case.photos, number))


def photo_like(size: tuple[int, int], number: int) -> bytes:
    """Return a JPEG (quality 90, 4:2:0) that is as expensive to decode as a photo: smooth noise of all scales.

    Args:
        size: (height, width) in pixels.
        number: Part of the seed.
    """
    generator = np.random.default_rng([SEED, number, *size])
    small = (min(size[0], 750), min(size[1], 1000))
    field = np.full((*small, 3), 128.0)
    cells = 3
    while cells < min(small):
        coarse = generator.normal(scale=120 / cells**0.7, size=(cells, cells, 3)).astype(np.float32)
        channels = [Image.fromarray(coarse[..., channel]) for channel in range(3)]
        grown = [channel.resize((small[1], small[0]), Image.Resampling.BICUBIC) for channel in channels]
        field += np.stack([np.asarray(channel) for channel in grown], axis=-1)
        cells *= 2
    image = Image.fromarray(field.clip(0, 255).astype(np.uint8)).resize((size[1], size[0]), Image.Resampling.BICUBIC)
    noise = generator.normal(scale=4, size=(*size, 1)).astype(np.float32)
    noisy = (np.asarray(image, dtype=np.float32) + noise).clip(0, 255).astype(np.uint8)
    buffer = BytesIO()
    Image.fromarray(noisy).save(buffer, "JPEG", quality=90, subsampling="4:2:0")
    return buffer.getvalue()


def upright_jpegs(folder: Path, most: int = 64) -> list[Path]:
    """Return the JPEG files of a folder without EXIF rotation, which libraries handle differently.

    Raises:
        ValueError: If there are none.
    """
    found: list[Path] = []
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in (".jpg", ".jpeg") and len(found) < most:
            with Image.open(path) as image:
                if image.format == "JPEG" and image.getexif().get(0x0112, 1) == 1:
                    found.append(path)
    if not found:
        raise ValueError(f"Expected upright JPEGs in {folder}, found none: choose another folder of photos.")
    return found


# Each function writes the inputs, and returns the outputs for vit-pytorch and, under "", for all other libraries.


def _random_batch(case: Case, folder: Path) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    fields = model_fields(str(case.model))
    size = (fields["image_size"], fields["image_size"])
    pixel_values = torch.randn(case.images, 3, *size, generator=generator)
    labels = torch.randint(fields["num_labels"], (case.images,), generator=generator)
    np.save(folder / "pixel_values.npy", pixel_values.numpy())
    np.save(folder / "labels.npy", labels.numpy())
    return pixel_values, labels


def _architectures(case: Case, libraries: Collection[str]) -> dict[str, Any]:
    found = {"": random_model(str(case.model))}
    if "vit-pytorch" in libraries:
        found["vit-pytorch"] = random_model(str(case.model), **VIT_PYTORCH_FIELDS)
    return found


def training_references(case: Case, folder: Path, device: str, libraries: Collection[str]) -> References:
    """Return the logits of the first steps, `[steps, B, labels]`, with gradient accumulation."""
    pixel_values, labels = (tensor.to(device) for tensor in _random_batch(case, folder))
    references = {}
    for library, model in _architectures(case, libraries).items():
        model.to(device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
        steps = []
        for _ in range(CHECKED_STEPS):
            parts = []
            batches = (tensor.split(REFERENCE_BATCH) for tensor in (pixel_values, labels))
            for pixels, targets in zip(*batches, strict=True):
                logits = model(pixels).logits
                (F.cross_entropy(logits, targets, reduction="sum") / len(labels)).backward()
                parts.append(logits.detach())
            optimizer.step()
            optimizer.zero_grad()
            steps.append(torch.cat(parts))
        references[library] = torch.stack(steps).cpu().numpy()
    return references


@torch.inference_mode()
def inference_references(case: Case, folder: Path, device: str, libraries: Collection[str]) -> References:
    """Return the logits, `[B, labels]`."""
    pixel_values = _random_batch(case, folder)[0].to(device)
    models = _architectures(case, libraries).items()
    return {library: _logits(model.to(device), pixel_values).cpu().numpy() for library, model in models}


def _logits(model: nn.Module, pixel_values: Tensor) -> Tensor:
    return torch.cat([model(pixels).logits for pixels in pixel_values.split(REFERENCE_BATCH)])


def _pillow_pixel_values(folder: Path) -> np.ndarray:
    """Return the pixel values `[B, 3, H, W]`, resized by Pillow and normalised, of `PROCESSING`."""
    size = (PROCESSING["size"]["width"], PROCESSING["size"]["height"])
    images = []
    for path in sorted((folder / "photos").iterdir()):
        with Image.open(path) as image:
            small = image.convert("RGB").resize(size, Image.Resampling(PROCESSING["resample"]))
        values = (np.asarray(small, dtype=np.float32) / 255 - PROCESSING["image_mean"]) / PROCESSING["image_std"]
        images.append(values.transpose(2, 0, 1))
    return np.stack(images).astype(np.float32)


def preprocessing_references(case: Case, folder: Path, device: str, libraries: Collection[str]) -> References:
    return {"": _pillow_pixel_values(folder)}


def augmentation_references(case: Case, folder: Path, device: str, libraries: Collection[str]) -> References:
    """Return torchvision's pixel values with the seeds of the training loop."""
    np.save(folder / "seeds.npy", np.array([derive_seed(SEED, 0, index) for index in range(case.images)]))
    job = Job(case.suite, "torchvision", "", str(folder), "cpu", "fp32", torch.get_num_threads(), 0.0)
    with torch.random.fork_rng(devices=[]):
        return {"": augmentation_by_torchvision(job).output()}


@torch.inference_mode()
def prediction_references(case: Case, folder: Path, device: str, libraries: Collection[str]) -> References:
    """Return the probabilities of all labels, `[B, labels]`."""
    pixel_values = torch.from_numpy(_pillow_pixel_values(folder)).to(device)
    return {"": _logits(random_model(str(case.model)).to(device), pixel_values).softmax(dim=1).cpu().numpy()}


REFERENCES: dict[str, Callable[[Case, Path, str, Collection[str]], References]] = {
    "training": training_references,
    "inference": inference_references,
    "preprocessing": preprocessing_references,
    "augmentation": augmentation_references,
    "prediction": prediction_references,
}
