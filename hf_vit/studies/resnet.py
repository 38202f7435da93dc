"""A ResNet to compare a ViT with: BiT (arXiv:1912.11370) from transformers, scaled to the ViT's FLOPs and patch size.

Like the paper's ResNets, BiT has GroupNorm in place of BatchNorm, and standardized weights. For a ViT with patches of
16 pixels, the strides of BiT's four stages are 4 to 32 pixels. Here they are a quarter of a patch to two patches, for
patches of any size.
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

MAX_STAGES, UNITS = 4, 2  # bottleneck units per stage
BIT_WIDTH, WIDTH_MULTIPLE = 64, 8  # width of BiT's first bottleneck; transformers rounds widths to multiples of 8


@strict
class SmallBitConfig(BitConfig):
    """Configure a BiT for images of any size.

    Args:
        image_size: (height, width) in pixels.
        stem_stride: Stride of the stem in pixels: 4 as in BiT, 2, or 1.
    """

    image_size: list[int] | tuple[int, ...] = (224, 224)
    stem_stride: int = 4

    @property
    def image_shape(self) -> tuple[int, ...]:
        """`(height, width)` of the image, pixels."""
        return tuple(self.image_size)


class SmallBitForImageClassification(BitForImageClassification):
    """BiT with a smaller stride in the stem, for small images."""

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
    """Return a ResNet with about the FLOPs of the ViT that a recipe describes, and its image processor."""
    vit, processor = build_model(config, task)
    of_vit, _ = count_flops(vit, type(vit))
    with torch.device("meta"):
        widest = SmallBitForImageClassification(config_like(vit.config, BIT_WIDTH))
    of_widest, _ = count_flops(widest, type(widest))
    # Nearly all FLOPs grow with the square of the width.
    width = WIDTH_MULTIPLE * max(1, round(BIT_WIDTH * sqrt(of_vit / of_widest) / WIDTH_MULTIPLE))
    return SmallBitForImageClassification(config_like(vit.config, width, **task.fields)), processor


def config_like(vit: Any, width: int, **fields: Any) -> SmallBitConfig:
    """Return the config of a ResNet of a given width for the images of a ViT."""
    patch = min(vit.patch_shape)
    stem_stride = next(stride for stride in (4, 2, 1) if stride <= max(1, patch // 4))
    stages = min(MAX_STAGES, 1 + int(log2(2 * patch / stem_stride)))
    return SmallBitConfig(
        image_size=vit.image_shape,
        num_channels=vit.num_channels,
        stem_stride=stem_stride,
        embedding_size=width,
        hidden_sizes=[4 * width * 2**stage for stage in range(stages)],
        depths=[UNITS] * stages,
        num_groups=width // 2,  # two channels per group at the narrowest place, as in BiT
        global_padding="SAME",
        embedding_dynamic_padding=True,
        **fields,
    )
