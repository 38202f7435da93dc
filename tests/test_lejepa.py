"""LeJEPA: the Gaussian test, the views of an image, and what a run saves, resumes and refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.integrate import quad
from tiny_run import assert_same_weights, save_photos, stop_at, tiny_recipe, weights
from torch import Tensor
from transformers import AutoModel

from hf_vit import HFViTForImageClassification, HFViTModel
from hf_vit.data.random_views import NUMBERS, Crops, views_of
from hf_vit.system.stopping import Interrupted
from hf_vit.training.lejepa import LAST_KNOT, sigreg
from hf_vit.training.loop import train
from hf_vit.training.rehearsal import rehearse
from hf_vit.training.run import LOG, METRICS, Run


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_photos(tmp_path_factory.mktemp("data") / "photos")


def learn(photos: Path, folder: Path, **fields: Any) -> Run:
    return train(tiny_recipe(photos, folder, **{"task": "lejepa", "local_views": 2, **fields}))


# ------------------------------------------------------------------------------------------------- the Gaussian test


def test_the_statistic_is_that_of_epps_and_pulley() -> None:
    """It is compared with numerical integration over the same interval, for one direction."""
    values = torch.tensor([0.3, -1.2, 2.0, 0.1], dtype=torch.float64)

    def integrand(t: float) -> float:
        normal = torch.tensor(-t * t / 2, dtype=torch.float64).exp()
        real, imaginary = (t * values).cos().mean(), (t * values).sin().mean()
        return float(((real - normal).square() + imaginary.square()) * normal)

    expected = len(values) * quad(integrand, -LAST_KNOT, LAST_KNOT)[0]
    assert sigreg(values.view(1, -1, 1).float(), torch.tensor([[-3.0]])).item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda normal: torch.zeros_like(normal),  # collapsed
        lambda normal: normal[:1].expand_as(normal),  # equal for all images of a view
        lambda normal: 3 * normal,
        lambda normal: normal + 1,
        lambda normal: normal[..., :1].expand_as(normal),  # one dimension
        lambda normal: normal.sign() * 1.0,
    ],
)
def test_what_is_not_gaussian_costs_more(spoil: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    normal, directions = torch.randn(2, 512, 8, generator=generator), torch.randn(8, 64, generator=generator)
    spoiled = spoil(normal.transpose(0, 1)).transpose(0, 1)
    assert sigreg(normal, directions) < 1.5 < sigreg(spoiled, directions)


# --------------------------------------------------------------------------------------------------------- the views


def draws(**given: float) -> Tensor:
    """Return random numbers for one image that leave it as it is, except for those given."""
    names = ("area", "aspect", "across", "down", "flip", "brightness", "contrast", "saturation", "gray")
    same = {"area": 1.0, "aspect": 0.5, "across": 0.5, "down": 0.5, "flip": 0.9, "brightness": 0.9, "gray": 0.9}
    assert len(names) == NUMBERS
    return torch.tensor([[{**same, **given}.get(name, 0.5) for name in names]])


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_a_view_of_everything_is_the_image(channels: int) -> None:
    image = torch.randn(1, channels, 6, 10)
    whole = Crops((6, 10), (0.3, 1.0))
    torch.testing.assert_close(views_of(image, draws(), whole, 0.4), image)
    torch.testing.assert_close(views_of(image, draws(flip=0.1), whole, 0.4), image.flip(-1))
    gray = views_of(image, draws(gray=0.1), whole, 0.4)
    torch.testing.assert_close(gray, image.mean(dim=1, keepdim=True).expand_as(image))


@pytest.mark.parametrize("across", [0.0, 0.25, 1.0])
def test_a_crop_lies_within_the_image(across: float) -> None:
    columns = torch.arange(16.0).expand(1, 1, 16, 16)
    crop = views_of(columns, draws(area=0.0, across=across), Crops((8, 8), (0.25, 0.3)), 0.0)
    torch.testing.assert_close(crop[0, 0, 0], torch.arange(8.0) + 8 * across)


def test_brightness_contrast_and_color() -> None:
    image = torch.randn(1, 3, 8, 8)
    whole = Crops((8, 8), (1.0, 1.0))
    brighter = views_of(image, draws(brightness=0.6), whole, 0.4)  # three quarters of the way from -0.4 to 0.4
    torch.testing.assert_close(brighter, image + 0.2)
    flat = views_of(image, draws(brightness=0.4, contrast=0.0), whole, 1.0)
    torch.testing.assert_close(flat, image.mean().expand_as(image))
    uncolored = views_of(image, draws(brightness=0.4, saturation=0.0), whole, 1.0)
    torch.testing.assert_close(uncolored, image.mean(dim=1, keepdim=True).expand_as(image))


# ----------------------------------------------------------------------------------------------------------- the run


def test_a_run_learns_and_saves_the_encoder(photos: Path, tmp_path: Path) -> None:
    run = learn(photos, tmp_path, epochs=8, warmup_epochs=0, learning_rate=1e-2, batch_size=27, ema_decay=0.5)
    values = [row["eval_loss"] for row in run.log if "eval_loss" in row]
    assert values[-1] < 0.85 * values[0] and run.metrics["eval_distance"] > 0
    assert isinstance(run.model, HFViTModel)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert_same_weights(weights(loaded), weights(run.model))
    features = [loaded(torch.full((1, 3, 8, 8), value)).pooler_output for value in (-1.0, 1.0)]
    assert (features[0] - features[1]).abs().max() > 0.1  # not collapsed
    tuned = train(tiny_recipe(photos, tmp_path / "tuned", model=str(tmp_path), model_config={}, epochs=1))
    assert isinstance(tuned.model, HFViTForImageClassification)


def test_resumed_is_equal_to_uninterrupted(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields: dict[str, Any] = {"ema_decay": 0.9, "accumulation_steps": 2}
    whole = learn(photos, tmp_path / "whole", **fields)
    with monkeypatch.context() as patch:
        stop_at(4, patch)
        with pytest.raises(Interrupted):
            learn(photos, tmp_path / "parts", **fields)
    parts = learn(photos, tmp_path / "parts", **fields)
    assert_same_weights(weights(parts.model), weights(whole.model))
    for name in (LOG, METRICS, "model.safetensors"):
        assert (parts.output_dir / name).read_bytes() == (whole.output_dir / name).read_bytes(), name


def test_it_continues_from_a_checkpoint_without_local_views(photos: Path, tmp_path: Path) -> None:
    learn(photos, tmp_path / "first", epochs=1)
    again = learn(photos, tmp_path / "again", model=str(tmp_path / "first"), model_config={}, epochs=1, local_views=0)
    assert again.metrics["eval_loss"] > 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mixup": 0.2}, "LeJEPA does not mix images or weigh classes: remove mixup=0.2"),
        ({"trained": "lora"}, "LeJEPA trains the whole encoder: remove trained=lora"),
        ({"global_views": 0}, "global_views must be at least 1, got 0"),
        (
            {"global_views": 1, "local_views": 0},
            "lejepa compares views: global_views=1 needs local_views of at least 1",
        ),
        (
            {"compile": True, "compile_mode": "reduce-overhead"},
            "or the local_views of lejepa: set compile_mode to default",
        ),
        ({"sigreg_weight": 1.5}, "sigreg_weight must be at most 1, got 1.5"),
    ],
)
def test_what_cannot_work_is_refused(photos: Path, tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        learn(photos, tmp_path / "run", **fields)
    assert not (tmp_path / "run" / LOG).exists()


def test_a_dry_run(photos: Path, tmp_path: Path) -> None:
    cost = rehearse(tiny_recipe(photos, tmp_path / "run", task="lejepa"))
    assert cost is not None and cost.training_flops > 3 * cost.forward_flops and not [*tmp_path.iterdir()]
