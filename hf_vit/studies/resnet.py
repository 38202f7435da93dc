"""A ResNet to hold a ViT against: BiT (arXiv:1912.11370), as transformers carries it, made to the ViT's measure.

The paper's ResNets are BiT's: GroupNorm for BatchNorm, and weights that are standardized. Beside a ViT with patches of
16 pixels, BiT's four stages go from 4 pixels a place to 32. Here they go from a quarter of a patch to two patches for
patches of any size, and are as wide as the ViT's FLOPs allow.
"""

from math import log2, sqrt
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import BitConfig, BitForImageClassification
from transformers.models.bit.modeling_bit import WeightStandardizedConv2d

from ..evaluation.flops import count_flops
from ..model.image_processing_hf_vit import HFViTImageProcessor
from ..training.recipe import TrainConfig
from ..training.tasks import build_model

STAGES, UNITS = 4, 2  # at most, and bottlenecks of each
BIT_WIDTH, WIDTHS = 64, 8  # of BiT's first bottleneck; transformers rounds widths to multiples of 8


@strict
class SmallBitConfig(BitConfig):
    """Describe a BiT for images of any size.

    Args:
        image_size: (height, width) in pixels.
        stem_stride: Pixels that one place behind the stem covers: 4 as in BiT, 2, or 1.
    """

    image_size: list[int] | tuple[int, ...] = (224, 224)
    stem_stride: int = 4

    @property
    def image_shape(self) -> tuple[int, ...]:
        """`(height, width)` of the image, pixels."""
        return tuple(self.image_size)


class SmallBitForImageClassification(BitForImageClassification):
    """BiT, whose stem reduces small images less."""

    config: SmallBitConfig

    def __init__(self, config: SmallBitConfig) -> None:
        super().__init__(config)
        stem: Any = self.bit.embedder
        if config.stem_stride < 4:
            stem.pooler = nn.Identity()
        if config.stem_stride < 2:
            stem.convolution = WeightStandardizedConv2d(
                config.num_channels, config.embedding_size, kernel_size=3, padding=config.global_padding, eps=1e-8
            )
        self.post_init()


def build_resnet(config: TrainConfig, task: Any) -> tuple[SmallBitForImageClassification, HFViTImageProcessor]:
    """Return a ResNet of about the FLOPs of the ViT that a recipe describes, and the processor of its images."""
    vit, processor = build_model(config, task)
    of_vit, _ = count_flops(vit, type(vit))
    with torch.device("meta"):
        widest = SmallBitForImageClassification(config_beside(vit.config, BIT_WIDTH))
    of_widest, _ = count_flops(widest, type(widest))
    # Nearly all FLOPs go with the square of the width.
    width = WIDTHS * max(1, round(BIT_WIDTH * sqrt(of_vit / of_widest) / WIDTHS))
    return SmallBitForImageClassification(config_beside(vit.config, width, **task.fields)), processor


def config_beside(vit: Any, width: int, **fields: Any) -> SmallBitConfig:
    """Return the config of a ResNet of a width, for the images of a ViT."""
    patch = min(vit.patch_shape)
    stem_stride = next(stride for stride in (4, 2, 1) if stride <= max(1, patch // 4))
    stages = min(STAGES, 1 + int(log2(2 * patch / stem_stride)))
    return SmallBitConfig(
        image_size=vit.image_shape,
        num_channels=vit.num_channels,
        stem_stride=stem_stride,
        embedding_size=width,
        hidden_sizes=[4 * width * 2**stage for stage in range(stages)],
        depths=[UNITS] * stages,
        num_groups=width // 2,  # two channels a group where it is narrowest, as in BiT
        global_padding="SAME",
        embedding_dynamic_padding=True,
        **fields,
    )
