"""`hf-vit inspect MODEL IMAGE...`: pictures, arrays and a page, of every family, that stay in their folder."""

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_checkpoints_timm import folder_of, foreign
from transformers import ViTConfig
from transformers import ViTForImageClassification as StockClassifier
from typer.testing import CliRunner, Result

from hf_vit import (
    HFViTForImageClassification,
    HFViTForMaskedImageModeling,
    HFViTForSemanticSegmentation,
    HFViTModel,
)
from hf_vit.checkpoints import Options
from hf_vit.cli.main import app
from hf_vit.inspection import attention_distance, attention_rollout, position_similarity
from hf_vit.inspection import gallery as gallery_module
from hf_vit.inspection.gallery import draw, folder_for
from hf_vit.inspection.page import Entry, write_page

OF_WEIGHTS = {"filters.png", "positions.png", "arrays.npz"}
OF_IMAGES = {"predictions", "attention-distance", "attention-rollout", "attention", "features", "norm-maps", "norms"}


def inspect(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


def save_image(path: Path, size: tuple[int, int] = (60, 40), seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def saved(tiny_config: Any, tmp_path: Path) -> Any:
    """Save a tiny model, of one layer unless fields say otherwise, and return its folder."""

    def save(model_class: Any = HFViTForImageClassification, name: str = "tiny", **fields: Any) -> Path:
        model_class(tiny_config(**{"num_hidden_layers": 1, **fields})).save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_predictions_are_drawn_with_the_true_label_where_it_differs(tiny_config: Any) -> None:
    one = tiny_config(num_labels=2, id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1})
    logits = torch.tensor([2.0, 0.0])
    answer = gallery_module._answer
    assert answer(one, logits, "cat") == answer(one, logits, "photos") == "cat 88%"
    assert answer(one, logits, "dog") == "cat 88% (dog)"
    one.problem_type = "multi_label_classification"
    assert answer(one, logits, "dog") == "cat" and answer(one, -logits - 1, "dog") == "none"
    one.problem_type = "regression"
    assert answer(one, logits, "dog") == "cat 2, dog 0"


# --------------------------------------------------------------------------------------------------- what is written


def test_a_program_reads_what_a_checkpoint_is(saved: Any) -> None:
    result = inspect(saved(), "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["family"] == "hf_vit" and facts["config"]["model_type"] == "hf_vit"
    assert facts["assumed"] == facts["left_out"] == []


def test_nothing_is_written_unless_asked_for(saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = saved()
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    result = inspect(model)
    assert result.exit_code == 0 and "Written" not in result.output
    assert sorted(tmp_path.rglob("*")) == before


def test_weights_alone_give_filters_and_positions(saved: Any, tmp_path: Path) -> None:
    model = saved()
    result = inspect(model, "-o", tmp_path / "out" / "deeper")
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())  # in lines of 80 columns
    assert f"Wrote to {tmp_path}/out/deeper: filters.png, positions.png, arrays.npz" in said
    assert names_in(tmp_path / "out" / "deeper") == OF_WEIGHTS
    with np.load(tmp_path / "out" / "deeper" / "arrays.npz") as arrays:
        assert set(arrays) == {"patch_filters", "patch_filter_shares", "position_similarity"}
        expected = position_similarity(HFViTModel.from_pretrained(model))
        np.testing.assert_allclose(arrays["position_similarity"], expected, atol=1e-6)


def test_images_give_maps_and_all_arrays(saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention distance is of all images, and maps are of the first."""
    model = saved(num_hidden_layers=2, num_register_tokens=1)
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(4):
        save_image(photos / f"{number}.png", (50 + number, 40), number)
    (photos / "broken.png").write_text("no image")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gallery_module, "WITH_MAPS", 2)
    monkeypatch.setattr(gallery_module, "save", lambda figure, path: path.write_text(path.name))
    result = inspect(model, photos)
    assert result.exit_code == 0, result.output
    assert f"Skipped: {photos / 'broken.png'} is not an image" in result.output
    out = tmp_path / "tiny-pictures"
    heads = {"heads-01-0.png", "heads-02-1.png"}
    assert names_in(out) == OF_WEIGHTS | {f"{name}.png" for name in OF_IMAGES} | heads
    with np.load(out / "arrays.npz") as arrays:
        shapes = {name: arrays[name].shape for name in arrays}
        assert shapes == {
            "patch_filters": (28, 8, 8, 3),
            "patch_filter_shares": (28,),
            "position_similarity": (4, 6, 4, 6),
            "images": (2, 3, 32, 48),
            "image_names": (2,),
            "label_names": (5,),
            "logits": (2, 5),
            "attention_distance": (2, 4),
            "attention_rollout": (2, 4, 6),
            "attention_maps": (2, 4, 4, 6),
            "attention_map": (2, 4, 6),
            "feature_components": (2, 4, 6, 3),
            "token_norms": (2, 2, 4, 6),
            "prefix_norms": (2, 2, 2),
        }
        assert arrays["image_names"].tolist() == ["0.png", "1.png"]
        # The arrays are those of the pixels that the model's own processor gives.
        classifier = HFViTForImageClassification.from_pretrained(model)
        from hf_vit import HFViTImageProcessor

        processor = HFViTImageProcessor.from_pretrained(model)
        files = [Image.open(photos / f"{number}.png") for number in range(4)]
        pixel_values = processor(files, return_tensors="pt")["pixel_values"]
        rolled, distance = attention_rollout(classifier, pixel_values), attention_distance(classifier, [pixel_values])
        np.testing.assert_allclose(arrays["attention_rollout"], rolled[:2], atol=1e-5)
        np.testing.assert_allclose(arrays["attention_distance"], distance, rtol=1e-4)


def test_pictures_are_pictures(saved: Any, tmp_path: Path) -> None:
    written = draw(str(saved()), tmp_path / "out", [str(save_image(tmp_path / "a.png"))])
    assert {path.stem for path in written} == {path.stem for path in map(Path, OF_WEIGHTS)} | OF_IMAGES | {
        "heads-01-a"
    }
    for path in written[:-1]:
        with Image.open(path) as image:
            assert image.format == "PNG" and min(image.size) > 200


def test_vectors(saved: Any, tmp_path: Path) -> None:
    assert inspect(saved(), "-o", tmp_path / "out", "--format", "svg", "--html").exit_code == 0
    for name in ("filters.svg", "positions.svg"):
        assert ElementTree.parse(tmp_path / "out" / name).getroot().tag.endswith("svg")
    assert (tmp_path / "out" / "index.html").read_text().count('src="data:image/svg+xml;base64,') == 2


# ------------------------------------------------------------------------------------------------- models and sizes


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the rendering of figures, which takes most of the time, and is tested elsewhere."""
    monkeypatch.setattr(gallery_module, "save", lambda figure, path: path.write_text(path.name))


def test_other_families(undrawn: None, tmp_path: Path) -> None:
    image = save_image(tmp_path / "a.png")
    stock = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8
    )
    StockClassifier(stock).save_pretrained(tmp_path / "stock")
    folder_of(foreign(), tmp_path / "timm")
    torch.save(foreign().state_dict(), tmp_path / "bare.pt")
    for model, options in (("stock", []), ("timm", []), ("bare.pt", ["--num-heads", "4"])):
        out = tmp_path / "out" / model
        result = inspect(tmp_path / model, image, *options, "-o", out)
        assert result.exit_code == 0, result.output
        assert len(names_in(out)) == 11
        with np.load(out / "arrays.npz") as arrays:
            assert arrays["attention_distance"].shape == (2, 4)


@pytest.mark.parametrize(
    ("fields", "drawn", "said"),
    [
        ({"position_embedding_type": "relative"}, "position_bias", None),
        ({"position_embedding_type": "sincos_2d"}, "position_similarity", None),
        ({"position_embedding_type": "learned_rotary"}, "position_similarity", None),
        ({"position_placement": "every_layer"}, "position_similarity", None),
        ({"position_embedding_type": "rotary"}, None, "Positions are not drawn: rotary positions are not learned"),
        ({"position_embedding_type": "none"}, None, "Positions are not drawn: the model has none."),
        ({"stem_layers": [1], "stem_width": 32}, "stem_filters", None),
        ({"num_channels": 1}, "patch_filters", None),
        ({"pooling": "attention", "num_register_tokens": 2}, "prefix_norms", None),
        ({"image_size": 8}, "token_norms", None),
    ],
)
def test_every_kind_of_model(
    fields: dict[str, Any], drawn: str | None, said: str | None, saved: Any, undrawn: None, tmp_path: Path
) -> None:
    result = inspect(saved(**fields), save_image(tmp_path / "a.png"), "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert said is None or said in result.output
    assert ("positions.png" in names_in(tmp_path / "out")) == (said is None)
    with np.load(tmp_path / "out" / "arrays.npz") as arrays:
        assert drawn is None or drawn in arrays


@pytest.mark.parametrize("model_class", [HFViTModel, HFViTForMaskedImageModeling, HFViTForSemanticSegmentation])
def test_models_without_a_classifier(model_class: Any, saved: Any, undrawn: None, tmp_path: Path) -> None:
    result = inspect(saved(model_class), save_image(tmp_path / "a.png"), "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert ("predictions.png" in names_in(tmp_path / "out")) == (model_class is HFViTForSemanticSegmentation)


def test_another_size_is_drawn_beside_the_learned_one(saved: Any, undrawn: None, tmp_path: Path) -> None:
    model, image = saved(), save_image(tmp_path / "a.png")
    result = inspect(model, image, "--image-size", "40x16", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert {"positions.png", "positions_5x2.png"} <= names_in(tmp_path / "out")
    with np.load(tmp_path / "out" / "arrays.npz") as arrays:
        assert arrays["position_similarity"].shape == (4, 6, 4, 6)
        assert arrays["position_similarity_5x2"].shape == (5, 2, 5, 2)
        assert arrays["images"].shape == (1, 3, 40, 16) and arrays["attention_maps"].shape == (1, 4, 5, 2)


def test_a_size_that_is_a_fact(undrawn: None, tmp_path: Path) -> None:
    """The tensors of a model without position embeddings do not say their grid."""
    model = foreign(pos_embed="none", class_token=False, global_pool="avg")
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    options = ["--num-heads", "4", "--image-size", "32", "--pooling", "mean", "-o", tmp_path / "out"]
    result = inspect(tmp_path / "bare.pt", save_image(tmp_path / "a.png"), *options)
    assert result.exit_code == 0, result.output


def test_the_layer_of_maps_is_chosen(saved: Any, undrawn: None, tmp_path: Path) -> None:
    model, image = str(saved(num_hidden_layers=3, initializer_range=0.3)), str(save_image(tmp_path / "a.png"))
    maps = []
    for layer in (1, -1, 3):
        draw(model, tmp_path / "out", [image], layer=layer)
        with np.load(tmp_path / "out" / "arrays.npz") as arrays:
            maps.append({name: arrays[name] for name in ("attention_maps", "feature_components", "attention_rollout")})
    assert not np.allclose(maps[0]["attention_maps"], maps[1]["attention_maps"])
    assert not np.allclose(maps[0]["feature_components"], maps[1]["feature_components"])
    assert all(np.array_equal(maps[1][name], maps[2][name]) for name in maps[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.png", "--layer", "2"], "Expected a layer from 1 to 1, or -1 to -1 from the end, got 2"),
        (["missing.png"], "No such file or folder: missing.png"),
        (["notes.txt"], "Expected readable images in notes.txt, got none (1 file)"),
        (["empty"], "Expected readable images in empty, got none (0 files)"),
        (["a.png", "--image-size", "33"], "does not divide into patches of 8x8"),
        (["a.png", "-o", "notes.txt"], "notes.txt"),
    ],
)
def test_what_a_user_can_mend_is_one_line(
    arguments: list[str], message: str, saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = saved()
    monkeypatch.chdir(tmp_path)
    save_image(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "empty").mkdir()
    result = inspect(model, *arguments)
    assert result.exit_code == 2 and message in result.stderr
    assert not (tmp_path / "tiny-pictures").exists()


def test_images_of_other_channels_are_refused_before_anything_is_drawn(saved: Any, tmp_path: Path) -> None:
    result = inspect(saved(num_channels=5), save_image(tmp_path / "a.png"), "-o", tmp_path / "out")
    assert result.exit_code == 2 and "channels" in result.stderr
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ names and the page


class Page(HTMLParser):
    """What a page consists of: its tags with their attributes, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text += data


# The last is of bytes that are no text.
STRANGE = [
    "<b>.png",
    "$x$.png",
    "..;&amp;.png",
    "ä 画 \N{GRINNING FACE}.png",
    "-o.png",
    "'\"><script>.png",
    "\udcff.png",
]


def test_strange_names_stay_names(saved: Any, undrawn: None, tmp_path: Path) -> None:
    photos = tmp_path / "<i>photos"
    photos.mkdir()
    for name in STRANGE:
        save_image(photos / name)
    (photos / "<u>.png").write_text("no image")
    model = saved(name="<s>$tiny$")
    before = names_in(tmp_path)
    result = inspect(model, photos, "-o", tmp_path / "out", "--html")
    assert result.exit_code == 0, result.output
    assert names_in(tmp_path) == before | {"out"}
    heads = {name for name in names_in(tmp_path / "out") if name.startswith("heads")}
    assert len(heads) == len(STRANGE) and all(re.fullmatch(r"heads-0\d-[a-z0-9-]+\.png", name) for name in heads)
    page = Page(tmp_path / "out" / "index.html")
    assert not {tag for tag, _ in page.tags} & {"b", "i", "u", "s", "script"}
    assert all(name in page.text for name in STRANGE[:-1]) and "?.png" in page.text
    assert "<u>.png is not an image" in page.text
    assert "What <s>$tiny$ learned" in page.text


def test_letters_that_the_font_lacks_are_drawn_as_boxes(saved: Any, tmp_path: Path) -> None:
    image = save_image(tmp_path / "画$\N{GRINNING FACE}.png")
    assert (tmp_path / "out" / "heads-01-unnamed.png") in draw(str(saved()), tmp_path / "out", [str(image)])


def test_the_page_stands_alone(saved: Any, undrawn: None, tmp_path: Path) -> None:
    result = inspect(saved(), save_image(tmp_path / "a.png"), "-o", tmp_path / "out", "--html")
    assert result.exit_code == 0, result.output
    page = Page(tmp_path / "out" / "index.html")
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object"}
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 10
    for attributes in pictures:
        assert (attributes["src"] or "").startswith("data:image/png;base64,") and len(attributes["alt"] or "") > 30
    links = [attributes["href"] or "" for tag, attributes in page.tags if tag == "a"]
    targets = {f"#{attributes['id']}" for tag, attributes in page.tags if tag == "section"}
    assert set(links) == targets and len(links) == 10
    source = (tmp_path / "out" / "index.html").read_text()
    assert "http" not in re.sub(r'http-equiv|data:[^"]*', "", source) and "url(" not in source
    assert "prefers-color-scheme: dark" in source and "width=device-width" in source
    assert "family" in page.text and "hf_vit" in page.text  # the facts of the checkpoint


def test_a_page_escapes_all_that_it_is_given(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"bytes")
    mark = '"><b>&amp;'
    write_page(tmp_path / "p.html", mark, {mark: mark}, [Entry(tmp_path / "a.png", mark, mark, mark)], [mark])
    page = Page(tmp_path / "p.html")
    assert "b" not in {tag for tag, _ in page.tags}
    assert page.text.count(mark) == 8
    (picture,) = [attributes for tag, attributes in page.tags if tag == "img"]
    assert picture["alt"] == f"{mark}. {mark}"


def test_folders_are_named_after_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ViT-B_16.npz").touch()
    monkeypatch.chdir(tmp_path)
    assert folder_for("ViT-B_16.npz") == "vit-b-16-pictures"
    assert folder_for("google/vit-base.p16") == "vit-base-p16-pictures"
    assert folder_for("/") == "unnamed-pictures"


def test_options_reach_the_checkpoint(saved: Any, undrawn: None, tmp_path: Path) -> None:
    draw(str(saved()), tmp_path / "out", options=Options(patch_size=(4, 4)))
    with np.load(tmp_path / "out" / "arrays.npz") as arrays:
        assert arrays["patch_filters"].shape == (28, 4, 4, 3)
        assert arrays["position_similarity"].shape == (8, 12, 8, 12)
