"""Every image gives a result or a `ValueError` that names it, wherever images are read."""

import base64
import functools
import http.server
import os
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import odd_images
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from odd_images import BROKEN, PLAIN, READABLE, TOO_LARGE, damaged, files
from PIL import Image
from transformers import (
    ImageClassificationPipeline,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    pipeline,
)

from hf_vit import (
    HFViTConfig,
    HFViTForImageClassification,
    HFViTImageProcessor,
    HFViTImageProcessorPil,
)
from hf_vit.data import folders
from hf_vit.data.folders import image_endings, skipped_in
from hf_vit.data.images import EvaluationImages, TrainingImages, Visit
from hf_vit.model.image_reading_hf_vit import LIMIT, read_image
from hf_vit.prediction.predictor import Predictor

pytestmark = pytest.mark.filterwarnings(
    # What Pillow says beside an image that it reads, or an error.
    "ignore::UserWarning:PIL",
    "ignore::PIL.Image.DecompressionBombWarning",
)
NO_IMAGES = {**BROKEN, **TOO_LARGE}
BACKENDS = [HFViTImageProcessor, HFViTImageProcessorPil]
SIDE = 24


def contrast(pixels: Any) -> float:
    """Return by how much the right of processed pixels `[C, H, W]`, from -1 to 1, is brighter than the left."""
    pixels = torch.as_tensor(pixels)
    return (pixels[..., -SIDE // 3 :].mean() - pixels[..., : SIDE // 3].mean()).item()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a folder of all files."""
    folder = tmp_path_factory.mktemp("images")
    for name, data in files().items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """Return the folder of a small classifier."""
    folder = tmp_path_factory.mktemp("model")
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    HFViTForImageClassification(HFViTConfig(**small, image_size=SIDE, patch_size=8)).save_pretrained(folder)
    HFViTImageProcessor(size=SIDE).save_pretrained(folder)
    return folder


# ------------------------------------------------------------------------------------------------------ processors


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", READABLE)
def test_a_readable_file_comes_out_upright_and_in_its_range(name, backend, folder):
    processor = backend(size=SIDE)
    from_path, from_bytes = (
        processor(source, return_tensors="pt")["pixel_values"][0] for source in (folder / name, files()[name])
    )
    assert contrast(from_path) > 0.8
    torch.testing.assert_close(from_bytes, from_path, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", READABLE)
def test_an_opened_image_is_as_its_file(name, backend, folder):
    processor = backend(size=SIDE)
    with Image.open(folder / name) as image:
        opened = processor(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(opened, processor(folder / name, return_tensors="pt")["pixel_values"])


@pytest.mark.parametrize("preset", ["original", "timm", "center_crop"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [*PLAIN, "wide.png"])
def test_a_plain_file_gives_pixels(name, backend, preset, folder):
    for processor in (backend.from_preset(preset, SIDE), backend(packing=9, patch_size=8)):
        assert processor(folder / name, return_tensors="pt")["pixel_values"].isfinite().all()


@pytest.mark.parametrize("name", NO_IMAGES)
def test_what_is_no_image_is_an_error_that_names_it(name, folder):
    for source in (folder / name, str(folder / name)):
        with pytest.raises(ValueError, match=f"^{folder / name} (is|has) .*[.]$"):
            read_image(source)
    with pytest.raises(ValueError, match=r"^An image given as bytes (is|has) "):
        HFViTImageProcessorPil()(files()[name])
    if name in TOO_LARGE:
        with pytest.raises(ValueError, match="more than 89,478,485 pixels"):
            read_image(folder / name)


def test_errors_take_neither_time_nor_memory(folder):
    code = """
import resource, sys, time
from hf_vit.model.image_reading_hf_vit import read_image
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
read_image(sys.argv[1])
for path in sys.argv[2:]:
    before, began = peak(), time.perf_counter()
    try:
        read_image(path)
    except ValueError:
        print(f"{time.perf_counter() - began:.2f} {peak() - before:.0f} {path}")
"""
    paths = [str(folder / name) for name in ("rgb.png", *NO_IMAGES)]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True)
    measured = [line.split(" ") for line in done.stdout.splitlines()]
    assert len(measured) == len(NO_IMAGES)
    assert [row for row in measured if float(row[0]) > 1 or float(row[1]) > 64] == []  # seconds, MiB


@pytest.mark.parametrize("seed", range(8))
def test_a_damaged_file_gives_pixels_or_an_error_that_names_it(seed):
    processor = HFViTImageProcessorPil(size=SIDE)
    errors = 0
    for name, data in damaged(seed):
        try:
            assert np.isfinite(processor(data)["pixel_values"][0]).all(), name
        except ValueError as error:
            errors += 1
            assert str(error).startswith("An image given as bytes "), name
    assert 10 < errors < len(READABLE)


def test_a_file_that_is_not_there_is_named(tmp_path):
    for source in (tmp_path / "no.jpg", str(tmp_path / "no.jpg")):
        with pytest.raises(FileNotFoundError, match=r"no\.jpg"):
            read_image(source)
    with pytest.raises(OSError, match=tmp_path.name):
        read_image(tmp_path)


def test_an_opened_image_that_cannot_be_decoded_is_named(folder):
    with Image.open(folder / "cut-50.png") as image, pytest.raises(ValueError, match=r"cut-50\.png is corrupt"):
        HFViTImageProcessorPil()(image)


@pytest.mark.parametrize("nothing", [None, 3, {"bytes": b""}, object()])
def test_what_is_not_even_a_file_is_an_error(nothing):
    with pytest.raises(TypeError, match="Expected PIL images, arrays, tensors, paths"):
        HFViTImageProcessorPil()(nothing)


# ------------------------------------------------------------------------------------------------- the limit of pixels


def test_the_limit_is_pillow_s(monkeypatch, folder):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", odd_images.HEIGHT * odd_images.WIDTH - 1)
    with pytest.raises(ValueError, match=r"rgb\.png has more than 2,399 pixels"):
        read_image(folder / "rgb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", odd_images.HEIGHT * odd_images.WIDTH)
    read_image(folder / "rgb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    read_image(folder / "rgb.png")


def test_the_environment_sets_the_limit(folder):
    code = "import sys; from hf_vit.model.image_reading_hf_vit import read_image; read_image(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder / "rgb.png")],
        env={**os.environ, LIMIT: "1000"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "has more than 1,000 pixels" in done.stderr


# ------------------------------------------------------------------------------------------------------ from the web


@pytest.fixture(scope="module")
def site(folder):
    """Serve the files."""
    handler = functools.partial(QuietHandler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.mark.parametrize("name", ["rgb.jpg", "gray-16-bit.png", "orientation-6.jpg"])
def test_the_web_and_base64_give_what_the_file_gives(name, site, folder):
    processor = HFViTImageProcessor(size=SIDE)
    expected = processor(folder / name, return_tensors="pt")["pixel_values"]
    text = base64.b64encode(files()[name]).decode()
    in_lines = base64.encodebytes(files()[name]).decode()
    for source in (f"{site}/{name}", text, in_lines, f"data:image/png;base64,{text}"):
        torch.testing.assert_close(processor(source, return_tensors="pt")["pixel_values"], expected, rtol=0, atol=0)


def test_text_that_is_nothing_is_an_error_without_the_text():
    for text in ("data:image/png;base64,?" + 10_000 * "a", 10_001 * "a"):
        with pytest.raises(ValueError, match="is not a path, a URL or base64") as caught:
            read_image(text)
        assert len(str(caught.value)) < 200
    with pytest.raises(FileNotFoundError):
        read_image("abcd")


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)


def test_heic_names_the_package_that_reads_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setattr(folders, "image_endings", image_endings.__wrapped__)
    monkeypatch.setattr(Image, "EXTENSION", {end: kind for end, kind in Image.EXTENSION.items() if kind != "HEIF"})
    (tmp_path / "phone.heic").write_bytes(HEIC)
    with pytest.raises(ValueError, match=r"phone\.heic is a HEIC image: install pillow-heif"):
        read_image(tmp_path / "phone.heic")
    (tmp_path / "Thumbs.db").touch()  # which an operating system leaves behind, as all in the folder
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "notes.txt").touch()
    assert skipped_in([tmp_path]) == "Skipped 1 file not read as images: 1 .heic (install pillow-heif to read them)."


@pytest.mark.skipif(find_spec("pillow_heif") is None, reason="needs pillow-heif")
def test_heic_is_read(tmp_path):
    import pillow_heif

    pillow_heif.from_pillow(odd_images.picture()).save(tmp_path / "phone.heic")
    pixels = HFViTImageProcessor(size=SIDE)(tmp_path / "phone.heic", return_tensors="pt")["pixel_values"][0]
    assert contrast(pixels) > 0.8
    assert skipped_in([tmp_path]) is None


def test_what_the_web_does_not_give_is_an_error(site):
    with pytest.raises(ValueError, match=f"{site}/no.jpg could not be downloaded: .*404"):
        read_image(f"{site}/no.jpg")
    with pytest.raises(ValueError, match=r"http://127\.0\.0\.1:9/no\.jpg could not be downloaded"):
        read_image("http://127.0.0.1:9/no.jpg")
    with pytest.raises(ValueError, match=r"page\.jpg is a web page"):
        read_image(f"{site}/page.jpg")


# -------------------------------------------------------------------------------------------- wherever images are read


def test_pipeline(folder, model_folder, site):
    classify = pipeline("image-classification", str(model_folder), device="cpu")
    expected = Predictor.from_pretrained(model_folder, precision="fp32", device="cpu")
    names = [*READABLE, *PLAIN]
    answers = classify([str(folder / name) for name in names], batch_size=8)
    for answer, prediction in zip(answers, expected(folder / name for name in names), strict=True):
        assert answer[0]["label"] == prediction.labels[0]
        assert answer[0]["score"] == pytest.approx(prediction.scores[0], abs=1e-4)
    assert classify(f"{site}/rgb.png", timeout=5) == classify(str(folder / "rgb.png"))
    with pytest.raises(ValueError, match=f"{site}/text.jpg is not an image"):
        classify(f"{site}/text.jpg")
    extract = pipeline("image-feature-extraction", str(model_folder), device="cpu")
    assert np.isfinite(extract(str(folder / "gray-16-bit.png"))).all()
    for name in NO_IMAGES:
        for read in (classify, extract):
            with pytest.raises(ValueError, match=name):
                read(str(folder / name))


def test_a_pipeline_takes_what_transformers_own_takes(folder, model_folder):
    classify = pipeline("image-classification", str(model_folder), device="cpu")
    path = str(folder / "rgb.png")
    [one, other] = expected = classify(path)
    with Image.open(path) as image:
        assert classify(image) == classify(np.array(image)) == classify(torch.from_numpy(np.array(image))) == expected
    assert classify(path, top_k=1) == [one]
    values = classify(path, function_to_apply="none")
    assert values[0]["score"] - values[1]["score"] == pytest.approx(np.log(one["score"] / other["score"]), abs=1e-4)
    assert list(classify(path for _ in range(3))) == classify([path] * 3) == [expected] * 3
    classify.model.config.problem_type = "multi_label_classification"
    assert sum(guess["score"] for guess in classify(path)) != pytest.approx(1, abs=1e-3)


def test_pipelines_of_other_models_are_transformers_own(model_folder):
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    options = {"image_processor": ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}), "device": "cpu"}
    stock = ViTForImageClassification(ViTConfig(**small, image_size=SIDE, patch_size=8))
    assert type(pipeline("image-classification", stock, **options)) is ImageClassificationPipeline
    # A processor of another library gets what it gets from transformers.
    ours = HFViTForImageClassification.from_pretrained(model_folder)
    assert len(pipeline("image-classification", ours, **options)(Image.new("RGB", (9, 9)))) == 2


def test_predict_goes_on_behind_a_broken_image(folder, model_folder):
    predictions = list(Predictor.from_pretrained(model_folder, device="cpu")(folder / name for name in files()))
    assert [prediction.source.name for prediction in predictions] == list(files())
    for prediction in predictions:
        if prediction.source.name in NO_IMAGES:
            assert prediction.labels == [] and prediction.source.name in prediction.error
        else:
            assert len(prediction.labels) == 2 and prediction.error is None


@pytest.mark.parametrize("kind", ["path", "bytes"])
@pytest.mark.parametrize("images", [EvaluationImages, TrainingImages])
def test_training_and_evaluation_count_what_is_broken(images, kind, folder):
    stored = [{"path": str(folder / name), "bytes": None if kind == "path" else files()[name]} for name in files()]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a"])})
    split = datasets.Dataset.from_dict({"image": stored, "label": [0] * len(stored)}, features=features)
    options: dict[str, Any] = {} if images is EvaluationImages else {"augmentation": lambda pixels: pixels, "seed": 0}
    read = images(split, ("image", "label"), HFViTImageProcessor(size=SIDE), **options)
    for index, name in enumerate(files()):
        example = read[Visit(0, index)]
        assert (example["broken"] is None) == (name not in NO_IMAGES), name
        assert example["broken"] is None or example["broken"].endswith(name)


# --------------------------------------------------------------------------------------------------------- arrays

SHAPES = st.one_of(
    arrays.array_shapes(min_dims=1, max_dims=5, min_side=0, max_side=6),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.tuples(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 2, 3, 4, 5])),
    st.tuples(st.sampled_from([1, 3, 4]), st.integers(1, 40), st.integers(1, 40)),
)
DTYPES = st.one_of(
    arrays.boolean_dtypes(),
    arrays.integer_dtypes(endianness="?"),
    arrays.unsigned_integer_dtypes(endianness="?"),
    arrays.floating_dtypes(endianness="?", sizes=(16, 32, 64)),
    arrays.complex_number_dtypes(),
    st.just(np.dtype(object)),
    st.just(np.dtype("U3")),
)
LAYOUTS = {
    "as it is": lambda array: array,
    "columns first": np.asfortranarray,
    "reversed": lambda array: array[::-1],
    "every second": lambda array: np.repeat(array, 2, axis=0)[::2],
    "read-only": lambda array: np.broadcast_to(array, array.shape),
}


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    data=st.data(), layout=st.sampled_from(list(LAYOUTS)), is_tensor=st.booleans(), backend=st.sampled_from(BACKENDS)
)
def test_an_array_gives_pixels_or_an_error(data, layout, is_tensor, backend):
    drawn = data.draw(arrays.arrays(data.draw(DTYPES), 12, fill=st.nothing()))  # to draw every pixel takes long
    array = np.resize(drawn, data.draw(SHAPES))
    image: Any = LAYOUTS[layout](array)
    if is_tensor:
        try:
            image = torch.from_numpy(np.ascontiguousarray(array))
        except (TypeError, ValueError):  # torch has no such type
            return
    try:
        pixels = backend(size=8)(image, return_tensors="pt")["pixel_values"]
    except ValueError as error:
        assert str(error).startswith(("Expected", "Unable to infer channel dimension", "The channel dimension"))
        return
    assert pixels.shape[1:] == (3, 8, 8) and pixels.dtype == torch.float32
    assert pixels.isfinite().all() and pixels.abs().max() <= 1.001
