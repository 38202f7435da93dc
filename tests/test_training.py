"""The loop: it learns, it resumes to the bit, it refuses what cannot work."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from tiny_run import RECIPE, assert_same_weights, save_photos, tiny_recipe, weights

from hf_vit import HFViTConfig, HFViTForImageClassification, HFViTImageProcessor
from hf_vit import training as training_module
from hf_vit.training import CHECKPOINTS, LOG, METRICS, Interrupted, StopSignals, TrainConfig, build_model, train
from hf_vit.variants import config_of

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_photos(tmp_path_factory.mktemp("data") / "photos")


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch, signum: int = signal.SIGINT) -> None:
    """Have the process get a signal in the middle of `step`."""
    apply = training_module.Schedule.apply

    def apply_and_stop(self: Any, optimizer: Any, learning_rate: float, current: int) -> float:
        if current == step:
            os.kill(os.getpid(), signum)
        return apply(self, optimizer, learning_rate, current)

    monkeypatch.setattr(training_module.Schedule, "apply", apply_and_stop)


# ---------------------------------------------------------------------------------------------------- a whole run


def test_a_run_learns_and_leaves_a_model(photos: Path, tmp_path: Path) -> None:
    run = train(tiny_recipe(photos, tmp_path / "run", epochs=8))
    assert run.metrics["eval_accuracy"] == 1.0
    assert run.metrics["eval_count"] == 21 and run.metrics["train_images"] == 54
    losses = [row["loss"] for row in run.log if "loss" in row]
    assert losses[-1] < 0.6 * losses[0]
    assert log_of(tmp_path / "run") == run.log
    assert json.loads((tmp_path / "run" / METRICS).read_text()) == run.metrics

    loaded = HFViTForImageClassification.from_pretrained(tmp_path / "run")
    assert_same_weights(weights(loaded), weights(run.model))
    assert loaded.config.id2label == {0: "blue", 1: "green", 2: "red"}
    processor = HFViTImageProcessor.from_pretrained(tmp_path / "run")
    assert processor.to_dict() == run.processor.to_dict()

    classify = transformers.pipeline("image-classification", str(tmp_path / "run"), trust_remote_code=True)
    rows = run.data.evaluation
    answers = [classify(image, top_k=1)[0]["label"] for image in rows["image"]]
    assert answers == [run.data.label_names[label] for label in rows["label"]]


def test_the_recipe_that_is_saved_is_the_run(photos: Path, tmp_path: Path) -> None:
    config = tiny_recipe(photos, tmp_path / "run", max_steps=2)
    run = train(config)
    assert TrainConfig.from_recipe(tmp_path / "run" / "recipe.yaml") == config
    assert run.metrics["steps"] == 2


def test_every_checkpoint_is_a_model(photos: Path, tmp_path: Path) -> None:
    train(tiny_recipe(photos, tmp_path, max_steps=5, save_every=2, keep_checkpoints=3))
    checkpoints = sorted((tmp_path / CHECKPOINTS).iterdir())
    assert [path.name for path in checkpoints] == ["step-00000002", "step-00000004", "step-00000005"]
    for path in checkpoints:
        assert HFViTForImageClassification.from_pretrained(path).num_parameters() > 0
        assert HFViTImageProcessor.from_pretrained(path).size == {"height": 8, "width": 8}


def test_fine_tuning_at_another_size_with_other_labels(photos: Path, tmp_path: Path, tiny_config: Any) -> None:
    base = HFViTForImageClassification(tiny_config(image_size=16, num_labels=7))
    base.save_pretrained(tmp_path / "base")
    HFViTImageProcessor.from_preset("timm", 16).save_pretrained(tmp_path / "base")
    config = tiny_recipe(
        photos, tmp_path / "run", model=str(tmp_path / "base"), model_config={"drop_path_rate": 0.1}, image_size=24
    )
    model, processor = build_model(config, ["a", "b", "c"])
    assert model.config.drop_path_rate == 0.1 and model.config.image_shape == (24, 24)
    assert model.config.num_labels == 3
    assert model.classifier.weight.shape == (3, 32) and not model.classifier.weight.any()
    assert torch.equal(model.vit.layers[1].mlp.fc1.weight, base.vit.layers[1].mlp.fc1.weight)
    assert processor.crop_pct == 0.9 and processor.size == {"height": 24, "width": 24}


def test_a_variant_by_name(tmp_path: Path) -> None:
    config = TrainConfig(model="ViT-Ti/16", model_config={"num_hidden_layers": 1}, image_size=[32, 48])
    model, processor = build_model(config, ["a", "b"])
    assert model.config.hidden_size == config_of("ViT-Ti/16").hidden_size and model.config.num_hidden_layers == 1
    assert model.config.image_shape == (32, 48) and processor.size == {"height": 32, "width": 48}


def test_wide_initial_positions() -> None:
    config = TrainConfig(**{**RECIPE, "position_std": 0.5, "image_size": 64})
    model, _ = build_model(config, ["a", "b"])
    tables = model.vit.embeddings.position_embeddings
    assert 0.4 < tables.table.weight.std() < 0.55
    assert model.vit.embeddings.cls_token.std() < 0.1


# ------------------------------------------------------------------------------------------------- exact resume


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_workers": 2, "augmentation": "trivial"},
        {"mixup": 0.5, "cutmix": 0.5, "label_smoothing": 0.1, "accumulation_steps": 2, "cache": "ram"},
        {"optimizer": "sgd", "schedule": "linear", "cooldown_epochs": 1, "log_every": 4, "save_every": 4},
    ],
    ids=["plain", "workers", "mixing-accumulated", "sgd"],
)
def test_resumed_is_equal_to_uninterrupted(
    fields: dict[str, Any], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(tiny_recipe(photos, tmp_path / "whole", **fields))
    with monkeypatch.context() as patch:
        stop_at(4, patch)  # of 9 steps: in the middle of the second epoch, and of a line of the log
        with pytest.raises(Interrupted, match="Stopped by SIGINT behind step 5 of 9; saved in") as stopped:
            train(tiny_recipe(photos, tmp_path / "parts", **fields))
    assert stopped.value.exit_code == 130
    torch.manual_seed(12345)  # another process has another state
    parts = train(tiny_recipe(photos, tmp_path / "parts", **fields))
    assert_same_weights(weights(parts.model), weights(whole.model))
    assert parts.log == whole.log
    assert (tmp_path / "parts" / LOG).read_text() == (tmp_path / "whole" / LOG).read_text()


def test_a_damaged_checkpoint_costs_its_steps_and_nothing_else(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train(tiny_recipe(photos, tmp_path / "whole"))
    with monkeypatch.context() as patch:
        stop_at(6, patch, signal.SIGTERM)
        with pytest.raises(Interrupted) as stopped:
            train(tiny_recipe(photos, tmp_path / "parts", save_every=3))
    assert stopped.value.exit_code == 143
    newest = tmp_path / "parts" / CHECKPOINTS / "step-00000007" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    parts = train(tiny_recipe(photos, tmp_path / "parts", save_every=3))
    printed = capsys.readouterr().out
    assert "Passed over step-00000007: model.safetensors is not what was written." in printed
    assert "step-00000006: 6 of 9 steps are done" in printed
    assert_same_weights(weights(parts.model), weights(whole.model))
    assert parts.log == whole.log


def test_a_finished_run_is_not_trained_again(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train(tiny_recipe(photos, tmp_path))
    stop_at(0, monkeypatch)  # a step would raise
    again = train(tiny_recipe(photos, tmp_path))
    assert_same_weights(weights(again.model), weights(first.model))
    assert again.log == first.log and again.metrics["eval_accuracy"] == first.metrics["eval_accuracy"]


def test_another_recipe_does_not_go_on_with_a_run(photos: Path, tmp_path: Path) -> None:
    train(tiny_recipe(photos, tmp_path, max_steps=2))
    with pytest.raises(
        ValueError, match=r"holds a run of another recipe \(seed 0 -> 1\): choose another --output-dir"
    ):
        train(tiny_recipe(photos, tmp_path, max_steps=2, seed=1))
    train(tiny_recipe(photos, tmp_path, max_steps=2, num_workers=1, save_every=1))  # these change no weight
    foreign = tmp_path / "notes.txt"
    foreign.write_text("mine")
    run = train(tiny_recipe(photos, tmp_path, max_steps=3, seed=1, resume="never"))
    assert run.metrics["steps"] == 3 and foreign.read_text() == "mine"


def test_seeds_differ_and_repeat(photos: Path, tmp_path: Path) -> None:
    runs = [
        train(tiny_recipe(photos, tmp_path / str(index), max_steps=2, seed=seed))
        for index, seed in enumerate((0, 0, 1))
    ]
    assert_same_weights(weights(runs[0].model), weights(runs[1].model))
    assert runs[0].log != runs[2].log


def test_the_second_ctrl_c_ends_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), StopSignals() as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals.received == signal.SIGINT
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signals.before[signal.SIGINT]


# ------------------------------------------------------------------------------------------------------ refusals


def test_a_loss_that_is_not_finite_names_the_step(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply = training_module.Schedule.apply
    monkeypatch.setattr(
        training_module.Schedule,
        "apply",
        lambda self, optimizer, rate, step: apply(self, optimizer, float("nan") if step == 3 else rate, step),
    )
    with pytest.raises(FloatingPointError, match="The loss of step 5 is nan"):  # step 4 spoils the weights
        train(tiny_recipe(photos, tmp_path, log_every=100, save_every=4))
    assert [path.name for path in (tmp_path / CHECKPOINTS).iterdir()] == ["step-00000004"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"learning_rat": 0.1}, "Unknown field 'learning_rat' of a recipe: the nearest is 'learning_rate'"),
        ({"learning_rate": "fast"}, "learning_rate is a number, got 'fast'"),
        ({"cache": "disk"}, "cache must be one of none, ram, got 'disk'"),
        ({"precision": "int8"}, "precision must be one of auto, fp32, bf16, fp16, got 'int8'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_a_recipe_refuses(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_recipe("digits", **overrides)


def test_an_unknown_recipe_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no recipe 'flower': give a YAML file or one of digits, flowers"):
        TrainConfig.from_recipe("flower")


RECIPES = sorted((ROOT / "hf_vit" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_builds_and_says_what_to_expect(path: Path) -> None:
    text = path.read_text()
    header = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    for word in ("Source:", "Command:", "Hardware:", "Time:", "Result:"):
        assert f"# {word}" in header, f"{path.name} does not state {word}"
    config = TrainConfig.from_recipe(path.stem)
    assert yaml.safe_load(config.to_yaml())["data"] == config.data
    model, _ = build_model(config, ["a", "b"])
    assert isinstance(model.config, HFViTConfig)


def test_overrides_reach_the_architecture_and_texts_become_numbers() -> None:
    config = TrainConfig.from_recipe("digits", **{"model_config.hidden_size": 48, "learning_rate": "1e-3"})
    assert config.model_config["hidden_size"] == 48 and config.model_config["patch_size"] == 2
    assert config.learning_rate == 0.001


# ------------------------------------------------------------------------------------------------------ processes


def command(recipe: Path, output_dir: Path, *launcher: str) -> list[str]:
    script = str(ROOT / "scripts" / "train.py")
    return [sys.executable, *launcher, script, "--recipe", str(recipe), "--output-dir", str(output_dir)]


@pytest.fixture
def recipe(photos: Path, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny_recipe(photos, tmp_path, epochs=20, save_every=2, model_config=_without_dropout()).to_yaml())
    return path


def _without_dropout() -> dict[str, Any]:
    return {**RECIPE["model_config"], "hidden_dropout_prob": 0.0}  # each process draws its own


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.mark.slow
def test_killed_runs_end_as_one_that_was_not(recipe: Path, tmp_path: Path) -> None:
    subprocess.run(command(recipe, tmp_path / "whole"), check=True, env=environment(), capture_output=True)
    log = tmp_path / "parts" / LOG
    for lines in (6, 15):
        process = subprocess.Popen(command(recipe, tmp_path / "parts"), env=environment(), stderr=subprocess.DEVNULL)
        while process.poll() is None and (not log.exists() or len(log.read_text().splitlines()) < lines):
            time.sleep(0.005)
        process.kill()
        process.wait()
    subprocess.run(command(recipe, tmp_path / "parts"), check=True, env=environment(), capture_output=True)
    assert (tmp_path / "parts" / LOG).read_text() == (tmp_path / "whole" / LOG).read_text()
    whole, parts = (HFViTForImageClassification.from_pretrained(tmp_path / name) for name in ("whole", "parts"))
    assert_same_weights(weights(parts), weights(whole))


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(recipe: Path, tmp_path: Path) -> None:
    log = tmp_path / "run" / LOG
    process = subprocess.Popen(
        command(recipe, tmp_path / "run"), env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not log.exists() or not log.read_text():
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "The same command goes on from there:" in errors and "Traceback" not in errors


@pytest.mark.slow
def test_two_processes_learn_as_one(recipe: Path, tmp_path: Path) -> None:
    # `accelerate launch --cpu` takes MPI for more than one process; torchrun gives the same environment.
    two = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    for name, launcher in {"one": (), "two": two}.items():
        subprocess.run(
            command(recipe, tmp_path / name, *launcher),
            check=True,
            env={**environment(), "ACCELERATE_USE_CPU": "true"},
        )
    one, both = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    assert len(one) == len(both)
    for row, other in zip(one, both, strict=True):
        assert other == pytest.approx(row, rel=1e-3, abs=1e-4)
    assert both[-1]["eval_count"] == 21  # not divisible by two processes times eight images
    assert json.loads((tmp_path / "two" / METRICS).read_text())["processes"] == 2
