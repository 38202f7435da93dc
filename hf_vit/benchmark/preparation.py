"""What the variants of a case share: weights in the layout of every library, what goes in, what should come out.

All of it follows from a seed. The reference is this package's plain model in fp32, and Pillow for images: where
another library disagrees with it, one of the two is wrong.
"""

import json
import os
import warnings
from collections.abc import Callable, Collection, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from ..checkpoints.export import export
from ..checkpoints.families.vit_pytorch import ERAS, table
from ..checkpoints.layouts import rules_of
from ..data.images import derive_seed
from ..evaluation.flops import count_flops
from ..graphs.kinds import write_onnx
from ..model.configuration_hf_vit import HFViTConfig
from ..model.image_processing_pil_hf_vit import HFViTImageProcessorPil
from ..model.modeling_hf_vit import HFViTForImageClassification
from .measure import LEARNING_RATE, PROCESSING, STEPS_CHECKED, Job, augmentation_by_torchvision
from .suites import Case, model_fields

SEED = 0
# vit-pytorch's ViT is another architecture: it is compared with ours of the same.
OF_VIT_PYTORCH = {"qkv_bias": False, "use_patch_layernorm": True, "layer_norm_eps": 1e-5}
OF_ALL_OTHERS = {"layer_norm_eps": 1e-6}


class Prepared(NamedTuple):
    """A case that is ready to be measured.

    Attributes:
        models, folder: See `Job`.
        references: What a variant should answer: `"vit-pytorch"`, and `""` for all others.
        operations: Floating-point operations of a call, `None` where no model is the work.
        failures: Why a library cannot be measured.
    """

    models: Path
    folder: Path
    references: dict[str, np.ndarray]
    operations: int | None
    failures: dict[str, str]


def prepare(
    case: Case, folder: Path, libraries: Collection[str], device: str = "cpu", photos: Sequence[Path] = ()
) -> Prepared:
    """Write into `folder` what the variants of a case need; the weights only if they are not there yet.

    Args:
        libraries: Whose layouts are needed.
        device: On which the reference is computed.
        photos: The user's; none are made then.
    """
    models, own_folder = folder / "models", folder / f"{case.suite} {case.name}".replace("/", "-")
    own_folder.mkdir()
    failures = {} if case.model is None else write_models(case.model, models, libraries)
    if case.photos is not None:
        write_photos(own_folder / "photos", case, photos)
    references = REFERENCES[case.suite](case, own_folder, device, libraries)
    if case.suite == "inference" and {"onnxruntime", "openvino"}.intersection(libraries):
        why = _failure_of(lambda: write_onnx(random_model(str(case.model)), own_folder / "model.onnx"))
        failures |= {name: f"export to ONNX: {why}" for name in ("onnxruntime", "openvino") if why}
    operations = None
    if case.suite in ("training", "inference"):
        operations = count_operations(str(case.model)) * case.images * (3 if case.suite == "training" else 1)
    return Prepared(models, own_folder, references, operations, failures)


def _failure_of(write: Callable[[], Any]) -> str | None:
    """Return why something failed: what is foreign can fail in any way, and the others go on."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            write()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


# ------------------------------------------------------------------------------------------------------ weights


def random_model(name: str, **fields: Any) -> Any:
    """Return a model whose every tensor is random, so that none can be swapped or left out unseen."""
    generator = torch.Generator().manual_seed(SEED)
    config = HFViTConfig(**{**model_fields(name), **(fields or OF_ALL_OTHERS)})
    with torch.device("meta"):
        model = HFViTForImageClassification(config)
    assert not list(model.buffers())  # nothing but parameters to fill
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
    """Write the weights of a model in our layout and those of `libraries`; return why any could not be."""
    ours = folder / "ours"
    if not ours.exists():
        model = random_model(name)
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(ours)
        save_file(model.state_dict(), ours / "model.safetensors", metadata={"format": "pt"})
        height, width = model.config.image_shape
        HFViTImageProcessorPil(**{**PROCESSING, "size": {"height": height, "width": width}}).save_pretrained(ours)
    writers: dict[str, Callable[[Path], Any]] = {
        "timm": lambda out: export(ours, out, "timm"),
        "transformers": lambda out: export(ours, out, "transformers"),
        "vit-pytorch": lambda out: write_vit_pytorch(name, out),
    }
    failures: dict[str, str] = {}
    for library, write in writers.items():
        if library in libraries and not (folder / library).exists():
            why = _failure_of(lambda write=write, library=library: write(folder / library))  # type: ignore[misc]
            failures |= {library: why} if why else {}
    return failures


def write_vit_pytorch(name: str, folder: Path) -> None:
    """Write the weights of vit-pytorch's architecture, and the arguments of its ViT."""
    model = random_model(name, **OF_VIT_PYTORCH)
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
    """Return the floating-point operations of one image's forward: two for each multiplication with its addition."""
    with torch.device("meta"):
        model = HFViTForImageClassification(HFViTConfig(**model_fields(name)))
    forward, _ = count_flops(model, HFViTForImageClassification)
    return forward


# ------------------------------------------------------------------------------------------------------- photos


def write_photos(folder: Path, case: Case, photos: Sequence[Path]) -> None:
    """Put the photos of a case into a folder: the user's, or such as are made for it."""
    folder.mkdir()
    for number in range(case.images):
        path = folder / f"{number:04d}.jpg"
        if photos:
            os.symlink(photos[number].absolute(), path)
        else:
            assert case.photos is not None
            path.write_bytes(photo_like(case.photos, number))


def photo_like(size: tuple[int, int], number: int) -> bytes:
    """Return a JPEG of quality 90 and 4:2:0 that costs what a photo does: soft fields of all sizes, and noise.

    Args:
        size: (height, width) in pixels.
        number: Another one for each.
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
    """Return JPEGs of a folder. Those that have to be turned are left out: libraries do not agree about these.

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
        raise ValueError(f"Expected upright JPEGs in {folder}, found none: name another folder of photos.")
    return found


# --------------------------------------------------------------------------------------------------- references
# Each writes what goes in, and returns what should come out: for vit-pytorch, and for all others.


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
        found["vit-pytorch"] = random_model(str(case.model), **OF_VIT_PYTORCH)
    return found


def training_references(case: Case, folder: Path, device: str, libraries: Collection[str]) -> dict[str, np.ndarray]:
    """Return the logits of the first steps, `[steps, B, labels]`, gradients added up over small batches."""
    pixel_values, labels = (tensor.to(device) for tensor in _random_batch(case, folder))
    references = {}
    for library, model in _architectures(case, libraries).items():
        model.to(device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
        steps = []
        for _ in range(STEPS_CHECKED):
            parts = []
            for pixels, wanted in zip(pixel_values.split(16), labels.split(16), strict=True):
                logits = model(pixels).logits
                (F.cross_entropy(logits, wanted, reduction="sum") / len(labels)).backward()
                parts.append(logits.detach())
            optimizer.step()
            optimizer.zero_grad()
            steps.append(torch.cat(parts))
        references[library] = torch.stack(steps).cpu().numpy()
    return references


@torch.inference_mode()
def inference_references(case: Case, folder: Path, device: str, libraries: Collection[str]) -> dict[str, np.ndarray]:
    """Return the logits, `[B, labels]`."""
    pixel_values = _random_batch(case, folder)[0].to(device)
    return {
        library: torch.cat([model(pixels).logits for pixels in pixel_values.split(16)]).cpu().numpy()
        for library, model in _architectures(case, libraries).items()
        if model.to(device)
    }


def _pillow_pixel_values(folder: Path) -> np.ndarray:
    """Return the pixel values, `[B, 3, H, W]`, by Pillow's resize and what the settings say."""
    size = (PROCESSING["size"]["width"], PROCESSING["size"]["height"])
    images = []
    for path in sorted((folder / "photos").iterdir()):
        with Image.open(path) as image:
            small = image.convert("RGB").resize(size, Image.Resampling(PROCESSING["resample"]))
        values = (np.asarray(small, dtype=np.float32) / 255 - PROCESSING["image_mean"]) / PROCESSING["image_std"]
        images.append(values.transpose(2, 0, 1))
    return np.stack(images).astype(np.float32)


def preprocessing_references(
    case: Case, folder: Path, device: str, libraries: Collection[str]
) -> dict[str, np.ndarray]:
    return {"": _pillow_pixel_values(folder)}


def augmentation_references(
    case: Case, folder: Path, device: str, libraries: Collection[str]
) -> dict[str, np.ndarray]:
    """Return what torchvision makes of the photos with the seeds that the training loop has for them."""
    np.save(folder / "seeds.npy", np.array([derive_seed(SEED, 0, index) for index in range(case.images)]))
    job = Job(case.suite, "torchvision", "", str(folder), "", "cpu", "fp32", torch.get_num_threads(), 0.0)
    state = torch.get_rng_state()
    answer = augmentation_by_torchvision(job).answer()
    torch.set_rng_state(state)
    return {"": answer}


@torch.inference_mode()
def prediction_references(case: Case, folder: Path, device: str, libraries: Collection[str]) -> dict[str, np.ndarray]:
    """Return the probabilities of all labels, `[B, labels]`."""
    model, pixel_values = random_model(str(case.model)).to(device), torch.from_numpy(_pillow_pixel_values(folder))
    logits = torch.cat([model(pixels).logits for pixels in pixel_values.to(device).split(16)])
    return {"": logits.softmax(dim=1).cpu().numpy()}


REFERENCES: dict[str, Callable[[Case, Path, str, Collection[str]], dict[str, np.ndarray]]] = {
    "training": training_references,
    "inference": inference_references,
    "preprocessing": preprocessing_references,
    "augmentation": augmentation_references,
    "prediction": prediction_references,
}
