"""Augmentation of a whole batch on its device, with the transforms for single images.

Called with a `PlannedImage`, a transform of torchvision draws the same random numbers as for pixels, but only notes
what it would do: a `Plan`. The plans of a batch are carried out together. Two matrix products resize, crop and flip
all images, and every other operation is computed once for all images whose plans contain it, with a tensor of their
parameters. The host never waits for the device. Pixels differ from those of torchvision by rounding.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tvF

from ..system.transfers import to_device
from .cache import CachedImages

CHUNK = 256 << 20  # bytes of the images that are resized together, as float32


@dataclass
class Plan:
    """What is done to one image, with sizes (height, width) in pixels.

    Attributes:
        position: Position of the image in the cache.
        box: What is cut out of the image: (top, left, height, width).
        resized: Size to which the box is resized, with cubic interpolation if `is_cubic`, else linear.
        start, size: The part of the resized box that is kept. Beyond its border, it is reflected.
        is_flipped: Whether that part is mirrored.
        calls: Name and options of the functions that follow.
    """

    position: int
    box: tuple[int, int, int, int]
    resized: tuple[int, int]
    size: tuple[int, int]
    start: tuple[int, int] = (0, 0)
    is_flipped: bool = False
    is_cubic: bool = False
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    @property
    def is_moved(self) -> bool:
        """Whether pixels are resized, cropped or flipped."""
        return self.resized != self.box[2:] or self.size != self.box[2:] or self.start != (0, 0) or self.is_flipped

    def crop(self, top: int, left: int, height: int, width: int) -> None:
        assert not self.is_flipped and not self.calls
        if self.resized == self.box[2:] == self.size:  # nothing is resized yet
            self.box = (self.box[0] + top, self.box[1] + left, height, width)
            self.resized = (height, width)
        else:
            self.start = (self.start[0] + top, self.start[1] + left)
        self.size = (height, width)

    def resize(self, size: tuple[int, int], interpolation: InterpolationMode) -> None:
        assert self.resized == self.box[2:] == self.size and not self.is_flipped and not self.calls
        self.resized = self.size = size
        self.is_cubic = interpolation == InterpolationMode.BICUBIC

    def pad(self, left: int, top: int, right: int, bottom: int) -> None:
        assert not self.is_flipped and not self.calls
        self.size = (self.size[0] + top + bottom, self.size[1] + left + right)
        self.start = (self.start[0] - top, self.start[1] - left)


class PlannedImage(tv_tensors.Image):
    """Stand-in for an image `[C, H, W]` that records the transforms of torchvision instead of applying them."""

    plan: Plan

    @classmethod
    def of(cls, position: int, shape: Sequence[int]) -> "PlannedImage":
        """Return the image at a position of a cache."""
        channels, height, width = shape
        return cls.planned(Plan(position, (0, 0, height, width), (height, width), (height, width)), channels)

    @classmethod
    def planned(cls, plan: Plan, channels: int) -> "PlannedImage":
        image = torch.empty((), dtype=torch.uint8).expand(channels, *plan.size).as_subclass(cls)
        image.plan = plan
        return image


# --------------------------------------------------------------------------------------- operations of many images

Options = Sequence[dict[str, Any]]  # of each image


def _column(options: Options, name: str, images: Tensor) -> Tensor:
    """Return an option of every image, float32 `[n, 1, 1, 1]` on their device."""
    return to_device(torch.tensor([float(each[name]) for each in options]), images.device).view(-1, 1, 1, 1)


def _to_levels(values: Tensor) -> Tensor:
    return values.round_().clamp_(0, 255).to(torch.uint8)


def _gray(images: Tensor) -> Tensor:
    return tvF.rgb_to_grayscale(images.float()).floor_() if images.shape[1] == 3 else images.float()


def _blend(images: Tensor, others: Tensor, share: Tensor) -> Tensor:
    """Return `share` of the images and the rest of others, rounded down as torchvision does."""
    return (images * share + others * (1 - share)).clamp_(0, 255).to(torch.uint8)


def _brightness(images: Tensor, options: Options) -> Tensor:
    return _blend(images, images.new_zeros((), dtype=torch.float32), _column(options, "brightness_factor", images))


def _saturation(images: Tensor, options: Options) -> Tensor:
    if images.shape[1] == 1:
        return images
    return _blend(images, _gray(images), _column(options, "saturation_factor", images))


def _contrast(images: Tensor, options: Options) -> Tensor:
    means = _gray(images).mean(dim=(1, 2, 3), keepdim=True)
    return _blend(images, means, _column(options, "contrast_factor", images))


def _sharpness(images: Tensor, options: Options) -> Tensor:
    if min(images.shape[-2:]) <= 2:
        return images
    values = images.float()
    # The mean of a pixel with weight 5 and its eight neighbours; the border stays as it is.
    smooth = (9 * F.avg_pool2d(values, 3, stride=1) + 4 * values[..., 1:-1, 1:-1]).div_(13).round_()
    others = values.clone()
    others[..., 1:-1, 1:-1] = smooth
    return _blend(images, others, _column(options, "sharpness_factor", images))


def _posterize(images: Tensor, options: Options) -> Tensor:
    kept = 2.0 ** (8 - _column(options, "bits", images))
    return (images.float() / kept).floor_().mul_(kept).to(torch.uint8)


def _solarize(images: Tensor, options: Options) -> Tensor:
    return torch.where(images >= _column(options, "threshold", images), 255 - images, images)


def _solarize_add(images: Tensor, options: Options) -> Tensor:
    brighter = (images + _column(options, "addition", images)).clamp_(max=255).to(torch.uint8)
    return torch.where(images < 128, brighter, images)


def _blur(images: Tensor, options: Options) -> Tensor:
    size = options[0]["kernel_size"][0]
    sigma = to_device(torch.tensor([each["sigma"][0] for each in options]), images.device)
    limit = (size - 1) / (2 * math.sqrt(2))
    steps = torch.linspace(-limit, limit, size, device=images.device)
    kernels = (-(steps / sigma.unsqueeze(1)).square()).softmax(dim=1)  # [n, k]
    number, channels, height, width = images.shape
    kernels = kernels.repeat_interleave(channels, dim=0, output_size=number * channels).unsqueeze(1)  # [n*C, 1, k]
    values = F.pad(images.float(), [size // 2] * 4, mode="reflect").flatten(0, 1).unsqueeze(0)  # [1, n*C, H, W]
    values = F.conv2d(values, kernels.unsqueeze(2), groups=number * channels)
    values = F.conv2d(values, kernels.unsqueeze(3), groups=number * channels)
    return _to_levels(values).view(number, channels, height, width)


def _erase(images: Tensor, options: Options) -> Tensor:
    top, left, height, width = (_column(options, name, images) for name in "ijhw")
    rows, columns = (torch.arange(size, device=images.device) for size in images.shape[-2:])
    is_erased = ((rows >= top[..., 0]) & (rows < (top + height)[..., 0])).unsqueeze(-1)
    is_erased = is_erased & ((columns >= left) & (columns < left + width))
    values = to_device(torch.tensor([each["v"] for each in options], dtype=torch.uint8), images.device)
    return torch.where(is_erased, values.view(len(options), -1, 1, 1), images)


def _affine(images: Tensor, options: Options) -> Tensor:
    height, width = images.shape[-2:]
    matrices = to_device(torch.tensor([_sources(each, height, width) for each in options]), images.device)
    of_x, of_y, shift = matrices.view(-1, 1, 1, 2, 3).unbind(-1)  # [n, 1, 1, 2]
    x, y = (torch.arange(size, device=images.device) - (size - 1) / 2 for size in (width, height))  # from the centre
    # Not as a matrix product, which a GPU may compute with ten bits.
    grid = of_x * x.view(-1, 1) + of_y * y.view(-1, 1, 1) + shift  # [n, H, W, 2]
    mode, fill = InterpolationMode(options[0]["interpolation"]).value, options[0]["fill"]
    values = images.float()
    if fill is not None:  # outside of the image
        fill = fill if isinstance(fill, list | tuple) else [fill]
        color = torch.stack([images.new_full((), value, dtype=torch.float32) for value in fill]).view(-1, 1, 1)
        values = values - color
    values = F.grid_sample(values, grid, mode=mode, padding_mode="zeros", align_corners=False)
    return _to_levels(values if fill is None else values + color)


def _sources(options: dict[str, Any], height: int, width: int) -> list[list[float]]:
    """Return the matrix `[2, 3]` from a point, in pixels from the centre, to its source, in halves of the image."""
    angle = -options["angle"] if "scale" not in options else options["angle"]  # `rotate` turns the other way
    turn = math.radians(angle)
    across, down = options.get("translate", (0, 0))
    shear = options.get("shear", (0, 0))
    shear_x, shear_y = math.radians(shear[0]), math.radians(shear[-1])  # torchvision takes one value for both
    scale = options.get("scale", 1.0)
    centre = options.get("center")
    centre_x, centre_y = (0.0, 0.0) if centre is None else (centre[0] - width / 2, centre[1] - height / 2)
    # Rotation @ shear in y @ shear in x, of determinant 1.
    a, c = (function(turn - shear_y) / math.cos(shear_y) for function in (math.cos, math.sin))
    b = -a * math.tan(shear_x) - math.sin(turn)
    d = -c * math.tan(shear_x) + math.cos(turn)
    inverse = [[d / scale, -b / scale], [-c / scale, a / scale]]
    moved_x, moved_y = centre_x + across, centre_y + down
    return [
        [x / half, y / half, (centre - x * moved_x - y * moved_y) / half]
        for (x, y), centre, half in zip(inverse, (centre_x, centre_y), (width / 2, height / 2), strict=True)
    ]


def _once(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Options], Tensor]:
    """Return torchvision's own function of a batch, for one without options."""
    return lambda images, options: function(images)


def solarize_add(image: Tensor, addition: int) -> Tensor:
    """Add to the pixels below 128; AugReg's operation, which torchvision does not have."""
    if isinstance(image, PlannedImage):
        return _noted("solarize_add", image, addition=addition)
    return torch.where(image < 128, (image.int() + addition).clamp(max=255).to(image.dtype), image)


OPERATIONS: dict[str, Callable[[Tensor, Options], Tensor]] = {
    "adjust_brightness": _brightness,
    "adjust_saturation": _saturation,
    "adjust_contrast": _contrast,
    "adjust_sharpness": _sharpness,
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "gaussian_blur": _blur,
    "erase": _erase,
    "affine": _affine,
    "rotate": _affine,
    "autocontrast": _once(tvF.autocontrast),
    "equalize": _once(tvF.equalize),
    "invert": _once(tvF.invert),
    "rgb_to_grayscale": lambda images, options: tvF.rgb_to_grayscale(images, options[0]["num_output_channels"]),
}


# ------------------------------------------------------------------------------------------------- noting a plan


def _noted(name: str, image: PlannedImage, **options: Any) -> PlannedImage:
    image.plan.calls.append((name, options))
    return image


def _noting(function: Callable[..., Any]) -> Callable[..., PlannedImage]:
    """Return what a function of torchvision does with a `PlannedImage`: note the call."""
    signature = inspect.signature(function)

    def note(image: PlannedImage, *args: Any, **kwargs: Any) -> PlannedImage:
        call = signature.bind(image, *args, **kwargs)
        call.apply_defaults()
        _, *options = call.arguments.items()
        # No tensors: each would take a file handle on its way from a data loader process.
        plain = {name: value.flatten().tolist() if isinstance(value, Tensor) else value for name, value in options}
        return _noted(function.__name__, image, **plain)

    return note


def _moving(move: Callable[..., None]) -> Callable[..., PlannedImage]:
    """Return what a function of torchvision does with a `PlannedImage`: change what is kept of it, and where."""

    def moved(image: PlannedImage, *args: Any, **kwargs: Any) -> PlannedImage:
        move(image.plan, *args, **kwargs)
        return PlannedImage.planned(image.plan, image.shape[0])

    return moved


def _resize(plan: Plan, size: Sequence[int], interpolation: InterpolationMode, **options: Any) -> None:
    plan.resize((size[0], size[1]), interpolation)


def _resized_crop(
    plan: Plan, top: int, left: int, height: int, width: int, size: Sequence[int], interpolation: Any, **options: Any
) -> None:
    plan.crop(top, left, height, width)
    plan.resize((size[0], size[1]), interpolation)


def _pad(plan: Plan, padding: Sequence[int], fill: Any = None, padding_mode: str = "constant") -> None:
    assert padding_mode == "reflect"
    plan.pad(*padding)


def _flip(plan: Plan) -> None:
    assert not plan.calls
    plan.is_flipped = not plan.is_flipped


MOVES: dict[Callable[..., Any], Callable[..., None]] = {
    tvF.resize: _resize,
    tvF.resized_crop: _resized_crop,
    tvF.crop: Plan.crop,
    tvF.pad: _pad,
    tvF.horizontal_flip: _flip,
}
for function, move in MOVES.items():
    tvF.register_kernel(function, PlannedImage)(_moving(move))
for name in OPERATIONS:
    if hasattr(tvF, name):
        tvF.register_kernel(name, PlannedImage)(_noting(getattr(tvF, name)))


# -------------------------------------------------------------------------------------------- carrying plans out


class PlannedImages:
    """The images of a cache, without their pixels: what data loader processes need to plan."""

    def __init__(self, cached: CachedImages) -> None:
        self.shapes = cached.shapes

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, index: int) -> PlannedImage | None:
        channels, height, width = self.shapes[index].tolist()
        return PlannedImage.of(index, (channels, height, width)) if channels else None


def carry_out(plans: Sequence[Plan], images: Sequence[Tensor]) -> Tensor:
    """Return augmented images, `[n, C, *size]` on their device.

    Args:
        plans: Of every image; all lead to the same size.
        images: uint8 `[C, H, W]` each, or of any dtype if the plans do nothing.
    """
    number = max(1, CHUNK // (4 * max(image.numel() for image in images)))
    parts = [slice(at, at + number) for at in range(0, len(plans), number)]
    batch = torch.cat([_moved(plans[part], images[part]) for part in parts])
    for turn in range(max(len(plan.calls) for plan in plans)):
        rows_of: dict[str, list[int]] = {}
        for row, plan in enumerate(plans):
            if turn < len(plan.calls):
                rows_of.setdefault(plan.calls[turn][0], []).append(row)
        for name, rows in rows_of.items():
            options = [plans[row].calls[turn][1] for row in rows]
            index = to_device(torch.tensor(rows), batch.device)
            batch.index_copy_(0, index, OPERATIONS[name](batch.index_select(0, index), options))
    return batch


def _moved(plans: Sequence[Plan], images: Sequence[Tensor]) -> Tensor:
    """Resize, crop and flip images."""
    is_alike = len({image.shape for image in images}) == 1
    if is_alike:
        pixels = torch.stack(list(images))
        if not any(plan.is_moved for plan in plans):
            return pixels
        pixels = pixels.float()
    else:
        largest = [max(sides) for sides in zip(*(image.shape for image in images), strict=True)]
        pixels = torch.zeros(len(images), *largest, device=images[0].device)
        for row, image in enumerate(images):
            pixels[row, :, : image.shape[1], : image.shape[2]] = image
    fields = [(*plan.box, *plan.resized, *plan.start, plan.is_flipped, plan.is_cubic) for plan in plans]
    columns = to_device(torch.tensor(fields, dtype=torch.float32), pixels.device).view(len(plans), -1, 1, 1).unbind(1)
    top, left, rows, cols, to_rows, to_cols, down, across, is_flipped, is_cubic = columns  # [n, 1, 1] each
    height, width = plans[0].size
    of_rows = _weights(top, rows, to_rows, down, torch.zeros_like(top), is_cubic, height, pixels.shape[2])
    of_cols = _weights(left, cols, to_cols, across, is_flipped, is_cubic, width, pixels.shape[3])
    return _to_levels(of_rows.unsqueeze(1) @ pixels @ of_cols.mT.unsqueeze(1))


def _weights(
    low: Tensor,
    length: Tensor,
    resized: Tensor,
    start: Tensor,
    is_flipped: Tensor,
    is_cubic: Tensor,
    size: int,
    source_size: int,
) -> Tensor:
    """Return the weights of source pixels in the pixels of a result along one side, `[n, size, source_size]`.

    They are those of antialiased interpolation in torch, linear or cubic. Arguments are fields of plans `[n, 1, 1]`.
    """
    index = torch.arange(size, device=low.device).view(1, -1, 1)
    position = (start + torch.where(is_flipped > 0, size - 1 - index, index)).abs()  # in the resized image
    position = resized - 1 - (resized - 1 - position).abs()
    source = torch.arange(source_size, device=low.device) + 0.5
    scale = length / resized
    distance = ((source - low - scale * (position + 0.5)) / scale.clamp(min=1)).abs()  # [n, size, source_size]
    inner = (1.5 * distance - 2.5) * distance.square() + 1
    outer = ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
    cubic = torch.where(distance < 1, inner, torch.where(distance < 2, outer, 0.0))
    weights = torch.where(is_cubic > 0, cubic, (1 - distance).clamp(min=0))
    weights = weights * ((source > low) & (source < low + length))
    return weights / weights.sum(dim=-1, keepdim=True)
