"""All pictures of one model in a folder: what `hf-vit inspect MODEL IMAGE...` draws.

Filters and positions are of the weights alone. The rest is of images: attention distance of all of them, maps of the
first few. The model runs in float32, whatever its weights are stored in.
"""

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoints import Checkpoint, Options, open_checkpoint
from ..data.images import normalize, preprocess
from ..data.sources import files_of
from ..inference.threads import BATCH_OF_CPU
from ..model import model_class
from ..model.image_processing_hf_vit import HFViTImageProcessor
from ..model.image_reading_hf_vit import read_image
from ..system.texts import one_line
from .attention import (
    READ_BY,
    attention_distance,
    attention_maps,
    attention_rollout,
    plot_attention_distance,
    uniform_distance,
)
from .drawing import caption, save
from .features import feature_components, plot_token_norms, token_norms
from .filters import patch_filters, plot_filters, stem_filters
from .layers import layer_number
from .maps import plot_attention_maps, plot_feature_components, plot_heads, plot_norm_maps
from .page import Entry, write_page
from .positions import plot_position_bias, plot_position_similarity, position_bias, position_similarity

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ARRAYS, PAGE = "arrays.npz", "index.html"
WITH_MAPS = 8  # images; of the others attention distance alone is measured

NOT_DRAWN = {
    "rotary": "Positions are left out: rotary ones are not learned, and what they do is in the maps of attention.",
    "none": "Positions are left out: the model has none.",
}

READINGS = {
    "filters": "The directions in which the filters of the patch projection differ most, the strongest first, with "
    "their share of the variance. Training turns noise into smooth blobs, waves and edges of few colours: together "
    "they describe what is inside a patch.",
    "stem": "The filters of the convolution that sees the pixels first, each in its own range around gray. Training "
    "turns noise into edges, waves and blobs of colour.",
    "positions": "Each tile belongs to the patch at its place in the image, marked by a ring, and shows how alike its "
    "position embedding is to those of all others. A bright spot around the ring means that the model knows what is "
    "near; a cross of a row and a column that it knows the grid.",
    "bias": "Each tile is a head, and its centre the patch that looks. Orange is what lies where the head looks more "
    "for its place alone, purple where it looks less.",
    "distance": "Each dot is a head. Low ones look at what is near, as a convolution with a small kernel does; those "
    "at the dashed line look as far as if they looked at everything alike. Trained models often have both kinds in "
    "their first layers, and far-looking heads in the last.",
    "rollout": "Attention multiplied through all layers, with half of each token kept by the residual connection: "
    "which patches reach what the head reads. It says where information comes from, not whether it speaks for or "
    "against an answer.",
    "seen": "Where one layer looks, averaged over its heads.",
    "heads": "The same for every head alone, all in one scale: heads share the work.",
    "features": "Patches of one colour have like features, within an image and across all images here. Objects and "
    "their parts that come out in one colour are what the model tells apart without being asked.",
    "norm_maps": "How long the token of each patch is. Rings mark outliers: bright patches where the image shows "
    "nothing of interest are a sign that the model stores what is global in them, for want of registers.",
    "norms": "Left, all patches of one layer: a second hill far to the right is what registers were invented for. "
    "Right, where in the depth it comes up.",
}


@dataclass(frozen=True)
class Picture:
    """A picture to save: the name of its file without ending, what it is, of what and which data, how to read it."""

    name: str
    heading: str
    caption: str
    reading: str
    figure: "Figure"

    def save(self, folder: Path, form: str) -> Path:
        """Write it with its caption, and return its file."""
        path = folder / f"{self.name}.{form}"
        caption(self.figure, self.caption)
        with warnings.catch_warnings():  # letters that the font lacks are drawn as boxes
            warnings.filterwarnings("ignore", message="Glyph")
            save(self.figure, path)
        return path


@dataclass
class Subject:
    """A model that is looked at, and what was found: arrays by their name, and sentences about what was left out.

    Attributes:
        size: (height, width) of images, pixels.
        layer: Of maps, numbered from 1.
    """

    model: Any
    name: str
    size: tuple[int, int]
    layer: int
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def of_layer(self) -> str:
        return f"{self.name}, behind layer {self.layer} of {self.model.config.num_hidden_layers}"

    def keep(self, **arrays: np.ndarray) -> None:
        """Keep arrays by their names."""
        self.arrays.update(arrays)


@dataclass(frozen=True)
class Photos:
    """Images that were read: those with maps as uint8 `[B, C, H, W]` and as the model takes them, and of how many."""

    pixels: np.ndarray
    pixel_values: Tensor
    names: list[str]
    number: int
    distance: np.ndarray
    data: str

    @property
    def shown(self) -> str:
        few = len(self.names)
        which = f"{_images(few)}" if few == self.number else f"the first {few} of {_images(self.number)}"
        return f"{which} of {self.data}"


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
    """Draw what a model learned, into a folder, and write the arrays behind the pictures beside them.

    Args:
        source: A file, a folder or a name on the Hub, in any layout.
        folder: Made if need be; files of the same names are replaced.
        images: Files, and folders of them; without, what the weights alone show is drawn.
        options: What is to be said of the checkpoint. With an `image_size`, images are brought to it, and learned
            positions are drawn as they were learned and as they are resampled for it.
        layer: Of maps of attention, features and norms; number from 1, or negative from the end.
        form: `"png"` or `"svg"`.
        with_page: Whether to write `index.html` with all pictures inside.
        say: Takes a line about what is left out.

    Returns:
        The files that were written.

    Raises:
        ValueError: If there is no such layer or image, or the model does not take such images.
    """
    options, folder = options or Options(), Path(folder)
    checkpoint = _at_its_own_size(source, options)
    model = _model_of(checkpoint)
    subject = Subject(
        model, name_of(source), options.image_size or model.config.image_shape, layer_number(model, layer)
    )
    assert model.config.grid_of(*subject.size)  # raises if the patch does not divide it
    photos = _read(subject, _processor_of(checkpoint, subject.size), images) if images else None

    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for picture in chain(_of_weights(subject), () if photos is None else _of_images(subject, photos)):
        entries.append(Entry(picture.save(folder, form), picture.heading, picture.reading, picture.caption))
    for note in subject.notes:
        say(note)
    np.savez_compressed(folder / ARRAYS, **subject.arrays)  # type: ignore[arg-type] # mypy: its flag is no array
    written = [*(entry.path for entry in entries), folder / ARRAYS]
    if with_page:
        write_page(folder / PAGE, f"What {subject.name} learned", checkpoint.describe(), entries, subject.notes)
        written.append(folder / PAGE)
    return written


def name_of(source: str) -> str:
    """Return what a model is called in pictures: the end of its path, or of its name on the Hub."""
    path = Path(source)
    return _text(path.stem if path.is_file() else path.resolve().name)


def folder_for(source: str) -> str:
    """Return the name of a folder for pictures of a model."""
    return f"{_safe(name_of(source))}-pictures"


# ------------------------------------------------------------------------------------------------ model and images


def _at_its_own_size(source: str, options: Options) -> Checkpoint:
    """Open a checkpoint with positions as they were learned: the model brings them to other sizes by itself."""
    try:
        return open_checkpoint(source, replace(options, image_size=None))
    except ValueError:  # of a file without a grid the size is a fact, and anything else is said again
        return open_checkpoint(source, options)


def _model_of(checkpoint: Checkpoint) -> Any:
    with torch.device("meta"):
        model = model_class(checkpoint.architecture)(checkpoint.config)
    model.load_state_dict({name: weight.float() for name, weight in checkpoint.weights()}, assign=True)
    return model.eval().to(torch.accelerator.current_accelerator(True) or "cpu")


def _processor_of(checkpoint: Checkpoint, size: tuple[int, int]) -> HFViTImageProcessor:
    stated = {**checkpoint.processor().to_dict(), "do_resize": True, "packing": None}  # all images to one size
    processor = HFViTImageProcessor.from_dict(stated)
    processor.set_output_size(size)
    return processor


def _read(subject: Subject, processor: HFViTImageProcessor, sources: Sequence[str]) -> Photos:
    """Read images one batch at a time, measure the attention distance of all, and keep the first."""
    model, device, number = subject.model, subject.model.device, 0
    files = list(files_of(sources))
    names: list[str] = []

    def readable() -> Iterator[Tensor]:
        nonlocal number
        for file in files:
            try:
                pixels = preprocess(read_image(file, processor.least_size), processor)
            except (ValueError, OSError) as error:
                subject.notes.append(_text(f"Left out: {error}"))
                continue
            number += 1
            if len(names) < WITH_MAPS:
                names.append(_text(file.name))
            yield pixels

    def values(pixels: Iterable[Tensor]) -> Tensor:
        return normalize(torch.stack(list(pixels)).to(device), processor)

    pixels = readable()
    first = list(islice(pixels, WITH_MAPS))
    if not first:
        raise ValueError(f"There is no image that can be read in {', '.join(sources)} ({len(files)} files).")
    # The weights of one head of a batch take as much memory as 8 images of 64x64 patches, at most.
    patches = int(np.prod(model.config.grid_of(*subject.size)))
    at_a_time = max(1, min(BATCH_OF_CPU, BATCH_OF_CPU * 4096**2 // patches**2))
    everything = chain(first, pixels)
    batches = iter(lambda: list(islice(everything, at_a_time)), [])
    distance = attention_distance(model, map(values, batches))
    folders = list(dict.fromkeys(_folder_of(source) for source in sources))
    data = ", ".join(folders[:2]) + (", ..." if len(folders) > 2 else "")
    return Photos(torch.stack(first).cpu().numpy(), values(first), names, number, distance, data)


def _folder_of(source: str) -> str:
    path = Path(source).resolve()
    return _text(path.name if path.is_dir() else path.parent.name)


def _text(name: str | Path) -> str:
    """Return a name as text of one line: of bytes that are none, as file systems allow them, a question mark each."""
    return one_line(str(name).encode("utf-8", "replace").decode("utf-8"))


def _safe(name: str) -> str:
    """Return a part of a file's name that is one on every system."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:40].lower() or "unnamed"


def _images(number: int) -> str:
    return "1 image" if number == 1 else f"{number:,} images"


def _by(size: Sequence[int]) -> str:
    return f"{size[0]}x{size[1]}"


# ------------------------------------------------------------------------------------------ what the weights show


def _of_weights(subject: Subject) -> Iterator[Picture]:
    yield _filters(subject)
    yield from pictures_of_positions(subject)


def pictures_of_positions(subject: Subject) -> Iterator[Picture]:
    """Yield what positions learned, and as they are for `subject.size`; where nothing is drawn, a note says why."""
    kind = subject.model.config.position_embedding_type
    if kind in NOT_DRAWN:
        subject.notes.append(NOT_DRAWN[kind])
        return
    own, asked = subject.model.config.grid_size, subject.model.config.grid_of(*subject.size)
    yield from (DRAW_POSITIONS[kind](subject, grid, grid != own) for grid in dict.fromkeys((own, asked)))


def _filters(subject: Subject) -> Picture:
    model, name = subject.model, subject.name
    if model.config.stem_layers is not None:
        filters = stem_filters(model)
        subject.keep(stem_filters=filters)
        heading = "Filters of the stem's first convolution"
        said = f"{name}, the stem before the patches: {len(filters)} filters of {_by(filters.shape[1:])} pixels."
        return Picture("filters", heading, said, READINGS["stem"], plot_filters(filters, title=heading))
    filters, shares = patch_filters(model)
    subject.keep(patch_filters=filters, patch_filter_shares=shares)
    heading = "Patch embedding filters"
    said = (
        f"{name}, the projection of patches: the first {len(filters)} principal components of its "
        f"{model.config.hidden_size} filters of {_by(filters.shape[1:])} pixels, with their shares of the variance."
    )
    return Picture("filters", heading, said, READINGS["filters"], plot_filters(filters, shares, heading))


def _similarity(subject: Subject, grid: tuple[int, int], is_resampled: bool) -> Picture:
    similarity = position_similarity(subject.model, grid)
    name, said = _of_grid(subject, grid, is_resampled)
    subject.keep(**{f"position_similarity{name}": similarity})
    heading = "Similarity of position embeddings" + f", on a grid of {_by(grid)}" * is_resampled
    figure = plot_position_similarity(similarity, heading)
    return Picture(f"positions{name}", heading, said, READINGS["positions"], figure)


def _bias(subject: Subject, grid: tuple[int, int], is_resampled: bool) -> Picture:
    bias = position_bias(subject.model, subject.layer, grid)
    name, said = _of_grid(subject, grid, is_resampled)
    subject.keep(**{f"position_bias{name}": bias})
    heading = "Bias of relative positions" + f", on a grid of {_by(grid)}" * is_resampled
    said = f"{said} What layer {subject.layer} adds to the scores of attention."
    return Picture(f"positions{name}", heading, said, READINGS["bias"], plot_position_bias(bias, heading))


DRAW_POSITIONS: dict[str, Callable[[Subject, tuple[int, int], bool], Picture]] = {
    "learned": _similarity,
    "learned_2d": _similarity,
    "sincos_2d": _similarity,
    "relative": _bias,
}


def _of_grid(subject: Subject, grid: tuple[int, int], is_resampled: bool) -> tuple[str, str]:
    config = subject.model.config
    where = ", those of layer 1," if config.position_placement == "every_layer" else ""
    said = f"{subject.name}, {config.position_embedding_type} positions{where} on a grid of {_by(grid)} patches."
    if not is_resampled:
        return "", said
    how = "computed" if config.position_embedding_type == "sincos_2d" else f"resampled {config.position_interpolation}"
    return f"_{_by(grid)}", f"{said[:-1]}, {how} for images of {_by(subject.size)} pixels."


# --------------------------------------------------------------------------------------------- what images show


def _of_images(subject: Subject, photos: Photos) -> Iterator[Picture]:
    subject.keep(images=photos.pixels, image_names=np.array(photos.names))
    yield _distance(subject, photos)
    yield _rollout(subject, photos)
    yield from _attention(subject, photos)
    yield _features(subject, photos)
    yield from _norms(subject, photos)


def _distance(subject: Subject, photos: Photos) -> Picture:
    subject.keep(attention_distance=photos.distance)
    config = subject.model.config
    uniform = uniform_distance(config.grid_of(*subject.size), config.patch_shape)
    heading = "Attention distance by layer and head"
    said = (
        f"{subject.name}, mean over the patches of {_images(photos.number)} of {photos.data}, at {_by(subject.size)} "
        f"pixels in patches of {_by(config.patch_shape)}."
    )
    figure = plot_attention_distance(photos.distance, uniform, heading)
    return Picture("attention-distance", heading, said, READINGS["distance"], figure)


def _rollout(subject: Subject, photos: Photos) -> Picture:
    maps = attention_rollout(subject.model, photos.pixel_values)
    subject.keep(attention_rollout=maps)
    heading = "Attention rollout"
    said = (
        f"{subject.name}, all {subject.model.config.num_hidden_layers} layers, heads averaged, seen from "
        f"{READ_BY[subject.model.config.pooling]}; {photos.shown}."
    )
    figure = plot_attention_maps(photos.pixels, maps, photos.names, heading)
    return Picture("attention-rollout", heading, said, READINGS["rollout"], figure)


def _attention(subject: Subject, photos: Photos) -> Iterator[Picture]:
    maps = attention_maps(subject.model, photos.pixel_values, subject.layer)  # [B, A, h, w]
    average = maps.mean(axis=1)
    subject.keep(attention_maps=maps, attention_map=average)
    has_token = subject.model.config.use_cls_token
    viewer = "the class token" if has_token else "all patches, averaged, since there is no class token"
    layer = f"{subject.name}, layer {subject.layer} of {subject.model.config.num_hidden_layers}, seen from {viewer}"
    heading = f"Attention of {'the class token' if has_token else 'the patches'}"
    figure = plot_attention_maps(photos.pixels, average, photos.names, heading)
    yield Picture("attention", heading, f"{layer}; heads averaged; {photos.shown}.", READINGS["seen"], figure)
    for place, (image, of_heads, name) in enumerate(zip(photos.pixels, maps, photos.names, strict=True), start=1):
        file = f"heads-{place:02}-{_safe(Path(name).stem)}"
        figure = plot_heads(image, of_heads, name, "Attention by head")
        said = f"{layer}; {name} of {photos.data}."
        yield Picture(file, f"Attention by head: {name}", said, READINGS["heads"], figure)


def _features(subject: Subject, photos: Photos) -> Picture:
    is_last = subject.layer == subject.model.config.num_hidden_layers
    components = feature_components(subject.model, photos.pixel_values, None if is_last else subject.layer)
    subject.keep(feature_components=components)
    heading = "Features as colours"
    behind = f"{subject.of_layer}{' and the final LayerNorm' * is_last}"
    said = f"{behind}: the first three principal components of patches as red, green and blue; {photos.shown}."
    figure = plot_feature_components(photos.pixels, components, photos.names, heading)
    return Picture("features", heading, said, READINGS["features"], figure)


def _norms(subject: Subject, photos: Photos) -> Iterator[Picture]:
    patches, prefix = token_norms(subject.model, photos.pixel_values)
    subject.keep(token_norms=patches, prefix_norms=prefix)
    heading = "Norms of patches"
    fence = "an outlier is 3 interquartile ranges above the third quartile"
    said = f"{subject.of_layer}, before any final LayerNorm; {fence}; {photos.shown}."
    figure = plot_norm_maps(photos.pixels, patches[subject.layer - 1], photos.names, heading)
    yield Picture("norm-maps", heading, said, READINGS["norm_maps"], figure)
    heading = "Norms of tokens, by layer"
    said = f"{subject.name}, layer {subject.layer} and all layers; {fence}; {photos.shown}."
    figure = plot_token_norms(patches, prefix, subject.layer, heading)
    yield Picture("norms", heading, said, READINGS["norms"], figure)
