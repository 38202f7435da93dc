"""Masked autoencoder: the encoder sees only the visible patches, and a small decoder predicts the others.

He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022 (arXiv:2111.06377). The decoder reads the
encoded patches, a learned token in place of every masked patch, and fixed positions (section 3). Its targets are
pixels, normalized within each patch by their mean and standard deviation (table 1d).
"""

from math import prod

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask

from .configuration_hf_vit import HFViTConfig
from .layers_hf_vit import HFViTMaskToken, HFViTPatchDropout, patchify, unpatchify
from .modeling_hf_vit import HFViTLayer
from .positions_hf_vit import HFViTSinCos2DPositions

EPSILON = 1e-6  # added to the variance of the pixels of a patch, as in the original code


def visible_patches(is_masked: Tensor) -> Tensor:
    """Return the indices of the visible patches, `[B, K]`, from a mask `[B, N]`.

    Raises:
        ValueError: If images have different numbers of masked patches, or all patches of an image are masked.
    """
    is_visible = ~is_masked.flatten(1).bool()
    counts = is_visible.sum(dim=1).tolist()
    if len({*counts}) > 1 or counts[0] == 0:
        raise ValueError(
            "bool_masked_pos must leave the same number of patches visible in every image of a batch, at least one: "
            f"got {min(counts)} to {max(counts)} of {is_visible.shape[1]}. A lower mask_ratio leaves more."
        )
    return is_visible.nonzero()[:, 1].view(len(counts), -1)


class HFViTVisiblePatches(HFViTPatchDropout):
    """Keep the visible patches, in training and in evaluation."""

    def __init__(self) -> None:
        super().__init__(0.0)

    def forward(self, patches: Tensor, is_masked: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        if is_masked is None:
            return patches, None
        visible = visible_patches(is_masked)
        return patches.take_along_dim(visible.unsqueeze(-1), dim=1), visible


class HFViTDecoderPositions(HFViTSinCos2DPositions):
    """The fixed positions of MAE's code, in which the longest wavelength is below the temperature, not equal to it."""

    def frequencies(self, device: torch.device | None, dtype: torch.dtype) -> Tensor:
        quarter = self.config.hidden_size // 4
        return self.TEMPERATURE ** -(torch.arange(quarter, device=device, dtype=dtype) / quarter)


def config_of_decoder(config: HFViTConfig) -> HFViTConfig:
    """Return the architecture of the decoder's layers."""
    return HFViTConfig(
        hidden_size=config.decoder_hidden_size,
        num_hidden_layers=config.decoder_num_hidden_layers,
        num_attention_heads=config.decoder_num_attention_heads,
        intermediate_size=4 * config.decoder_hidden_size,
        hidden_act=config.hidden_act,
        initializer_range=config.initializer_range,
        layer_norm_eps=config.layer_norm_eps,
        image_size=config.image_shape,
        patch_size=config.patch_shape,
        num_channels=config.num_channels,
        position_embedding_type="sincos_2d",
    )


class MaskedAutoencoder(nn.Module):
    """Predict the normalized pixels of masked patches from the encoded visible ones; mean squared error."""

    def __init__(self, config: HFViTConfig) -> None:
        super().__init__()
        self.encoder_config, self.config = config, config_of_decoder(config)
        self.patch_shape = config.patch_shape
        width, depth = self.config.hidden_size, self.config.num_hidden_layers
        self.projection = nn.Linear(config.hidden_size, width)
        self.mask_token = HFViTMaskToken(self.config)
        self.positions = HFViTDecoderPositions(self.config)
        self.layers = nn.ModuleList([HFViTLayer(self.config, number) for number in range(depth)])
        self.layernorm = nn.LayerNorm(width, eps=self.config.layer_norm_eps)
        self.decoder = nn.Linear(width, config.num_channels * prod(self.patch_shape))

    def predict(self, tokens: Tensor, is_masked: Tensor | None, grid: tuple[int, int]) -> Tensor:
        """Return the normalized pixels of all patches, `[B, N, C*ph*pw]`, from the encoder's output `[B, P+K, D]`."""
        number = self.encoder_config.num_prefix_tokens
        # The attention implementation can be changed after the model is built.
        self.config._attn_implementation = self.encoder_config._attn_implementation
        tokens = self.projection(tokens)
        prefix, patches = tokens[:, :number], tokens[:, number:]  # [B, P, d], [B, K, d]
        if is_masked is not None:
            is_masked = is_masked.flatten(1).bool()
            places = visible_patches(is_masked).unsqueeze(-1).expand(-1, -1, patches.shape[-1])
            patches = patches.new_zeros(*is_masked.shape, patches.shape[-1]).scatter(1, places, patches)
            patches = self.mask_token(patches, is_masked)  # [B, N, d]
        hidden_states = torch.cat([prefix, self.positions(patches, grid)], dim=1)
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=hidden_states, attention_mask=None)
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask)
        return self.decoder(self.layernorm(hidden_states)[:, number:])

    def loss(self, predictions: Tensor, pixel_values: Tensor) -> Tensor:
        """Return the loss per patch, `[B, N]`."""
        mean, std = self._moments(pixel_values)
        targets = (patchify(pixel_values.float(), self.patch_shape) - mean) / std
        return (predictions.float() - targets).square().mean(dim=-1)

    def paint(self, predictions: Tensor, grid: tuple[int, int], pixel_values: Tensor) -> Tensor:
        """Return the predicted image `[B, C, H, W]`, with the mean and deviation of each patch of `pixel_values`."""
        mean, std = self._moments(pixel_values)
        return unpatchify((predictions * std + mean).to(predictions.dtype), self.patch_shape, grid)

    def _moments(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the values of each patch, float32 `[B, N, 1]`."""
        patches = patchify(pixel_values.float(), self.patch_shape)
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        return mean, (variance + EPSILON).sqrt()
