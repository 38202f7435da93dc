"""Probes of features: against closed forms, and on features that leave no doubt."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from hf_vit.evaluation.probing import BIAS, few_shot, knn, linear_probe, regression


def clusters(number: int, spread: float, seed: int = 0, width: int = 12) -> tuple[Tensor, Tensor]:
    """Return features around the centre of each of three classes, and their labels."""
    centres = torch.randn(3, width, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(number) % 3
    return centres[labels] + spread * torch.randn(number, width, generator=generator), labels


def test_all_probes_see_what_is_there() -> None:
    train, test = clusters(90, 0.1), clusters(31, 0.1, seed=1)
    assert linear_probe(train, test)["accuracy"] == 1
    assert knn(train, test)["accuracy"] == 1
    results = few_shot(train, test)
    assert [(number, result["mean"]) for number, result in results["shots"].items()] == [
        (1, 1.0),
        (5, 1.0),
        (10, 1.0),
        (25, 1.0),
    ]
    assert results["skipped"] == [] and results["shots"][25]["std"] == 0


def test_no_probe_sees_what_is_not_there() -> None:
    train, test = clusters(300, 1000.0), clusters(300, 1000.0, seed=1)
    few = few_shot(train, test, shots=(25,))["shots"][25]["mean"]
    for accuracy in (linear_probe(train, test)["accuracy"], knn(train, test)["accuracy"], few):
        assert 0.2 < accuracy < 0.46


@pytest.mark.parametrize("number", [9, 60])  # fewer and more images than features: two forms of one solution
def test_the_closed_form_is_ridge_regression(number: int) -> None:
    (features, labels), (others, _) = clusters(number, 1.0), clusters(5, 1.0, seed=1)
    classes, l2 = torch.arange(3), 3.0
    mean, std = features.double().mean(0), features.double().std(0, correction=0) + 1e-5
    x, z = (
        np.pad(((f.double() - mean) / std).numpy(), ((0, 0), (0, 1)), constant_values=BIAS) for f in (features, others)
    )
    y = 2.0 * np.eye(3)[labels] - 1
    weights = np.linalg.lstsq(np.vstack([x, l2**0.5 * np.eye(13)]), np.vstack([y, np.zeros((13, 3))]), rcond=None)[0]
    scores = regression(features, labels, classes, l2)(others).numpy()
    np.testing.assert_allclose(scores, z @ weights, atol=1e-9)
    np.testing.assert_allclose(scores, Ridge(alpha=l2, fit_intercept=False).fit(x, y).predict(z), atol=1e-9)


def test_draws_depend_on_the_seed_alone() -> None:
    train, test = clusters(60, 1.5), clusters(60, 1.5, seed=1)
    both, one = few_shot(train, test, shots=(1, 5)), few_shot(train, test, shots=(5,))
    assert both["shots"][5] == one["shots"][5]
    accuracies = both["shots"][5]["accuracies"]
    assert len(set(accuracies)) > 1
    assert both["shots"][5]["mean"] == pytest.approx(np.mean(accuracies))
    assert both["shots"][5]["std"] == pytest.approx(np.std(accuracies, ddof=1))
    assert few_shot(train, test, shots=(5,), seeds=(1,))["shots"][5] == {
        "mean": accuracies[1],
        "std": None,
        "accuracies": [accuracies[1]],
    }


def test_shots_that_a_class_lacks_are_left_out() -> None:
    features, labels = clusters(30, 0.1)
    few = labels.ne(2) | (torch.arange(30) < 9)  # three of class 2
    results = few_shot((features[few], labels[few]), clusters(9, 0.1, 1), label_names=["a", "b", "c"])
    assert list(results["shots"]) == [1]
    assert results["skipped"][0] == "Skipped 5 shots: class 'c' has 3 training images. Add some to have 5."
    none = few_shot((features[labels < 2], labels[labels < 2]), clusters(9, 0.1, 1), shots=(1,))
    assert none["shots"] == {} and "class 2 has 0 training images" in none["skipped"][0]


def test_neighbours_vote_as_in_scikit_learn() -> None:
    train, test = clusters(80, 1.0), clusters(40, 1.0, seed=1)
    unit = [torch.nn.functional.normalize(features, dim=-1).numpy() for features, _ in (train, test)]
    # The distance of unit vectors squared is 2 - 2 * similarity.
    voters = KNeighborsClassifier(7, weights=lambda distance: np.exp((1 - distance**2 / 2) / 0.07)).fit(
        unit[0], train[1]
    )
    assert knn(train, test, k=7)["accuracy"] == pytest.approx(voters.score(unit[1], test[1]))
    assert knn(train, test, k=200)["k"] == 80


def test_nearer_neighbours_count_more() -> None:
    features = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]])
    train = features, torch.tensor([1, 0, 0])
    test = torch.tensor([[2.0, 0.0]]), torch.tensor([1])
    assert knn(train, test, k=3)["accuracy"] == 1  # exp(1 / 0.07) outweighs 2 * exp(0.6 / 0.07)
    assert knn(train, test, k=3, temperature=10.0)["accuracy"] == 0


def test_a_linear_probe_needs_something_to_learn_from() -> None:
    features, labels = clusters(12, 1.0)
    with pytest.raises(ValueError, match="five training images in one of them: got 12 images in 3 classes"):
        linear_probe((features, labels), (features, labels))
    with pytest.raises(ValueError, match="two classes"):
        linear_probe((features, torch.zeros(12, dtype=torch.long)), (features, labels))


def test_the_strength_is_chosen_without_the_test_labels() -> None:
    train, (features, labels) = clusters(60, 1.0), clusters(60, 1.0, seed=1)
    assert linear_probe(train, (features, labels))["C"] == linear_probe(train, (features, labels.flip(0)))["C"]
