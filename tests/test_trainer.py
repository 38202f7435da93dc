"""transformers' Trainer: through its script, through mixed labels, and through a kill."""

import json
import math
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from isolated import environment, save_tiny_classifier
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import TrainingArguments

import hf_vit
from hf_vit.checkpoints.models import load_classifier
from hf_vit.data.augmentation import BatchMixer
from hf_vit.data.images import collate, normalize
from hf_vit.hub.folder import check_folder
from hf_vit.training.trainer import Collator, ViTTrainer, last_complete_checkpoint
from hf_vit.training.trainer_arguments import TrainerMachine, arguments_of, recipe_of

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
CLASSES = {"blue": (0, 0, 200), "green": (0, 200, 0), "red": (200, 0, 0)}
QUIET = ["--disable_tqdm", "true", "--report_to", "none", "--use_cpu", "true"]
SECRET = "hf_a_secret_of_the_user"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return __import__("finetune_with_trainer")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten noisy images of each of three colours, in a folder a colour."""
    folder = tmp_path_factory.mktemp("data") / "photos"
    generator = np.random.default_rng(0)
    for name, colour in CLASSES.items():
        (folder / name).mkdir(parents=True)
        for index in range(10):
            pixels = np.clip(generator.normal(colour, 40, size=(40, 52, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_classifier(tmp_path_factory.mktemp("model") / "tiny-vit")


def test_script_leaves_a_model_that_may_travel(
    script: ModuleType, photos: Path, checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "colours"
    arguments = ["--data", str(photos), "--model", str(checkpoint), "--output_dir", str(folder), *QUIET]
    arguments += ["--num_train_epochs", "6", "--per_device_train_batch_size", "4", "--learning_rate", "3e-3"]
    arguments += ["--mixup", "0.2", "--logging_steps", "1", "--weight_decay", "0.01", "--hub_token", SECRET]
    script.main(arguments)

    assert "New head for 3 labels (blue, green, red)" in caplog.text
    model = hf_vit.HFViTForImageClassification.from_pretrained(folder)
    assert model.config.id2label == dict(enumerate(CLASSES))
    assert model.config.label2id == {name: index for index, name in enumerate(CLASSES)}
    assert model.config.problem_type == "single_label_classification"
    processor = hf_vit.HFViTImageProcessor.from_pretrained(folder)
    image = Image.new("RGB", (50, 40), CLASSES["green"])
    with torch.no_grad():
        logits = model.eval()(**processor(image, return_tensors="pt")).logits
    assert model.config.id2label[int(logits.argmax())] == "green"

    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["eval_accuracy"] > 0.8
    card = ModelCard.load(folder / "README.md")
    assert card.data.eval_results and card.data.eval_results[0].metric_value == metrics["eval_accuracy"]
    assert "--mixup 0.2" in card.text and "- seeds: 42" in card.text
    assert "model.safetensors" in check_folder(folder)
    assert not [path for path in folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]

    with pytest.raises(ValueError, match="--resume"):
        script.main(arguments)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_script_learns_by_lora(script: ModuleType, photos: Path, checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "colours"
    arguments = ["--data", str(photos), "--model", str(checkpoint), "--output_dir", str(folder), *QUIET]
    arguments += ["--lora_rank", "4", "--max_steps", "20", "--learning_rate", "1e-2", "--eval_strategy", "no"]
    script.main([*arguments, "--save_steps", "10", "--save_strategy", "steps"])
    assert json.loads((folder / "metrics.json").read_text())["eval_accuracy"] > 0.8
    assert "model.safetensors" in (names := check_folder(folder)) and not [name for name in names if "adapter" in name]

    merged = hf_vit.HFViTForImageClassification.from_pretrained(folder).eval()
    base, _ = load_classifier(checkpoint, list(CLASSES))
    adapted = PeftModel.from_pretrained(base, folder / "adapter").eval()
    pixel_values = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        torch.testing.assert_close(adapted(pixel_values=pixel_values).logits, merged(pixel_values).logits)

    expected = load_file(folder / "model.safetensors")
    for path in (folder / "checkpoint-20", folder / "adapter"):
        shutil.rmtree(path)
    script.main([*arguments, "--save_steps", "10", "--save_strategy", "steps", "--resume"])
    resumed = load_file(folder / "model.safetensors")
    assert [name for name in expected if not torch.equal(expected[name], resumed[name])] == []


def test_script_trains_from_scratch(script: ModuleType, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "scratch"
    arguments = ["--data", str(photos), "--image_size", "32", "--output_dir", str(folder), *QUIET]
    script.main([*arguments, "--max_steps", "1", "--save_strategy", "no", "--eval_strategy", "no"])
    config = hf_vit.HFViTConfig.from_pretrained(folder)
    assert (config.hidden_size, config.image_size, config.num_labels) == (192, 32, 3)
    assert "model.safetensors" in check_folder(folder)


def table_of(folder: Path, columns: dict[str, list[object]], channels: int = 3) -> Path:
    """Write noise as images, and a table of their names and labels."""
    folder.mkdir()
    rows = len(next(iter(columns.values())))
    generator = np.random.default_rng(0)
    names = []
    for index in range(rows):
        pixels = generator.integers(256, size=(32, 48, channels), dtype=np.uint8)
        names.append(f"{index}.png" if channels == 3 else f"{index}.npy")
        Image.fromarray(pixels).save(folder / names[-1]) if channels == 3 else np.save(folder / names[-1], pixels)
    lines = [",".join(["file_name", *columns])]
    lines += [",".join(map(str, row)) for row in zip(names, *columns.values(), strict=True)]
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    return folder / "table.csv"


def run_of(script: ModuleType, data: Path, model: Path, folder: Path, *arguments: object) -> dict:
    """Run the script for two steps, or as the arguments say; return the metrics."""
    given = ["--data", data, "--model", model, "--output_dir", folder, *QUIET, "--max_steps", 2, *arguments]
    script.main([str(argument) for argument in given])
    assert "model.safetensors" in check_folder(folder)
    return json.loads((folder / "metrics.json").read_text())


def test_script_learns_several_labels(script: ModuleType, checkpoint: Path, tmp_path: Path) -> None:
    options = ["--class_weights", "balanced", "--mixup", 0.2]
    table = table_of(tmp_path / "data", {"tags": ["red|big", "red", "big", "small|red"] * 5})
    metrics = run_of(script, table, checkpoint, tmp_path / "run", "--label_separator", "|", *options)
    assert 0 <= metrics["eval_mean_average_precision"] <= 1 and metrics["eval_count"] == 4
    config = hf_vit.HFViTConfig.from_pretrained(tmp_path / "run")
    assert config.problem_type == "multi_label_classification" and len(config.thresholds) == 3
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.eval_results[0].metric_type == "mean_average_precision"
    assert "the best by `mean_average_precision`" in card.text


def test_script_learns_targets(script: ModuleType, checkpoint: Path, tmp_path: Path) -> None:
    table = table_of(tmp_path / "data", {"height": [100.5 + n for n in range(20)], "age": [n % 7 for n in range(20)]})
    options = ["--label_column", "height", "age", "--task", "regression"]
    metrics = run_of(script, table, checkpoint, tmp_path / "run", *options)
    assert metrics["eval_mae"] < 20 and "eval_r2" in metrics  # in units of the data
    model = hf_vit.HFViTForImageClassification.from_pretrained(tmp_path / "run")
    assert list(model.config.id2label.values()) == ["height", "age"] and model.config.target_mean[0] > 100
    assert ModelCard.load(tmp_path / "run" / "README.md").data.eval_results[0].metric_type == "r2"


def test_script_reads_other_channels(script: ModuleType, checkpoint: Path, tmp_path: Path) -> None:
    table = table_of(tmp_path / "data", {"label": ["a", "b"] * 5}, channels=5)
    run_of(script, table, checkpoint, tmp_path / "run", "--class_weights", "effective")
    processor = hf_vit.HFViTImageProcessor.from_pretrained(tmp_path / "run")
    assert hf_vit.HFViTConfig.from_pretrained(tmp_path / "run").num_channels == 5 == len(processor.image_mean)


@pytest.mark.slow
def test_best_model_and_early_stopping_resume(
    script: ModuleType, photos: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "run"
    options = ["--max_steps", 12, "--eval_steps", 1, "--early_stopping_patience", 2, "--metric_for_best_model", "loss"]
    options += ["--learning_rate", 0.5, "--save_total_limit", 9, "--layer_decay", 0.9]  # so that it gets worse
    metrics = run_of(script, photos, checkpoint, folder, *options)
    printed = capsys.readouterr().out
    assert "Training images per class: blue 8, green 8, red 8." in printed
    assert "batch_size " in printed and "--per_device_train_batch_size" in printed
    steps = sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))
    state = json.loads((folder / f"checkpoint-{steps[-1]}" / "trainer_state.json").read_text())
    assert state["best_global_step"] == steps[-3] and steps[-1] < 12
    expected = load_file(folder / "model.safetensors")
    assert all(
        map(
            torch.equal,
            expected.values(),
            load_file(folder / f"checkpoint-{steps[-3]}" / "model.safetensors").values(),
        )
    )

    shutil.rmtree(folder / f"checkpoint-{steps[-1]}")
    resumed = run_of(script, photos, checkpoint, folder, *options, "--resume")
    assert "Chosen from" not in capsys.readouterr().out
    assert {name: resumed[name] for name in ("eval_loss", "eval_accuracy")} == {
        name: metrics[name] for name in ("eval_loss", "eval_accuracy")
    }
    assert sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")) == steps


def test_runs_of_older_versions_resume(
    script: ModuleType, photos: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    options = ["--save_strategy", "steps", "--save_steps", 1, "--eval_strategy", "no"]
    run_of(script, photos, checkpoint, tmp_path / "run", *options, "--layer_decay", 1)
    (tmp_path / "run" / "recipe.yaml").unlink()
    capsys.readouterr()
    run_of(script, photos, checkpoint, tmp_path / "run", *options, "--resume", "--max_steps", 3)
    printed = capsys.readouterr().out
    assert "--learning_rate 5e-05" in printed and "--lr_scheduler_type linear" in printed
    assert "--per_device_train_batch_size 8" in printed and "--load_best_model_at_end False" in printed
    assert (tmp_path / "run" / "checkpoint-3").is_dir()


MACHINE = TrainerMachine(torch.device("cpu"), 2, True, "no")
EVERY = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 20, "save_steps": 20}


@pytest.mark.parametrize(
    ("given", "eval_every", "expected"),
    [
        ({}, 1.0, {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}),
        ({}, 2.0, {**EVERY, "load_best_model_at_end": True}),
        ({"eval_steps": 20}, 1.0, {**EVERY, "load_best_model_at_end": True}),
        ({"save_strategy": "steps", "save_steps": 20}, 1.0, {**EVERY, "load_best_model_at_end": True}),
        ({"eval_strategy": "no"}, 1.0, {"save_strategy": "epoch", "load_best_model_at_end": False}),
        ({"save_strategy": "best"}, 1.0, {"eval_strategy": "epoch", "load_best_model_at_end": True}),
        ({"eval_steps": 20, "save_steps": 30}, 1.0, {"eval_strategy": "steps", "load_best_model_at_end": False}),
        ({"metric_for_best_model": "loss"}, 1.0, {"greater_is_better": False, "load_best_model_at_end": True}),
        (
            {"max_steps": 4, "learning_rate": 1.0},
            1.0,
            {"per_device_train_batch_size": 5, "lr_scheduler_type": "cosine"},
        ),
    ],
)
def test_given_arguments_win(tmp_path: Path, given: dict, eval_every: float, expected: dict) -> None:
    given = {**given, "output_dir": str(tmp_path)}
    options = {"data": ["photos"], "model": "ViT-Ti/16", "task": "auto", "augmentation": "augreg_light2"}
    options |= {"early_stopping_patience": None, "lora_rank": 0, "resume": False}
    config = recipe_of(options, given, 2, {})
    assert config.mixup == 0.2 and "batch_size" in config.auto
    values = {"batch_size": 20, "accumulation_steps": 2, "eval_every": eval_every}
    if "metric_for_best_model" not in given:
        values["best_metric"] = "accuracy"
    arguments = arguments_of(replace(config, auto=[], **values), given, MACHINE, train_images=200)
    assert not arguments.keys() & given.keys()
    assert {name: {**arguments, **given}[name] for name in expected} == expected
    TrainingArguments(**{**arguments, **given})
    assert arguments_of(config, given, replace(MACHINE, mixed_precision="bf16"), train_images=200)["bf16"]


def test_layers_learn_at_decayed_rates(tiny_config, tmp_path: Path) -> None:
    model = hf_vit.HFViTForImageClassification(tiny_config())
    trainer = trainer_of(model, tmp_path, learning_rate=1e-3, weight_decay=0.1, layer_decay=0.5)
    trainer.train()
    rates = {id(p): group["initial_lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    decays = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    depth = model.config.num_hidden_layers
    assert rates[id(model.classifier.weight)] == 1e-3 == trainer.optimizer.param_groups[0]["initial_lr"]
    assert rates[id(model.vit.layers[0].mlp.fc1.weight)] == pytest.approx(1e-3 * 0.5**depth)
    assert (decays[id(model.classifier.weight)], decays[id(model.classifier.bias)]) == (0.1, 0)


def test_classes_have_weights(tiny_config, tmp_path: Path) -> None:
    config = tiny_config(problem_type="single_label_classification", zero_init_head=True)
    weights = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0])
    trainer = trainer_of(
        hf_vit.HFViTForImageClassification(config),
        tmp_path,
        class_weights=weights,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    )
    trainer.data_collator = Collator(hf_vit.HFViTImageProcessor(), BatchMixer(5))
    trainer.train()
    # Two of eight images are of the class with the weight 1.
    assert trainer.state.log_history[0]["loss"] == pytest.approx(2 / 8 * math.log(5), abs=1e-4)


def trainer_of(
    model: torch.nn.Module,
    tmp_path: Path,
    layer_decay: float = 1.0,
    class_weights: torch.Tensor | None = None,
    **arguments: object,
) -> ViTTrainer:
    settings = {"max_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    settings |= {"remove_unused_columns": False, "dataloader_pin_memory": False, "logging_steps": 1, **arguments}
    generator = torch.Generator().manual_seed(0)
    examples = [
        {
            "pixel_values": torch.randint(256, (3, 32, 48), generator=generator, dtype=torch.uint8),
            "labels": index % 5,
            "index": index,
            "broken": None,
            "seed": index,
        }
        for index in range(8)
    ]
    collator = Collator(hf_vit.HFViTImageProcessor(), BatchMixer(5, mixup=1.0))
    arguments_of_trainer = TrainingArguments(str(tmp_path / "run"), **settings)
    return ViTTrainer(
        model,
        arguments_of_trainer,
        train_dataset=Examples(examples),
        data_collator=collator,
        layer_decay=layer_decay,
        class_weights=class_weights,
    )


class Examples(list):
    epoch = 0


@pytest.mark.parametrize("accumulation", [1, 2])
def test_mixed_labels_stay_one_problem(tiny_config, tmp_path: Path, accumulation: int) -> None:
    config = tiny_config(problem_type="single_label_classification", zero_init_head=True)
    model = hf_vit.HFViTForImageClassification(config)
    trainer = trainer_of(
        model, tmp_path, per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation
    )
    trainer.train()
    # A head of zeros is undecided between five classes, however their labels are mixed; BCE would give log(2).
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(5), abs=1e-4)
    assert model.config.problem_type == "single_label_classification"
    examples = [trainer.train_dataset[index] for index in range(8)]
    batch = trainer.data_collator(examples)
    soft = batch["labels"]
    assert soft.shape == (8, 5) and soft.dtype == torch.float32
    torch.testing.assert_close(soft.sum(dim=1), torch.ones(8))
    assert ((soft > 0) & (soft < 1)).any()
    # Pixels are mixed on the device, as the labels were.
    whole = collate(examples)
    pixel_values = normalize(whole["pixel_values"], trainer.data_collator.processor)
    generator = torch.Generator().manual_seed(examples[0]["seed"])
    expected = trainer.data_collator.mixer(pixel_values, whole["labels"], generator)
    inputs = trainer._prepare_inputs(batch)
    assert batch["pixels"].dtype == torch.uint8
    assert torch.equal(inputs["pixel_values"], expected[0]) and torch.equal(inputs["labels"], expected[1])


def test_evaluation_is_not_mixed(tiny_config, tmp_path: Path) -> None:
    trainer = trainer_of(hf_vit.HFViTForImageClassification(tiny_config()), tmp_path)
    examples = [
        {name: value for name, value in example.items() if name != "seed"} for example in trainer.train_dataset
    ]
    batch = trainer._prepare_inputs(trainer.data_collator(examples))
    assert batch["labels"].tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    pixels = torch.stack([example["pixel_values"] for example in examples])
    expected = hf_vit.HFViTImageProcessor()(list(pixels), do_resize=False, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(batch["pixel_values"], expected)


def test_images_know_their_epoch(tiny_config, tmp_path: Path) -> None:
    model = hf_vit.HFViTForImageClassification(tiny_config())
    trainer = trainer_of(model, tmp_path, max_steps=-1, num_train_epochs=3)
    trainer.train()
    assert trainer.train_dataset.epoch == 2


def test_decay_spares_what_is_no_matrix(tiny_config, tmp_path: Path) -> None:
    model = hf_vit.HFViTForImageClassification(tiny_config(num_register_tokens=2, use_qk_norm=True))
    trainer = trainer_of(model, tmp_path, weight_decay=0.1)
    decayed = set(trainer.get_decay_parameter_names(model))
    kept = {name for name, _ in model.named_parameters()} - decayed
    assert {"classifier.weight", "vit.layers.0.attention.qkv.weight"} <= decayed <= set(model.state_dict())
    assert not [name for name in decayed if "norm" in name or "position" in name or name.endswith("bias")]
    assert {"vit.embeddings.cls_token", "vit.embeddings.register_tokens"} <= kept


def test_what_a_kill_left_is_passed_over(tmp_path: Path) -> None:
    assert last_complete_checkpoint(tmp_path) is None
    for step, state in {9: '{"epoch": 1}', 10: '{"epoch": 2}', 11: '{"epo', 12: None}.items():
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


# Dies in the middle of the second epoch, behind the checkpoint of step 8.
KILLED = """
import os, signal, sys

from hf_vit.training.trainer import ViTTrainer

sys.path.insert(0, sys.argv.pop(1))
import finetune_with_trainer

steps, training_step = [], ViTTrainer.training_step


def step(self, *arguments, **options):
    steps.append(1)
    if len(steps) == 10:
        os.kill(os.getpid(), signal.SIGKILL)
    return training_step(self, *arguments, **options)


ViTTrainer.training_step = step
finetune_with_trainer.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_killed_run_goes_on_with_the_very_weights(
    script: ModuleType, photos: Path, tiny_config, tmp_path: Path
) -> None:
    start = tmp_path / "start"
    hf_vit.HFViTForImageClassification(tiny_config(hidden_dropout_prob=0.1, drop_path_rate=0.1)).save_pretrained(start)
    arguments = ["--data", str(photos), "--model", str(start), "--mixup", "0.5", "--augmentation", "trivial", *QUIET]
    arguments += ["--max_steps", "14", "--save_strategy", "steps", "--save_steps", "4", "--eval_strategy", "no"]
    arguments += ["--per_device_train_batch_size", "4", "--learning_rate", "1e-3"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    script.main([*arguments, "--output_dir", str(whole)])

    command = [sys.executable, "-c", KILLED, str(SCRIPTS), *arguments, "--output_dir", str(killed)]
    home = tmp_path / "home"
    died = subprocess.run(command, env=environment(home, has_package=True), cwd=tmp_path, capture_output=True)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    assert last_complete_checkpoint(killed) == str(killed / "checkpoint-8")
    assert not (killed / "model.safetensors").exists()

    script.main([*arguments, "--output_dir", str(killed), "--resume"])
    expected, resumed = (load_file(folder / "model.safetensors") for folder in (whole, killed))
    assert expected.keys() == resumed.keys()
    assert [name for name in expected if not torch.equal(expected[name], resumed[name])] == []
