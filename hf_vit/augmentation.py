"""Augmentation of whole batches: images mixed with each other, and labels that say how much of which.

mixup: Zhang et al. 2018 (arXiv:1710.09412). CutMix: Yun et al. 2019 (arXiv:1905.04899).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class BatchMixer:
    """Mix every image of a batch with another, and smooth the labels.

    Args:
        num_labels: Number of classes.
        mixup: Alpha of mixup's Beta distribution; 0 leaves it out.
        cutmix: Alpha of CutMix's; 0 leaves it out. With both, each batch takes one of them by a fair draw.
        label_smoothing: Share of every label that is spread over all classes.
    """

    def __init__(self, num_labels: int, mixup: float = 0.0, cutmix: float = 0.0, label_smoothing: float = 0.0) -> None:
        self.num_labels = num_labels
        self.label_smoothing = label_smoothing
        self.kinds = [(mix, alpha) for mix, alpha in ((mixup_images, mixup), (cutmix_images, cutmix)) if alpha]

    def __call__(self, pixel_values: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return images `[B, C, H, W]` and labels; these are soft, `[B, num_labels]`, if there is anything to do."""
        if not self.kinds and not self.label_smoothing:
            return pixel_values, labels
        soft = F.one_hot(labels, self.num_labels).float()
        soft = soft * (1 - self.label_smoothing) + self.label_smoothing / self.num_labels
        if self.kinds:
            mix, alpha = self.kinds[int(torch.randint(len(self.kinds), (), generator=generator))]
            others = torch.randperm(len(labels), generator=generator).to(labels.device)
            pixel_values, share = mix(pixel_values, others, _beta(alpha, generator), generator)
            soft = share * soft + (1 - share) * soft[others]
        return pixel_values, soft


def mixup_images(images: Tensor, others: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, float]:
    """Blend images with `others` of them; return them and the share of the first."""
    return share * images + (1 - share) * images[others], share


def cutmix_images(images: Tensor, others: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, float]:
    """Paste a box of `others` into images; return them and the share of the first that is still seen."""
    height, width = images.shape[-2:]
    cut = (1 - share) ** 0.5
    centre = torch.rand(2, generator=generator).tolist()
    (top, bottom), (left, right) = (
        (max(0, round(size * (middle - cut / 2))), min(size, round(size * (middle + cut / 2))))
        for size, middle in zip((height, width), centre, strict=True)
    )
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = images[others][..., top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)


def _beta(alpha: float, generator: torch.Generator) -> float:
    """Draw from Beta(alpha, alpha), by two draws from Gamma(alpha)."""
    first, second = torch._standard_gamma(torch.full((2,), alpha, dtype=torch.float64), generator=generator).tolist()
    return first / (first + second) if first + second else 0.5
