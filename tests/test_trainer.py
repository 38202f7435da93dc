"""transformers' Trainer: through its script, through mixed labels, and through a kill."""

import json
import math
import shutil
import signal
import subprocess
import sys
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
from hf_vit.hub.folder import check_folder
from hf_vit.training.trainer import Collator, ViTTrainer, last_complete_checkpoint

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


def trainer_of(model: torch.nn.Module, tmp_path: Path, **arguments: object) -> ViTTrainer:
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
    return ViTTrainer(model, arguments_of_trainer, train_dataset=Examples(examples), data_collator=collator)


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
    soft = trainer.data_collator([trainer.train_dataset[index] for index in range(8)])["labels"]
    assert soft.shape == (8, 5) and soft.dtype == torch.float32
    torch.testing.assert_close(soft.sum(dim=1), torch.ones(8))
    assert ((soft > 0) & (soft < 1)).any()


def test_evaluation_is_not_mixed(tiny_config, tmp_path: Path) -> None:
    trainer = trainer_of(hf_vit.HFViTForImageClassification(tiny_config()), tmp_path)
    examples = [
        {name: value for name, value in example.items() if name != "seed"} for example in trainer.train_dataset
    ]
    batch = trainer.data_collator(examples)
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
