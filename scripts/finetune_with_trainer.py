"""Fine-tune a model with transformers' Trainer, or train one from scratch.

    python scripts/finetune_with_trainer.py --data photos/ --model USER/MODEL --output_dir my-vit \
        --push_to_hub --hub_model_id USER/my-vit

The data is anything that `hf-vit train` reads, with one or several labels per image, or with numbers to predict. All
fields of `TrainingArguments` are options. What is not given, such as the learning rate, is chosen as by `hf-vit train`
and printed with the reason. The model that is left is the best by the metric of the task, and
`--early_stopping_patience N` ends a run after N evaluations without improvement.

`--output_dir` gets the model, its model card and the checkpoints; the same command with `--resume` resumes an
interrupted run exactly.

With `--lora_rank 8`, only the head and low-rank updates of the other matrices are trained (LoRA, with peft). The
output folder has them in `adapter/`, and merged into the model. To load them onto the checkpoint:

    base = AutoModelForImageClassification.from_pretrained(MODEL, num_labels=N, ignore_mismatched_sizes=True)
    model = PeftModel.from_pretrained(base, "my-vit/adapter")

or, since transformers 5.23, `base.load_adapter("my-vit/adapter")`.
"""

import argparse
import json
import shlex
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from transformers import EarlyStoppingCallback, HfArgumentParser, Trainer, TrainingArguments, set_seed

from hf_vit.data.augmentation import BatchMixer, build_augmentation
from hf_vit.data.channels import adapt_processor, channels_of
from hf_vit.data.images import EvaluationImages
from hf_vit.data.labelled import RECIPE, ImageData
from hf_vit.hub.card import write_card
from hf_vit.hub.upload import push
from hf_vit.system.disk import check_output_folder
from hf_vit.system.machine import machine as hardware
from hf_vit.system.texts import markdown
from hf_vit.training.recipe import TrainConfig
from hf_vit.training.report import base_model_of, license_of_base
from hf_vit.training.run import cache_limit, data_of, resolved, with_channels
from hf_vit.training.tasks import TASKS, build_model
from hf_vit.training.trainer import Collator, EpochImages, ViTTrainer, add_lora, last_complete_checkpoint, metrics_of
from hf_vit.training.trainer_arguments import (
    TrainerMachine,
    arguments_of,
    recipe_of,
    shown,
    values_of_run,
    write_recipe,
)
from hf_vit.training.views import VIEWS, describe_data

# Arguments that are neither Trainer's default nor chosen.
DEFAULTS = {
    "save_total_limit": 2,
    "logging_nan_inf_filter": False,  # otherwise a loss of NaN is logged as 0
    "dataloader_pin_memory": torch.cuda.is_available(),
    "remove_unused_columns": False,
}


def option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class Options:
    data: list[str] = field(
        metadata={"help": "Folders, tables or archives of images, or data sets on the Hub.", "action": "extend"}
    )
    image_column: str | None = option(None, "Name of the image column; found by default.")
    label_column: list[str] | None = field(
        default=None, metadata={"help": "Names of the columns of labels; found by default.", "action": "extend"}
    )
    label_separator: str | None = option(None, "Text between several labels of one image; found by default.")
    task: Literal["auto", "classification", "multi_label", "regression"] = option(
        "auto", "Training objective; auto for what the labels are."
    )
    class_weights: Literal["none", "balanced", "effective"] = option("none", "Weights of classes in the loss.")
    model: str | None = option(None, "Checkpoint to fine-tune, a folder or a Hub model.")
    variant: str = option("ViT-Ti/16", "Architecture to train from scratch if no model is given.")
    image_size: str | None = option(
        None, "Image size in pixels, as H or HxW; by default that of the checkpoint, or up to 224."
    )
    augmentation: str = option("crop_flip", "Augmentation: a key of hf_vit.data.augmentation.AUGMENTATIONS.")
    smallest_crop: float | None = option(None, "Smallest share of an image's area in a random crop.")
    mixup: float | None = option(None, "Alpha of mixup; 0 is off. By default that of the augmentation, or 0.")
    layer_decay: float | None = option(None, "Factor on the learning rate per layer, counted from the head.")
    early_stopping_patience: int | None = option(None, "Number of evaluations without improvement that end a run.")
    lora_rank: int = option(0, "Rank of LoRA matrices; 0 trains all parameters.")
    resume: bool = option(False, "Whether to resume from the last complete checkpoint, if there is one.")
    license: str | None = option(None, "License of the weights, as an identifier of the Hub.")


def parse(arguments: list[str]) -> tuple[Options, dict[str, Any]]:
    """Return the options, and the arguments of Trainer that are given."""
    parser = HfArgumentParser((Options, TrainingArguments), description=__doc__)
    names = {item.name for item in fields(Options)}
    for action in parser._actions:
        if action.dest not in names:
            action.default = argparse.SUPPRESS
    values = vars(parser.parse_args(arguments))
    options = Options(**{name: values.pop(name) for name in names})
    return options, {"output_dir": "hf-vit-finetuned", **values}


def main(arguments: list[str]) -> None:
    """Build, resume, train, evaluate, save, push."""
    options, given = parse(arguments)
    # Trainer would pickle the token into every checkpoint, and push it. So this script pushes at the end instead.
    token, is_pushed = given.pop("hub_token", None), given.pop("push_to_hub", False)
    folder = Path(given["output_dir"])
    is_ours = (folder / RECIPE).is_file() or any(folder.glob("checkpoint-*"))
    check_output_folder(folder, is_ours, options.data, "--output_dir")
    if any(folder.glob("checkpoint-*")) and not options.resume:
        raise ValueError(f"{folder} holds checkpoints of a run: pass --resume to resume it, or choose another folder.")

    devices, checkpoint = TrainerMachine.of(given), last_complete_checkpoint(folder)
    values = values_of_run(folder, checkpoint, devices.num_processes) if options.resume else {}
    config = recipe_of(vars(options), given, devices.num_processes, values)
    with PartialState().main_process_first():  # the other processes read what the first one has cached
        data = data_of(config)
    channels = channels_of(data.train, data.columns)
    say = print if devices.is_main_process else lambda *text: None
    for line in describe_data(data):
        say(line)
    config = resolved(with_channels(config, channels), data, devices)
    chosen = arguments_of(config, given, devices, data.train_length)
    say(f"Arguments of Trainer: {shown(chosen)}")
    training = TrainingArguments(**{**DEFAULTS, **chosen, **given})
    if devices.is_main_process:
        write_recipe(config, folder)

    set_seed(training.seed)
    task = TASKS[config.task](config, data)
    model, processor = build_model(config, task)
    model.config.image_size = config.image_size  # one number for squares
    adapt_processor(processor, channels, model.config.num_channels)
    augmentation = build_augmentation(
        config.augmentation,
        model.config.image_shape,
        config.smallest_crop,
        fill=processor.image_mean,
        num_channels=model.config.num_channels,
    )
    limit = cache_limit(devices, config)
    images = EpochImages(
        data.train, data.columns, processor, augmentation, training.seed, config.cache, config.shorter_side, limit
    )
    learner = add_lora(model, options.lora_rank) if options.lora_rank else model
    trainer = ViTTrainer(
        model=learner,
        args=training,
        train_dataset=images,
        eval_dataset=EvaluationImages(
            data.evaluation, data.columns, processor, config.cache, limit - images.cached_bytes
        ),
        data_collator=Collator(processor, BatchMixer(len(data.label_names), mixup=config.mixup or 0.0)),
        processing_class=processor,
        compute_metrics=metrics_of(model.config),
        layer_decay=config.layer_decay,
        class_weights=getattr(task, "class_weights", None),
        callbacks=[EarlyStoppingCallback(config.early_stopping)] if config.early_stopping else None,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    metrics = trainer.evaluate()
    if options.lora_rank:
        learner.save_pretrained(folder / "adapter", is_main_process=trainer.is_world_process_zero())
        trainer.model = learner.merge_and_unload()
    trainer.save_model()
    if not trainer.is_world_process_zero():
        return
    (folder / "training_args.bin").unlink()  # a pickle must not be in a folder that may be pushed
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    command = shlex.join(["finetune_with_trainer.py", *arguments]).replace(token or "\0", "TOKEN")
    report(trainer, config, data, metrics, command, options)
    if is_pushed:
        is_private = bool(training.hub_private_repo)
        print(push(folder, training.hub_model_id or folder.name, private=is_private, token=token))


def report(
    trainer: Trainer, config: TrainConfig, data: ImageData, metrics: dict[str, Any], command: str, options: Options
) -> None:
    """Print the result, and write the model card."""
    view, state = VIEWS[data.problem_type], trainer.state
    print(f"{view.headline.format(**metrics)} on {metrics['eval_count']:,} evaluation images ({data.eval_split}).")
    description = (
        f"{view.kind} on {data.train_length:,} images of {markdown(data.name)} for {state.global_step:,} steps, and "
        f"evaluated on {metrics['eval_count']:,} other images."
    )
    if trainer.args.load_best_model_at_end:
        metric = trainer.args.metric_for_best_model
        description += (
            f" It is the model of step {state.best_global_step:,}, the best by `{metric}` of all evaluations. The "
            "metrics are of the images that chose it, so expect slightly lower ones on others."
        )
    source = options.data[0]
    is_on_hub = len(options.data) == 1 and not Path(source).exists() and source != "digits"
    write_card(
        config.output_dir,
        description=description,
        results={name: metrics[key] for key, name in view.results.items() if key in metrics},
        measured={"command": f"`{command}`", "hardware": hardware(), "seeds": str(trainer.args.seed)},
        dataset=data.name,
        dataset_id=source if is_on_hub else None,
        split=data.eval_split,
        license=options.license or license_of_base(config.model),
        base_model=base_model_of(config),
    )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"Error: {error}")
