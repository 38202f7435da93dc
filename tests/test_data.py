"""Sources, the split, the pixels, and which image comes when."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, Image
from tiny_run import COLORS, colored_dataset, colored_images, save_photos

from hf_vit import HFViTImageProcessor, HFViTImageProcessorPil
from hf_vit.data import (
    AUGMENTATIONS,
    EvaluationImages,
    SmallAffine,
    TrainingImages,
    TrainingOrder,
    build_augmentation,
    evaluation_loader,
    load_data,
    normalize,
    seed_of,
    split_evenly,
    steps_of,
    training_loader,
)

COLUMNS = ("image", "label")


# ------------------------------------------------------------------------------------------------------ sources


def image_folder(path: Path) -> Path:
    for index, (image, label) in enumerate(zip(*colored_images(30, 0), strict=True)):
        folder = path / list(COLORS)[label]
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{index:03d}.png")
    return path


def parquet_file(path: Path) -> Path:
    path.mkdir()
    colored_dataset(30, 0).to_parquet(str(path / "flowers.parquet"))
    return path / "flowers.parquet"


def parquet_folder(path: Path) -> Path:
    path.mkdir()
    colored_dataset(30, 0).to_parquet(str(path / "train-00000-of-00001.parquet"))
    colored_dataset(9, 1).to_parquet(str(path / "test.parquet"))
    return path


def parquet_of_strings(path: Path) -> Path:
    """Write what pandas would: bytes and names, without the features of `datasets`."""
    path.mkdir()
    rows = colored_dataset(30, 0).cast_column("image", Image(decode=False))
    plain = {
        "picture": [{"bytes": row["bytes"], "path": None} for row in rows["image"]],
        "label": [list(COLORS)[label] for label in rows["label"]],
    }
    Dataset.from_dict(plain).to_pandas().to_parquet(path / "train.parquet")
    return path


@pytest.mark.parametrize(
    ("make", "counts", "eval_split"),
    [
        (image_folder, (24, 6), "held out"),
        (parquet_file, (24, 6), "held out"),
        (parquet_folder, (30, 9), "test"),
        (parquet_of_strings, (24, 6), "held out"),
        (save_photos, (54, 21), "test"),
    ],
)
def test_a_source_of_any_kind(make: Any, counts: tuple[int, int], eval_split: str, tmp_path: Path) -> None:
    data = load_data(make(tmp_path / "source"))
    assert (len(data.train), len(data.evaluation)) == counts
    assert data.label_names == list(COLORS)
    assert data.eval_split == eval_split
    image, label = (data.train[7][column] for column in data.columns)
    red, green, blue = image.convert("RGB").resize((1, 1)).getpixel((0, 0))
    assert {"blue": blue, "green": green, "red": red}[data.label_names[label]] == max(red, green, blue)


def test_digits_hold_out_the_same_fifth_of_every_class() -> None:
    data = load_data("digits")
    assert (len(data.train), len(data.evaluation)) == (1438, 359)
    counts = torch.tensor(data.evaluation["label"]).bincount()
    assert counts.min() >= 34 and counts.max() <= 37
    again = load_data("digits")
    assert again.evaluation["label"] == data.evaluation["label"]


def test_numbers_as_labels_keep_their_values(tmp_path: Path) -> None:
    images, labels = colored_images(30, 0)
    rows = {"image": images, "label": [2 * label for label in labels]}
    Dataset.from_dict(rows).cast_column("image", Image()).save_to_disk(str(tmp_path / "numbers"))
    data = load_data(tmp_path / "numbers")
    assert data.label_names == ["0", "1", "2", "3", "4"]
    assert sorted(set(data.train["label"])) == [0, 2, 4]


def test_columns_and_splits_can_be_named(tmp_path: Path) -> None:
    folder = parquet_folder(tmp_path / "source")
    data = load_data(folder, train_split="test", eval_split="train", image_column="image", label_column="label")
    assert (len(data.train), len(data.evaluation)) == (9, 30)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "/no/such/folder"}, "Expected data in '/no/such/folder'"),
        ({"source": ""}, "Expected data in ''"),
        ({"train_split": "trian"}, "split='trian' is not there: choose one of train, test"),
        ({"eval_split": "val"}, "no split 'val'.*train, test"),
        ({"image_column": "img"}, "image_column='img' is not there: choose one of image"),
        ({"label_column": "class"}, "label_column='class' is not there: choose one of label"),
        ({"source": "digits", "eval_fraction": 0.0}, "eval_fraction is a share between 0 and 1, got 0.0"),
    ],
)
def test_refuses(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    if "source" not in arguments:
        arguments = {"source": save_photos(tmp_path / "photos"), **arguments}
    with pytest.raises(ValueError, match=message):
        load_data(**arguments)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds neither parquet files nor images"):
        load_data(tmp_path)


def test_split_is_even_and_whole() -> None:
    labels = [0] * 50 + [1] * 10 + [2] * 5
    kept, held_out = split_evenly(labels, 0.2, seed=3)
    assert sorted(kept + held_out) == list(range(65))
    assert torch.tensor([labels[index] for index in held_out]).bincount().tolist() == [10, 2, 1]
    assert split_evenly(labels, 0.2, seed=4)[1] != held_out


# ------------------------------------------------------------------------------------------------------- pixels


@pytest.mark.parametrize(
    ("preset", "num_channels"), [("original", 3), ("timm", 3), ("center_crop", 3), ("original", 1), ("timm", 1)]
)
def test_evaluation_sees_what_the_processor_gives(preset: str, num_channels: int) -> None:
    data = colored_dataset(5, 0)
    processor = HFViTImageProcessor.from_preset(preset, (8, 12), num_channels=num_channels)
    expected = processor(data["image"][:], return_tensors="pt")["pixel_values"]
    for in_memory in (False, True):
        images = EvaluationImages(data, COLUMNS, processor, in_memory)
        (batch,) = evaluation_loader(images, batch_size=5, num_workers=0)
        assert batch["pixel_values"].dtype == torch.uint8
        assert torch.equal(normalize(batch["pixel_values"], processor), expected)
        assert batch["labels"].tolist() == data["label"][:]


def test_evaluation_takes_the_pil_processor_too() -> None:
    processor = HFViTImageProcessorPil.from_preset("original", 8)
    images = EvaluationImages(colored_dataset(3, 0), COLUMNS, processor, in_memory=False)
    assert images[0]["pixel_values"].shape == (3, 8, 8)


def training_images(augmentation: str = "trivial", in_memory: bool = False, **options: Any) -> TrainingImages:
    processor = HFViTImageProcessor.from_preset("original", 8)
    transform = build_augmentation(augmentation, (8, 8), 0.5)
    return TrainingImages(colored_dataset(40, 0), COLUMNS, processor, in_memory, transform, seed=7, **options)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_every_augmentation_gives_8_bit_images_of_the_size(name: str) -> None:
    images = training_images(name)
    assert images[(0, 3)]["pixel_values"].shape == (3, 8, 8)
    assert images[(0, 3)]["pixel_values"].dtype == torch.uint8


def test_augmentation_depends_on_epoch_and_image_alone() -> None:
    images = training_images()
    first = images[(2, 5)]["pixel_values"]
    images[(0, 1)]
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert torch.equal(images[(2, 5)]["pixel_values"], first)
    assert torch.equal(torch.get_rng_state(), before)  # dropout draws the same, whatever images were loaded between
    assert not torch.equal(images[(3, 5)]["pixel_values"], first)
    assert torch.equal(training_images(in_memory=True)[(2, 5)]["pixel_values"], first)


def test_small_affine_moves_little() -> None:
    image = torch.zeros(1, 32, 32, dtype=torch.uint8)
    image[:, 12:20, 12:20] = 255
    torch.manual_seed(0)
    moved = torch.stack([SmallAffine()(image) for _ in range(50)])
    assert (moved.flatten(1).float().sum(1) / image.sum() - 1).abs().max() < 0.3
    assert len({tuple(picture.flatten().tolist()) for picture in moved}) == 50
    edge = moved.clone()
    edge[..., 6:26, 6:26] = 0
    assert edge.sum() == 0


def test_larger_images_are_reduced_first() -> None:
    assert training_images(in_memory=True, shorter_side=5).kept[0].shape == (3, 7, 5)
    assert training_images(in_memory=True, shorter_side=50).kept[0].shape == (3, 14, 10)


def test_an_unknown_augmentation_is_refused() -> None:
    with pytest.raises(ValueError, match="Unknown augmentation 'flip': choose one of none, affine"):
        build_augmentation("flip", (8, 8), 0.5)


# -------------------------------------------------------------------------------------------------------- order


def order(first: int = 0, last: int = 12, parts: tuple[int, int, int] = (1, 1, 0), seed: int = 0) -> TrainingOrder:
    return TrainingOrder(40, 12, seed, first, last, parts)


def test_an_epoch_sees_no_image_twice() -> None:
    batches = list(order())
    assert len(batches) == len(order()) == 12
    for epoch in range(4):
        keys = [key for batch in batches[3 * epoch : 3 * epoch + 3] for key in batch]
        assert len(set(keys)) == 36
        assert {key[0] for key in keys} == {epoch}
    assert batches[0] != batches[3]
    assert batches != list(order(seed=1))


def test_order_goes_on_from_any_step() -> None:
    assert list(order(first=5)) == list(order())[5:]


def test_processes_share_the_batch_of_one() -> None:
    together = list(order())
    parts = [list(order(parts=(2, 3, process))) for process in range(3)]  # two accumulated parts, three processes
    assert [len(part) for part in parts] == [24] * 3
    for step, batch in enumerate(together):
        shared = [key for part in (0, 1) for process in range(3) for key in parts[process][2 * step + part]]
        assert shared == batch


@pytest.mark.parametrize(
    ("length", "parts", "message"),
    [(8, (1, 1, 0), "more than the 8 training images"), (40, (1, 5, 0), r"divisible by .* = 1 \* 5")],
)
def test_a_batch_must_fit(length: int, parts: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingOrder(length, 12, 0, 0, 1, parts)


def test_workers_change_nothing() -> None:
    images = training_images()
    alone = list(training_loader(images, order(last=4), num_workers=0))
    for batch, other in zip(alone, training_loader(images, order(last=4), num_workers=2), strict=True):
        assert torch.equal(batch["pixel_values"], other["pixel_values"])
        assert torch.equal(batch["labels"], other["labels"])


def test_steps_and_seeds() -> None:
    assert steps_of(2, length=40, batch_size=12) == 6
    assert steps_of(0.1, length=40, batch_size=12) == 1
    assert seed_of(0, "order", 1) == seed_of(0, "order", 1)
    assert len({seed_of(seed, epoch, index) for seed in range(3) for epoch in range(3) for index in range(50)}) == 450
    assert all(0 <= seed_of(part) < 2**63 for part in range(100))
