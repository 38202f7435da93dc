"""The simple feature pyramid of ViTDet (arXiv:2203.16527): maps of several strides from only the last layer.

A map is upsampled by deconvolutions or downsampled by max pooling. A 1x1 and a 3x3 convolution follow, each with a
LayerNorm over the channels.
"""

from itertools import pairwise

from torch import Tensor, nn

from .configuration_hf_vit import HFViTConfig

MAX_CHANNELS = 256  # of every map, as in ViTDet; narrower encoders keep their width


def pyramid_channels(config: HFViTConfig) -> int:
    """Return the number of channels of the maps of a pyramid."""
    return min(config.hidden_size, MAX_CHANNELS)


def map_of_patches(tokens: Tensor, config: HFViTConfig, grid: tuple[int, int]) -> Tensor:
    """Return the patches among tokens `[B, T, D]` as a map `[B, D, h, w]`."""
    patches = tokens[:, config.num_prefix_tokens :]
    return patches.transpose(1, 2).unflatten(2, grid).contiguous()


class HFViTChannelLayerNorm(nn.LayerNorm):
    """Normalize every position of a map `[B, C, h, w]` over its channels.

    transformers initializes the weights of classes that have LayerNorm in their names.
    """

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class HFViTPyramidLevel(nn.Sequential):
    """Resample the map of the patches `[B, D, h, w]` to another stride, `[B, pyramid_channels, h', w']`.

    Args:
        config: The architecture.
        doublings: How often the size of the map is doubled, or halved if negative. Odd sizes are rounded up.
    """

    def __init__(self, config: HFViTConfig, doublings: int) -> None:
        eps, channels = config.layer_norm_eps, pyramid_channels(config)
        widths = [max(config.hidden_size >> step, 1) for step in range(max(doublings, 0) + 1)]
        layers: list[nn.Module] = []
        for width, half in pairwise(widths):
            between = [HFViTChannelLayerNorm(width, eps=eps), nn.GELU()] if layers else []
            layers += [*between, nn.ConvTranspose2d(width, half, kernel_size=2, stride=2)]
        if doublings < 0:
            layers.append(nn.MaxPool2d(2**-doublings, ceil_mode=True))
        super().__init__(
            *layers,
            nn.Conv2d(widths[-1], channels, kernel_size=1, bias=False),
            HFViTChannelLayerNorm(channels, eps=eps),
            nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False),
            HFViTChannelLayerNorm(channels, eps=eps),
        )


class HFViTPyramid(nn.ModuleDict):
    """One pyramid level for each stride in `config.feature_strides`, by the names of the stages."""

    def __init__(self, config: HFViTConfig) -> None:
        patch = config.patch_shape[0]
        doublings = [
            (patch // stride).bit_length() - 1 if stride <= patch else 1 - (stride // patch).bit_length()
            for stride in config.feature_strides or ()
        ]
        levels = [HFViTPyramidLevel(config, number) for number in doublings]
        super().__init__(dict(zip(config.stage_names, levels, strict=True)))
