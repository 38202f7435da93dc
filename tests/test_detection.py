"""Object detection: the model, its loss, the image processor's boxes, and the pipeline."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from isolated import python
from PIL import Image
from torchvision.ops import batched_nms, box_convert, generalized_box_iou_loss
from transformers import AutoModelForObjectDetection, Trainer, TrainingArguments, pipeline
from transformers.models.detr.image_processing_detr import DetrImageProcessor

from hf_vit import (
    HFViTConfig,
    HFViTForImageClassification,
    HFViTForObjectDetection,
    HFViTForSemanticSegmentation,
    HFViTImageProcessor,
    HFViTImageProcessorPil,
)
from hf_vit.checkpoints.models import load_detector
from hf_vit.model.detection_boxes_hf_vit import MOST_OVERLAP, are_duplicates, most_likely_objects
from hf_vit.model.detection_hf_vit import boxes_at_points, generalized_iou, losses_by_name, object_losses, padded_boxes

PROCESSORS = [HFViTImageProcessor, HFViTImageProcessorPil]
LABELS = [
    {"class_labels": torch.tensor([1, 4]), "boxes": torch.tensor([[0.5, 0.25, 0.25, 0.25], [0.2, 0.7, 0.3, 0.4]])},
    {"class_labels": torch.empty(0, dtype=torch.long), "boxes": torch.empty(0, 4)},
]


@pytest.fixture
def model(tiny_config: Callable[..., HFViTConfig]) -> HFViTForObjectDetection:
    return HFViTForObjectDetection(tiny_config(patch_subdivision=2)).eval()


def test_every_point_of_a_map_of_any_size_is_a_query(model: HFViTForObjectDetection) -> None:
    for height, width in ((32, 48), (56, 16)):
        outputs = model(torch.rand(2, 3, height, width))
        queries = height // 4 * (width // 4)
        assert outputs.logits.shape == (2, queries, 5) and outputs.pred_boxes.shape == (2, queries, 4)


def test_boxes_reach_from_their_points_by_distances_in_patches() -> None:
    distances = torch.zeros(1, 4, 4, 6)  # of an image of 2x3 patches
    distances[0, :, 1, 2] = torch.tensor([1.0, 0.5, 2.0, 0.25])  # left, top, right, bottom
    box = box_convert(boxes_at_points(distances, (2, 3))[0, 1 * 6 + 2], "cxcywh", "xyxy")
    torch.testing.assert_close(box, torch.tensor([2.5 / 6 - 1 / 3, 1.5 / 4 - 0.25, 2.5 / 6 + 2 / 3, 1.5 / 4 + 0.125]))


def test_generalized_iou_is_that_of_torchvision() -> None:
    first, second = torch.rand(2, 50, 4) + 0.01
    expected = generalized_box_iou_loss(*(box_convert(each, "cxcywh", "xyxy") for each in (first, second)))
    torch.testing.assert_close(1 - generalized_iou(first, second), expected)


def test_the_loss_is_least_where_the_objects_are() -> None:
    """A heatmap with peaks at the centres and boxes that are right has almost no loss; an image without any has."""
    heatmap = torch.full((2, 5, 8, 12), -20.0)
    heatmap[0, 1, 2, 6] = heatmap[0, 4, 5, 2] = 20  # rows 0.25 * 8 and 0.7 * 8, columns 0.5 * 12 and 0.2 * 12
    boxes = torch.rand(2, 96, 4)
    near_second = torch.arange(96) // 12 > 3
    boxes[0] = torch.where(near_second[:, None], LABELS[0]["boxes"][1], LABELS[0]["boxes"][0])
    right = losses_by_name(heatmap, boxes, LABELS)
    assert right["heatmap"].max() < 1e-6 and right["boxes"][0] < 0.05 and right["boxes"][1] == 0
    moved = losses_by_name(heatmap.roll(2, dims=3), boxes.roll(2, dims=1), LABELS)
    assert moved["heatmap"][0] > 5 and moved["heatmap"][1] < 1e-6
    scaled = losses_by_name(heatmap, boxes * torch.tensor([1, 1, 2, 2]), LABELS)
    assert scaled["boxes"][0] > 0.7


def test_labels_as_dictionaries_and_as_a_tensor_have_the_same_loss(model: HFViTForObjectDetection) -> None:
    pixels = torch.rand(2, 3, 32, 48)
    padded = padded_boxes(LABELS)
    assert padded.shape == (2, 2, 5) and padded[1, :, 0].tolist() == [-1, -1]
    more = torch.cat([padded, torch.full((2, 3, 5), -1.0)], dim=1)
    outputs = model(pixels, labels=LABELS)
    torch.testing.assert_close(outputs.loss, model(pixels, labels=more).loss)
    torch.testing.assert_close(outputs.loss, object_losses(model(pixels), padded).mean())
    torch.testing.assert_close(outputs.loss, outputs.loss_dict["heatmap"] + 5 * outputs.loss_dict["boxes"])
    empty = model(pixels, labels=torch.empty(2, 0, 5))
    assert empty.loss.isfinite() and empty.loss_dict["boxes"] == 0
    with pytest.raises(ValueError, match="prepare the annotations with the image processor"):
        model(pixels, labels=torch.rand(2, 3, 4))


def test_a_gradient_reaches_every_parameter(model: HFViTForObjectDetection) -> None:
    model(torch.rand(2, 3, 32, 48), labels=LABELS).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_a_peak_is_found_once(model: HFViTForObjectDetection) -> None:
    """Points beside a peak have no logit, so that no other suppression of boxes is needed."""
    outputs = model(torch.rand(1, 3, 32, 48))
    kept = (outputs.logits > -1e3).unflatten(1, (8, 12))[0]  # [h, w, C]
    rows, columns, classes = kept.nonzero(as_tuple=True)
    distances = torch.maximum((rows[:, None] - rows).abs(), (columns[:, None] - columns).abs())
    same = (classes[:, None] == classes) & ~torch.eye(len(rows), dtype=torch.bool)
    assert len(rows) and distances[same].min() > 1
    assert torch.equal(outputs.logits[0][kept.flatten(0, 1)], outputs.heatmap[0].flatten(1).T[kept.flatten(0, 1)])


def test_an_object_with_several_peaks_is_found_once() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = 0.2 + 0.6 * torch.rand(50, 2, 2, generator=generator)  # two objects per image, each found three times
    boxes = torch.cat([centres, torch.full_like(centres, 0.1)], dim=2).repeat(1, 3, 1)
    boxes[..., :2] += 0.01 * torch.rand(50, 6, 2, generator=generator)
    classes = torch.randint(0, 2, (50, 6), generator=generator)
    found = are_duplicates(boxes, classes)
    for image in range(50):
        corners = box_convert(boxes[image], "cxcywh", "xyxy")
        kept = batched_nms(corners, torch.linspace(1, 0.5, 6), classes[image], MOST_OVERLAP)
        assert (~found[image]).nonzero().flatten().tolist() == kept.tolist()

    logits = torch.tensor([[[2.0, -1e4], [3.0, -1e4], [-1e4, 1.0], [1.0, -1e4]]])
    near = torch.tensor([[[0.5, 0.5, 0.4, 0.4], [0.52, 0.5, 0.4, 0.4], [0.5, 0.5, 0.4, 0.4], [0.1, 0.1, 0.2, 0.2]]])
    objects = most_likely_objects(logits, near, 4)
    assert objects[0, :, 0].tolist() == pytest.approx([0.9526, 0.7311, 0.7311, 0.0], abs=1e-4)
    assert sorted(objects[0, 1:3, 1].tolist()) == [0, 1] and objects[0, 0, 2].item() == pytest.approx(0.52)


def test_saved_models_and_encoders_load(model: HFViTForObjectDetection, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "detector")
    loaded = AutoModelForObjectDetection.from_pretrained(tmp_path / "detector")
    pixels = torch.rand(1, 3, 32, 48)
    assert type(loaded) is HFViTForObjectDetection
    torch.testing.assert_close(loaded(pixels).logits, model(pixels).logits, rtol=0, atol=0)
    classifier = HFViTForImageClassification(model.config)
    classifier.save_pretrained(tmp_path / "classifier")
    HFViTImageProcessorPil.from_preset("timm", (32, 48)).save_pretrained(tmp_path / "classifier")
    fresh, processor = load_detector(tmp_path / "classifier", ["cat", "dog"], image_size=(64, 48))
    assert fresh.config.id2label == {0: "cat", 1: "dog"} and processor.crop_pct is None
    assert processor(Image.new("RGB", (9, 9)), return_tensors="pt").pixel_values.shape == (1, 3, 64, 48)
    torch.testing.assert_close(fresh.vit.layers[0].mlp.fc1.weight, classifier.vit.layers[0].mlp.fc1.weight)
    assert fresh(torch.rand(1, 3, 64, 48)).heatmap.sigmoid().max() < 0.1  # objects are rare
    names = [f"LABEL_{index}" for index in range(5)]
    continued, renamed = (load_detector(tmp_path / "detector", names)[0] for names in (names, [*"abcde"]))
    torch.testing.assert_close(continued.state_dict(), model.state_dict())
    changed = [name for name, weight in renamed.state_dict().items() if not weight.equal(model.state_dict()[name])]
    assert changed == ["detection_head.classifier.weight"]


def test_what_does_not_work_is_refused(tiny_config: Callable[..., HFViTConfig]) -> None:
    with pytest.raises(ValueError, match="power of two, got 3"):
        HFViTForObjectDetection(tiny_config(patch_subdivision=3))
    with pytest.raises(ValueError, match="at least one class"):
        HFViTForObjectDetection(tiny_config(num_labels=0))


@pytest.mark.parametrize("positions", ["learned_2d", "sincos_2d", "relative", "rotary"])
def test_positions_of_all_kinds_and_a_stem(tiny_config: Callable[..., HFViTConfig], positions: str) -> None:
    config = tiny_config(position_embedding_type=positions, stem_layers=[], stem_width=32, num_register_tokens=2)
    model = HFViTForObjectDetection(config)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # by version
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(torch.rand(2, 3, 40, 24), labels=LABELS)
    outputs.loss.backward()
    assert outputs.loss.dtype == torch.float32 and outputs.loss.isfinite()


# -------------------------------------------------------------------------------------------------- the processor


def annotations(*boxes: list[float], image_id: int = 7) -> dict[str, Any]:
    objects = [
        {"bbox": box, "category_id": number, "area": box[2] * box[3], "iscrowd": 0} for number, box in enumerate(boxes)
    ]
    return {"image_id": image_id, "annotations": objects}


@pytest.mark.parametrize("processor_class", PROCESSORS)
def test_labels_are_those_of_detr(processor_class: Any) -> None:
    images = [np.zeros((40, 60, 3), dtype=np.uint8), np.zeros((30, 20, 3), dtype=np.uint8)]
    targets = [annotations([6, 4, 30, 20], [50, 30, 100, 100], [70, 3, 5, 5]), annotations()]
    targets[0]["annotations"].append({"bbox": [0, 0, 60, 40], "category_id": 0, "area": 2400, "iscrowd": 1})
    size = {"height": 32, "width": 48}
    batch = processor_class(size=size)(images, annotations=targets, return_tensors="pt")
    expected = DetrImageProcessor(size=size, do_pad=False)(images, annotations=targets, return_tensors="pt")
    assert batch.pixel_values.shape == (2, 3, 32, 48)
    for ours, theirs in zip(batch.labels, expected.labels, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value)
    assert len(batch.labels[0]["boxes"]) == 2 and len(batch.labels[1]["boxes"]) == 0


@pytest.mark.parametrize("processor_class", PROCESSORS)
def test_outputs_become_boxes_in_pixels(processor_class: Any) -> None:
    logits = torch.full((1, 3, 2), -9.0)
    logits[0, 1, 1], logits[0, 2, 0] = 1, 3
    boxes = torch.tensor([[[0.5, 0.5, 1, 1], [0.25, 0.5, 0.5, 0.5], [0.9, 0.5, 0.4, 1]]])
    outputs, processor = SimpleNamespace(logits=logits, pred_boxes=boxes), processor_class()
    for target_sizes in ([(40, 60)], torch.tensor([[40, 60]])):
        [found] = processor.post_process_object_detection(outputs, target_sizes=target_sizes)
        torch.testing.assert_close(found["scores"], torch.tensor([3.0, 1.0]).sigmoid())
        assert found["labels"].tolist() == [0, 1]
        torch.testing.assert_close(found["boxes"], torch.tensor([[42.0, 0, 60, 40], [0, 10, 30, 30]]))
    [found] = processor.post_process_object_detection(outputs, threshold=0.0, top_k=1)
    torch.testing.assert_close(found["boxes"], torch.tensor([[0.7, 0, 1, 1]]))
    with pytest.raises(ValueError, match=r"resizes whole images .* got crop_pct=0.9"):
        processor_class(crop_pct=0.9).post_process_object_detection(outputs)


def test_annotations_that_do_not_fit_are_refused() -> None:
    processor, image = HFViTImageProcessor(size=16), Image.new("RGB", (20, 30))
    with pytest.raises(ValueError, match="for each of 2 images, got 1"):
        processor([image, image], annotations=annotations())
    with pytest.raises(ValueError, match="without annotations: its keys are image_id, objects"):
        processor(image, annotations={"image_id": 3, "objects": []})
    with pytest.raises(ValueError, match="got one with the keys bbox, label"):
        processor(image, annotations={"image_id": 3, "annotations": [{"bbox": [0, 0, 1, 1], "label": 3}]})


# --------------------------------------------------------------------------------------------- pipeline and Trainer


def test_the_pipeline_gives_boxes_in_the_upright_image(
    model: HFViTForObjectDetection, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with torch.no_grad():
        model.detection_head.classifier.bias.fill_(1.0)
    model.save_pretrained(tmp_path / "model")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    photo = Image.effect_noise((90, 60), 60).convert("RGB")
    photo.save(tmp_path / "photo.jpg", exif=exif)
    detect = pipeline("object-detection", str(tmp_path / "model"))
    found = detect(str(tmp_path / "photo.jpg"), threshold=0.1)
    assert found and max(each["box"]["xmax"] for each in found) <= 60 < max(each["box"]["ymax"] for each in found)
    batched = detect([str(tmp_path / "photo.jpg"), photo], threshold=0.1, batch_size=2)[0]
    assert [each["box"] for each in batched] == [each["box"] for each in found]
    assert "not supported" not in caplog.text


@pytest.mark.slow
def test_a_saved_folder_detects_the_same_without_the_package(model: HFViTForObjectDetection, tmp_path: Path) -> None:
    with torch.no_grad():
        model.detection_head.classifier.bias.fill_(1.0)
    model.save_pretrained(tmp_path / "model")
    Image.effect_noise((90, 60), 60).convert("RGB").save(tmp_path / "photo.png")
    code = (
        "import json, sys; from transformers import pipeline; "
        "detect = pipeline('object-detection', sys.argv[1], trust_remote_code=True); "
        "print(json.dumps([type(detect).__module__, detect(sys.argv[2])]))"
    )
    answer = python(code, tmp_path / "model", tmp_path / "photo.png", home=tmp_path).stdout
    module, found = json.loads(answer.strip().splitlines()[-1])
    assert module.startswith("transformers_modules")
    local = pipeline("object-detection", str(tmp_path / "model"))(str(tmp_path / "photo.png"))
    assert local and [each["box"] for each in found] == [each["box"] for each in local]
    assert [each["score"] for each in found] == pytest.approx([each["score"] for each in local], abs=1e-5)


def test_trainer_learns_from_dictionaries(model: HFViTForObjectDetection, tmp_path: Path) -> None:
    rows = [{"pixel_values": torch.rand(3, 32, 48), "labels": LABELS[index % 2]} for index in range(4)]

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "pixel_values": torch.stack([row["pixel_values"] for row in batch]),
            "labels": [row["labels"] for row in batch],
        }

    before = model.detection_head.classifier.weight.detach().clone()
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, use_cpu=True, report_to=[], disable_tqdm=True
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, data_collator=collate)
    trainer.train()
    assert np.isfinite(trainer.evaluate()["eval_loss"])
    assert not torch.equal(model.detection_head.classifier.weight, before)


def test_compiled_training_has_the_same_loss(model: HFViTForObjectDetection) -> None:
    pixels, labels = torch.rand(2, 3, 32, 48), padded_boxes(LABELS)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(pixels, labels=labels).loss, model(pixels, labels=labels).loss)


def test_new_classifiers_start_from_values_of_their_own(tiny_config: Any, tmp_path: Path) -> None:
    """Objects are rare, and the parts of a patch are equal; loaded weights stay as they are."""
    detector = HFViTForObjectDetection(tiny_config(num_labels=3, patch_subdivision=2))
    bias = detector.detection_head.classifier.bias
    torch.testing.assert_close(bias.sigmoid(), torch.full((3,), 0.01))
    segmenter = HFViTForSemanticSegmentation(tiny_config(num_labels=3, patch_subdivision=2))
    parts = segmenter.decode_head.classifier.weight.unflatten(0, (3, 4))
    assert parts.std() > 0 and (parts == parts[:, :1]).all()
    with torch.no_grad():
        bias.copy_(torch.randn(3))
    detector.save_pretrained(tmp_path)
    assert torch.equal(HFViTForObjectDetection.from_pretrained(tmp_path).detection_head.classifier.bias, bias)
