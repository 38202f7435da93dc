"""The loop: it learns, it resumes to the bit, it refuses what cannot work."""

import json
import shutil
import signal
import unittest.mock
from dataclasses import replace
from functools import partial, partialmethod
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate.optimizer import AcceleratedOptimizer
from tiny_run import (
    RECIPE,
    assert_same_weights,
    at_step,
    colored_dataset,
    colored_images,
    log_of,
    save_photos,
    spoil_loss,
    stop_at,
    tiny_recipe,
    weights,
)
from torch._dynamo.testing import CompileCounter

from hf_vit import HFViTConfig, HFViTForImageClassification, HFViTForMaskedImageModeling, HFViTImageProcessor
from hf_vit.system.stopping import Interrupted, StopSignals
from hf_vit.training import parallel
from hf_vit.training.loop import remaining_steps, train
from hf_vit.training.optim import Schedule
from hf_vit.training.parallel import compile_layers
from hf_vit.training.recipe import TrainConfig
from hf_vit.training.run import CHECKPOINTS, METRICS, TIMING
from hf_vit.training.tasks import Classification


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_photos(tmp_path_factory.mktemp("data") / "photos")


# ---------------------------------------------------------------------------------------------------- a whole run


def test_a_run_learns_and_leaves_a_model(photos: Path, tmp_path: Path) -> None:
    run = train(tiny_recipe(photos, tmp_path / "run", epochs=8))
    assert run.metrics["eval_accuracy"] == 1.0
    assert run.metrics["eval_count"] == 21 and run.metrics["train_images"] == 54
    losses = [row["loss"] for row in run.log if "loss" in row]
    assert losses[-1] < 0.6 * losses[0]
    assert log_of(tmp_path / "run") == run.log
    assert json.loads((tmp_path / "run" / METRICS).read_text()) == run.metrics
    assert json.loads((tmp_path / "run" / TIMING).read_text()) == run.timing
    assert run.timing["images_per_second"] > 0 and 0 <= run.timing["data_wait_share"] <= 1
    assert run.predictions is not None and run.predictions.metrics()["accuracy"] == 1.0

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
    run = train(tiny_recipe(photos, tmp_path / "run", max_steps=2, augmentation="augreg_light2"))
    assert TrainConfig.from_recipe(tmp_path / "run" / "recipe.yaml") == run.config
    assert run.config.mixup == 0.2  # what the augmentation's set brings is stated
    assert run.metrics["steps"] == 2


def test_steps_may_end_before_the_plan(photos: Path, tmp_path: Path) -> None:
    run = train(
        tiny_recipe(photos, tmp_path, max_steps=4, eval_every=100),
        steps=lambda run: islice(remaining_steps(run), 1),
    )
    assert run.metrics["steps"] == 1 and run.state.log.rows[-1]["step"] == 1 and "eval_accuracy" in run.metrics


def test_every_checkpoint_is_a_model(photos: Path, tmp_path: Path) -> None:
    train(tiny_recipe(photos, tmp_path, max_steps=5, save_every=2, keep_checkpoints=3))
    checkpoints = sorted((tmp_path / CHECKPOINTS).iterdir())
    assert [path.name for path in checkpoints] == ["step-00000002", "step-00000004", "step-00000005"]
    for path in checkpoints:
        assert HFViTForImageClassification.from_pretrained(path).num_parameters() > 0
        assert HFViTImageProcessor.from_pretrained(path).size == {"height": 8, "width": 8}


# ---------------------------------------------------------------------------------------------------- going on


def test_a_finished_run_is_not_trained_again(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train(tiny_recipe(photos, tmp_path))
    stop_at(0, monkeypatch)  # a step would raise
    again = train(tiny_recipe(photos, tmp_path))
    assert_same_weights(weights(again.model), weights(first.model))
    assert again.log == first.log and again.metrics["eval_accuracy"] == first.metrics["eval_accuracy"]


def test_another_recipe_does_not_go_on_with_a_run(photos: Path, tmp_path: Path) -> None:
    train(tiny_recipe(photos, tmp_path, max_steps=2))
    with pytest.raises(
        ValueError, match=r"holds a run with another recipe or other data \(seed 0 -> 1\): choose another --output-dir"
    ):
        train(tiny_recipe(photos, tmp_path, max_steps=2, seed=1))
    train(tiny_recipe(photos, tmp_path, max_steps=2, num_workers=1, save_every=1))  # these change no weight
    foreign = tmp_path / "notes.txt"
    foreign.write_text("mine")
    run = train(tiny_recipe(photos, tmp_path, max_steps=3, seed=1, resume="never"))
    assert run.metrics["steps"] == 3 and foreign.read_text() == "mine"


def test_a_model_is_not_replaced_by_what_is_made_of_it(photos: Path, tmp_path: Path) -> None:
    train(tiny_recipe(photos, tmp_path, max_steps=1))
    with pytest.raises(ValueError, match="holds the model to start from: choose another --output-dir"):
        train(tiny_recipe(photos, tmp_path, max_steps=1, model=str(tmp_path), model_config={}))


def test_other_data_does_not_go_on_with_a_run(tmp_path: Path) -> None:
    photos = save_photos(tmp_path / "photos")
    train(tiny_recipe(photos, tmp_path / "run", max_steps=2))
    shutil.rmtree(photos / "train")
    colored_dataset(55, seed=0).save_to_disk(str(photos / "train"))
    with pytest.raises(ValueError, match=r"other data \(training images 54 -> 55\)"):
        train(tiny_recipe(photos, tmp_path / "run", max_steps=2))


def test_seeds_differ_and_repeat(photos: Path, tmp_path: Path) -> None:
    runs = [
        train(tiny_recipe(photos, tmp_path / str(index), max_steps=2, seed=seed))
        for index, seed in enumerate((0, 0, 1))
    ]
    assert_same_weights(weights(runs[0].model), weights(runs[1].model))
    assert runs[0].log != runs[2].log


def test_the_second_ctrl_c_ends_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), StopSignals() as signals:
        signals.has_begun = True
        signal.raise_signal(signal.SIGINT)
        assert signals.received == signal.SIGINT
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signals.before[signal.SIGINT]


# ------------------------------------------------------------------------------------------------------ refusals


def test_a_loss_that_is_not_finite_names_the_step(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply = Schedule.apply
    monkeypatch.setattr(
        Schedule,
        "apply",
        lambda self, optimizer, rate, step: apply(self, optimizer, float("nan") if step == 3 else rate, step),
    )
    with pytest.raises(
        FloatingPointError, match="The loss or gradient of step 5 is not finite"
    ):  # step 4 spoils the weights
        train(tiny_recipe(photos, tmp_path, log_every=100, save_every=4))
    assert [path.name for path in (tmp_path / CHECKPOINTS).iterdir()] == ["step-00000004"]


@pytest.mark.parametrize("max_grad_norm", [1.0, None])
def test_a_gradient_that_is_not_finite_is_not_saved(
    max_grad_norm: float | None, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Spoiling(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, value: torch.Tensor) -> torch.Tensor:
            return value.clone()

        @staticmethod
        def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient * float("nan")

    measure, spoilt = Classification.loss, []

    def loss(self: Classification, *arguments: Any) -> torch.Tensor:
        value = measure(self, *arguments)
        return Spoiling.apply(value) if spoilt else value  # type: ignore[no-untyped-call]

    at_step(3, lambda: spoilt.append(True), monkeypatch)
    monkeypatch.setattr(Classification, "loss", loss)
    with pytest.raises(FloatingPointError, match="The loss or gradient of step 4 is not finite"):
        train(tiny_recipe(photos, tmp_path, save_every=1, max_grad_norm=max_grad_norm))
    assert max(path.name for path in (tmp_path / CHECKPOINTS).iterdir()) == "step-00000003"


def test_a_loss_that_is_not_finite_may_be_skipped(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil_loss(monkeypatch, step=4)
    run = train(tiny_recipe(photos, tmp_path, on_nonfinite="skip", accumulation_steps=2, ema_decay=0.9))
    assert [row["step"] for row in run.log if row.get("skipped")] == [5]
    assert "Skipped step 5: its loss or gradient is not finite." in capsys.readouterr().out
    assert all(tensor.isfinite().all() for tensor in run.model.state_dict().values())


# -------------------------------------------------------------------------------------------------- broken images


def photos_with_a_broken_one(folder: Path) -> Path:
    """Write a folder of images, of which one is half a file."""
    for index, (image, label) in enumerate(zip(*colored_images(60, 0), strict=True)):
        path = folder / ["blue", "green", "red"][label] / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    whole = (folder / "blue" / "03.png").read_bytes()
    (folder / "blue" / "03.png").write_bytes(whole[:100])
    return folder


@pytest.mark.parametrize("fields", [{}, {"cache": "ram"}, {"streaming": True}], ids=["files", "kept", "stream"])
def test_a_broken_image_is_listed(tmp_path: Path, fields: dict[str, Any]) -> None:
    photos = photos_with_a_broken_one(tmp_path / "photos")
    run = train(tiny_recipe(photos, tmp_path / "run", max_broken=0.1, epochs=2, **fields))
    assert run.metrics["broken_images"] == ["blue/03.png"]


def test_too_many_broken_images_end_the_run(tmp_path: Path) -> None:
    photos = photos_with_a_broken_one(tmp_path / "photos")
    with pytest.raises(ValueError, match=r"1 images of the .* data cannot be read, .*: blue/03.png"):
        train(tiny_recipe(photos, tmp_path / "run", max_broken=0, epochs=2))
    for name in ("blue/06", "blue/09", "green/07", "red/08"):
        (photos / f"{name}.png").write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"[45] images of the training data cannot be read"):
        train(tiny_recipe(photos, tmp_path / "run", eval_fraction=0.01, epochs=2))


def test_a_few_broken_images_never_end_a_run(tmp_path: Path) -> None:
    photos = photos_with_a_broken_one(tmp_path / "photos")
    run = train(tiny_recipe(photos, tmp_path / "run", max_broken=0.001, epochs=2))
    assert run.metrics["broken_images"] == ["blue/03.png"]


# ------------------------------------------------------------------------------------------------- kinds of runs


def test_the_average_of_the_weights_is_what_is_measured_and_saved(photos: Path, tmp_path: Path) -> None:
    plain = train(tiny_recipe(photos, tmp_path / "plain"))
    averaged = train(tiny_recipe(photos, tmp_path / "averaged", ema_decay=0.9))
    losses = [[row["loss"] for row in run.log if "loss" in row] for run in (plain, averaged)]
    assert losses[0] == losses[1]  # it changes nothing of the training
    assert plain.metrics["eval_loss"] != averaged.metrics["eval_loss"]
    saved = HFViTForImageClassification.from_pretrained(tmp_path / "averaged")
    assert_same_weights(weights(saved), weights(averaged.model))
    newest = sorted((tmp_path / "averaged" / CHECKPOINTS).iterdir())[-1]
    assert_same_weights(weights(HFViTForImageClassification.from_pretrained(newest)), weights(plain.model))


def test_from_masked_patches_to_a_linear_probe(photos: Path, tmp_path: Path) -> None:
    encoder = train(tiny_recipe(photos, tmp_path / "encoder", task="masked_patches", epochs=4))
    assert isinstance(encoder.model, HFViTForMaskedImageModeling) and encoder.predictions is None
    losses = [row["eval_loss"] for row in encoder.log if "eval_loss" in row]
    assert losses[-1] < losses[0] and encoder.metrics["eval_count"] == 21
    probe = train(tiny_recipe(photos, tmp_path / "probe", model=str(tmp_path / "encoder"), trained="head"))
    before, after = (run.model.vit.layers.state_dict() for run in (encoder, probe))
    assert_same_weights(before, after)
    assert probe.model.classifier.weight.abs().sum() > 0


@pytest.mark.parametrize(
    "fields",
    [
        {"optimizer": "lion", "learning_rate": 1e-3, "loss": "binary_cross_entropy", "mixup": 0.2},
        {"optimizer": "lamb", "gradient_checkpointing": True},
        {"optimizer": "muon", "cache": "device", "augmentation": "three", "color_jitter": 0.3, "erasing": 0.5},
        {"augmentation": "augreg_medium1", "warmup_steps": 2, "max_grad_norm": None},
        {"precision": "bf16", "layer_decay": 0.8},
        {"tracker": "tensorboard", "schedule": "constant", "cooldown_epochs": 1},
    ],
    ids=["lion", "lamb", "muon", "augreg", "bf16", "tensorboard"],
)
def test_fields_of_all_kinds_learn(photos: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    run = train(tiny_recipe(photos, tmp_path, epochs=6, **fields))
    losses = [row["loss"] for row in run.log if "loss" in row]
    assert losses[-1] < losses[0]
    assert bool(list(tmp_path.glob("runs/**/events*"))) == ("tracker" in fields)


def test_a_tracker_that_is_not_installed_is_refused(photos: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("hf_vit.training.parallel.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="tracker: wandb is not installed: pip install wandb"):
        train(tiny_recipe(photos, tmp_path, tracker="wandb"))


def test_half_precision_of_gpus_is_refused_on_the_cpu(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="precision: fp16 needs a GPU, and this run is on the CPU: set precision to"):
        train(tiny_recipe(photos, tmp_path / "run", precision="fp16"))


def test_a_step_that_the_gradient_scaler_skips_is_in_the_log(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AcceleratedOptimizer, "step_was_skipped", True)
    run = train(tiny_recipe(photos, tmp_path / "run", max_steps=2))
    assert [row["step"] for row in run.log if row.get("skipped")] == [1, 2]


def test_deterministic_algorithms_are_used_in_the_run_alone(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    plain = train(tiny_recipe(photos, tmp_path / "plain"))
    seen: list[bool] = []
    at_step(2, lambda: seen.append(torch.are_deterministic_algorithms_enabled()), monkeypatch)
    run = train(tiny_recipe(photos, tmp_path / "run", deterministic=True))
    assert seen == [True] and not torch.are_deterministic_algorithms_enabled()
    assert_same_weights(weights(run.model), weights(plain.model))
    assert train(tiny_recipe(photos, tmp_path / "plain", deterministic=True)).state.step == 9  # may be turned on later


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_one_compiled_graph_serves_all_layers() -> None:
    torch._dynamo.reset()
    fields = {**RECIPE["model_config"], "num_hidden_layers": 12, "drop_path_rate": 0.3, "hidden_dropout_prob": 0.0}
    torch.manual_seed(0)
    model = HFViTForImageClassification(HFViTConfig(**fields, image_size=8, num_labels=3)).train()
    pixel_values, counter = torch.randn(64, 3, 8, 8), CompileCounter()
    expected = model.eval()(pixel_values).logits
    with unittest.mock.patch.object(
        torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend=counter)
    ):
        compile_layers(model, torch.device("cpu"))
    for _ in range(2):
        model.train()(pixel_values).logits.sum().backward()
    assert counter.frame_count == 1
    torch.testing.assert_close(model.eval()(pixel_values).logits, expected)
    # The last layer drops its branches for three of ten images, and scales the others.
    dropped = model.train().vit.layers[-1].drop_path(torch.ones(10_000, 1, 1))
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert dropped.mean().item() == pytest.approx(1, abs=0.03)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_run_compiles_for_training_and_evaluation_alone(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mixing, dropped branches, averaged weights and the last batches compile nothing again."""
    torch._dynamo.reset()
    counter = CompileCounter()
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend=counter))
    fields: dict[str, Any] = {"mixup": 0.5, "cutmix": 0.5, "ema_decay": 0.9, "compile": True, "eval_every": 0.5}
    fields["model_config"] = {**RECIPE["model_config"], "num_hidden_layers": 4, "drop_path_rate": 0.3}
    train(tiny_recipe(photos, tmp_path / "run", **fields))
    assert counter.frame_count == 2


def test_cuda_graphs_need_a_gpu_and_whole_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="reduce-overhead replays CUDA graphs, and this run is on cpu: set"):
        compile_layers(torch.nn.Linear(1, 1), torch.device("cpu"), "reduce-overhead")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="reduce-overhead replays CUDA graphs, and this run uses FSDP: set"):
        compile_layers(torch.nn.Linear(1, 1), torch.device("cuda"), "reduce-overhead")


@pytest.mark.parametrize("name", ["kernels-community/flash-attn3", "flash_attention_3"])
def test_an_attention_without_its_package_is_named(name: str, photos: Path, tmp_path: Path) -> None:
    config = tiny_recipe(photos, tmp_path / "run")
    config = replace(config, model_config={**config.model_config, "attn_implementation": name})
    with pytest.raises(ValueError, match=f"attn_implementation: {name} needs a package .*: pip install kernels"):
        train(config)


def test_fp8_without_such_hardware_or_torchao_is_an_error(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_recipe(photos, tmp_path / "run", precision="fp8")
    with pytest.raises(ValueError, match=r"fp8 needs a GPU .*, and this run is on CPU"):
        train(config)
    monkeypatch.setattr(parallel, "multiplies_in_8_bits", lambda device: True)
    monkeypatch.setattr(parallel, "find_spec", lambda package: None)
    with pytest.raises(ValueError, match="fp8 needs torchao, which is not installed: pip install torchao"):
        train(config)


def test_fp8_learns_and_resumes(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the arithmetic of FP8, emulated on the CPU."""
    float8 = pytest.importorskip("torchao.float8", reason="torchao is not installed")
    monkeypatch.setattr(parallel, "multiplies_in_8_bits", lambda device: True)
    monkeypatch.setattr(float8, "Float8LinearConfig", partial(float8.Float8LinearConfig, emulate=True))
    fields: dict[str, Any] = {"log_every": 1, "epochs": 2, "ema_decay": 0.9}
    plain, whole = (
        train(tiny_recipe(photos, tmp_path / precision, precision=precision, **fields))
        for precision in ("bf16", "fp8")
    )
    losses = [[row["loss"] for row in run.log if "loss" in row] for run in (plain, whole)]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.1)
    converted = {name for name, part in whole.model.named_modules() if type(part).__name__ == "Float8Linear"}
    assert "vit.layers.0.mlp.fc1" in converted and "classifier" not in converted
    with monkeypatch.context() as patch:
        stop_at(2, patch)
        with pytest.raises(Interrupted):
            train(tiny_recipe(photos, tmp_path / "parts", precision="fp8", **fields))
    parts = train(tiny_recipe(photos, tmp_path / "parts", precision="fp8", **fields))
    assert_same_weights(weights(parts.model), weights(whole.model))
    assert all(type(tensor) is torch.nn.Parameter for tensor in parts.model.parameters())
    HFViTForImageClassification.from_pretrained(tmp_path / "fp8")


def test_a_run_is_published_as_it_goes(photos: Path, tmp_path: Path) -> None:
    steps = []

    def publish(step: int, write_model: Any) -> None:
        steps.append(step)
        write_model(tmp_path / f"published-{step}")

    run = train(tiny_recipe(photos, tmp_path / "run", push_every=4, ema_decay=0.5), publish)
    assert steps == [4, 8]
    early, late = (HFViTForImageClassification.from_pretrained(tmp_path / f"published-{step}") for step in steps)
    assert any(not torch.equal(a, b) for a, b in zip(early.parameters(), late.parameters(), strict=True))
    assert run.metrics["steps"] == 9
