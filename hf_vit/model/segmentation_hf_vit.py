"""Semantic segmentation: a class for every pixel, from the tokens of the patches.

The head is one linear layer on the normalized tokens of one or several layers, as in the linear evaluation of DINOv2
(arXiv:2304.07193), but with several predictions per patch: with `patch_subdivision=4`, patches of 16 pixels have a
prediction for every 4x4 pixels. Bilinear interpolation resizes these to pixels. With `decoder_kernel_size`, a
convolution over neighboring patches is added to the tokens first.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.backbone_utils import filter_output_hidden_states
from transformers.modeling_outputs import SemanticSegmenterOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .configuration_hf_vit import HFViTConfig
from .dense_hf_vit import HFViTDenseClassifier, reject_patch_dropout
from .layers_hf_vit import unpatchify
from .losses_hf_vit import segmentation_loss
from .modeling_hf_vit import HFViTModel, HFViTPreTrainedModel
from .packing_hf_vit import reject_packs

# Config fields of a model with a new head. On CamVid, the mean IoU after 4.5 CPU minutes is 42.0 % (four runs) with it
# and 40.1 % (one run) without it.
NEW_SEGMENTER = {"decoder_kernel_size": 3}


class HFViTPartsClassifier(HFViTDenseClassifier, nn.Linear):
    """Classify the parts of a patch, `[..., num_labels * parts]`."""

    def __init__(self, width: int, num_labels: int, parts: int) -> None:
        super().__init__(width, num_labels * parts)
        self.parts = parts

    def start(self) -> tuple[Tensor, Tensor]:
        """Return the weight, and initial values that are the same for all parts of a patch: those of the first part.

        Different random weights would give each part its own noise. After 1.5 CPU minutes on CamVid, the mean IoU is
        22.2 % with these values and 20.6 % with random ones (one seed).
        """
        of_parts = self.weight.unflatten(0, (-1, self.parts))  # [num_labels, parts, width]
        return self.weight, of_parts[:, :1].expand_as(of_parts).flatten(0, 1)


class HFViTSegmentationHead(nn.Module):
    """Classify the parts of every patch from its tokens in the layers of `config.out_indices`."""

    def __init__(self, config: HFViTConfig) -> None:
        super().__init__()
        width, number, num_labels = config.hidden_size, len(config.out_indices), cast(int, config.num_labels)
        kernel, total = config.decoder_kernel_size, number * width
        self.subdivision = (config.patch_subdivision, config.patch_subdivision)
        self.norms = nn.ModuleList([nn.LayerNorm(width, eps=config.layer_norm_eps) for _ in range(number)])
        self.context = None if kernel == 1 else nn.Conv2d(total, total, kernel, padding=kernel // 2, groups=number)
        self.classifier = HFViTPartsClassifier(total, num_labels, config.patch_subdivision**2)

    def forward(self, layers: list[Tensor], grid: tuple[int, int]) -> Tensor:
        """Return logits `[B, num_labels, h*s, w*s]` for tokens `[B, N, D]` of each layer; s is the subdivision."""
        features = torch.cat([norm(tokens) for norm, tokens in zip(self.norms, layers, strict=True)], dim=-1)
        if self.context is not None:
            context = F.gelu(self.context(features.transpose(1, 2).unflatten(2, grid)))  # [B, D, h, w]
            features = features + context.flatten(2).transpose(1, 2)
        return unpatchify(self.classifier(features), self.subdivision, grid)


class HFViTForSemanticSegmentation(HFViTPreTrainedModel):
    """The encoder with a head that predicts a class for every pixel.

    Example:
        >>> small = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "num_labels": 5}
        >>> config = HFViTConfig(**small, image_size=32, patch_size=8, patch_subdivision=4, out_indices=[1, 2])
        >>> model = HFViTForSemanticSegmentation(config).eval()
        >>> model(torch.rand(2, 3, 40, 24)).logits.shape  # 5x3 patches of 4x4 predictions
        torch.Size([2, 5, 20, 12])
    """

    accepts_loss_kwargs = False  # Trainer would also count ignored pixels

    def __init__(self, config: HFViTConfig) -> None:
        super().__init__(config)
        reject_patch_dropout(self)
        if config.feature_strides is not None:
            raise ValueError(
                "feature_strides belongs to HFViTBackbone, and the head for semantic segmentation reads layers: set "
                "feature_strides=None."
            )
        if cast(int, config.num_labels) < 2:
            raise ValueError(
                f"Semantic segmentation needs at least two classes, got num_labels={config.num_labels}: count the "
                "background as a class."
            )
        self.vit = HFViTModel(config, add_pooling_layer=False)
        self.decode_head = HFViTSegmentationHead(config)
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SemanticSegmenterOutput:
        """Predict the classes of pixels.

        Args:
            pixel_values: `[B, C, H, W]`, as for `HFViTModel`.
            labels: Class indices `[B, H, W]` of any size, `config.semantic_loss_ignore_index` where unknown. If given,
                the loss is computed: the mean cross-entropy of the other pixels, at the size of the labels.
            kwargs: As for `HFViTModel`.

        Returns:
            `logits` `[B, num_labels, h, w]`, with `patch_subdivision` rows and columns per patch, and, with labels,
            `loss`. `post_process_semantic_segmentation` of the image processor turns logits into maps of any size.
        """
        reject_packs(self, kwargs.get("patch_grids"))
        outputs = self.vit(pixel_values, **kwargs)
        layers = [outputs.hidden_states[index] for index in self.config.out_indices]
        patches = [self.vit.layernorm(tokens[:, self.config.num_prefix_tokens :]) for tokens in layers]
        logits = self.decode_head(patches, self.config.grid_of(*pixel_values.shape[-2:]))  # type: ignore[union-attr]
        loss = None
        if labels is not None:
            loss = segmentation_loss(logits, labels, self.config)
        return SemanticSegmenterOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = ["HFViTForSemanticSegmentation"]
