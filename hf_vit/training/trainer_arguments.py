"""Between recipes and the arguments of transformers' Trainer: what a user gives, and what follows from it.

The arguments that a user gives are fields of a recipe. The other fields are chosen as in `hf-vit train`, and become
arguments again.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainingArguments

from ..data.augmentation import AUGREG_MIXUP
from ..data.labelled import RECIPE
from ..evaluation.metrics import LOWER_IS_BETTER
from ..model.configuration_hf_vit import HFViTConfig
from ..system.disk import writing
from ..system.machine import resolve_precision
from .recipe import AUTO, TrainConfig, default_recipe, default_values
from .report import for_others

# Fields of a recipe, by the arguments that have the same meaning.
SAME = {
    "learning_rate": "learning_rate",
    "num_train_epochs": "epochs",
    "gradient_accumulation_steps": "accumulation_steps",
    "dataloader_num_workers": "num_workers",
    "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm",
    "logging_steps": "log_every",
    "seed": "seed",
}
# Arguments that decide which devices are used.
OF_MACHINE = ("output_dir", "use_cpu", "bf16", "fp16", "ddp_backend", "ddp_timeout")
# What the first versions of scripts/finetune_with_trainer.py did, which wrote no recipe: their runs resume with it.
WITHOUT_RECIPE = {
    "smallest_crop": 0.35, "preprocessing": "original", "cache": "none", "shorter_side": None, "num_workers": 0,
    "epochs": 3.0, "accumulation_steps": 1, "learning_rate": 5e-5, "weight_decay": 0.0, "betas": [0.9, 0.999],
    "layer_decay": 1.0, "schedule": "linear", "warmup_epochs": 0.0, "eval_every": 1.0, "best_metric": None,
    "log_every": 500,
}  # fmt: skip


@dataclass(frozen=True)
class TrainerMachine:
    """The devices of Trainer, as far as the choice of defaults depends on them; names are Accelerate's."""

    device: torch.device
    num_processes: int
    is_main_process: bool
    mixed_precision: str

    @classmethod
    def of(cls, given: dict[str, Any]) -> "TrainerMachine":
        """Return the machine that Trainer would use with these arguments. It counts a process for every device."""
        training = TrainingArguments(**{name: given[name] for name in OF_MACHINE if name in given})
        precision = "bf16" if training.bf16 else "fp16" if training.fp16 else "no"
        # As in `hf-vit train`, but only on GPUs: Trainer counts on bf16 of a CPU only if it is asked for.
        if not given.keys() & {"bf16", "fp16"} and training.device.type == "cuda":
            precision = resolve_precision("auto")
        processes = training.world_size * max(1, training.n_gpu)
        return cls(training.device, processes, training.process_index == 0, precision)


def recipe_of(options: dict[str, Any], given: dict[str, Any], processes: int, values: dict[str, Any]) -> TrainConfig:
    """Return the recipe that corresponds to arguments of Trainer; other fields are `auto` or the recipe's own.

    Args:
        options: Fields of a recipe, and options of scripts/finetune_with_trainer.py; `None` leaves a field open.
        given: The arguments of Trainer that the user gave.
        processes: Number of devices.
        values: Values of the interrupted run that is resumed, from `values_of_run`; given ones win.
    """
    stated: dict[str, Any] = {field: given[name] for name, field in SAME.items() if name in given}
    if "per_device_train_batch_size" in given:
        stated.setdefault("accumulation_steps", 1)
        stated["batch_size"] = given["per_device_train_batch_size"] * processes * stated["accumulation_steps"]
    if given.get("max_steps", -1) > 0:
        stated["max_steps"] = given["max_steps"]
    if given.get("metric_for_best_model"):
        stated["best_metric"] = given["metric_for_best_model"].removeprefix("eval_")
    if "warmup_steps" in given:
        stated["warmup_epochs"] = 0
    kind = str(given.get("optim", ""))
    stated["optimizer"] = next((name for name in ("lion", "sgd") if name in kind), "adamw")
    renamed = {
        "data": options["data"][0] if len(options["data"]) == 1 else options["data"],
        "task": None if options["task"] == "auto" else options["task"],
        "model": options["model"] or options["variant"],
        "early_stopping": options["early_stopping_patience"],
        "trained": "lora" if options["lora_rank"] else None,
        "lora_rank": options["lora_rank"] or None,
        "resume": None,
        "output_dir": given["output_dir"],
    }
    fields = {name: value for name, value in {**options, **renamed}.items() if name in default_values()}
    fields = {name: value for name, value in fields.items() if value is not None}
    mixup = AUGREG_MIXUP.get(options["augmentation"], 0.0)
    return TrainConfig.from_recipe(default_recipe(renamed["model"]), **{"mixup": mixup, **values, **stated, **fields})


def values_of_run(folder: Path, checkpoint: str | None, processes: int) -> dict[str, Any]:
    """Return the values chosen by the interrupted run in a folder; empty if there is no run."""
    if (folder / RECIPE).is_file():
        saved = yaml.safe_load((folder / RECIPE).read_text(encoding="utf-8"))
        return {name: saved[name] for name in AUTO if name in saved}
    if checkpoint is None:
        return {}
    config = Path(checkpoint) / "config.json"  # a checkpoint of low-rank updates has none
    size = {"image_size": HFViTConfig.from_pretrained(checkpoint).image_size} if config.is_file() else {}
    return {**WITHOUT_RECIPE, "batch_size": 8 * processes, **size}


def write_recipe(config: TrainConfig, folder: Path) -> None:
    """Write a recipe into the folder of a run, so that the run resumes with the same values on any machine."""
    folder.mkdir(parents=True, exist_ok=True)
    with writing("the recipe", folder / RECIPE):
        (folder / RECIPE).write_text(for_others(config).to_yaml(), encoding="utf-8")


def arguments_of(
    config: TrainConfig, given: dict[str, Any], machine: TrainerMachine, train_images: int
) -> dict[str, Any]:
    """Return the arguments of Trainer that follow from a recipe without `auto` fields, and are not given."""
    share = max(1, math.ceil(config.batch_size / (machine.num_processes * config.accumulation_steps)))
    per_epoch = math.ceil(math.ceil(train_images / (share * machine.num_processes)) / config.accumulation_steps)
    arguments = {
        **{name: getattr(config, field) for name, field in SAME.items() if field != "seed"},
        "per_device_train_batch_size": share,
        "per_device_eval_batch_size": share,
        "warmup_steps": round(config.warmup_epochs / config.epochs, 3) if config.epochs else 0,
        "lr_scheduler_type": config.schedule,
        "adam_beta1": config.betas[0],
        "adam_beta2": config.betas[1],
        **_evaluations(given, config.eval_every, per_epoch),
        **({machine.mixed_precision: True} if machine.mixed_precision != "no" else {}),
    }
    arguments |= _best_model({**arguments, **given}, config.best_metric)
    if config.early_stopping is not None:
        arguments["restore_callback_states_from_checkpoint"] = True  # they count evaluations without improvement
        if str({**arguments, **given}["eval_strategy"]) == "no":
            raise ValueError("--early_stopping_patience needs evaluations: set --eval_strategy to epoch or steps.")
    if config.max_steps is not None:
        del arguments["num_train_epochs"]  # which max_steps overrides
    return {name: value for name, value in arguments.items() if name not in given}


def _evaluations(given: dict[str, Any], eval_every: float, steps_per_epoch: int) -> dict[str, Any]:
    """Return when to evaluate and to save: at the same steps, as the choice of the best model needs, if possible."""
    every = max(1, round(eval_every * steps_per_epoch))
    names = ("eval", "save")
    stated = [given[f"{name}_strategy"] for name in names if given.get(f"{name}_strategy") not in (None, "no", "best")]
    steps = [given[f"{name}_steps"] for name in names if f"{name}_steps" in given]
    strategy = str([*stated, "steps" if steps else "epoch" if eval_every == 1 else "steps"][0])
    arguments: dict[str, Any] = {f"{name}_strategy": strategy for name in names}
    return arguments | ({f"{name}_steps": [*steps, every][0] for name in names} if strategy == "steps" else {})


def _best_model(arguments: dict[str, Any], best_metric: str | None) -> dict[str, Any]:
    """Return the arguments of the choice of the best model, as far as evaluations and checkpoints allow it."""
    when = [str(arguments[f"{name}_strategy"]) for name in ("eval", "save")]  # enums of transformers are texts
    is_possible = when[1] == "best" or when[0] == when[1]
    if when == ["steps", "steps"]:
        is_possible = (arguments["save_steps"] / arguments["eval_steps"]).is_integer()
    metric = {"metric_for_best_model": best_metric, "greater_is_better": best_metric not in LOWER_IS_BETTER}
    is_chosen = best_metric is not None and is_possible and when[0] != "no"
    return {"load_best_model_at_end": is_chosen, **(metric if best_metric is not None else {})}


def shown(arguments: dict[str, Any]) -> str:
    """Return arguments as one would type them."""
    return " ".join(f"--{name} {value}" for name, value in arguments.items())
