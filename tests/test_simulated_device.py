"""Training, evaluation, prediction, saving and resuming on simulated accelerators, and how often the host waits."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from simulated_device import DeviceTensor, Simulation, simulated
from tiny_run import COLORS, assert_same_weights, colored_images, stop_at, tiny_recipe, weights
from torch import Tensor

from hf_vit.evaluation import evaluate_checkpoint
from hf_vit.model import positions_hf_vit
from hf_vit.model.configuration_hf_vit import HFViTConfig
from hf_vit.model.positions_hf_vit import HFViTSinCos2DPositions
from hf_vit.prediction.predictor import Predictor
from hf_vit.system.stopping import Interrupted
from hf_vit.training import tasks
from hf_vit.training.loop import remaining_steps, train
from hf_vit.training.run import Run

KINDS = ("cuda", "mps", "xpu")
STEPS = 5
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "patch_size": 4}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """33 images to learn from and 21 to evaluate, each with a class, two labels, a target, and up to two boxes."""
    names = {"image": Image(), "label": ClassLabel(names=list(COLORS))}
    numbers = {"is_blue": Value("int64"), "is_red": Value("int64"), "redness": Value("float32")}
    objects = {"bbox": List(List(Value("float32"))), "category": List(ClassLabel(names=list(COLORS)))}
    features = Features({**names, **numbers, "objects": objects})
    splits = {}
    for split, number, seed in (("train", 33, 0), ("test", 21, 1)):
        images, labels = colored_images(number, seed)
        targets = [label / 3 + 7 for label in labels]
        rows: dict[str, list[Any]] = {"image": images, "label": labels, "redness": targets}
        rows |= {f"is_{name}": [int(label == index) for label in labels] for index, name in ((0, "blue"), (2, "red"))}
        boxes = [[[1, 2, 6, 7], [3, 4, 5, 9]][: index % 3] for index in range(number)]
        rows["objects"] = [{"bbox": own, "category": [0, 1][: len(own)]} for own in boxes]
        splits[split] = Dataset.from_dict(rows, features=features)
    folder = tmp_path_factory.mktemp("data") / "photos"
    DatasetDict(splits).save_to_disk(str(folder))
    return folder


class Counted:
    """A simulated device, with the waits of training steps and of evaluations apart."""

    def __init__(self, device: Simulation, monkeypatch: pytest.MonkeyPatch) -> None:
        self.device, self.evaluations = device, 0
        self.in_evaluation: list[str] = []
        measure: Callable[..., Any] = Run._measure

        def measured(run: Run) -> Any:
            before, device.waits = device.waits, type(device.waits)()
            with device.counting():
                result = measure(run)
            self.in_evaluation += list(device.waits.elements())
            self.evaluations += 1
            device.waits = before
            return result

        monkeypatch.setattr(Run, "_measure", measured)

    def steps(self, run: Run) -> Iterator[int]:
        """Take all steps; count the waits of those that only train: not of the first and the last."""
        for number, step in enumerate(remaining_steps(run)):
            self.device.is_counting = number > 0 and step < run.plan.total_steps - 1
            yield step
        self.device.is_counting = False


@contextmanager
def no_interrupt(at: int | None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patched:
        if at is not None:
            stop_at(at, patched)
            with pytest.raises(Interrupted):
                yield
        else:
            yield


def recipe(photos: Path, output_dir: Path, fields: dict[str, Any]) -> Any:
    seldom = {"log_every": 100, "eval_every": 100, "save_every": 100}
    architecture = {**SMALL, **fields.get("model_config", {})}
    stated = {"max_steps": STEPS, "batch_size": 8, "label_column": "label", **seldom, **fields}
    return tiny_recipe(photos, output_dir, **{**stated, "model_config": architecture})


# Each value of a field at least once.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "cuda-mixed": (
        "cuda",
        {
            **{"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1, "ema_decay": 0.9, "layer_decay": 0.7},
            "model_config": {"position_embedding_type": "learned", "pooling": "cls", "drop_path_rate": 0.2},
        },
    ),
    "cuda-cached": (
        "cuda",
        {
            **{"cache": "device", "augmentation": "rand", "erasing": 0.5, "precision": "bf16", "optimizer": "lion"},
            **{"color_jitter": 0.3, "class_weights": "balanced", "sampling": "balanced", "best_metric": "accuracy"},
            "model_config": {"position_embedding_type": "relative", "pooling": "attention", "patch_dropout_prob": 0.5},
        },
    ),
    "cuda-labels": (
        "cuda",
        {
            **{"task": "multi_label", "label_column": ["is_blue", "is_red"], "optimizer": "muon", "cache": "ram"},
            **{"class_weights": "balanced", "mixup": 0.3, "accumulation_steps": 2, "precision": "fp16"},
            "model_config": {"position_embedding_type": "rotary", "pooling": "cls_and_mean"},
        },
    ),
    "cuda-targets": (
        "cuda",
        {
            **{"task": "regression", "label_column": "redness", "optimizer": "lamb"},
            "model_config": {"position_placement": "every_layer_shared", "pooling": "attention_patches"},
        },
    ),
    "cuda-objects": (
        "cuda",
        {
            **{"task": "detection", "label_column": "objects", "cache": "ram", "precision": "bf16"},
            "model_config": {"patch_subdivision": 2},
        },
    ),
    "cuda-masked": (
        "cuda",
        {
            **{"task": "masked_patches", "optimizer": "sgd", "precision": "bf16", "gradient_checkpointing": True},
            "model_config": {"position_embedding_type": "learned_2d", "mim_objective": "mean_color"},
        },
    ),
    "mps": (
        "mps",
        {
            **{"cache": "device", "augmentation": "three", "mixup": 0.5, "loss": "binary_cross_entropy"},
            "model_config": {"position_embedding_type": "sincos_2d", "pooling": "mean"},
        },
    ),
    "mps-masked": (
        "mps",
        {"task": "masked_patches", "precision": "fp16", "model_config": {"position_embedding_type": "none"}},
    ),
    "xpu": (
        "xpu",
        {
            **{"cache": "device", "augmentation": "augreg_strong2", "precision": "bf16", "trained": "lora"},
            "model_config": {"pooling": "mean_all", "position_embedding_type": "sincos_2d"},
        },
    ),
}
SLOW: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"{kind}-{name}": (kind, CASES[name][1]) for kind in ("mps", "xpu") for name in CASES if CASES[name][0] != kind
    },
    "cuda-distilled": (
        "cuda",
        {"trained": "head", "model_config": {"use_distillation_token": True, "pooling": "cls_and_distillation"}},
    ),
    "cuda-workers": ("cuda", {"cache": "device", "augmentation": "three_simple", "erasing": 0.5, "num_workers": 2}),
    "cuda-affine": ("cuda", {"cache": "device", "augmentation": "affine", "keep_last": True}),
    "cuda-trivial": ("cuda", {"cache": "device", "augmentation": "trivial", "class_weights": "effective"}),
    "cuda-views": ("cuda", {"task": "lejepa", "local_views": 2, "smallest_crop": 1.0, "precision": "bf16"}),
}


def is_allowed(cause: str, kind: str, fields: dict[str, Any]) -> bool:
    """Return whether a step may wait: a gradient scaler reads its result, and MPS copies no temporary tensors late."""
    is_scaler = "optimizer.step" in cause and fields.get("precision") == "fp16"
    return is_scaler or (kind == "mps" and "to_device" in cause)


def check_run(kind: str, fields: dict[str, Any], photos: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Train with an interruption, check the waits and what is written, and predict with the trained model."""
    with simulated(kind) as device:
        counted = Counted(device, monkeypatch)
        config = recipe(photos, folder / "run", fields)
        with no_interrupt(1, monkeypatch):
            train(config)
        run = train(config, steps=counted.steps)
        assert all(isinstance(parameter, DeviceTensor) for parameter in run.model.parameters())
        waits = {cause: number for cause, number in device.waits.items() if not is_allowed(cause, kind, fields)}
        assert waits == {}
        batches = counted.evaluations * len(list(run.eval_loader))
        assert len(counted.in_evaluation) <= batches or kind == "mps", counted.in_evaluation
        if config.task == "masked_patches":
            return None
        image = colored_images(5, 3)[0]
        options = {"batch_size": 2, "workers": 1, "has_features": config.task != "detection"}
        predictor = Predictor.from_model(run.model, run.processor, **options)
        device.waits.clear()
        with device.counting():
            predictions = list(predictor(image))
        assert [prediction.error for prediction in predictions] == [None] * 5
        assert not device.waits or kind == "mps"
        return predictions


@pytest.mark.parametrize("case", CASES)
def test_a_run_waits_for_nothing(
    case: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    check_run(*CASES[case], photos, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW)
def test_other_runs_wait_for_nothing(
    case: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    check_run(*SLOW[case], photos, tmp_path, monkeypatch)


def test_a_resumed_run_on_a_device_has_the_bits_of_an_uninterrupted_one(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    fields = {"cache": "device", "augmentation": "rand", "mixup": 0.5, "model_config": {"hidden_dropout_prob": 0.0}}
    with simulated("cuda"):
        whole = weights(train(recipe(photos, tmp_path / "whole", fields)).model)
        config = recipe(photos, tmp_path / "stopped", fields)
        with no_interrupt(2, monkeypatch):
            train(config)
        resumed = weights(train(config).model)
        on_cpu = [{name: tensor.cpu() for name, tensor in each.items()} for each in (whole, resumed)]
    assert_same_weights(*on_cpu)


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_a_folder_is_evaluated_on_a_device(kind: str, photos: Path, tmp_path: Path, one_thread: None) -> None:
    config = recipe(photos, tmp_path / "run", {"model_config": {"position_embedding_type": "sincos_2d"}})
    on_cpu = train(config)
    with simulated(kind):
        found = evaluate_checkpoint(str(tmp_path / "run"), str(photos), batch_size=8, precision="fp32")
    assert found is not None and found["device"] == kind
    assert found["figures"]["loss"] == pytest.approx(on_cpu.metrics["eval_loss"], rel=1e-4)


# ---------------------------------------------------------------------------------------------- planted faults


def test_a_value_that_is_read_in_every_step_is_seen(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = tasks.Classification.loss

    def loss(self: Any, *arguments: Any) -> Tensor:
        value = measure(self, *arguments)
        value.item()
        return value

    monkeypatch.setattr(tasks.Classification, "loss", loss)
    with simulated("cuda") as device:
        train(recipe(photos, tmp_path, {}), steps=Counted(device, monkeypatch).steps)
        assert [wait.split(" at ")[0] for wait in device.waits] == ["_local_scalar_dense"]


def test_positions_in_float64_fail_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    positions = HFViTSinCos2DPositions(HFViTConfig(**SMALL, image_size=8))
    for kind in ("mps", "cuda"):
        with simulated(kind) as device:
            patches = torch.zeros(1, 4, 16, device=device.device)
            assert positions(patches, (2, 2)).device == device.device
    monkeypatch.setattr(positions_hf_vit, "WITHOUT_FLOAT64", ())
    with simulated("mps") as device, pytest.raises(TypeError, match="float64"):
        positions(torch.zeros(1, 4, 16, device=device.device), (2, 2))


def test_what_a_device_refuses_is_refused() -> None:
    with simulated("mps") as device:
        here = torch.ones(3, device=device.device)
        with pytest.raises(TypeError, match="float64"):
            here.double()
        with pytest.raises(TypeError, match="float64"):
            torch.arange(3, dtype=torch.float64, device=device.device)
        with pytest.raises(RuntimeError, match="two devices, mps:0 and cpu"):
            here + torch.ones(3)
        with pytest.raises(TypeError, match="numpy"):
            here.numpy()
        with pytest.raises(RuntimeError, match="generator"):
            torch.rand(3, device=device.device, generator=torch.Generator())
        assert (here + torch.tensor(1.0)).sum().item() == 6  # a number is no tensor of another device


@pytest.mark.parametrize(
    ("wait", "act"),
    [
        ("_local_scalar_dense", lambda here: bool(here.sum() > 0)),
        ("tolist", lambda here: here.tolist()),
        ("copy to the CPU", lambda here: here.cpu()),
        ("copy to the device", lambda here: torch.ones(3).to(here.device)),
        ("copy to the device, not pinned", lambda here: torch.ones(3).to(here.device, non_blocking=True)),
        ("tensor of Python values", lambda here: torch.tensor([1.0, 2.0], device=here.device)),
        ("tensor of Python values", lambda here: here.new_tensor([1.0, 2.0])),
        ("index by a mask", lambda here: here[here > 0]),
        ("nonzero", lambda here: here.nonzero()),
        ("copy_", lambda here: here.copy_(torch.zeros(3))),
        ("synchronize", lambda here: torch.accelerator.synchronize()),
        (None, lambda here: torch.ones(3).pin_memory().to(here.device, non_blocking=True)),
        (None, lambda here: here.to("cpu", non_blocking=True)),
        (None, lambda here: here.masked_fill(here > 0, 0.0)),
        (None, lambda here: here.new_zeros(3) + here.new_full((), 2.0)),
        (None, lambda here: (here * 2).requires_grad_().square().sum().backward()),
    ],
)
def test_waits_are_counted(wait: str | None, act: Callable[[Tensor], Any]) -> None:
    with simulated("cuda") as device:
        here = torch.ones(3).to("cuda")
        with device.counting():
            act(here)
        assert [cause.split(" at ")[0] for cause in device.waits] == ([] if wait is None else [wait])


def test_nothing_of_a_simulation_stays() -> None:
    before = torch.cuda.is_available(), torch.accelerator.current_accelerator(), torch.autocast.__init__
    with simulated("cuda"):
        assert torch.cuda.is_available() and torch.accelerator.current_accelerator() == torch.device("cuda")
    assert before == (torch.cuda.is_available(), torch.accelerator.current_accelerator(), torch.autocast.__init__)
