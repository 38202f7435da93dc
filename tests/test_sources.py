"""Sources of images: which words name what, in which order, and parts that are opened one by one."""

import io
import os
import pickle
import tarfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Image, Value, load_dataset
from datasets.splits import SplitDict, SplitInfo
from PIL import Image as PILImage
from tiny_run import colored_dataset, save_photos

from hf_vit.data import sources as sources_module
from hf_vit.data.sources import Part, Sources, files_of


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have images of three classes, and other files, below the current folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("b/2.png", "b/1.jpg", "a/deep/3.PNG", "c.webp", "a/9.png"):
        Path("photos", name).parent.mkdir(parents=True, exist_ok=True)
        PILImage.new("RGB", (4, 4)).save(Path("photos", name))
    Path("photos", "a", "notes.txt").write_text("no image")
    return tmp_path


def write_parquet(path: Path, number: int, row_group_size: int, seed: int = 0) -> Path:
    stored = colored_dataset(number, seed).cast_column("image", Image(decode=False))
    pq.write_table(stored.with_format("arrow")[:], path, row_group_size=row_group_size)
    return path


def names(words: Sequence[str], **options: Any) -> list[str]:
    return [row["path"] for row in Sources(words, **options).rows()]


def images(words: Sequence[str | Path], **options: Any) -> list[tuple[int, ...]]:
    """Return the first pixel of every image."""
    rows = Sources([str(word) for word in words], **options).rows()
    return [PILImage.open(io.BytesIO(row["bytes"])).getpixel((0, 0)) for row in rows]


def expected(number: int, seed: int) -> list[tuple[int, ...]]:
    return [image.getpixel((0, 0)) for image in colored_dataset(number, seed)["image"]]


# ---------------------------------------------------------------------------------------------------------- files


def test_files_come_folder_by_folder_by_name(folder: Path) -> None:
    below = ["photos/a/9.png", "photos/a/deep/3.PNG", "photos/b/1.jpg", "photos/b/2.png", "photos/c.webp"]
    assert names(["photos"]) == below
    assert names(["photos/b/2.png", "photos/a", "photos/b/2.png"]) == [below[3], *below[:2], below[3]]
    assert list(files_of(["./photos/b/"])) == [Path(name) for name in below[2:4]]
    assert names(["photos/a/notes.txt"]) == ["photos/a/notes.txt"]  # by its own name, whatever that is


def test_a_name_without_an_ending_is_no_image(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saving a SPIDER image into memory makes Pillow 12.0 take no ending for one of images."""
    below = names(["photos"])
    monkeypatch.setitem(PILImage.registered_extensions(), "", "SPIDER")
    Path("photos", ".lock").touch()
    Path("photos", "notes").touch()
    assert names(["photos"]) == below


def test_links_to_folders_are_followed_but_not_in_circles(folder: Path) -> None:
    Path("photos", "a", "up").symlink_to("..")
    Path("other").mkdir()
    Path("photos", "d").symlink_to(Path("other").absolute())
    PILImage.new("RGB", (4, 4)).save(Path("other", "1.png"))
    below = ["a/9.png", "a/deep/3.PNG", "b/1.jpg", "b/2.png", "c.webp", "d/1.png"]
    assert names(["photos"]) == [f"photos/{name}" for name in below]


@pytest.mark.parametrize(
    ("pattern", "fitting"),
    [
        ("photos/*/*.png", ["a/9.png", "b/2.png"]),
        ("photos/**/*", ["a/9.png", "a/deep/3.PNG", "b/1.jpg", "b/2.png", "c.webp"]),
        ("photos/**", ["a/9.png", "a/deep/3.PNG", "b/1.jpg", "b/2.png", "c.webp"]),
        ("photos/*", ["a/9.png", "a/deep/3.PNG", "b/1.jpg", "b/2.png", "c.webp"]),
        ("photos/[ac]*", ["a/9.png", "a/deep/3.PNG", "c.webp"]),
        ("photos/?/*.txt", []),
    ],
)
def test_globs(folder: Path, pattern: str, fitting: list[str]) -> None:
    assert names([pattern]) == [f"photos/{name}" for name in fitting]


def test_a_name_with_brackets_is_a_name(folder: Path) -> None:
    Path("photos/b/1.jpg").rename("photos/a/[1].jpg")
    assert names(["photos/a/[1].jpg"]) == ["photos/a/[1].jpg"]


@pytest.mark.parametrize(
    "word", ["photos/d/*.png", "photos/d/x.png", "missing.jpg", "/none", "a.parquet", "a/b/c", "phtos/"]
)
def test_what_is_not_there_is_named(folder: Path, word: str) -> None:
    with pytest.raises(ValueError) as refusal:
        list(Sources([word]).rows())
    assert str(refusal.value) == ("No file matches " if "*" in word else "No such file or folder: ") + word


def test_parts_tell_of_changed_files_without_reading_them(folder: Path) -> None:
    def identities(size: int = 2) -> list[str]:
        return [part.identity for part in Sources(["photos"]).parts(size)]

    before = identities()
    assert len(before) == 3 and identities() == before
    os.utime("photos/b/1.jpg", ns=(0, 0))
    assert [one == other for one, other in zip(before, identities(), strict=True)] == [True, False, True]
    Path("photos/a/00.png").write_bytes(b"new")
    assert all(one != other for one, other in zip(before, identities(), strict=True))


# --------------------------------------------------------------------------------------------------------- tables


def lengths(parts: Sequence[Part]) -> list[int | None]:
    assert [len(list(part.rows())) for part in parts] == [part.length or len(list(part.rows())) for part in parts]
    return [part.length for part in parts]


def test_row_groups_stand_together_up_to_a_size(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", 25, 4)
    parts = list(Sources([str(path)]).parts(10))
    assert lengths(parts) == [8, 8, 9]
    assert lengths(list(Sources([str(path)]).parts(3))) == [4] * 6 + [1]
    assert len({part.identity for part in parts}) == 3
    assert images([path]) == expected(25, 0)
    assert len(list(pickle.loads(pickle.dumps(parts[1])).rows())) == 8


def test_folders_of_parquet_have_splits(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-00001.parquet", 7, 4, seed=1)
    write_parquet(tmp_path / "train-00000.parquet", 6, 4)
    write_parquet(tmp_path / "test.parquet", 5, 4, seed=2)
    assert images([tmp_path], split="train") == expected(6, 0) + expected(7, 1)
    assert images([tmp_path / "*.parquet"]) == expected(5, 2) + expected(6, 0) + expected(7, 1)
    with pytest.raises(ValueError, match="Cannot infer split: specify one of"):
        Sources([str(tmp_path)])
    with pytest.raises(ValueError, match="Unknown split 'valid': choose one of"):
        Sources([str(tmp_path)], split="valid")


def test_columns_of_bytes_and_of_names_are_images_too(folder: Path) -> None:
    paths = [str(path) for path in files_of(["photos"])]
    contents = [Path(path).read_bytes() for path in paths]
    pq.write_table(pa.table({"picture": contents, "thumb": contents[::-1], "name": paths}), "a.parquet")
    assert [row["bytes"] for row in Sources(["a.parquet"], image_column="thumb").rows()] == contents[::-1]
    assert names(["a.parquet"], image_column="name") == paths
    with pytest.raises(ValueError, match=r"Cannot infer image_column: specify one of picture, thumb"):
        Sources(["a.parquet"])
    with pytest.raises(ValueError, match="Unknown image_column 'label'"):
        Sources(["a.parquet"], image_column="label")
    pq.write_table(pa.table({"image": pa.array([None, contents[0]], pa.binary())}), "b.parquet")
    assert [row["bytes"] for row in Sources(["b.parquet"]).rows()] == [None, contents[0]]
    Path("shards").mkdir()
    pq.write_table(pa.table({"image": contents}), "shards/0.parquet")
    pq.write_table(pa.table({"picture": contents}), "shards/1.parquet")
    with pytest.raises(ValueError, match=r"1\.parquet has no column 'image': it has picture"):
        list(Sources(["shards"]).parts(9))


def test_a_file_that_is_no_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(ValueError, match=r"a\.parquet is not a parquet file, or is corrupt"):
        Sources([str(tmp_path / "a.parquet")])


def test_saved_data_sets(tmp_path: Path) -> None:
    photos = save_photos(tmp_path / "photos")
    assert images([photos], split="test") == expected(21, 1)
    parts = list(Sources([str(photos)], split="train").parts(20))
    assert lengths(parts) == [20, 20, 14]
    assert [part.identity for part in parts] == [p.identity for p in Sources([str(photos)], split="train").parts(20)]
    named = colored_dataset(3, 0).rename_column("image", "scan").cast_column("label", Value("string"))
    named.save_to_disk(str(tmp_path / "named"))
    assert images([tmp_path / "named"]) == expected(3, 0)


def test_digits_need_no_file() -> None:
    assert lengths(list(Sources(["digits"]).parts(1000))) == [1000, 797]


def test_webdataset_shards_are_read_as_they_come(tmp_path: Path) -> None:
    for shard, number in (("0", 3), ("1", 2)):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for index in range(number):
                content = io.BytesIO()
                PILImage.new("RGB", (5, 5), (10 * index, int(shard), 0)).save(content, "PNG")
                info = tarfile.TarInfo(f"{index:04}.png")
                info.size = content.tell()
                content.seek(0)
                tar.addfile(info, content)
    parts = list(Sources([str(tmp_path)]).parts(2))
    assert lengths(parts) == [None, None] and len({part.identity for part in parts}) == 2
    assert images([tmp_path]) == [(0, 0, 0), (10, 0, 0), (20, 0, 0), (0, 1, 0), (10, 1, 0)]
    assert images([tmp_path / "1.tar"]) == [(0, 1, 0), (10, 1, 0)]
    assert Sources([str(tmp_path)]).stated is None


def test_data_sets_of_the_hub_are_streams_of_one_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [str(write_parquet(tmp_path / f"{number}.parquet", 6, 4, number)) for number in range(2)]

    def open_splits(word: str, streaming: bool) -> dict[str, Any]:
        assert word == "someone/flowers" and streaming
        stream = load_dataset("parquet", data_files=files, split="train", streaming=True)
        stream.info.splits = SplitDict({"train": SplitInfo("train", num_examples=12)})
        return {"train": stream}

    hub = SimpleNamespace(dataset_info=lambda name: SimpleNamespace(sha="abc"))
    monkeypatch.setattr(sources_module, "open_splits", open_splits)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    sources = Sources(["someone/flowers"])
    assert sources.stated == 12
    assert [part.identity for part in sources.parts(9)] == [f"someone/flowers@abc {part} of 2" for part in range(2)]
    assert images(["someone/flowers"]) == expected(6, 0) + expected(6, 1)


def test_rows_are_read_while_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [bytes([number]) for number in range(250)]}), path)
    read, cast = [], Image.cast_storage

    def counted(self: Image, storage: Any) -> Any:
        read.append(len(storage))
        return cast(self, storage)

    monkeypatch.setattr(Image, "cast_storage", counted)
    rows = Sources([str(path)]).rows()
    next(rows)
    assert sum(read) <= 16
    assert len(list(rows)) == 249


def test_options_that_nothing_heeds_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="Image files take no --split: remove the option"):
        Sources(["photos"], split="train")
    Dataset.from_dict({"image": [b"0"]}).to_parquet("a.parquet")
    assert len(list(Sources(["photos", "a.parquet"], image_column="image").rows())) == 6
