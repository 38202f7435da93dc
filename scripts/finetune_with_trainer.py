"""Fine-tune a model with transformers' Trainer, or train one from scratch.

    python scripts/finetune_with_trainer.py --data photos/ --model USER/MODEL --output_dir my-vit \
        --num_train_epochs 10 --learning_rate 3e-4 --push_to_hub --hub_model_id USER/my-vit

All fields of `TrainingArguments` are options. `--output_dir` gets the model, its model card and the checkpoints; the
same command with `--resume` resumes an interrupted run exactly.

With `--lora_rank 8`, only the head and low-rank updates of the other matrices are trained (LoRA, with peft). The
output folder has them in `adapter/`, and merged into the model. To load them onto the checkpoint:

    base = AutoModelForImageClassification.from_pretrained(MODEL, num_labels=N, ignore_mismatched_sizes=True)
    model = PeftModel.from_pretrained(base, "my-vit/adapter")

or, since transformers 5.23, `base.load_adapter("my-vit/adapter")`.
"""

import json
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser, TrainingArguments, set_seed

from hf_vit import HFViTForImageClassification, HFViTImageProcessor
from hf_vit.checkpoints.models import fields_of_labels, load_classifier
from hf_vit.data.augmentation import BatchMixer, build_augmentation
from hf_vit.data.images import EvaluationImages
from hf_vit.data.labelled import load_data
from hf_vit.hub.card import write_card
from hf_vit.hub.upload import push
from hf_vit.system.machine import machine
from hf_vit.training.trainer import Collator, EpochImages, ViTTrainer, accuracy, add_lora, last_complete_checkpoint
from hf_vit.variants import config_of

DEFAULTS = {
    "output_dir": "hf-vit-finetuned",
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "logging_nan_inf_filter": False,  # otherwise a loss of NaN is logged as 0
    "dataloader_pin_memory": torch.cuda.is_available(),
}


def option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class Options:
    data: str = field(metadata={"help": "Folder of images (one subfolder per class), parquet, or Hub dataset."})
    model: str | None = option(None, "Checkpoint to fine-tune, a folder or a Hub model.")
    variant: str = option("ViT-Ti/16", "Architecture to train from scratch if no model is given.")
    image_size: int | None = option(None, "Image size in pixels; by default that of the checkpoint, or 224.")
    augmentation: str = option("crop_flip", "Augmentation: a key of hf_vit.data.augmentation.AUGMENTATIONS.")
    smallest_crop: float = option(0.35, "Smallest share of an image's area in a random crop.")
    mixup: float = option(0.0, "Alpha of mixup; 0 is off.")
    lora_rank: int = option(0, "Rank of LoRA matrices; 0 trains all parameters.")
    resume: bool = option(False, "Whether to resume from the last complete checkpoint, if there is one.")
    license: str = option("apache-2.0", "License of the weights, as an identifier of the Hub.")


def main(arguments: list[str]) -> None:
    """Build, resume, train, evaluate, save, push."""
    parser = HfArgumentParser((Options, TrainingArguments), description=__doc__)
    parser.set_defaults(**DEFAULTS)
    options, training = parser.parse_args_into_dataclasses(arguments)
    training.remove_unused_columns = False
    # Trainer would pickle the token into every checkpoint, and push it. So this script pushes at the end instead.
    token, training.hub_token = training.hub_token, None
    is_pushed, training.push_to_hub = training.push_to_hub, False
    folder = Path(training.output_dir)
    if any(folder.glob("checkpoint-*")) and not options.resume:
        raise ValueError(f"{folder} holds checkpoints of a run: pass --resume to resume it, or choose another folder.")

    set_seed(training.seed)
    data = load_data(options.data)
    labels, size = data.label_names, {} if options.image_size is None else {"image_size": options.image_size}
    if options.model is not None:
        model, processor = load_classifier(options.model, labels, **size)
    else:
        model = HFViTForImageClassification(config_of(options.variant, **fields_of_labels(labels), **size))
        processor = HFViTImageProcessor.from_preset("original", model.config.image_shape)
    augmentation = build_augmentation(options.augmentation, model.config.image_shape, options.smallest_crop)
    learner = add_lora(model, options.lora_rank) if options.lora_rank else model
    trainer = ViTTrainer(
        model=learner,
        args=training,
        train_dataset=EpochImages(data.train, data.columns, processor, augmentation, training.seed),
        eval_dataset=EvaluationImages(data.evaluation, data.columns, processor),
        data_collator=Collator(processor, BatchMixer(len(labels), mixup=options.mixup)),
        processing_class=processor,
        compute_metrics=accuracy,
    )
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
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
    is_local = Path(options.data).exists() or options.data == "digits"
    write_card(
        folder,
        results={"accuracy": metrics["eval_accuracy"]},
        measured={"command": f"`{command}`", "hardware": machine(), "seeds": str(training.seed)},
        dataset=Path(options.data).name if is_local else options.data,
        dataset_id=None if is_local else options.data,
        split=data.eval_split,
        license=options.license,
        base_model=None if options.model is None or Path(options.model).exists() else options.model,
    )
    if is_pushed:
        is_private = bool(training.hub_private_repo)
        print(push(folder, training.hub_model_id or folder.name, private=is_private, token=token))


if __name__ == "__main__":
    main(sys.argv[1:])
