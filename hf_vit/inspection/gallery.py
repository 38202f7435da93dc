"""Draw all figures of one model into a folder, for `hf-vit inspect MODEL IMAGE...`.

Filters and positions are drawn from the weights. Attention distance is measured on all images; maps are drawn for the
first few. The model runs in float32, whatever the dtype of its weights.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoints.checkpoint import Checkpoint, Options
from ..checkpoints.models import load_for_figures
from ..checkpoints.opening import open_checkpoint
from ..data.images import normalize, preprocess
from ..data.sources import files_of
from ..inference.threads import BATCH_OF_CPU
from ..model.image_geometry_hf_vit import resize_logits
from ..model.image_processing_hf_vit import HFViTImageProcessor
from ..model.image_reading_hf_vit import read_image
from ..system.progress import progress_bar
from ..system.texts import counted, one_line
from .attention import (
    READ_BY,
    attention_distance,
    attention_maps,
    attention_rollout,
    plot_attention_distance,
    uniform_distance,
)
from .drawing import Figure, caption, save
from .facts import facts
from .features import feature_components, plot_token_norms, token_norms
from .filters import patch_filters, plot_filters, stem_filters
from .layers import layer_number
from .maps import plot_attention_maps, plot_feature_components, plot_heads, plot_images, plot_norm_maps
from .masks import plot_masks
from .page import Entry, write_page
from .positions import plot_position_bias, plot_position_similarity, position_bias, position_similarity

ARRAYS, PAGE = "arrays.npz", "index.html"
WITH_MAPS = 8  # number of images whose maps are drawn; for the others, only the attention distance is measured

NOT_DRAWN = {
    "rotary": "Positions are not drawn: rotary positions are not learned. Their effect is part of the attention maps.",
    "none": "Positions are not drawn: the model has none.",
}

READINGS = {
    "predictions": "The most likely label of each image and its probability, or all labels above their thresholds, or "
    "the values of a regression. A label in brackets is the name of the image's folder, if it differs "
    "from the predicted class.",
    "masks": "Each image, and the image with the colours of the classes that are predicted for its pixels.",
    "filters": "The principal components of the filters of the patch projection, with their share of the variance. "
    "Training turns noise into smooth blobs, waves and edges of few colours; together they form a basis for the "
    "content of a patch.",
    "stem": "The filters of the first convolution of the stem, each scaled to its own range around gray. Training "
    "turns noise into edges, waves and blobs of colour.",
    "positions": "Each tile belongs to the patch at its position in the image, which a ring marks, and shows the "
    "cosine similarity of its position embedding with those of all patches. A bright spot around the ring means that "
    "nearby patches have similar embeddings; a bright row and column mean that the model learned the grid.",
    "bias": "Each tile is a head, with the query patch in the centre. The head attends more to orange offsets and "
    "less to purple ones, whatever the patches contain.",
    "attention-distance": "Each dot is a head. Heads near the bottom attend locally, like a convolution with a small "
    "kernel; heads at the dashed line attend as far as uniform attention. Trained models often have both kinds in "
    "their first layers, and mostly far-reaching heads in the last.",
    "attention-rollout": "Attention multiplied through all layers, with half of each token kept by the residual "
    "connection. It shows from which patches information reaches the head of the model, not whether it speaks for or "
    "against a label.",
    "attention": "The attention of one layer, averaged over its heads.",
    "heads": "The attention of every head of one layer, on one scale. Heads specialize on different patches.",
    "features": "Patches of the same colour have similar features, within an image and across images. Objects and "
    "parts that have a colour of their own are separated without supervision.",
    "norm-maps": "The norm of each patch token. Rings mark outliers. Outliers in uninformative regions are a sign "
    "that the model stores global information there because it has no registers.",
    "norms": "Left: all patches of one layer; a second mode far to the right is what registers prevent. Right: the "
    "layer at which it appears.",
}
OUTLIER = "outliers are 3 interquartile ranges above the third quartile"


@dataclass(frozen=True)
class Picture:
    """A figure to save: its file name without suffix, heading, caption with model and data, and how to read it."""

    name: str
    heading: str
    caption: str
    reading: str
    figure: Figure

    def save(self, folder: Path, form: str) -> Path:
        """Write the figure with its caption, and return its path."""
        path = folder / f"{self.name}.{form}"
        caption(self.figure, self.caption)
        save(self.figure, path)
        return path


@dataclass
class Subject:
    """A model to inspect, with the arrays and the notes on skipped parts that are collected while drawing.

    Attributes:
        size: (height, width) of images, pixels.
        layer: Layer of the maps, numbered from 1.
    """

    model: Any
    name: str
    size: tuple[int, int]
    layer: int
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def at_layer(self) -> str:
        return f"layer {self.layer} of {self.model.config.num_hidden_layers}"

    def picture(
        self, name: str, heading: str, text: str, figure: Figure, reading: str | None = None, **arrays: np.ndarray
    ) -> Picture:
        """Return a figure with the model's name in its caption, and keep its arrays."""
        self.arrays |= arrays
        return Picture(name, heading, f"{self.name}, {text}.", READINGS[reading or name], figure)


@dataclass(frozen=True)
class Photos:
    """Images to inspect.

    The first `WITH_MAPS` images are kept as uint8 `[B, C, H, W]` and as model input. The number of images and the
    attention distance are those of all images.
    """

    pixels: np.ndarray
    pixel_values: Tensor
    names: list[str]
    folders: list[str]
    number: int
    distance: np.ndarray
    data: str

    @property
    def shown(self) -> str:
        few = len(self.names)
        which = _images(few) if few == self.number else f"the first {few} of {_images(self.number)}"
        return f"{which} from {self.data}"


def draw(
    source: str,
    folder: str | Path,
    images: Sequence[str] = (),
    options: Options | None = None,
    layer: int = -1,
    form: str = "png",
    with_page: bool = False,
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Draw figures of what a model learned into a folder, and save the arrays of the figures.

    Args:
        source: A file, a folder or a name on the Hub, in any layout.
        folder: Created if needed; files of the same names are replaced.
        images: Files, and folders of images; without any, only the weights are drawn.
        options: Facts that the checkpoint does not contain. With an `image_size`, images are resized to it, and
            learned positions are drawn both as learned and as resampled for it.
        layer: Layer of attention maps, features and norms; number from 1, or negative from the end.
        form: `"png"` or `"svg"`.
        with_page: Whether to write `index.html` with all figures embedded.
        say: Called with a line of text about each part or image that is skipped.

    Returns:
        The paths of the written files.

    Raises:
        ValueError: If there is no such layer or image, or the model does not accept the images.
    """
    options, folder = options or Options(), Path(folder)
    checkpoint = _open_at_own_size(source, options)
    model, processor = load_for_figures(checkpoint, options.image_size)
    size = options.image_size or model.config.image_shape
    subject = Subject(model, name_of(source), size, layer_number(model, layer))
    assert model.config.grid_of(*size)  # raises if it is not a multiple of the patch size
    pictures = _of_weights(subject)
    if images:
        pictures = chain(pictures, _of_images(subject, _read(subject, processor, images)))

    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    with progress_bar(None, "figures", disable=None) as bar:
        for each in pictures:
            entries.append(Entry(each.save(folder, form), each.heading, each.reading, each.caption))
            bar.update()
    for note in subject.notes:
        say(note)
    np.savez_compressed(folder / ARRAYS, **subject.arrays)  # type: ignore[arg-type] # mypy: its flag is no array
    written = [*(entry.path for entry in entries), folder / ARRAYS]
    if with_page:
        write_page(folder / PAGE, f"What {subject.name} learned", facts(checkpoint), entries, subject.notes)
        written.append(folder / PAGE)
    return written


def name_of(source: str) -> str:
    """Return the name of a model in figures: the end of its path, or of its name on the Hub."""
    path = Path(source)
    return _text(path.stem if path.is_file() else path.resolve().name)


def folder_for(source: str) -> str:
    """Return the default name of the folder for figures of a model."""
    return f"{_safe(name_of(source))}-pictures"


def at_one_size(processor: HFViTImageProcessor, size: tuple[int, int]) -> HFViTImageProcessor:
    """Return a copy of an image processor that resizes all images to (height, width)."""
    resizing = HFViTImageProcessor.from_dict({**processor.to_dict(), "do_resize": True, "packing": None})
    resizing.set_output_size(size)
    return resizing


# ------------------------------------------------------------------------------------------------ model and images


def _open_at_own_size(source: str, options: Options) -> Checkpoint:
    """Open a checkpoint with positions as they were learned; the model resamples them for other sizes."""
    try:
        return open_checkpoint(source, replace(options, image_size=None))
    except ValueError:  # a file without a grid needs the size; any other error is raised again
        return open_checkpoint(source, options)


def _read(subject: Subject, processor: HFViTImageProcessor, sources: Sequence[str]) -> Photos:
    """Read images one batch at a time, measure the attention distance of all, and keep the first ones."""
    model, number = subject.model, 0
    files = list(files_of(sources))
    names: list[str] = []
    of_folders: list[str] = []

    def readable() -> Iterator[Tensor]:
        nonlocal number
        for file in files:
            try:
                pixels = preprocess(read_image(file, processor.least_size), processor)
            except (ValueError, OSError) as error:
                subject.notes.append(_text(f"Skipped: {error}"))
                continue
            number += 1
            if len(names) < WITH_MAPS:
                names.append(_text(file.name))
                of_folders.append(_text(file.absolute().parent.name))
            yield pixels

    def values(pixels: Iterable[Tensor]) -> Tensor:
        return normalize(torch.stack(list(pixels)).to(model.device), processor)

    pixels = readable()
    first = list(islice(pixels, WITH_MAPS))
    if not first:
        reason = f" {subject.notes[-1]}" if files else ""
        raise ValueError(
            f"Expected readable images in {', '.join(sources)}, got none ({counted(len(files), 'file')}).{reason}"
        )
    # The attention weights of one head of a batch take at most as much memory as 8 images of 64x64 patches.
    patches = int(np.prod(model.config.grid_of(*subject.size)))
    batch_size = max(1, min(BATCH_OF_CPU, BATCH_OF_CPU * 4096**2 // patches**2))
    everything = chain(first, pixels)
    distance = attention_distance(model, map(values, iter(lambda: list(islice(everything, batch_size)), [])))
    paths = [Path(source).resolve() for source in sources]
    folders = list(dict.fromkeys(_text(path.name if path.is_dir() else path.parent.name) for path in paths))
    data = ", ".join(folders[:2]) + (", ..." if len(folders) > 2 else "")
    shown = torch.stack(first).byte().cpu().numpy()
    return Photos(shown, values(first), names, of_folders, number, distance, data)


def _text(name: str) -> str:
    """Return text on one line; bytes that cannot be decoded, as in some file names, become question marks."""
    return one_line(name.encode("utf-8", "replace").decode("utf-8"))


def _safe(name: str) -> str:
    """Return a part of a file name that is valid on every system."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:40].lower() or "unnamed"


def _images(number: int) -> str:
    return counted(number, "image")


def _by(size: Sequence[int]) -> str:
    return f"{size[0]}x{size[1]}"


# ------------------------------------------------------------------------------------------ figures of the weights


def _of_weights(subject: Subject) -> Iterator[Picture]:
    yield _filters(subject)
    yield from pictures_of_positions(subject)


def pictures_of_positions(subject: Subject) -> Iterator[Picture]:
    """Yield figures of positions as learned and as resampled for `subject.size`, or add a note if there are none."""
    config = subject.model.config
    if config.position_embedding_type in NOT_DRAWN:
        subject.notes.append(NOT_DRAWN[config.position_embedding_type])
        return
    for grid in dict.fromkeys((config.grid_size, config.grid_of(*subject.size))):
        yield _positions(subject, grid)


def _filters(subject: Subject) -> Picture:
    model = subject.model
    if model.config.stem_layers is not None:
        heading, filters = "Filters of the stem's first convolution", stem_filters(model)
        text = f"stem before the patches: {len(filters)} filters of {_by(filters.shape[1:])} pixels"
        figure = plot_filters(filters, title=heading)
        return subject.picture("filters", heading, text, figure, "stem", stem_filters=filters)
    heading, (filters, shares) = "Patch embedding filters", patch_filters(model)
    text = (
        f"patch projection: the first {len(filters)} principal components of its {model.config.hidden_size} filters "
        f"of {_by(filters.shape[1:])} pixels, with their shares of the variance"
    )
    figure = plot_filters(filters, shares, heading)
    return subject.picture("filters", heading, text, figure, patch_filters=filters, patch_filter_shares=shares)


def _positions(subject: Subject, grid: tuple[int, int]) -> Picture:
    config = subject.model.config
    kind, suffix, on_grid = config.position_embedding_type, "", ""
    where = " of layer 1" if config.position_placement == "every_layer" else ""
    text = f"{kind} positions{where} on a grid of {_by(grid)} patches"
    if grid != config.grid_size:
        suffix, on_grid = f"_{_by(grid)}", f", on a grid of {_by(grid)}"
        how = "computed" if kind == "sincos_2d" else f"resampled ({config.position_interpolation})"
        text += f", {how} for images of {_by(subject.size)} pixels"
    name = f"positions{suffix}"
    if kind == "relative":
        heading, bias = f"Bias of relative positions{on_grid}", position_bias(subject.model, subject.layer, grid)
        text += f", added to the attention scores of layer {subject.layer}"
        figure = plot_position_bias(bias, heading)
        return subject.picture(name, heading, text, figure, "bias", **{f"position_bias{suffix}": bias})
    heading, similarity = f"Similarity of position embeddings{on_grid}", position_similarity(subject.model, grid)
    figure = plot_position_similarity(similarity, heading)
    return subject.picture(name, heading, text, figure, "positions", **{f"position_similarity{suffix}": similarity})


# --------------------------------------------------------------------------------------------- figures of images


def _of_images(subject: Subject, photos: Photos) -> Iterator[Picture]:
    subject.arrays |= {"images": photos.pixels, "image_names": np.array(photos.names)}
    if getattr(subject.model, "classifier", None) is not None and subject.model.config.num_labels:
        yield _predictions(subject, photos)
    if hasattr(subject.model, "decode_head"):
        yield _masks(subject, photos)
    yield _distance(subject, photos)
    yield _rollout(subject, photos)
    yield from _attention(subject, photos)
    yield _features(subject, photos)
    yield from _norms(subject, photos)


@torch.inference_mode()
def _predictions(subject: Subject, photos: Photos) -> Picture:
    heading, names = "Predicted labels", subject.model.config.id2label
    logits = subject.model(photos.pixel_values).logits.float().cpu()
    labels = [_answer(subject.model.config, each, folder) for each, folder in zip(logits, photos.folders, strict=True)]
    figure = plot_images(photos.pixels, labels, heading)
    arrays = {"logits": logits.numpy(), "label_names": np.array([names[index] for index in range(len(names))])}
    return subject.picture("predictions", heading, photos.shown, figure, **arrays)


@torch.inference_mode()
def _masks(subject: Subject, photos: Photos) -> Picture:
    heading, names = "Predicted classes of the pixels", list(subject.model.config.id2label.values())
    logits = subject.model(photos.pixel_values).logits
    classes = resize_logits(logits, (photos.pixels.shape[2], photos.pixels.shape[3])).argmax(dim=1).byte().cpu()
    figure = plot_masks(photos.pixels, classes, photos.names, names, heading)
    arrays = {"predicted_masks": classes.numpy(), "label_names": np.array(names)}
    return subject.picture("predictions", heading, photos.shown, figure, "masks", **arrays)


def _answer(config: Any, logits: Tensor, folder: str) -> str:
    """Return a prediction as text, and the true label in brackets if the folder name gives a different one."""
    if config.problem_type == "regression":
        return ", ".join(f"{config.id2label[index]} {value:.4g}" for index, value in enumerate(logits.tolist()))
    if config.problem_type == "multi_label_classification":
        thresholds = torch.tensor(config.thresholds or [0.5] * len(logits))
        chosen = (logits.sigmoid() > thresholds).nonzero().flatten().tolist()
        return ", ".join(config.id2label[index] for index in chosen) or "none"
    share, index = logits.softmax(dim=-1).max(dim=-1)
    label = config.id2label[int(index)]
    is_mistake = folder in config.label2id and folder != label
    return f"{_cut(label)} {share:.0%}" + f" ({_cut(folder)})" * is_mistake


def _cut(name: str, length: int = 12) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"


def _distance(subject: Subject, photos: Photos) -> Picture:
    config, heading = subject.model.config, "Attention distance by layer and head"
    text = (
        f"mean over the patches of {_images(photos.number)} from {photos.data}, at {_by(subject.size)} pixels with "
        f"patches of {_by(config.patch_shape)}"
    )
    uniform = uniform_distance(config.grid_of(*subject.size), config.patch_shape)
    figure = plot_attention_distance(photos.distance, uniform, heading)
    return subject.picture("attention-distance", heading, text, figure, attention_distance=photos.distance)


def _rollout(subject: Subject, photos: Photos) -> Picture:
    config, heading = subject.model.config, "Attention rollout"
    maps = attention_rollout(subject.model, photos.pixel_values)
    viewer = READ_BY[config.pooling]
    text = f"all {config.num_hidden_layers} layers, mean over heads, seen from {viewer}; {photos.shown}"
    figure = plot_attention_maps(photos.pixels, maps, photos.names, heading)
    return subject.picture("attention-rollout", heading, text, figure, attention_rollout=maps)


def _attention(subject: Subject, photos: Photos) -> Iterator[Picture]:
    maps = attention_maps(subject.model, photos.pixel_values, subject.layer)  # [B, A, h, w]
    average = maps.mean(axis=1)
    viewer = "the class token" if subject.model.config.use_cls_token else "the mean of all patches"
    layer, heading = f"{subject.at_layer}, seen from {viewer}", f"Attention of {viewer}"
    figure = plot_attention_maps(photos.pixels, average, photos.names, heading)
    text = f"{layer}; mean over heads; {photos.shown}"
    yield subject.picture("attention", heading, text, figure, attention_maps=maps, attention_map=average)
    for number, (image, of_heads, name) in enumerate(zip(photos.pixels, maps, photos.names, strict=True), start=1):
        file, text = f"heads-{number:02}-{_safe(Path(name).stem)}", f"{layer}; {name} from {photos.data}"
        figure = plot_heads(image, of_heads, name, "Attention by head")
        yield subject.picture(file, f"Attention by head: {name}", text, figure, "heads")


def _features(subject: Subject, photos: Photos) -> Picture:
    heading, is_last = "Features as colours", subject.layer == subject.model.config.num_hidden_layers
    components = feature_components(subject.model, photos.pixel_values, None if is_last else subject.layer)
    text = (
        f"{subject.at_layer}{', after the final LayerNorm' * is_last}: the first three principal components of "
        f"patches as red, green and blue; {photos.shown}"
    )
    figure = plot_feature_components(photos.pixels, components, photos.names, heading)
    return subject.picture("features", heading, text, figure, feature_components=components)


def _norms(subject: Subject, photos: Photos) -> Iterator[Picture]:
    heading, (patches, prefix) = "Norms of patch tokens", token_norms(subject.model, photos.pixel_values)
    text = f"{subject.at_layer}, before any final LayerNorm; {OUTLIER}; {photos.shown}"
    figure = plot_norm_maps(photos.pixels, patches[subject.layer - 1], photos.names, heading)
    yield subject.picture("norm-maps", heading, text, figure, token_norms=patches, prefix_norms=prefix)
    heading, text = "Norms of tokens by layer", f"layer {subject.layer} and all layers; {OUTLIER}; {photos.shown}"
    yield subject.picture("norms", heading, text, plot_token_norms(patches, prefix, subject.layer, heading))
