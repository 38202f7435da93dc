"""A run that was stopped, by whatever, ends as one that was not: the same bits of weights, metrics and log."""

import errno
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import assert_same_weights, colored_dataset, save_photos, spoil_loss, stop_at, tiny_recipe, weights

from hf_vit import HFViTForImageClassification
from hf_vit.system.stopping import Interrupted, StopSignals
from hf_vit.training import checkpointing
from hf_vit.training import run as run_module
from hf_vit.training.checkpointing import load_state
from hf_vit.training.loop import train
from hf_vit.training.optim import Schedule
from hf_vit.training.run import CHECKPOINTS, LOG, METRICS, Run
from hf_vit.training.state import RunLog
from hf_vit.training.tasks import TASKS


class Killed(BaseException):
    """Stands for SIGKILL in this process: nothing but the files is left."""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_photos(tmp_path_factory.mktemp("data") / "photos")


def shards(folder: Path) -> Path:
    for number in range(3):
        colored_dataset(18, number).to_parquet(str(folder / f"train-{number}.parquet"))
    colored_dataset(21, 9).to_parquet(str(folder / "test.parquet"))
    return folder


def assert_same_run(parts: Run, whole: Run) -> None:
    assert_same_weights(weights(parts.model), weights(whole.model))
    for name in (LOG, METRICS, "model.safetensors", "config.json", "preprocessor_config.json"):
        assert (parts.output_dir / name).read_bytes() == (whole.output_dir / name).read_bytes(), name


AUTOENCODER = {
    "mim_objective": "autoencoder",
    "decoder_hidden_size": 8,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "workers": {"num_workers": 2, "augmentation": "trivial", "erasing": 0.3},
    "mixing-accumulated-kept": {
        "mixup": 0.5, "cutmix": 0.5, "label_smoothing": 0.1, "accumulation_steps": 2, "cache": "ram", "ema_decay": 0.9,
    },
    "sgd": {"optimizer": "sgd", "schedule": "linear", "cooldown_epochs": 1, "log_every": 4, "save_every": 4},
    "lion": {"optimizer": "lion", "layer_decay": 0.7, "ema_decay": 0.99, "num_workers": 1},
    "lamb": {"optimizer": "lamb", "gradient_checkpointing": True},
    "muon": {"optimizer": "muon", "position_lr_scale": 3.0, "accumulation_steps": 4},
    "drop-path": {"model_config": {"drop_path_rate": 0.3, "patch_dropout_prob": 0.2}, "augmentation": "augreg_light2"},
    "stream": {"streaming": True, "shuffle_buffer": 7, "num_workers": 1, "ema_decay": 0.9},
    "masked": {"task": "masked_patches", "mask_ratio": 0.4},
    "masked-paper": {"task": "masked_patches", "model_config": {"mim_objective": "mean_color"}},
    "autoencoder": {"task": "masked_patches", "mask_ratio": 0.75, "model_config": AUTOENCODER, "ema_decay": 0.9},
    "head": {"trained": "head"},
    "lora": {"trained": "lora", "lora_rank": 2, "ema_decay": 0.9, "best_metric": "loss"},
    "balanced": {"sampling": "balanced", "accumulation_steps": 2, "num_workers": 1},
    "best": {"best_metric": "accuracy", "learning_rate": 1e-6, "keep_last": True, "eval_every": 0.5},
    "skip": {"on_nonfinite": "skip", "mixup": 0.2},
    "bf16": {"precision": "bf16"},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_is_equal_to_uninterrupted(
    kind: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = dict(KINDS[kind])
    fields["model_config"] = {**tiny_recipe(photos, tmp_path).model_config, **fields.get("model_config", {})}
    data = shards(tmp_path / "shards") if kind == "stream" else photos
    if kind == "skip":
        spoil_loss(monkeypatch, step=2)
    whole = train(tiny_recipe(data, tmp_path / "whole", **fields))
    with monkeypatch.context() as patch:
        stop_at(4, patch)  # of 9 steps: in the middle of the second epoch, and of a line of the log
        with pytest.raises(Interrupted, match="Stopped by SIGINT after step 5 of 9; saved in") as stopped:
            train(tiny_recipe(data, tmp_path / "parts", **fields))
    assert stopped.value.exit_code == 130
    torch.manual_seed(12345)  # another process has another state
    assert_same_run(train(tiny_recipe(data, tmp_path / "parts", **fields)), whole)


def test_the_keys_of_a_saved_state_are_a_file_format(photos: Path, tmp_path: Path) -> None:
    train(tiny_recipe(photos, tmp_path, max_steps=1))
    state = load_state(tmp_path / CHECKPOINTS / "step-00000001")
    keys = "average broken identity images_an_epoch is_evaluation_due log optimizer pace pending processes scaler step"
    assert sorted({*state} - {"split", "best"}) == keys.split()  # a run that an earlier version began resumes
    assert (state["split"], state["best"]) == (1, None)  # and lacks these
    assert sorted(state["pace"]) == ["images", "seconds", "training_seconds", "waited_seconds"]
    assert sorted(state["broken"]) == ["evaluation", "training"]


def test_fine_tuning_at_another_size_resumes(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tiny_recipe(photos, tmp_path / "base", epochs=1))
    fields = {"model": str(tmp_path / "base"), "image_size": 12, "model_config": {}}
    whole = train(tiny_recipe(photos, tmp_path / "whole", **fields))
    with monkeypatch.context() as patch:
        stop_at(4, patch)
        with pytest.raises(Interrupted):
            train(tiny_recipe(photos, tmp_path / "parts", **fields))
    assert_same_run(train(tiny_recipe(photos, tmp_path / "parts", **fields)), whole)


@pytest.mark.parametrize("epoch", [1, 3])
def test_a_signal_in_an_evaluation_saves_at_once(
    epoch: int, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"ema_decay": 0.9, "save_every": 100}
    whole = train(tiny_recipe(photos, tmp_path / "whole", **fields))
    heeded, calls = StopSignals.heeded, []

    def stopping(self: StopSignals, *arguments: Any) -> Any:
        calls.append(1)
        for batch in heeded(self, *arguments):
            if len(calls) == epoch:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(StopSignals, "heeded", stopping)
        with pytest.raises(Interrupted, match=f"Stopped by SIGTERM after step {3 * epoch} of 9; saved in"):
            train(tiny_recipe(photos, tmp_path / "parts", **fields))
    assert len(calls) == epoch
    assert_same_run(train(tiny_recipe(photos, tmp_path / "parts", **fields)), whole)


PLACES: dict[str, tuple[Any, str, int]] = {
    "a step": (Schedule, "apply", 5),
    "an evaluation": (TASKS["classification"], "evaluate", 2),
    "writing a line of the log": (RunLog, "add", 6),
    "saving the model of a checkpoint": (run_module, "save_model", 2),
    "saving the state of a checkpoint": (checkpointing.torch, "save", 2),
    "syncing a checkpoint": (checkpointing, "sync", 11),
    "renaming a checkpoint": (Path, "rename", 2),
    "removing an old checkpoint": (checkpointing.shutil, "rmtree", 4),
    "saving the final model": (run_module, "save_model", 5),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("is_behind", [False, True], ids=["before", "behind"])
def test_a_kill_at_any_place_costs_nothing(
    place: str, is_behind: bool, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"save_every": 2, "ema_decay": 0.9, "mixup": 0.2}
    whole = train(tiny_recipe(photos, tmp_path / "whole", **fields))
    owner, name, times = PLACES[place]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, _killing(getattr(owner, name), times, is_behind))
        with pytest.raises(Killed):
            train(tiny_recipe(photos, tmp_path / "parts", **fields))
    assert_same_run(train(tiny_recipe(photos, tmp_path / "parts", **fields)), whole)


def _killing(function: Callable[..., Any], times: int, is_behind: bool) -> Callable[..., Any]:
    calls = {"number": 0}

    def wrapped(*arguments: Any, **options: Any) -> Any:
        calls["number"] += 1
        if calls["number"] == times and not is_behind:
            raise Killed
        result = function(*arguments, **options)
        if calls["number"] == times:
            raise Killed
        return result

    return wrapped


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
    assert "Ignored step-00000007: model.safetensors is corrupt." in printed
    assert "step-00000006: 6 of 9 steps are done" in printed
    assert_same_run(parts, whole)


def test_without_a_whole_checkpoint_a_run_begins_anew(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train(tiny_recipe(photos, tmp_path / "whole"))
    train(tiny_recipe(photos, tmp_path / "parts", max_steps=9))
    for checkpoint in (tmp_path / "parts" / CHECKPOINTS).iterdir():
        (checkpoint / "manifest.json").unlink()
    parts = train(tiny_recipe(photos, tmp_path / "parts", epochs=3))
    assert capsys.readouterr().out.count("it has no manifest.json") == 2
    assert_same_run(parts, whole)


def test_a_full_disk_ends_the_run_and_leaves_what_was_saved(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(tiny_recipe(photos, tmp_path / "whole", save_every=2))
    save, calls = torch.save, {"number": 0}

    def full(*arguments: Any) -> None:
        calls["number"] += 1
        if calls["number"] == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(checkpointing.torch, "save", full)
        with pytest.raises(OSError, match="No space left for a checkpoint of step 6; earlier ones are intact"):
            train(tiny_recipe(photos, tmp_path / "parts", save_every=2))
    kept = sorted(path.name for path in (tmp_path / "parts" / CHECKPOINTS).iterdir())
    assert kept == ["step-00000002", "step-00000004"]
    assert HFViTForImageClassification.from_pretrained(tmp_path / "parts" / CHECKPOINTS / kept[-1])
    assert_same_run(train(tiny_recipe(photos, tmp_path / "parts", save_every=2)), whole)
