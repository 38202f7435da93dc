"""Folders, tables and archives as people have them: which images are found, with which split and label."""

import csv
import io
import json
import os
import shutil
import tarfile
import unicodedata
import zipfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, DatasetDict, Image, load_dataset
from PIL import Image as PILImage

from hf_vit.data.folders import layout_of, scan, split_of
from hf_vit.data.labelled import ImageData, load_data, split_evenly

Tree = dict[str, Any]  # names to trees, to a number of images, or to the text of a file
CLASSES: Tree = {"cat": 5, "dog": 5}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def drawn(path: Path, tree: Tree) -> Path:
    """Write a tree; a number `n` of a name is a folder of `n` images, and one of `x.png` is an image."""
    path.mkdir(parents=True, exist_ok=True)
    for name, inner in tree.items():
        if isinstance(inner, dict):
            drawn(path / name, inner)
        elif isinstance(inner, str):
            (path / name).write_text(inner, encoding="utf-8")
        elif name.lower().endswith((".png", ".jpg")):
            draw(path / name, inner)
        else:
            (path / name).mkdir()
            for number in range(inner):
                draw(path / name / f"{number:03d}.png", number)
    return path


def draw(path: Path, number: int) -> None:
    PILImage.new("RGB", (4, 4), (number % 256, len(path.parent.name), 90)).save(path)


def table(path: Path, rows: Sequence[Sequence[Any]], delimiter: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


def labels_of(split: Any, data: ImageData) -> dict[str, Any]:
    """Return the label of each image, by the last two parts of its path."""
    image, label = data.columns
    rows = split.cast_column(image, Image(decode=False))
    named = data.problem_type == "single_label_classification"
    return {
        "/".join(Path(row[image]["path"]).parts[-2:]): data.label_names[row[label]] if named else row[label]
        for row in rows
    }


def counts(data: ImageData) -> tuple[int, int, list[str]]:
    return len(data.train), len(data.evaluation), data.label_names


# -------------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize(
    "names", [("a", "a b", "B", "10", "2", "é"), ("train", "bus"), ("test tube", "training shoe")]
)
def test_plain_class_folders_are_read_in_the_order_of_imagefolder(names: Sequence[str], tmp_path: Path) -> None:
    images = {"x 1.png": 0, "x.png": 1, "10.png": 2, "2.PNG": 3, "z.jpg": 4}
    folder = drawn(tmp_path / "source", {name: images for name in names})
    splits = layout_of(scan(folder)[0]).splits
    assert list(splits) == ["train"]
    ours = [(str(image.path), image.label) for image in splits["train"]]
    files = {"train": [str(path) for path in folder.rglob("*.*")]}  # without splits in the names of folders
    theirs = load_dataset("imagefolder", data_files=files, split="train", cache_dir=str(tmp_path / "hf"))
    label_names = theirs.features["label"].names
    rows = theirs.cast_column("image", Image(decode=False))
    assert sorted(ours) == sorted((row["image"]["path"], label_names[row["label"]]) for row in rows)
    assert [path for path, _ in ours] == sorted(path for path, _ in ours)
    if names[0] == "a":
        theirs = load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=str(tmp_path / "hf"))
        rows = theirs.cast_column("image", Image(decode=False))
        assert ours == [(row["image"]["path"], label_names[row["label"]]) for row in rows]
        assert load_data(folder).label_names == label_names


@pytest.mark.parametrize(
    ("train", "test", "name"),
    [
        ("train", "test", "test"),
        ("Training", "Testing", "test"),
        ("TRAIN", "VAL", "validation"),
        ("Train", "Validation", "validation"),
        ("train", "valid", "validation"),
        ("train_images", "val-images", "validation"),
        ("train2017", "val2017", "validation"),
        ("seg_train", "seg_test", "test"),
        ("TrainImages", "TestImages", "test"),
        ("training_set", "dev_set", "validation"),
        ("trainset", "hold-out", "test"),
        ("train-clean", "evaluation", "test"),
    ],
)
def test_split_folders_of_any_spelling(train: str, test: str, name: str, tmp_path: Path) -> None:
    folder = drawn(tmp_path / "source", {train: CLASSES, test: {"cat": 2, "dog": 1}})
    for source in (folder, drawn(tmp_path / "outer", {}) / "outer"):
        if source != folder:
            shutil.copytree(folder, source / "inner")  # folders in which nothing else lies
        data = load_data(source)
        assert counts(data) == (10, 3, ["cat", "dog"]) and data.eval_split == name
        assert not data.notes
    assert load_data(folder, eval_split=test).eval_split == name or test not in ("train", "test", "valid")


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"cat": {"p1": 3, "p2": 2}, "dog": {"p1": 1, "p3": 4}}, (8, 2)),  # a class, then patients
        ({"train": {"cat": {"p": 5}, "dog": {"p": 5}}, "test": {"cat": {"q": 1}, "dog": 1}}, (10, 2)),
        ({"data": CLASSES}, (8, 2)),
        ({"images": CLASSES, "annotations": {"a.xml": "<a/>"}}, (8, 2)),
        ({"images": CLASSES, "masks": CLASSES}, (8, 2)),
        ({"cat": {"images": 5, "masks": 5}, "dog": {"images": 5, "masks": 5}}, (8, 2)),
        ({"train": {"images": CLASSES}, "val": {"images": {"cat": 1, "dog": 1}}}, (10, 2)),
        (
            {"seg_train": {"seg_train": CLASSES}, "seg_test": {"seg_test": {"cat": 1, "dog": 1}}, "seg_pred": 4},
            (10, 2),
        ),
        ({"cat": {"train": 5, "test": 1}, "dog": {"train": 5, "test": 1}}, (10, 2)),  # a class, then splits
        ({"cat": 5, "dog": {**{f"{i}.png": i for i in range(4)}, "test_000.png": 0}}, (8, 2)),
        ({"cat": {**{f"{i}.png": i for i in range(4)}, "train-cat-val.png": 0}, "dog": 5}, (8, 2)),
    ],
)
def test_layouts_of_folders(tree: Tree, expected: tuple[int, int], tmp_path: Path) -> None:
    folder = drawn(tmp_path / "source", tree)
    data = load_data(folder)
    assert counts(data) == (*expected, ["cat", "dog"])
    for path, label in {**labels_of(data.train, data), **labels_of(data.evaluation, data)}.items():
        assert label in path or any(part in path for part in ("p", "q", "images", "train", "test"))
    stream = load_data(folder, streaming=True)
    assert stream.label_names == data.label_names and stream.notes[: len(data.notes)] == data.notes
    assert sum(1 for _ in stream.train) + sum(1 for _ in stream.evaluation) == sum(expected)
    assert stream.train.num_shards > 1


def test_masks_are_classes_where_no_images_lie_beside_them(tmp_path: Path) -> None:
    assert load_data(drawn(tmp_path / "a", {"mask": 5, "no_mask": 5})).label_names == ["mask", "no_mask"]
    assert load_data(drawn(tmp_path / "b", {"with_mask": 5, "without_mask": 5})).train_length == 8
    assert load_data(drawn(tmp_path / "d", {"mask": 5, "photo": 5, "cat": 5})).label_names == ["cat", "mask", "photo"]
    files = {"a.png": 0, "a_mask.png": 1, "b.png": 2, "b_mask_1.png": 3, "c_mask.png": 4, "d.png": 5}
    data = load_data(drawn(tmp_path / "c", {"benign": files, "normal": 4}))
    assert len(data.train) + len(data.evaluation) == 8 and data.notes == [
        "Skipped 2 files not read as images: 2 masks."
    ]


def test_what_is_no_image_is_counted_once(tmp_path: Path) -> None:
    rubbish = {".DS_Store": "", "Thumbs.db": "", "desktop.ini": "", "notes.txt": "", "paper.pdf": "", "._000.png": ""}
    tree = {
        "train": {"cat": {**rubbish, "x.png": 1, "y.png": 1}, "dog": 3},
        "val": {"cat": 1, "dog": {**rubbish, "x.png": 1}},
    }
    folder = drawn(tmp_path / "source", {**tree, "__MACOSX": {"cat": 3}, ".git": {"cat": 3}, "license": ""})
    data = load_data(folder)
    assert counts(data) == (5, 2, ["cat", "dog"])
    [note] = data.notes
    assert note.startswith("Skipped 13 files not read as images: 2 .")
    assert all(part in note for part in ("2 .db", "2 .txt", "2 .pdf", "1 without an ending"))
    assert note.endswith("; and 2 folders: .git, __MACOSX.")


def test_images_beside_the_folders_are_named(tmp_path: Path) -> None:
    data = load_data(drawn(tmp_path / "source", {**CLASSES, "overview.png": 3, "empty": {}}))
    assert counts(data) == (8, 2, ["cat", "dog"])
    assert data.notes == [
        "1 folder without images in source: empty.",
        "Skipped 1 image beside the folders of the classes: overview.png.",
    ]


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    real = drawn(tmp_path / "real", CLASSES)
    folder = drawn(tmp_path / "source", {"fox": 5})
    for name in CLASSES:
        (folder / name).symlink_to(real / name)
    (real / "cat" / "again").symlink_to(folder)
    (folder / "fox" / "up").symlink_to("..")
    (folder / "gone").symlink_to("nowhere")
    (folder / "fox" / "gone.png").symlink_to("nowhere.png")
    data = load_data(folder)
    assert data.label_names == ["cat", "dog", "fox"] and len(data.train) + len(data.evaluation) == 15
    assert data.notes[0] == "Skipped 2 files not read as images: 2 broken links."


def test_folders_below_the_classes_are_named(tmp_path: Path) -> None:
    data = load_data(drawn(tmp_path / "source", {"2019": CLASSES, "2020": CLASSES, "2021": {}}))
    assert data.label_names == ["2019", "2020"] and data.notes == [
        "1 folder without images in source: 2021.",
        "The classes are 2019, 2020; the folders below them, such as cat, dog, are not classes.",
    ]
    data = load_data(drawn(tmp_path / "other", {"train": CLASSES, "val": {}}))
    assert counts(data) == (8, 2, ["cat", "dog"]) and data.notes == ["1 folder without images in other: val."]


@pytest.mark.parametrize("test", [5, {"images": 5}, {"unknown": 5}])
def test_a_split_without_labels_is_not_evaluated(test: Any, tmp_path: Path) -> None:
    folder = drawn(tmp_path / "source", {"train": CLASSES, "test": test})
    data = load_data(folder)
    assert counts(data) == (8, 2, ["cat", "dog"]) and data.eval_split == "held out"
    assert any(note.startswith("The test split has no labels, so it is not used") for note in data.notes)
    with pytest.raises(ValueError, match="Found images without labels in source"):
        load_data(folder, eval_split="test")
    assert load_data(drawn(folder, {"val": {"cat": 1, "dog": 1}})).eval_split == "validation"


def test_classes_that_differ_in_case_or_unicode_form_are_united(tmp_path: Path) -> None:
    names = [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")]
    folder = drawn(tmp_path / "a", {"train": {names[0]: 3, "dog": 3}, "test": {names[1]: 1, "Dog": 2}})
    data = load_data(folder)
    assert counts(data) == (6, 3, [names[0], "dog"])
    assert "are united: 'Dog' as 'dog'" in data.notes[0]
    data = load_data(drawn(tmp_path / "b", {"Cat": 3, "cat": 3}))
    assert data.label_names == ["Cat", "cat"]  # which are two classes in one split
    assert data.notes[0].startswith("Classes that differ only in case or spaces: 'Cat' and 'cat'.")
    data = load_data(drawn(tmp_path / "c", {names[0]: 3, names[1]: 3, "dog": 3}))
    assert len(data.label_names) == 2 and len(data.train) + len(data.evaluation) == 9


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"cat": 5}, "Found one class only, cat, in source: expected at least two classes"),
        ({"cat.0.png": 0, "dog.1.png": 1}, "Found images without labels in source: expected one subfolder per class"),
        ({"a.txt": "", "b.zip": ""}, "holds no images, .* It holds the archives b.zip: give one of them"),
        ({"cat": 5, "dog": {}}, "one class only, cat, .* 1 folder without images in source: dog"),
        ({"cat.0.png": 0, "x.xml": ""}, "Found 1 image, such as source/cat.0.png. Skipped 1 file .* 1 .xml"),
        (
            {"cat": {"a.heic": ""}, "dog": {"b.heic": ""}},
            "It holds cat, dog. Skipped 2 files .*: 2 .heic",
        ),
        ({"train": CLASSES, "extra": {"cat": 1}}, "Cannot tell whether train in .* but extra beside it is not named"),
        ({"train": CLASSES, "unlabelled": 3}, "Cannot tell whether train in .* but unlabelled beside it is not"),
        ({"train": {}, "test": CLASSES}, "The folder train in .* holds no images"),
        ({"cat": {"train": 3, "val": 1}, "dog": 3}, "cat in .* is divided into train and validation, but dog is not"),
        ({"cat": 1, "dog": 1}, "2 training images and needs some for evaluation too: every class has one image only"),
    ],
)
def test_folders_that_do_not_suffice_are_refused(tree: Tree, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_data(drawn(tmp_path / "source", tree))


def test_small_classes_are_named(tmp_path: Path) -> None:
    tree = {"train": {"cat": 4, "dog": 1}, "test": {"cat": 1, "fox": 1}}
    data = load_data(drawn(tmp_path / "source", tree))
    assert data.label_names == ["cat", "dog", "fox"] and data.class_counts() == [4, 1, 0]
    assert data.notes == [
        "1 class has no training images, so the model cannot learn it: fox.",
        "1 class has a single training image: dog.",
    ]


def test_names_of_splits() -> None:
    assert [split_of(name) for name in ("TRAIN", "val", "dev-set", "eval", "train_val", "retrain", "10", "")] == [
        *("train", "validation", "validation", "test", None, None, None, None)
    ]


# --------------------------------------------------------------------------------------------------------- tables

ROWS = [(f"{index:03d}", ["cat", "dog"][index % 2]) for index in range(10)]
EXPECTED = {f"{number}.png": label for number, label in ROWS}


def flat(number: int = 10) -> Tree:
    return {f"{index:03d}.png": index for index in range(number)}


def all_labels(data: ImageData) -> dict[str, Any]:
    return {
        Path(path).name: label
        for split in (data.train, data.evaluation)
        for path, label in labels_of(split, data).items()
    }


@pytest.mark.parametrize("images", ["train", "images", "train_images", "deep/er/train", "."])
@pytest.mark.parametrize("ending", ["", ".png"])
@pytest.mark.parametrize("names", [("id", "label"), ("Image_Name", "Species"), ("where", "what")])
def test_a_table_beside_a_folder(images: str, ending: str, names: tuple[str, str], tmp_path: Path) -> None:
    folder = drawn(tmp_path / "source", {})
    drawn(folder / images, flat())
    rows = [(f"{number}{ending}", label) for number, label in ROWS]
    path = table(folder / "train.csv", [names, *rows])
    for source in (folder, path):
        data = load_data(source)
        assert all_labels(data) == EXPECTED and data.columns == names
    data = load_data(folder, image_column=names[0], label_column=names[1], streaming=True)
    assert data.label_names == ["cat", "dog"] and data.train_length == 8


def test_kaggle(tmp_path: Path) -> None:
    folder = drawn(tmp_path / "source", {"train": flat(), "test": flat()})
    table(folder / "train.csv", [("id", "label"), *ROWS])
    table(folder / "sample_submission.csv", [("id", "label"), *((number, "cat") for number, _ in ROWS)])
    table(folder / "test.csv", [("id",), *((number,) for number, _ in ROWS)])
    data = load_data(folder)
    assert all_labels(data) == EXPECTED and data.eval_split == "held out"
    assert all("/train/" in row["path"] for row in data.train.cast_column("id", Image(decode=False))["id"])
    assert data.notes == ["Skipped 10 of 20 images that no table of labels names."]


def test_tables_of_any_format(tmp_path: Path) -> None:
    folder = drawn(tmp_path / "source", {"images": flat()})
    rows = [(f"images/{number}.png", label) for number, label in ROWS]
    head = ("path", "label")
    dicts = [dict(zip(head, row, strict=True)) for row in rows]
    paths = [
        table(folder / "a.csv", [head, *rows]),
        table(folder / "b.csv", [head, *rows], ";"),
        table(folder / "c.tsv", [head, *rows], "\t"),
        table(folder / "d.csv", rows),  # without a header
        folder / "e.jsonl",
        folder / "f.json",
        folder / "g.parquet",
        folder / "h.csv",
    ]
    paths[4].write_text("\n".join(map(json.dumps, dicts)) + "\n")
    paths[5].write_text(json.dumps(dicts))
    pq.write_table(pa.Table.from_pylist(dicts), paths[6])
    paths[7].write_bytes(b"\xef\xbb\xbf" + "\r\n".join(f"{a},{b}" for a, b in [head, *rows]).encode())
    for path in paths:
        assert all_labels(load_data(path)) == EXPECTED, path.name
    with pytest.raises(ValueError, match=r"Several tables label the images of .*: a.csv, b.csv"):
        load_data(folder)


def test_a_parquet_file_of_absolute_paths(tmp_path: Path) -> None:
    files = sorted(map(str, drawn(tmp_path / "source", CLASSES).rglob("*.png")))
    rows = {"image_path": files, "label": [Path(file).parent.name for file in files]}
    pq.write_table(pa.table(rows), tmp_path / "paths.parquet")
    assert counts(load_data(tmp_path / "paths.parquet")) == (8, 2, ["cat", "dog"])


def test_a_column_of_splits_divides(tmp_path: Path) -> None:
    folder = drawn(tmp_path / "source", {"images": flat()})
    splits = ["train"] * 7 + ["val"] * 3
    rows = [(f"{number}.png", label, split) for (number, label), split in zip(ROWS, splits, strict=True)]
    data = load_data(table(folder / "labels.csv", [("file", "label", "split"), *rows]))
    assert (len(data.train), len(data.evaluation), data.eval_split) == (7, 3, "validation")
    for values, expected, note in (
        (["train"] * 6 + ["holdout"] * 4, (6, 4), ""),
        (["train"] * 6 + ["val"] * 2 + ["unlabeled"] * 2, (6, 2), "1 split not used: unlabeled."),
        (["0"] * 6 + ["1"] * 4, (8, 2), "The column 'split' of labels.csv does not divide the images"),
    ):
        rows = [(f"{number}.png", label, split) for (number, label), split in zip(ROWS, values, strict=True)]
        data = load_data(table(folder / "labels.csv", [("file", "label", "split"), *rows]))
        assert (len(data.train), len(data.evaluation)) == expected and "".join(data.notes).startswith(note)


def test_splits_with_a_table_each(tmp_path: Path) -> None:
    """Roboflow writes one column of 0/1 for each class."""
    folder = drawn(tmp_path / "source", {"train": flat(), "valid": flat(4)})
    for split, number in (("train", 10), ("valid", 4)):
        rows = [(f"{index:03d}.png", index % 2, int(index < 3)) for index in range(number)]
        table(folder / split / "_classes.csv", [("filename", " cat", " dog"), *rows])
    data = load_data(folder)
    assert counts(data) == (10, 4, ["cat", "dog"]) and data.problem_type == "multi_label_classification"
    assert data.evaluation[1]["labels"] == [1.0, 1.0] and data.class_counts() == [5, 3]


def test_folders_are_the_classes_beside_captions(tmp_path: Path) -> None:
    folder = drawn(tmp_path / "source", CLASSES)
    rows = [(f"{name}/{index:03d}.png", f"a {name}") for name in CLASSES for index in range(5)]
    long = [("caption", "file"), *((f"{'a very ' * 1000}{text}", name) for name, text in rows)]
    assert load_data(table(folder / "metadata.csv", long)).label_names  # a text too long for a path is no path
    table(folder / "metadata.csv", [("file_name", "caption"), *rows])
    data = load_data(folder)
    assert counts(data) == (8, 2, ["cat", "dog"])
    assert data.notes == ["metadata.csv is not used: its columns (caption) are not labels, and the class folders are."]
    data = load_data(folder, label_column="caption")
    assert data.label_names == ["a cat", "a dog"] and data.columns == ("image", "caption")


def test_missing_files_are_named(tmp_path: Path) -> None:
    folder = drawn(tmp_path / "source", {"images": flat(), "more": {"000.png": 1}})
    path = table(folder / "labels.csv", [("file", "label"), *((f"{number}.png", label) for number, label in ROWS)])
    with_note = load_data(path)
    sentence = "1 of 10 files in column 'file' of labels.csv"
    assert with_note.notes == [f"Skipped {sentence} that do not exist or fit several images: 000.png."]
    rows = [(f"x{number}" if int(number) > 3 else number, label) for number, label in ROWS]
    with pytest.raises(ValueError, match=r"7 of 10 files in column 'file' of labels.csv do not exist below"):
        load_data(table(folder / "labels.csv", [("file", "label"), *rows]))
    with pytest.raises(ValueError, match=r"No column of .* names images: expected paths relative to"):
        load_data(
            table(folder / "labels.csv", [("file", "label"), *((f"x{number}", label) for number, label in ROWS)])
        )


# --------------------------------------------------------------------------------------------------------- labels


def with_column(path: Path, name: str, values: Sequence[Any], more: dict[str, Sequence[Any]] | None = None) -> Path:
    folder = drawn(path, flat(len(values)))
    columns = {"file": [f"{index:03d}.png" for index in range(len(values))], name: values, **(more or {})}
    return table(folder / "labels.csv", [list(columns), *zip(*columns.values(), strict=True)])


@pytest.mark.parametrize(
    ("values", "kind", "names"),
    [
        (["b", "a"] * 5, "single", ["a", "b"]),
        ([0, 1, 2, 1, 0] * 2, "single", ["0", "1", "2"]),
        (["007", "010"] * 5, "single", ["007", "010"]),
        (["True", "False"] * 5, "single", ["False", "True"]),
        ([1.0, 2.0] * 5, "single", ["1", "2"]),
        (["1_0", "20"] * 5, "single", ["1_0", "20"]),
        (["NA", "null", "nan", "None", "x"] * 2, "single", ["NA", "None", "nan", "null", "x"]),
        (["12345678901234567890", "1"] * 5, "single", ["1", "12345678901234567890"]),
        ([0.5, 1.25, 3] * 4, "regression", ["y"]),
        (["cat|dog", "cat", "dog"] * 4, "multi", ["cat", "dog"]),
        (["a;b", "b;c", "c", "a"] * 3, "multi", ["a", "b", "c"]),
        (["cat,dog", "cat", "dog"] * 4, "multi", ["cat", "dog"]),
        (["['a', 'b']", "['b']", "[]"] * 4, "multi", ["a", "b"]),
        (["crane, bird", "crane, machine"] * 5, "single", ["crane, bird", "crane, machine"]),
        (["great white shark", "great auk"] * 5, "single", ["great auk", "great white shark"]),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_the_kind_of_labels(values: list[Any], kind: str, names: list[str], streaming: bool, tmp_path: Path) -> None:
    data = load_data(with_column(tmp_path / "source", "y", values), streaming=streaming)
    problem_types = {"single": "single_label_classification", "multi": "multi_label_classification"}
    assert data.problem_type == problem_types.get(kind, kind) and data.label_names == names
    label = next(iter(data.train))["y"]
    assert isinstance(label, int) if kind == "single" else len(label) == len(names)
    if kind != "regression" and not streaming:
        assert sum(data.class_counts() or []) >= len(data.train) - (kind == "multi") * 4


def test_a_given_kind_of_labels(tmp_path: Path) -> None:
    numbers = with_column(tmp_path / "a", "y", [3, 5] * 5)
    data = load_data(numbers, problem_type="regression")
    assert {tuple(row) for row in data.train["y"][:]} == {(3.0,), (5.0,)} and data.class_counts() is None
    words = with_column(tmp_path / "b", "y", ["a b", "b"] * 5)
    assert load_data(words, label_separator=" ").label_names == ["a", "b"]
    assert load_data(words, problem_type="multi_label_classification").label_names == ["a", "b"]
    with pytest.raises(ValueError, match="Expected numbers in 'y' for regression, found 'a b'"):
        load_data(words, problem_type="regression")
    combined = with_column(tmp_path / "c", "y", ["a|b", "a", "b"] * 4)
    kept = load_data(combined, problem_type="single_label_classification")
    assert kept.label_names == ["a", "a|b", "b"]
    folders = drawn(tmp_path / "d", {"12": 3, "40.5": 3})
    data = load_data(folders, problem_type="regression")
    assert {tuple(row) for row in data.train["label"][:]} == {(12.0,), (40.5,)}
    with pytest.raises(ValueError, match="Unknown problem_type 'regresion': choose one of single_label_class"):
        load_data(folders, problem_type="regresion")


def test_several_columns(tmp_path: Path) -> None:
    more = {"dog": [1, 0] * 5, "age": [0.5] * 10, "city": ["x"] * 10}
    path = with_column(tmp_path / "source", "cat", [0, 1] * 5, more)
    one_hot = load_data(path, label_column=["cat", "dog"])
    assert one_hot.problem_type == "single_label_classification" and one_hot.label_names == ["cat", "dog"]
    assert set(all_labels(one_hot).values()) == {"cat", "dog"} and one_hot.columns[1] == "labels"
    assert load_data(path, label_column=["cat", "dog"], problem_type="multi_label_classification").train[0][
        "labels"
    ] == [0.0, 1.0]
    targets = load_data(path, label_column=["age", "cat"])
    assert targets.problem_type == "regression" and set(map(tuple, targets.train["labels"][:])) == {
        (0.5, 0.0),
        (0.5, 1.0),
    }
    with pytest.raises(ValueError, match="Expected numbers in column 'city', found 'x'"):
        load_data(path, label_column=["age", "city"])
    unknown = load_data(
        with_column(tmp_path / "b", "cat", [0, 1, ""] * 4, {"dog": [1, 0, 1] * 4}), label_column=["cat", "dog"]
    )
    assert unknown.notes == ["4 labels in the columns cat, dog are missing and count as unknown."]
    assert sum(unknown.class_counts() or []) < 12 and [-100.0, 1.0] in unknown.train["labels"][:]
    with pytest.raises(ValueError, match="Cannot infer label_column: specify one of cat, dog, age, city"):
        load_data(path)


@pytest.mark.parametrize(("values", "rows"), [(["a", "", "b", "a"], "row 2"), ([1, 2, "NA", "", 5], "rows 3, 4")])
def test_missing_labels_are_named(values: list[Any], rows: str, tmp_path: Path) -> None:
    number = len(rows.split(", "))
    with pytest.raises(
        ValueError, match=rf"{number} of {len(values)} images have no label in 'y' \({rows}\): add the"
    ):
        load_data(with_column(tmp_path / "source", "y", values))


# ------------------------------------------------------------------------------------------- archives and several


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
@pytest.mark.parametrize("is_wrapped", [False, True])
def test_archives(kind: str, is_wrapped: bool, tmp_path: Path) -> None:
    folder = drawn(tmp_path / "inner", {"train": CLASSES, "test": {"cat": 1, "dog": 1}, "__MACOSX": {"cat": 1}})
    path = tmp_path / f"pets.{kind}"
    root = "pets/" if is_wrapped else ""
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as zipped:
            for file in folder.rglob("*.png"):
                zipped.write(file, root + str(file.relative_to(folder)))
    else:
        with tarfile.open(path, "w:gz" if kind == "tar.gz" else "w") as tar:
            tar.add(folder, root or ".")
    data = load_data(path)
    assert counts(data) == (10, 2, ["cat", "dog"]) and data.name == "pets"
    before = os.stat(data.train.cast_column("image", Image(decode=False))[0]["image"]["path"]).st_mtime_ns
    again = load_data(path).train.cast_column("image", Image(decode=False))[0]["image"]["path"]
    assert os.stat(again).st_mtime_ns == before
    path.write_bytes(path.read_bytes()[:200])
    if kind != "tar":
        with pytest.raises(ValueError, match=r"cannot be unpacked: .* Copy or download it again"):
            load_data(path)


def test_several_sources_are_united_by_name(tmp_path: Path) -> None:
    first = drawn(tmp_path / "first", {"train": {"cat": 4, "dog": 4}, "val": {"cat": 1, "dog": 1}})
    second = drawn(tmp_path / "second", {"dog": 3, "ant": 3})
    third = drawn(tmp_path / "third", {"test": {"ant": 2}})
    labels = drawn(tmp_path / "fourth", {"images": flat()})
    path = table(labels / "labels.csv", [("file", "kind"), *((f"{number}.png", label) for number, label in ROWS)])
    for streaming in (False, True):
        data = load_data([first, str(second), third, path], streaming=streaming)
        assert data.label_names == ["ant", "cat", "dog"] and data.name == "first + second + third + fourth"
        assert data.train_length == 24 and sum(1 for _ in data.train) == 24 and sum(1 for _ in data.evaluation) == 4
        assert data.eval_split == "validation, test"
    assert load_data([first, second, third, path]).class_counts() == [3, 9, 12]
    with pytest.raises(ValueError, match="Found no training split in the sources"):
        load_data([third, third])
    with pytest.raises(ValueError, match="got an empty list"):
        load_data([])


# ------------------------------------------------------------------------------------------------------ held out


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5, 0.95])
@pytest.mark.parametrize("seed", range(3))
def test_no_class_loses_its_last_image(fraction: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 9, (12,), generator=generator).tolist()
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    kept, held_out = split_evenly(labels, fraction, seed)
    assert sorted(kept + held_out) == list(range(len(labels))) and held_out
    assert {labels[index] for index in kept} == set(range(12))


def test_two_images_per_class_suffice(tmp_path: Path) -> None:
    data = load_data(drawn(tmp_path / "source", {"cat": 2, "dog": 2}))
    assert (len(data.train), len(data.evaluation)) == (3, 1)
    assert data.notes[0].startswith("1 class has a single training image: ")
    assert data.notes[1].startswith("1 class has no evaluation images at eval_fraction=0.2: ")


def test_several_labels_are_divided_by_the_rarest(tmp_path: Path) -> None:
    values = ["common|rare" if index < 5 else "common" for index in range(50)] + ["other"] * 5
    data = load_data(with_column(tmp_path / "source", "y", values), label_separator="|")
    assert data.label_names == ["common", "other", "rare"]
    assert torch.tensor(data.evaluation["y"][:]).sum(dim=0).tolist() == [10, 1, 1]


def test_a_blank_cell_among_several_labels_is_none_of_them(tmp_path: Path) -> None:
    folder = drawn(tmp_path / "d", {f"{number}.png": number for number in range(12)})
    cells = ["cat|dog", "dog", "", "cat"] * 3
    table(folder / "labels.csv", [("image", "labels"), *[(f"{n}.png", cell) for n, cell in enumerate(cells)]])
    data = load_data(folder)
    assert data.problem_type == "multi_label_classification" and data.label_names == ["cat", "dog"]
    assert sum(sum(row) == 0 for split in (data.train, data.evaluation) for row in split[data.columns[1]]) == 3
    assert any("3 images have a blank label" in note for note in data.notes)


@pytest.mark.parametrize(
    ("labels", "names"),
    [([10, 5000], ["10", "5000"]), ([0, 1, 3], ["0", "1", "2", "3"])],
    ids=["numbers that are no indices", "indices, one of them missing"],
)
def test_whole_numbers_are_indices_if_most_of_them_occur(labels: list[int], names: list[str], tmp_path: Path) -> None:
    folder = drawn(tmp_path / "d", {f"{number}.png": number for number in range(12)})
    rows = [(f"{number}.png", labels[number % len(labels)]) for number in range(12)]
    table(folder / "labels.csv", [("image", "label"), *rows])
    assert load_data(folder).label_names == names


# --------------------------------------------------------------------------------------- shards and data sets


def rows_of(labels: Sequence[Any]) -> dict[str, list[Any]]:
    content = io.BytesIO()
    PILImage.new("RGB", (4, 4)).save(content, "png")
    return {"image": [{"bytes": content.getvalue(), "path": None} for _ in labels], "label": list(labels)}


@pytest.mark.parametrize(
    ("train", "other"),
    [
        ("train.parquet", "dev.parquet"),
        ("Train.parquet", "Evaluation.parquet"),
        ("train/0.PARQUET", "TESTING/0.PARQUET"),
        ("pets_training.parquet", "pets_holdout.parquet"),
    ],
)
def test_shards_of_splits_of_any_spelling(train: str, other: str, tmp_path: Path) -> None:
    for name, number in ((train, 6), (other, 4)):
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(rows_of("ab" * (number // 2))), tmp_path / "source" / name)
    data = load_data(tmp_path / "source")
    assert counts(data) == (6, 4, ["a", "b"]) and not data.notes


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_data_sets_are_read_without_their_format(kind: str, tmp_path: Path) -> None:
    plain = Dataset.from_dict(rows_of("ab" * 6)).cast_column("image", Image())
    formatted = plain.with_format(kind)
    formatted.save_to_disk(str(tmp_path / "saved"))
    for source in (tmp_path / "saved", formatted, DatasetDict({"train": formatted, "Dev": formatted})):
        data = load_data(source)
        assert data.train[0]["label"] in (0, 1) and isinstance(data.train[0]["image"], PILImage.Image)
        assert data.eval_split == ("Dev" if isinstance(source, dict) else "held out")
    stream = load_data(formatted.to_iterable_dataset(3))
    assert stream.is_stream and all(type(row["label"]) is int for row in stream.train)


def test_a_stream_of_a_folder_is_shuffled_and_of_sorted_shards_is_named(tmp_path: Path) -> None:
    folder = drawn(tmp_path / "source", {"cat": 20, "dog": 20})
    first, again = (load_data(folder, streaming=True) for _ in range(2))
    labels = [row["label"] for row in first.train]
    assert labels == [row["label"] for row in again.train]
    assert sum(label != other for label, other in pairwise(labels)) > 5 and not first.notes
    for name, values in (("sorted", ["a"] * 520 + ["b"] * 520), ("mixed", ["a", "b"] * 520)):
        pq.write_table(pa.table(rows_of(values)), tmp_path / f"{name}.parquet")
        notes = load_data(tmp_path / f"{name}.parquet", streaming=True).notes
        assert any("first 512 images are of 1 of 2 classes" in note for note in notes) == (name == "sorted")
