"""Packed data sets: the same labels and splits, smaller photographs, and everything else as it was."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from typer.testing import CliRunner

from hf_vit import HFViTImageProcessor
from hf_vit.cli.main import app
from hf_vit.data.images import TrainingImages
from hf_vit.data.labelled import load_data
from hf_vit.data.opening import as_stored
from hf_vit.data.packing import REDUCED, UNCHANGED, UNREADABLE, pack

runner = CliRunner()


def smooth(height: int, width: int) -> Image.Image:
    small = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Images of two classes and two splits, one of each kind."""
    for name in ("train/cat", "train/dog", "test/cat", "test/dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        smooth(90, 120).save(tmp_path / "photos" / name / "plain.jpg", quality=98, subsampling=0)
    cats = tmp_path / "photos" / "train" / "cat"
    turned = Image.Exif()
    turned[0x0112] = 6
    smooth(90, 120).save(cats / "turned.jpg", exif=turned)
    smooth(20, 60).save(cats / "small.png")
    smooth(90, 120).convert("L").save(cats / "gray.png")
    smooth(90, 120).convert("RGBA").save(cats / "transparent.png")
    Image.fromarray(np.arange(90 * 120, dtype=np.uint16).reshape(90, 120)).save(cats / "deep.png")
    (cats / "broken.jpg").write_bytes(b"no image")
    return tmp_path / "photos"


def test_photographs_are_reduced_and_the_rest_is_unchanged(photos: Path, tmp_path: Path) -> None:
    packed = pack(str(photos), tmp_path / "packed", 32)
    assert packed.images == {REDUCED: 6, UNCHANGED: 3, UNREADABLE: 1}
    assert packed.splits == {"train": 7, "test": 2} and packed.unreadable == ["cat/broken.jpg"]
    data = load_data(tmp_path / "packed")
    assert (data.label_names, data.eval_split, data.name) == (["cat", "dog"], "test", "packed")
    rows = {
        row["image"]["path"]: row for row in as_stored(data.train.filter(lambda row: row["label"] == 0), data.columns)
    }
    sizes = {name: Image.open(BytesIO(row["image"]["bytes"])).size for name, row in rows.items()}
    assert sizes == {
        "plain.jpg": (42, 32),
        "turned.jpg": (32, 42),
        "gray.jpg": (42, 32),
        "small.png": (60, 20),
        "transparent.png": (120, 90),
        "deep.png": (120, 90),
    }
    for name in ("small.png", "transparent.png", "deep.png"):
        assert rows[name]["image"]["bytes"] == (photos / "train" / "cat" / name).read_bytes()


def test_pixels_are_those_of_the_recipe_s_shorter_side(photos: Path, tmp_path: Path) -> None:
    pack(str(photos), tmp_path / "packed", 32)
    prepared = []
    for source in (photos, tmp_path / "packed"):
        data = load_data(source, train_split="test", eval_split="test")
        images = TrainingImages(data.train, data.columns, HFViTImageProcessor(), lambda pixels: pixels, 0, "none", 32)
        prepared.append(images[0]["pixel_values"])
    assert prepared[0].shape == (3, 32, 42)
    assert (prepared[0].float() - prepared[1].float()).abs().mean() < 1.5  # levels, of JPEG


def test_other_columns_stay(tmp_path: Path) -> None:
    features = Features({"label": ClassLabel(names=["a", "b"]), "photo": ImageFeature(), "place": Value("string")})
    rows = {"label": [0, 1, 1], "photo": [smooth(90, 120)] * 3, "place": ["x", "y", None]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data" / "validation.parquet")
    packed = pack(str(tmp_path / "data"), tmp_path / "packed", 32)
    assert packed.bytes_after < packed.bytes_before
    found = Dataset.from_parquet(str(tmp_path / "packed" / "validation-00000-of-00001.parquet"))
    assert found.features == features and found["place"][:] == ["x", "y", None] and found["label"][:] == [0, 1, 1]
    assert found[2]["photo"].size == (42, 32)


def test_many_images_are_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_vit.data.packing.ROWS_PER_FILE", 5)
    monkeypatch.setattr("hf_vit.data.packing.AT_ONCE", 2)
    (tmp_path / "photos").mkdir()
    for index in range(12):
        smooth(40 + index, 60).save(tmp_path / "photos" / f"{index:02d}.jpg")
    pack(str(tmp_path / "photos"), tmp_path / "packed", 32)
    assert [path.name for path in sorted((tmp_path / "packed").iterdir())] == [
        f"train-0000{number}-of-00003.parquet" for number in range(3)
    ]
    widths = [
        image.width for image in load_data(tmp_path / "packed", needs_labels=False, holds_out=False).train["image"]
    ]
    assert sorted(widths) == sorted(int(32 * 60 / (40 + index)) for index in range(12))


def test_the_command_states_what_it_did_and_refuses(photos: Path, tmp_path: Path) -> None:
    command = ["data", "pack", str(photos)]
    result = runner.invoke(app, [*command, str(tmp_path / "packed"), "--shorter-side", "32"])
    assert result.exit_code == 0, result.output
    said = " ".join(result.stdout.split())
    assert "9 images (2 test, 7 train), 6 of them reduced" in said
    assert "Skipped 1 unreadable image: cat/broken.jpg." in said
    for out, message in ((tmp_path / "packed", "choose another OUT"), (photos / "packed", "lies in the data folder")):
        result = runner.invoke(app, [*command, str(out)])
        assert result.exit_code == 2 and message in " ".join(result.stderr.split())
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "broken.jpg").write_bytes(b"no image")
    result = runner.invoke(app, ["data", "pack", str(tmp_path / "none"), str(tmp_path / "out")])
    assert result.exit_code == 2 and "No image of the split train can be read: none/broken.jpg" in result.stderr
    assert not (tmp_path / "out").exists()
