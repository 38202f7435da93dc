"""`fit` from images to a folder: what it writes, what it states, and that an interrupted one continues."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import DatasetDict
from tiny_run import assert_same_weights, colored_dataset, colored_images, stop_at, weights
from typer.testing import CliRunner

import hf_vit
from hf_vit.checkpoints.models import load
from hf_vit.cli.main import app
from hf_vit.system.stopping import Interrupted
from hf_vit.training.fitting import fit as fit_module
from hf_vit.training.fitting import race as race_module
from hf_vit.training.fitting.fit import fit
from hf_vit.training.fitting.race import Candidate
from hf_vit.training.recipe import TrainConfig
from hf_vit.training.run import check_output_dir


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "photos"
    DatasetDict({"train": colored_dataset(45, 0), "test": colored_dataset(21, 1)}).save_to_disk(str(folder))
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = hf_vit.HFViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, patch_size=4, image_size=8,
        hidden_dropout_prob=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoder") / "tiny"
    hf_vit.HFViTImageProcessor.from_preset("original", (8, 8)).save_pretrained(folder)
    hf_vit.HFViTModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def options(encoder: str, tmp_path: Path) -> dict[str, Any]:
    return {"model": encoder, "cache": tmp_path / "cache", "minutes": 0}


def test_a_linear_probe_is_a_complete_model(photos: Path, options: dict[str, Any], tmp_path: Path) -> None:
    lines: list[str] = []
    fitted = fit(str(photos), output_dir=tmp_path / "mine", say=lines.append, **options)
    metrics = json.loads((tmp_path / "mine" / "metrics.json").read_text())
    assert fitted.metrics["method"] == metrics["method"] == "probe" and fitted.metrics == metrics
    assert metrics["eval_accuracy"] > 0.9 and metrics["eval_count"] == 21
    assert metrics["expected"]["low"] <= metrics["eval_accuracy"] <= metrics["expected"]["high"]
    assert {"read", "embed", "probe", "race", "final", "total"} == set(metrics["seconds"])
    card = (tmp_path / "mine" / "README.md").read_text()
    for words in ("What was tried", "linear probe", "95% prediction interval", "minutes=0", "confusion.png"):
        assert words in card
    assert any("Linear probe: accuracy" in line for line in lines)
    model, processor = load(tmp_path / "mine")
    images = colored_dataset(21, 1)
    with torch.no_grad():
        logits = model(**processor(images["image"][:], return_tensors="pt")).logits
    assert model.config.temperature == metrics["temperature"] != 1
    accuracy = (logits.argmax(dim=-1) == torch.tensor(images["label"][:])).float().mean()
    assert accuracy.item() == pytest.approx(metrics["eval_accuracy"])
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(images["label"][:]))
    assert loss.item() == pytest.approx(metrics["eval_loss"], abs=1e-4)
    # The same command says that it is finished.
    lines.clear()
    again = fit(str(photos), output_dir=tmp_path / "mine", say=lines.append, **options)
    assert again.metrics == fitted.metrics and "holds the finished result" in lines[0]
    with pytest.raises(ValueError, match="seed 0 -> 1"):
        fit(str(photos), output_dir=tmp_path / "mine", seed=1, say=lines.append, **options)


@pytest.mark.parametrize("pooling", ("cls", "mean", "cls_and_mean"))
def test_the_model_of_a_probe_has_its_logits(
    pooling: str, photos: Path, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit_head = fit_module.fit_head

    def with_one_pooling(features: Any, *arguments: Any) -> Any:
        return fit_head({pooling: features[pooling]}, *arguments)

    monkeypatch.setattr(fit_module, "fit_head", with_one_pooling)
    reports: list[Any] = []
    monkeypatch.setattr(fit_module, "write_fit", lambda report, folder: reports.append(report) or METRICS)
    fit(str(photos), output_dir=tmp_path / "mine", say=lambda line: None, **options)
    model, processor = load(tmp_path / "mine")
    assert model.config.pooling == pooling
    with torch.no_grad():
        logits = model(**processor(colored_dataset(21, 1)["image"][:], return_tensors="pt")).logits
    torch.testing.assert_close(logits, reports[0].evaluated[0], atol=1e-3, rtol=1e-3)


METRICS = {
    "method": "probe",
    "metric": "accuracy",
    "expected": {"score": 1, "low": 1, "high": 1, "new_images": 0, "source": "", "images": 1},
    "seconds": {"total": 0},
}


def test_nothing_is_held_out_without_an_evaluation_split(
    photos: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    from datasets import load_from_disk

    load_from_disk(str(photos / "train")).save_to_disk(str(tmp_path / "alone"))
    lines: list[str] = []
    metrics = fit(str(tmp_path / "alone"), output_dir=tmp_path / "mine", say=lines.append, **options).metrics
    assert metrics["train_images"] == 45 and "eval_accuracy" not in metrics
    assert metrics["expected"]["images"] == 45 and metrics["expected"]["new_images"] is None
    assert "45 training images, no evaluation split" in lines[0]
    assert any("95% confidence interval" in line for line in lines) and lines[-4] == "Next:"


def fit_with_a_race(
    photos: Path,
    options: dict[str, Any],
    folder: Path,
    patch: pytest.MonkeyPatch,
    methods: tuple[str, ...],
    **budget: Any,
) -> Any:
    """Fit with a race of a few steps, whose best candidate is chosen."""
    patch.setattr(race_module, "_budget", lambda *arguments: {"candidates": len(methods), **budget})
    patch.setattr(race_module, "beats", lambda *arguments, **options: (True, "is better"))
    candidates = [Candidate(method, 1e-3) for method in methods]
    return fit(
        str(photos), output_dir=folder, candidates=candidates, say=lambda line: None, **{**options, "minutes": 9}
    )


def test_the_winner_is_fine_tuned_on_everything(
    photos: Path, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted = fit_with_a_race(photos, options, tmp_path / "mine", monkeypatch, ("all",), steps=[4], final=6)
    assert fitted.metrics["method"] == "all 1e-03"
    [row] = fitted.metrics["race"]
    assert row["steps"] == 4 and 0 <= row["score"] <= 1
    assert fitted.metrics["expected"]["images"] == 9  # the held-out fold
    assert "full fine-tuning | 0.001 | 4" in (tmp_path / "mine" / "README.md").read_text()
    recipe = (tmp_path / "mine" / "recipe.yaml").read_text()
    assert "max_steps: 6" in recipe and "learning_rate: 0.001" in recipe
    assert (tmp_path / "mine" / "fit" / "probe" / "model.safetensors").is_file()
    assert load(tmp_path / "mine")[0].config.temperature == fitted.metrics["temperature"]


def test_without_time_for_more_the_model_of_the_race_is_kept(
    photos: Path, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted = fit_with_a_race(photos, options, tmp_path / "mine", monkeypatch, ("all",), steps=[4], final=0)
    assert fitted.metrics["method"] == "all 1e-03" and fitted.metrics["train_images"] == 36
    assert fitted.metrics["eval_accuracy"] > 0.9
    assert not (tmp_path / "mine" / "recipe.yaml").exists()
    assert not [path for path in (tmp_path / "mine" / "fit").iterdir() if path.is_dir()]


def test_a_race_that_takes_too_long_is_given_up(
    photos: Path, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = iter([3.0, 2.0])  # before two steps
    monkeypatch.setattr(fit_module._Fitting, "left", lambda self: next(left, -26.0))
    plan = {"steps": [4], "final": 6, "seconds": 100.0}
    fitted = fit_with_a_race(photos, options, tmp_path / "mine", monkeypatch, ("all",), **plan)
    assert fitted.metrics["method"] == "probe" and fitted.metrics["race"] == [] and not list(left)
    assert "training became slower than measured" in (tmp_path / "mine" / "README.md").read_text()


def test_more_minutes_continue_a_finished_fit(
    photos: Path, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    options = {**options, "output_dir": tmp_path / "mine", "say": lines.append}
    fit(str(photos), **{**options, "minutes": 0})
    monkeypatch.setattr(race_module, "_speed", lambda *arguments: {"steps_per_second": 10.0, "overhead": 1.0})
    monkeypatch.setattr(race_module, "MOST_EPOCHS", 2)
    candidates = [Candidate("all", 1e-3)]
    longer = fit(str(photos), **{**options, "minutes": 3}, candidates=candidates)
    assert any(line.startswith("Continuing the fit") for line in lines)
    assert longer.metrics["race"] and longer.metrics["minutes"] == 3
    assert longer.metrics["seconds"]["total"] < 60 * 3  # the minutes of the first fit do not count
    again = fit(str(photos), **{**options, "minutes": 2}, candidates=candidates)
    assert any("finished result of this command (--minutes 3)" in line for line in lines)
    assert again.metrics == longer.metrics


def test_a_machine_that_is_too_slow_for_a_race_is_noticed_after_one_step(
    photos: Path, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(race_module, "_fewest_steps", lambda epoch: 10**9)
    fitted = fit(str(photos), output_dir=tmp_path / "mine", say=lambda line: None, **{**options, "minutes": 1})
    assert fitted.metrics["method"] == "probe" and fitted.metrics["race"] == []


def test_a_race_that_cannot_fit_is_not_measured(
    photos: Path, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forwards of the features show the time of a step."""
    monkeypatch.setattr(race_module, "STEP_IN_FORWARDS", 10**6)
    monkeypatch.setattr(race_module, "_speed", lambda *arguments: pytest.fail("measured"))
    options = {**options, "cache": tmp_path / "cache", "minutes": 1}
    fitted = fit(str(photos), output_dir=tmp_path / "mine", say=lambda line: None, **options)
    assert re.search(
        r"its \d+ steps would take about \d+ s, .* Give [\d,]+ more minutes? to try it", fitted.metrics["why"]
    )


@pytest.mark.slow
def test_the_best_candidates_get_more_steps(
    photos: Path, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = ("all", "lora", "head")
    fitted = fit_with_a_race(photos, options, tmp_path / "mine", monkeypatch, methods, steps=[2, 4], final=5)
    rows = fitted.metrics["race"]
    assert [row["steps"] for row in rows] == [2, 2, 2, 4, 4]
    best = sorted(rows[:3], key=lambda row: (-row["score"], row["loss"]))[:2]
    assert [row["method"] for row in best] == [row["method"] for row in rows[3:]]
    assert fitted.metrics["method"] in {f"{row['method']} 1e-03" for row in best}
    assert fitted.metrics["eval_accuracy"] > 0.9  # it starts from the fitted head


@pytest.mark.slow
@pytest.mark.parametrize("step", (2, 5))  # in the race, and in the final training
def test_an_interrupted_fit_continues_exactly(
    step: int,
    photos: Path,
    options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    one_thread: None,
) -> None:
    race = {"methods": ("all",), "steps": [4], "final": 6}
    whole = fit_with_a_race(photos, options, tmp_path / "whole", monkeypatch, **race)
    with monkeypatch.context() as patch, pytest.raises(Interrupted) as stopped:
        stop_at(step, patch)
        fit_with_a_race(photos, options, tmp_path / "stopped", patch, **race)
    assert stopped.value.exit_code == 130
    again = fit_with_a_race(photos, options, tmp_path / "stopped", monkeypatch, **race)
    assert again.metrics["race"][0]["score"] == whole.metrics["race"][0]["score"]
    assert_same_weights(weights(load(tmp_path / "stopped")[0]), weights(load(tmp_path / "whole")[0]))


def test_the_command(photos: Path, encoder: str, tmp_path: Path) -> None:
    arguments = ["fit", str(photos), "--model", encoder, "--minutes", "0", "-o", str(tmp_path / "mine")]
    result = CliRunner().invoke(app, [*arguments, "--cache", str(tmp_path / "cache"), "--image-size", "8"])
    assert result.exit_code == 0, result.output
    assert "Accuracy to expect on new images" in result.output
    result = CliRunner().invoke(app, ["fit", str(photos), "--model", encoder, "-o", encoder])
    assert result.exit_code == 2 and "choose another --output-dir" in result.output


def test_a_fitted_model_is_evaluated_on_all_images_of_a_folder(tmp_path: Path, encoder: str) -> None:
    for index, (image, label) in enumerate(zip(*colored_images(24, 0), strict=True)):
        for split in ("train", "other"):
            path = tmp_path / split / f"color {label}" / f"{index:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    fitted = fit(
        str(tmp_path / "train"), model=encoder, minutes=0, output_dir=tmp_path / "mine", cache=tmp_path, say=print
    )
    other, same = (fitted.evaluate(tmp_path / name) for name in ("other", "train"))
    assert other["images"] == same["images"] == 24
    assert "trained on other data (train)" in other["note"] and "trained on all of these images" in same["note"]
    assert "copies of the training images are not noticed" in other["note"]
    assert other["expected"] is not None and same["expected"] is None  # it is for new images
    with pytest.raises(ValueError, match="No such file or folder"):
        hf_vit.TrainedModel(tmp_path / "missing")
    with pytest.raises(ValueError, match="is the data folder"):
        fit(str(tmp_path / "train"), model=encoder, minutes=0, output_dir=tmp_path / "train", say=print)
    with pytest.raises(ValueError, match="hf-vit fit wrote"):
        check_output_dir(TrainConfig(output_dir=str(tmp_path / "mine")))
