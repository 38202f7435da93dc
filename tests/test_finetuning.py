"""A checkpoint for other labels: the head is kept for the same classes alone, and nothing but a head is made up."""

from pathlib import Path

import pytest
import torch
from isolated import save_tiny_classifier
from safetensors.torch import load_file

from hf_vit import HFViTForImageClassification
from hf_vit.finetuning import load_classifier, load_for_masked_patches


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_classifier(tmp_path_factory.mktemp("saved") / "tiny-vit")


def test_the_head_is_kept_for_the_same_labels_alone(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    stored = load_file(folder / "model.safetensors")
    head = {"classifier.weight", "classifier.bias"}
    same, _ = load_classifier(folder, [f"LABEL_{index}" for index in range(5)])
    assert all(torch.equal(stored[name], value) for name, value in same.state_dict().items())
    assert "New head" not in caplog.text
    for names in (["a", "b", "c", "d", "e"], ["LABEL_1", "LABEL_0", "LABEL_2", "LABEL_3", "LABEL_4"], ["a", "b"]):
        caplog.clear()
        model, _ = load_classifier(folder, names)
        assert "classifier.weight and classifier.bias start at zero" in caplog.text
        assert model.config.id2label == dict(enumerate(names))
        assert model.config.problem_type == "single_label_classification"
        weights = model.state_dict()
        assert weights.keys() == stored.keys()
        assert all(torch.equal(stored[name], weights[name]) for name in stored.keys() - head)
        assert not any(weights[name].any() for name in head)


def test_another_size_brings_its_processor(folder: Path) -> None:
    model, processor = load_classifier(folder, ["a", "b"], image_size=(64, 48))
    assert tuple(model.config.image_size) == (64, 48) and dict(processor.size) == {"height": 64, "width": 48}


def test_half_precision_is_learned_in_whole(folder: Path, tmp_path: Path) -> None:
    HFViTForImageClassification.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(tmp_path)
    for model, _ in (load_classifier(tmp_path, ["a", "b"]), load_for_masked_patches(tmp_path)):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_nothing_but_the_head_is_made_up(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"lacks weights.*vit\.layers\.3\..*num_hidden_layers"):
        load_classifier(folder, ["a", "b"], num_hidden_layers=4)
    with pytest.raises(ValueError, match=r"vit\.embeddings\.patch_embeddings\.projection\.weight"):
        load_classifier(folder, ["a", "b"], patch_size=16)
