"""What a model has learned, where the answer is known."""

from typing import Any

import numpy as np
import pytest
import torch

from hf_vit import HFViTForImageClassification, HFViTModel
from hf_vit.inspection import plot_position_similarity, plot_predictions, plot_training, position_similarity


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


def test_pictures_are_drawn(tiny_config: Any, tmp_path: Any) -> None:
    log = [
        {"step": 1, "epoch": 0.5, "loss": 2.0, "learning_rate": 0.1},
        {"step": 2, "epoch": 1.0, "eval_accuracy": 0.5, "eval_loss": 1.0, "eval_count": 20},
    ]
    images = [torch.randint(0, 256, (channels, 8, 9), dtype=torch.uint8) for channels in (1, 3) * 10]
    labels = [index % 3 for index in range(20)]
    figures = {
        "training": plot_training(log),
        "positions": plot_position_similarity(position_similarity(HFViTModel(tiny_config()))),
        "mistakes": plot_predictions(images, labels, torch.rand(20, 3).softmax(-1), ["a", "b", "c"]),
        "none": plot_predictions(images, labels, torch.eye(3)[labels], ["a", "b", "c"]),
    }
    for name, figure in figures.items():
        figure.savefig(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
