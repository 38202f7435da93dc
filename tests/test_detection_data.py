"""Boxes of objects: files of COCO, Pascal VOC and YOLO, columns, and augmentation."""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from hf_vit.data.augmentation import AUGMENTATIONS, WITH_BOXES, build_augmentation
from hf_vit.data.box_augmentation import visible
from hf_vit.data.boxes import draw_boxes
from hf_vit.data.labelled import ImageData, load_data
from hf_vit.evaluation.labels import objects_for_model
from hf_vit.model.image_geometry_hf_vit import corners_of

HEIGHT, WIDTH = 20, 40
NAMES = ["cell", "plate"]
Objects = list[tuple[str, list[float]]]  # name, and [x, y, width, height] in pixels
SCENES: list[Objects] = [
    [("cell", [4, 2, 8, 6]), ("plate", [20, 10, 12, 8])],
    [("plate", [0, 0, 40, 20])],
    [],
    [("cell", [30, 4, 10, 16])],
]


def scene(objects: Objects, size: tuple[int, int] = (WIDTH, HEIGHT)) -> PILImage.Image:
    image = PILImage.new("RGB", size, (60, 90, 120))
    for name, (x, y, width, height) in objects:
        image.paste(
            (220, 60, 60) if name == "cell" else (60, 220, 60), (int(x), int(y), int(x + width), int(y + height))
        )
    return image


def expected(objects: Objects) -> list[list[float]]:
    rows = [[NAMES.index(name), x + w / 2, y + h / 2, w, h] for name, (x, y, w, h) in objects]
    return [[index, x / WIDTH, y / HEIGHT, w / WIDTH, h / HEIGHT] for index, x, y, w, h in rows]


def coco(scenes: list[Objects], first: int = 0, **changes: Any) -> dict[str, Any]:
    """Return the content of a COCO file, whose category ids have gaps."""
    annotations = [
        {"image_id": image, "category_id": [17, 90][NAMES.index(name)], "bbox": box, "iscrowd": 0, "area": 1}
        for image, objects in enumerate(scenes)
        for name, box in objects
    ]
    return {
        "images": [
            {"id": image, "file_name": f"{image + first}.png", "width": WIDTH, "height": HEIGHT}
            for image in range(len(scenes))
        ],
        "annotations": [{"id": number, **each} for number, each in enumerate(annotations)],
        "categories": [{"id": 17, "name": "cell"}, {"id": 90, "name": "plate"}],
        **changes,
    }


def voc(objects: Objects, difficult: int = 0) -> str:
    texts = [
        f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{x}</xmin><ymin>{y}</ymin>"
        f"<xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>"
        for name, (x, y, w, h) in objects
    ]
    return f"<annotation><size><width>{WIDTH}</width><height>{HEIGHT}</height></size>{''.join(texts)}</annotation>"


def yolo(objects: Objects) -> str:
    return "\n".join(" ".join(map(str, [int(row[0]), *row[1:]])) for row in expected(objects))


def put(path: Path, content: str | bytes | PILImage.Image | dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, PILImage.Image):
        content.save(path)
    else:
        path.write_text(json.dumps(content) if isinstance(content, dict) else str(content))


# By name: where images lie, then the files of annotations as functions of the path of the data.
LAYOUTS: dict[str, tuple[str, str]] = {
    "coco": ("{split}2017/{name}.png", "annotations/instances_{split}2017.json"),
    "roboflow": ("{split}/{name}.png", "{split}/_annotations.coco.json"),
    "coco-images": ("images/{split}/{name}.png", "annotations/{split}.json"),
    "coco-beside": ("{name}.png", "annotations.json"),
    "voc": ("VOC2012/JPEGImages/{name}.png", "VOC2012/Annotations/{name}.xml"),
    "voc-beside": ("{split}/{name}.png", "{split}/{name}.xml"),
    "pets": ("images/{name}.png", "annotations/xmls/{name}.xml"),
    "yolo": ("images/{split}/{name}.png", "labels/{split}/{name}.txt"),
    "yolo-roboflow": ("{split}/images/{name}.png", "{split}/labels/{name}.txt"),
    "yolo-beside": ("{split}/{name}.png", "{split}/{name}.txt"),
}


def write(folder: Path, name: str) -> Path:
    """Write `SCENES` as a training split, and again as an evaluation split, in a layout."""
    image_path, label_path = LAYOUTS[name]
    has_splits = "{split}" in image_path
    for first, split in ((0, "train"), (4, "val")) if has_splits else ((0, "train"),):
        for number, objects in enumerate(SCENES, start=first):
            places = {"split": split, "name": str(number)}
            put(folder / image_path.format(**places), scene(objects))
            if label_path.endswith(".xml"):
                put(folder / label_path.format(**places), voc(objects))
            if label_path.endswith(".txt") and objects:  # without a file, an image has no objects
                put(folder / label_path.format(**places), yolo(objects))
        if label_path.endswith(".json"):
            put(folder / label_path.format(split=split), coco(SCENES, first))
    if label_path.endswith(".txt"):
        put(folder / "data.yaml", "train: ../train/images\nval: ../valid/images\nnc: 2\nnames: ['cell', 'plate']\n")
    return folder


def load(source: Any, **options: Any) -> ImageData:
    return load_data(source if isinstance(source, dict) else str(source), problem_type="object_detection", **options)


def assert_scenes(split: Any) -> None:
    assert len(split) == len(SCENES)
    for row, objects in zip(split, SCENES, strict=True):
        np.testing.assert_allclose(
            np.reshape(row["objects"], (-1, 5)), np.reshape(expected(objects), (-1, 5)), atol=1e-6
        )


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str, tmp_path: Path) -> None:
    data = load(write(tmp_path / name, name), holds_out=False)
    assert data.label_names == NAMES and data.problem_type == "object_detection"
    assert_scenes(data.train)
    if "{split}" in LAYOUTS[name][0]:
        assert data.eval_split == "validation"
        assert_scenes(data.evaluation)
    assert any("1 image has no boxes" in note or "2 images have no boxes" in note for note in data.notes)


def test_files_and_archives_are_sources(tmp_path: Path) -> None:
    folder = write(tmp_path / "coco", "coco")
    assert_scenes(load(folder / "annotations" / "instances_train2017.json", holds_out=False).train)
    yaml_file = write(tmp_path / "yolo", "yolo") / "data.yaml"
    assert_scenes(load(yaml_file).evaluation)
    with zipfile.ZipFile(tmp_path / "cells.zip", "w") as archive:
        for path in folder.rglob("*.*"):
            archive.write(path, path.relative_to(folder.parent))
    assert_scenes(load(tmp_path / "cells.zip").evaluation)


def test_lists_of_voc_divide_the_images(tmp_path: Path) -> None:
    folder = write(tmp_path, "voc")
    put(folder / "VOC2012" / "ImageSets" / "Main" / "train.txt", "0\n1\n")
    put(folder / "VOC2012" / "ImageSets" / "Main" / "val.txt", "3\n")
    put(folder / "VOC2012" / "ImageSets" / "Main" / "cell_val.txt", "2 -1\n")
    data = load(folder)
    assert (len(data.train), len(data.evaluation)) == (2, 1)
    assert "Skipped 1 image that no list in ImageSets/Main names." in data.notes


def test_crowds_and_difficult_objects_are_ignored(tmp_path: Path) -> None:
    content = coco(SCENES)
    content["annotations"][1]["iscrowd"] = 1
    content["annotations"][1]["segmentation"] = {"counts": [1], "size": [HEIGHT, WIDTH]}
    folder = write(tmp_path / "coco", "coco-beside")
    put(folder / "annotations.json", content)
    data = load(folder, holds_out=False)
    assert [row[0] for row in data.train[0]["objects"]] == [0, -3]
    assert any("1 box of crowds or difficult objects" in note for note in data.notes)
    assert objects_for_model([[[0.0, 1.0], [-3.0, 2.0]]], [5, 7]) == [[[5, 1.0], [-9, 2.0]]]
    assert objects_for_model([[[0.0, 1.0], [-3.0, 2.0]]], [-1, -1]) == [[]]
    folder = write(tmp_path / "voc", "voc-beside")
    put(folder / "train" / "0.xml", voc(SCENES[0], difficult=1))
    assert [row[0] for row in load(folder).train[0]["objects"]] == [-2, -3]


def test_roboflows_unused_category_and_missing_images(tmp_path: Path) -> None:
    folder = write(tmp_path, "roboflow")
    content = coco(SCENES)
    content["categories"] = [{"id": 0, "name": "blood", "supercategory": "none"}] + [
        {**each, "supercategory": "blood"} for each in content["categories"]
    ]
    put(folder / "train" / "_annotations.coco.json", content)
    (folder / "train" / "2.png").unlink()
    data = load(folder)
    assert data.label_names == NAMES and len(data.train) == 3
    assert any("Skipped 1 of the 4 images" in note for note in data.notes)
    for path in (folder / "train").glob("*.png"):
        path.unlink()
    with pytest.raises(ValueError, match=r"4 of the 4 images that _annotations.coco.json lists are not in"):
        load(folder)


def test_a_photo_that_lies_on_its_side(tmp_path: Path) -> None:
    """Annotations of the stored pixels follow the turn; of the upright image, they stay."""
    objects = SCENES[0]
    for orientation, transpose in ((6, PILImage.Transpose.ROTATE_90), (8, PILImage.Transpose.ROTATE_270)):
        exif = PILImage.Exif()
        exif[0x0112] = orientation
        stored = scene(objects).transpose(transpose)  # reading turns it back
        folder = tmp_path / str(orientation)
        folder.mkdir()
        stored.save(folder / "0.png", exif=exif)
        corners = []
        for name, (x, y, w, h) in objects:
            flat = np.zeros((HEIGHT, WIDTH))
            flat[int(y) : int(y + h), int(x) : int(x + w)] = 1
            rows, columns = np.array(PILImage.fromarray(flat).transpose(transpose)).nonzero()
            box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
            corners.append((name, [float(value) for value in box]))
        content = coco([corners])
        content["images"][0] |= {"width": HEIGHT, "height": WIDTH}
        put(folder / "annotations.json", content)
        data = load(folder, holds_out=False)
        np.testing.assert_allclose(data.train[0]["objects"], expected(objects), atol=1e-6)
        assert any("EXIF" in note for note in data.notes)
        put(folder / "annotations.json", coco([objects]))
        np.testing.assert_allclose(load(folder, holds_out=False).train[0]["objects"], expected(objects), atol=1e-6)


def test_boxes_that_do_not_fit(tmp_path: Path) -> None:
    boxes = [[-4, 2, 8, 6], [36, 10, 12, 8], [5, 5, 0, 3], [5, 5, -2, 3], [50, 50, 4, 4], []]
    folder = write(tmp_path, "coco-beside")
    scenes: list[Objects] = [[("cell", box) for box in boxes], SCENES[0] * 6, [], []]
    put(folder / "annotations.json", coco(scenes))
    data = load(folder, holds_out=False)
    assert data.train[0]["objects"] == pytest.approx(np.array([[0, 0.05, 0.25, 0.1, 0.3], [0, 0.95, 0.7, 0.1, 0.4]]))
    assert data.notes == [
        f"Skipped 4 boxes without an area in the image, or without four numbers: in {tmp_path.name}/0.png.",
        "2 boxes reach beyond their images, and are clipped to them.",
        "2 images have no boxes: they are all background.",
        "1 class has a single training image: plate.",
    ]


def column(boxes: list[list[list[float]]], categories: Any, kind: Any) -> Dataset:
    objects = [{"bbox": own, "category": classes} for own, classes in zip(boxes, categories, strict=True)]
    features = Features(
        {"image": Image(), "objects": {"bbox": List(List(Value("float32"), length=4)), "category": List(kind)}}
    )
    return Dataset.from_dict({"image": [scene(each) for each in SCENES], "objects": objects}, features=features)


BOXES = [[box for _, box in objects] for objects in SCENES]
CLASSES = [[name for name, _ in objects] for objects in SCENES]


def test_columns_of_structures_and_of_lists() -> None:
    named = column(BOXES, [[NAMES.index(name) for name in own] for own in CLASSES], ClassLabel(names=NAMES))
    assert_scenes(load({"train": named}, holds_out=False).train)
    texts = column(BOXES, CLASSES, Value("string"))
    assert_scenes(load({"train": texts}, holds_out=False).train)
    numbers = column(BOXES, [[7 + NAMES.index(name) for name in own] for own in CLASSES], Value("int64"))
    data = load({"train": numbers}, holds_out=False)
    assert data.label_names == ["7", "8"]
    assert_scenes(data.train)
    flat = Dataset.from_dict({"image": [scene(each) for each in SCENES], "bboxes": BOXES, "labels": CLASSES})
    assert_scenes(load({"train": flat.cast_column("image", Image())}, holds_out=False).train)
    one = Dataset.from_dict({"image": [scene(each) for each in SCENES], "boxes": BOXES}).cast_column("image", Image())
    assert load({"train": one}, holds_out=False).label_names == ["object"]
    with pytest.raises(ValueError, match="Found images without boxes in data: expected a column objects"):
        load({"train": one.remove_columns("boxes")})
    with pytest.raises(ValueError, match=r"data has boxes of objects in 'objects': set the task to detection"):
        load_data({"train": texts})
    with pytest.raises(ValueError, match="Row 0 of 'objects' has 2 boxes and 1 class"):
        load({"train": column(BOXES, [["cell"]] * 4, Value("string"))})


def test_metadata_of_an_image_folder(tmp_path: Path) -> None:
    rows = []
    for number, objects in enumerate(SCENES):
        put(tmp_path / "train" / f"{number}.png", scene(objects))
        rows.append({"file_name": f"{number}.png", "objects": {"bbox": BOXES[number], "categories": CLASSES[number]}})
    put(tmp_path / "train" / "metadata.jsonl", "\n".join(map(json.dumps, rows)))
    assert_scenes(load(tmp_path, holds_out=False).train)


def test_formats_of_boxes() -> None:
    corners = [[[x, y, x + w, y + h] for x, y, w, h in own] for own in BOXES]
    data = load({"train": column(corners, CLASSES, Value("string"))}, holds_out=False)
    assert_scenes(data.train)
    assert "box_format: voc" in data.notes[0]
    centres = [[row[1:] for row in expected(objects)] for objects in SCENES]
    shares = column(centres, CLASSES, Value("string"))
    assert_scenes(load({"train": shares}, holds_out=False, box_format="yolo").train)
    assert_scenes(load({"train": shares}, holds_out=False).train)
    far = column([[[100 + value for value in box] for box in own] for own in BOXES], CLASSES, Value("string"))
    with pytest.raises(
        ValueError, match=r"100% of them do not fit .* such as \[104, 102, 108, 106\] in image 0 of 20x40"
    ):
        load({"train": far})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("0 0.5 0.5 0.1", "Line 1 of .*0.txt is not an object of YOLO: expected a class index and centre x"),
        ("0 5 5 10 10", "its values are in pixels"),
        ("2 0.5 0.5 0.1 0.1", r"has the class 2, but 2 classes are named \(cell, plate\)"),
        ("cell 0.5 0.5 0.1 0.1", "is not an object of YOLO"),
    ],
)
def test_lines_that_are_no_objects(change: str, message: str, tmp_path: Path) -> None:
    folder = write(tmp_path, "yolo")
    put(folder / "labels" / "train" / "0.txt", change)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_polygons_become_boxes(tmp_path: Path) -> None:
    folder = write(tmp_path, "yolo")
    put(folder / "labels" / "train" / "0.txt", "0 0.1 0.1 0.3 0.1 0.3 0.4 0.2 0.4")
    data = load(folder)
    assert data.train[0]["objects"] == pytest.approx(np.array([[0, 0.2, 0.25, 0.2, 0.3]]), abs=1e-6)
    assert "1 polygon is read as the box around it." in data.notes


def test_what_is_not_understood_is_said(tmp_path: Path) -> None:
    put(tmp_path / "images" / "a.png", scene([]))
    with pytest.raises(ValueError, match=r"Found no boxes in .*: expected COCO JSON .* Found 1 image\."):
        load(tmp_path)
    put(tmp_path / "images" / "a.xml", "<annotation><object><name>cell</name></object></annotation>")
    with pytest.raises(
        ValueError, match=r"a.xml is not an annotation of Pascal VOC .an object without bndbox.: expected"
    ):
        load(tmp_path)


# ----------------------------------------------------------------------------------------------------- augmentation


@pytest.mark.parametrize("name", ["none", "crop_flip"])
def test_augmentation_moves_boxes_with_pixels(name: str) -> None:
    """The box of a bright rectangle is where its pixels are, as far as it is visible."""
    pixels = torch.zeros(1, 120, 200, dtype=torch.uint8)
    pixels[:, 30:70, 60:140] = 200
    objects = torch.tensor([[1, 100 / 200, 50 / 120, 80 / 200, 40 / 120]])
    augment = build_augmentation(name, (48, 80), 0.3, fill=(0.0,), num_channels=1, has_boxes=True)
    kept = 0
    for seed in range(30):
        torch.manual_seed(seed)
        image, moved = augment((pixels, objects))
        assert image.shape == (1, 48, 80) and image.dtype == torch.uint8
        rows, columns = (image[0].float() / image.max() > 0.5).nonzero(as_tuple=True)
        if len(moved):
            left, top, right, bottom = (corners_of(moved[:, 1:])[0] * torch.tensor([80, 48, 80, 48])).tolist()
            found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert [left, top, right, bottom] == pytest.approx([float(value) for value in found], abs=1.2)
            kept += 1
    assert kept > 15


def test_boxes_of_which_little_remains_are_removed() -> None:
    objects = torch.tensor([[0, 0.5, 0.5, 0.2, 0.2]] + [[1, 0.02 + 0.01 * i, 0.5, 0.04, 0.9] for i in range(3)])
    augment = build_augmentation("crop_flip", (32, 32), 0.1, has_boxes=True)
    torch.manual_seed(0)
    for _ in range(50):
        _, moved = augment((torch.zeros(3, 64, 64, dtype=torch.uint8), objects))
        corners = corners_of(moved[:, 1:])
        assert (moved[:, 3:] > 0).all() and ((corners > -1e-6) & (corners < 1 + 1e-6)).all()
    corners = torch.tensor([[0.7, 0, 1.7, 1], [0.71, 0, 1.71, 1]])  # 30 % and 29 % are in the image
    assert visible(torch.tensor([3.0, 4.0]), corners)[:, 0].tolist() == [3]


def test_augmentations_without_boxes_are_refused() -> None:
    for name in set(AUGMENTATIONS) - set(WITH_BOXES):
        with pytest.raises(ValueError, match="does not move boxes with images"):
            build_augmentation(name, (8, 8), 0.3, has_boxes=True)


def test_boxes_are_drawn_in_the_colours_of_their_classes() -> None:
    drawn = np.array(draw_boxes(np.zeros((40, 60, 3), np.uint8), [[10, 12, 50, 30]], [1], ["cell"], 2))
    assert drawn[30, 20].any() and drawn[20, 50].any() and not drawn[20, 30].any() and not drawn[36, 5].any()
