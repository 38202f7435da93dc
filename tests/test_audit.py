"""`hf-vit audit`: what it finds in planted data, what it writes, and what it says about data that it cannot check."""

import csv
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from tiny_run import colored_dataset
from typer.testing import CliRunner

import hf_vit
from hf_vit.cli.main import app
from hf_vit.data.audit import picture_of, quick_check
from hf_vit.data.duplicates import SIDE, gray_values, groups_of, near_duplicates, small_picture
from hf_vit.data.findings import findings_of
from hf_vit.data.labelled import load_data
from hf_vit.data.neighbors import nearest
from hf_vit.evaluation.cues import cues_of
from hf_vit.evaluation.label_noise import binary_label_noise, far_from_others, label_noise, most_suspicious
from hf_vit.evaluation.slices import weak_slices
from hf_vit.training.audit_report import write_audit

COPIES = {
    "encoded again": lambda image: image,
    "resized": lambda image: image.resize((70, 95)),
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "cropped": lambda image: image.crop((6, 3, 116, 88)),
    "all": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).crop((3, 6, 115, 90)).resize((80, 70)),
    "gray": lambda image: image.convert("L"),
}


def scene(seed: int, size: tuple[int, int] = (120, 90)) -> Image.Image:
    """Return an image with structure at several scales, as photographs have."""
    random, picture = np.random.default_rng(seed), np.zeros((size[1], size[0], 3))
    for cells in (2, 4, 8, 16, 32):
        noise = Image.fromarray(random.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        picture += np.asarray(noise.resize(size, Image.Resampling.BICUBIC), dtype=np.float64) / 5
    return Image.fromarray(picture.astype(np.uint8))


def content(image: Image.Image, form: str = "JPEG", **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def table_of(contents: list[bytes], labels: list[Any], feature: Any, names: list[str] | None = None) -> Dataset:
    rows = [{"bytes": each, "path": names[index] if names else f"{index}.jpg"} for index, each in enumerate(contents)]
    return Dataset.from_dict(
        {"image": rows, "label": labels}, features=Features({"image": ImageFeature(decode=False), "label": feature})
    )


# ---------------------------------------------------------------------------------------------------- duplicates


@pytest.mark.parametrize("kind", COPIES)
def test_copies_are_found_and_nothing_else(kind: str) -> None:
    originals = [scene(seed) for seed in range(24)]
    thumbnails = gray_values([small_picture(image) for image in originals])
    assert near_duplicates(thumbnails) == []
    copies = gray_values([picture_of(content(COPIES[kind](image), quality=60)).small for image in originals[:8]])
    found = near_duplicates(copies, thumbnails)
    assert {pair[:2] for pair in found} == {(index, index) for index in range(8)}
    assert {pair.is_mirrored for pair in found} == {kind in ("mirrored", "all")}
    together = near_duplicates(torch.cat([thumbnails, copies]))
    assert {pair[:2] for pair in together} == {(index, 24 + index) for index in range(8)}


def test_images_without_content_are_no_copies_of_each_other() -> None:
    blank = gray_values([np.full((SIDE, SIDE, 3), level, np.uint8) for level in (0, 90, 255)])
    assert near_duplicates(blank) == [] == near_duplicates(blank[:0]) == near_duplicates(blank, blank[:0])


def test_groups_connect_pairs() -> None:
    assert sorted(groups_of([(1, 5), (2, 3), (5, 9)])) == [[1, 5, 9], [2, 3]]


def test_nearest_is_exact_and_approximate_search_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = torch.nn.functional.normalize(torch.randn(50, 8), dim=1)
    similarity, positions = nearest(bank[:5], bank, 3)
    assert positions[:, 0].tolist() == list(range(5)) and similarity[:, 0].allclose(torch.ones(5))
    assert positions.equal((bank[:5] @ bank.T).argsort(dim=1, descending=True)[:, :3])
    monkeypatch.setattr("hf_vit.data.neighbors.MOST_EXACT", 10)
    try:
        import usearch  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match=r'pip install "hf-vit\[index\]"'):
            nearest(bank[:5], bank, 3)
    else:
        assert nearest(bank[:5], bank, 3)[1][:, 0].tolist() == list(range(5))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "I;16", "CMYK"])
def test_what_is_seen_in_an_image_of_any_mode(mode: str) -> None:
    image = scene(1).convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image, np.uint16) * 257)
    picture = picture_of(content(image, "TIFF" if mode == "CMYK" else "PNG"))
    assert picture.size == (90, 120) and picture.format == ("TIFF" if mode == "CMYK" else "PNG")
    assert picture.small.shape == (SIDE, SIDE, 3)
    turned = Image.Exif()
    turned[0x0112] = 6
    assert picture_of(content(scene(1), exif=turned)).size == (120, 90)


# -------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.2])
def test_wrong_labels_are_likely_and_counted(rate: float) -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(5, (2000,), generator=generator)
    logits = torch.randn(2000, 5, generator=generator) + 4 * torch.nn.functional.one_hot(truth, 5)
    is_wrong = torch.rand(2000, generator=generator) < rate
    given = torch.where(is_wrong, (truth + torch.randint(1, 5, (2000,), generator=generator)) % 5, truth)
    noise = label_noise(logits * 3, given)  # the temperature makes up for the scale
    assert noise.rate == pytest.approx(is_wrong.float().mean().item(), abs=0.02)
    assert noise.probability.sum().item() == pytest.approx(int(is_wrong.sum()), rel=0.15, abs=8)
    listed = most_suspicious(noise.probability)
    if rate == 0:
        assert len(listed) <= 8
    else:
        assert is_wrong[listed].float().mean() > 0.65
        assert is_wrong[listed].sum() / is_wrong.sum() > 0.85
    of_two = binary_label_noise(logits[:, :1], (given == 0)[:, None].float(), -100)
    assert of_two.shape == (2000, 1) and (of_two[is_wrong & (truth == 0)].mean() > of_two.mean() if rate else True)


def test_far_values_are_found_unless_all_are_alike() -> None:
    assert far_from_others(torch.tensor([1.0, 1.1, 0.9, 1.2, 9.0, 1.0, 1.1, 0.8, 20.0])).tolist() == [8, 4]
    assert far_from_others(torch.ones(9)).tolist() == [] == far_from_others(torch.ones(2)).tolist()


def test_cues_reveal_a_class_that_follows_from_the_size_alone() -> None:
    labels = torch.arange(90) % 3
    noise = torch.rand(90, 2, generator=torch.Generator().manual_seed(0))
    strong, weak = cues_of({"size": labels[:, None] + 0.1 * noise, "color": noise}, labels)
    assert strong.is_strong and strong.accuracy > 0.95 and strong.chance == pytest.approx(1 / 3)
    assert not weak.is_strong and weak.low < weak.accuracy < weak.high
    assert cues_of({"size": noise[:4]}, labels[:4]) == []


def test_weak_slices_are_named_with_their_interval() -> None:
    pictures = [picture_of(content(scene(seed % 3))) for seed in range(3)] * 40
    labels = torch.arange(120) % 2
    predicted = torch.where((labels == 1) & (torch.arange(120) % 3 == 0), 0, labels)
    weak, everything = weak_slices(predicted, labels, ["cat", "dog"], pictures)
    assert everything.images == 120 and everything.errors == 20
    assert {"label dog"} <= {each.name for each in weak}
    assert all(each.high < everything.accuracy and each.low <= each.accuracy <= each.high for each in weak)


# ----------------------------------------------------------------------------------------------------- findings


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with two classes and two splits, in which faults are planted."""
    folder = tmp_path_factory.mktemp("photos")

    def save(name: str, image: Image.Image, **options: Any) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / name, **options)

    for seed in range(32):
        tint = Image.new("RGB", (120, 90), "orange" if seed % 2 else "navy")
        kind = "cat" if seed % 2 else "dog"
        split = "train" if seed < 24 else "test"
        save(f"{split}/{kind}/{seed}.jpg", Image.blend(scene(seed), tint, 0.5))
    (folder / "train/dog/again.jpg").write_bytes((folder / "train/dog/0.jpg").read_bytes())
    (folder / "train/dog/other.jpg").write_bytes((folder / "train/cat/1.jpg").read_bytes())
    (folder / "test/dog/leak.jpg").write_bytes((folder / "train/dog/2.jpg").read_bytes())
    (folder / "train/cat/broken.jpg").write_bytes(b"<html>")
    with Image.open(folder / "train/dog/4.jpg") as image:
        save("test/dog/near.jpg", image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).resize((70, 60)))
        save("train/dog/copy.png", image.crop((3, 2, 117, 88)))
    save("train/cat/tiny.png", scene(90, (20, 12)))
    save("train/cat/strip.png", scene(91, (400, 40)))
    save("train/cat/blank.png", Image.new("RGB", (80, 80), "red"))
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    names = {0: "cat", 1: "dog"}
    config = hf_vit.HFViTConfig(**size, image_size=16, patch_size=8, id2label=names)
    hf_vit.HFViTForImageClassification(config).save_pretrained(folder)
    hf_vit.HFViTImageProcessor.from_preset("original", 16).save_pretrained(folder)
    return str(folder)


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "findings.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def invoke(*words: Any) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_a_folder_of_images_without_a_model(photos: Path, tmp_path: Path) -> None:
    ended = invoke("audit", photos, "-o", tmp_path / "audit")
    assert ended.exit_code == 0, ended.output
    rows = rows_of(tmp_path / "audit")
    found = {(row["finding"], Path(row["image"]).name) for row in rows}
    assert found == {
        ("unreadable", "broken.jpg"),
        ("leak", "leak.jpg"),
        ("near leak", "near.jpg"),
        ("contradiction", "1.jpg"),
        ("contradiction", "other.jpg"),
        ("exact duplicate", "again.jpg"),
        ("exact duplicate", "other.jpg"),
        ("near duplicate", "copy.png"),
        ("small or blank", "tiny.png"),
        ("small or blank", "strip.png"),
        ("small or blank", "blank.png"),
    }
    assert pq.read_table(tmp_path / "audit" / "findings.parquet").num_rows == len(rows)
    mirrored = next(row for row in rows if row["finding"] == "near leak")
    assert mirrored["reason"] == "looks like a training image, mirrored" and mirrored["copy_of"].endswith("4.jpg")
    page = (tmp_path / "audit" / "index.html").read_text()
    assert page.count("data:image/jpeg;base64,") >= 15 and "no picture" in page and "<script" not in page
    assert "add --model" in " ".join(ended.output.split())
    clean = load_data(tmp_path / "audit" / "clean.csv")
    kept = {Path(each["path"]).name for each in clean.train.cast_column("image", ImageFeature(decode=False))["image"]}
    gone = {"broken.jpg", "again.jpg", "other.jpg", "1.jpg", "2.jpg", "4.jpg", "copy.png"}
    assert kept == {path.name for path in photos.glob("train/*/*")} - gone
    assert clean.label_names == ["cat", "dog"] and len(clean.evaluation) == 10
    assert invoke("audit", photos, "-o", tmp_path / "audit").exit_code == 0  # writes its own folder again


def test_a_model_finds_wrong_labels_and_states_accuracies(encoder: str, tmp_path: Path) -> None:
    names = ["cat", "dog"]
    colors = {0: "orange", 1: "navy"}
    train = [
        content(Image.blend(scene(seed), Image.new("RGB", (120, 90), colors[seed % 2]), 0.7)) for seed in range(80)
    ]
    labels = [seed % 2 for seed in range(80)]
    planted = {10, 33, 52, 65, 74}
    for wrong in planted:
        labels[wrong] = 1 - labels[wrong]
    feature = ClassLabel(names=names)
    table_of(train, labels, feature).to_parquet(tmp_path / "train.parquet")
    test = [
        *train[:3],
        *(content(Image.blend(scene(200 + i), Image.new("RGB", (120, 90), colors[i % 2]), 0.7)) for i in range(17)),
    ]
    table_of(test, [*labels[:3], *(i % 2 for i in range(17))], feature).to_parquet(tmp_path / "test.parquet")
    result = hf_vit.audit(str(tmp_path), encoder, cache=tmp_path / "cache")
    wrong_labels = {each.image: each for each in result.findings if each.kind == "wrong label"}
    assert (
        len(wrong_labels) < 9 and planted <= set(wrong_labels) and wrong_labels[10].suggestion == names[1 - labels[10]]
    )
    assert result.wrong_labels is not None and 2 < result.wrong_labels < 8
    assert [each.what for each in result.accuracies] == [
        "a linear classifier, all images",
        "a linear classifier, without leaks",
        "the model, all images",
        "the model, without leaks",
    ]
    assert [each.images for each in result.accuracies] == [20, 17, 20, 17]
    assert result.sliced == "the model on the test split" and result.slices[-1].images == 20
    lines = write_audit(result, tmp_path / "audit")
    assert lines[-1].startswith("Cleaned data without 8 of 100 images:")
    clean = load_data(tmp_path / "audit" / "clean")
    assert len(clean.train) == 80 - 8 and len(clean.evaluation) == 20 and clean.label_names == names
    again = hf_vit.audit(str(tmp_path / "audit" / "clean"), encoder, cache=tmp_path / "cache")
    assert not [each for each in again.findings if "leak" in each.kind]


@pytest.mark.parametrize("kind", ["none", "one class", "several", "numbers"])
def test_other_data_is_checked_as_far_as_possible(kind: str, encoder: str, tmp_path: Path) -> None:
    images = [content(scene(seed)) for seed in range(40)]
    images[7] = images[3]
    several = [["round"] if index % 2 else ["red", "round"] for index in range(40)]
    feature, labels = {
        "none": (Value("int64"), [0] * 40),
        "one class": (ClassLabel(names=["cat"]), [0] * 40),
        "several": (List(Value("string")), several),
        "numbers": (Value("float64"), [index / 7 for index in range(40)]),
    }[kind]
    data = table_of(images, labels, feature)
    data = data.remove_columns("label") if kind == "none" else data
    data.to_parquet(tmp_path / "train.parquet")
    result = hf_vit.audit(str(tmp_path / "train.parquet"), encoder, cache=tmp_path / "cache")
    assert [(each.image, each.other) for each in result.findings if each.kind == "exact duplicate"] == [(7, 3)]
    assert any("not checked" in note for note in result.notes)
    write_audit(result, tmp_path / "audit")
    options = {"needs_labels": kind not in ("none", "one class")}
    clean = load_data(tmp_path / "audit" / "clean", holds_out=False, **options)
    assert len(clean.train) in (39, 38)
    assert clean.problem_type == {"several": "multi_label_classification", "numbers": "regression"}.get(kind)


def test_masks_are_no_labels_but_their_images_are_checked(tmp_path: Path) -> None:
    for seed in range(6):
        for kind, image in (("images", scene(seed % 5)), ("masks", Image.new("L", (120, 90), seed % 2))):
            (tmp_path / "scenes" / kind).mkdir(parents=True, exist_ok=True)
            image.save(tmp_path / "scenes" / kind / f"{seed}.png")
    ended = invoke("audit", tmp_path / "scenes", "--task", "segmentation", "-o", tmp_path / "audit")
    assert ended.exit_code == 0, ended.output
    assert [row["finding"] for row in rows_of(tmp_path / "audit")] == ["exact duplicate"]
    assert "not written for masks" in " ".join(ended.output.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "B/16"], "is a variant without weights"),
        (["-o", "photos"], "choose another --output-dir"),
        (["--model", "./nothing"], "No such file or folder"),
    ],
)
def test_errors_come_before_anything_is_written(
    words: list[str], message: str, photos: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "notes.txt").write_text("mine")
    ended = invoke("audit", photos, *words)
    assert ended.exit_code == 2 and message in " ".join(ended.output.split())
    assert [path.name for path in tmp_path.rglob("*")] == ["photos", "notes.txt"]


# ------------------------------------------------------------------------------------------ the check of a run


def test_the_quick_check_names_copies_missing_files_and_empty_classes(photos: Path, tmp_path: Path) -> None:
    said = quick_check(load_data(photos))
    assert said == (
        "Data check: 1 evaluation image also in the training split (dog/leak.jpg = dog/2.jpg). "
        "hf-vit audit shows more."
    )
    data = load_data({"train": colored_dataset(9, 0), "test": colored_dataset(6, 1)})
    assert quick_check(data).startswith("Data check: no evaluation image is also")
    feature = ClassLabel(names=["cat", "dog"])
    train, test = table_of([b"", b"1"], [0, 0], feature), table_of([b"2"], [0], feature)
    said = quick_check(load_data({"train": train, "test": test}))
    assert "1 missing or empty file (0.jpg)" in said and "1 class without training images (dog)" in said
    assert quick_check(load_data({"train": train, "test": test}, streaming=True)) == ""


def test_findings_are_numbered_through_both_splits(photos: Path) -> None:
    from hf_vit.data.findings import Images

    images = Images.read(load_data(photos, holds_out=False))
    leak = next(each for each in findings_of(images) if each.kind == "leak")
    split, row = images.place(leak.image)
    assert split == "test" and images.names[leak.image] == "dog/leak.jpg" and row < 10
    assert images.names[leak.other or 0] == "dog/2.jpg" and images.label_text(leak.image) == "dog"
