"""Images of 1, 2, 4 and more channels, of 16 bits and of floats: reading, value ranges, training, checkpoints."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from isolated import python
from PIL import Image
from transformers.utils import logging

from hf_vit import HFViTConfig, HFViTForImageClassification, HFViTImageProcessor, HFViTImageProcessorPil
from hf_vit.checkpoints.checkpoint import Options
from hf_vit.checkpoints.layouts import adapt_channels
from hf_vit.checkpoints.models import load, load_classifier
from hf_vit.checkpoints.opening import open_checkpoint
from hf_vit.data.augmentation import AUGMENTATIONS, WITHOUT_COLORS, build_augmentation
from hf_vit.data.channels import Channels, adapt_processor, channels_of
from hf_vit.data.images import EvaluationImages, TrainingImages, collate, has_channels, normalize, preprocess
from hf_vit.evaluation.evaluate import evaluate_checkpoint
from hf_vit.hub.folder import check_folder
from hf_vit.model.image_conversion_hf_vit import logger
from hf_vit.model.image_reading_hf_vit import read_image
from hf_vit.prediction.predictor import Predictor
from hf_vit.training.loop import train
from hf_vit.training.recipe import TrainConfig
from hf_vit.training.run import Run

BACKENDS = (HFViTImageProcessor, HFViTImageProcessorPil)
ARCHITECTURE = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "patch_size": 4,
}
COLUMNS = ("image", "label")


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def dataset_of(files: list[Path], labels: list[int]) -> Dataset:
    features = Features({"image": Value("string"), "label": ClassLabel(names=["one", "two"])})
    table = Dataset.from_dict({"image": [str(file) for file in files], "label": labels}, features=features)
    return table.cast_column("image", ImageFeature(decode=False))


def save_arrays(folder: Path, channels: int = 5, number: int = 12, in_last: int | None = None) -> Path:
    """Write 12-bit arrays of two classes, which differ in the level of one channel, as `save_to_disk` does."""
    folder.mkdir()
    files, labels = [], [index % 2 for index in range(number)]
    for index, label in enumerate(labels):
        has_others = in_last is not None and index == number - 1
        array = 1000 + 100 * noise(in_last if has_others else channels, 12, 10, seed=index)  # type: ignore[arg-type]
        array[-1] += 120 * label
        files.append(folder / f"{index}.npy")
        np.save(files[-1], array.astype(np.uint16))
    data = dataset_of(files, labels)
    splits = {"train": data.select(range(number - 4)), "test": data.select(range(number - 4, number))}
    DatasetDict(splits).save_to_disk(str(folder / "data"))
    return folder / "data"


@pytest.mark.parametrize(
    "dtype", ["uint8", "int8", "uint16", "int32", "int64", "float16", "float32", "float64", "bool", ">u2"]
)
def test_numpy_files_keep_their_dtype(dtype: str, tmp_path: Path) -> None:
    array = (100 * noise(5, 6, 7)).astype(dtype)
    np.save(tmp_path / "a.npy", array)
    pixels = read_image(tmp_path / "a.npy")
    assert isinstance(pixels, torch.Tensor)
    np.testing.assert_array_equal(pixels.numpy(), array)
    assert pixels.numpy().dtype == np.dtype(dtype).newbyteorder("=")


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((6, 7), (1, 6, 7)),
        ((6, 7, 3), (3, 6, 7)),
        ((3, 6, 7), (3, 6, 7)),
        ((6, 7, 2), (2, 6, 7)),
        ((9, 9, 12), (12, 9, 9)),
        ((12, 9, 9), (12, 9, 9)),
        ((3, 3, 3), (3, 3, 3)),
    ],
)
def test_layouts_of_numpy_files(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    array = noise(*shape)
    pixels = read_image(npy(array))
    assert isinstance(pixels, torch.Tensor)
    assert pixels.shape == expected
    channel = array if len(shape) == 2 else array[..., 0] if expected[0] == shape[2] != shape[0] else array[0]
    np.testing.assert_array_equal(pixels[0].numpy(), channel)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (npy(np.array(["a"])), "array of numbers"),
        (npy(noise(3, 4, 5, 6)), r"got \(3, 4, 5, 6\)"),
        (npy(noise(6, 9, 6)), "may be"),
        (npy(noise(8, 8, 3))[:-1], "truncated"),
        (npy(noise(8, 8, 3))[:20], "corrupt"),
    ],
)
def test_numpy_files_that_are_no_images_are_named(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.npy").write_bytes(data)
    with pytest.raises(ValueError, match=rf"bad\.npy .*{message}"):
        read_image(tmp_path / "bad.npy")


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "bad.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"bad\.npy .*numbers"):
        read_image(tmp_path / "bad.npy")


def test_the_size_of_an_array_is_checked_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    data = npy(noise(5, 20, 20).astype(np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 399)
    with pytest.raises(ValueError, match="more than 399 pixels"):
        read_image(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    assert read_image(data).shape == (5, 20, 20)  # type: ignore[union-attr]


@pytest.mark.parametrize("shape", [(2, 20, 18), (5, 20, 18), (4, 20, 18)])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_tiff_of_several_channels(shape: tuple[int, ...], dtype: str, tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile", reason="needs tifffile")
    array = (200 * noise(*shape)).astype(dtype)
    tifffile.imwrite(tmp_path / "pages.tif", array, photometric="minisblack")
    tifffile.imwrite(tmp_path / "planes.tif", array, photometric="minisblack", planarconfig="separate")
    tifffile.imwrite(tmp_path / "named.tif", array, photometric="minisblack", metadata={"axes": "CYX"})
    tifffile.imwrite(tmp_path / "imagej.tif", array, imagej=True, metadata={"axes": "CYX"})
    bands = np.moveaxis(array, 0, -1)
    tifffile.imwrite(tmp_path / "bands.tif", bands, photometric="minisblack", planarconfig="contig")
    for file in sorted(tmp_path.glob("*.tif")):
        pixels = read_image(file)
        assert isinstance(pixels, torch.Tensor), file.name
        np.testing.assert_array_equal(pixels.numpy(), array, err_msg=file.name)


def test_stacks_and_transparency_are_no_channels(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile", reason="needs tifffile")
    stack = (200 * noise(5, 20, 18)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "depth.tif", stack, photometric="minisblack", metadata={"axes": "ZYX"})
    assert np.asarray(read_image(tmp_path / "depth.tif")).shape[-2:] == (20, 18)
    processor = HFViTImageProcessorPil.from_preset("original", 8)
    assert processor(str(tmp_path / "depth.tif"), return_tensors="pt").pixel_values.shape == (1, 3, 8, 8)
    Image.fromarray((200 * noise(20, 18, 4)).astype(np.uint8)).save(tmp_path / "rgba.tif")
    image = read_image(tmp_path / "rgba.tif")
    assert isinstance(image, Image.Image)
    assert image.mode == "RGBA"


def test_a_tiff_without_tifffile_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tifffile = pytest.importorskip("tifffile", reason="needs tifffile")
    tifffile.imwrite(tmp_path / "five.tif", noise(20, 18, 5), photometric="minisblack", planarconfig="contig")
    colors = (60000 * noise(20, 18, 3)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "colors.tif", colors, photometric="rgb")
    deep = read_image(tmp_path / "colors.tif")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(ValueError, match=r'five\.tif .*pip install "hf-vit\[tiff\]"'):
        read_image(tmp_path / "five.tif")
    pixels = read_image(tmp_path / "colors.tif")  # Pillow keeps 8 bits, on the scale of 16
    assert isinstance(pixels, torch.Tensor)
    assert isinstance(deep, torch.Tensor)
    np.testing.assert_array_equal(deep.numpy(), colors.transpose(2, 0, 1))
    assert (pixels.int() - deep.int()).abs().max() <= 257


@pytest.mark.parametrize("kind", ["png", "tif", "npy"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_12_bits_keep_their_levels(kind: str, backend: type, tmp_path: Path) -> None:
    array = np.arange(1000, 1256, dtype=np.uint16).reshape(16, 16)
    file = tmp_path / f"a.{kind}"
    np.save(file, array) if kind == "npy" else Image.fromarray(array).save(file)
    options = {"do_normalize": False, "do_rescale": False, "return_tensors": "pt"}
    processor = backend.from_preset("original", 16, value_range=(1000, 1255))
    processor.save_pretrained(tmp_path)
    for source in (str(file), file.read_bytes(), array):
        pixels = backend.from_pretrained(tmp_path)(source, **options)["pixel_values"]
        assert pixels.shape == (1, 3, 16, 16)
        assert torch.equal(torch.as_tensor(pixels)[0, 1].flatten().long(), torch.arange(256))


def test_16_bit_colours_of_png() -> None:
    codecs = pytest.importorskip("imagecodecs", reason="needs imagecodecs")
    colors = (60000 * noise(20, 18, 3)).astype(np.uint16)
    pixels = read_image(codecs.png_encode(colors))
    assert isinstance(pixels, torch.Tensor)
    np.testing.assert_array_equal(pixels.numpy(), colors.transpose(2, 0, 1))


@pytest.mark.parametrize("channels", [2, 4, 5])
@pytest.mark.parametrize("size", [(8, 8), (20, 24)])
def test_both_backends_agree_on_any_number_of_channels(channels: int, size: tuple[int, int], tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", (noise(channels, 12, 14) - 0.5).astype(np.float32))
    pairs = [[-0.5 - index, 0.5 + index] for index in range(channels)]
    outputs = [
        backend.from_preset("timm", size, channels, value_range=pairs)(str(tmp_path / "a.npy"), return_tensors="pt")
        for backend in BACKENDS
    ]
    one, other = (output.pixel_values for output in outputs)
    assert one.shape == (1, channels, *size)
    assert (one - other).abs().max() <= 1.01 * 2 / 255


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["png", "npy", "array", "int32"])
def test_dark_16_bit_images_keep_more_levels_than_8_bits(
    kind: str, backend: type, tmp_path: Path, caplog: Any
) -> None:
    array = np.arange(1000, 1256, dtype=np.uint16).reshape(16, 16)
    source: Any = str(tmp_path / f"a.{kind}")
    if kind == "png":
        Image.fromarray(array).save(source)
    elif kind == "npy":
        np.save(source, array)
    else:
        source = array if kind == "array" else Image.fromarray(array.astype(np.int32))
    logging.enable_propagation()
    logger.warning_once.cache_clear()
    processor = backend.from_preset("original", 16)
    pixels = torch.as_tensor(processor(source, do_normalize=False, return_tensors="pt")["pixel_values"])
    logging.disable_propagation()
    torch.testing.assert_close(pixels[0, 1], torch.from_numpy(array.astype(np.float32)) / 65535)
    assert "value_range" in caplog.text
    if isinstance(source, str):
        torch.testing.assert_close(preprocess(read_image(source), processor) / 255, pixels[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "value", "more"), [("float32", 0.5, 1.2), ("int32", 200, 300), ("float32", 200, 300)]
)
def test_one_value_more_does_not_turn_an_image_black(dtype: str, value: float, more: float, backend: type) -> None:
    image = np.full((8, 8, 3), value, dtype)
    processor = backend.from_preset("original", 8)
    expected = processor(image, do_normalize=False, return_tensors="pt").pixel_values
    image[0, 0, 0] = more
    got = processor(image, do_normalize=False, return_tensors="pt").pixel_values
    torch.testing.assert_close(got[0, :, 1:], expected[0, :, 1:])
    assert got.max() == 1
    image[0, 0, 0] = 5 * more  # could be a range of its own
    if dtype == "float32":
        with pytest.raises(ValueError, match="state their value_range"):
            processor(image)


def test_a_file_of_floats_is_predicted_as_it_is_processed(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", noise(3, 8, 8).astype(np.float32))
    processor = HFViTImageProcessor.from_preset("original", 8)
    pixels = preprocess(read_image(tmp_path / "a.npy"), processor)
    expected = processor(tmp_path / "a.npy", return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(normalize(pixels[None], processor), expected)


@pytest.mark.parametrize("value_range", [(1, 1), (2, 1), (0, float("nan")), "wide", [[0, 1, 2]], 5])
def test_wrong_ranges_are_rejected(value_range: object) -> None:
    with pytest.raises(ValueError, match="Expected value_range as"):
        HFViTImageProcessor.from_preset("original", 8, value_range=value_range)(Image.new("RGB", (8, 8)))


def test_a_range_needs_as_many_pairs_as_channels() -> None:
    processor = HFViTImageProcessor.from_preset("original", 8, value_range=[[0, 1]] * 2)
    with pytest.raises(ValueError, match="2 pairs but the image has 3 channels"):
        processor(Image.new("RGB", (8, 8)))


def test_the_range_is_the_same_for_every_image() -> None:
    processor = HFViTImageProcessor.from_preset("original", 8, value_range=(0, 1))
    array = noise(8, 8, 3).astype(np.float32)
    higher = array.copy()
    higher[0, 0, 0], array[1, 1, 1], higher[1, 1, 1] = 1.01, np.nan, np.inf
    one, other = (processor(image, return_tensors="pt").pixel_values for image in (array, higher))
    assert (one != other).sum() <= 2
    assert one[0, 1, 1, 1] == pytest.approx(-1)  # NaN is black
    assert other[0, 1, 1, 1] == pytest.approx(1)  # infinity is white


def test_channels_of_photographs_and_measurements(tmp_path: Path) -> None:
    def of(*files: Path) -> Channels:
        return channels_of(dataset_of(list(files), [0] * len(files)), COLUMNS)

    photo = (255 * noise(9, 8, 4)).astype(np.uint8)
    Image.fromarray(photo).save(tmp_path / "rgba.png")
    Image.fromarray(photo[..., 0]).save(tmp_path / "gray.png")
    Image.fromarray(photo[..., :3]).save(tmp_path / "rgb.jpg")
    (tmp_path / "broken.jpg").write_bytes(b"broken")
    assert of(*(tmp_path / name for name in ("rgba.png", "gray.png", "broken.jpg", "rgb.jpg"))) == Channels()
    assert of(tmp_path / "broken.jpg") == Channels()

    Image.fromarray((1000 + 200 * noise(40, 40)).astype(np.uint16)).save(tmp_path / "deep.png")
    assert of(tmp_path / "deep.png") == Channels(3, [[1000, 1200]])

    np.save(tmp_path / "five.npy", noise(5, 40, 40) * np.arange(1, 6)[:, None, None] - 1)
    found = of(tmp_path / "five.npy")
    assert found.num_channels == len(found.value_range or ()) == 5
    assert found.value_range is not None
    np.testing.assert_allclose(found.value_range, [[-1, number] for number in range(5)], atol=0.1)
    np.testing.assert_allclose(found.mean, 0.5, atol=0.05)  # type: ignore[arg-type]
    np.testing.assert_allclose(found.std, 12**-0.5, atol=0.05)  # type: ignore[arg-type]

    np.save(tmp_path / "bytes.npy", (255 * noise(2, 40, 41)).astype(np.uint8))
    assert of(tmp_path / "bytes.npy").value_range is None
    with pytest.raises(ValueError, match=r"five\.npy with 5 and .*bytes\.npy with 2"):
        of(tmp_path / "five.npy", tmp_path / "bytes.npy")


def test_a_processor_follows_the_data() -> None:
    five = Channels(5, [[0, 10]] * 5, [0.1, 0.2, 0.3, 0.4, 0.5], [0.2] * 5)
    processor = HFViTImageProcessor.from_preset("center_crop", 8)
    adapt_processor(processor, five)
    assert not processor.do_convert_rgb
    assert processor.image_mean == five.mean
    pixels = preprocess(torch.full((5, 8, 8), 5, dtype=torch.int16), processor)
    assert pixels.unique().tolist() == [128]
    assert normalize(pixels[None], processor).shape == (1, 5, 8, 8)
    other = Channels(5, [[0, 99]] * 5, [0.9] * 5, [0.9] * 5)
    adapt_processor(processor, other)
    assert processor.value_range == five.value_range
    assert processor.image_mean == five.mean
    with pytest.raises(ValueError, match=r"5 channels, but the model has num_channels=3"):
        adapt_processor(HFViTImageProcessor.from_preset("original", 8), five, 3)
    gray = HFViTImageProcessor.from_preset("center_crop", 8)
    adapt_processor(gray, Channels(3, [[0, 4095]]), 1)
    assert gray.do_grayscale
    array = np.full((8, 8), 4095, np.uint16)
    assert gray(array, return_tensors="pt", do_normalize=False).pixel_values.unique().tolist() == [1.0]


# ------------------------------------------------------------------------------------------------- other checkpoints


def tiny_model(**fields: object) -> HFViTForImageClassification:
    torch.manual_seed(0)
    return HFViTForImageClassification(HFViTConfig(**{**ARCHITECTURE, "image_size": 8, "num_labels": 2, **fields}))


def test_a_gray_model_equals_repeated_gray(tmp_path: Path) -> None:
    model = tiny_model().eval()
    model.save_pretrained(tmp_path / "m")
    gray = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = model(gray.expand(-1, 3, -1, -1)).logits
    loaded = HFViTForImageClassification.from_pretrained(tmp_path / "m", num_channels=1).eval()
    torch.testing.assert_close(loaded(gray).logits, expected)
    tuned, processor = load_classifier(tmp_path / "m", ["LABEL_0", "LABEL_1"], num_channels=1)
    torch.testing.assert_close(tuned.eval()(gray).logits, expected)
    assert processor.do_grayscale
    loaded.save_pretrained(tmp_path / "gray")
    again, processor = load(tmp_path / "gray")
    torch.testing.assert_close(again(gray).logits, expected)
    assert processor.do_grayscale


@pytest.mark.parametrize("number", [2, 4, 5])
def test_filters_are_repeated_as_timm_does(number: int) -> None:
    manipulate = pytest.importorskip("timm.models._manipulate", reason="needs timm")
    weight = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = manipulate.adapt_input_conv(number, weight)
    torch.testing.assert_close(adapt_channels(weight.flatten(1), 3, number), expected.flatten(1))


def test_every_family_is_adapted(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="needs timm")
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 2}
    model = timm.models.vision_transformer.VisionTransformer(**options)
    torch.save(model.state_dict(), tmp_path / "timm.pth")
    checkpoint = open_checkpoint(tmp_path / "timm.pth", Options(num_channels=4, num_heads=2))
    assert any("num_channels=4" in sentence for sentence in checkpoint.assumed)
    weight = checkpoint.state_dict()["vit.embeddings.patch_embeddings.projection.weight"]
    expected = model.patch_embed.proj.weight[:, [0, 1, 2, 0]] * 3 / 4
    torch.testing.assert_close(weight, expected.flatten(1).detach())
    assert not checkpoint.processor().do_convert_rgb


def test_what_cannot_be_adapted_is_refused(tmp_path: Path) -> None:
    tiny_model(use_patch_layernorm=True).save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="LayerNorm of patches for 3 channels"):
        HFViTForImageClassification.from_pretrained(tmp_path / "m", num_channels=4)


# ------------------------------------------------------------------------------------------------------ augmentation


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentation_of_five_channels(name: str) -> None:
    if name not in WITHOUT_COLORS:
        with pytest.raises(ValueError, match="changes colours"):
            build_augmentation(name, (8, 8), 0.5, num_channels=5)
        return
    image = (255 * torch.rand(5, 12, 10, generator=torch.Generator().manual_seed(0))).to(torch.uint8)
    augment = build_augmentation(name, (8, 8), 0.5, erasing=1.0, fill=[0.1, 0.2, 0.3, 0.4, 0.5], num_channels=5)
    assert augment(image).shape == (5, 8, 8)
    with pytest.raises(ValueError, match="changes colours"):
        build_augmentation(name, (8, 8), 0.5, color_jitter=0.3, num_channels=5)


# ---------------------------------------------------------------------------------------------------------- training

REMOTE = """
import json, sys
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
for backend in ("torchvision", "pil"):
    processor = AutoImageProcessor.from_pretrained(sys.argv[1], trust_remote_code=True, backend=backend)
    with torch.inference_mode():
        logits = model(**processor(sys.argv[2], return_tensors="pt")).logits
open(sys.argv[3], "w").write(json.dumps(logits[0].tolist()))
"""


def recipe(data: Path, output_dir: Path, **changed: object) -> TrainConfig:
    values = {
        "data": str(data), "output_dir": str(output_dir), "model": None, "model_config": ARCHITECTURE,
        "image_size": 8, "batch_size": 4, "max_steps": 2, "warmup_epochs": 0, "precision": "fp32", "erasing": 1.0,
        "mixup": 0.2, "cutmix": 1.0,
    }  # fmt: skip
    return TrainConfig(**{**values, **changed})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    """Return a file of 5 channels, and a model that was trained on such files."""
    folder = tmp_path_factory.mktemp("five")
    data = save_arrays(folder / "arrays")
    return data.parent / "0.npy", train(recipe(data, folder / "m"))


def test_training_on_five_channels(five: tuple[Path, Run]) -> None:
    file, run = five
    assert run.model.config.num_channels == run.config.model_config["num_channels"] == 5
    ranges = np.array(run.processor.value_range)
    np.testing.assert_allclose(ranges, [[1000, 1100]] * 4 + [[1000, 1220]], atol=10)
    assert len(run.processor.image_mean) == 5
    assert run.metrics["broken_images"] == []
    stored = json.loads((run.output_dir / "preprocessor_config.json").read_text())
    assert stored["value_range"] == run.processor.value_range
    measured = evaluate_checkpoint(str(run.output_dir), run.config.data)  # type: ignore[arg-type]
    assert measured is not None
    assert measured["images"] == 4
    assert "image_arrays_hf_vit.py" in check_folder(run.output_dir)
    photo = io.BytesIO()
    Image.new("RGB", (8, 8)).save(photo, "PNG")
    predictor = Predictor.from_pretrained(run.output_dir)
    array = {"bytes": file.read_bytes(), "path": None}
    one, other, wrong = predictor([file, array, photo.getvalue()])
    assert one.scores == other.scores != []
    assert wrong.error is not None
    assert "Expected an image of 5 channels, got 3" in wrong.error


def test_files_of_other_channels_are_counted_as_unreadable(tmp_path: Path) -> None:
    data = save_arrays(tmp_path / "arrays", in_last=2)
    run = train(recipe(data, tmp_path / "m", max_broken=1.0))
    assert run.metrics["broken_images"] == ["11.npy"]


@pytest.mark.slow
def test_the_repository_reads_five_channels_without_the_package(five: tuple[Path, Run], tmp_path: Path) -> None:
    file, run = five
    script = tmp_path / "remote.py"
    script.write_text(REMOTE)
    python(script, run.output_dir, file, tmp_path / "logits.json", home=tmp_path)
    model, processor = load(run.output_dir)
    with torch.inference_mode():
        logits = model(**processor(str(file), return_tensors="pt")).logits[0]
    torch.testing.assert_close(
        torch.tensor(json.loads((tmp_path / "logits.json").read_text())), logits, rtol=0, atol=1e-3
    )


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_fine_tuning_on_other_channels(channels: int, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "m")
    data = save_arrays(tmp_path / "arrays", channels)
    fields = {"num_channels": 1} if channels == 1 else {}
    run = train(recipe(data, tmp_path / "o", model=str(tmp_path / "m"), model_config=fields))
    assert run.model.config.num_channels == channels
    again, processor = load(tmp_path / "o")
    file = str(tmp_path / "arrays" / "0.npy")
    assert again(**processor(file, return_tensors="pt")).logits.isfinite().all()
    assert processor.value_range == run.processor.value_range
    resumed = train(recipe(data, tmp_path / "o", model=str(tmp_path / "m"), model_config=fields))
    assert resumed.metrics == run.metrics


def test_16_bit_gray_keeps_the_3_channels_of_a_checkpoint(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "m")
    data = save_arrays(tmp_path / "arrays", 1)
    run = train(recipe(data, tmp_path / "o", model=str(tmp_path / "m"), model_config={}))
    assert run.model.config.num_channels == 3
    [[low, high]] = run.processor.value_range
    assert 990 <= low <= 1010
    assert 1190 <= high <= 1230


@pytest.mark.parametrize("number", [1, 4])
def test_transparent_photographs_for_1_and_4_channels(number: int, tmp_path: Path) -> None:
    files, labels = [], [index % 2 for index in range(12)]
    for index in range(12):
        files.append(tmp_path / f"{index}.png")
        Image.fromarray((255 * noise(9, 8, 4, seed=index)).astype(np.uint8)).save(files[-1])
    data = dataset_of(files, labels)
    DatasetDict({"train": data, "test": data}).save_to_disk(str(tmp_path / "data"))
    tiny_model().save_pretrained(tmp_path / "m")
    fields = {"num_channels": number}
    run = train(recipe(tmp_path / "data", tmp_path / "o", model=str(tmp_path / "m"), model_config=fields))
    assert run.model.config.num_channels == number
    assert run.metrics["broken_images"] == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_photographs_without_transparency_are_opaque(backend: type, tmp_path: Path) -> None:
    colors = (255 * noise(9, 8, 4)).astype(np.uint8)
    for name in ("a.png", "a.jpg"):
        Image.fromarray(colors[..., :3]).save(tmp_path / name)
    Image.fromarray(colors[..., :3]).quantize(8).save(tmp_path / "p.png")
    Image.fromarray(colors).save(tmp_path / "t.png")
    processor = backend.from_preset("original", 8, num_channels=4)
    for name in ("a.png", "a.jpg", "p.png", "t.png"):
        image = read_image(tmp_path / name)
        assert has_channels(image, processor)
        for source in (image, tmp_path / name):
            pixels = torch.as_tensor(processor(source, return_tensors="pt")["pixel_values"])
            assert pixels.shape == (1, 4, 8, 8)
            assert bool((pixels[0, 3] > 0.999).all()) == (name != "t.png")
    processor.image_mean = [0.1, 0.2, 0.3, 0.4]  # as measured of four bands
    assert not has_channels(read_image(tmp_path / "a.png"), processor)


@pytest.mark.parametrize("backend", BACKENDS)
def test_options_by_other_names(backend: type, tmp_path: Path, caplog: Any) -> None:
    assert backend(resample="bicubic").resample == Image.Resampling.BICUBIC
    with pytest.raises(ValueError, match=r"Expected resample as one of nearest, .*'cubic'"):
        backend(resample="cubic")
    for name, meant in {"image_means": "image_mean", "mean": "image_mean", "img_size": "size"}.items():
        with pytest.raises(ValueError, match=f"Unknown option '{name}'.*did you mean '{meant}'"):
            backend(**{name: 0.5})
    backend().save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "preprocessor_config.json").read_text())
    stored |= {"image_means": [0.1] * 3, "rescale_offset": True, "something": 1}  # of other libraries
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stored))
    assert backend.from_pretrained(tmp_path).image_mean == backend().image_mean
    with pytest.raises(ValueError, match="did you mean 'image_std'"):
        backend.from_pretrained(tmp_path, image_stds=[0.1] * 3)


def test_a_model_says_that_channels_come_first() -> None:
    with pytest.raises(
        ValueError, match=r"\[batch, 3, height, width\], got \[1, 32, 32, 3\]: the channels come first"
    ):
        tiny_model()(torch.zeros(1, 32, 32, 3))


def test_normalizing_leaves_its_input() -> None:
    levels = torch.full((1, 3, 2, 2), 7.5)
    normalize(levels, HFViTImageProcessor())
    assert levels.unique().tolist() == [7.5]


def test_dark_16_bit_files_among_photographs(tmp_path: Path) -> None:
    """Their batch is of floats, and the augmentation of training gets 8 bits."""
    Image.fromarray((255 * noise(9, 8, 3)).astype(np.uint8)).save(tmp_path / "photo.png")
    Image.fromarray((4000 * noise(9, 8)).astype(np.uint16)).save(tmp_path / "dark.png")
    files = [tmp_path / "photo.png", tmp_path / "dark.png"]
    images = EvaluationImages(dataset_of(files, [0, 1]), COLUMNS, HFViTImageProcessor(size=8))
    batch = collate([images[0], images[1]])["pixel_values"]
    assert batch.dtype == torch.float32
    alone = HFViTImageProcessor(size=8)(files, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(normalize(batch, images.processor), alone)
    training = TrainingImages(images.split, COLUMNS, images.processor, lambda pixels: pixels, seed=0)
    assert [training[index]["pixel_values"].dtype for index in (0, 1)] == [torch.uint8, torch.uint8]
