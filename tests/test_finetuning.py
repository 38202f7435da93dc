"""A checkpoint for other labels: the head is kept for the same classes alone, and nothing but a head is made up."""

import sys
from pathlib import Path

import pytest
import torch
import transformers
from isolated import save_tiny_classifier
from packaging.version import Version
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from hf_vit import HFViTForImageClassification
from hf_vit.checkpoints import Options, open_checkpoint
from hf_vit.checkpoints.models import load_classifier, load_for_masked_patches
from hf_vit.training.trainer import add_lora


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


def test_another_patch_size_resamples_the_projection(folder: Path) -> None:
    model, _ = load_classifier(folder, ["a", "b"], patch_size=16)
    expected = open_checkpoint(folder, Options(patch_size=(16, 16))).state_dict()
    name = "vit.embeddings.patch_embeddings.projection.weight"
    assert torch.equal(model.state_dict()[name], expected[name])


# peft 0.21 asks for a property that transformers 5.23 has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_what_lora_learns_is_loaded_onto_the_checkpoint(folder: Path, tmp_path: Path) -> None:
    model, _ = load_classifier(folder, ["a", "b"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    learner = add_lora(model, rank=2)
    assert learner.peft_config["default"].target_modules == {"qkv", "o_proj", "fc1", "fc2"}
    learned = {name for name, parameter in learner.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or "classifier" in name for name in learned)
    pixel_values, labels = 10 * torch.randn(4, 3, 32, 48), torch.tensor([0, 1, 0, 1])
    optimizer = torch.optim.AdamW([parameter for parameter in learner.parameters() if parameter.requires_grad], 1e-2)
    losses = []
    for _ in range(8):
        losses.append(learner(pixel_values=pixel_values, labels=labels).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]

    learner.eval().save_pretrained(tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(stored) == 2 + 2 * 4 * model.config.num_hidden_layers  # the head, and two matrices a layer
    with torch.no_grad():
        expected = learner(pixel_values=pixel_values).logits

        def base(name: Path = folder) -> HFViTForImageClassification:
            loaded = AutoModelForImageClassification.from_pretrained(name, num_labels=2, ignore_mismatched_sizes=True)
            return loaded.eval()

        by_peft = PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()
        assert torch.equal(by_peft(pixel_values=pixel_values).logits, expected)
        if Version(transformers.__version__) >= Version("5.23"):  # 5.17 loads no head this way
            by_transformers = base()
            by_transformers.load_adapter(tmp_path / "adapter")
            assert torch.equal(by_transformers(pixel_values=pixel_values).logits, expected)
            assert torch.equal(base(tmp_path / "adapter")(pixel_values=pixel_values).logits, expected)
        merged = by_peft.merge_and_unload()
        torch.testing.assert_close(merged(pixel_values=pixel_values).logits, expected)
    assert type(merged) is HFViTForImageClassification and merged.state_dict().keys() == before.keys()
    changed = {name for name, tensor in merged.state_dict().items() if not torch.equal(tensor, before[name])}
    ends = ("qkv.weight", "o_proj.weight", "fc1.weight", "fc2.weight", "classifier.weight", "classifier.bias")
    assert changed == {name for name in before if name.endswith(ends)}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_finds_the_layers_of_other_blocks(tiny_config) -> None:
    fields = {"use_gated_mlp": True, "use_output_projection": False, "num_attention_heads": 1, "head_dim": 32}
    learner = add_lora(HFViTForImageClassification(tiny_config(**fields)), rank=1)
    assert learner.peft_config["default"].target_modules == {"qkv", "fc1", "gate", "fc2"}


def test_lora_without_peft_is_an_error_with_its_remedy(tiny_config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r'peft must be installed for this: pip install "hf-vit\[lora\]"$'):
        add_lora(HFViTForImageClassification(tiny_config()), rank=1)
