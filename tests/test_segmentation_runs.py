"""Semantic segmentation from images and masks: the data, training, evaluation and prediction."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, List, load_from_disk
from PIL import Image as PILImage
from tiny_run import RECIPE, assert_same_weights, stop_at, tiny_recipe, weights
from torch import nn

from hf_vit import HFViTConfig, HFViTForImageClassification, HFViTForSemanticSegmentation
from hf_vit.checkpoints.models import load
from hf_vit.data.augmentation import AUGMENTATIONS, WITH_MASKS, build_augmentation
from hf_vit.data.labelled import load_data
from hf_vit.data.masks import MaskCode, palette
from hf_vit.evaluation.evaluate import evaluate_checkpoint
from hf_vit.evaluation.report import report_lines
from hf_vit.evaluation.results import MaskResults
from hf_vit.graphs.export import export_graph
from hf_vit.graphs.kinds import KINDS
from hf_vit.inference.windows import sliding_window_logits
from hf_vit.model.image_geometry_hf_vit import resize_logits
from hf_vit.prediction.predictor import classes_of_pixels
from hf_vit.system.stopping import Interrupted
from hf_vit.training.loop import train
from hf_vit.training.report import train_and_report

NAMES = ["sky", "field", "house"]
COLORS = np.array([[40, 60, 200], [40, 180, 60], [200, 50, 40]], dtype=np.uint8)
ALL_VALUES = PILImage.fromarray(np.arange(20 * 28, dtype=np.int64).astype(np.uint8).reshape(20, 28))


def scene(seed: int, height: int = 20, width: int = 28) -> tuple[PILImage.Image, PILImage.Image]:
    """Return an image of a house on a field, and its mask; a few pixels are ignored."""
    random = np.random.default_rng(seed)
    classes = np.zeros((height, width), dtype=np.uint8)
    horizon, left = random.integers(6, height - 6), random.integers(0, width - 8)
    classes[horizon:] = 1
    classes[horizon - 5 : horizon + 3, left : left + 8] = 2
    pixels = COLORS[classes].astype(int) + random.normal(0, 10, (height, width, 1)).astype(int)
    classes[0, :3] = 255
    return PILImage.fromarray(pixels.clip(0, 255).astype(np.uint8)), PILImage.fromarray(classes)


def scenes(number: int, first: int = 0) -> Dataset:
    images, masks = zip(*map(scene, range(first, first + number)), strict=True)
    features = Features({"image": Image(), "mask": Image(), "classes": List(ClassLabel(names=NAMES))})
    return Dataset.from_dict(
        {"image": list(images), "mask": list(masks), "classes": [[0, 1, 2]] * number}, features=features
    )


def write(folder: Path, pairs: dict[str, str], number: int = 4) -> Path:
    """Write images and masks by the formats of their paths, given `{name}`."""
    for index in range(number):
        image, mask = scene(index)
        for (image_path, mask_path), stem in zip(pairs.items(), (f"a{index}", f"b{index}"), strict=False):
            for picture, path in ((image, image_path), (mask, mask_path)):
                target = folder / path.format(name=stem)
                target.parent.mkdir(parents=True, exist_ok=True)
                picture.save(target)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    scenes(24).to_parquet(str(folder / "train.parquet"))
    scenes(8, 100).to_parquet(str(folder / "test.parquet"))
    return folder


@pytest.fixture(scope="module")
def trained(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("run") / "scenes-vit"
    config = recipe(photos, folder, epochs=12, learning_rate=1e-2, best_metric="mean_iou")
    return train_and_report(config, "hf-vit train scenes/", lambda line: None)


def recipe(photos: Path, folder: Path, **fields: Any) -> Any:
    architecture = {**RECIPE["model_config"], "patch_subdivision": 2, "pooling": "mean"}
    options = {"image_size": [16, 24], "batch_size": 8, "task": "segmentation", "model_config": architecture}
    return tiny_recipe(photos, folder, **{**options, **fields})


# ----------------------------------------------------------------------------------------------------------- data


LAYOUTS: dict[str, dict[str, str]] = {
    "images-masks": {"images/{name}.jpg": "masks/{name}.png"},
    "splits-above": {
        "train/images/{name}.png": "train/masks/{name}.png",
        "val/images/{name}.png": "val/masks/{name}.png",
    },
    "ade20k": {
        "images/training/{name}.jpg": "annotations/training/{name}.png",
        "images/validation/{name}.jpg": "annotations/validation/{name}.png",
    },
    "camvid": {"train/{name}.png": "trainannot/{name}.png", "val/{name}.png": "valannot/{name}.png"},
    "carvana": {"train/{name}.jpg": "train_masks/{name}_mask.png"},
    "voc": {"VOC/JPEGImages/{name}.jpg": "VOC/SegmentationClass/{name}.png"},
    "beside": {"{name}.jpg": "{name}_mask.png"},
    "same-stem": {"all/{name}.jpg": "all/{name}.png"},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_folders_are_paired(name: str, tmp_path: Path) -> None:
    data = load_data(str(write(tmp_path / name, LAYOUTS[name])), problem_type="semantic_segmentation")
    has_splits = len(LAYOUTS[name]) == 2
    assert (data.train_length, data.eval_split) == ((4, "validation") if has_splits else (3, "held out"))
    for row in data.train:
        image, mask = (Path(row[column]["path"]) for column in data.columns)
        assert image != mask and mask.stem.startswith(image.stem) and mask.suffix == ".png"
    assert data.label_names == ["0", "1", "2"]


def test_names_come_from_features_and_files(photos: Path, tmp_path: Path) -> None:
    assert load_data(str(photos), problem_type="semantic_segmentation").label_names == NAMES
    folder = write(tmp_path, LAYOUTS["images-masks"])
    (folder / "classes.txt").write_text("\n".join(NAMES))
    assert load_data(str(folder), problem_type="semantic_segmentation").label_names == NAMES
    (folder / "classes.txt").write_text("sky\nhouse")  # as in ADE20K, 0 is then not a class
    data = load_data(str(folder), problem_type="semantic_segmentation")
    assert data.masks is not None and data.masks.table[:3].tolist() == [255, 0, 1]
    assert "0 is ignored" in data.notes[0]
    (folder / "classes.txt").unlink()
    (folder / "id2label.json").write_text(json.dumps({"0": "sky", "2": "house"}))
    with pytest.raises(ValueError, match=r"1 value without a name \(1\)"):
        load_data(str(folder), problem_type="semantic_segmentation")


def test_values_that_are_no_indices(tmp_path: Path) -> None:
    folder = write(tmp_path, LAYOUTS["images-masks"])
    for path in (folder / "masks").iterdir():
        classes = np.array(PILImage.open(path))
        PILImage.fromarray(np.where(classes == 2, 255, 0).astype(np.uint8)).save(path)
    data = load_data(str(folder), problem_type="semantic_segmentation")
    assert data.label_names == ["background", "foreground"] and data.masks is not None
    assert data.masks.table[[0, 255]].tolist() == [0, 1]
    for path in (folder / "masks").iterdir():
        PILImage.fromarray(np.array(PILImage.open(path)) // 2).save(path)
    with pytest.raises(ValueError, match=r"2 values up to 127 \(0, 127\): name the values"):
        load_data(str(folder), problem_type="semantic_segmentation")
    (folder / "id2label.json").write_text(json.dumps({"0": "rest", "127": "house"}))
    assert load_data(str(folder), problem_type="semantic_segmentation").label_names == ["rest", "house"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda masks: [path.unlink() for path in masks], "found 4 images .* and no masks"),
        (lambda masks: PILImage.new("L", (9, 30)).save(masks[0]), "got a mask of 30x9 for images/a0.jpg .*20x28"),
        (lambda masks: ALL_VALUES.save(masks[0]), "JPEG files do not keep exact values"),
    ],
)
def test_masks_that_do_not_fit_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    folder = write(tmp_path, LAYOUTS["images-masks"])
    change(sorted((folder / "masks").iterdir()))
    with pytest.raises(ValueError, match=message):
        load_data(str(folder), problem_type="semantic_segmentation")


def test_colours_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, LAYOUTS["images-masks"])
    scene(0)[0].save(folder / "masks" / "a0.png")
    with pytest.raises(ValueError, match="convert the colours to class indices"):
        load_data(str(folder), problem_type="semantic_segmentation")


def test_unpaired_files_are_counted(tmp_path: Path) -> None:
    folder = write(tmp_path, LAYOUTS["images-masks"])
    (folder / "masks" / "a0.png").rename(folder / "masks" / "other.png")
    data = load_data(str(folder), problem_type="semantic_segmentation")
    assert data.notes == [
        "Skipped 1 image without a mask: a0.jpg.",
        "Skipped 1 mask without an image: other.png.",
    ]


def test_classes_of_another_model(photos: Path) -> None:
    code = MaskCode.of([0, 7, 9]).mapped([2, -1, 0])
    assert code.classes(torch.tensor([[0, 7, 9, 255]]), "a").tolist() == [[2, 255, 0, 255]]
    with pytest.raises(ValueError, match="The mask of a has 1 value that no class has"):
        code.classes(torch.tensor([[1]]), "a")


@pytest.mark.parametrize("name", WITH_MASKS)
def test_augmentation_moves_the_mask_with_the_image(name: str) -> None:
    """The image is its own mask: classes of large areas are the same after augmentation."""
    classes = torch.zeros(1, 40, 60, dtype=torch.uint8)
    classes[:, 10:30, 20:40] = 100  # solarization in `three` does not change it
    augment = build_augmentation(name, (24, 36), 0.3, fill=(0.0,), num_channels=1, has_masks=True)
    agreed = []
    for seed in range(20):
        torch.manual_seed(seed)
        image, mask = augment(torch.cat([classes, classes]))
        assert set(mask.unique().tolist()) <= {0, 100, 255} and image.shape == (24, 36)
        agreed.append(float(((image > 50) == (mask == 100))[mask != 255].float().mean()))
    assert min(agreed) > 0.9, agreed  # edges are interpolated


def test_augmentations_of_colours_alone_are_refused() -> None:
    for name in set(AUGMENTATIONS) - set(WITH_MASKS):
        with pytest.raises(ValueError, match="does not move masks with images"):
            build_augmentation(name, (8, 8), 0.3, has_masks=True)


# -------------------------------------------------------------------------------------------------- runs and results


def test_mean_iou_is_that_of_the_definition() -> None:
    labels, predicted = torch.randint(4, (2, 3, 50)), torch.randint(3, (3, 50))
    labels = labels[0].where(labels[0] != 3, 0)
    counts = [torch.stack([torch.bincount(row, minlength=4) for row in each]) for each in (labels, predicted)]
    hits = torch.stack([torch.bincount(a[a == b], minlength=4) for a, b in zip(labels, predicted, strict=True)])
    metrics = MaskResults(*counts, hits, torch.ones(3)).metrics()
    ious = [((labels == c) & (predicted == c)).sum() / ((labels == c) | (predicted == c)).sum() for c in range(3)]
    assert metrics["mean_iou"] == pytest.approx(float(sum(ious)) / 3)  # class 3 does not occur
    assert metrics["pixel_accuracy"] == pytest.approx(float((labels == predicted).float().mean()))


def test_a_run_learns_and_reports(trained: Any, photos: Path) -> None:
    assert trained.metrics["eval_mean_iou"] > 0.6, trained.metrics
    card = (trained.output_dir / "README.md").read_text()
    assert "pipeline_tag: image-segmentation" in card and "| house |" in card and "![predictions.png]" in card
    assert "AutoModelForSemanticSegmentation" in card
    measured = evaluate_checkpoint(str(trained.output_dir), str(photos))
    assert measured is not None
    for name in ("mean_iou", "pixel_accuracy", "loss"):
        assert measured["figures"][name] == pytest.approx(trained.metrics[f"eval_{name}"], abs=2e-3)
    lines = report_lines(measured)
    assert lines[1].split() == ["mean", "IoU", f"{measured['figures']['mean_iou']:.2%}"]
    assert max(map(len, lines)) <= 80


def test_masks_are_predicted_at_the_size_of_the_images(trained: Any, tmp_path: Path) -> None:
    import hf_vit
    from hf_vit.data.sources import Sources
    from hf_vit.prediction.masks import predict_masks
    from hf_vit.prediction.shards import Settings

    (tmp_path / "images").mkdir()
    image, mask = scene(200, 40, 56)
    image.save(tmp_path / "images" / "house.jpg")
    (tmp_path / "images" / "broken.jpg").write_bytes(b"no image")
    settings = Settings(str(trained.output_dir), precision="fp32")
    summary = predict_masks(tmp_path / "masks", Sources([str(tmp_path / "images")]), settings)
    assert (summary.images, [Path(name).name for name in summary.broken]) == (2, ["broken.jpg"])
    written = PILImage.open(tmp_path / "masks" / "house.png")
    assert written.mode == "P" and written.size == (56, 40)
    assert (np.array(written) == np.array(mask)).mean() > 0.7
    assert json.loads((tmp_path / "masks" / "id2label.json").read_text()) == {"0": "sky", "1": "field", "2": "house"}
    with pytest.raises(ValueError, match="add --restart"):
        predict_masks(tmp_path / "masks", Sources([str(tmp_path / "images")]), settings)
    [prediction] = hf_vit.TrainedModel(trained.output_dir).predict([tmp_path / "images" / "house.jpg"])
    np.testing.assert_array_equal(prediction.mask, np.array(written))
    assert sum(prediction.scores) == pytest.approx(1)


@pytest.mark.parametrize("cache", ["none", "ram"])
def test_resumed_is_equal_to_uninterrupted(
    cache: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"augmentation": "crop_flip", "cache": cache, "accumulation_steps": 2}
    whole = train(recipe(photos, tmp_path / "whole", **options))
    with pytest.raises(Interrupted), monkeypatch.context() as patch:
        stop_at(4, patch)
        train(recipe(photos, tmp_path / "parts", **options))
    parts = train(recipe(photos, tmp_path / "parts", **options))
    assert_same_weights(weights(parts.model), weights(whole.model))
    assert (tmp_path / "parts" / "log.jsonl").read_bytes() == (tmp_path / "whole" / "log.jsonl").read_bytes()


def test_fine_tuning_keeps_a_head_for_the_same_classes_only(trained: Any, photos: Path, tmp_path: Path) -> None:
    from hf_vit.checkpoints.models import load_classifier, load_segmenter

    model, _ = load(str(trained.output_dir))
    same, _ = load_segmenter(str(trained.output_dir), NAMES)
    assert_same_weights(weights(model), weights(same))
    other, _ = load_segmenter(str(trained.output_dir), ["sky", "house", "field"])
    assert not torch.equal(other.decode_head.classifier.weight, model.decode_head.classifier.weight)
    assert other.config.id2label[1] == "house"
    classifier, _ = load_classifier(str(trained.output_dir), ["a", "b"])
    classifier.save_pretrained(tmp_path / "classifier")
    assert load_segmenter(tmp_path / "classifier", NAMES)[0].config.problem_type is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mixup": 0.2}, "does not mix images or weigh classes: remove mixup=0.2"),
        ({"loss": "binary_cross_entropy"}, "remove loss=binary_cross_entropy"),
        ({"augmentation": "rand"}, "augmentation=rand does not move masks"),
        ({"streaming": True}, "Masks cannot be streamed"),
        ({"label_column": "other"}, "Unknown column of images 'other': choose one of image, mask"),
    ],
)
def test_what_segmentation_cannot_do_is_refused(
    fields: dict[str, Any], message: str, photos: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        train(recipe(photos, tmp_path, **fields))


def test_saved_data_sets_and_other_columns(tmp_path: Path) -> None:
    renamed = scenes(6).rename_columns({"image": "pixel_values", "mask": "label"})
    renamed.save_to_disk(str(tmp_path / "saved"))
    data = load_data(str(tmp_path / "saved"), problem_type="semantic_segmentation")
    assert data.columns == ("pixel_values", "label") and data.label_names == NAMES
    without = load_from_disk(str(tmp_path / "saved")).remove_columns("label")
    with pytest.raises(ValueError, match="Found images without masks"):
        load_data(without, problem_type="semantic_segmentation")


# ------------------------------------------------------------------------------------------------- sliding windows


def windows_by_hand(model: Any, pixels: torch.Tensor, window: tuple[int, int], stride: tuple[int, int]) -> np.ndarray:
    """Return the mean logits of windows as mmsegmentation places them: a grid whose last row and column end inside."""
    (height, width), config = pixels.shape[-2:], model.config
    cell = [side // config.patch_subdivision for side in config.patch_shape]
    total = np.zeros((config.num_labels, height // cell[0], width // cell[1]))
    visits = np.zeros(total.shape[1:])
    for row in range(max(height - window[0] + stride[0] - 1, 0) // stride[0] + 1):
        for column in range(max(width - window[1] + stride[1] - 1, 0) // stride[1] + 1):
            bottom, right = min(row * stride[0] + window[0], height), min(column * stride[1] + window[1], width)
            top, left = max(bottom - window[0], 0), max(right - window[1], 0)
            with torch.no_grad():
                logits = model(pixel_values=pixels[..., top:bottom, left:right]).logits[0].numpy()
            part = np.s_[top // cell[0] : bottom // cell[0], left // cell[1] : right // cell[1]]
            total[:, *part] += logits
            visits[part] += 1
    return total / visits


@pytest.mark.parametrize("size", [(40, 56), (16, 64), (8, 24)])  # larger than windows, as high, and smaller
def test_logits_of_windows_are_averaged(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = HFViTForSemanticSegmentation(
        HFViTConfig(**RECIPE["model_config"], num_labels=3, image_size=(16, 24))
    ).eval()
    nn.init.normal_(model.decode_head.classifier.weight)
    pixels = torch.randn(1, 3, *size)
    patch = model.config.patch_shape
    with torch.no_grad():
        logits = sliding_window_logits(model, pixels, (16, 24), (8, 16), patch)
    np.testing.assert_allclose(logits[0].numpy(), windows_by_hand(model, pixels, (16, 24), (8, 16)), atol=1e-5)
    with pytest.raises(ValueError, match="stride sizes in multiples of the patch"):
        sliding_window_logits(model, pixels, (16, 24), (8, 3), patch)
    with pytest.raises(ValueError, match=r"stride of at most the window \(16, 24\)"):
        sliding_window_logits(model, pixels, (16, 24), (24, 24), patch)


def test_large_images_are_predicted_and_evaluated_in_windows(trained: Any, tmp_path: Path) -> None:
    """Images keep their sizes; those that are not whole patches are enlarged to them."""
    from hf_vit.prediction.shards import Settings

    sizes = [(40, 60), (33, 50), (14, 18)]
    for index, size in enumerate(sizes):
        for folder, picture in zip(("images", "masks"), scene(200 + index, *size), strict=True):
            (tmp_path / folder).mkdir(exist_ok=True)
            picture.save(tmp_path / folder / f"{index}.png")
    files = [tmp_path / "images" / f"{index}.png" for index in range(len(sizes))]
    predictions = list(Settings(str(trained.output_dir), "fp32", has_windows=True).predictor()(files))
    assert [prediction.mask.shape for prediction in predictions] == sizes
    model, processor = load(str(trained.output_dir))
    pixels = processor(PILImage.open(files[0]), do_resize=False, return_tensors="pt")["pixel_values"]
    logits = windows_by_hand(model, pixels, (16, 24), (8, 16))
    expected = resize_logits(torch.tensor(logits)[None], sizes[0])[0].argmax(dim=0)
    np.testing.assert_array_equal(predictions[0].mask, expected.numpy())

    measured = evaluate_checkpoint(str(trained.output_dir), str(tmp_path), windows=True, precision="fp32")
    assert measured is not None and measured["images"] == 3
    masks = [np.array(PILImage.open(tmp_path / "masks" / f"{index}.png")) for index in range(len(sizes))]
    hits = sum(((each.mask == mask) & (mask != 255)).sum() for each, mask in zip(predictions, masks, strict=True))
    assert measured["figures"]["pixel_accuracy"] == pytest.approx(hits / sum((mask != 255).sum() for mask in masks))
    lines = report_lines(measured)
    assert "3 images of their own sizes" in lines[0] and ["windows", "16x24", "pixels"] in [
        line.split() for line in lines
    ]
    resized = evaluate_checkpoint(str(trained.output_dir), str(tmp_path), windows=True, image_size=(32, 48))
    assert resized is not None and "3 images of 32x48 pixels" in report_lines(resized)[0]


def test_windows_are_for_segmentation(tmp_path: Path) -> None:
    from hf_vit.prediction.shards import Settings

    config = HFViTConfig(**RECIPE["model_config"], image_size=16, num_labels=3)
    HFViTForImageClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="got HFViTForImageClassification: remove --windows"):
        Settings(str(tmp_path), has_windows=True).load()


def test_classes_are_those_of_the_largest_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(7, 5, 6)
    expected = resize_logits(logits[None], (20, 31))[0].argmax(dim=0)
    monkeypatch.setattr("hf_vit.prediction.predictor.MOST_VALUES", 2 * 20 * 31)  # two classes at a time
    assert torch.equal(classes_of_pixels(logits, (20, 31)).long(), expected)


# ------------------------------------------------------------------------------------- graphs, the demo, the figures


@pytest.mark.parametrize("kind", ["onnx", pytest.param("torch-export", marks=pytest.mark.slow)])
def test_a_graph_gives_the_masks_of_torch(kind: str, trained: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    path = tmp_path / f"model{KINDS[kind].suffix}"
    lines = export_graph(trained.output_dir, path, kind, "weights" if kind == "onnx" else None)
    assert "output: logits [batch, 3, rows, columns]" in lines[0] and "2x2 logits per class" in lines[0]
    model, processor = load(str(trained.output_dir))
    image = scene(200, 40, 56)[0]
    for size in [(16, 24), (40, 56)]:
        processor.set_output_size(size)
        pixel_values = processor(image, return_tensors="pt")["pixel_values"]
        logits = torch.from_numpy(KINDS[kind].read(path)(pixel_values.numpy()))
        with torch.no_grad():
            expected = processor.post_process_semantic_segmentation(model(pixel_values), [(40, 56)])[0]
        assert (resize_logits(logits, (40, 56))[0].argmax(dim=0) == expected).float().mean() > 0.98
    if kind == "onnx":
        import onnx

        [output] = onnx.load(path).graph.output
        sides = output.type.tensor_type.shape.dim
        assert [side.dim_param or side.dim_value for side in sides] == ["batch", 3, "rows", "columns"]
        assert "int8 weights: logits differ" in lines[-1]


def test_the_demo_shows_masks_with_a_legend(trained: Any, tmp_path: Path) -> None:
    from hf_vit.demo.exhibit import Exhibit, File
    from hf_vit.demo.markup import cards

    image = scene(200)[0].resize((56, 40))
    image.save(tmp_path / "house.png")
    exhibit, file = Exhibit(str(trained.output_dir)), File(tmp_path / "house.png", "house.png")
    answer = exhibit.answer(file)
    assert set(answer.prediction.labels) == set(NAMES)
    legend = cards(["house"], [exhibit], [answer])
    shown = exhibit.overlay(file)
    assert shown.shape == (40, 56, 3)
    house = answer.prediction.mask == NAMES.index("house")
    color = 0.6 * palette(3)[NAMES.index("house")] + 0.4 * np.array(image)[house]
    np.testing.assert_allclose(shown[house], color, atol=1)
    assert all(f"background: {color}" in legend for color in exhibit.colors.values())
