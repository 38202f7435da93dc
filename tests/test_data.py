"""Sources, tables and streams, splits, classes."""

import io
import tarfile
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, load_dataset
from datasets.distributed import split_dataset_by_node
from tiny_run import COLORS, colored_dataset, colored_images, save_photos

from hf_vit.data.images import derive_seed, image_digest
from hf_vit.data.labelled import load_data, split_evenly
from hf_vit.data.opening import as_stored

# ------------------------------------------------------------------------------------------------------ sources


def image_folder(path: Path) -> Path:
    for index, (image, label) in enumerate(zip(*colored_images(30, 0), strict=True)):
        folder = path / list(COLORS)[label]
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{index:03d}.png")
    return path


def metadata(path: Path, suffix: str = "jsonl") -> Path:
    """Write a folder for each split, with images side by side and a file that says what they show."""
    for split, number in {"train": 30, "test": 9}.items():
        (path / split).mkdir(parents=True)
        rows = []
        for index, (image, label) in enumerate(zip(*colored_images(number, 0), strict=True)):
            image.save(path / split / f"{index:03d}.png")
            rows.append({"file_name": f"{index:03d}.png", "label": list(COLORS)[label]})
        table = pandas.DataFrame(rows)
        name = path / split / f"metadata.{suffix}"
        table.to_parquet(name) if suffix == "parquet" else table.to_json(name, orient="records", lines=True)
    return path


def metadata_in_parquet(path: Path) -> Path:
    return metadata(path, "parquet")


def parquet_file(path: Path) -> Path:
    path.mkdir()
    colored_dataset(30, 0).to_parquet(str(path / "flowers.parquet"))
    return path / "flowers.parquet"


def parquet_folder(path: Path) -> Path:
    path.mkdir()
    colored_dataset(30, 0).to_parquet(str(path / "train-00000-of-00001.parquet"))
    colored_dataset(9, 1).to_parquet(str(path / "test.parquet"))
    return path


def parquet_in_data(path: Path) -> Path:
    """Write what a repository on the Hub looks like."""
    (path / "data").mkdir(parents=True)
    for shard in range(2):
        colored_dataset(15, shard).to_parquet(str(path / "data" / f"train-{shard:05d}-of-00002.parquet"))
    colored_dataset(9, 7).to_parquet(str(path / "data" / "validation-00000-of-00001.parquet"))
    return path


def parquet_folders(path: Path) -> Path:
    for split, number in {"training": 30, "eval": 9}.items():
        (path / split).mkdir(parents=True)
        colored_dataset(number, number).to_parquet(str(path / split / "0.parquet"))
    return path


def parquet_with_names_inside(path: Path) -> Path:
    path.mkdir()
    for shard in range(2):
        colored_dataset(15, shard).to_parquet(str(path / f"photos-train_{shard}.parquet"))
    colored_dataset(9, 7).to_parquet(str(path / "photos-val_0.parquet"))
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


def parquet_shards(path: Path) -> Path:
    """Write shards that are numbered and no more."""
    path.mkdir()
    for number in range(3):
        colored_dataset(10, number).to_parquet(str(path / f"{number:04d}.parquet"))
    return path


def split_folders(path: Path) -> Path:
    for split, number in {"train": 30, "val": 9}.items():
        for index, (image, label) in enumerate(zip(*colored_images(number, 0), strict=True)):
            folder = path / split / list(COLORS)[label]
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{index:03d}.png")
    return path


def saved_alone(path: Path) -> Path:
    colored_dataset(30, 0).save_to_disk(str(path))
    return path


def saved_part(path: Path) -> Path:
    """Save some rows of a larger data set, whose own number of rows goes with them."""
    whole = load_dataset("parquet", data_files=str(parquet_file(path.with_name("whole"))), split="train")
    DatasetDict({"train": whole.select(range(12)), "test": whole.select(range(12, 21))}).save_to_disk(str(path))
    return path


def digits(path: Path) -> str:
    return "digits"


def webdataset(path: Path, kind: str = "png") -> Path:
    path.mkdir()
    for name, number in {"train-0": 15, "train-1": 15, "test-0": 9}.items():
        with tarfile.open(path / f"{name}.tar", "w") as archive:
            for index, (image, label) in enumerate(zip(*colored_images(number, len(name)), strict=True)):
                picture = io.BytesIO()
                image.save(picture, "jpeg" if kind == "jpg" else kind)
                for suffix, content in {kind: picture.getvalue(), "cls": str(label).encode()}.items():
                    entry = tarfile.TarInfo(f"{name}_{index:03d}.{suffix}")
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
    return path


def webdataset_of_jpegs(path: Path) -> Path:
    return webdataset(path, "jpg")


def webdataset_shard(path: Path) -> Path:
    return webdataset(path) / "train-1.tar"


SOURCES = [
    (image_folder, (24, 6), "held out"),
    (split_folders, (30, 9), "validation"),
    (parquet_file, (24, 6), "held out"),
    (parquet_folder, (30, 9), "test"),
    (parquet_of_strings, (24, 6), "held out"),
    (parquet_shards, (24, 6), "held out"),
    (webdataset, (30, 9), "test"),
    (save_photos, (54, 21), "test"),
    (metadata, (30, 9), "test"),
    (metadata_in_parquet, (30, 9), "test"),
    (parquet_in_data, (30, 9), "validation"),
    (parquet_folders, (30, 9), "eval"),
    (parquet_with_names_inside, (30, 9), "val"),
    (saved_alone, (24, 6), "held out"),
    (saved_part, (12, 9), "test"),
    (webdataset_of_jpegs, (30, 9), "test"),
    (webdataset_shard, (12, 3), "held out"),
    (digits, (1438, 359), "held out"),
]


@pytest.mark.parametrize(("make", "counts", "eval_split"), SOURCES)
def test_a_source_of_any_kind(make: Any, counts: tuple[int, int], eval_split: str, tmp_path: Path) -> None:
    data = load_data(make(tmp_path / "source"))
    assert (len(data.train), len(data.evaluation)) == counts
    assert data.train_length == counts[0]
    assert data.eval_split == eval_split
    if make is digits:
        assert data.label_names == list("0123456789")
        return
    assert data.label_names == (["0", "1", "2"] if "webdataset" in make.__name__ else list(COLORS))
    image, label = (data.train[7][column] for column in data.columns)
    red, green, blue = image.convert("RGB").resize((1, 1)).getpixel((0, 0))
    assert {"blue": blue, "green": green, "red": red}[list(COLORS)[label]] == max(red, green, blue)


@pytest.mark.parametrize(("make", "counts", "eval_split"), SOURCES)
def test_a_stream_of_any_kind(make: Any, counts: tuple[int, int], eval_split: str, tmp_path: Path) -> None:
    source = make(tmp_path / "source")
    table, stream = load_data(source), load_data(source, streaming=True)
    assert stream.is_stream and not table.is_stream
    assert stream.label_names == table.label_names and stream.columns == table.columns
    assert stream.eval_split == eval_split
    of_table, of_stream = (
        [pixels(row, data) for split in (data.train, data.evaluation) for row in split] for data in (table, stream)
    )
    assert sorted(of_table) == sorted(of_stream)
    lengths = [sum(1 for _ in split) for split in (stream.train, stream.evaluation)]
    if eval_split != "held out":
        assert tuple(lengths) == counts and stream.train_length == counts[0]
    else:
        assert 0 < lengths[1] < lengths[0] and stream.train_length == round(0.8 * sum(lengths))


def pixels(row: dict[str, Any], data: Any) -> tuple[int, bytes]:
    image, label = (row[column] for column in data.columns)
    if data.is_stream:
        image = Image().decode_example(image)
    return label, image.convert("RGB").tobytes()


def test_a_stream_is_cut_by_what_the_images_are(tmp_path: Path) -> None:
    colored_dataset(400, 0).to_parquet(str(tmp_path / "photos.parquet"))
    cuts = [load_data(tmp_path / "photos.parquet", streaming=True, split_seed=seed) for seed in (0, 0, 1)]
    held_out = [{pixels(row, data) for row in data.evaluation} for data in cuts]
    assert held_out[0] == held_out[1] != held_out[2]
    assert 50 < len(held_out[0]) < 110  # a fifth of 400, up to chance
    learned = [{pixels(row, cuts[0]) for row in cuts[0].train} for _ in range(2)]
    assert learned[0] == learned[1] and not learned[0] & held_out[0] and len(learned[0] | held_out[0]) == 400
    for processes in (2, 3):
        of_processes = [
            {pixels(row, cuts[0]) for row in split_dataset_by_node(cuts[0].train, process, processes)}
            for process in range(processes)
        ]
        assert set.union(*of_processes) == learned[0] and sum(map(len, of_processes)) == len(learned[0])


def test_the_length_of_a_run_does_not_depend_on_what_was_prepared_before(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "source")
    counted = load_data(folder, streaming=True).train_length
    load_data(folder)  # now the number of images is in the cache
    assert load_data(folder, streaming=True).train_length == counted == 24


def test_the_length_of_a_stream_may_be_said(tmp_path: Path) -> None:
    folder = parquet_folder(tmp_path / "source")
    assert load_data(folder, streaming=True, train_images=1000).train_length == 1000


@pytest.mark.parametrize("streaming", [False, True])
def test_labels_are_not_always_needed(tmp_path: Path, streaming: bool) -> None:
    for index, image in enumerate(colored_images(10, 0)[0]):
        (tmp_path / "photos").mkdir(exist_ok=True)
        image.save(tmp_path / "photos" / f"{index}.png")
    data = load_data(tmp_path / "photos", needs_labels=False, streaming=streaming, eval_fraction=0.3)
    assert data.columns == ("image", None) and data.label_names == []
    assert sum(1 for _ in data.train) == data.train_length > 0
    with pytest.raises(
        ValueError, match="Found images without labels in photos: expected one subfolder per class, or"
    ):
        load_data(tmp_path / "photos", streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("make", [image_folder, split_folders, parquet_folder, webdataset, saved_alone])
def test_labels_that_are_there_may_be_left_out(make: Any, streaming: bool, tmp_path: Path) -> None:
    data = load_data(make(tmp_path / "source"), needs_labels=False, streaming=streaming)
    assert data.columns[1] is None and data.label_names == []
    assert all(set(row) == {data.columns[0]} for split in (data.train, data.evaluation) for row in split)


def labelled(path: Path, labels: list[Any]) -> Path:
    rows = {"image": colored_images(len(labels), 0)[0], "label": labels}
    Dataset.from_dict(rows).cast_column("image", Image()).save_to_disk(str(path))
    return path


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        ([4, 0, 2], ["0", "1", "2", "3", "4"], {0, 2, 4}),
        ([-1, 1, 1], ["-1", "1"], {0, 1}),
        ([True, False, True], ["False", "True"], {0, 1}),
        ([1, 2, 3], ["1", "2", "3"], {0, 1, 2}),
        (["oak", "ash", "elm"], ["ash", "elm", "oak"], {0, 1, 2}),
    ],
)
def test_labels_of_any_kind(
    labels: list[Any], names: list[str], numbers: set[int], streaming: bool, tmp_path: Path
) -> None:
    data = load_data(labelled(tmp_path / "source", labels * 10), streaming=streaming)
    assert data.label_names == names
    assert {row["label"] for row in data.train} == numbers


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, None], r"10 of 20 images have no label in 'label' \(rows 2, 4, 6, ...\): add the labels, remove"),
        (["a", None], "10 of 20 images have no label in 'label'"),
        ([[0, 1], [1]], "Expected one class per image in 'label', found lists.*specify another label_column"),
        ([0.5, 1.0], "Expected classes in 'label', found numbers such as 0.5: set the task to regression"),
    ],
)
def test_labels_that_are_no_classes_are_refused(
    labels: list[Any], message: str, streaming: bool, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        load_data(
            labelled(tmp_path / "source", labels * 10),
            streaming=streaming,
            problem_type="single_label_classification",
        )


@pytest.mark.parametrize("streaming", [False, True])
def test_classes_of_splits_are_united_by_name(tmp_path: Path, streaming: bool) -> None:
    test = colored_dataset(9, 1).cast_column("label", ClassLabel(names=["Green", "blue", "pink"]))
    DatasetDict({"train": colored_dataset(30, 0), "test": test}).save_to_disk(str(tmp_path))
    data = load_data(tmp_path, streaming=streaming)
    assert data.label_names == ["blue", "green", "pink", "red"]
    labels = [row["label"] for row in data.train]
    assert sorted(labels) == [0] * 10 + [1] * 10 + [3] * 10 and (streaming or labels[:3] == [0, 1, 3])
    assert sorted(row["label"] for row in data.evaluation) == [0] * 3 + [1] * 3 + [2] * 3
    assert streaming or data.evaluation["label"][:3] == [1, 0, 2]
    assert data.notes[0] == "Classes that differ only in case or Unicode form are united: 'Green' as 'green'."
    if not streaming:
        assert data.notes[1] == "1 class has no training images, so the model cannot learn it: pink."


@pytest.mark.parametrize("streaming", [False, True])
def test_a_column_that_cannot_be_told_must_be_named(tmp_path: Path, streaming: bool) -> None:
    images, labels = colored_images(30, 0)
    features = Features(
        {"left": Image(), "right": Image(), "kind": ClassLabel(names=list(COLORS)), "place": Value("int64")}
    )
    rows = {"left": images, "right": images, "kind": labels, "place": list(range(30))}
    Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "source"))
    with pytest.raises(ValueError, match=r"Cannot infer image_column: specify one of left, right"):
        load_data(tmp_path / "source", streaming=streaming)
    found = load_data(tmp_path / "source", image_column="right", streaming=streaming)
    assert found.columns == ("right", "kind")  # the only column of classes
    named = load_data(tmp_path / "source", image_column="left", label_column="kind", streaming=streaming)
    assert named.columns == ("left", "kind") and named.label_names == list(COLORS)


def test_something_must_be_held_out(tmp_path: Path) -> None:
    colored_dataset(3, 0).save_to_disk(str(tmp_path / "source"))
    with pytest.raises(ValueError, match="source has 3 training images and needs some for evaluation too"):
        load_data(tmp_path / "source")


def test_a_card_says_no_path_of_the_machine(tmp_path: Path) -> None:
    assert load_data(parquet_file(tmp_path / "source")).name == "flowers"
    assert load_data(image_folder(tmp_path / "trees")).name == "trees"
    assert load_data("digits").name == "digits"


def test_an_image_is_known_by_its_bytes_or_the_end_of_its_path() -> None:
    assert image_digest({"bytes": b"a", "path": "x"}) == image_digest({"bytes": b"a", "path": "y"})
    assert image_digest({"bytes": None, "path": "/a/b/c.png"}) == image_digest({"bytes": None, "path": "/z/b/c.png"})
    assert image_digest({"bytes": b"a", "path": None}) != image_digest({"bytes": b"b", "path": None})


def test_digits_hold_out_the_same_fifth_of_every_class() -> None:
    data = load_data("digits")
    assert (len(data.train), len(data.evaluation)) == (1438, 359)
    counts = torch.tensor(data.evaluation["label"]).bincount()
    assert counts.min() >= 34 and counts.max() <= 37
    again = load_data("digits")
    assert again.evaluation["label"] == data.evaluation["label"]


def test_columns_and_splits_can_be_named(tmp_path: Path) -> None:
    folder = parquet_folder(tmp_path / "source")
    data = load_data(folder, train_split="test", eval_split="train", image_column="image", label_column="label")
    assert (len(data.train), len(data.evaluation)) == (9, 30)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "/no/such/folder"}, "No such file or folder: /no/such/folder"),
        ({"source": ""}, "Expected a data set, got ''"),
        ({"train_split": "trian"}, "Unknown train_split 'trian': choose one of train, test"),
        ({"eval_split": "val"}, "Unknown split 'val': choose one of train, test"),
        ({"image_column": "img"}, "Unknown image_column 'img': choose one of image"),
        ({"label_column": "class"}, "Unknown label_column 'class': choose one of label"),
        ({"source": "digits", "eval_fraction": 0.0}, "eval_fraction must be between 0 and 1, got 0.0"),
    ],
)
def test_refuses(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    if "source" not in arguments:
        arguments = {"source": save_photos(tmp_path / "photos"), **arguments}
    with pytest.raises(ValueError, match=message):
        load_data(**arguments)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no images, tables, parquet files or webdataset shards. It is empty"):
        load_data(tmp_path)


def test_split_is_even_and_whole() -> None:
    labels = [0] * 50 + [1] * 10 + [2] * 5
    kept, held_out = split_evenly(labels, 0.2, seed=3)
    assert sorted(kept + held_out) == list(range(65))
    assert torch.tensor([labels[index] for index in held_out]).bincount().tolist() == [10, 2, 1]
    assert split_evenly(labels, 0.2, seed=4)[1] != held_out


def test_seeds() -> None:
    assert derive_seed(0, "order", 1) == derive_seed(0, "order", 1)
    assert (
        len({derive_seed(seed, epoch, index) for seed in range(3) for epoch in range(3) for index in range(50)}) == 450
    )
    assert all(0 <= derive_seed(part) < 2**63 for part in range(100))


def test_a_share_to_learn_from_is_part_of_a_larger_one() -> None:
    whole = load_data("digits")
    larger, smaller = (load_data("digits", train_share=share) for share in (0.3, 0.1))
    names = [{image["bytes"] for image in as_stored(data.train, data.columns)["image"]} for data in (larger, smaller)]
    assert names[1] < names[0]
    assert smaller.train_length == len(smaller.train) and len(smaller.evaluation) == len(whole.evaluation)
    label = whole.columns[1]
    for number in range(10):
        assert smaller.train[label][:].count(number) == round(0.1 * whole.train[label][:].count(number))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train_share": 0.0}, "train_share must be between 0 and 1, got 0.0"),
        ({"train_share": 1e-6}, "train_share=1e-06 leaves none of"),
        ({"train_share": 0.5, "streaming": True}, "train_share and train_repeats need a prepared data set"),
    ],
)
def test_shares_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_data("digits", **fields)
