"""Models with an output per patch: masked image modeling and the backbone."""

from dataclasses import dataclass
from math import prod
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_outputs import BackboneOutput, MaskedImageModelingOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .autoencoder_hf_vit import HFViTVisiblePatches, MaskedAutoencoder
from .configuration_hf_vit import HFViTConfig
from .layers_hf_vit import patchify, unpatchify
from .modeling_hf_vit import HFViTModel, HFViTPreTrainedModel
from .packing_hf_vit import reject_packs
from .pyramid_hf_vit import HFViTPyramid, map_of_patches, pyramid_channels


class HFViTDenseClassifier(nn.Module):
    """Mixin for a torch layer that serves as a classifier; one of its parameters has initial values of its own."""

    weight: Any  # parameters, whose annotations differ between torch's layers
    bias: Any

    def start(self) -> tuple[Tensor, Tensor]:
        """Return a parameter and its initial values, which may be derived from its random values."""
        raise NotImplementedError

    def init_own_weights(self) -> None:
        """Set the initial values, unless they were loaded from a checkpoint."""
        init.copy_(*self.start())

    @torch.no_grad()
    def reset(self, std: float) -> None:
        """Reinitialize the weights for other classes."""
        nn.init.normal_(self.weight, std=std)
        nn.init.zeros_(self.bias)
        parameter, values = self.start()
        parameter.copy_(values)


@dataclass
class HFViTMaskedImageModelingOutput(MaskedImageModelingOutput):
    """Output of `HFViTForMaskedImageModeling`.

    Attributes:
        reconstruction: Image `[B, C, H, W]` of the predicted pixels, or of the most likely mean color per patch.
        predictions: Input of the loss: pixels `[B, N, C*ph*pw]`, normalized within each patch for an autoencoder, or
            logits of the colors `[B, N, 8**C]`.
    """

    predictions: torch.FloatTensor | None = None


class PatchObjective(nn.Module):
    """Base class of objectives that predict from the token of each patch."""

    decoder: nn.Linear
    patch_shape: tuple[int, int]

    def predict(self, tokens: Tensor, is_masked: Tensor | None, grid: tuple[int, int]) -> Tensor:
        """Return the predictions of all patches `[B, N, ...]`, from the encoder's output `[B, P+N, D]`."""
        return self.decoder(tokens[:, -prod(grid) :])


class PixelObjective(PatchObjective):
    """Predict the pixels of masked patches; L1 loss (SimMIM, arXiv:2111.09886)."""

    def __init__(self, config: HFViTConfig) -> None:
        super().__init__()
        self.patch_shape = config.patch_shape
        self.decoder = nn.Linear(config.hidden_size, config.num_channels * prod(self.patch_shape))

    def loss(self, predictions: Tensor, pixel_values: Tensor) -> Tensor:
        """Return the loss per patch, `[B, N]`."""
        return (predictions.float() - patchify(pixel_values.float(), self.patch_shape)).abs().mean(dim=-1)

    def paint(self, predictions: Tensor, grid: tuple[int, int], pixel_values: Tensor | None = None) -> Tensor:
        """Return the predicted image `[B, C, H, W]`."""
        return unpatchify(predictions, self.patch_shape, grid)


class MeanColorObjective(PatchObjective):
    """Predict the mean color of masked patches, 3 bits per channel; cross-entropy (the paper's appendix B.1.2).

    Pixels are expected in [-1, 1], as in the paper (`image_mean` and `image_std` of 0.5).
    """

    LEVELS = 8

    def __init__(self, config: HFViTConfig) -> None:
        super().__init__()
        self.patch_shape = config.patch_shape
        self.num_channels = config.num_channels
        self.decoder = nn.Linear(config.hidden_size, self.LEVELS**config.num_channels)

    def loss(self, predictions: Tensor, pixel_values: Tensor) -> Tensor:
        """Return the loss per patch, `[B, N]`."""
        return F.cross_entropy(predictions.float().transpose(1, 2), self.colors(pixel_values), reduction="none")

    def colors(self, pixel_values: Tensor) -> Tensor:
        """Return the index of each patch's mean color, `[B, N]` in 0 to 8**C - 1, first channel most significant."""
        patches = patchify(pixel_values.float(), self.patch_shape).unflatten(2, (self.num_channels, -1))
        levels = ((patches.mean(dim=-1) + 1) / 2 * self.LEVELS).long().clamp(0, self.LEVELS - 1)  # [B, N, C]
        return (levels * self._place_values(levels.device)).sum(dim=-1)

    def paint(self, predictions: Tensor, grid: tuple[int, int], pixel_values: Tensor | None = None) -> Tensor:
        """Return the predicted image `[B, C, H, W]`."""
        place_values = self._place_values(predictions.device)
        levels = predictions.argmax(dim=-1, keepdim=True) // place_values % self.LEVELS  # [B, N, C]
        colors = (levels.to(predictions.dtype) + 0.5) / self.LEVELS * 2 - 1
        return unpatchify(colors.repeat_interleave(prod(self.patch_shape), dim=-1), self.patch_shape, grid)

    def _place_values(self, device: torch.device) -> Tensor:
        return self.LEVELS ** torch.arange(self.num_channels - 1, -1, -1, device=device)


OBJECTIVES: dict[str, Any] = {
    "pixels": PixelObjective,
    "mean_color": MeanColorObjective,
    "autoencoder": MaskedAutoencoder,
}


def reject_patch_dropout(model: PreTrainedModel) -> None:
    """Raise `ValueError` if a model with an output per patch would drop patches."""
    if model.config.patch_dropout_prob:
        raise ValueError(
            f"{type(model).__name__} has an output per patch, and cannot drop patches: set patch_dropout_prob=0, got "
            f"{model.config.patch_dropout_prob}."
        )


class HFViTForMaskedImageModeling(HFViTPreTrainedModel):
    """The encoder with a decoder that predicts masked patches; `config.mim_objective` selects what is predicted."""

    def __init__(self, config: HFViTConfig) -> None:
        super().__init__(config)
        reject_patch_dropout(self)
        self.vit = HFViTModel(config, add_pooling_layer=False, use_mask_token=True)
        if config.mim_objective == "autoencoder":
            self.vit.embeddings.patch_dropout = HFViTVisiblePatches()
        self.objective = OBJECTIVES[config.mim_objective](config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> HFViTMaskedImageModelingOutput:
        """Predict masked patches.

        Args:
            pixel_values: `[B, C, H, W]`, as for `HFViTModel`.
            bool_masked_pos: `[B, N]`, true where a patch is masked. If given, the loss over these patches is computed.
                An autoencoder needs the same number of masked patches in every image.
            kwargs: As for `HFViTModel`.
        """
        reject_packs(self, kwargs.get("patch_grids"))
        outputs = self.vit(pixel_values, bool_masked_pos=bool_masked_pos, **kwargs)
        pixel_values = cast(Tensor, pixel_values)
        grid = self.config.grid_of(*pixel_values.shape[-2:])
        predictions = self.objective.predict(outputs.last_hidden_state, bool_masked_pos, grid)
        loss = None
        if bool_masked_pos is not None:
            is_masked = bool_masked_pos.flatten(1).float()
            losses = self.objective.loss(predictions, pixel_values)
            loss = (losses * is_masked).sum() / is_masked.sum().clamp(min=1)
        return HFViTMaskedImageModelingOutput(
            loss=loss,
            reconstruction=self.objective.paint(predictions, grid, pixel_values),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            predictions=predictions,
        )


class HFViTBackbone(BackboneMixin, HFViTPreTrainedModel):  # type: ignore[misc]
    """The encoder as a backbone of segmentation and detection models.

    With `config.feature_strides`, the stages are the levels of a feature pyramid on the last layer, not the layers.
    """

    def __init__(self, config: HFViTConfig) -> None:
        super().__init__(config)
        reject_patch_dropout(self)
        channels = config.hidden_size if config.feature_strides is None else pyramid_channels(config)
        self.num_features = [channels] * len(config.stage_names)
        self.vit = HFViTModel(config, add_pooling_layer=False)
        self.pyramid = None if config.feature_strides is None else HFViTPyramid(config)
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: Tensor, **kwargs: Unpack[TransformersKwargs]) -> BackboneOutput:
        """Compute the feature maps of the stages in `config.out_features`.

        Args:
            pixel_values: `[B, C, H, W]`, as for `HFViTModel`.

        Returns:
            `feature_maps`, `[B, D, h, w]` each; tokens `[B, T, D]` with `reshape_hidden_states=False`. With
            `feature_strides`, the height and width of each are those of the image divided by its stride, rounded up.
        """
        reject_packs(self, kwargs.get("patch_grids"))
        outputs = self.vit(pixel_values, **kwargs)
        grid = self.config.grid_of(*pixel_values.shape[-2:])
        feature_maps = []
        for stage in self.out_features:
            layer = self.stage_names.index(stage) if self.pyramid is None else -1
            features = outputs.hidden_states[layer]
            if self.config.apply_layernorm:
                features = self.vit.layernorm(features)
            if self.config.reshape_hidden_states:
                features = map_of_patches(features, self.config, grid)
            feature_maps.append(features if self.pyramid is None else self.pyramid[stage](features))
        return BackboneOutput(
            feature_maps=tuple(feature_maps), hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
