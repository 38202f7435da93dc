"""Checks of training on a GPU: waits for the device, exact resume, the quickstart, and two processes.

Images are generated and models are small, so that each check takes seconds. On a CPU, the same checks run.
"""

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..system.checks import Check, NotPossible, Outcome
from ..system.machine import multiplies_in_8_bits, precision_name, resolve_precision
from ..system.stopping import Interrupted
from .loop import remaining_steps, train
from .recipe import TrainConfig
from .run import Run

IMAGES, SIDE = {"train": 128, "test": 40}, 40
MODEL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "patch_size": 8,
}
FIRST_COUNTED = 3  # steps: the first ones allocate memory
STOPPED_AT = 5  # steps, of 12
WAITING = "called a synchronizing CUDA operation"
# By name: fields of the recipe, and the number of waits per step that they need.
WAITS: dict[str, tuple[dict[str, Any], int]] = {
    "one batch": ({}, 0),
    "mixup, CutMix, averaging, two parts": (
        {"mixup": 0.5, "cutmix": 0.5, "ema_decay": 0.99, "accumulation_steps": 2},
        0,
    ),
    "masked patches": ({"task": "masked_patches"}, 0),
    "fp16": ({"precision": "fp16"}, 1),  # the gradient scaler reads whether gradients are finite
    "on_nonfinite: skip": ({"on_nonfinite": "skip"}, 1),  # reads the loss
    "cache: device": ({"cache": "device"}, 0),
}
WAITS_PER_EVALUATION_BATCH = 1
RESUMED: dict[str, dict[str, Any]] = {
    "mixup, averaging, two parts": {"mixup": 0.5, "ema_decay": 0.9, "accumulation_steps": 2},
    "relative positions": {"model_config": {**MODEL, "position_embedding_type": "relative"}},
    "compiled": {"compile": True},
    "CUDA graphs": {"compile": True, "compile_mode": "reduce-overhead"},
    "fp8": {"precision": "fp8"},
}
QUICKSTARTS: dict[str, dict[str, Any]] = {
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "bf16, compiled": {"precision": "bf16", "compile": True},
    "bf16, CUDA graphs": {"precision": "bf16", "compile": True, "compile_mode": "reduce-overhead"},
    "fp8, compiled": {"precision": "fp8", "compile": True},
}
EPOCHS, LEAST_ACCURACY = 12, 0.94  # of a quickstart
PROCESSES, LONGEST = 2, 180.0  # seconds
# NCCL takes one process per GPU; gloo takes several. Accelerate keeps a process group that exists.
ONE_OF_TWO = """
import sys, torch
torch.distributed.init_process_group("gloo")
from accelerate import PartialState
PartialState(cpu=not torch.cuda.is_available()).backend = "gloo"
from hf_vit.training.loop import train
from hf_vit.training.recipe import TrainConfig
train(TrainConfig.from_recipe(sys.argv[1]))
"""


class TrainingChecks:
    """Checks of training on one device.

    Args:
        folder: An empty folder for data and runs.
        device: The device, on which Accelerate trains.
        is_tiny: Whether to train for as few steps as possible, and to compile nothing.
    """

    def __init__(self, folder: Path, device: torch.device, is_tiny: bool = False) -> None:
        self.folder, self.device, self.is_tiny = folder, device, is_tiny
        self.data, self.numbers = folder / "data", count()
        self.precision = precision_name(resolve_precision("auto"))
        self._is_counted = device.type == "cuda"  # whether torch reports waits

    def waits(self) -> Iterator[Check]:
        """Yield checks of how often the CPU waits for the device."""
        for name, (fields, allowed) in WAITS.items():
            yield Check("waits", name, partial(self._waits, fields, allowed), 8)

    def resume(self) -> Iterator[Check]:
        """Yield checks of whether stopped and uninterrupted runs end with the same bits."""
        for name, fields in RESUMED.items():
            yield Check("resume", name, partial(self._resumes, fields), 40 if "compile" in fields else 15)

    def runs(self) -> Iterator[Check]:
        """Yield checks of the quickstart, and of two processes on one device."""
        yield Check("processes", f"{PROCESSES} on one device", self._two_processes, 40)
        for name, fields in QUICKSTARTS.items():
            yield Check("quickstart", name, partial(self._quickstart, fields), 40)

    def _recipe(self, **fields: Any) -> TrainConfig:
        self._write_images()
        usual = {
            "data": str(self.data),
            "model": None,
            "model_config": {**MODEL, "hidden_dropout_prob": 0.1, "drop_path_rate": 0.1},
            "image_size": 32,
            "batch_size": 32,
            "epochs": 3,
            "warmup_epochs": 1,
            "log_every": 1000,
            "eval_every": 1000,
            "save_every": 1000,
            "precision": self.precision,
            "output_dir": str(self.folder / f"run-{next(self.numbers)}"),
        }
        config = TrainConfig(**{**usual, **fields})
        self._check_possible(config)
        return config

    def _check_possible(self, config: TrainConfig) -> None:
        if config.precision == "fp16" and self.device.type == "cpu":
            raise NotPossible("training in fp16 needs a GPU")
        if config.precision == "fp8" and not (multiplies_in_8_bits(self.device) and find_spec("torchao")):
            raise NotPossible("FP8 needs torchao, and a GPU of compute capability 8.9 or later")
        if config.compile and self.is_tiny:
            raise NotPossible("compiling takes too long for a tiny check")

    def _write_images(self) -> None:
        """Write images of three colours as parquet files."""
        from datasets import ClassLabel, Dataset, Features, Image
        from PIL import Image as PILImage

        if self.data.exists():
            return
        noise, names = np.random.default_rng(0), ["red", "green", "blue"]
        for split, number in IMAGES.items():
            pixels = noise.integers(0, 120, (number, SIDE, SIDE, 3), dtype=np.uint8)
            labels = [index % 3 for index in range(number)]
            for image, label in zip(pixels, labels, strict=True):
                image[..., label] += 100
            features = Features({"image": Image(), "label": ClassLabel(names=names)})
            rows = {"image": [PILImage.fromarray(image) for image in pixels], "label": labels}
            Dataset.from_dict(rows, features=features).to_parquet(self.data / f"{split}.parquet")

    # ---------------------------------------------------------------------------------------------------- checks

    def _waits(self, fields: dict[str, Any], allowed: int) -> Outcome:
        counts: dict[str, float] = {}
        places: Counter[str] = Counter()

        def steps(run: Run) -> Iterator[int]:
            last = run.plan.total_steps - 1  # it is logged, which waits
            with counted_waits(self.device) as waits:
                for step in remaining_steps(run):
                    if step == FIRST_COUNTED:
                        waits.clear()
                    if step == last:
                        counts["step"] = len(waits) / (last - FIRST_COUNTED)
                        places.update(waits)
                        run.evaluate()
                        waits.clear()
                        run.evaluate()  # the second one: the first one allocates memory
                        sampler: Any = run.eval_loader.batch_sampler
                        counts["batch"] = len(waits) / math.ceil(IMAGES["test"] / sampler.batch_size)
                        run.model.train()
                    yield step

        train(self._recipe(**fields), steps=steps)
        if not self._is_counted:
            raise NotPossible("trained, but only CUDA counts waits")
        text = f"{counts['step']:.2g} per step, {counts['batch']:.2g} per evaluation batch"
        problems = []
        if counts["step"] > allowed:
            where = ", ".join(f"{place} ({number} times)" for place, number in places.most_common(4))
            problems.append(f"more than {allowed} per step: {where}")
        if counts["batch"] > WAITS_PER_EVALUATION_BATCH:
            problems.append(f"more than {WAITS_PER_EVALUATION_BATCH} per evaluation batch")
        return Outcome(text, "; ".join(problems), {**counts, "places": places})

    def _resumes(self, fields: dict[str, Any]) -> Outcome:
        def stop(run: Run) -> Iterator[int]:
            for step in remaining_steps(run):
                if step == STOPPED_AT:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield step

        config = self._recipe(**fields, deterministic=True)
        whole = _weights(config)
        parts = self._recipe(**fields, deterministic=True)
        try:
            train(parts, steps=stop)
        except Interrupted as stopped:
            if stopped.exit_code != 128 + signal.SIGTERM:
                raise
        is_same = _weights(parts) == whole
        return Outcome(
            f"stopped after {STOPPED_AT + 1} steps and resumed, deterministic",
            "" if is_same else "the weights differ from those of an uninterrupted run",
        )

    def _quickstart(self, fields: dict[str, Any]) -> Outcome:
        epochs = 1 if self.is_tiny else EPOCHS
        output_dir = str(self.folder / f"digits-{'-'.join(map(str, fields.values()))}")
        config = TrainConfig.from_recipe("digits", epochs=epochs, output_dir=output_dir, **fields)
        if self.is_tiny:
            config = replace(config, max_steps=3)
        self._check_possible(config)
        run = train(config)
        accuracy, speed = run.metrics["eval_accuracy"], run.timing["images_per_second"]
        text = f"accuracy {accuracy:.1%} after {epochs} epochs, {speed:,.0f} images/s"
        is_low = not self.is_tiny and accuracy < LEAST_ACCURACY
        problem = f"accuracy below {LEAST_ACCURACY:.0%}" if is_low else ""
        return Outcome(text, problem, {"accuracy": accuracy, "images_per_second": speed})

    def _two_processes(self) -> Outcome:
        config = self._recipe(num_workers=1)
        recipe = self.folder / "two.yaml"
        recipe.write_text(config.to_yaml(), encoding="utf-8")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        package = str(Path(__file__).parents[2])
        variables = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")])),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(PROCESSES),
            "LOCAL_WORLD_SIZE": str(PROCESSES),
            "LOCAL_RANK": "0",  # both on the first device
            "OMP_NUM_THREADS": "1",
            **({"ACCELERATE_USE_CPU": "true"} if self.device.type == "cpu" else {}),
        }
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", ONE_OF_TWO, str(recipe)],
                env={**variables, "RANK": str(rank)},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(PROCESSES)
        ]
        try:
            errors = [process.communicate(timeout=LONGEST)[1] for process in processes]
        except subprocess.TimeoutExpired:
            return Outcome("trained by DDP over gloo", f"no end after {LONGEST:.0f} s")
        finally:
            for process in processes:
                process.kill()
                process.wait()
        failed = [_last_line(errors[rank]) for rank, process in enumerate(processes) if process.returncode]
        if failed:
            return Outcome("trained by DDP over gloo", f"{len(failed)} failed: {failed[0]}")
        metrics = json.loads((Path(config.output_dir) / "metrics.json").read_text(encoding="utf-8"))
        return Outcome(f"trained by DDP over gloo, {metrics['steps']} steps, {metrics['processes']} processes")


@contextmanager
def counted_waits(device: torch.device) -> Iterator[list[str]]:
    """Have CUDA report when the CPU waits for the device; yield a list that gets the place of each wait."""
    places: list[str] = []
    show: Callable[..., None] = warnings.showwarning

    def note(message: Any, category: Any, filename: str, lineno: int, *rest: Any) -> None:
        if WAITING in str(message):
            places.append(f"{Path(filename).name}:{lineno}")
        else:
            show(message, category, filename, lineno, *rest)

    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=re.escape(WAITING))
        warnings.showwarning = note  # type: ignore[assignment]
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")


def _weights(config: TrainConfig) -> bytes:
    """Train to the end; return the bytes of the model's file."""
    train(config)
    return (Path(config.output_dir) / "model.safetensors").read_bytes()


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no message")
