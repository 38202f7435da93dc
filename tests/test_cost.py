"""What a run will take: counts that have a formula, sums done by hand, and a dry run that leaves nothing behind."""

import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import save_photos, spoil_loss, stop_at, tiny_recipe
from typer.testing import CliRunner

from hf_vit import HFViTConfig, HFViTForImageClassification, HFViTForMaskedImageModeling
from hf_vit.cli.main import app
from hf_vit.data.labelled import ImageData, load_data
from hf_vit.evaluation.flops import count_flops, count_parameters
from hf_vit.system.gpus import GPUS
from hf_vit.system.stopping import Interrupted
from hf_vit.training import loop as training_module
from hf_vit.training import tasks
from hf_vit.training.estimate import LAUNCH, step_seconds, time_of, traced_step
from hf_vit.training.loop import train
from hf_vit.training.optim import Schedule
from hf_vit.training.recipe import TrainConfig
from hf_vit.training.rehearsal import CACHED, MEASURED, WARM_UP, Cost, Rehearsal, describe, evaluation_length, rehearse
from hf_vit.variants import VARIANTS, config_of

ROOT = Path(__file__).resolve().parents[1]
runner = CliRunner()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_photos(tmp_path_factory.mktemp("data") / "photos")


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that temporary files are made in; the test looks whether they go away."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def on_meta(model_class: Any, config: HFViTConfig) -> Any:
    with torch.device("meta"):
        return model_class(config)


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


# -------------------------------------------------------------------------------------------------------- counted


def forward_by_hand(config: HFViTConfig, num_labels: int) -> int:
    """Count a plain ViT with a class token, two for a multiply-add."""
    width, inner = config.hidden_size, config.intermediate_size
    patches = math.prod(config.grid_size)
    tokens = patches + 1
    layer = tokens * width * (4 * width + 2 * inner) + 2 * tokens**2 * width  # projections, MLP; scores, their sums
    return 2 * (patches * patch_pixels(config) * width + config.num_hidden_layers * layer + width * num_labels)


def patch_pixels(config: HFViTConfig) -> int:
    return config.num_channels * math.prod(config.patch_shape)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_flops_are_those_of_the_formula(tiny_config: Any, attention: str) -> None:
    config = tiny_config(hidden_dropout_prob=0.1, drop_path_rate=0.1, attn_implementation=attention)
    model = on_meta(HFViTForImageClassification, config)
    forward, training = count_flops(model, type(model))
    assert forward == forward_by_hand(config, num_labels=5)
    # Backward is every product twice, for inputs and for weights; but nobody asks for a gradient of the pixels.
    of_pixels = 2 * math.prod(config.grid_size) * patch_pixels(config) * config.hidden_size
    assert training == 3 * forward - of_pixels
    assert model.config._attn_implementation == attention


def test_flops_of_the_paper_s_base() -> None:
    model = on_meta(HFViTForImageClassification, config_of("ViT-B/16", num_labels=1000))
    assert count_flops(model, type(model))[0] == forward_by_hand(model.config, 1000) == 2 * 17_563_828_224


def test_a_frozen_encoder_costs_no_backward(tiny_config: Any) -> None:
    model = on_meta(HFViTForImageClassification, tiny_config())
    model.base_model.requires_grad_(False)
    forward, training = count_flops(model, type(model))
    assert training == forward + 2 * model.config.hidden_size * 5
    assert count_parameters(model) == (33 * 5, sum(p.numel() for p in model.base_model.parameters()))


def test_dropped_patches_cost_nothing_in_training(tiny_config: Any) -> None:
    whole, dropping = (
        on_meta(HFViTForImageClassification, tiny_config(patch_dropout_prob=share)) for share in (0.0, 0.5)
    )
    (forward, training), (also_forward, reduced) = (count_flops(model, type(model)) for model in (whole, dropping))
    assert forward == also_forward and reduced < 0.7 * training


def test_a_decoder_of_patches_is_counted(tiny_config: Any) -> None:
    model = on_meta(HFViTForMaskedImageModeling, tiny_config())
    patches, width, pixels = math.prod(model.config.grid_size), model.config.hidden_size, patch_pixels(model.config)
    expected = forward_by_hand(model.config, num_labels=0) + 2 * patches * width * pixels
    assert count_flops(model, type(model))[0] == expected


@pytest.mark.parametrize("name", ["ViT-Ti/16", "ViT-B/32", "ViT-L/14"])
def test_parameters_are_those_of_the_variant(name: str) -> None:
    model = on_meta(HFViTForImageClassification, config_of(name, num_labels=1000))
    assert count_parameters(model) == (VARIANTS[name].num_parameters, 0)


# ------------------------------------------------------------------------------------------------------ added up


def memory(*numbers: int) -> dict[str, int]:
    return dict(zip(("weights", "gradients", "optimizer state", "averaged weights"), numbers, strict=True))


def a_cost(**fields: Any) -> Cost:
    return replace(
        Cost(
            source="photos", image_shape=(96, 128), precision="bf16", learned=1_000_000, frozen=0,
            forward_flops=10**9, training_flops=3 * 10**9, memory=memory(4_194_304, 4_194_304, 8_388_608, 0),
            peak=3 * 2**30, is_peak_of_gpu=True, gpu_memory=80 * 2**30, measured_steps=10, step_seconds=0.5,
            data_wait_share=0.25, start_seconds=100.0, evaluation_seconds=60.0, total_steps=10_000, done_steps=0,
            eval_every=1000, train_images=128_000, batch_size=128, processes=1, num_workers=4, hardware="1 x GPU",
        ),
        **fields,
    )  # fmt: skip


def test_time_is_start_and_steps_and_evaluations() -> None:
    cost = a_cost()
    assert cost.images_per_second == 256
    assert cost.seconds == 100 + 10_000 * 0.5 + 10 * 60
    assert cost.seconds_from(9_500) == 100 + 500 * 0.5 + 60
    assert a_cost(evaluation_seconds=None).seconds == 5100


@pytest.mark.parametrize(("total", "every"), [(9, 3), (10, 3), (2, 3), (1, 1), (7, 7)])
def test_evaluations_are_those_of_the_loop(total: int, every: int) -> None:
    cost = a_cost(total_steps=total, eval_every=every)
    for done in range(total + 1):
        steps = range(done, total) if done < total else [total - 1]  # a run that is done measures once more
        assert cost.evaluations_from(done) == sum((s + 1) % every == 0 or s + 1 == total for s in steps), done


def test_a_cost_is_said_with_units() -> None:
    said = describe(a_cost(), price_per_hour=2.5)
    assert said == [
        "photos: 128,000 training images at 96x128 pixels, batch size 128, bf16, 1 x GPU",
        "  parameters  1,000,000 trainable",
        "   per image  1 GFLOP in evaluation, 3 GFLOP in training (a multiply-add counts as two)",
        "      memory  4.0 MiB weights, 4.0 MiB gradients, 8.0 MiB optimizer state",
        " peak memory  3.0 GiB of 80.0 GiB on a GPU",
        "    images/s  256 over 10 steps of 0.5 s, 25% of it waiting for images; 768 GFLOP/s",
        "         run  10,000 steps (10 epochs), 10 evaluations of 60 s",
        "        time  95.0 min: 100 s start, 83.3 min training, 10.0 min evaluating, plus saving",
        "       price  3.96 (at 2.5 per hour)",
    ]
    said = "\n".join(describe(a_cost(done_steps=9_500, is_peak_of_gpu=False, frozen=7, evaluation_seconds=None), 1))
    for words in (
        "1,000,000 trainable, 7 frozen",
        "3.0 GiB resident per process, without its 4 data loader processes",
        "10 evaluations of unknown duration",
        "plus evaluating and saving",
        "time left  5.8 min: the run in output_dir has done 9,500 steps",
        "1.42, 0.10 for the rest (at 1 per hour)",
    ):
        assert words in said, (words, said)


@pytest.fixture(autouse=True)
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure all steps, however busy the machine is."""
    monkeypatch.setattr("hf_vit.training.rehearsal.SECONDS", 1e6)


# ------------------------------------------------------------------------------------------------------- measured


def test_a_dry_run_leaves_nothing(photos: Path, tmp_path: Path, temporary: Path) -> None:
    cost = rehearse(tiny_recipe(photos, tmp_path / "run", tracker="tensorboard"))
    assert cost is not None
    assert not (tmp_path / "run").exists() and not list(temporary.iterdir())
    assert (cost.total_steps, cost.done_steps, cost.eval_every, cost.evaluations) == (9, 0, 3, 3)
    assert (cost.measured_steps, cost.batch_size, cost.train_images, cost.processes) == (MEASURED, 16, 54, 1)
    assert cost.evaluation_seconds is not None and min(cost.step_seconds, cost.evaluation_seconds) > 0
    assert 0 < cost.data_wait_share < 1 and cost.peak > 10**7 and not cost.is_peak_of_gpu
    tensors = 2 + 1 + 1 + 1 + 2 * 12 + 2 + 2  # projection, token, its position, positions, layers, norm, head
    weights = 4 * cost.learned
    assert cost.memory == memory(weights, weights, 2 * weights + 4 * tensors, 0)  # and each one's number of steps


def test_it_takes_its_steps_in_all_their_parts(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, measure = [], tasks.Classification.loss

    def loss(self: Any, model: Any, pixel_values: torch.Tensor, *rest: Any) -> torch.Tensor:
        parts.append(len(pixel_values))
        return measure(self, model, pixel_values, *rest)

    monkeypatch.setattr(tasks.Classification, "loss", loss)
    fields = {"accumulation_steps": 2, "ema_decay": 0.9, "optimizer": "sgd", "max_steps": 2, "log_every": 1}
    cost = rehearse(tiny_recipe(photos, tmp_path / "run", **fields))
    assert cost is not None
    assert parts == [8] * 2 * (WARM_UP + MEASURED)
    assert cost.total_steps == 2 and cost.evaluations == 1
    weights = 4 * cost.learned
    assert cost.memory == memory(weights, weights, weights, weights)


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_run_that_lies_there_is_left_as_it_is(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: str
) -> None:
    config = tiny_recipe(photos, tmp_path / "run", save_every=2)
    with monkeypatch.context() as patch:
        stop_at(4, patch)
        with pytest.raises(Interrupted):
            train(config)
    before = content(tmp_path / "run")
    cost = rehearse(replace(config, resume=resume))
    assert cost is not None and cost.done_steps == (5 if resume == "auto" else 0)
    assert content(tmp_path / "run") == before


def test_the_schedule_is_the_run_s(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    apply = Schedule.apply

    def note(self: Any, *arguments: Any) -> float:
        rates.append(apply(self, *arguments))
        return rates[-1]

    monkeypatch.setattr(Schedule, "apply", note)
    rehearse(tiny_recipe(photos, tmp_path / "run", epochs=100))
    of_rehearsal, rates = rates, []
    train(tiny_recipe(photos, tmp_path / "run", epochs=100, max_steps=WARM_UP))
    assert of_rehearsal[:WARM_UP] == rates
    assert len(of_rehearsal) == WARM_UP + MEASURED


@pytest.mark.parametrize(
    ("fields", "passed_over"),
    [
        ({}, 0),
        ({"num_workers": 1}, 2),  # what a worker loads ahead
        ({"num_workers": 1, "cache": "ram"}, 2),
        ({"streaming": True, "train_images": 54}, 256 // 16),  # rows that are read ahead
    ],
)
def test_what_was_read_ahead_is_passed_over(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], passed_over: int
) -> None:
    taken: list[int] = []
    load = training_module.training_loader

    class Counting:
        def __init__(self, *arguments: Any) -> None:
            self.loader = load(*arguments)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.loader, name)

        def __iter__(self) -> Iterator[Any]:
            for batch in self.loader:
                taken.append(len(batch["labels"]))
                yield batch

    monkeypatch.setattr(training_module, "training_loader", Counting)
    rehearse(tiny_recipe(photos, tmp_path / "run", **fields))
    assert taken == [16] * (WARM_UP + passed_over + MEASURED)


@pytest.mark.parametrize(("workers", "parts", "steps"), [(0, 1, 10), (4, 1, 12), (12, 1, 24), (3, 4, 11), (8, 2, 12)])
def test_every_worker_loads_as_often(workers: int, parts: int, steps: int) -> None:
    config = tiny_recipe(Path("photos"), Path("run"), num_workers=workers, accumulation_steps=parts)
    assert Rehearsal(config, ImageData("", [], [], ("image", "label"), [], "test", 0)).measured_steps == steps


def test_a_part_of_the_images_is_cached() -> None:
    data, config = load_data("digits"), tiny_recipe(Path("digits"), Path("run"), cache="ram")
    assert Rehearsal(replace(config, cache="none"), data).sample() is data
    for batch_size, images in ((16, CACHED), (300, 300)):
        part = Rehearsal(replace(config, batch_size=batch_size), data).sample()
        assert len(part.train) == part.train_length == images and len({*part.train["label"]}) == 10


def test_slow_steps_are_few(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_vit.training.rehearsal.SECONDS", 0.0)
    cost = rehearse(tiny_recipe(photos, tmp_path / "run", num_workers=1))
    assert cost is not None and cost.measured_steps == 2 and cost.evaluation_seconds is not None


def test_a_stream_is_measured(photos: Path, tmp_path: Path) -> None:
    cost = rehearse(tiny_recipe(photos, tmp_path / "run", streaming=True, train_images=480, shuffle_buffer=16))
    assert cost is not None and cost.total_steps == 90 and cost.evaluation_seconds is not None


def test_the_length_of_an_evaluation(photos: Path) -> None:
    assert evaluation_length(load_data(photos), 0.2) == 21
    data = load_data("digits", streaming=True, train_images=800)
    assert evaluation_length(data, 0.2) == 200
    assert evaluation_length(load_data(photos, streaming=True, train_images=54), 0.2) is None


def test_masked_patches_and_a_probe(photos: Path, tmp_path: Path) -> None:
    cost = rehearse(tiny_recipe(photos, tmp_path / "run", task="masked_patches"))
    assert cost is not None and cost.frozen == 0
    cost = rehearse(tiny_recipe(photos, tmp_path / "run", trained="head"))
    assert cost is not None and (cost.learned, cost.memory["gradients"]) == (17 * 3, 4 * 17 * 3)
    assert cost.training_flops == cost.forward_flops + 2 * 16 * 3


# ------------------------------------------------------------------------------------------------------ estimated


@pytest.mark.skipif(torch.__version__ < "2.15", reason="earlier versions of torch count other operations")
@pytest.mark.parametrize(
    ("name", "images", "shares"),
    [
        ("ViT-S/16", 256, (0.30, 0.35, 0.42)),
        pytest.param("ViT-B/16", 256, (0.44, 0.51, 0.64), marks=pytest.mark.slow),
        pytest.param("ViT-L/16", 128, (0.51, 0.58, 0.73), marks=pytest.mark.slow),
    ],
)
def test_shares_of_the_matrix_rate_of_an_h200(name: str, images: int, shares: tuple[float, ...]) -> None:
    """The shares were worked out by hand from the operations: eager, compiled, and compiled with FP8 products."""
    model = on_meta(HFViTForImageClassification, config_of(name, num_labels=1000, drop_path_rate=0.1))
    trace, gpu = traced_step(model, type(model), images, "bf16"), GPUS["h200"]
    flops, parameters = count_flops(model, type(model))[1] * images, count_parameters(model)[0]
    found = []
    for precision, is_compiled in (("bf16", False), ("bf16", True), ("fp8", True)):
        seconds = time_of(trace.operations, gpu, precision, is_compiled).seconds
        found.append(flops / step_seconds(seconds, 1, parameters, gpu, TrainConfig()) / 790e12)
    assert found == pytest.approx(shares, abs=0.015)
    # Elementwise operations move 230 bytes per token, layer and unit of width.
    tokens = images * model.config.num_hidden_layers * 197 * model.config.hidden_size
    traffic = sum(each.traffic for each in trace.operations if each.kind == "elementwise")
    assert traffic / tokens == pytest.approx(230, rel=0.02)


def test_activations_of_a_step_are_alive_until_its_backward(tiny_config: Any) -> None:
    model = on_meta(HFViTForImageClassification, tiny_config(num_hidden_layers=8))
    few, many, reduced = (
        traced_step(model, type(model), images, "fp32", checkpoints).peak
        for images, checkpoints in ((8, False), (16, False), (16, True))
    )
    assert many > 1.8 * few and reduced < many / 2
    gradients = 4 * count_parameters(model)[0]
    assert traced_step(model, type(model), 1, "fp32").peak > gradients


def test_small_steps_are_limited_by_launches(tiny_config: Any) -> None:
    model = on_meta(HFViTForImageClassification, tiny_config())
    trace = traced_step(model, type(model), 1, "bf16")
    eager, compiled = (time_of(trace.operations, GPUS["h200"], "bf16", is_compiled) for is_compiled in (False, True))
    assert eager.seconds == eager.launches == LAUNCH * len(trace.operations) > compiled.seconds


def test_an_estimate_for_a_gpu_is_printed(recipe: Path, tmp_path: Path, temporary: Path) -> None:
    arguments = ["train", "--recipe", str(recipe), "--dry-run", "--precision", "auto", "--compile"]
    result = runner.invoke(app, [*arguments, "--for", "RTX 4090"])
    assert result.exit_code == 0, result.output
    assert "16, bf16, compiled, 1 x NVIDIA GeForce" in " ".join(result.stdout.split())
    assert "nothing was measured" in result.stdout and max(map(len, result.stdout.splitlines())) <= 80
    names = ["images/s", "run", "time", "step", "share", "estimated", "images"]
    assert [name for line in result.stdout.splitlines() if (name := line[:12].strip()) in names] == names
    assert not (tmp_path / "run").exists() and not list(temporary.iterdir())
    for words, message in (
        (["--for", "h300"], "Unknown GPU 'h300'"),
        (["--for", "t4", "--precision", "bf16"], "bf16"),
    ):
        result = runner.invoke(app, [*arguments, *words])
        assert result.exit_code == 2 and message in result.stderr


# --------------------------------------------------------------------------------------------------- its endings


def test_a_loss_that_is_not_finite(
    photos: Path, tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_loss(monkeypatch, step=11)
    with pytest.raises(FloatingPointError, match="step 12 is not finite"):
        rehearse(tiny_recipe(photos, tmp_path / "run"))
    assert not (tmp_path / "run").exists() and not list(temporary.iterdir())


@pytest.fixture
def recipe(photos: Path, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny_recipe(photos, tmp_path / "run").to_yaml())
    return path


def test_the_command_prints_a_table(recipe: Path, tmp_path: Path) -> None:
    result = runner.invoke(app, ["train", "--recipe", str(recipe), "--dry-run", "--price-per-hour", "3600"])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("photos: 54 training images at 8x8 pixels, batch size 16, fp32, ")
    names = ["parameters", "per image", "memory", "peak memory", "images/s", "run", "time", "price"]
    assert [name for line in lines if (name := line[:12].strip()) in names] == names
    assert "9 steps (3 epochs), 3 evaluations of" in result.stdout
    assert not (tmp_path / "run").exists()


def test_a_signal_ends_it_at_once(
    recipe: Path, tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(5, monkeypatch)
    result = runner.invoke(app, ["train", "--recipe", str(recipe), "--dry-run"])
    assert result.exit_code == 130 and "Stopped; a dry run leaves no files." in result.stderr
    assert "resumes" not in result.stderr and not result.stdout
    assert not (tmp_path / "run").exists() and not list(temporary.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dry-run", "--batch-size", "7", "--accumulation-steps", "2"], "batch_size=7 must be divisible by"),
        (["--dry-run", "--data", "/no/such/place"], "No such file or folder: /no/such/place"),
        (["--dry-run", "--keep-checkpoints", "0"], "keep_checkpoints must be at least 1"),
        (["--price-per-hour", "2"], "--price-per-hour needs --dry-run"),
        (["--for", "h200"], "--for needs --dry-run"),
    ],
)
def test_what_a_user_can_mend_is_one_line(arguments: list[str], message: str, recipe: Path, tmp_path: Path) -> None:
    result = runner.invoke(app, ["train", "--recipe", str(recipe), *arguments])
    assert result.exit_code == 2 and "Error: " in result.stderr and message in result.stderr
    assert not (tmp_path / "run").exists()


def test_the_model_to_begin_from_is_not_written_over(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds the model to start from"):
        rehearse(tiny_recipe(photos, tmp_path / "run", model=str(tmp_path / "run")))


@pytest.mark.full
def test_processes_tell_of_the_whole_run(photos: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(tiny_recipe(photos, tmp_path / "run", accumulation_steps=2, num_workers=1).to_yaml())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "scripts" / "train.py"), "--recipe", str(recipe), "--dry-run"]
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("parameters") == 1 and ", 2 processes\n" in done.stdout
    assert "9 steps (3 epochs), 3 evaluations of" in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_compiled_model_compiles_before_it_is_measured(photos: Path, tmp_path: Path) -> None:
    cost = rehearse(tiny_recipe(photos, tmp_path / "run", compile=True))
    assert cost is not None and cost.start_seconds > 10 * cost.step_seconds
