"""The steps of a fit: oddities in data, cached features, the linear head, the plan of a race, and what it promises."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from sklearn.linear_model import LogisticRegression
from test_audit import content as encoded
from test_audit import scene
from tiny_run import COLORS, colored_dataset, colored_images
from torch import Tensor

import hf_vit
from hf_vit.data.audit import audit, content_digest, stored_bytes
from hf_vit.data.labelled import ImageData
from hf_vit.evaluation.calibration import interval_for
from hf_vit.model.pooling_hf_vit import HFViTDistilledClassifier
from hf_vit.training.fitting.calibration import expected_score, wilson
from hf_vit.training.fitting.embedding import Encoder, embed, logits_of
from hf_vit.training.fitting.heads import (
    LinearHead,
    MultiLabel,
    Regression,
    SingleLabel,
    calm_solvers,
    fit_head,
    folds_of,
    standardized,
)
from hf_vit.training.fitting.race import LEAST_STEPS, Budget, beats, plan

COLUMNS = ("image", "label")
NAMES = list(COLORS)


def encoder_of(**fields: Any) -> Encoder:
    config = hf_vit.HFViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, patch_size=4, image_size=8,
        **fields,
    )  # fmt: skip
    torch.manual_seed(0)
    processor = hf_vit.HFViTImageProcessor.from_preset("original", (8, 8))
    return Encoder(hf_vit.HFViTModel(config).eval(), processor, "tiny", precision="fp32")


def stored(images: list[bytes], labels: list[int]) -> Dataset:
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=NAMES)})
    rows = [{"bytes": content, "path": f"{index}.png"} for index, content in enumerate(images)]
    return Dataset.from_dict({"image": rows, "label": labels}, features=features)


def contents(number: int, seed: int) -> list[bytes]:
    split = colored_dataset(number, seed).cast_column("image", Image(decode=False))
    return [stored_bytes(row["image"]) for row in split]


def data_of(train: Dataset, evaluation: Dataset | None) -> ImageData:
    return ImageData("photos", train, evaluation, COLUMNS, NAMES, "test", len(train))


def test_audit_names_what_is_odd() -> None:
    first, other = contents(4, 0), contents(2, 1)
    train = stored([*first, first[0], first[1], b"no image"], [0, 1, 0, 1, 0, 0, 1])
    found = audit(data_of(train, stored([first[2], *other], [0, 1, 1])))
    assert found.counts == {"blue": 4, "green": 2, "red": 0}
    assert found.unreadable == {"training": ["6.png"], "evaluation": []}
    assert found.repeated == 2 and found.contradictions == [["1.png", "5.png"]]
    assert found.leaked == [("0.png", "2.png")]
    assert found.empty == ["red"] and found.tiny == {"blue": 4, "green": 2}
    text = " ".join(found.sentences())
    for words in ("6.png", "red", "blue (4)", "1.png = 5.png", "0.png = 2.png"):
        assert words in text


def test_audit_finds_near_duplicates_but_no_exact_ones_twice() -> None:
    images = [scene(seed) for seed in range(8)]
    nearly = images[3].resize((70, 60)).transpose(PILImage.Transpose.FLIP_LEFT_RIGHT)
    *train, first, second = map(encoded, images)
    data = data_of(stored(train, [0] * 6), stored([train[0], encoded(nearly), first, second], [0] * 4))
    found = audit(data)
    assert [pair[:2] for pair in found.near] == [("1.png", "3.png")]
    assert found.leaked == [("0.png", "0.png")]


def test_features_are_those_of_the_model_and_are_cached(tmp_path: Path) -> None:
    split, encoder = colored_dataset(10, 0), encoder_of()
    first = embed(encoder, split, COLUMNS, tmp_path)
    assert first.computed == 10 and first.rows == list(range(10))
    assert {name: table.shape[1] for name, table in first.features.items()} == {
        "cls": 16,
        "mean": 16,
        "cls_and_mean": 32,
    }
    again = embed(encoder_of(), split, COLUMNS, tmp_path)
    assert again.computed == 0
    for name in encoder.poolings:
        assert torch.equal(first.features[name], again.features[name])
        model = encoder_of(pooling=name, use_cls_token=True)
        features = embed(model, split, COLUMNS, tmp_path).features[name]
        torch.testing.assert_close(features, first.features[name], atol=1e-5, rtol=0)
    other = encoder_of(layer_norm_eps=1e-3)
    assert other.fingerprint != encoder.fingerprint


def test_unreadable_images_have_no_features(tmp_path: Path) -> None:
    images = contents(4, 0)
    split = stored([images[0], b"no image", *images[1:]], [0] * 5)
    found = embed(encoder_of(), split, COLUMNS, tmp_path)
    assert found.rows == [0, 2, 3, 4] and found.contents.unreadable == ["1.png"]
    assert all(len(table) == 4 for table in found.features.values())
    assert found.contents.digests[0] == content_digest(images[0])


def test_an_interrupted_pass_keeps_what_it_computed(tmp_path: Path) -> None:
    split, encoder = colored_dataset(40, 0), encoder_of()

    def interrupted(batches: Any, number: int) -> Any:
        yield next(batches)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed(encoder, split, COLUMNS, tmp_path, interrupted)
    rest = embed(encoder, split, COLUMNS, tmp_path)
    assert 0 < rest.computed < 40
    [*shards] = (tmp_path / encoder.fingerprint).iterdir()
    shards[0].write_bytes(b"damaged")
    assert 0 < embed(encoder, split, COLUMNS, tmp_path).computed < 40


def test_logits_of_a_classifier_are_in_order() -> None:
    config = hf_vit.HFViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, patch_size=4, image_size=8
    )
    model = hf_vit.HFViTForImageClassification(config).eval()
    processor = hf_vit.HFViTImageProcessor.from_preset("original", (8, 8))
    images, _ = colored_images(11, 0)
    logits = logits_of(model, processor, colored_dataset(11, 0), COLUMNS, "fp32")
    with torch.no_grad():
        expected = model(**processor(images, return_tensors="pt")).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def clusters(number: int, spread: float = 0.5, classes: int = 3) -> tuple[Tensor, Tensor]:
    labels = torch.arange(number) % classes
    centres = torch.randn(classes, 8, generator=torch.Generator().manual_seed(7))
    return 5 + 3 * (centres[labels] + spread * torch.randn(number, 8)), labels


@pytest.fixture(autouse=True)
def calm() -> Iterator[None]:
    with calm_solvers():
        yield


@pytest.mark.parametrize("classes", (2, 3))
def test_the_head_is_scikit_learns_on_standardized_features(classes: int) -> None:
    features, labels = clusters(60, classes=classes)
    head = SingleLabel(classes).fit(features, labels, 0.01)
    scaled = standardized(features)[0].numpy()
    probe = LogisticRegression(C=0.01, max_iter=300).fit(scaled, labels.numpy())
    np.testing.assert_allclose(head(features).softmax(dim=-1), probe.predict_proba(scaled), atol=1e-4)


def test_classes_without_images_are_never_predicted() -> None:
    features, labels = clusters(60)
    head = SingleLabel(5).fit(features, labels * 2, 0.01)
    assert set(head(features).argmax(dim=-1).tolist()) == {0, 2, 4}
    assert head.weight[[1, 3]].eq(0).all() and head.bias.isfinite().all()


def test_a_class_with_one_image_is_no_obstacle() -> None:
    features, labels = clusters(16)
    labels[-1] = 3
    found = fit_head({"cls": features}, labels, SingleLabel(4), [str(index) for index in range(16)])
    assert 0.5 < found.score < 1 and found.logits.shape == (16, 4)
    assert found.head(features).isfinite().all()


def test_the_better_pooling_wins() -> None:
    features, labels = clusters(45)
    noise = {"mean": torch.randn(45, 8), "cls": features}
    found = fit_head(noise, labels, SingleLabel(3), [str(index) for index in range(45)])
    assert found.pooling == "cls" and found.score > 0.9
    assert {row["pooling"] for row in found.tried} == {"cls", "mean"}


def test_copies_are_in_one_fold_and_folds_are_balanced() -> None:
    strata = torch.arange(100) % 2
    digests = [str(index // 4) for index in range(100)]
    folds = folds_of(strata, digests, seed=0)
    assert all(len(folds[start : start + 4].unique()) == 1 for start in range(0, 100, 4))
    alone = folds_of(strata, [str(index) for index in range(100)], seed=0)
    assert torch.bincount(alone * 2 + strata).eq(10).all()


def test_several_labels_and_numbers_have_heads_too() -> None:
    features, labels = clusters(60, spread=0.3)
    several = torch.stack([labels == 0, labels != 1, torch.zeros(60)], dim=1).float()
    head = MultiLabel(3).fit(features, several, 0.1)
    assert MultiLabel(3).score(head(features), several) > 0.95
    assert (head(features)[:, 2] < 0).all()
    numbers = torch.stack([features @ torch.arange(8.0), 100 - features[:, 0]], dim=1)
    problem = Regression(2)
    found = fit_head({"cls": features}, numbers, problem, [str(index) for index in range(60)])
    assert found.score > 0.99
    # The model computes head * std + mean.
    scaled, fields = problem.in_model(found.head, numbers), problem.fields(numbers)
    logits = scaled(features) * torch.tensor(fields["target_scale"]) + torch.tensor(fields["target_mean"])
    torch.testing.assert_close(logits, found.head(features), atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize(("labels", "words"), ([[0] * 8, "same label"], [[0, 1], "at least 4"]))
def test_data_that_cannot_be_fitted(labels: list[int], words: str) -> None:
    digests = [str(index) for index in range(len(labels))]
    with pytest.raises(ValueError, match=words):
        fit_head({"cls": torch.randn(len(labels), 4)}, torch.tensor(labels), SingleLabel(2), digests)


def cost(budget: Budget, speed: float, overhead: float) -> float:
    """Return the seconds of a race and the final training."""
    runs, steps = budget.candidates, budget.candidates * budget.steps[0]
    if len(budget.steps) > 1:
        runs, steps = runs + 2, steps + 2 * budget.steps[1]
    return (runs + bool(budget.final)) * overhead + (steps + budget.final) / speed


def test_a_race_fits_into_the_time_and_uses_it() -> None:
    kinds = []
    for seconds in (20, 60, 130, 200, 600, 6000):
        found = plan(seconds, steps_per_second=1.0, overhead=4.0, epoch=1000, share=1.25, candidates=5)
        if isinstance(found, str):
            kinds.append(0)
            continue
        assert 0.6 * seconds < cost(found, 1.0, 4.0) < seconds
        assert min(found.steps) >= LEAST_STEPS
        kinds.append(found.candidates - (found.final == 0) / 2)
    assert kinds == [0, 0.5, 1, 2, 2, 5]  # a half: without a final training


def test_few_images_are_not_trained_on_forever() -> None:
    found = plan(1e6, steps_per_second=100.0, overhead=1.0, epoch=10, share=1.25, candidates=5)
    assert isinstance(found, Budget) and found.final <= 1.25 * 20 * 10 + 1


def predictions(hits: list[bool]) -> Tensor:
    return torch.tensor([[1.0, 0.0] if hit else [0.0, 1.0] for hit in hits])


@pytest.mark.parametrize(
    ("hits", "is_better", "words"),
    (
        ([True] * 38 + [False] * 2, True, "8 images better and 0 worse"),
        ([True] * 31 + [False] * 9, True, "1 image better and 0 worse"),
        ([False] * 8 + [True] * 32, True, "10 images better and 8 worse"),
        ([True] * 30 + [False] * 10, False, "0 images better and 0 worse after fine-tuning, so the probe is kept"),
    ),
)
def test_the_better_score_is_chosen(hits: list[bool], is_better: bool, words: str) -> None:
    targets, probe = torch.zeros(40, dtype=torch.int64), predictions([True] * 30 + [False] * 10)
    found, why = beats(SingleLabel(2), predictions(hits), probe, targets)
    assert found == is_better and words in why


def test_a_model_that_is_not_trained_on_all_images_must_be_significantly_better() -> None:
    """As in a fit to 64 images: 12 of 13 right against 9 of 13."""
    targets, probe = torch.zeros(13, dtype=torch.int64), predictions([True] * 9 + [False] * 4)
    better = predictions([True] * 12 + [False])
    assert beats(SingleLabel(2), better, probe, targets)[0]
    found, why = beats(SingleLabel(2), better, probe, targets, is_final=True)
    assert not found and why.endswith(
        "so the probe is kept, which is trained on all images (the difference is not significant, p = 0.062)"
    )
    assert beats(SingleLabel(2), predictions([True] * 13), probe, targets, is_final=True)[0]


def test_the_interval_for_another_number_of_images() -> None:
    problem, targets = SingleLabel(2), torch.zeros(64, dtype=torch.int64)
    logits = predictions([True] * 52 + [False] * 12)
    expected = {**expected_score(problem, logits, targets), "new_images": None}
    low, high = interval_for(expected, 24)  # 16 of 24 images are right
    assert low < 16 / 24 < expected["low"] and expected["high"] < high <= 1
    assert interval_for(expected, 10**9) == pytest.approx((expected["low"], expected["high"]), rel=1e-6)
    for_24 = {**expected_score(problem, logits, targets, new_images=24), "new_images": 24}
    assert interval_for(for_24, 24) == pytest.approx((for_24["low"], for_24["high"]))


def test_the_interval_covers_what_is_measured() -> None:
    generator = torch.Generator().manual_seed(0)
    problem, inside = SingleLabel(2), 0
    for _ in range(200):
        held_out, new = (torch.rand(number, generator=generator) < 0.8 for number in (150, 100))
        targets = torch.zeros(150, dtype=torch.int64)
        expected = expected_score(problem, predictions(held_out.tolist()), targets, new_images=100)
        inside += expected["low"] <= new.float().mean() <= expected["high"]
    assert 0.92 < inside / 200 <= 1
    narrow, wide = (expected_score(problem, predictions([True] * 90), targets[:90], number) for number in (1, 4))
    assert wide["low"] < narrow["low"] and wilson(1.0, 50, 1.96)[1] == 1


def test_a_stream_is_refused() -> None:
    data = replace(data_of(colored_dataset(3, 0), None), train=colored_dataset(3, 0).to_iterable_dataset())
    with pytest.raises(ValueError, match="stream"):
        audit(data)


def test_a_head_is_written_into_every_kind_of_classifier() -> None:
    torch.manual_seed(0)
    features = torch.randn(4, 12)
    head = LinearHead(torch.randn(3, 12), torch.randn(3))
    for classifier in (torch.nn.Linear(12, 3), HFViTDistilledClassifier(12, 3)):
        head.write_into(classifier)
        torch.testing.assert_close(classifier(features), head(features))


def test_unknown_labels_are_ignored_by_the_head_of_several_labels() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(60, 4, generator=generator)
    targets = (features[:, :2] + 0.5 * torch.randn(60, 2, generator=generator) > 0).float()
    partly = targets.clone()
    partly[:20, 0] = -100
    problem = MultiLabel(2)
    head, known = problem.fit(features, partly, 1.0), problem.fit(features, targets, 1.0)
    torch.testing.assert_close(head.weight[1], known.weight[1])
    logits = head(features)
    assert problem.score(logits[20:], targets[20:]) > 0.9
    assert problem.loss(logits, partly) < 0.5 and problem.errors(logits, partly).max() < 5
    assert problem.strata(torch.tensor([[-100.0, -100.0], [1.0, 0.0], [1.0, 1.0]])).tolist() == [2, 0, 1]
