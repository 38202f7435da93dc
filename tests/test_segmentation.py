"""Semantic segmentation: the model, the image processor's maps, and the pipeline."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoModelForSemanticSegmentation, Trainer, TrainingArguments, pipeline

from hf_vit import (
    HFViTConfig,
    HFViTForImageClassification,
    HFViTForSemanticSegmentation,
    HFViTImageProcessor,
    HFViTImageProcessorPil,
)

PROCESSORS = [HFViTImageProcessor, HFViTImageProcessorPil]


@pytest.fixture
def model(tiny_config: Callable[..., HFViTConfig]) -> HFViTForSemanticSegmentation:
    return HFViTForSemanticSegmentation(tiny_config(out_indices=[2, 3])).eval()


def test_logits_of_any_size_have_four_rows_and_columns_per_patch(model: HFViTForSemanticSegmentation) -> None:
    assert model(torch.rand(2, 3, 32, 48)).logits.shape == (2, 5, 16, 24)
    assert model(torch.rand(1, 3, 56, 16)).logits.shape == (1, 5, 28, 8)


def test_parts_of_a_patch_start_equal_and_keep_what_they_learned(
    model: HFViTForSemanticSegmentation, tmp_path: Path
) -> None:
    def parts(model: HFViTForSemanticSegmentation) -> torch.Tensor:
        return model.decode_head.classifier.weight.unflatten(0, (5, 16))

    logits = model(torch.rand(1, 3, 32, 48)).logits
    assert (parts(model) == parts(model)[:, :1]).all() and parts(model).std(dim=0).min() > 0
    assert torch.equal(logits, F.interpolate(logits[..., ::4, ::4], scale_factor=4, mode="nearest"))
    torch.nn.init.normal_(model.decode_head.classifier.weight)
    model.save_pretrained(tmp_path)
    assert torch.equal(parts(HFViTForSemanticSegmentation.from_pretrained(tmp_path)), parts(model))


def test_loss_is_that_of_known_pixels_at_the_size_of_the_labels(model: HFViTForSemanticSegmentation) -> None:
    pixels, labels = torch.rand(2, 3, 32, 48), torch.randint(5, (2, 64, 96))
    labels[0, :20] = 255
    output = model(pixels, labels=labels)
    upsampled = F.interpolate(output.logits, size=(64, 96), mode="bilinear")
    torch.testing.assert_close(output.loss, F.cross_entropy(upsampled, labels, ignore_index=255))
    assert model(pixels, labels=torch.full_like(labels, 255)).loss == 0  # not NaN


def test_a_gradient_reaches_every_parameter(model: HFViTForSemanticSegmentation) -> None:
    model(torch.rand(2, 3, 32, 48), labels=torch.randint(5, (2, 32, 48))).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_each_prediction_comes_from_its_own_patch(model: HFViTForSemanticSegmentation) -> None:
    patches = torch.randn(1, 24, 32)
    changed = patches.clone()
    changed[0, 7] += 1  # row 1, column 1 of a grid of 4x6
    before, after = (model.decode_head([each, each], (4, 6)) for each in (patches, changed))
    rows, columns = (before != after).any(dim=1)[0].nonzero(as_tuple=True)
    assert (rows.unique().tolist(), columns.unique().tolist()) == ([4, 5, 6, 7], [4, 5, 6, 7])


def test_saved_models_and_encoders_load(model: HFViTForSemanticSegmentation, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path)
    pixels = torch.rand(1, 3, 32, 48)
    assert type(loaded) is HFViTForSemanticSegmentation
    torch.testing.assert_close(loaded(pixels).logits, model(pixels).logits, rtol=0, atol=0)
    assert loaded.config.out_indices == [2, 3]


def test_the_encoder_of_a_classifier_loads(tiny_config: Callable[..., HFViTConfig], tmp_path: Path) -> None:
    classifier = HFViTForImageClassification(tiny_config())
    classifier.save_pretrained(tmp_path)
    loaded = HFViTForSemanticSegmentation.from_pretrained(tmp_path, num_labels=3)
    assert loaded.config.num_labels == 3
    torch.testing.assert_close(loaded.vit.layers[0].mlp.fc1.weight, classifier.vit.layers[0].mlp.fc1.weight)


def test_one_class_is_refused(tiny_config: Callable[..., HFViTConfig]) -> None:
    with pytest.raises(ValueError, match="count the background as a class"):
        HFViTForSemanticSegmentation(tiny_config(num_labels=1))


# -------------------------------------------------------------------------------------------------- the processor


def quadrants(height: int, width: int) -> np.ndarray:
    """Return a map with the classes 0 and 1 above 2 and 255."""
    rows, columns = np.arange(height)[:, None] * 2 // height, np.arange(width) * 2 // width
    return np.array([0, 1, 2, 255], dtype=np.uint8)[rows * 2 + columns]


@pytest.mark.parametrize("processor_class", PROCESSORS)
def test_maps_are_resized_without_new_classes(processor_class: Any) -> None:
    processor = processor_class(size={"height": 32, "width": 48})
    image, indices = Image.new("RGB", (60, 40), "red"), quadrants(40, 60)
    inputs = [indices, indices[None], Image.fromarray(indices), torch.from_numpy(indices)]
    batch = processor([image] * 4, inputs, return_tensors="pt")
    assert batch.pixel_values.shape == (4, 3, 32, 48) and batch.labels.dtype == torch.int64
    assert all(torch.equal(labels, torch.from_numpy(quadrants(32, 48)).long()) for labels in batch.labels)
    assert torch.equal(batch.pixel_values, processor([image] * 4, return_tensors="pt").pixel_values)
    [labels] = processor(image, segmentation_maps=Image.fromarray(indices)).labels
    np.testing.assert_array_equal(labels, quadrants(32, 48))


@pytest.mark.parametrize("processor_class", PROCESSORS)
def test_a_palette_holds_the_classes_and_a_crop_adds_ignored_pixels(processor_class: Any) -> None:
    processor = processor_class(do_resize=False, do_center_crop=True, crop_size={"height": 6, "width": 4})
    palette = Image.fromarray(np.array([[0, 1], [2, 3]], dtype=np.uint8), mode="L").resize((4, 4), 0)
    palette.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200, 9, 9, 9])
    assert palette.mode == "P"
    labels = processor(Image.new("RGB", (4, 4)), palette, return_tensors="np").labels[0]
    assert labels.tolist() == [[255] * 4, [0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3], [255] * 4]
    reduced = processor(Image.new("RGB", (4, 4)), palette, do_reduce_labels=True, return_tensors="np").labels[0]
    assert reduced[1:5].tolist() == [[255, 255, 0, 0]] * 2 + [[1, 1, 2, 2]] * 2


@pytest.mark.parametrize("processor_class", PROCESSORS)
def test_maps_that_do_not_fit_are_refused(processor_class: Any) -> None:
    processor, image = processor_class(size=16), Image.new("RGB", (20, 30))
    with pytest.raises(ValueError, match=r"of its size, got maps of \[\(20, 30\)\]"):
        processor(image, np.zeros((20, 30), dtype=np.uint8))
    with pytest.raises(ValueError, match="convert the colours to class indices"):
        processor(image, Image.effect_noise((20, 30), 60).convert("RGB").point(lambda value: value // 2, "RGB"))


@pytest.mark.parametrize("processor_class", PROCESSORS)
def test_logits_become_maps(processor_class: Any) -> None:
    logits = torch.zeros(1, 3, 4, 4)
    logits[0, 2, :, 2:] = 5
    processor = processor_class()
    [indices] = processor.post_process_semantic_segmentation(SimpleNamespace(logits=logits), [(8, 12)])
    assert indices.shape == (8, 12) and indices[0].tolist() == [0] * 5 + [2] * 7
    with pytest.raises(ValueError, match="crops images"):
        processor_class(crop_pct=0.9).post_process_semantic_segmentation(SimpleNamespace(logits=logits), [(8, 12)])


# --------------------------------------------------------------------------------------------- pipeline and Trainer


def test_the_pipeline_gives_masks_of_the_size_of_the_upright_image(
    model: HFViTForSemanticSegmentation, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model.save_pretrained(tmp_path / "model")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.effect_noise((90, 60), 60).convert("RGB").save(tmp_path / "photo.jpg", exif=exif)
    segmenter = pipeline("image-segmentation", str(tmp_path / "model"))
    found = segmenter(str(tmp_path / "photo.jpg"))
    assert {each["mask"].size for each in found} == {(60, 90)}
    assert sum(np.array(each["mask"], dtype=int) // 255 for each in found).tolist() == [[1] * 60] * 90
    assert len(segmenter([Image.new("RGB", (30, 20))] * 2)) == 2
    assert "not supported" not in caplog.text


def test_trainer_learns_from_accumulated_batches(model: HFViTForSemanticSegmentation, tmp_path: Path) -> None:
    rows = [{"pixel_values": torch.rand(3, 32, 48), "labels": torch.randint(5, (32, 48))} for _ in range(4)]
    options: dict[str, Any] = {"max_steps": 1, "report_to": [], "use_cpu": True, "max_grad_norm": 0}
    options |= {"learning_rate": 0.1, "optim": "sgd", "lr_scheduler_type": "constant"}
    weights = []
    for size, parts in ((4, 1), (2, 2)):
        learned = HFViTForSemanticSegmentation(model.config)
        learned.load_state_dict(model.state_dict())
        arguments = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=size, gradient_accumulation_steps=parts, **options
        )
        Trainer(learned, arguments, train_dataset=rows).train()
        weights.append(learned.decode_head.classifier.weight.detach())
    torch.testing.assert_close(*weights)
    assert (weights[0] - model.decode_head.classifier.weight).abs().max() > 0
