"""What is done to an image by name; mixing batches, and labels that say how much of which."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_vit.data.augmentation import (
    AUGMENTATIONS,
    AUGREG,
    AUGREG_MIXUP,
    OPERATIONS,
    BatchMixer,
    ResizeToCover,
    TensorFlowRandAugment,
    build_augmentation,
)
from hf_vit.data.batched_augmentation import PlannedImage, carry_out

IMAGES = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 3, 8, 10).contiguous()
LABELS = torch.arange(6)
GRAY = [128]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator())


def seeded(transform: Any, image: Tensor, seeds: int) -> Iterator[Tensor]:
    for seed in range(seeds):
        torch.manual_seed(seed)
        yield transform(image)


def distance(image: Tensor, other: Tensor) -> float:
    return (image.float() - other.float()).abs().mean().item()


# ----------------------------------------------------------------------------------------------------- an image


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_set_gives_bytes_of_the_size_that_follow_from_the_seed(name: str, channels: int) -> None:
    for old, new in (((37, 53), (24, 16)), ((53, 37), (16, 16)), ((8, 8), (8, 8)), ((5, 8), (12, 20))):
        image = noise(channels, *old)
        before = image.clone()
        transform = build_augmentation(name, new, 0.3, color_jitter=0.3, erasing=0.5)
        results = []
        for number in range(2):
            random.seed(number)
            np.random.seed(number)
            results.append(list(seeded(transform, image, 6)))
        first, second = results
        assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
        assert {(result.dtype, tuple(result.shape)) for result in first} == {(torch.uint8, (channels, *new))}
        assert len({result.numpy().tobytes() for result in first}) > 3
        assert torch.equal(image, before)


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_planned_batch_is_what_its_images_are_one_by_one(name: str, channels: int) -> None:
    """Up to rounding, which equalization and a threshold enlarge in a few pixels; from the same random numbers."""
    transform = build_augmentation(name, (24, 16), 0.3, color_jitter=0.3, erasing=0.5, fill=(0.4, 0.3, 0.2)[:channels])
    images = [smooth_noise(channels, *size) for size in ((37, 53), (24, 16), (64, 20), (10, 12))]
    expected, plans = [], []
    for seed in range(24):
        image = images[seed % 4]
        torch.manual_seed(seed)
        expected.append(transform(image))
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        plans.append(transform(PlannedImage.of(seed, image.shape)).plan)
        assert torch.equal(torch.get_rng_state(), state)
    batch = carry_out(plans, [images[plan.position % 4] for plan in plans])
    assert batch.dtype == torch.uint8
    difference = (batch.float() - torch.stack(expected).float()).abs().flatten(1)
    assert difference.mean() < 0.5 and difference.mean(dim=1).max() < 4
    assert difference.mean(dim=1).median() < 0.4  # a wrong flip, box or sign of one operation is more
    assert all(torch.equal(carry_out(plans[at : at + 1], [images[at % 4]])[0], batch[at]) for at in (0, 9, 23))


def smooth_noise(*shape: int) -> Tensor:
    channels, height, width = shape
    small = torch.randint(0, 256, (1, channels, height // 4 + 1, width // 4 + 1), generator=generator()).float()
    return torch.nn.functional.interpolate(small, size=(height, width), mode="bilinear")[0].to(torch.uint8)


def test_nothing_draws_from_python_or_numpy() -> None:
    states = random.getstate(), np.random.get_state()[1].tobytes()
    for name in AUGMENTATIONS:
        list(seeded(build_augmentation(name, (8, 8), 0.3, color_jitter=0.3, erasing=0.5), noise(3, 9, 9), 4))
    assert (random.getstate(), np.random.get_state()[1].tobytes()) == states


def test_without_options_nothing_is_added() -> None:
    image = noise(3, 8, 8)
    assert torch.equal(build_augmentation("none", (8, 8), 0.3)(image), image)


@pytest.mark.parametrize(("channels", "fill"), [(3, (0.5, 0.5, 0.5)), (1, (0.5, 0.5, 0.5)), (3, (0.4, 0.2, 0.1))])
def test_erasing_fills_a_box_with_the_mean(channels: int, fill: tuple[float, ...]) -> None:
    image = torch.full((channels, 20, 30), 250, dtype=torch.uint8)
    transform = build_augmentation("none", (20, 30), 1.0, erasing=1.0, fill=fill)
    for erased in seeded(transform, image, 10):
        is_erased = (erased != image).any(dim=0)
        rows, columns = is_erased.any(dim=1).sum(), is_erased.any(dim=0).sum()
        assert is_erased.sum() == rows * columns > 0
        expected = [round(255 * value) for value in fill[:channels]]
        assert (erased[:, is_erased] == torch.tensor(expected).unsqueeze(1)).all()


def test_erasing_and_jitter_have_their_probability() -> None:
    image = noise(3, 16, 16)
    half = build_augmentation("none", (16, 16), 1.0, erasing=0.5)
    assert 60 < sum(torch.equal(result, image) for result in seeded(half, image, 200)) < 140
    jitter = build_augmentation("none", (16, 16), 1.0, color_jitter=0.3)
    assert not any(torch.equal(result, image) for result in seeded(jitter, image, 20))


def test_jitter_of_a_grayscale_image_changes_its_brightness() -> None:
    image = torch.full((1, 8, 8), 100, dtype=torch.uint8)
    values = {
        int(jittered[0, 0, 0])
        for jittered in seeded(build_augmentation("none", (8, 8), 1, color_jitter=0.3), image, 40)
    }
    assert min(values) >= 69 and max(values) <= 131 and len(values) > 10


@pytest.mark.parametrize("name", ["three", "three_simple"])
def test_three_augment_takes_one_of_three(name: str) -> None:
    """Of a checkerboard in two channels and a constant in the third: gray is gray, and a blur leaves the constant."""
    board = (torch.arange(16).view(-1, 1) + torch.arange(16)) % 2
    image = torch.stack([board * 200 + 20, 220 - board * 200, torch.full((16, 16), 200)]).to(torch.uint8)
    kinds = {"gray": 0, "solarized": 0, "blurred": 0}
    for result in seeded(build_augmentation(name, (16, 16), 1.0), image, 120):
        if torch.equal(result[0], result[1]) and torch.equal(result[1], result[2]):
            kinds["gray"] += 1
        else:
            assert result[2].unique().tolist() in ([200], [55])
            kinds["blurred" if result[2, 0, 0] == 200 else "solarized"] += 1
    assert sum(kinds.values()) == 120 and min(kinds.values()) >= 25


def test_the_simple_crop_moves_by_a_few_pixels() -> None:
    """No scale is changed: columns of a ramp keep their steps, but for those that a reflection turns."""
    ramp = torch.arange(0, 240, 10, dtype=torch.uint8).expand(3, 24, 24)
    crop = torch.nn.Sequential(*build_augmentation("three_simple", (24, 24), 1.0).transforms[:2])
    offsets = set()
    for result in seeded(crop, ramp, 60):
        steps = result[0, 0].int().diff()
        assert set(steps.abs().tolist()) == {10} and (steps == 10).sum() >= 19
        offsets.add(int(result[0, 0, 12]) // 10 - 12)
    assert offsets == set(range(-4, 5))


@pytest.mark.parametrize(
    ("old", "size", "covering"),
    [
        ((37, 53), (16, 16), (16, 22)),
        ((53, 37), (16, 16), (22, 16)),
        ((10, 10), (6, 9), (9, 9)),
        ((6, 9), (6, 9), (6, 9)),
    ],
)
def test_resize_to_cover(old: tuple[int, int], size: tuple[int, int], covering: tuple[int, int]) -> None:
    assert ResizeToCover(size)(noise(3, *old)).shape == (3, *covering)


def test_the_sets_of_augreg() -> None:
    """big_vision, configs/vit_i1k.py: RANDAUG_DEF and MIXUP_DEF."""
    assert set(AUGREG) <= set(AUGMENTATIONS) and set(AUGREG) == set(AUGREG_MIXUP)
    assert list(AUGREG_MIXUP.values()) == [0, 0, 0.2, 0.2, 0.5, 0.5, 0.8]
    image = noise(3, 16, 16)
    pairs = (build_augmentation(name, (16, 16), 0.5) for name in ("augreg_none", "crop_flip"))
    assert all(torch.equal(*both) for both in zip(*(seeded(pair, image, 5) for pair in pairs), strict=True))


def test_rand_augment_takes_every_operation_and_both_signs() -> None:
    transform = TensorFlowRandAugment(layers=2, level=10, fill=GRAY)
    torch.manual_seed(0)
    draws = [draw for _ in range(200) for draw in transform.make_params([])["draws"]]
    assert len(draws) == 400
    assert {name for name, _ in draws} == set(OPERATIONS)
    assert {sign for _, sign in draws} == {-1, 1}


@pytest.mark.parametrize(
    "name", ["rotate", "shear_x", "shear_y", "translate_x", "translate_y", "cutout", "solarize_add"]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_operations_that_grow_from_nothing(name: str, channels: int) -> None:
    image = noise(channels, 12, 20) // 2
    changes = []
    for strength in (0.0, 1.0, 2.0):
        torch.manual_seed(1)
        changes.append(distance(OPERATIONS[name](image, strength, 1, [200]), image))
    assert 0 == changes[0] < changes[1] < changes[2]


@pytest.mark.parametrize("name", ["color", "contrast", "brightness", "sharpness"])
def test_factors_change_nothing_in_the_middle(name: str) -> None:
    image = noise(3, 8, 8) // 4 + 96
    changes = [distance(OPERATIONS[name](image, strength, 1, GRAY), image) for strength in (0.5, 1.0, 2.0)]
    assert 0 == changes[0] < changes[1] < changes[2]
    dull = OPERATIONS[name](image, 0.0, 1, GRAY)  # a factor of 0.1
    assert dull.float().std() < image.float().std()


def test_invert_twice_is_nothing() -> None:
    image = noise(3, 8, 8)
    inverted = OPERATIONS["invert"](image, 1, 1, GRAY)
    assert torch.equal(inverted, 255 - image)
    assert torch.equal(OPERATIONS["invert"](inverted, 1, 1, GRAY), image)


@pytest.mark.parametrize(("level", "bits"), [(0, 1), (10, 4), (15, 6), (20, 8)])
def test_posterize_keeps_bits(level: int, bits: int) -> None:
    image = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    kept = OPERATIONS["posterize"](image, level / 10, 1, GRAY)
    assert torch.equal(kept, (image >> (8 - bits)) << (8 - bits))


@pytest.mark.parametrize(("level", "threshold"), [(0, 0), (5, 128), (10, 256), (20, 512)])
def test_solarize_inverts_from_its_threshold_on(level: int, threshold: int) -> None:
    image = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    values = OPERATIONS["solarize"](image, level / 10, 1, GRAY).flatten().tolist()
    assert values == [value if value < threshold else 255 - value for value in range(256)]


@pytest.mark.parametrize(("level", "addition"), [(0, 0), (10, 110), (20, 220)])
def test_solarize_add_brightens_the_dark(level: int, addition: int) -> None:
    image = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    values = OPERATIONS["solarize_add"](image, level / 10, 1, GRAY).flatten().tolist()
    assert values == [min(255, value + addition) if value < 128 else value for value in range(256)]


def test_autocontrast_and_equalize_spread_the_values() -> None:
    image = noise(3, 32, 32) // 4 + 50
    for name in ("autocontrast", "equalize"):
        spread = OPERATIONS[name](image, 1, 1, GRAY)
        assert (spread.amin(dim=(1, 2)) <= 1).all() and (spread.amax(dim=(1, 2)) >= 254).all()
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    assert torch.equal(OPERATIONS["autocontrast"](ramp, 1, 1, GRAY), ramp)


@pytest.mark.parametrize(("name", "dim", "shift"), [("translate_x", 2, 50), ("translate_y", 1, 25)])
def test_a_translation_is_a_share_of_the_side(name: str, dim: int, shift: int) -> None:
    """10 of 224 pixels a level; at level 20 of a side of 28 are that 25."""
    image = noise(3, 28, 56)
    expected = torch.full_like(image, 7)
    rest = image.shape[dim] - shift
    expected.narrow(dim, shift, rest).copy_(image.narrow(dim, 0, rest))
    assert torch.equal(OPERATIONS[name](image, 2.0, 1, [7]), expected)
    assert torch.equal(OPERATIONS[name](image.flip(dim), 2.0, -1, [7]), expected.flip(dim))


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_shear_has_its_slope(sign: int) -> None:
    """At strength 2.2 row or column k moves by 0.66 (k + 1/2): never by a half, which rounds as the CPU likes."""
    image = noise(1, 20, 20)
    across = OPERATIONS["shear_x"](image, 2.2, sign, [0])
    assert torch.equal(OPERATIONS["shear_y"](image.mT, 2.2, sign, [0]), across.mT)
    assert torch.equal(across[:, 0], image[:, 0])
    new, old = (across[0, 10], image[0, 10]) if sign < 0 else (image[0, 10], across[0, 10])
    assert torch.equal(new[7:], old[:-7])


def test_a_rotation_turns_by_30_degrees_a_strength() -> None:
    image = noise(3, 21, 21)
    assert torch.equal(OPERATIONS["rotate"](image, 3.0, 1, GRAY), image.rot90(1, (1, 2)))
    assert torch.equal(OPERATIONS["rotate"](image, 3.0, -1, GRAY), image.rot90(-1, (1, 2)))
    assert (OPERATIONS["rotate"](image, 1.5, 1, [1, 2, 3])[:, 0, 0] == torch.tensor([1, 2, 3])).all()


def test_a_cutout_is_a_box_up_to_its_size() -> None:
    """Half of a side is 4 of 224 pixels a level: at level 10 a box of 10 by 20 of 28 by 56, less at the border."""
    image = torch.zeros(3, 28, 56, dtype=torch.uint8)
    sizes = set()
    for result in seeded(lambda image: OPERATIONS["cutout"](image, 1.0, 1, [9]), image, 100):
        is_cut = (result == 9).all(dim=0)
        rows, columns = int(is_cut.any(dim=1).sum()), int(is_cut.any(dim=0).sum())
        assert is_cut.sum() == rows * columns and 4 <= rows <= 11 and 9 <= columns <= 21
        sizes.add((rows, columns))
    assert (10, 20) in sizes and len(sizes) > 10


def test_an_unknown_augmentation_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"Unknown augmentation 'aug_light2': choose one of none, .* Did you mean 'augreg_light2'\?"
    ):
        build_augmentation("aug_light2", (8, 8), 0.5)


# ------------------------------------------------------------------------------------------------------ a batch


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
