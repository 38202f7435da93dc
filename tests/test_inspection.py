"""What a model has learned, where the answer is known."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_vit import HFViTForImageClassification, HFViTModel
from hf_vit.evaluation import Predictions
from hf_vit.inspection import (
    plot_confusion,
    plot_position_similarity,
    plot_predictions,
    plot_training,
    position_similarity,
    shown_predictions,
)


@pytest.mark.parametrize("kind", ["learned", "learned_2d", "sincos_2d"])
def test_similarity_is_symmetric_and_one_with_itself(kind: str, tiny_config: Any) -> None:
    model = HFViTForImageClassification(tiny_config(position_embedding_type=kind))
    similarity = position_similarity(model)
    assert similarity.shape == (4, 6, 4, 6)
    flat = similarity.reshape(24, 24)
    np.testing.assert_allclose(flat, flat.T, atol=1e-6)
    np.testing.assert_allclose(flat.diagonal(), 1, atol=1e-6)
    assert np.abs(flat).max() <= 1 + 1e-6


def test_similarity_of_known_positions(tiny_config: Any) -> None:
    """Positions that say their column alone are alike in a column, and at right angles elsewhere."""
    model = HFViTModel(tiny_config())
    table = model.embeddings.position_embeddings.table.weight.data.zero_()  # [1, 4, 6, D]
    for column in range(6):
        table[0, :, column, column] = 3.0
    similarity = position_similarity(model)
    for column in range(6):
        expected = np.zeros((4, 6))
        expected[:, column] = 1
        np.testing.assert_allclose(similarity[2, column], expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["relative", "none"])
def test_no_vectors_to_compare(kind: str, tiny_config: Any) -> None:
    model = HFViTModel(tiny_config(position_embedding_type=kind))
    with pytest.raises(ValueError, match=f"position_embedding_type='{kind}' has no vector for each patch"):
        position_similarity(model)


LOG = [
    {"step": 1, "epoch": 0.5, "loss": 2.0, "learning_rate": 0.1},
    {"step": 2, "epoch": 1.0, "eval_accuracy": 0.5, "eval_loss": 1.0, "eval_count": 20},
]


def predictions_of(labels: list[int], answers: list[int], confidence: torch.Tensor, num_labels: int) -> Predictions:
    zeros = torch.zeros(len(labels))
    return Predictions(torch.tensor(labels), torch.tensor(answers), confidence, zeros, zeros.long(), num_labels)


def draw(figure: Any, path: Path) -> None:
    figure.savefig(path)
    assert path.stat().st_size > 1000


def test_pictures_are_drawn(tiny_config: Any, tmp_path: Path) -> None:
    draw(plot_training(LOG), tmp_path / "training.png")
    draw(plot_position_similarity(position_similarity(HFViTModel(tiny_config()))), tmp_path / "positions.png")


def test_a_run_without_labels_has_one_panel(tmp_path: Path) -> None:
    log = [{name: value for name, value in row.items() if name != "eval_accuracy"} for row in LOG]
    figure = plot_training(log)
    assert [axis.get_ylabel() for axis in figure.axes] == ["loss of masked patches"]
    draw(figure, tmp_path / "training.png")


@pytest.mark.parametrize("number", [2, 10, 40])
def test_confusion_says_shares_of_the_true_class(number: int, tmp_path: Path) -> None:
    confusion = torch.eye(number, dtype=torch.long) * 3
    confusion[0, 1] = 1  # a quarter of the first class
    confusion[-1] = 0  # a class without images
    figure = plot_confusion(confusion, [f"a class with quite a long name, number {i}" for i in range(number)])
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == (["75", "25", *["100"] * (number - 2)] if number <= 20 else [])
    draw(figure, tmp_path / "confusion.png")


@pytest.mark.parametrize("name", ["$50% off, $5", "A$^$", r"$\x$", "a_b^c", "bird|plane", "two\nlines"])
def test_names_are_no_formulas(name: str, tmp_path: Path) -> None:
    draw(plot_confusion(torch.eye(2, dtype=torch.long), [name, "b"], title=name), tmp_path / "confusion.png")
    classes = torch.tensor([0, 1])
    answers = Predictions(classes, classes.flip(0), torch.ones(2), torch.ones(2), classes, 2)
    pictures = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    draw(plot_predictions(pictures.__getitem__, answers, [name, "b"], title=name), tmp_path / "predictions.png")


def test_a_single_patch_is_drawn(tmp_path: Path) -> None:
    draw(plot_position_similarity(np.ones((1, 1, 1, 1))), tmp_path / "positions.png")


def test_only_images_that_are_shown_are_read(tmp_path: Path) -> None:
    """Those drawn by chance, and the mistakes that the model was surest of, the surest first."""
    labels = [index % 3 for index in range(200)]
    answers = [label if index % 4 else (label + 1) % 3 for index, label in enumerate(labels)]
    confidence = torch.arange(200) / 200
    predictions = predictions_of(labels, answers, confidence, 3)
    read: list[int] = []

    def image_of(place: int) -> torch.Tensor:
        read.append(place)
        return torch.randint(0, 256, (1 + 2 * (place % 2), 8, 9), dtype=torch.uint8)

    figure = plot_predictions(image_of, predictions, ["a", "b", "c"])
    assert read == shown_predictions(predictions) and len(read) == 32
    assert read[16:] == list(range(196, 132, -4))
    titles = [axis.get_title() for part in figure.subfigs for axis in part.axes]
    assert titles[16] == "c  98%\nis b" and titles[31] == "c  68%\nis b"
    draw(figure, tmp_path / "predictions.png")


def test_a_model_without_mistakes_and_with_few_images(tmp_path: Path) -> None:
    predictions = predictions_of([0, 1], [0, 1], torch.ones(2), 2)
    figure = plot_predictions(lambda place: torch.zeros(3, 40, 40, dtype=torch.uint8), predictions, ["a", "b"])
    assert len(figure.subfigs) == 1
    draw(figure, tmp_path / "predictions.png")
