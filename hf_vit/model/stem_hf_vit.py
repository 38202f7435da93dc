"""The ResNet of the paper's hybrid models (section 3.1): BiT (arXiv:1912.11370) without its last stages.

Padding, epsilons and the order of layers are those of the paper's code, google-research/vision_transformer
vit_jax/models_resnet.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_hf_vit import HFViTConfig


class HFViTStandardizedConv(nn.Conv2d):
    """Convolve with weights of mean 0 and variance 1 (arXiv:1903.10520), padded as TensorFlow's "SAME" does."""

    EPS = 1e-5  # added to the standard deviation, as in the paper's code

    def __init__(self, channels: int, out_channels: int, kernel_size: int = 1, stride: int = 1) -> None:
        super().__init__(channels, out_channels, kernel_size, stride, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        deviation, mean = torch.std_mean(self.weight, dim=(1, 2, 3), keepdim=True, correction=0)
        weight = (self.weight - mean) / (deviation + self.EPS)
        pixels = pad_same(pixels, self.kernel_size[0], self.stride[0])
        return F.conv2d(pixels, weight, stride=self.stride)


def pad_same(pixels: Tensor, kernel_size: int, stride: int, value: float = 0.0) -> Tensor:
    """Pad `[B, C, H, W]` so that the output has ceil(H / stride) rows; an odd pixel is added at the end."""
    height, width = (max((-(-size // stride) - 1) * stride + kernel_size - size, 0) for size in pixels.shape[-2:])
    return F.pad(pixels, (width // 2, width - width // 2, height // 2, height - height // 2), value=value)


class HFViTStemUnit(nn.Module):
    """A bottleneck unit: three convolutions and a shortcut, which is projected where the shape changes."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out_channels = 4 * width
        is_projected = channels != out_channels or stride != 1
        self.conv1, self.norm1 = HFViTStandardizedConv(channels, width), group_norm(width)
        self.conv2, self.norm2 = HFViTStandardizedConv(width, width, 3, stride), group_norm(width)
        self.conv3, self.norm3 = HFViTStandardizedConv(width, out_channels), group_norm(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if is_projected:
            convolution = HFViTStandardizedConv(channels, out_channels, stride=stride)
            self.shortcut = nn.Sequential(convolution, group_norm(out_channels))

    def forward(self, pixels: Tensor) -> Tensor:
        transformed = F.relu(self.norm1(self.conv1(pixels)))
        transformed = F.relu(self.norm2(self.conv2(transformed)))
        return F.relu(self.shortcut(pixels) + self.norm3(self.conv3(transformed)))


def group_norm(channels: int) -> nn.GroupNorm:
    """Return the normalization layer of the ResNet."""
    return nn.GroupNorm(32, channels, eps=1e-6)


class HFViTStem(nn.Module):
    """The root, which reduces the image by 4, and the stages; each stage after the first reduces it by 2."""

    def __init__(self, config: HFViTConfig) -> None:
        super().__init__()
        channels, width = config.stem_width, config.stem_width
        self.conv = HFViTStandardizedConv(config.num_channels, channels, 7, stride=2)
        self.norm = group_norm(channels)
        stages = []
        for stage, number in enumerate(config.stem_layers or ()):
            units = []
            for unit in range(number):
                units.append(HFViTStemUnit(channels, width, stride=2 if stage and not unit else 1))
                channels = 4 * width
            stages.append(nn.Sequential(*units))
            width *= 2
        self.stages = nn.Sequential(*stages)
        self.out_channels = channels

    def forward(self, pixels: Tensor) -> Tensor:
        pixels = F.relu(self.norm(self.conv(pixels)))
        pixels = F.max_pool2d(pad_same(pixels, 3, 2, value=-torch.inf), 3, stride=2)
        return self.stages(pixels)
