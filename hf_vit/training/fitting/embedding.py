"""Features of every image from a frozen encoder, several poolings at once, cached by content and model.

The cache is a folder per encoder, in which each file has the features of up to `SHARD` images. A file is complete or
absent, so an interrupted pass continues where it stopped.
"""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from ...checkpoints.checkpoint import Options, usual_size
from ...checkpoints.models import load
from ...checkpoints.opening import open_checkpoint
from ...data.audit import Contents, content_digest, read_contents
from ...data.channels import Channels, adapt_processor
from ...data.dense import stop_cropping
from ...data.images import NO_IMAGE, normalize, preprocess, read_stored
from ...data.opening import as_stored
from ...inference.digest import digest_of
from ...inference.optimize import inference_precision, optimize_for_inference
from ...inference.threads import default_batch_size, on_every_core
from ...model.pooling_hf_vit import POOLINGS
from ...model.validation_hf_vit import OF_HEAD
from ...system.machine import cores
from ...system.places import cache_folder
from ...system.progress import progress_bar

SHARD = 512  # images per file of the cache
VERSION = 1  # of the cache; a change of what features are makes older files unused
JOINED = "cls_and_mean"
PHOTOGRAPHS = Channels()
# Config fields that do not change features, so they do not make cached ones unused.
NOT_OF_THE_ENCODER = (
    *("transformers_version", "_name_or_path", "architectures", "auto_map", "dtype", "id2label", "label2id"),
    *("problem_type", *OF_HEAD, "zero_init_head", "pooling", "task_heads"),
)


def default_cache() -> Path:
    """Return the folder of cached features, inside the cache folder of Hugging Face."""
    return cache_folder() / "features"


class Encoder:
    """A frozen encoder that computes several poolings in one forward.

    Attributes:
        source, image_size: Where it was loaded from, and the (height, width) of its images in pixels.
        processor: Its image processor.
        poolings: Names of the poolings, as in the config field `pooling`.
        fingerprint: Identifies weights, image size, preprocessing and precision.
    """

    def __init__(self, model: Any, processor: Any, source: str, precision: str = "auto") -> None:
        encoder = model.base_model
        self.source, self.processor, self.config = source, processor, encoder.config
        self.image_size = encoder.config.image_shape
        self.device = torch.device(torch.accelerator.current_accelerator(True) or "cpu")
        self.precision = inference_precision(precision)
        self.stored_poolings, self.poolings = _poolings_of(self.config)
        self.fingerprint = self._fingerprint(encoder)
        encoder.pooler.pre_logits, encoder.pooler.activation = nn.Identity(), nn.Identity()
        self.pooler = encoder.pooler.to(self.device)
        self.model = optimize_for_inference(encoder.to(self.device), self.precision)

    @classmethod
    def from_pretrained(
        cls,
        source: str,
        image_size: tuple[int, int] | None = None,
        precision: str = "auto",
        channels: Channels = PHOTOGRAPHS,
        is_cropping: bool = True,
    ) -> Self:
        """Load a checkpoint in any layout.

        Args:
            image_size: (height, width) in pixels; by default that of its image processor.
            precision: As for `optimize_for_inference`.
            channels: What the images are; the patch projection is adapted to their number of channels.
            is_cropping: Whether the image processor may crop images; otherwise it resizes complete ones.
        """
        number = channels.num_channels if channels.num_channels != 3 else None
        size = image_size or usual_size(open_checkpoint(source))
        model, processor = load(source, size, open_checkpoint(source, Options(image_size=size, num_channels=number)))
        adapt_processor(processor, channels, model.config.num_channels)
        if not is_cropping:
            stop_cropping(processor)
        return cls(model, processor, source, precision)

    def _fingerprint(self, encoder: nn.Module) -> str:
        config = {name: value for name, value in self.config.to_dict().items() if name not in NOT_OF_THE_ENCODER}
        facts = [VERSION, config, self.processor.to_dict(), self.precision, self.stored_poolings]
        return digest_of(encoder, facts, size=8)

    def __call__(self, pixels: Tensor) -> list[Tensor]:
        """Return the stored poolings of uint8 images `[B, C, H, W]`, each float32 on the CPU."""
        pixel_values = normalize(pixels.to(self.device), self.processor)
        hidden_states = self.model(pixel_values).last_hidden_state.float()  # [B, T, D]
        return [self._pooled(name, hidden_states).cpu() for name in self.stored_poolings]

    def _pooled(self, name: str, hidden_states: Tensor) -> Tensor:
        if name == self.config.pooling:
            return self.pooler(hidden_states)
        return self.pooler.layernorm(POOLINGS[name](self.config)(hidden_states))


def _poolings_of(config: Any) -> tuple[list[str], list[str]]:
    """Return the poolings to compute, and all that follow from them, the model's own first."""
    # The head for the two tokens of DeiT is not one linear layer.
    stored = [] if config.pooling == "cls_and_distillation" else [config.pooling]
    # A norm after the pooling fits every pooling of the same width.
    if config.final_layernorm == "tokens" or config.pooled_width == config.hidden_size:
        stored += ["cls"] * config.use_cls_token + ["mean"]
    stored = list(dict.fromkeys(stored))
    can_join = {"cls", "mean"} <= set(stored) and config.final_layernorm == "tokens"
    return stored, [*stored, JOINED] if can_join and JOINED not in stored else stored


@dataclass
class Embeddings:
    """Features of the readable images of a split.

    Attributes:
        rows: Positions of these images in the split.
        features: By name of the pooling, float32 `[N, D]`.
        contents: Digests and names of all images of the split.
        computed: Number of images that were not in the cache.
        seconds: Time of the pass.
    """

    rows: list[int]
    features: dict[str, Tensor]
    contents: Contents
    computed: int
    seconds: float


def embed(
    encoder: Encoder,
    split: Any,
    columns: tuple[str, str | None],
    cache: Path | None = None,
    progress: Callable[[Any, int], Any] = lambda batches, number: batches,
    contents: Contents | None = None,
) -> Embeddings:
    """Compute the features of every image once, on every core or the GPU.

    Args:
        encoder: The frozen encoder.
        split, columns: `train` or `evaluation` of an `ImageData`, and its `columns`.
        cache: Folder of cached features; `default_cache()` if not given.
        progress: Wraps the iterator over batches, given their number, to show a progress bar.
        contents: Result of `read_contents` for the split, if it exists already.
    """
    began = time.perf_counter()
    folder = (cache or default_cache()) / encoder.fingerprint
    rows = as_stored(split, columns)
    read = partial(_read, encoder, rows, columns[0])
    contents = contents or read_contents(split, columns, decode=False)
    digests = contents.digests
    known = _read_shards(folder, {digest for digest in digests if digest})
    first = {digest: index for index, digest in reversed(list(enumerate(digests))) if digest}
    missing = [index for digest, index in first.items() if digest not in known]
    missing.sort()
    new: dict[str, list[np.ndarray]] = {}
    try:
        for found in progress(_features(encoder, read, missing), len(missing)):
            new.update((str(digests[index]), features) for index, features in found)
            if len(new) >= SHARD:
                known.update(new)
                _write_shard(folder, encoder, new)
                new = {}
    finally:  # a signal, too, keeps what was computed
        known.update(new)
        _write_shard(folder, encoder, new)
    digests = [digest if digest in known else None for digest in digests]
    readable = [index for index, digest in enumerate(digests) if digest]
    table = [known[str(digests[index])] for index in readable]
    features = {
        name: torch.from_numpy(np.stack([row[number] for row in table])) if table else torch.empty(0, 0)
        for number, name in enumerate(encoder.stored_poolings)
    }
    if JOINED in encoder.poolings and JOINED not in features:
        features[JOINED] = torch.cat([features["cls"], features["mean"]], dim=-1)
    contents = replace(contents, digests=digests)
    return Embeddings(readable, features, contents, len(missing), time.perf_counter() - began)


def with_bar(batches: Any, number: int) -> Any:
    """Yield batches of features, and show a progress bar of `number` images; without a bar if it is 0."""
    with progress_bar(number, "images", what="Features", disable=None if number else True) as bar:
        for batch in batches:
            bar.update(len(batch))
            yield batch


def _read(encoder: Encoder, rows: Any, column: str, index: int) -> Tensor | None:
    """Return an image as the processor makes it, or `None` if it cannot be read."""
    try:
        image = read_stored(rows[index][column] or NO_IMAGE, encoder.processor.least_size)
        return preprocess(image, encoder.processor)
    except Exception:
        return None


def _features(
    encoder: Encoder, read: Callable[[int], Tensor | None], missing: list[int]
) -> Iterator[list[tuple[int, list[np.ndarray]]]]:
    """Yield positions and features of readable images, a batch at a time."""
    is_cpu = encoder.device.type == "cpu"
    size = default_batch_size(encoder.device.type)
    size = max(1, min(size, -(-len(missing) // cores()))) if is_cpu else size

    @torch.inference_mode()
    def forward(batch: tuple[list[int], list[Tensor]]) -> list[tuple[int, list[np.ndarray]]]:
        indices, images = batch
        if not images:
            return []
        columns = [column.numpy() for column in encoder(torch.stack(images))]
        return [(index, [column[row] for column in columns]) for row, index in enumerate(indices)]

    def decode(indices: list[int]) -> tuple[list[int], list[Tensor]]:
        images = [(index, image) for index in indices if (image := read(index)) is not None]
        return [index for index, _ in images], [image for _, image in images]

    def decode_and_forward(indices: list[int]) -> list[tuple[int, list[np.ndarray]]]:
        return forward(decode(indices))

    if is_cpu:
        yield from on_every_core(decode_and_forward, _batches(missing, size))
    else:
        yield from map(forward, on_every_core(decode, _batches(missing, size)))


def _batches(indices: list[int], size: int) -> Iterator[list[int]]:
    return (indices[start : start + size] for start in range(0, len(indices), size))


def _read_shards(folder: Path, wanted: set[str]) -> dict[str, list[np.ndarray]]:
    found: dict[str, list[np.ndarray]] = {}
    for path in sorted(folder.glob("*.npz")):
        try:
            with np.load(path, allow_pickle=False) as shard:
                digests = shard["digests"].tolist()
                columns = [shard[f"features{number}"] for number in range(len(shard.files) - 1)]
        except Exception:  # corrupt: computed again
            path.unlink(missing_ok=True)
            continue
        for row, digest in enumerate(digests):
            if digest in wanted:
                found[digest] = [column[row] for column in columns]
    return found


def _write_shard(folder: Path, encoder: Encoder, rows: dict[str, list[np.ndarray]]) -> None:
    if not rows:
        return
    folder.mkdir(parents=True, exist_ok=True)
    digests = np.array(list(rows))
    columns = {
        f"features{number}": np.stack([features[number] for features in rows.values()])
        for number in range(len(encoder.stored_poolings))
    }
    unfinished = folder / f".{os.getpid()}.unfinished"
    with unfinished.open("wb") as file:
        np.savez(file, allow_pickle=False, digests=digests, **columns)
    unfinished.replace(folder / f"{content_digest(''.join(rows).encode())}.npz")


def logits_of(
    model: Any, processor: Any, split: Any, columns: tuple[str, str | None], precision: str = "auto"
) -> Tensor:
    """Return the logits of a classifier for every image of a split, float32 `[N, num_labels]`."""
    device = torch.device(torch.accelerator.current_accelerator(True) or "cpu")
    optimized = optimize_for_inference(model.to(device), precision)
    rows = as_stored(split, columns)

    @torch.inference_mode()
    def forward(pixels: Tensor) -> Tensor:
        return optimized(normalize(pixels.to(device), processor)).logits.float().cpu()

    def decode(indices: list[int]) -> Tensor:
        images = (read_stored(rows[index][columns[0]], processor.least_size) for index in indices)
        return torch.stack([preprocess(image, processor) for image in images])

    batches = _batches(list(range(len(rows))), default_batch_size(device.type))
    if device.type == "cpu":
        return torch.cat(list(on_every_core(lambda indices: forward(decode(indices)), batches)))
    return torch.cat([forward(pixels) for pixels in on_every_core(decode, batches)])
