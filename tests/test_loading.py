"""Which image comes when, and as what: orders of tables and streams, workers, processes, images that are broken."""

import io
import pickle
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from PIL import ImageOps
from tiny_run import colored_dataset

from hf_vit import HFViTImageProcessor, HFViTImageProcessorPil
from hf_vit.data import cache
from hf_vit.data.augmentation import build_augmentation
from hf_vit.data.images import EvaluationImages, TrainingImages, Visit, normalize
from hf_vit.data.labelled import load_data
from hf_vit.data.loaders import evaluation_loader, training_loader
from hf_vit.data.orders import (
    UNDIVIDED,
    BatchDivision,
    EvaluationOrder,
    StreamOrder,
    TableOrder,
    read_ahead,
    steps_of,
    training_order,
)

COLUMNS = ("image", "label")
FEW_CORES = "ignore:This DataLoader will create:UserWarning"


def processor() -> HFViTImageProcessor:
    return HFViTImageProcessor.from_preset("original", 8)


def training_images(split: Any = None, augmentation: str = "trivial", **options: Any) -> TrainingImages:
    split = colored_dataset(40, 0) if split is None else split
    return TrainingImages(split, COLUMNS, processor(), build_augmentation(augmentation, (8, 8), 0.5), 7, **options)


def shards(folder: Path, sizes: Sequence[int] = (10, 10, 10)) -> Any:
    """Return a stream of parquet files."""
    folder.mkdir(exist_ok=True)
    for shard, size in enumerate(sizes):
        colored_dataset(size, shard).to_parquet(str(folder / f"train-{shard}.parquet"))
    colored_dataset(7, 99).to_parquet(str(folder / "test-0.parquet"))
    return load_data(folder, streaming=True)


# ------------------------------------------------------------------------------------------------------- pixels


@pytest.mark.parametrize(
    ("preset", "num_channels"), [("original", 3), ("timm", 3), ("center_crop", 3), ("original", 1), ("timm", 1)]
)
@pytest.mark.parametrize("cache", ["none", "ram", torch.device("cpu")])
def test_evaluation_sees_what_the_processor_gives(preset: str, num_channels: int, cache: Any) -> None:
    data = colored_dataset(5, 0)
    processor = HFViTImageProcessor.from_preset(preset, (8, 12), num_channels=num_channels)
    expected = processor(data["image"][:], return_tensors="pt")["pixel_values"]
    (batch,) = evaluation_loader(EvaluationImages(data, COLUMNS, processor, cache), batch_size=5, num_workers=0)
    assert batch["pixel_values"].dtype == torch.uint8
    assert torch.equal(normalize(batch["pixel_values"], processor), expected)
    assert batch["labels"].tolist() == data["label"][:] and batch["index"].tolist() == [0, 1, 2, 3, 4]


def test_evaluation_takes_the_pil_processor_too() -> None:
    images = EvaluationImages(colored_dataset(3, 0), COLUMNS, HFViTImageProcessorPil.from_preset("original", 8))
    assert images[0]["pixel_values"].shape == (3, 8, 8)


def test_augmentation_depends_on_epoch_and_image_alone() -> None:
    images = training_images()
    first = images[Visit(2, 5)]["pixel_values"]
    _ = images[Visit(0, 1)]
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert torch.equal(images[Visit(2, 5)]["pixel_values"], first)
    assert torch.equal(torch.get_rng_state(), before)  # dropout draws the same, whatever images were loaded between
    assert not torch.equal(images[Visit(3, 5)]["pixel_values"], first)
    for place in ("ram", torch.device("cpu")):
        assert torch.equal(training_images(cache=place)[Visit(2, 5)]["pixel_values"], first)


def test_larger_images_are_reduced_first() -> None:
    for side, shape in {5: (3, 7, 5), 50: (3, 14, 10)}.items():
        kept = (training_images(cache="ram", shorter_side=side).cached or [])[0]
        assert kept is not None and kept.shape == shape


def test_a_cache_is_a_few_tensors_of_all_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "LEAST_BLOCK", 1000)
    draw = torch.Generator().manual_seed(0)
    images: list[torch.Tensor | None] = [None]
    for number in range(1, 300):
        levels = torch.randint(256, (3, 1 + number % 5, 2 + number % 3), generator=draw)
        images.append(levels.to(torch.float32 if number % 7 == 0 else torch.uint8))
        if number % 2:
            images[-1] = images[-1].contiguous(memory_format=torch.contiguous_format).permute(0, 2, 1)
    images.append(torch.zeros(3, 40, 40, dtype=torch.uint8)[:, 5:9, ::2])  # not dense
    cached = cache.CachedImages(iter(images), torch.device("cpu"))
    assert len(cached) == len(images) and cached.nbytes == sum(image.nbytes for image in images if image is not None)
    assert 1 < len(cached.blocks) < 30
    assert sum(block.nbytes for block in cached.blocks) < cached.nbytes + 8 * len(images)
    for copy in (cached, pickle.loads(pickle.dumps(cached))):
        for index, image in enumerate(images):
            kept = copy[index]
            assert (kept is None) == (image is None)
            assert image is None or (kept.dtype == image.dtype and torch.equal(kept, image))
    with pytest.raises(MemoryError):
        cache.CachedImages(iter(images), torch.device("cpu"), cached.nbytes - 1)


# -------------------------------------------------------------------------------------------------------- order


def order(first: int = 0, last: int = 12, division: BatchDivision = UNDIVIDED, seed: int = 0) -> TableOrder:
    return TableOrder(40, 12, seed, first, last, division)


def test_an_epoch_sees_no_image_twice() -> None:
    batches = list(order())
    assert len(batches) == 12
    for epoch in range(4):
        visits = [visit for batch in batches[3 * epoch : 3 * epoch + 3] for visit in batch]
        assert len({visit.index for visit in visits}) == 36
        assert {visit.epoch for visit in visits} == {epoch}
    assert batches[0] != batches[3]
    assert batches != list(order(seed=1))


def test_order_goes_on_from_any_step() -> None:
    assert list(order(first=5)) == list(order())[5:]


def test_processes_share_the_batch_of_one() -> None:
    together = list(order())
    parts = [
        list(order(division=BatchDivision(2, 3, process))) for process in range(3)
    ]  # two accumulated parts, three processes
    assert [len(part) for part in parts] == [24] * 3
    for step, batch in enumerate(together):
        shared = [visit for part in (0, 1) for process in range(3) for visit in parts[process][2 * step + part]]
        assert shared == batch


def test_a_batch_must_be_divisible() -> None:
    with pytest.raises(ValueError, match=r"divisible by .* = 1 \* 5"):
        TableOrder(40, 12, 0, 0, 1, BatchDivision(1, 5, 0))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_batch_must_fit(streaming: bool, tmp_path: Path) -> None:
    shards(tmp_path)
    data = load_data(tmp_path, streaming=streaming)
    with pytest.raises(ValueError, match="batch_size=31 exceeds the 30 training images"):
        training_order(data, training_images(data.train), 31, 0, (0, 1), BatchDivision(), 8)


def test_steps_of_epochs() -> None:
    assert steps_of(2, length=40, batch_size=12) == 6
    assert steps_of(0.1, length=40, batch_size=12) == 1


# ------------------------------------------------------------------------------------------------------ streams


def stream_order(
    data: Any, first: int = 0, last: int = 12, division: BatchDivision = UNDIVIDED, **options: Any
) -> StreamOrder:
    return StreamOrder(training_images(data.train), 6, 3, first, last, division, **options)


def keys(batches: Any) -> list[list[tuple[int, int]]]:
    return [[(visit.epoch, visit.index) for visit in batch] for batch in batches]


def test_a_stream_shows_every_image_once_an_epoch(tmp_path: Path) -> None:
    data = shards(tmp_path / "shards")
    visits = [key for batch in keys(stream_order(data, last=10)) for key in batch]  # 60 visits of 30 images
    assert [epoch for epoch, _ in visits] == [0] * 30 + [1] * 30
    first, second = ([index for epoch, index in visits if epoch == number] for number in (0, 1))
    assert len(set(first)) == 30 and set(first) == set(second) and first != second


@pytest.mark.parametrize("sizes", [(10, 10, 10), (5, 8, 17), (30,)])
@pytest.mark.parametrize(("processes", "buffer"), [(1, 4), (2, 100), (3, 7)])
def test_a_stream_goes_on_from_any_step(sizes: Sequence[int], buffer: int, processes: int, tmp_path: Path) -> None:
    data = shards(tmp_path / "shards", sizes)
    for process in range(processes):
        options: dict[str, Any] = {"division": BatchDivision(1, processes, process), "buffer": buffer}
        whole = stream_order(data, last=16, **options)
        batches = keys(whole)
        assert len(batches) == 16 and batches[-1][0][0] == len(whole.images_per_epoch)  # the epoch that is not over
        for first in (1, 7, 12):
            for known in (None, whole.images_per_epoch[:1], whole.images_per_epoch):
                goes_on = stream_order(data, first, 16, images_per_epoch=known, **options)
                assert keys(goes_on) == batches[first:]
                assert goes_on.images_per_epoch == whole.images_per_epoch


def test_what_is_known_of_a_stream_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = shards(tmp_path / "shards")
    whole = stream_order(data, last=12)
    list(whole)
    epochs: list[int] = []
    monkeypatch.setattr(type(data.train), "set_epoch", lambda self, epoch: epochs.append(epoch))
    list(stream_order(data, 11, 12, images_per_epoch=whole.images_per_epoch))
    assert epochs == [2]


def test_a_run_on_a_stream_goes_on_with_other_processes(tmp_path: Path) -> None:
    data = shards(tmp_path / "shards")
    for process in range(2):
        batches = keys(stream_order(data, 7, 12, BatchDivision(1, 2, process)))
        assert [len(batch) for batch in batches] == [3] * 5 and batches[0][0][0] > 0


def test_a_part_of_a_batch_of_a_stream(tmp_path: Path) -> None:
    data = shards(tmp_path / "shards")
    whole, parts = (keys(stream_order(data, 3, 9, BatchDivision(number, 1, 0))) for number in (1, 2))
    assert [first + second for first, second in zip(parts[::2], parts[1::2], strict=True)] == whole


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_a_stream(tmp_path: Path, processes: int) -> None:
    data = shards(tmp_path / "shards")  # three shards: divided by shards, or image by image
    seen: Counter = Counter()
    for process in range(processes):
        visits = [
            key for batch in keys(stream_order(data, 0, 5, BatchDivision(1, processes, process))) for key in batch
        ]
        seen.update(index for epoch, index in visits if epoch == 0)
    assert len(seen) == 30 and set(seen.values()) == {1}


def test_a_stream_that_became_another_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="The stream ended after 30 images, but had 31 before"):
        list(stream_order(shards(tmp_path / "shards"), images_per_epoch=[31]))


def test_a_process_without_images_is_an_error(tmp_path: Path) -> None:
    data = shards(tmp_path / "shards", [1])
    with pytest.raises(ValueError, match="no images for this process: use fewer processes"):
        list(stream_order(data, division=BatchDivision(1, 2, 1)))


@pytest.mark.filterwarnings(FEW_CORES)
@pytest.mark.parametrize("num_workers", [1, 3])
def test_workers_change_nothing(tmp_path: Path, num_workers: int) -> None:
    data = shards(tmp_path / "shards")
    for images, make in (
        (training_images(), lambda: order(last=4)),
        (training_images(data.train), lambda: stream_order(data, last=7)),
    ):
        assert_same_batches(*(training_loader(images, make(), number) for number in (0, num_workers)))
    for split in (colored_dataset(7, 0), data.evaluation):
        measured = EvaluationImages(split, COLUMNS, processor())
        assert_same_batches(*(evaluation_loader(measured, 3, number) for number in (0, num_workers)))


def assert_same_batches(first: Any, second: Any) -> None:
    for batch, other in zip(first, second, strict=True):
        assert batch.keys() == other.keys() and batch["broken"] == other["broken"]
        for name in ("pixel_values", "labels", "index"):
            assert torch.equal(batch[name], other[name]), name


def test_a_worker_may_be_sent_the_images_of_a_stream(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    colored_dataset(30, 0).to_parquet(str(tmp_path / "photos" / "all.parquet"))
    data = load_data(tmp_path / "photos", streaming=True)  # cut by a function, which cannot be pickled
    images = training_images(data.train)
    sent = pickle.loads(pickle.dumps(images))
    (batch,) = stream_order(data, last=1)
    for visit in batch:
        assert torch.equal(sent[visit]["pixel_values"], images[visit]["pixel_values"])
    sent = pickle.loads(pickle.dumps(training_images()))
    assert torch.equal(sent[Visit(1, 3)]["pixel_values"], training_images()[Visit(1, 3)]["pixel_values"])


def test_a_loader_that_is_left_leaves_no_thread(tmp_path: Path) -> None:
    data = shards(tmp_path / "shards")
    before = {thread for thread in threading.enumerate() if not isinstance(thread, threading._DummyThread)}
    batches = iter(training_loader(training_images(data.train), stream_order(data, last=1000), num_workers=0))
    next(batches)
    del batches
    assert_ended(before)


def assert_ended(before: set[threading.Thread]) -> None:
    for _ in range(100):
        left = [thread for thread in set(threading.enumerate()) - before if "read" in thread.name]
        if not left:
            return
        time.sleep(0.05)
    raise AssertionError(f"still there: {left}")


def test_an_image_of_a_stream_looks_the_same_for_any_number_of_processes(tmp_path: Path) -> None:
    data = shards(tmp_path / "shards")
    looks: dict[tuple[int, int], torch.Tensor] = {}
    for processes in (1, 2):
        for process in range(processes):
            order = stream_order(data, 0, 5, BatchDivision(1, processes, process))
            for batch in order:
                for visit in batch:
                    pixels = training_images(data.train)[visit]["pixel_values"]
                    assert torch.equal(looks.setdefault((visit.epoch, visit.index), pixels), pixels)
    assert len(looks) == 30


def test_a_stream_cannot_be_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="set cache: none, or streaming: false"):
        training_images(shards(tmp_path / "shards").train, cache="ram")


class Dead(BaseException):
    """Something that nobody catches."""


@pytest.mark.parametrize("error", [OSError("gone"), Dead("gone"), KeyError("gone")])
def test_reading_ahead_passes_errors_on(error: BaseException) -> None:
    def items() -> Iterator[int]:
        yield from range(5)
        raise error

    read = read_ahead(items(), 2)
    assert [next(read) for _ in range(5)] == list(range(5))
    with pytest.raises(type(error), match="gone"):
        next(read)
    assert list(read) == []


def test_reading_ahead_reads_so_far_and_ends_when_closed() -> None:
    before = set(threading.enumerate())
    taken: list[int] = []
    read = read_ahead((taken.append(number) or number for number in count()), 3)
    assert next(read) == 0
    time.sleep(0.3)
    assert len(taken) <= 5  # one was given, three wait, and one is held
    read.close()
    assert_ended(before)
    assert list(read_ahead(range(100), 3)) == list(range(100))
    assert list(read_ahead([], 3)) == []
    assert_ended(before)


# --------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
def test_every_image_is_measured_once(processes: int, batch_size: int) -> None:
    for length in range(1, 26):
        images = EvaluationImages(_numbered(length), COLUMNS, processor())
        orders = [list(EvaluationOrder(images, batch_size, processes, process)) for process in range(processes)]
        assert len({tuple(len(batch) for batch in order) for order in orders}) == 1
        counted = [visit.index for order in orders for batch in order for visit in batch if visit.counted]
        assert sorted(counted) == list(range(length))


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_every_image_of_a_stream_is_measured_once(processes: int) -> None:
    for length in range(1, 26):
        images = EvaluationImages(_numbered(length).to_iterable_dataset(), COLUMNS, processor())
        for batch_size in (2, 5):
            orders = [list(EvaluationOrder(images, batch_size, processes, process)) for process in range(processes)]
            assert len({tuple(len(batch) for batch in order) for order in orders}) == 1
            assert max(len(batch) for order in orders for batch in order) <= batch_size
            counted = [visit.index for order in orders for batch in order for visit in batch if visit.counted]
            assert sorted(counted) == list(range(length))


def _numbered(length: int) -> Dataset:
    features = Features({"image": Image(), "label": Value("int64")})
    return Dataset.from_dict({"image": [None] * length, "label": [0] * length}, features=features)


def test_a_stream_is_measured_once(tmp_path: Path) -> None:
    data = shards(tmp_path / "shards")
    images = EvaluationImages(data.evaluation, data.columns, processor())
    index = [
        number
        for process in range(2)
        for batch in evaluation_loader(images, 3, 0, processes=2, process=process)
        for number in batch["index"].tolist()
    ]
    assert sorted(number for number in index if number >= 0) == list(range(7))


# ------------------------------------------------------------------------------------------------ broken images


def encoded(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (20, 24, 3), dtype=np.uint8)
    file = io.BytesIO()
    PILImage.fromarray(pixels).save(file, "jpeg")
    return file.getvalue()


BROKEN = {
    "truncated": {"bytes": encoded(0)[:300], "path": "train/truncated.jpg"},
    "empty": {"bytes": b"", "path": "/home/someone/train/empty.jpg"},
    "text": {"bytes": b"404 not found", "path": None},
    "missing": {"bytes": None, "path": "/no/such/folder/train/missing.jpg"},
    "nothing": {"bytes": None, "path": None},
    "null": None,
}


def with_broken(kinds: list[str]) -> Dataset:
    stored = [{"bytes": encoded(1), "path": "good.jpg"}, *(BROKEN[kind] for kind in kinds)]
    stored.append({"bytes": encoded(2), "path": "good.jpg"})
    features = Features({"image": {"bytes": Value("binary"), "path": Value("string")}, "label": Value("int64")})
    rows = {"image": stored, "label": list(range(len(stored)))}
    return Dataset.from_dict(rows, features=features).cast_column("image", Image())


@pytest.mark.parametrize("cache", ["none", "ram"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_broken_image_is_left_out_and_named(cache: str, num_workers: int) -> None:
    data = with_broken(list(BROKEN))
    (batch,) = evaluation_loader(EvaluationImages(data, COLUMNS, processor(), cache), 8, num_workers)
    assert batch["index"].tolist() == [0, -1, -1, -1, -1, -1, -1, 7]
    names = ["train/truncated.jpg", "train/empty.jpg", "image 3", "train/missing.jpg", "image 5", "image 6"]
    assert batch["broken"] == names
    good = {0: batch["pixel_values"][0], 7: batch["pixel_values"][7]}
    stand_ins = batch["labels"].tolist()
    assert set(stand_ins) == {0, 7}
    for pixels, label in zip(batch["pixel_values"], stand_ins, strict=True):
        assert torch.equal(pixels, good[label])


def test_a_batch_may_be_broken_altogether() -> None:
    images = EvaluationImages(with_broken(["text", "empty"]).select([1, 2]), COLUMNS, processor())
    (batch,) = evaluation_loader(images, 2, 0)
    assert batch["index"].tolist() == [-1, -1] and len(batch["broken"]) == 2
    assert batch["pixel_values"].shape == (2, 3, 8, 8)


def test_training_goes_on_round_broken_images() -> None:
    images = training_images(with_broken(["text"]))
    (batch,) = training_loader(images, TableOrder(3, 3, 0, 0, 1), 0)
    assert batch["broken"] == ["image 1"] and set(batch["labels"].tolist()) == {0, 2}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_broken_images_of_a_stream_are_named(num_workers: int) -> None:
    stream = with_broken(list(BROKEN)).cast_column("image", Image(decode=False)).to_iterable_dataset()
    (batch,) = evaluation_loader(EvaluationImages(stream, COLUMNS, processor()), 8, num_workers)
    assert batch["index"].tolist() == [0, -1, -1, -1, -1, -1, -1, 7]
    assert batch["broken"][:2] == ["train/truncated.jpg", "train/empty.jpg"] and len(batch["broken"]) == 6
    order = StreamOrder(training_images(stream), 8, 0, 0, 2, buffer=4)
    for batch in training_loader(training_images(stream), order, num_workers):
        assert len(batch["broken"]) == 6 and set(batch["labels"].tolist()) == {0, 7}
        assert (batch["index"] >= 0).sum() == 2


def test_what_only_fills_a_batch_up_is_not_named() -> None:
    images = EvaluationImages(with_broken(["text"]).select([1, 0, 2]), COLUMNS, processor())
    (batch,) = evaluation_loader(images, 2, 0, processes=2, process=1)  # the second image, and the first as a filler
    assert batch["index"].tolist() == [1, -1] and batch["broken"] == []


@pytest.mark.parametrize("cache", ["none", "ram"])
@pytest.mark.parametrize(("limit", "index", "broken"), [(480, [0, 1], []), (479, [-1, -1], ["good.jpg"] * 2)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_images_of_too_many_pixels_are_named(
    cache: str, limit: int, index: list[int], broken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", limit)
    images = EvaluationImages(with_broken([]), COLUMNS, processor(), cache)  # of 480 pixels
    (batch,) = evaluation_loader(images, 2, 0)
    assert batch["index"].tolist() == index and batch["broken"] == broken


def transparent_palette() -> PILImage.Image:
    image = PILImage.fromarray(np.arange(300, dtype=np.uint8).reshape(15, 20)).convert("P")
    image.info["transparency"] = bytes(range(256))
    return image


def of_mode(mode: str) -> PILImage.Image:
    if mode == "transparent palette":
        return transparent_palette()
    if mode == "I;16":
        return PILImage.fromarray(np.linspace(0, 65535, 300).astype(np.uint16).reshape(15, 20))
    pixels = np.random.default_rng(0).integers(0, 256, (15, 20, 4), dtype=np.uint8)
    return PILImage.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "I;16", "1", "transparent palette"])
@pytest.mark.parametrize("num_channels", [1, 3])
def test_images_of_any_mode_are_what_the_processor_makes_of_them(mode: str, rotated: bool, num_channels: int) -> None:
    exif = PILImage.Exif()
    exif[0x0112] = 6 if rotated else 1
    file = io.BytesIO()
    of_mode(mode).save(file, "tiff" if mode in ("CMYK", "LA") else "png", exif=exif)
    rows = {"image": [{"bytes": file.getvalue(), "path": None}], "label": [0]}
    data = Dataset.from_dict(rows).cast_column("image", Image())
    image = ImageOps.exif_transpose(PILImage.open(file))
    assert image.size == ((15, 20) if rotated else (20, 15))
    processor = HFViTImageProcessor.from_preset("original", 8, num_channels=num_channels)
    expected = processor(image, return_tensors="pt")["pixel_values"]
    measured = EvaluationImages(data, COLUMNS, processor)[0]["pixel_values"]
    assert torch.equal(normalize(measured[None], processor), expected)
    images = TrainingImages(data, COLUMNS, processor, lambda pixels: pixels, 0)
    raw = processor(image, do_resize=False, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"]
    assert torch.equal(images[Visit(0, 0)]["pixel_values"], raw[0])


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "I;16", "1"])
def test_images_of_any_mode_are_trained_on(mode: str) -> None:
    gradient = np.linspace(0, 255, 300).reshape(15, 20)
    if mode == "I;16":
        image = PILImage.fromarray((gradient * 257).astype(np.uint16))
    else:
        image = PILImage.fromarray(gradient.astype(np.uint8)).convert(mode)
    data = Dataset.from_dict({"image": [image], "label": [0]}).cast_column("image", Image())
    pixels = training_images(data, augmentation="none")[Visit(0, 0)]["pixel_values"].float()
    assert pixels.shape == (3, 8, 8)
    assert pixels[:, -1].mean() > pixels[:, 0].mean() + 100  # black above, white below


def test_a_photo_on_its_side_is_turned_upright() -> None:
    image = PILImage.fromarray(np.repeat(np.linspace(0, 255, 30, dtype=np.uint8)[:, None], 10, axis=1))
    exif = PILImage.Exif()
    exif[0x0112] = 8  # to be turned by 90 degrees
    file = io.BytesIO()
    image.save(file, "jpeg", exif=exif, quality=95)
    data = Dataset.from_dict({"image": [{"bytes": file.getvalue(), "path": None}], "label": [0]})
    pixels = training_images(data.cast_column("image", Image()), augmentation="none")[0]["pixel_values"].float()
    assert pixels[:, :, -1].mean() > pixels[:, :, 0].mean() + 100
