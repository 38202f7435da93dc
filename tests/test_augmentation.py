"""Mixing batches, and labels that say how much of which."""

import pytest
import torch

from hf_vit.augmentation import BatchMixer

IMAGES = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 3, 8, 10).contiguous()
LABELS = torch.arange(6)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_nothing_to_do_leaves_all_as_it_is() -> None:
    images, labels = BatchMixer(6)(IMAGES, LABELS, generator())
    assert images is IMAGES and labels is LABELS


def test_label_smoothing() -> None:
    images, labels = BatchMixer(6, label_smoothing=0.3)(IMAGES, LABELS, generator())
    assert images is IMAGES
    assert torch.allclose(labels[2], torch.tensor([0.05, 0.05, 0.75, 0.05, 0.05, 0.05]))


@pytest.mark.parametrize("kinds", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_labels_follow_the_pixels(kinds: dict[str, float]) -> None:
    """Image k is all k, so the mean of a mixed image must be the mean label."""
    mixer = BatchMixer(6, **kinds)
    for seed in range(20):
        images, labels = mixer(IMAGES, LABELS, generator(seed))
        assert torch.allclose(labels.sum(dim=1), torch.ones(6))
        assert torch.allclose(images.mean(dim=(1, 2, 3)), labels @ torch.arange(6.0), atol=1e-5)
    again = mixer(IMAGES, LABELS, generator(19))
    assert torch.equal(again[0], images) and torch.equal(again[1], labels)


def test_cutmix_pastes_a_box() -> None:
    images, _ = BatchMixer(6, cutmix=1.0)(IMAGES, LABELS, generator(1))
    for index in range(6):
        assert len(images[index].unique()) <= 2
