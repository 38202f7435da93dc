"""Compare `hf-vit fit` with a sweep of 20 trials, and with the defaults of other libraries, on small data sets.

    python scripts/benchmark_fit.py prepare DATA --flowers FOLDER --pets FOLDER --cifar10 FOLDER
    python scripts/benchmark_fit.py METHOD DATA/flowers --model ENCODER --seed 0 --output results.jsonl
    python scripts/benchmark_fit.py table results.jsonl

Every method gets the same training images, encoder and image size, and is measured once on the same test images, which
it never sees before. A row of the output states accuracy, CPU seconds and versions. Needs timm; sweep needs Optuna,
and lightly needs lightly-train (AGPL-3.0).

Methods:
    fit           `hf-vit fit` with its defaults and `--minutes`.
    train         `hf-vit train` with its defaults (recipe `finetune`), which holds out a fifth of the training images
                  to choose the best model.
    sweep         Optuna (TPE, median pruning), 20 trials, on a held-out fifth of the training images: trained
                  parameters, pooling, learning rate, layer decay, weight decay, epochs, crops, label smoothing. The
                  best setting is trained once more on all training images.
    transformers  Trainer with its default learning rate (5e-5), schedule, batch size (8) and 3 epochs, and the
                  transforms of examples/pytorch/image-classification in huggingface/transformers.
    timm          The author's arguments for fine-tuning a ViT (huggingface.co/timm/
                  vit_base_patch16_224.augreg2_in21k_ft_in1k, discussion 1): AdamW, 2e-4 at a batch size of 512 (scaled
                  by the square root, as timm does), layer decay 0.7, clipping at norm 2, RandAugment m8, CutMix,
                  stochastic depth 0.1; 10 epochs, of which 1 is warm-up, instead of 50.
    lightly       `lightly_train.train_image_classification` with its defaults (AdamW, learning rate 3e-4, batches of
                  16, its augmentation) in float32, for 10 epochs instead of 100,000 steps, of which 1 is warm-up
                  instead of 500 steps.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Image, load_dataset

from hf_vit.system.machine import machine, versions

NUMBER_OF_TRIALS = 20
SIZES = {"flowers": 70, "roses-tulips": 70, "pets": 70, "cifar10-1000": 56}  # pixels, so that all of this runs on CPUs


# ------------------------------------------------------------------------------------------------------ the data


def prepare(folder: Path, flowers: str, pets: str, cifar10: str) -> None:
    """Write the four data sets, each as train.parquet and test.parquet with the columns image and label."""
    stored = {name: _read(source) for name, source in (("flowers", flowers), ("pets", pets), ("cifar10", cifar10))}
    species = stored["pets"]
    for split in species:
        labels = [int(2 in classes) for classes in species[split]["classes"]]  # background, cat, dog
        species[split] = species[split].select_columns(["image"]).add_column("label", labels)
        species[split] = species[split].cast_column("label", ClassLabel(names=["cat", "dog"]))
    names = stored["flowers"]["train"].features["label"].names
    pair = [names.index("roses"), names.index("tulips")]
    two = {split: _only(data, pair) for split, data in stored["flowers"].items()}
    chosen = {
        "flowers": (_per_class(stored["flowers"]["train"], 80), stored["flowers"]["test"]),
        "roses-tulips": (_per_class(two["train"], 120), two["test"]),
        "pets": (species["train"], species["test"]),
        "cifar10-1000": (_per_class(stored["cifar10"]["train"], 100), _per_class(stored["cifar10"]["test"], 200)),
    }
    for name, splits in chosen.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for split, data in zip(("train", "test"), splits, strict=True):
            data.to_parquet(str(folder / name / f"{split}.parquet"))


def _read(source: str) -> dict[str, Dataset]:
    files = {split: str(Path(source) / f"{split}.parquet") for split in ("train", "test")}
    return {
        name: data.cast_column("image", Image(decode=False))
        for name, data in load_dataset("parquet", data_files=files).items()
    }


def _per_class(data: Dataset, number: int) -> Dataset:
    labels = np.array(data["label"])
    generator = np.random.default_rng(0)
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    return data.select(np.sort(np.concatenate([generator.permutation(each)[:number] for each in members])))


def _only(data: Dataset, classes: list[int]) -> Dataset:
    names = [data.features["label"].names[label] for label in classes]
    kept = data.select([index for index, label in enumerate(data["label"]) if label in classes])
    labels = [classes.index(label) for label in kept["label"]]
    return kept.remove_columns("label").add_column("label", labels).cast_column("label", ClassLabel(names=names))


# --------------------------------------------------------------------------------------------- fit and the sweep


def fit(data: Path, model: str, size: int, seed: int, minutes: float) -> dict[str, Any]:
    """Run `hf-vit fit`; the test images are its evaluation split, which it uses for nothing but the final metrics."""
    from hf_vit.training.fitting.fit import fit as fit_classifier

    with tempfile.TemporaryDirectory() as folder:
        result = fit_classifier(
            str(data), model=model, minutes=minutes, output_dir=f"{folder}/model", seed=seed, image_size=size,
            cache=f"{folder}/features", say=lambda line: None,
        )  # fmt: skip
        return {"accuracy": result.metrics["eval_accuracy"], "details": result.metrics}


def recipe(data: Path, model: str, size: int, seed: int, minutes: float) -> dict[str, Any]:
    """Run `hf-vit train` on the training images alone, and measure the model on the test images."""
    import hf_vit

    with tempfile.TemporaryDirectory() as folder:
        trained = hf_vit.train(
            str(data / "train.parquet"), model=model, image_size=size, seed=seed, output_dir=f"{folder}/model"
        )
        return {"accuracy": trained.evaluate(data / "test.parquet")["accuracy"], "details": trained.metrics}


def sweep(data: Path, model: str, size: int, seed: int, minutes: float) -> dict[str, Any]:
    """Search with Optuna, then train by the best setting on all training images."""
    import optuna

    from hf_vit.training.loop import remaining_steps, train
    from hf_vit.training.recipe import TrainConfig

    def run(setting: dict[str, Any], folder: str, source: Path, steps: Callable[[Any], Any]) -> Any:
        pooling = setting.pop("pooling")
        config = TrainConfig(
            data=str(source), model=model, image_size=size, seed=seed, output_dir=folder, batch_size=32, cache="ram",
            shorter_side=160, augmentation="crop_flip", model_config={"pooling": pooling}, warmup_epochs=0.5,
            save_every=10**6, eval_every=1, log_every=1000, max_broken=0.01, **setting,
        )  # fmt: skip
        return train(config, steps=steps)

    def objective(trial: Any) -> float:
        trained = trial.suggest_categorical("trained", ["all", "head"])
        rates = {"all": (3e-6, 3e-4), "head": (1e-4, 3e-2)}[trained]
        decays = [0.65, 0.75, 0.9, 1.0] if trained == "all" else [1.0]
        setting = {
            "trained": trained,
            "learning_rate": trial.suggest_float(f"learning_rate_{trained}", *rates, log=True),
            "layer_decay": trial.suggest_categorical(f"layer_decay_{trained}", decays),
            "weight_decay": trial.suggest_float("weight_decay", 1e-3, 0.3, log=True),
            "pooling": trial.suggest_categorical("pooling", ["cls", "mean", "cls_and_mean"]),
            "epochs": trial.suggest_categorical("epochs", [3, 6, 9]),
            "smallest_crop": trial.suggest_categorical("smallest_crop", [0.35, 0.6, 0.9]),
            "label_smoothing": trial.suggest_categorical("label_smoothing", [0.0, 0.1]),
        }
        trial.set_user_attr("setting", setting)

        def steps(run: Any) -> Any:
            reported = 0
            for step in remaining_steps(run):
                rows = [row for row in run.log if "eval_accuracy" in row]
                if len(rows) > reported:
                    reported = len(rows)
                    trial.report(rows[-1]["eval_accuracy"], reported)
                    if trial.should_prune():
                        raise optuna.TrialPruned
                yield step

        with tempfile.TemporaryDirectory() as folder:
            return run(dict(setting), folder, data / "train.parquet", steps).metrics["eval_accuracy"]

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=seed),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1),
    )
    began = time.process_time()
    study.optimize(objective, n_trials=NUMBER_OF_TRIALS)
    searched = time.process_time() - began
    setting = study.best_trial.user_attrs["setting"]
    with tempfile.TemporaryDirectory() as folder:
        accuracy = run(dict(setting), folder, data, remaining_steps).metrics["eval_accuracy"]
    pruned = sum(trial.state.name == "PRUNED" for trial in study.trials)
    trials = [
        {**trial.user_attrs["setting"], "state": trial.state.name, "accuracy": trial.value} for trial in study.trials
    ]
    details = {"setting": setting, "validation": study.best_value, "pruned": pruned, "search_cpu_seconds": searched}
    details["trials"] = trials
    return {"accuracy": accuracy, "details": details}


# --------------------------------------------------------------------------------------------- other libraries


def _splits(data: Path) -> Any:
    splits = load_dataset("parquet", data_files={name: str(data / f"{name}.parquet") for name in ("train", "test")})
    return splits.cast_column("image", Image())


def stock(data: Path, model: str, size: int, seed: int, minutes: float) -> dict[str, Any]:
    """Fine-tune with Trainer's defaults and the transforms of transformers' example."""
    import transformers
    from torchvision.transforms import (
        CenterCrop,
        Compose,
        Normalize,
        RandomHorizontalFlip,
        RandomResizedCrop,
        Resize,
        ToTensor,
    )  # fmt: skip

    transformers.set_seed(seed)
    splits = _splits(data)
    labels = splits["train"].features["label"].names
    processor = transformers.AutoImageProcessor.from_pretrained(model, use_fast=False)
    normalize = Normalize(processor.image_mean, processor.image_std)
    ways = {
        "train": Compose([RandomResizedCrop(size), RandomHorizontalFlip(), ToTensor(), normalize]),
        "test": Compose([Resize(size), CenterCrop(size), ToTensor(), normalize]),
    }

    def apply(way: Any, batch: dict[str, Any]) -> dict[str, Any]:
        return {"pixel_values": [way(image.convert("RGB")) for image in batch["image"]], "labels": batch["label"]}

    for name, way in ways.items():
        splits[name].set_transform(partial(apply, way))
    classifier = transformers.AutoModelForImageClassification.from_pretrained(
        model, num_labels=len(labels), ignore_mismatched_sizes=True, dtype=torch.float32
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder, seed=seed, remove_unused_columns=False, save_strategy="no", report_to="none", disable_tqdm=True,
            dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = transformers.Trainer(
            classifier,
            arguments,
            train_dataset=splits["train"],
            eval_dataset=splits["test"],
            compute_metrics=lambda result: {"accuracy": (result.predictions.argmax(-1) == result.label_ids).mean()},
        )
        trainer.train()
        return {"accuracy": float(trainer.evaluate()["eval_accuracy"]), "details": {}}


def _weights_of(model: str) -> dict[str, torch.Tensor]:
    """Return the weights of an encoder under the names of timm and of DINOv2's authors."""
    from safetensors.torch import load_file

    from hf_vit import HFViTImageProcessor, HFViTModel
    from hf_vit.checkpoints.export import export_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        encoder = HFViTModel.from_pretrained(model, dtype=torch.float32)
        encoder.save_pretrained(f"{folder}/encoder")
        HFViTImageProcessor.from_preset("center_crop", encoder.config.image_shape).save_pretrained(f"{folder}/encoder")
        export_checkpoint(f"{folder}/encoder", Path(folder) / "timm", "timm", False)
        return load_file(Path(folder) / "timm" / "model.safetensors")


def timm(data: Path, model: str, size: int, seed: int, minutes: float) -> dict[str, Any]:
    """Fine-tune with timm: its model, transforms, CutMix, layer decay and schedule."""
    import timm as library
    from timm.data import Mixup, create_transform
    from timm.loss import SoftTargetCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler

    torch.manual_seed(seed)
    epochs, batch_size = 10, 32
    splits = _splits(data)
    number = splits["train"].features["label"].num_classes
    network = library.create_model("vit_small_patch14_dinov2", img_size=518, num_classes=0)
    network.load_state_dict(_weights_of(model))
    network.set_input_size((size, size))
    network.reset_classifier(number)
    for index, block in enumerate(network.blocks):
        block.drop_path1 = block.drop_path2 = library.layers.DropPath(0.1 * index / (len(network.blocks) - 1))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    train_way = create_transform(
        size, is_training=True, auto_augment="rand-m8-inc1-mstd101", color_jitter=0.4, mean=mean, std=std
    )
    test_way = create_transform(size, crop_pct=1.0, interpolation="bicubic", mean=mean, std=std)
    mix = Mixup(mixup_alpha=0.0, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=number)
    steps = len(splits["train"]) // batch_size
    rate = 2e-4 * math.sqrt(batch_size / 512)
    optimizer = create_optimizer_v2(network, opt="adamw", lr=rate, weight_decay=0.05, layer_decay=0.7)
    schedule = CosineLRScheduler(optimizer, epochs * steps, warmup_t=steps, warmup_lr_init=1e-6, t_in_epochs=False)
    images = {name: [image.convert("RGB") for image in split["image"]] for name, split in splits.items()}
    labels = {name: torch.tensor(split["label"]) for name, split in splits.items()}
    for epoch in range(epochs):
        network.train()
        order = torch.randperm(len(labels["train"]))
        for step in range(steps):
            chosen = order[step * batch_size : (step + 1) * batch_size]
            pixels = torch.stack([train_way(images["train"][index]) for index in chosen.tolist()])
            pixels, targets = mix(pixels, labels["train"][chosen])
            loss = SoftTargetCrossEntropy()(network(pixels), targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 2.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step_update(epoch * steps + step + 1)
    network.eval()
    hits = 0
    with torch.inference_mode():
        for start in range(0, len(labels["test"]), batch_size):
            pixels = torch.stack([test_way(image) for image in images["test"][start : start + batch_size]])
            hits += int((network(pixels).argmax(-1) == labels["test"][start : start + batch_size]).sum())
    return {"accuracy": hits / len(labels["test"]), "details": {"epochs": epochs, "learning_rate": rate}}


def lightly(data: Path, model: str, size: int, seed: int, minutes: float) -> dict[str, Any]:
    """Fine-tune with lightly-train, without a validation split that it could choose a model on."""
    import lightly_train

    epochs, batch_size = 10, 16
    splits = _splits(data)
    names = splits["train"].features["label"].names
    steps = epochs * len(splits["train"]) // batch_size
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            (Path(folder) / "train" / name).mkdir(parents=True)
        for index, row in enumerate(splits["train"]):
            row["image"].convert("RGB").save(Path(folder) / "train" / names[row["label"]] / f"{index}.png")
        torch.save(_weights_of(model), f"{folder}/encoder.pt")
        lightly_train.train_image_classification(
            out=f"{folder}/out",
            data={"train": f"{folder}/train", "val": f"{folder}/train", "classes": dict(enumerate(names))},
            model="dinov2/vits14-noreg",
            model_args={"backbone_weights": f"{folder}/encoder.pt", "lr_warmup_steps": steps // epochs},
            transform_args={"image_size": (size, size)},
            steps=steps,
            logger_args={"val_every_num_steps": steps},
            num_workers=0,
            accelerator="cpu",
            precision="32-true",
            seed=seed,
        )
        trained = lightly_train.load_model(f"{folder}/out/exported_models/exported_last.pt", device="cpu")
    hits = 0
    for row in splits["test"]:
        hits += int(trained.predict(row["image"].convert("RGB"))["labels"][0]) == row["label"]
    details = {"epochs": epochs, "steps": steps, "lightly_train": version("lightly-train")}
    return {"accuracy": hits / len(splits["test"]), "details": details}


def table(results: Path) -> str:
    """Return a Markdown table: test accuracy as mean (standard deviation) over seeds, and mean CPU seconds."""
    rows = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    methods = [method for method in METHODS if any(row["method"] == method for row in rows)]
    lines = [f"| data | {' | '.join(methods)} |", "|---" * (len(methods) + 1) + "|"]
    for name in SIZES:
        cells = []
        for method in methods:
            found = [row for row in rows if (row["data"], row["method"]) == (name, method)]
            scores = [100 * row["accuracy"] for row in found]
            spread = f" (sd {stdev(scores):.1f}, n = {len(scores)})" if len(scores) > 1 else ""
            seconds = [row["cpu_seconds"] for row in found]
            cells.append(f"{mean(scores):.1f} %{spread}, {mean(seconds):,.0f} s" if found else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


METHODS = {"fit": fit, "train": recipe, "sweep": sweep, "transformers": stock, "timm": timm, "lightly": lightly}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=["prepare", "table", *METHODS])
    parser.add_argument(
        "data", type=Path, help="Folder of the prepared data, or of one data set; for table: the results."
    )
    for name in ("flowers", "pets", "cifar10"):
        parser.add_argument(f"--{name}", help="For prepare: folder with train.parquet and test.parquet.")
    parser.add_argument("--model", help="Folder or Hub name of the encoder.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=5, help="For fit.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("results.jsonl"))
    options = parser.parse_args()
    if options.method == "prepare":
        prepare(options.data, options.flowers, options.pets, options.cifar10)
        return
    if options.method == "table":
        print(table(options.data))
        return
    torch.set_num_threads(options.threads)
    name, began, cpu = options.data.name, time.perf_counter(), time.process_time()
    found = METHODS[options.method](options.data, options.model, SIZES[name], options.seed, options.minutes)
    row = {
        "method": options.method,
        "data": name,
        "seed": options.seed,
        "accuracy": found["accuracy"],
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "seconds": round(time.perf_counter() - began, 1),
        "image_size": SIZES[name],
        "threads": options.threads,
        "encoder": Path(options.model).name,
        "hardware": machine(),
        "versions": versions(),
        "details": found["details"],
    }
    with options.output.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(f"{options.method} {name} seed {options.seed}: {row['accuracy']:.2%}, {row['cpu_seconds']:.0f} CPU s")


if __name__ == "__main__":
    main()
