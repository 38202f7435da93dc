"""Augmentation of training images, and mixing of batches.

Images: crops, flips and sets of operations by name, from uint8 to uint8. All random numbers come from torch's default
generator; with the same seed, an image is augmented in the same way.

    RandAugment: Cubuk et al. 2020 (arXiv:1909.13719), on the scale of google-research/big_vision pp/autoaugment.py
    AugReg: Steiner et al. 2022, "How to train your ViT?" (arXiv:2106.10270), big_vision configs/vit_i1k.py
    three-augment: Touvron et al. 2022, "DeiT III" (arXiv:2204.07118), facebookresearch/deit augment.py
    random erasing: Zhong et al. 2020 (arXiv:1708.04896)

Batches: pairs of images are mixed, and their labels become soft.

    mixup: Zhang et al. 2018 (arXiv:1710.09412); CutMix: Yun et al. 2019 (arXiv:1905.04899)
"""

import difflib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as tvF

from ..model.segmentation_maps_hf_vit import IGNORED
from ..system.transfers import to_device
from .batched_augmentation import solarize_add
from .box_augmentation import BoxedAugmentation

UNKNOWN = -100.0  # one of several labels of an image that nobody knows


class SmallAffine(v2.Transform):
    """Rotate, translate, scale and shear a little, by fractions of a pixel; RandomAffine translates by whole pixels.

    The ranges fit handwriting: 12 degrees, a tenth of the image, 12 percent, 8 degrees.
    """

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.query_size(flat_inputs)
        angle, down, right, zoom, shear = (torch.rand(5) * 2 - 1).tolist()
        return {
            "angle": 12 * angle,
            "translate": [0.1 * width * right, 0.1 * height * down],
            "scale": 1 + 0.12 * zoom,
            "shear": [8 * shear],
        }

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        fill = float(IGNORED) if isinstance(inpt, tv_tensors.Mask) else None
        return tvF.affine(inpt, **params, interpolation=InterpolationMode.BILINEAR, fill=fill)


class ResizeToCover(v2.Transform):
    """Resize to the smallest image that covers `size` (height, width), keeping the aspect ratio."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        (height, width), (rows, columns) = v2.query_size(flat_inputs), self.size
        if rows * width >= columns * height:
            return {"size": [rows, rows * width // height]}
        return {"size": [columns * height // width, columns]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return tvF.resize(inpt, **params, interpolation=InterpolationMode.BICUBIC)


def _move(image: Tensor, fill: list[int], across: float = 0, down: float = 0, slopes: Sequence[float] = (0, 0)) -> Any:
    """Translate by shares of width and height, and shear around the top left corner by `slopes` (across, down)."""
    height, width = image.shape[-2:]
    shear = [math.degrees(math.atan(slope)) for slope in slopes]
    shift = [round(across * width), round(down * height)]
    return tvF.affine(image, angle=0, translate=shift, scale=1, shear=shear, fill=fill, center=[0, 0])


def _solarize(image: Tensor, threshold: int) -> Tensor:
    return tvF.solarize(image, threshold) if threshold <= 255 else image


def _cut_out(image: Tensor, share: float, fill: list[int]) -> Tensor:
    (top, bottom), (left, right) = _box(image.shape[-2:], torch.rand(2).tolist(), share)
    return tvF.erase(image, top, left, bottom - top, right - left, v=torch.tensor(fill).view(-1, 1, 1))


# Functions of image, strength, sign and fill. Strength 1 is the usual end of the range. Posterize and solarize change
# less with more strength, and the four factors nothing at 0.5. Distances, which the source gives in pixels of 224, are
# shares of the side, for images of any size.
OPERATIONS: dict[str, Callable[[Tensor, float, int, list[int]], Tensor]] = {
    "autocontrast": lambda image, strength, sign, fill: tvF.autocontrast(image),
    "equalize": lambda image, strength, sign, fill: tvF.equalize(image),
    "invert": lambda image, strength, sign, fill: tvF.invert(image),
    "rotate": lambda image, strength, sign, fill: tvF.rotate(image, sign * 30 * strength, fill=fill),
    # TensorFlow shifts 8 bits by at most 7, which leaves 1 bit.
    "posterize": lambda image, strength, sign, fill: tvF.posterize(image, min(8, max(1, int(4 * strength)))),
    "solarize": lambda image, strength, sign, fill: _solarize(image, int(256 * strength)),
    "solarize_add": lambda image, strength, sign, fill: solarize_add(image, int(110 * strength)),
    "color": lambda image, strength, sign, fill: tvF.adjust_saturation(image, 0.1 + 1.8 * strength),
    "contrast": lambda image, strength, sign, fill: tvF.adjust_contrast(image, 0.1 + 1.8 * strength),
    "brightness": lambda image, strength, sign, fill: tvF.adjust_brightness(image, 0.1 + 1.8 * strength),
    "sharpness": lambda image, strength, sign, fill: tvF.adjust_sharpness(image, 0.1 + 1.8 * strength),
    "shear_x": lambda image, strength, sign, fill: _move(image, fill, slopes=(sign * 0.3 * strength, 0)),
    "shear_y": lambda image, strength, sign, fill: _move(image, fill, slopes=(0, sign * 0.3 * strength)),
    "translate_x": lambda image, strength, sign, fill: _move(image, fill, across=sign * 100 / 224 * strength),
    "translate_y": lambda image, strength, sign, fill: _move(image, fill, down=sign * 100 / 224 * strength),
    "cutout": lambda image, strength, sign, fill: _cut_out(image, 2 * 40 / 224 * strength, fill),
}


class TensorFlowRandAugment(v2.Transform):
    """Apply `layers` random operations at a level of TensorFlow's scale, where 10 is strength 1 and 20 is allowed.

    torchvision's RandAugment has other operations and ends at 10. Contrast is PIL's; big_vision blends with a constant
    that grows with the number of pixels.
    """

    def __init__(self, layers: int, level: float, fill: list[int]) -> None:
        super().__init__()
        self.layers, self.level, self.fill = layers, level, fill

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        chosen = torch.randint(len(OPERATIONS), (self.layers,)).tolist()
        signs = (1 - 2 * torch.randint(2, (self.layers,))).tolist()
        return {"draws": [(list(OPERATIONS)[index], sign) for index, sign in zip(chosen, signs, strict=True)]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        for name, sign in params["draws"]:
            inpt = OPERATIONS[name](inpt, self.level / 10, sign, self.fill)
        return inpt


def _crop_flip(size: tuple[int, int], smallest_crop: float, **options: Any) -> list[v2.Transform]:
    return [v2.RandomResizedCrop(size, scale=(smallest_crop, 1.0), **options), v2.RandomHorizontalFlip()]


def _simple_crop_flip(size: tuple[int, int]) -> list[v2.Transform]:
    padding = min(4, min(size) - 1)  # reflection padding must be smaller than the image
    crop = v2.RandomCrop(size, padding=padding, padding_mode="reflect")
    return [ResizeToCover(size), crop, v2.RandomHorizontalFlip()]


def _one_of_three(size: tuple[int, int]) -> v2.Transform:
    window = min(13, 2 * min(size) - 1)  # three standard deviations to each side, within the image
    blur = v2.GaussianBlur(window, sigma=(0.1, 2.0))
    return v2.RandomChoice([v2.RandomGrayscale(p=1.0), v2.RandomSolarize(threshold=128, p=1.0), blur])


# AugReg: layers and level of RandAugment, and alpha of mixup. Level 0 changes images, too: see `OPERATIONS`.
AUGREG: dict[str, tuple[int, int, float]] = {
    "augreg_none": (0, 0, 0.0),
    "augreg_light1": (2, 0, 0.0),
    "augreg_light2": (2, 10, 0.2),
    "augreg_medium1": (2, 15, 0.2),
    "augreg_medium2": (2, 15, 0.5),
    "augreg_strong1": (2, 20, 0.5),
    "augreg_strong2": (2, 20, 0.8),
}
AUGREG_MIXUP: dict[str, float] = {name: mixup for name, (_, _, mixup) in AUGREG.items()}


def _augreg(layers: int, level: int) -> Callable[[tuple[int, int], float, list[int]], list[v2.Transform]]:
    return lambda size, crop, fill: [*_crop_flip(size, crop), TensorFlowRandAugment(layers, level, fill)]


# Functions of size (height, width), smallest share of the image in a crop, and fill.
AUGMENTATIONS: dict[str, Callable[[tuple[int, int], float, list[int]], list[v2.Transform]]] = {
    "none": lambda size, crop, fill: [v2.Resize(size)],
    "affine": lambda size, crop, fill: [v2.Resize(size), SmallAffine()],
    "crop_flip": lambda size, crop, fill: _crop_flip(size, crop),
    "trivial": lambda size, crop, fill: [*_crop_flip(size, crop), v2.TrivialAugmentWide()],
    "rand": lambda size, crop, fill: [*_crop_flip(size, crop), v2.RandAugment()],
    "three": lambda size, crop, fill: [
        *_crop_flip(size, crop, interpolation=InterpolationMode.BICUBIC),
        _one_of_three(size),
    ],
    "three_simple": lambda size, crop, fill: [*_simple_crop_flip(size), _one_of_three(size)],
    **{name: _augreg(layers, level) for name, (layers, level, _) in AUGREG.items()},
}


def _crop_flip_with_mask(size: tuple[int, int], crop: float, fill: list[int]) -> list[v2.Transform]:
    """Crop at about the aspect ratio of the output: objects keep about the shapes that they have in evaluation."""
    aspect = size[1] / size[0]
    return _crop_flip(size, crop, ratio=(aspect * 3 / 4, aspect * 4 / 3))


# Those of `AUGMENTATIONS` that move a mask with its image.
WITH_MASKS = {
    **{name: AUGMENTATIONS[name] for name in ("none", "affine", "three", "three_simple")},
    "crop_flip": _crop_flip_with_mask,
}


# Changes of pixel values by the `AUGMENTATIONS` that move boxes with their image, given the size.
WITH_BOXES: dict[str, Callable[[tuple[int, int]], list[v2.Transform]]] = {
    "none": lambda size: [],
    "crop_flip": lambda size: [],
    "three": lambda size: [_one_of_three(size)],
}


class MaskedAugmentation:
    """Augment an image whose last channel is its mask of classes, uint8 `[C + 1, H, W]`."""

    def __init__(self, augmentation: v2.Transform) -> None:
        self.augmentation = augmentation

    def __call__(self, pixels: Tensor) -> Tensor:
        image, mask = self.augmentation(tv_tensors.Image(pixels[:-1]), tv_tensors.Mask(pixels[-1:]))
        return torch.cat([image.as_subclass(Tensor), mask.as_subclass(Tensor)])


WITHOUT_COLORS = ("none", "affine", "crop_flip")  # they work on any number of channels


def build_augmentation(
    name: str,
    size: tuple[int, int],
    smallest_crop: float,
    *,
    color_jitter: float = 0.0,
    erasing: float = 0.0,
    fill: Sequence[float] = (0.5, 0.5, 0.5),
    num_channels: int = 3,
    has_masks: bool = False,
    has_boxes: bool = False,
) -> Callable[[Any], Any]:
    """Return a transform of uint8 images `[C, H, W]` of any size to `[C, *size]`.

    Args:
        name: A key of `AUGMENTATIONS`.
        size: (height, width) in pixels.
        smallest_crop: Smallest share of the image in a random crop; `"three_simple"` ignores it.
        color_jitter: Range around 1 of the factors of brightness, contrast and saturation; 0.3 in DeiT III.
        erasing: Probability of erasing a rectangle, after everything else.
        fill: Values in [0, 1], one per channel or equal ones, for erased rectangles and for AugReg's operations:
            usually the processor's mean, which normalization maps to 0.
        num_channels: C; other numbers than 1 and 3 have no operations on colours.
        has_masks: Whether images have one more channel, a mask of classes, which is moved with the image.
        has_boxes: Whether the transform takes and returns images with objects, `[N, 5]`: see `BoxedAugmentation`.

    Raises:
        ValueError: If the name is unknown, or the augmentation needs images of 1 or 3 channels or cannot move masks.
    """
    if name not in AUGMENTATIONS:
        (near,) = difflib.get_close_matches(name, AUGMENTATIONS, n=1, cutoff=0)
        raise ValueError(
            f"Unknown augmentation {name!r}: choose one of {', '.join(AUGMENTATIONS)}. Did you mean {near!r}?"
        )
    if num_channels not in (1, 3) and (name not in WITHOUT_COLORS or color_jitter):
        raise ValueError(
            f"augmentation={name} with color_jitter={color_jitter} changes colours, but images with {num_channels} "
            f"channels have none: use {', '.join(WITHOUT_COLORS)} with color_jitter=0, and erasing, mixup or cutmix."
        )
    if has_masks and name not in WITH_MASKS:
        raise ValueError(f"augmentation={name} does not move masks with images: use {', '.join(WITH_MASKS)}.")
    if has_boxes and name not in WITH_BOXES:
        raise ValueError(f"augmentation={name} does not move boxes with images: use {', '.join(WITH_BOXES)}.")
    values = [round(255 * value) for value in fill]
    values = values[:1] if len(set(values)) == 1 else values  # a single value fits any number of channels
    if has_boxes:
        transforms = WITH_BOXES[name](size)
    else:
        transforms = (WITH_MASKS if has_masks else AUGMENTATIONS)[name](size, smallest_crop, values)
    if color_jitter:
        transforms.append(v2.ColorJitter(color_jitter, color_jitter, color_jitter))
    if erasing:
        transforms.append(v2.RandomErasing(erasing, value=values))
    if has_boxes:
        crop = None if name == "none" else smallest_crop
        return BoxedAugmentation(size, crop, values, v2.Compose([v2.Identity(), *transforms]))
    return MaskedAugmentation(v2.Compose(transforms)) if has_masks else v2.Compose(transforms)


def one_hot(labels: Tensor, number: int) -> Tensor:
    """Return labels `[B]` as one-hot float32 `[B, number]`; torch's `one_hot` would wait for some accelerators."""
    return (labels.unsqueeze(1) == torch.arange(number, device=labels.device)).float()


class BatchMixer:
    """Mix each image of a batch with another one, and smooth the labels.

    Args:
        num_labels: Number of classes.
        mixup: Alpha of the Beta distribution of mixup; 0 disables it.
        cutmix: Alpha of the Beta distribution of CutMix; 0 disables it. With both, each batch uses either at random.
        label_smoothing: Share of every label that is distributed over all classes; with several labels per image, over
            its presence and absence.
    """

    def __init__(self, num_labels: int, mixup: float = 0.0, cutmix: float = 0.0, label_smoothing: float = 0.0) -> None:
        self.num_labels = num_labels
        self.label_smoothing = label_smoothing
        self.kinds = [(mix, alpha) for mix, alpha in ((mixup_images, mixup), (cutmix_images, cutmix)) if alpha]

    def __call__(self, pixel_values: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return images `[B, C, H, W]` and labels, soft ones `[B, num_labels]` if anything is mixed or smoothed."""
        if not self.kinds and not self.label_smoothing:
            return pixel_values, labels
        if labels.is_floating_point():  # several labels per image; an unknown one, -100, stays unknown
            soft, even = labels.masked_fill(labels == UNKNOWN, math.nan), 0.5
        else:
            soft, even = one_hot(labels, self.num_labels), 1 / self.num_labels
        soft = soft * (1 - self.label_smoothing) + self.label_smoothing * even
        if self.kinds:
            mix, alpha = self.kinds[int(torch.randint(len(self.kinds), (), generator=generator))]
            others = to_device(torch.randperm(len(labels), generator=generator), labels.device)
            pixel_values, share = mix(pixel_values, others, _beta(alpha, generator), generator)
            soft = share * soft + (1 - share) * soft[others]
        return pixel_values, soft.nan_to_num(nan=UNKNOWN) if labels.is_floating_point() else soft


def mixup_images(images: Tensor, others: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, float]:
    """Blend images with those at `others`; return the images and the share of the first."""
    return share * images + (1 - share) * images[others], share


def cutmix_images(images: Tensor, others: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, float]:
    """Paste a box of the images at `others`; return the images and the visible share of the first."""
    height, width = images.shape[-2:]
    centre = torch.rand(2, generator=generator).tolist()
    (top, bottom), (left, right) = _box((height, width), centre, (1 - share) ** 0.5)
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = images[others][..., top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)


def _box(size: Sequence[int], centre: Sequence[float], share: float) -> list[tuple[int, int]]:
    """Return (top, bottom) and (left, right) of a box around `centre`, with `share` of each side, clipped."""
    return [
        (max(0, round(side * (middle - share / 2))), min(side, round(side * (middle + share / 2))))
        for side, middle in zip(size, centre, strict=True)
    ]


def _beta(alpha: float, generator: torch.Generator) -> float:
    """Draw from Beta(alpha, alpha), as a ratio of two draws from Gamma(alpha)."""
    first, second = torch._standard_gamma(torch.full((2,), alpha, dtype=torch.float64), generator=generator).tolist()
    return first / (first + second) if first + second else 0.5
