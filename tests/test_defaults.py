"""Defaults that follow from facts: the values, that a user's value wins, and that a run states and keeps them."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import assert_same_weights, log_of, save_photos, stop_at, tiny_recipe, weights
from typer.testing import CliRunner

from hf_vit import HFViTForImageClassification
from hf_vit.cli.main import app
from hf_vit.data.images import EvaluationImages
from hf_vit.data.labelled import load_data
from hf_vit.data.orders import BalancedOrder, BatchDivision, training_order
from hf_vit.model.image_processing_hf_vit import HFViTImageProcessor
from hf_vit.system.machine import _free_in_cgroups, free_memory
from hf_vit.system.stopping import Interrupted
from hf_vit.training import gradients
from hf_vit.training import run as run_module
from hf_vit.training.best import BestModel
from hf_vit.training.checkpointing import load_state
from hf_vit.training.defaults import NEUTRAL, RULES, activation_bytes, describe_choices, resolve
from hf_vit.training.facts import Facts, stored_size
from hf_vit.training.loop import train
from hf_vit.training.recipe import AUTO, TrainConfig, default_recipe
from hf_vit.training.rehearsal import rehearse
from hf_vit.training.run import CHECKPOINTS, METRICS
from hf_vit.training.tasks import Classification

GIB = 2**30


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_photos(tmp_path_factory.mktemp("data") / "photos")


def chosen(facts: Facts, recipe: str = "finetune", **fields: Any) -> TrainConfig:
    config, _ = resolve(TrainConfig.from_recipe(recipe, **fields), facts)
    return config


def facts(**fields: Any) -> Facts:
    return Facts(**{"images": 2934, "image_size": (224, 224), "stored_size": (375.0, 500.0), **fields})


# -------------------------------------------------------------------------------------------------------- the rules


def test_every_field_that_may_be_auto_has_a_rule() -> None:
    assert set(RULES) == set(AUTO)
    everything = TrainConfig(model="a/checkpoint", **dict.fromkeys(AUTO, "auto"))
    config, reasons = resolve(everything, facts())
    assert config.auto == [] and set(reasons) == set(AUTO)
    lines = describe_choices(config, reasons)
    shown = [name for name in reasons if getattr(config, name) != NEUTRAL.get(name, ...)]
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == shown and len(shown) > 8
    assert max(map(len, lines)) <= 80


def test_a_value_of_the_user_wins_and_later_rules_see_it() -> None:
    config, reasons = resolve(TrainConfig.from_recipe("finetune", batch_size=256, image_size=98), facts())
    assert (config.batch_size, config.image_size) == (256, 98)
    assert not {"batch_size", "image_size"} & set(reasons)
    assert config.learning_rate == pytest.approx(2e-4)  # twice that of a batch of 64
    assert resolve(config, facts(images=10)) == (config, {})


@pytest.mark.parametrize(
    ("fields", "of_facts", "rate"),
    [
        ({}, {}, 1e-4),
        ({}, {"width": 768}, 5e-5),
        ({}, {"width": 1024}, 3.8e-5),
        ({"trained": "head"}, {"width": 1024}, 1e-3),
        ({"trained": "lora"}, {}, 5e-4),
        ({"optimizer": "lion"}, {}, 2e-5),
        ({"optimizer": "sgd"}, {}, 1.3e-3),
        ({"batch_size": 10**6}, {}, 1e-3),
        ({"recipe": "scratch"}, {"is_checkpoint": False, "width": 96}, 1e-3),
        ({"recipe": "scratch"}, {"is_checkpoint": False, "width": 384}, 5e-4),
    ],
)
def test_the_learning_rate_follows_from_method_batch_size_and_width(
    fields: dict[str, Any], of_facts: dict[str, Any], rate: float
) -> None:
    assert chosen(facts(**of_facts), **{"batch_size": 64, **fields}).learning_rate == pytest.approx(rate)


@pytest.mark.parametrize("images", [3, 50, 200, 1000, 2934, 50_000, 200_000, 1_281_167])
def test_few_images_train_long_enough_and_many_do_not_train_forever(images: int) -> None:
    config = chosen(facts(images=images))
    assert 1 <= config.batch_size <= min(128, images)
    steps = config.epochs * (images // config.batch_size)
    assert steps >= 500 or config.epochs == 100
    assert 3 <= config.epochs <= 100
    assert config.epochs == 3 or config.epochs * images <= 600_000
    assert config.epochs / config.eval_every <= 25
    assert 0.05 * config.epochs <= config.warmup_epochs <= 0.1 * config.epochs


def test_layers_are_decayed_only_where_all_of_a_checkpoint_are_trained() -> None:
    assert chosen(facts()).layer_decay == 0.75
    assert chosen(facts(width=1024, depth=24)).layer_decay == 0.65
    assert chosen(facts(), trained="head").layer_decay == chosen(facts(), trained="lora").layer_decay == 1
    assert chosen(facts(is_checkpoint=False), "scratch").layer_decay == 1


def test_a_batch_is_divided_over_processes_and_memory() -> None:
    assert chosen(facts(processes=6, local_processes=6)).batch_size % 6 == 0
    config = chosen(facts(memory=8 * GIB, parameters=86_000_000, width=768), batch_size=128)
    share = 128 // config.accumulation_steps
    assert 128 % config.accumulation_steps == 0 and config.accumulation_steps > 1
    assert share * activation_bytes(config, facts(width=768)) < 8 * GIB
    assert chosen(facts(memory=GIB // 100), batch_size=128).accumulation_steps == 128
    assert chosen(facts(), batch_size=128, trained="head").accumulation_steps == 1


def test_images_are_cached_only_within_a_quarter_of_the_free_memory() -> None:
    config = chosen(facts(memory=16 * GIB))
    assert (config.cache, config.shorter_side) == ("ram", None)  # crops of a quarter need 448 pixels, there are 375
    large = chosen(facts(stored_size=(3000.0, 4000.0), memory=16 * GIB))
    assert (large.cache, large.shorter_side) == ("ram", 448)
    assert chosen(facts(stored_size=(3000.0, 4000.0), memory=4 * GIB)).cache == "none"
    assert chosen(facts(memory=GIB)).cache == chosen(facts(is_stream=True)).cache == "none"
    assert chosen(facts(memory=8 * GIB, local_processes=8)).cache == "none"  # each process has its own
    assert chosen(facts(memory=GIB)).shorter_side is None


def test_workers_follow_from_the_cores() -> None:
    assert chosen(facts(cores=2), cache="none").num_workers == 0
    assert chosen(facts(cores=16), cache="none").num_workers == 8
    assert chosen(facts(cores=16, local_processes=4), cache="none").num_workers == 4
    assert chosen(facts(cores=16)).num_workers == 0  # cached
    assert chosen(facts(cores=16, device="cuda"), cache="device").num_workers == 8  # which draw the augmentation


@pytest.mark.parametrize(
    ("side", "size", "patch"), [(32, 32, 4), (8, 8, 1), (28, 28, 4), (165, 160, 16), (500, 224, 16)]
)
def test_from_scratch_the_image_size_follows_from_the_images(side: int, size: int, patch: int) -> None:
    config = chosen(facts(stored_size=(side, side), is_checkpoint=False, image_size=None), "scratch")
    assert (config.image_size, config.model_config["patch_size"]) == (size, patch)
    variant = chosen(
        facts(stored_size=(side, side), is_checkpoint=False, image_size=None), "scratch", model="ViT-S/16"
    )
    assert variant.model_config == {} and variant.image_size == max(size, 112)


def test_the_image_size_of_a_checkpoint_is_kept() -> None:
    assert chosen(facts(stored_size=(32.0, 32.0))).image_size == 224
    assert chosen(facts(image_size=(224, 448))).image_size == [224, 448]


def test_the_task_follows_from_the_labels() -> None:
    assert chosen(facts()).task == "classification" and chosen(facts()).best_metric == "accuracy"
    assert chosen(facts(), task="masked_patches").best_metric == "loss"


def test_a_field_that_is_replaced_is_not_chosen_any_more() -> None:
    config = replace(TrainConfig.from_recipe("finetune"), epochs=7)
    assert "epochs" not in config.auto and resolve(config, facts())[0].epochs == 7


def test_the_recipe_follows_from_the_model() -> None:
    assert [default_recipe(model) for model in (None, "ViT-S/16", "someone/a-vit")] == [
        "scratch",
        "scratch",
        "finetune",
    ]


# ------------------------------------------------------------------------------------------------------------- runs

AUTO_RECIPE: dict[str, Any] = {
    **dict.fromkeys(("batch_size", "learning_rate", "warmup_epochs", "cache", "num_workers", "best_metric"), "auto"),
    "shorter_side": "auto",
    "accumulation_steps": "auto",
}


def test_a_run_prints_and_keeps_what_was_chosen(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train(tiny_recipe(photos, tmp_path / "whole", **AUTO_RECIPE))
    printed = capsys.readouterr().out
    assert "Chosen from the data, the model and the machine:" in printed and "\nlearning_rate " in printed
    assert whole.config.auto == [] and whole.config.batch_size == 32
    assert TrainConfig.from_recipe(tmp_path / "whole" / "recipe.yaml") == whole.config
    with monkeypatch.context() as patch:
        stop_at(1, patch)
        with pytest.raises(Interrupted):
            train(tiny_recipe(photos, tmp_path / "parts", **AUTO_RECIPE))
    # A machine with less memory chooses other values, but continues with those of the run.
    monkeypatch.setattr("hf_vit.training.facts.free_memory", lambda: 1000)
    parts = train(tiny_recipe(photos, tmp_path / "parts", **AUTO_RECIPE))
    assert replace(parts.config, output_dir="") == replace(whole.config, output_dir="")
    assert_same_weights(weights(parts.model), weights(whole.model))
    with pytest.raises(ValueError, match=r"holds a run with another recipe .*batch_size 32 -> 16"):
        train(tiny_recipe(photos, tmp_path / "parts", **{**AUTO_RECIPE, "batch_size": 16}))


def test_a_dry_run_chooses_too(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cost = rehearse(tiny_recipe(photos, tmp_path / "run", **AUTO_RECIPE, trained="lora"))
    assert cost is not None and cost.batch_size == 32 and cost.total_steps == 3
    assert "batch_size" in capsys.readouterr().out and not (tmp_path / "run").exists()


def test_the_command_chooses_a_recipe(photos: Path, tmp_path: Path) -> None:
    options = ["--data", str(photos), "--output-dir", str(tmp_path / "run"), "--max-steps", "2"]
    options += ["--model-config.hidden-size", "16", "--model-config.num-attention-heads", "2"]
    result = CliRunner().invoke(app, ["train", *options])
    assert result.exit_code == 0, result.output
    recipe = TrainConfig.from_recipe(tmp_path / "run" / "recipe.yaml")
    assert (recipe.image_size, recipe.model_config["patch_size"], recipe.position_std) == (10, 1, 0.5)
    options = ["--data", str(photos), "--output-dir", str(tmp_path / "tuned"), "--max-steps", "2"]
    result = CliRunner().invoke(app, ["train", "--model", str(tmp_path / "run"), *options])
    assert result.exit_code == 0, result.output
    recipe = TrainConfig.from_recipe(tmp_path / "tuned" / "recipe.yaml")
    assert (recipe.image_size, recipe.layer_decay, recipe.best_metric) == (10, 0.75, "accuracy")


# ------------------------------------------------------------------------------------------------------ best and last


def test_the_best_model_is_left_and_the_last_beside_it(photos: Path, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"epochs": 4, "learning_rate": 0.3, "warmup_epochs": 0, "max_grad_norm": None}
    run = train(tiny_recipe(photos, tmp_path, best_metric="loss", keep_last=True, **fields))
    losses = {row["step"]: row["eval_loss"] for row in run.log if "eval_loss" in row}
    best = min(losses, key=losses.__getitem__)
    assert best != 12  # so that there is a difference
    assert (run.metrics["best_step"], run.metrics["best_value"]) == (best, losses[best])
    assert run.metrics["eval_loss"] == losses[best] and run.metrics["last_value"] == losses[12]
    assert json.loads((tmp_path / METRICS).read_text()) == run.metrics
    assert run.predictions is not None and run.predictions.metrics()["loss"] == losses[best]
    left, last = (HFViTForImageClassification.from_pretrained(path) for path in (tmp_path, tmp_path / "last"))
    assert_same_weights(weights(left), weights(run.model))
    plain = train(tiny_recipe(photos, tmp_path / "plain", **fields))
    assert_same_weights(weights(last), weights(plain.model))


@pytest.mark.parametrize("stops_at", [3, 7])
def test_early_stopping_resumes_exactly(
    stops_at: int, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The accuracy of a rate of 0 stays that of the first evaluation.
    fields = {"learning_rate": 0, "best_metric": "accuracy", "early_stopping": 2, "epochs": 9, "ema_decay": 0.9}
    whole = train(tiny_recipe(photos, tmp_path / "whole", **fields))
    assert (whole.metrics["steps"], whole.metrics["best_step"]) == (9, 3)
    with monkeypatch.context() as patch:
        stop_at(stops_at, patch)
        with pytest.raises(Interrupted):
            train(tiny_recipe(photos, tmp_path / "parts", **fields))
    parts = train(tiny_recipe(photos, tmp_path / "parts", **fields))
    assert_same_weights(weights(parts.model), weights(whole.model))
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")
    assert (tmp_path / "parts" / METRICS).read_bytes() == (tmp_path / "whole" / METRICS).read_bytes()
    stop_at(9, monkeypatch)  # a step would raise
    again = train(tiny_recipe(photos, tmp_path / "whole", **fields))
    assert again.metrics == whole.metrics and again.log == whole.log


def test_early_stopping_needs_a_metric_that_there_is(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="early_stopping needs a metric that improves: set best_metric"):
        tiny_recipe(photos, tmp_path, early_stopping=2)
    with pytest.raises(ValueError, match=r"There is no metric 'f2': set best_metric to one of accuracy, .*loss"):
        train(tiny_recipe(photos, tmp_path, best_metric="f2", max_steps=1))


def test_a_metric_that_is_not_a_number_is_never_better() -> None:
    best, values = BestModel("accuracy", early_stopping=1), (math.nan, 0.5, math.nan, 0.4)
    is_better = [best.update(step, {"accuracy": value}, dict) for step, value in enumerate(values)]
    assert is_better == [True, True, False, False]
    assert (best.step, best.value, best.last_value, best.is_over) == (1, 0.5, 0.4, True)


# --------------------------------------------------------------------------------------------------------- balanced


def test_balanced_batches_have_every_class_equally_often() -> None:
    labels = [0] * 40 + [1] * 5 + [2] * 3
    visits = [visit for batch in BalancedOrder(labels, 12, 0, 0, 8) for visit in batch]
    for epoch in (0, 1):
        of_epoch = [visit for visit in visits if visit.epoch == epoch]
        counts = torch.bincount(torch.tensor([labels[visit.index] for visit in of_epoch])).tolist()
        assert counts == [16, 16, 16]
        assert len({(visit.index, visit.repeat) for visit in of_epoch}) == 48  # a repeat is augmented in another way
        repeats = torch.bincount(torch.tensor([visit.index for visit in of_epoch if labels[visit.index] == 2]))
        assert set(repeats[repeats > 0].tolist()) == {5, 6}
    assert [batch for batch in BalancedOrder(labels, 12, 0, 3, 8)] == [
        batch for batch in BalancedOrder(labels, 12, 0, 0, 8)
    ][3:]
    several = BalancedOrder([[1, 0], [1, 0], [1, 1], [0, 0]], 4, 0, 0, 300)
    counts = torch.bincount(torch.tensor([visit.index for batch in several for visit in batch])) / 1200
    assert counts.tolist() == pytest.approx([1 / 9, 1 / 9, 1 / 9 + 1 / 3, 1 / 3], abs=0.05)


def test_balanced_needs_classes(photos: Path) -> None:
    data = replace(load_data(photos), problem_type="regression")
    with pytest.raises(ValueError, match="sampling: balanced needs classes of images that are not streamed"):
        training_order(data, None, 8, 0, (0, 1), BatchDivision(), 8, sampling="balanced")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------- lora


def test_low_rank_updates_are_merged_into_what_is_saved(photos: Path, tmp_path: Path) -> None:
    base = train(tiny_recipe(photos, tmp_path / "base", max_steps=1))
    fields = {"model": str(tmp_path / "base"), "model_config": {}, "trained": "lora", "lora_rank": 2}
    run = train(tiny_recipe(photos, tmp_path / "run", **fields))
    before, after = weights(base.model), weights(run.model)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("classifier.")} | {
        f"vit.layers.{layer}.{name}.weight"
        for layer in (0, 1)
        for name in ("attention.qkv", "attention.o_proj", "mlp.fc1", "mlp.fc2")
    }
    for folder in (tmp_path / "run", tmp_path / "run" / CHECKPOINTS / "step-00000009"):
        assert_same_weights(weights(HFViTForImageClassification.from_pretrained(folder)), after)
    assert run.metrics["parameters"] == base.metrics["parameters"]


# ----------------------------------------------------------------------------------------------------------- memory


def out_of_memory_above(size: int, monkeypatch: pytest.MonkeyPatch, kind: Any = torch.OutOfMemoryError) -> list[int]:
    """Let the loss of more than `size` images run out of memory; return the sizes that are computed."""
    measure, sizes = Classification.loss, []

    def loss(self: Any, model: Any, pixels: torch.Tensor, *others: Any) -> torch.Tensor:
        if len(pixels) > size:
            raise kind("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte.")
        sizes.append(len(pixels))
        return measure(self, model, pixels, *others)

    monkeypatch.setattr(Classification, "loss", loss)
    return sizes


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])
def test_a_step_that_does_not_fit_is_repeated_in_smaller_parts(
    kind: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {"model_config": {**tiny_recipe(photos, tmp_path).model_config, "hidden_dropout_prob": 0.0}}
    plain = train(tiny_recipe(photos, tmp_path / "plain", **fields))
    capsys.readouterr()
    with monkeypatch.context() as patch:
        sizes = out_of_memory_above(5, patch, kind)
        whole = train(tiny_recipe(photos, tmp_path / "whole", **fields))
        assert set(sizes) == {4} and whole.state.split == 4
        printed = capsys.readouterr().out
        assert printed.count("Memory ran out: each batch is computed in parts of") == 2
        assert "The batch size of 16 and the learning rate stay the same." in printed
        stop_at(4, patch)
        with pytest.raises(Interrupted):
            train(tiny_recipe(photos, tmp_path / "parts", **fields))
    parts = train(tiny_recipe(photos, tmp_path / "parts", **fields))  # there is enough memory now
    assert parts.state.split == 4 and load_state(tmp_path / "parts" / CHECKPOINTS / "step-00000009")["split"] == 4
    assert_same_weights(weights(parts.model), weights(whole.model))
    for name, tensor in weights(plain.model).items():
        torch.testing.assert_close(tensor, weights(whole.model)[name], rtol=0, atol=1e-4)


def test_parts_of_unequal_sizes_weigh_by_their_images(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"model_config": {**tiny_recipe(photos, tmp_path).model_config, "hidden_dropout_prob": 0.0}}
    fields |= {"batch_size": 9, "max_steps": 2, "log_every": 1}
    plain = train(tiny_recipe(photos, tmp_path / "plain", **fields))
    sizes = out_of_memory_above(5, monkeypatch)
    split = train(tiny_recipe(photos, tmp_path / "split", **fields))
    assert set(sizes) == {4, 5}
    for row, other in zip(plain.log, split.log, strict=True):
        assert other == pytest.approx(row, rel=1e-4)


def test_a_single_image_that_does_not_fit_is_an_error(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out_of_memory_above(0, monkeypatch)
    with pytest.raises(ValueError, match="Memory ran out with a single image: use a smaller image_size or model"):
        train(tiny_recipe(photos, tmp_path))
    monkeypatch.setattr("hf_vit.training.run.compile_layers", lambda *given: None)
    with pytest.raises(ValueError, match="Memory ran out at step 1, and CUDA graphs cannot compute a batch in parts"):
        train(tiny_recipe(photos, tmp_path, compile=True, compile_mode="reduce-overhead", resume="never"))
    with pytest.raises(RuntimeError, match="something else"):
        out = gradients.is_out_of_memory(RuntimeError("something else"))
        assert not out
        raise RuntimeError("something else")


def test_a_cache_stops_at_its_limit(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_data(photos)
    processor = HFViTImageProcessor.from_preset("original", 8)
    of_image = 3 * 8 * 8
    for number, is_cached in ((21, True), (20, False)):
        images = EvaluationImages(data.evaluation, data.columns, processor, "ram", number * of_image)
        assert (images.cached is not None) == is_cached
        assert images.cached_bytes == (21 * of_image if is_cached else 0)
    said: list[str] = []
    monkeypatch.setattr(run_module, "free_memory", lambda: 1000)
    monkeypatch.setattr(run_module.tqdm, "write", said.append)
    run = train(tiny_recipe(photos, tmp_path, cache="ram", max_steps=1))
    assert run.images.cached is None
    assert "Not all images are cached: they need more than 25% of the free memory." in said


def test_free_memory_is_within_the_limits_of_cgroups(tmp_path: Path) -> None:
    assert free_memory() > 0
    group = tmp_path / "jobs" / "one"
    group.mkdir(parents=True)
    (tmp_path / "own").write_text("0::/jobs/one\n")
    for name, text in {"max": "1000", "current": "700", "stat": "anon 1\ninactive_file 50\n"}.items():
        (group / f"memory.{name}").write_text(text)
    (tmp_path / "jobs" / "memory.max").write_text("max\n")
    assert _free_in_cgroups(tmp_path, tmp_path / "own") == [350]


def test_sizes_are_read_from_headers(photos: Path) -> None:
    data = load_data(photos)
    assert stored_size(data.train, data.columns) == (14.0, 10.0)
