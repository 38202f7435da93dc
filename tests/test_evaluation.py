"""Figures over a loader: each image once, whatever the batches; by hand, and by scikit-learn where it has them."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from sklearn.metrics import confusion_matrix, log_loss, precision_score, recall_score, top_k_accuracy_score
from tiny_run import COLORS, colored_dataset
from torch import Tensor, nn

from hf_vit import HFViTForImageClassification, HFViTImageProcessor
from hf_vit.data.images import EvaluationImages, normalize
from hf_vit.data.loaders import evaluation_loader
from hf_vit.evaluation.metrics import ImageResults, classify, extract_features


def to_model(pixels: Tensor) -> Tensor:
    return pixels.float() / 255


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.fixture
def model(tiny_config: Any) -> Any:
    model = HFViTForImageClassification(tiny_config(hidden_dropout_prob=0.5, initializer_range=0.3, num_labels=8))
    nn.init.normal_(model.classifier.weight)
    return model


TESTS = Path(__file__).resolve().parent
PIXELS = torch.randint(0, 256, (11, 3, 32, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(11) % 8


def batches(*indices: list[int], broken: dict[int, list[str]] | None = None) -> list[dict[str, Any]]:
    """Return batches of `PIXELS` by index; -1 stands for an image that is not to be counted."""
    return [
        {
            "pixel_values": PIXELS[index],
            "labels": LABELS[index],
            "index": torch.tensor(index),
            "broken": (broken or {}).get(number, []),
        }
        for number, index in enumerate(indices)
    ]


class Answers(nn.Module):
    """A model whose logits are given, a row for each number in the first pixel."""

    def __init__(self, logits: Any) -> None:
        super().__init__()
        self.logits = torch.tensor(logits, dtype=torch.float32)

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits[pixel_values[:, 0, 0, 0].long()])


def answer(logits: Any, labels: list[int], accelerator: Accelerator) -> ImageResults:
    pixels = torch.arange(len(labels)).view(-1, 1, 1, 1)
    batch = {"pixel_values": pixels, "labels": torch.tensor(labels), "index": torch.arange(len(labels)), "broken": []}
    return classify(Answers(logits), [batch], accelerator, lambda pixels: pixels)


# ------------------------------------------------------------------------------------------------- over a loader


@pytest.mark.parametrize(
    "loader",
    [
        batches(*([index] for index in range(11))),
        batches([0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]),
        batches(list(range(11))),
        batches([10, 3, 5], [0, 9, 1, 2], [8, 4, 7, 6]),
        batches([0, 1, 2, 3], [4, -1, 5, 6, 7], [8, 9, 10, -1], [-1, -1]),
    ],
    ids=["one by one", "a partial batch", "all at once", "in another order", "with fillers"],
)
def test_every_image_counts_once(loader: Any, model: Any, accelerator: Accelerator) -> None:
    model.train()
    predictions = classify(model, loader, accelerator, to_model)
    features, labels, broken = extract_features(model, loader, accelerator, to_model, model.vit.pooler)
    assert model.training and not model.vit.pooler._forward_hooks
    model.eval()
    with torch.no_grad():
        logits = model(to_model(PIXELS)).logits
        pooled = model.vit(to_model(PIXELS)).pooler_output
    assert predictions.labels.equal(LABELS) and labels.equal(LABELS) and predictions.broken == broken == []
    assert predictions.predicted.equal(logits.argmax(-1)) and predictions.num_labels == 8
    torch.testing.assert_close(predictions.confidence, logits.softmax(-1).amax(-1))
    torch.testing.assert_close(predictions.losses, nn.functional.cross_entropy(logits, LABELS, reduction="none"))
    torch.testing.assert_close(features, pooled)
    truth, scores = LABELS.numpy(), logits.softmax(-1).double().numpy()
    figures = predictions.metrics()
    assert figures["count"] == 11 and figures["accuracy"] == np.mean(scores.argmax(-1) == truth)
    assert figures["top5_accuracy"] == top_k_accuracy_score(truth, scores, k=5, labels=range(8))
    scores /= scores.sum(-1, keepdims=True)
    assert figures["loss"] == pytest.approx(log_loss(truth, scores, labels=range(8)), abs=1e-5)


def test_features_are_what_the_head_reads(tiny_config: Any, accelerator: Accelerator) -> None:
    model = HFViTForImageClassification(tiny_config(representation_size=6))
    read = []
    model.classifier.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    features, _, _ = extract_features(model, batches([0, 1, 2]), accelerator, to_model, model.vit.pooler)
    assert features.shape == (3, 6) and features.equal(read[0])  # behind the pre-logits layer


def test_broken_images_are_named_and_not_counted(model: Any, accelerator: Accelerator) -> None:
    loader = batches([0, -1, 2], [-1, 1], broken={0: ["b/2.jpg"], 1: ["a/1.jpg"]})
    predictions = classify(model, loader, accelerator, to_model)
    assert predictions.broken == ["a/1.jpg", "b/2.jpg"] and predictions.labels.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match=r"No image to evaluate: 1 could not be read \(a/1.jpg\)"):
        classify(model, batches([-1], broken={0: ["a/1.jpg"]}), accelerator, to_model)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_loaders_of_all_processes_make_one_evaluation(
    processes: int, tiny_config: Any, accelerator: Accelerator
) -> None:
    photos = colored_dataset(11, 0)
    stored = photos.with_format(None).cast_column("image", photos.features["image"].__class__(decode=False))
    spoilt = stored.map(lambda row, index: {"image": {"bytes": b"no image", "path": "x/4.png"}} if index == 4 else row,
                        with_indices=True)  # fmt: skip
    processor = HFViTImageProcessor.from_preset("original", (32, 48))
    images = EvaluationImages(spoilt, ("image", "label"), processor)
    model = HFViTForImageClassification(tiny_config(initializer_range=0.3, num_labels=len(COLORS)))
    loader = [batch for process in range(processes) for batch in evaluation_loader(images, 2, 0, processes, process)]
    predictions = classify(model, loader, accelerator, partial(normalize, processor=processor))
    assert predictions.labels.tolist() == [label for place, label in enumerate(photos["label"]) if place != 4]
    assert predictions.broken == ["x/4.png"]
    with torch.no_grad():
        outputs = model(**processor(photos[10]["image"], return_tensors="pt"))
    torch.testing.assert_close(predictions.confidence[9], outputs.logits.softmax(-1).max())


IN_A_PROCESS = """
import sys
import torch
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from hf_vit import HFViTConfig, HFViTForImageClassification
from hf_vit.evaluation.metrics import classify, extract_features
from conftest import TINY
from test_evaluation import LABELS, PIXELS, batches, to_model

accelerator = Accelerator(cpu=True)
model = HFViTForImageClassification(HFViTConfig(**{**TINY, "num_labels": 8, "initializer_range": 0.3})).eval()
for number, parameter in enumerate(model.parameters()):  # the same on both processes
    torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(number))
with torch.no_grad():
    logits, pooled = model(to_model(PIXELS)).logits, model.vit(to_model(PIXELS)).pooler_output
if sys.argv[1] == "ddp":
    model = torch.nn.parallel.DistributedDataParallel(model)
else:
    mesh = init_device_mesh("cpu", (2,))
    for part in (*model.vit.layers, model):
        fully_shard(part, mesh=mesh)
ours = [([0, 2, 4], [6, 8, 10]), ([1, 3, 5], [7, 9, -1])][accelerator.process_index]
loader = batches(*ours, broken={0: [f"{accelerator.process_index}.jpg"]})
predictions = classify(model, loader, accelerator, to_model)
pooler = accelerator.unwrap_model(model).vit.pooler
features, labels, broken = extract_features(model, loader, accelerator, to_model, pooler)
assert predictions.labels.equal(LABELS) and labels.equal(LABELS)
assert predictions.broken == broken == ["0.jpg", "1.jpg"]
assert predictions.predicted.equal(logits.argmax(-1))
torch.testing.assert_close(predictions.confidence, logits.softmax(-1).amax(-1))
torch.testing.assert_close(features, pooled)
accelerator.end_training()
print("equal", type(model).__name__)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name"), [pytest.param("ddp", "DistributedDataParallel", marks=pytest.mark.full), ("fsdp", "FSDP")]
)
def test_wrapped_models_on_two_processes_answer_as_one(kind: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(IN_A_PROCESS)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    path = os.pathsep.join(str(folder) for folder in (TESTS.parent, TESTS))
    done = subprocess.run(
        [*launcher, str(tmp_path / "script.py"), kind],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0 and done.stdout.count("equal") == 2 and name in done.stdout, done.stderr


# ------------------------------------------------------------------------------------------------------ figures


def test_ties_are_no_hits(accelerator: Accelerator) -> None:
    logits = [[1, 3, 3, 0, 0, 0, 0], [1, 3, 3, 0, 0, 0, 0], [0] * 7, [0] * 7, [5, 4, 3, 2, 1, 0, 9]]
    predictions = answer(logits, [1, 2, 6, 0, 5], accelerator)
    assert predictions.ranks.tolist() == [0, 1, 6, 0, 6]
    assert predictions.predicted.tolist() == [1, 1, 0, 0, 6]
    assert predictions.metrics()["top5_accuracy"] == 3 / 5
    zeros = answer([[0.0] * 10] * 10, list(range(10)), accelerator).metrics()
    assert zeros["accuracy"] == 0.1 and zeros["top5_accuracy"] == 0.5


def test_what_is_not_a_number_is_not_likely(accelerator: Accelerator) -> None:
    predictions = answer([[float("nan")] * 7], [3], accelerator)
    assert predictions.ranks.tolist() == [7] and predictions.metrics()["top5_accuracy"] == 0


def test_calibration_error_by_hand() -> None:
    # Three bins are in use: (8/15, 9/15] with 1 hit of 2, (9/15, 10/15] with 1 of 1, (14/15, 1] with 1 of 2.
    confidence = torch.tensor([0.54, 0.6, 0.61, 0.95, 1.0], dtype=torch.float64)
    labels, predicted = torch.tensor([0, 0, 0, 0, 0]), torch.tensor([0, 1, 0, 0, 1])
    predictions = ImageResults(labels, predicted, confidence, torch.zeros(5), torch.zeros(5), 2)
    expected = (abs(0.54 + 0.6 - 1) + abs(0.61 - 1) + abs(0.95 + 1.0 - 1)) / 5
    assert predictions.calibration_error() == pytest.approx(expected, abs=1e-12)
    assert predictions.metrics() == {
        "accuracy": 0.6,
        "balanced_accuracy": 0.6,
        "macro_f1": 0.375,
        "loss": 0.0,
        "calibration_error": predictions.calibration_error(),
        "count": 5,
    }


def test_classes_and_confusion_are_those_of_scikit_learn() -> None:
    labels, predicted = torch.randint(0, 4, (50,)), torch.randint(0, 3, (50,))
    labels[labels == 1] = 2  # a class without images, and one that is never answered
    predictions = ImageResults(labels, predicted, torch.ones(50), torch.zeros(50), torch.zeros(50), 4)
    confusion = predictions.confusion()
    assert confusion.tolist() == confusion_matrix(labels, predicted, labels=range(4)).tolist()
    rows = predictions.per_class(["a", "b", "c", "d"])
    of = {"labels": range(4), "average": None, "zero_division": 0}
    recall, precision = recall_score(labels, predicted, **of), precision_score(labels, predicted, **of)
    for index, row in enumerate(rows):
        assert row["label"] == "abcd"[index] and row["count"] == int(confusion[index].sum())
        assert row["accuracy"] == (None if index == 1 else recall[index])
        assert row["precision"] == (None if index == 3 else precision[index])
