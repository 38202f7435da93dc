"""The page of a model: what it answers and refuses, in Chromium too, and the Space that shows the same."""

import asyncio
import csv
import gc
import os
import re
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from demo_page import CHROMIUM, DEMO, Visit, free_port, served, visiting
from isolated import environment, save_tiny_classifier
from packaging.requirements import Requirement
from PIL import Image
from playwright.sync_api import expect
from typer.testing import CliRunner

from hf_vit import HFViTForImageClassification, HFViTModel
from hf_vit.cli.main import app
from hf_vit.data.images import normalize, preprocess
from hf_vit.demo import Exhibit, export_space
from hf_vit.demo.exhibit import File
from hf_vit.demo.markup import by
from hf_vit.inspection import attention_maps, attention_rollout
from hf_vit.inspection.gallery import at_one_size
from hf_vit.model.image_reading_hf_vit import read_image

HOSTILE = "<img src=x onerror=alert(1)>"
LABELS = [HOSTILE, "a\nb \u202e${1+1}", "rose", "rose", "@sum"]
LIT, POSITIONS = "The image lit by attention", "Learned position embeddings"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save two classifiers, an encoder, two photographs, and files that are none."""
    path = tmp_path_factory.mktemp("demo")
    for seed, name in enumerate(("first", "second")):
        model = HFViTForImageClassification.from_pretrained(save_tiny_classifier(path / name))
        model.config.id2label = dict(enumerate(LABELS))
        torch.manual_seed(seed)
        torch.nn.init.normal_(model.classifier.weight, std=0.3)
        model.save_pretrained(path / name)
    HFViTModel(model.config).save_pretrained(path / "encoder")
    random = np.random.default_rng(0)
    for name in ("photo.png", "=1+1.png", f"{HOSTILE}.jpg"):
        Image.fromarray(random.integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(path / name)
    (path / "page.jpg").write_text("<html>")
    return path


@pytest.fixture(scope="module")
def exhibit(folder: Path) -> Exhibit:
    return Exhibit(str(folder / "first"))


@pytest.fixture(autouse=True)
def variables_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands set them for their process, which is that of the tests here."""
    for name in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_TEMP_DIR"):
        monkeypatch.setenv(name, os.environ.get(name, ""))


@contextmanager
def untidy() -> Iterator[None]:
    """Gradio leaves event loops unclosed, in its import and its components: collect them while nobody minds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
        gc.collect()


@pytest.fixture(scope="module")
def page() -> Any:
    with untidy():
        from hf_vit.demo import page
    return page


@pytest.fixture
def components() -> Iterator[None]:
    """What a test that makes some of Gradio's asks for."""
    with untidy():
        yield


def uploaded(path: Path, name: str | None = None) -> dict[str, Any]:
    """Describe a file as Gradio does."""
    return {"path": str(path), "orig_name": name or path.name, "meta": {"_type": "gradio.FileData"}}


# ------------------------------------------------------------------------------------------------------- the model


def test_answers_are_the_model_s_at_any_size(exhibit: Exhibit, folder: Path) -> None:
    assert exhibit.sizes == [(16, 24), (24, 32), (32, 48), (40, 64), (48, 72), (64, 96)]
    file = File(folder / "photo.png", "mine.png")
    for size in (None, *exhibit.sizes):
        answer = exhibit.answer(file, size)
        processor = at_one_size(exhibit.processor, answer.size)
        with torch.no_grad():
            pixels = preprocess(read_image(file.path), processor)[None]
            expected = exhibit.model(normalize(pixels, processor)).logits[0].softmax(-1).sort(descending=True)
        assert pixels.shape[-2:] == answer.size == (size or (32, 48)) and answer.seconds > 0
        assert answer.prediction.source == "mine.png" and answer.prediction.error is None
        assert answer.prediction.scores == pytest.approx(expected.values.tolist(), abs=1e-5)
        assert answer.prediction.labels == [LABELS[index] for index in expected.indices]


def test_attention_is_that_of_the_layer_and_head(exhibit: Exhibit, folder: Path) -> None:
    file = File(folder / "photo.png", "photo.png")
    pixel_values = normalize(preprocess(read_image(file.path), exhibit.processor)[None], exhibit.processor)
    pictures = []
    for view, layer, head, expected in (
        ("rollout", -1, None, attention_rollout(exhibit.model, pixel_values)),
        ("rollout", 2, 3, attention_rollout(exhibit.model, pixel_values, 2, 3)),
        ("layer", 1, None, attention_maps(exhibit.model, pixel_values, 1).mean(axis=1)),
        ("layer", 1, 4, attention_maps(exhibit.model, pixel_values, 1)[:, 3]),
    ):
        found = exhibit.attention(file, view, layer, head)
        assert found.picture.shape == (360, 480, 3) and found.picture.dtype == np.uint8
        assert found.low == pytest.approx(expected.min()) and found.low < found.high <= expected.max()
        assert found.even == 1 / 24
        pictures.append(found.picture)
    assert not any(np.array_equal(pictures[0], other) for other in pictures[1:])
    for layer, head in ((4, None), (1, 5)):
        for view in ("rollout", "layer"):
            with pytest.raises(ValueError, match=r"Expected a (layer|head) from 1 to"):
                exhibit.attention(file, view, layer, head)


def test_the_model_is_in_memory_once(exhibit: Exhibit) -> None:
    assert exhibit.predictor((16, 24)).model is exhibit.predictor((64, 96)).model is exhibit.model
    assert not exhibit.model.training


def test_positions_are_drawn_or_it_says_why_not(
    exhibit: Exhibit, page: Any, folder: Path, tiny_config: Any, tmp_path: Path
) -> None:
    picture, reading = page.show_positions(exhibit, tmp_path / "pictures")
    with Image.open(picture) as drawn:
        assert drawn.width > 300 and "Each tile" in reading
    HFViTForImageClassification(tiny_config(position_embedding_type="none")).save_pretrained(tmp_path / "none")
    picture, reading = page.show_positions(Exhibit(str(tmp_path / "none")), tmp_path / "pictures")
    assert picture is None and "the model has none" in reading


# -------------------------------------------------------------------------------------------------------- the page


def test_texts_from_outside_are_harmless(exhibit: Exhibit, page: Any, folder: Path) -> None:
    shown = page.show_answer(exhibit, uploaded(folder / "photo.png"))
    assert len(re.findall("<li>", shown)) == 5 and "%" in shown and " ms from file" in shown
    assert "<img" not in shown and "&lt;img src=x" in shown
    assert "\u202e" not in shown and "\\u202e" in shown
    refused = page.show_answer(exhibit, uploaded(folder / "page.jpg", f"{HOSTILE}.jpg"))
    assert 'role="alert"' in refused and "is a web page or SVG, not a bitmap image" in refused
    assert "<img" not in refused and "&lt;img" in refused and str(folder) not in refused


def test_what_is_refused_is_said_once_and_shows_nothing(exhibit: Exhibit, page: Any, folder: Path) -> None:
    view = next(iter(page.VIEWS))
    for broken in (uploaded(folder / "page.jpg"), uploaded(folder / "gone.jpg"), None, {"path": None}):
        assert page.show_attention(exhibit, broken, view, 3, 0) == (None, "")
        assert page.show_sizes(exhibit, broken, ["32 × 48"]) == ""
        said, *pictures = page.show_both([exhibit, exhibit], broken)
        assert pictures == [None, None] and ("alert" in said) == bool(broken and broken["path"])
        assert "<li>" not in page.show_answer(exhibit, broken)


def test_sizes_and_models_stand_beside_each_other(exhibit: Exhibit, page: Any, folder: Path) -> None:
    photo = uploaded(folder / "photo.png")
    shown = page.show_sizes(exhibit, photo, [by(size) for size in exhibit.sizes[::2]])
    assert re.findall("<h3>(.*?)</h3>", shown) == ["16 × 24 pixels", "32 × 48 pixels", "48 × 72 pixels"]
    assert re.findall(r"(\d+) patches", shown) == ["6", "24", "54"]
    second = Exhibit(str(folder / "second"))
    shown, *pictures = page.show_both([exhibit, second], photo)
    assert re.findall("<h3>(.*?)</h3>", shown) == ["first", "second"]
    assert [picture.shape for picture in pictures] == [(360, 480, 3)] * 2
    picture, said = page.show_attention(exhibit, photo, next(iter(page.VIEWS)), 3.0, 0.0)
    np.testing.assert_array_equal(picture, pictures[0])
    assert "Seen from the class token" in said and "4.17%" in said


@pytest.mark.usefixtures("components")
def test_a_batch_is_a_table_to_take_home(exhibit: Exhibit, page: Any, folder: Path, tmp_path: Path) -> None:
    names = ["photo.png", "=1+1.png", "page.jpg", f"{HOSTILE}.jpg"]
    results = tmp_path / "results"
    rows, said, *buttons = page.show_many(exhibit, results, [uploaded(folder / name) for name in names])
    assert "4 images" in said and "1 broken" in said
    assert [row[0] for row in rows] == names
    for name, (_, label, score, error) in zip(names, rows, strict=True):
        if name == "page.jpg":
            assert label is None and score is None and error.startswith("page.jpg is a web page")
            continue
        best = exhibit.answer(File(folder / name, name)).prediction
        assert (label, error) == (best.labels[0].replace("\n", " ").replace("\u202e", "\\u202e"), None)
        assert score == pytest.approx(best.scores[0], abs=1e-4)
    as_csv, as_parquet = (Path(button.value["path"]) for button in buttons)
    with open(as_csv, encoding="utf-8", newline="") as file:
        written = list(csv.reader(file))
    assert written[0] == ["file", "label", "score", "error"] and len(written) == 5
    assert written[2][0] == "'=1+1.png"  # no formula
    table = pq.read_table(as_parquet)
    assert table.column_names == written[0] and table["file"].to_pylist() == names
    assert table["score"].to_pylist() == [row[2] for row in rows]


@pytest.mark.usefixtures("components")
def test_a_batch_has_a_limit(exhibit: Exhibit, page: Any, folder: Path, tmp_path: Path) -> None:
    many = [uploaded(folder / "photo.png")] * (page.MOST_FILES + 1)
    rows, said, *buttons = page.show_many(exhibit, tmp_path, many)
    assert rows == [] and f"at most {page.MOST_FILES} files at a time, got {page.MOST_FILES + 1}" in said
    assert page.show_many(exhibit, tmp_path, None)[0] == [] and not list(tmp_path.iterdir())
    assert not any(button.interactive for button in buttons)


@pytest.mark.usefixtures("components")
def test_no_address_is_fetched_and_one_event_at_a_time_has_the_model(
    exhibit: Exhibit, page: Any, tmp_path: Path
) -> None:
    built = page.build([exhibit, exhibit], tmp_path, 60)
    assert not built.analytics_enabled
    for block in built.blocks.values():
        with pytest.raises(page.gr.Error) as refusal:
            asyncio.run(block.async_move_resource_to_block_cache("https://example.com/a.png"))
        assert refusal.value.message == page.NOT_UPLOADED
    events = list(built.fns.values())
    assert len(events) >= 8
    for event in events:
        assert (event.concurrency_id, event.concurrency_limit) == ("model", 1) and not event.preprocess
        assert event.api_visibility == "private"


@pytest.mark.parametrize("arguments", [[], ["--export-space", "space"]])
def test_without_gradio_there_is_a_sentence(
    arguments: list[str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "gradio", None)
    done = CliRunner().invoke(app, ["demo", str(folder / "first"), *arguments])
    assert done.exit_code == 2 and not list(tmp_path.iterdir())
    assert done.stderr == 'Error: gradio must be installed for this: pip install "hf-vit[demo]"\n'


@pytest.mark.usefixtures("components")
def test_a_port_that_is_taken_is_named(page: Any, folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = CliRunner().invoke(app, ["demo", str(folder / "first"), "--port", port])
    assert done.exit_code == 2 and f"Cannot serve a page at 127.0.0.1, port {port}: the port is in use" in done.stderr


# ------------------------------------------------------------------------------------------------------- the Space


def test_a_space_holds_what_it_needs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_vit.demo.space.is_from_an_index", lambda: True)
    space = tmp_path / "space"
    arguments = ["demo", str(folder / "first"), "--compare", "google/vit-base-patch16-224"]
    done = CliRunner().invoke(app, [*arguments, "--export-space", str(space)])
    assert done.exit_code == 0, done.output
    assert f"python {space / 'app.py'}" in done.output and "hf upload YOUR_NAME/space" in done.output
    assert {path.name for path in space.iterdir()} == {"app.py", "requirements.txt", "README.md", "model"}
    program = (space / "app.py").read_text()
    compile(program, "app.py", "exec")
    assert "serve(str(HERE / 'model' / 'first'), 'google/vit-base-patch16-224')" in program
    assert (space / "requirements.txt").read_text().startswith("hf-vit[demo]")
    _, header, card = (space / "README.md").read_text().split("---\n", 2)
    fields = yaml.safe_load(header)
    assert fields["sdk"] == "gradio" and fields["app_file"] == "app.py" and fields["sdk_version"].startswith("6.")
    assert fields["title"] == "first and vit-base-patch16-224" and fields["models"] == ["google/vit-base-patch16-224"]
    assert fields["python_version"] == f"3.{sys.version_info.minor}" and "# first and vit-base" in card
    photo = File(folder / "photo.png", "photo.png")
    answers = [Exhibit(str(path)).answer(photo).prediction for path in (folder / "first", space / "model" / "first")]
    assert answers[0] == answers[1]


def test_a_space_of_an_unpublished_package_holds_its_code(folder: Path, tmp_path: Path) -> None:
    space = tmp_path / "space"
    export_space(space, str(folder / "first"))
    assert {path.name for path in space.iterdir()} == {"app.py", "requirements.txt", "README.md", "model", "hf_vit"}
    lines = (space / "requirements.txt").read_text().splitlines()
    names = [Requirement(line).name for line in lines]
    assert {"torch", "transformers", "gradio"} <= {*names} and len(names) == len({*names})
    assert "hf-vit" not in names and not list(space.rglob("__pycache__"))
    program = "import runpy, hf_vit; print(hf_vit.__file__); runpy.run_path('app.py')"  # as `python app.py` imports it
    done = subprocess.run([sys.executable, "-c", program], cwd=space, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == space / "hf_vit" / "__init__.py"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("encoder", "has no classifier"),
        ("no/such/place/here", "is not a valid name on the Hub"),
        ("page.jpg", "page.jpg"),
    ],
)
def test_a_space_that_would_not_run_is_not_written(model: str, message: str, folder: Path, tmp_path: Path) -> None:
    source = str(folder / model) if (folder / model).exists() else model
    with pytest.raises(ValueError, match=message):
        export_space(tmp_path / "new" / "space", str(folder / "first"), source)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty: choose another folder"):
        export_space(tmp_path, str(folder / "first"))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_encoder_has_nothing_to_show(folder: Path) -> None:
    with pytest.raises(ValueError, match="has no classifier, so there are no predictions to show"):
        Exhibit(str(folder / "encoder"))


# ---------------------------------------------------------------------------------------------------- in Chromium


in_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium")

# What a process asks of the network, a line each; read by Python before anything else.
WATCH = """
import socket
import subprocess

connect, look_up = socket.socket.connect, socket.getaddrinfo


def note(host):
    with open({log!r}, "a") as log:
        print(host, file=log)


def watched_connect(self, address):
    note(address[0] if isinstance(address, tuple) else "a file")
    return connect(self, address)


def watched_look_up(host, *arguments, **options):
    note(host)
    return look_up(host, *arguments, **options)


socket.socket.connect, socket.getaddrinfo = watched_connect, watched_look_up
"""


@pytest.fixture(scope="module")
def site(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Serve two models by the command; at the end nothing uploaded is left, and nobody outside was asked."""
    home = tmp_path_factory.mktemp("home")
    (home / "tmp").mkdir()
    variables = environment(home, has_package=True, TMPDIR=str(home / "tmp"))
    (home / "startup" / "sitecustomize.py").write_text(WATCH.format(log=str(home / "asked.txt")))
    command = [*DEMO, folder / "first", "--compare", folder / "second", "--port", free_port()]
    with served(command, variables, home) as address:
        yield SimpleNamespace(address=address, home=home)
    assert not list((home / "tmp").glob("hf-vit-demo-*"))
    assert set((home / "asked.txt").read_text().split()) <= {"127.0.0.1", "localhost", "None"}


@pytest.fixture
def visit(site: Any) -> Iterator[Visit]:
    with visiting(site.address) as visit:
        yield visit
        assert visit.hosts == {site.address.split("/")[2]} and visit.errors == []


@pytest.mark.slow
@in_chromium
def test_an_image_is_answered_and_controls_change_what_is_seen(visit: Visit, folder: Path, exhibit: Exhibit) -> None:
    expect(visit.tab).to_contain_text("Drop an image")
    visit.drop(folder / "photo.png")
    cards = visit.tab.locator(".vit-card")
    expect(cards).to_have_count(4)  # the answer, and three sizes
    answer = exhibit.answer(File(folder / "photo.png", "")).prediction
    expect(cards.first.locator("li")).to_have_count(5)
    expect(cards.first.locator(".score").first).to_have_text(f"{answer.scores[0]:.1%}")
    expect(visit.page.locator("img[src=x]")).to_have_count(0)  # no label became an element

    lit = visit.picture(LIT)
    before = lit.get_attribute("src")
    slider = visit.tab.get_by_role("slider", name="Head")
    slider.focus()
    visit.page.keyboard.press("ArrowRight")  # as a mouse moves it
    expect(lit).not_to_have_attribute("src", before)
    seen = {before, lit.get_attribute("src")}
    visit.tab.get_by_role("slider", name="Layer").focus()
    visit.page.keyboard.press("ArrowLeft")
    expect(lit).not_to_have_attribute("src", re.compile("|".join(map(re.escape, seen))))
    seen.add(lit.get_attribute("src"))
    visit.tab.get_by_label("The selected layer only").check()
    expect(lit).not_to_have_attribute("src", re.compile("|".join(map(re.escape, seen))))

    visit.tab.get_by_label("64 × 96").check()
    expect(cards).to_have_count(5)

    visit.drop(folder / "page.jpg")
    expect(visit.tab.get_by_role("alert")).to_have_text(
        "page.jpg is a web page or SVG, not a bitmap image: use the image that the page shows."
    )
    expect(cards).to_have_count(0)
    expect(lit).to_have_count(0)
    visit.drop(folder / "photo.png")
    expect(cards).to_have_count(5)

    visit.open("Positions")
    expect(visit.picture(POSITIONS)).to_be_visible()


@pytest.mark.slow
@in_chromium
def test_many_images_and_two_models(visit: Visit, folder: Path, exhibit: Exhibit, site: Any) -> None:
    visit.open("Batch")
    names = ["photo.png", "=1+1.png", f"{HOSTILE}.jpg", "page.jpg"]
    visit.drop(*(folder / name for name in names))
    expect(visit.tab.get_by_text("4 images, ")).to_contain_text("1 broken")
    expect(visit.page.locator("img[src=x]")).to_have_count(0)
    taken = {}
    for kind in ("CSV", "Parquet"):
        with visit.page.expect_download() as download:
            visit.tab.get_by_role("button", name=f"Download as {kind}").click()
        taken[kind] = site.home / download.value.suggested_filename
        download.value.save_as(taken[kind])
        assert "results" not in download.value.url  # a copy, which the next batch of somebody else does not replace
    table = pq.read_table(taken["Parquet"])
    assert table["file"].to_pylist() == names
    assert table["score"][0].as_py() == round(exhibit.answer(File(folder / names[0], "")).prediction.scores[0], 4)
    assert len(taken["CSV"].read_text().splitlines()) == 5

    visit.open("Compare")
    visit.drop(folder / "photo.png")
    expect(visit.tab.locator(".vit-card h3")).to_have_text(["first", "second"])
    for name in ("first", "second"):
        expect(visit.picture(f"Attention of {name} (rollout)")).to_be_visible()


@pytest.mark.slow
@in_chromium
def test_on_a_phone_in_the_dark_by_keyboard_and_camera(site: Any, folder: Path) -> None:
    options: dict[str, Any] = {"viewport": {"width": 360, "height": 740}, "color_scheme": "dark", "has_touch": True}
    with visiting(site.address, permissions=["camera"], **options) as visit:
        expect(visit.page.locator("body")).to_have_class(re.compile("dark"))
        ground, ink = visit.page.locator(".vit-title").evaluate(
            "e => [getComputedStyle(document.body).backgroundColor, getComputedStyle(e).color]"
        )
        assert max(map(int, re.findall(r"\d+", ground)[:3])) < 60 < 180 < min(map(int, re.findall(r"\d+", ink)[:3]))

        with visit.page.expect_file_chooser() as chooser:  # by Tab and Enter alone
            for _ in range(12):
                visit.page.keyboard.press("Tab")
                if "upload" in str(visit.page.evaluate("document.activeElement.ariaLabel")).lower():
                    break
            visit.page.keyboard.press("Enter")
        chooser.value.set_files(folder / "photo.png")
        expect(visit.tab.locator(".vit-card")).to_have_count(4)
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= 360
        visit.open("Compare")
        visit.open("Image")

        visit.tab.get_by_label("Remove Image").click()
        expect(visit.tab.locator(".vit-card")).to_have_count(0)
        visit.tab.get_by_label("Capture from camera").click()
        visit.tab.get_by_role("button", name="Click to Access Webcam").click()
        visit.page.wait_for_function("[...document.querySelectorAll('video')].some(video => video.videoWidth)")
        visit.tab.get_by_label("capture photo").click()
        expect(visit.tab.locator(".vit-card")).to_have_count(4)
        assert visit.hosts == {site.address.split("/")[2]} and visit.errors == []


@pytest.mark.slow
@in_chromium
def test_what_is_too_large_is_refused(visit: Visit, tmp_path: Path) -> None:
    with open(tmp_path / "large.png", "wb") as file:
        file.truncate(21 * 2**20)
    visit.drop(tmp_path / "large.png")
    expect(visit.page.get_by_text("exceed the maximum allowed size").first).to_be_visible()
    expect(visit.tab.locator(".vit-card")).to_have_count(0)


@pytest.mark.slow
@in_chromium
def test_an_exported_space_runs(folder: Path, tmp_path: Path) -> None:
    export_space(tmp_path / "space", str(folder / "first"))
    variables = environment(tmp_path / "home", has_package=True, GRADIO_SERVER_PORT=str(free_port()))
    with served([sys.executable, "app.py"], variables, tmp_path / "space") as address, visiting(address) as visit:
        assert address.split(":")[-1].strip("/") == variables["GRADIO_SERVER_PORT"]
        visit.drop(folder / "photo.png")
        expect(visit.tab.locator(".vit-card")).to_have_count(4)
        expect(visit.page.locator(".vit-title")).to_have_text("first")
        expect(visit.page.get_by_role("tab", name="Compare")).to_have_count(0)
