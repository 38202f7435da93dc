"""What is learned: losses by hand, masks to the patch, figures however images are divided, the model of a recipe."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, Features, Image, Value
from isolated import save_tiny_classifier
from tiny_run import COLORS, RECIPE, colored_dataset
from torch import Tensor

import hf_vit
from hf_vit.data.images import EvaluationImages, derive_seed, normalize
from hf_vit.data.labelled import ImageData
from hf_vit.data.loaders import evaluation_loader
from hf_vit.model.positions_hf_vit import resample_table
from hf_vit.training.recipe import TrainConfig
from hf_vit.training.tasks import LOSSES, TASKS, build_model

COLUMNS = ("image", "label")
DATA = ImageData("photos", None, None, COLUMNS, list(COLORS), "test", 10)


def recipe(**fields: Any) -> TrainConfig:
    return TrainConfig(**{**RECIPE, **fields})


def built(**fields: Any) -> tuple[Any, Any, Any]:
    """Return the task, model and processor of a recipe."""
    config = recipe(**fields)
    task = TASKS[config.task](config, DATA)
    return task, *build_model(config, task)


class Process(SimpleNamespace):
    """What an evaluation asks of Accelerate, on one of several processes; `sums` are what it gave to the others."""

    device = torch.device("cpu")
    num_processes = 1

    def reduce(self, tensor: Tensor, how: str) -> Tensor:
        assert how == "sum"
        self.sums = tensor
        return tensor

    def gather(self, tensors: Any) -> Any:
        return tensors


# ------------------------------------------------------------------------------------------------------- losses


def test_losses_by_hand() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, 1.0]])
    probabilities = logits.exp() / logits.exp().sum(dim=1, keepdim=True)
    expected = -(probabilities[0, 0].log() + probabilities[1, 2].log()) / 2
    torch.testing.assert_close(LOSSES["cross_entropy"](logits, torch.tensor([0, 2])), expected)
    soft = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.1, 0.9]])
    expected = -(soft * probabilities.log()).sum() / 2
    torch.testing.assert_close(LOSSES["cross_entropy"](logits, soft), expected)

    each = logits.sigmoid()
    expected = -torch.stack([each[0, 0], 1 - each[0, 1], 1 - each[0, 2], 1 - each[1, 0], 1 - each[1, 1], each[1, 2]])
    expected = -(-expected).log().mean()
    torch.testing.assert_close(LOSSES["binary_cross_entropy"](logits, torch.tensor([0, 2])), expected)
    present = F.binary_cross_entropy(each, torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]]))
    torch.testing.assert_close(LOSSES["binary_cross_entropy"](logits, soft), present)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_classifier_learns_from_labels_or_from_mixed_ones(loss: str) -> None:
    pixel_values, labels = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 2, 1, 0])
    task, model, _ = built(loss=loss)
    model.eval()
    plain = task.loss(model, pixel_values, labels, torch.Generator().manual_seed(0))
    torch.testing.assert_close(plain, LOSSES[loss](model(pixel_values=pixel_values).logits, labels))
    task, model, _ = built(loss=loss, mixup=0.8, cutmix=1.0, label_smoothing=0.0)
    first, same, other = (
        task.loss(model.eval(), pixel_values, labels, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, same) and not torch.equal(first, other)


# -------------------------------------------------------------------------------------------------------- masks


def masks_of(ratio: float, block: int, number: int = 1, seed: int = 0) -> list[Tensor]:
    """Return masks over a grid of 4x6."""
    task, model, _ = built(task="masked_patches", mask_ratio=ratio, mask_block=block, image_size=[16, 24])
    generator = torch.Generator().manual_seed(seed)
    return list(task._masks(model, torch.zeros(number, 3, 16, 24), [generator] * number).view(-1, 4, 6))


@pytest.mark.parametrize("block", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("ratio", [0.001, 0.25, 0.4, 0.5, 0.75, 0.999])
def test_the_share_of_hidden_patches_is_exact(ratio: float, block: int) -> None:
    masks = masks_of(ratio, block, number=10)
    assert {int(mask.sum()) for mask in masks} == {max(1, round(ratio * 24))}
    again = masks_of(ratio, block, number=10)
    assert all(torch.equal(mask, other) for mask, other in zip(masks, again, strict=True))
    squares = [square for mask in masks for band in mask.split(block) for square in band.split(block, dim=1)]
    partly = [square for square in squares if 0 < square.sum() < square.numel()]
    assert len(partly) <= len(masks)  # one square of a mask, where the share is reached within it


@pytest.mark.parametrize("block", [1, 2, 3, 4, 9])
def test_masks_are_those_of_earlier_versions(block: int) -> None:
    generator, grid = torch.Generator().manual_seed(7), torch.arange(24).reshape(4, 6)
    squares = [square.flatten() for band in grid.split(block) for square in band.split(block, dim=1)]
    for mask in masks_of(0.4, block, number=3, seed=7):
        order = torch.cat([squares[index] for index in torch.randperm(len(squares), generator=generator)])
        assert mask.flatten().nonzero().squeeze(1).tolist() == order[:10].sort().values.tolist()


def test_masks_differ_and_hide_every_patch_as_often() -> None:
    masks = torch.stack(masks_of(0.5, 2, number=400)).float()
    assert not torch.equal(masks[0], masks[1])
    assert masks.mean(dim=0).sub(0.5).abs().max() < 0.1  # four standard deviations


def test_the_loss_is_of_hidden_patches_alone() -> None:
    task, model, _ = built(task="masked_patches", mask_ratio=0.5)
    model.eval()
    pixel_values = torch.randn(5, 3, 8, 8)
    loss, same, other = (
        task.loss(model, pixel_values, torch.zeros(5), torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(loss, same) and not torch.equal(loss, other)
    generator = torch.Generator().manual_seed(3)
    masks = task._masks(model, pixel_values, [generator] * 5)
    assert masks.sum(dim=1).tolist() == [2] * 5
    predictions = model(pixel_values=pixel_values, bool_masked_pos=masks).predictions
    patches = pixel_values.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 4, 5, 1).reshape(5, 4, 48)
    orders = [patches, patches.view(5, 4, 16, 3).transpose(2, 3).reshape(5, 4, 48)]  # channels last, or first
    by_hand = [(predictions - order).abs().mean(dim=-1)[masks].mean() for order in orders]
    assert any(torch.allclose(loss, value) for value in by_hand)


# ----------------------------------------------------------------------------------------------------- evaluate


def with_broken(number: int, broken: int) -> Dataset:
    data = colored_dataset(number, 0).cast_column("image", Image(decode=False))
    stored = [row["image"] for row in data]
    stored[broken] = {"bytes": b"no image", "path": None}
    features = Features({"image": {"bytes": Value("binary"), "path": Value("string")}, "label": Value("int64")})
    rows = {"image": stored, "label": data["label"][:]}
    return Dataset.from_dict(rows, features=features).cast_column("image", Image())


@pytest.mark.parametrize("objective", ["pixels", "mean_color", "autoencoder"])
def test_masked_patches_are_measured_the_same_however_they_are_divided(objective: str) -> None:
    fields = {**RECIPE["model_config"], "mim_objective": objective}
    task, model, processor = built(task="masked_patches", model_config=fields)
    images = EvaluationImages(with_broken(11, broken=4), COLUMNS, processor)

    def to_model(pixels: Tensor) -> Tensor:
        return normalize(pixels, processor)

    model.eval()
    losses = []
    for index in set(range(11)) - {4}:
        pixel_values = to_model(images[index]["pixel_values"][None])
        mask = task._masks(model, pixel_values, [torch.Generator().manual_seed(derive_seed("mask", index))])
        with torch.no_grad():
            losses.append(model(pixel_values=pixel_values, bool_masked_pos=mask).loss.item())
    expected = sum(losses) / 10

    model.train()
    for processes in (1, 2, 3):
        for batch_size in (1, 3, 16):
            sums = torch.zeros(2)
            for process in range(processes):
                one = Process()
                figures, broken, predictions = task.evaluate(
                    model, evaluation_loader(images, batch_size, 0, processes, process), one, to_model
                )
                assert predictions is None and model.training and set(broken) <= {"image 4"}
                sums += one.sums
            assert sums[1] == 10
            assert (sums[0] / 10).item() == pytest.approx(expected, rel=1e-5)
    assert figures.keys() == {"loss", "count"}


def test_a_classifier_is_measured_the_same_however_it_is_divided() -> None:
    task, model, processor = built()
    images = EvaluationImages(with_broken(11, broken=4), COLUMNS, processor)
    loaders = [evaluation_loader(images, size, 0) for size in (1, 3, 16)]
    loaders.append(evaluation_loader(images, 3, 0, has_one_size=True))
    assert {len(batch["index"]) for batch in loaders[-1]} == {3}
    results = [
        task.evaluate(model, loader, Process(), lambda pixels: normalize(pixels, processor)) for loader in loaders
    ]
    for figures, broken, predictions in results:
        assert broken == ["image 4"]
        assert figures["count"] == 10 and figures == pytest.approx(results[0][0], rel=1e-5)
        assert predictions.broken == ["image 4"] and 4 not in predictions.index.tolist()
        assert predictions.labels.tolist() == [index % 3 for index in range(11) if index != 4]
        assert figures["accuracy"] == (predictions.predicted == predictions.labels).sum() / 10


# -------------------------------------------------------------------------------------------------------- model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of five other labels, for images of 32x48."""
    return save_tiny_classifier(tmp_path_factory.mktemp("saved") / "tiny-vit")


def encoder_of(model: Any, without: str = "mask_token") -> dict[str, Tensor]:
    return {name: value for name, value in model.base_model.state_dict().items() if without not in name}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_a_variant_with_fields_of_its_own() -> None:
    fields = {"num_hidden_layers": 1, "num_register_tokens": 2}
    _, model, processor = built(model="ViT-Ti/16", model_config=fields, image_size=[32, 48])
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_register_tokens) == (192, 1, 2)
    assert tuple(config.image_size) == (32, 48) and dict(processor.size) == {"height": 32, "width": 48}
    assert config.id2label == dict(enumerate(COLORS)) and config.problem_type == "single_label_classification"


def test_a_model_of_fields_alone() -> None:
    _, model, processor = built(
        model=None, preprocessing="timm", model_config={**RECIPE["model_config"], "num_channels": 1}
    )
    assert (model.config.hidden_size, model.config.num_channels, model.config.num_labels) == (16, 1, 3)
    assert processor.do_grayscale and model(pixel_values=torch.zeros(1, 1, 8, 8)).logits.shape == (1, 3)


def test_a_checkpoint_of_other_labels(checkpoint: Path) -> None:
    stored = hf_vit.HFViTForImageClassification.from_pretrained(checkpoint)
    _, model, processor = built(model=str(checkpoint), model_config={}, image_size=[32, 48])
    assert_same(encoder_of(model), encoder_of(stored))
    assert model.config.id2label == dict(enumerate(COLORS)) and not model.classifier.weight.any()
    assert dict(processor.size) == {"height": 32, "width": 48}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_head_alone_is_trained_without_dropout(checkpoint: Path) -> None:
    for source, fields in ((None, RECIPE["model_config"]), (str(checkpoint), {})):
        _, model, _ = built(model=source, model_config={**fields, "hidden_dropout_prob": 0.0}, trained="head")
        learned = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert learned == ["classifier.weight", "classifier.bias"]
        model.train()
        pixel_values = torch.randn(2, 3, *model.config.image_size) if source else torch.randn(2, 3, 8, 8)
        assert torch.equal(model(pixel_values=pixel_values).logits, model(pixel_values=pixel_values).logits)
    _, model, _ = built(model_config={**RECIPE["model_config"], "hidden_dropout_prob": 0.2}, trained="head")
    assert model.config.hidden_dropout_prob == 0.2  # what a recipe says of the architecture wins


def test_positions_are_resampled_or_drawn_anew(checkpoint: Path) -> None:
    stored = hf_vit.HFViTForImageClassification.from_pretrained(checkpoint)

    def table(model: Any) -> Tensor:
        return model.base_model.embeddings.position_embeddings.table.weight.detach()

    fields: dict[str, Any] = {"model": str(checkpoint), "model_config": {}, "image_size": [48, 48]}
    _, resampled, _ = built(**fields)
    _, drawn, _ = built(**fields, resample_positions=False)
    _, chosen, _ = built(**fields, position_std=0.5)
    old, new = table(stored), table(resampled)
    torch.testing.assert_close(new, resample_table(old, (6, 6), stored.config.position_interpolation))
    assert new.shape == table(drawn).shape != old.shape
    assert not torch.equal(table(drawn), new) and 0.01 < table(drawn).std() < 0.03
    assert 0.4 < table(chosen).std() < 0.6
    without = "position_embeddings"
    assert_same(encoder_of(resampled, without), encoder_of(drawn, without))


def test_masked_patches_from_a_classifier_and_back(checkpoint: Path, tmp_path: Path) -> None:
    stored = hf_vit.HFViTForImageClassification.from_pretrained(checkpoint)
    fields: dict[str, Any] = {"model_config": {}, "image_size": [32, 48]}
    task, masked, processor = built(task="masked_patches", model=str(checkpoint), **fields)
    assert isinstance(masked, hf_vit.HFViTForMaskedImageModeling)
    assert {*encoder_of(masked)} <= {*encoder_of(stored)}  # a pooler is the classifier's alone
    assert_same(encoder_of(masked), {name: encoder_of(stored)[name] for name in encoder_of(masked)})
    loss = task.loss(masked, torch.randn(2, 3, 32, 48), torch.zeros(2), torch.Generator().manual_seed(0))
    loss.backward()
    assert loss.isfinite() and masked.objective.decoder.weight.grad.any()
    for model in (masked, processor):
        model.save_pretrained(tmp_path / "masked")
    _, back, _ = built(model=str(tmp_path / "masked"), **fields)
    assert isinstance(back, hf_vit.HFViTForImageClassification) and not back.classifier.weight.any()
    assert back.config.id2label == dict(enumerate(COLORS))
    assert_same({name: encoder_of(back)[name] for name in encoder_of(masked)}, encoder_of(masked))
