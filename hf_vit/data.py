"""From a name to batches of pixels: the data, what is done to an image, and which image comes when.

Any source of `datasets` becomes `ImageData`. Images travel as uint8 until they are a batch on the device, where
`normalize` gives what the image processor would. Evaluation sees exactly the processor's pixels; training sees
augmented ones, whose randomness follows from (seed, epoch, index) and from nothing else: neither the number of
workers nor of processes changes it, and a run that resumes needs no state of it.
"""

import hashlib
import math
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Sequence, Value, load_dataset, load_from_disk
from PIL import Image as PILImage
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as tvF

TRAIN_SPLITS = ("train", "training")
EVAL_SPLITS = ("validation", "valid", "val", "test", "testing", "eval")
IMAGE_FILES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")


def seed_of(*parts: int | str) -> int:
    """Return a seed that depends on every part, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


# --------------------------------------------------------------------------------------------------- the source


@dataclass(frozen=True)
class ImageData:
    """Images with their labels: what is learned from, and what is held out.

    `columns` are the names of image and label; `label_names` says what the numbers of the labels stand for.
    """

    name: str
    train: Dataset
    evaluation: Dataset
    columns: tuple[str, str]
    label_names: list[str]
    eval_split: str


def load_data(
    source: str | Path,
    *,
    train_split: str | None = None,
    eval_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    eval_fraction: float = 0.2,
    split_seed: int = 0,
) -> ImageData:
    """Load labelled images, with something held out.

    Args:
        source: `"digits"` (scikit-learn's); a parquet file; a folder of parquet files named by split; what
            `save_to_disk` wrote; a folder of images, one subfolder a class; or a dataset's name on the Hub.
        train_split: Split to learn from; found by its usual name if not given.
        eval_split: Split to hold out. Where there is none, a part of the training split is, evenly by class.
        image_column: Column of images; the only one if not given.
        label_column: Column of labels; the only one of classes, or the one with a usual name, if not given.
        eval_fraction: Share that is held out where there is no split for it.
        split_seed: Of that choice. It is no part of a run's seed: all seeds are measured on the same images.

    Raises:
        ValueError: If the source is nothing of these, or splits or columns cannot be told.
    """
    splits = _open(source)
    train_name = _choose("split", splits, train_split, TRAIN_SPLITS)
    train = splits[train_name]
    image_column = _choose("image_column", _columns(train, Image), image_column, ("image", "img"))
    label_column = _choose(
        "label_column", _columns(train, ClassLabel) or _label_like(train), label_column, ("label", "labels")
    )
    if eval_split is None:
        eval_split = next((name for name in EVAL_SPLITS if name in splits and name != train_name), None)
    elif eval_split not in splits:
        raise ValueError(f"There is no split {eval_split!r} in {source}: it has {', '.join(splits)}.")

    if eval_split is not None:
        train, evaluation = _with_classes([train, splits[eval_split]], label_column)
    else:
        (train,) = _with_classes([train], label_column)
        kept, held_out = split_evenly(train[label_column], eval_fraction, split_seed)
        train, evaluation = train.select(kept), train.select(held_out)
        eval_split = "held out"
    names = train.features[label_column].names
    if len(train) == 0 or len(evaluation) == 0:
        raise ValueError(f"{source} gives {len(train)} images to learn from and {len(evaluation)} to hold out.")
    path = Path(source).expanduser()
    name = path.resolve().stem if path.exists() else str(source)  # a card is no place for the paths of a machine
    return ImageData(name, train, evaluation, (image_column, label_column), names, eval_split)


def split_evenly(labels: list[int], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Return indices to keep and to hold out, in order: `fraction` of every class is held out."""
    if not 0 < fraction < 1:
        raise ValueError(f"eval_fraction is a share between 0 and 1, got {fraction}.")
    generator = torch.Generator().manual_seed(seed_of(seed, "split"))
    classes = torch.tensor(labels)
    held_out: set[int] = set()
    for label in classes.unique():
        members = (classes == label).nonzero().squeeze(1)
        order = torch.randperm(len(members), generator=generator)
        held_out.update(members[order[: round(fraction * len(members))]].tolist())
    return [index for index in range(len(labels)) if index not in held_out], sorted(held_out)


def _open(source: str | Path) -> dict[str, Dataset]:
    """Return the splits of a source by name."""
    path = Path(source).expanduser()
    if str(source) == "digits":
        loaded: Any = _digits()
    elif path.is_file() and path.suffix == ".parquet":
        loaded = load_dataset("parquet", data_files={"train": str(path)})
    elif str(source) and path.is_dir():
        loaded = _open_folder(path)
    elif path.exists() or path.is_absolute() or str(source).count("/") > 1 or not str(source):
        raise ValueError(
            f"Expected data in {str(source)!r}: a folder of images with one subfolder a class, a parquet file or a "
            "folder of them, a dataset's name on the Hub, or 'digits'."
        )
    else:
        loaded = load_dataset(str(source))
    return dict(loaded) if isinstance(loaded, DatasetDict) else {"train": loaded}


def _open_folder(path: Path) -> Any:
    if (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists():
        return load_from_disk(str(path))
    files: dict[str, list[str]] = {}
    for file in sorted([*path.glob("*.parquet"), *path.glob("data/*.parquet")]):
        files.setdefault(file.stem.split("-")[0].split(".")[0], []).append(str(file))
    if files:
        return load_dataset("parquet", data_files=files)
    if not any(file.suffix.lower() in IMAGE_FILES for file in path.rglob("*")):
        raise ValueError(f"{path} holds neither parquet files nor images ({', '.join(IMAGE_FILES)}).")
    return load_dataset("imagefolder", data_dir=str(path))


def _digits() -> Dataset:
    """Return scikit-learn's 1,797 handwritten digits, 8x8 pixels, 16 levels of ink brought to 255."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = [PILImage.fromarray(image) for image in (digits.images * (255 / 16)).round().astype("uint8")]
    features = Features({"image": Image(), "label": ClassLabel(names=[str(name) for name in digits.target_names])})
    return Dataset.from_dict({"image": images, "label": digits.target.tolist()}, features=features)


def _choose(what: str, found: Any, given: str | None, usual: tuple[str, ...]) -> str:
    """Return the given name if it is there, else the usual or only one."""
    names = list(found)
    if given is not None:
        if given in names or not names:
            return given
        raise ValueError(f"{what}={given!r} is not there: choose one of {', '.join(names)}.")
    for name in (*usual, *(names if len(names) == 1 else ())):
        if name in names:
            return name
    raise ValueError(f"Which {what}? Name one of: {', '.join(names) or 'none was found'}.")


def _columns(dataset: Dataset, kind: type) -> list[str]:
    if kind is Image:  # parquet without the features of `datasets` holds images as {bytes, path}
        return [
            name for name, feature in dataset.features.items() if isinstance(feature, Image) or _is_struct(feature)
        ]
    return [name for name, feature in dataset.features.items() if isinstance(feature, kind)]


def _is_struct(feature: Any) -> bool:
    return isinstance(feature, dict) and set(feature) == {"bytes", "path"}


def _label_like(dataset: Dataset) -> list[str]:
    return [name for name, feature in dataset.features.items() if isinstance(feature, Value | Sequence)]


def _with_classes(splits: list[Dataset], column: str) -> list[Dataset]:
    """Give the labels of all splits the same classes, named."""
    for index, split in enumerate(splits):
        images = [name for name in _columns(split, Image) if _is_struct(split.features[name])]
        for name in images:
            splits[index] = splits[index].cast_column(name, Image())
    features = [split.features.get(column) for split in splits]
    if all(isinstance(feature, ClassLabel) and feature.names for feature in features):
        if len({tuple(feature.names) for feature in features}) > 1:
            raise ValueError(f"The splits have different classes in {column!r}: {[f.names for f in features]}.")
        return splits
    values = sorted(
        {value for split in splits for value in split.unique(column)}, key=lambda value: (str(type(value)), value)
    )
    if isinstance(values[0], int):  # numbers are kept as they are
        values = list(range(max(values) + 1))
    names = [str(value) for value in values]
    number = {value: index for index, value in enumerate(values)}
    target = ClassLabel(names=names)
    return [
        split.remove_columns(column)
        .add_column(column, [number[value] for value in split[column]])
        .cast_column(column, target)
        for split in splits
    ]


# ------------------------------------------------------------------------------------------------- augmentation


class SmallAffine(v2.Transform):
    """Turn, shift, zoom and shear a little, by fractions of a pixel: torchvision's RandomAffine shifts by whole ones.

    Ranges fit handwriting: 12 degrees, a tenth of the image, 12 percent, 8 degrees.
    """

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.query_size(flat_inputs)
        angle, down, right, zoom, shear = (torch.rand(5) * 2 - 1).tolist()
        return {
            "angle": 12 * angle,
            "translate": [0.1 * width * right, 0.1 * height * down],
            "scale": 1 + 0.12 * zoom,
            "shear": [8 * shear],
        }

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(tvF.affine, inpt, **params, interpolation=InterpolationMode.BILINEAR)


def _crop_flip(size: tuple[int, int], smallest_crop: float) -> list[v2.Transform]:
    return [v2.RandomResizedCrop(size, scale=(smallest_crop, 1.0), antialias=True), v2.RandomHorizontalFlip()]


# Each takes the size (height, width) and the smallest share of the image that a crop may keep.
AUGMENTATIONS: dict[str, Callable[[tuple[int, int], float], list[v2.Transform]]] = {
    "none": lambda size, crop: [v2.Resize(size)],
    "affine": lambda size, crop: [v2.Resize(size), SmallAffine()],
    "crop_flip": _crop_flip,
    "trivial": lambda size, crop: [*_crop_flip(size, crop), v2.TrivialAugmentWide()],
    "rand": lambda size, crop: [*_crop_flip(size, crop), v2.RandAugment()],
}


def build_augmentation(name: str, size: tuple[int, int], smallest_crop: float) -> v2.Transform:
    """Return what training does to an image, uint8 `[C, H, W]` of any size to `[C, *size]`."""
    if name not in AUGMENTATIONS:
        raise ValueError(f"Unknown augmentation {name!r}: choose one of {', '.join(AUGMENTATIONS)}.")
    return v2.Compose(AUGMENTATIONS[name](size, smallest_crop))


def normalize(pixels: Tensor, processor: Any) -> Tensor:
    """Bring uint8 pixels `[B, C, H, W]` to what `processor` gives, on the device where they are."""
    mean, std = (
        # Values that are alike for three channels also fit the one of a grayscale model.
        torch.tensor(values[:1] if len(set(values)) == 1 else values, device=pixels.device).view(-1, 1, 1)
        / processor.rescale_factor
        for values in (processor.image_mean, processor.image_std)
    )
    return (pixels.float() - mean) / std


# ------------------------------------------------------------------------------------------------------- images


class _Images(torch.utils.data.Dataset):
    """Read images as uint8 `[C, H, W]`, each once if `in_memory`."""

    def __init__(self, dataset: Dataset, columns: tuple[str, str], processor: Any, in_memory: bool) -> None:
        self.images = dataset.select_columns(columns[0])
        self.column = columns[0]
        self.labels: list[int] = dataset[columns[1]][:]
        self.processor = processor
        self.kept: list[Tensor] | None = None
        if in_memory:
            with ThreadPoolExecutor(os.cpu_count()) as threads:  # decoding leaves Python's lock
                self.kept = list(threads.map(self.read, range(len(dataset))))

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> Tensor:
        return self.prepare(self.images[index][self.column])

    def prepare(self, image: PILImage.Image) -> Tensor:
        """Do what is the same at every visit."""
        raise NotImplementedError

    def at(self, index: int) -> Tensor:
        return self.read(index) if self.kept is None else self.kept[index]


class EvaluationImages(_Images):
    """Images as the processor sees them, with their labels."""

    def prepare(self, image: PILImage.Image) -> Tensor:
        outputs = self.processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")
        return outputs["pixel_values"][0]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.at(index), "labels": self.labels[index]}


class TrainingImages(_Images):
    """Augmented images with their labels, by (epoch, index).

    Args:
        augmentation: Of a uint8 image `[C, H, W]`; draws from torch's generator.
        seed: Of the run.
        shorter_side: Larger images are reduced to this first, pixels; what is kept in memory is then smaller.
    """

    def __init__(
        self,
        dataset: Dataset,
        columns: tuple[str, str],
        processor: Any,
        in_memory: bool,
        augmentation: Callable[[Tensor], Tensor],
        seed: int,
        shorter_side: int | None = None,
    ) -> None:
        self.augmentation = augmentation
        self.seed = seed
        self.shorter_side = shorter_side
        super().__init__(dataset, columns, processor, in_memory)

    def prepare(self, image: PILImage.Image) -> Tensor:
        processor = self.processor
        image = processor.process_image(
            image, do_convert_rgb=processor.do_convert_rgb, do_grayscale=processor.do_grayscale
        )
        pixels = tvF.pil_to_tensor(image) if isinstance(image, PILImage.Image) else image
        if self.shorter_side is not None and min(pixels.shape[-2:]) > self.shorter_side:
            pixels = tvF.resize(pixels, [self.shorter_side], antialias=True)
        return pixels.contiguous()

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        state = torch.get_rng_state()
        try:
            torch.default_generator.manual_seed(seed_of(self.seed, epoch, index))
            return {"pixel_values": self.augmentation(self.at(index)), "labels": self.labels[index]}
        finally:
            torch.set_rng_state(state)


# -------------------------------------------------------------------------------------------------------- order


class TrainingOrder(Sampler[list[tuple[int, int]]]):
    """Say which images belong to which step, for one process: batches of (epoch, index).

    An epoch is a permutation that follows from (seed, epoch), cut into batches; what is left over waits for another
    epoch. So a step alone says where a run stands, and `first_step` is all that it takes to go on.

    Args:
        length: Number of images.
        batch_size: Images a step, over all processes and accumulated parts.
        parts: (accumulated parts a step, number of processes, this process).
    """

    def __init__(
        self, length: int, batch_size: int, seed: int, first_step: int, last_step: int, parts: tuple[int, int, int]
    ) -> None:
        accumulated, processes, _ = parts
        if batch_size > length:
            raise ValueError(f"batch_size={batch_size} is more than the {length} training images: make it smaller.")
        if batch_size % (accumulated * processes):
            raise ValueError(
                f"batch_size={batch_size} must be divisible by accumulation_steps * processes = "
                f"{accumulated} * {processes}."
            )
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.first_step, self.last_step, self.parts = first_step, last_step, parts

    @property
    def steps_per_epoch(self) -> int:
        return self.length // self.batch_size

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * self.parts[0]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        accumulated, processes, process = self.parts
        order_of, order = -1, torch.empty(0)
        for step in range(self.first_step, self.last_step):
            epoch, offset = divmod(step, self.steps_per_epoch)
            if epoch != order_of:
                generator = torch.Generator().manual_seed(seed_of(self.seed, "order", epoch))
                order_of, order = epoch, torch.randperm(self.length, generator=generator)
            batch = order[offset * self.batch_size : (offset + 1) * self.batch_size]
            for part in batch.chunk(accumulated):
                yield [(epoch, index) for index in part.chunk(processes)[process].tolist()]


def training_loader(images: TrainingImages, order: TrainingOrder, num_workers: int) -> DataLoader:
    """Load the batches of `order`, in order."""
    return DataLoader(images, batch_sampler=order, **_loader_options(num_workers))


def evaluation_loader(images: EvaluationImages, batch_size: int, num_workers: int) -> DataLoader:
    """Load every image once; the last batch may be smaller."""
    # Kept images need no workers.
    return DataLoader(images, batch_size=batch_size, **_loader_options(0 if images.kept is not None else num_workers))


def _loader_options(num_workers: int) -> dict[str, Any]:
    return {
        "num_workers": num_workers,
        "generator": torch.Generator(),  # else every loader moves torch's own generator on
        "pin_memory": torch.cuda.is_available(),
        "worker_init_fn": _leave_signals_to_parent if num_workers else None,
    }


def _leave_signals_to_parent(worker: int) -> None:
    # Ctrl-C reaches the whole process group; the parent finishes its step and then ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def steps_of(epochs: float, length: int, batch_size: int) -> int:
    """Return the number of steps in `epochs`, at least one."""
    return max(1, math.ceil(epochs * (length // batch_size)))
