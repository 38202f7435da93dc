"""Parts of the encoder: patches, mask tokens, attention kernels, MLPs, LayerScale, DropPath."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .configuration_hf_vit import HFViTConfig
from .packing_hf_vit import HFViTPacking


def patchify(pixels: Tensor, patch_shape: tuple[int, int]) -> Tensor:
    """Cut images `[B, C, H, W]` into flattened patches `[B, N, C*ph*pw]`, row by row."""
    patch_height, patch_width = patch_shape
    batch, channels, height, width = pixels.shape
    rows, columns = height // patch_height, width // patch_width
    # Explicit sizes, not `unflatten`: torch.onnx.export(dynamo=False) would fix the batch size to that of its example.
    cut = pixels.reshape(batch, channels, rows, patch_height, columns, patch_width)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * patch_height * patch_width)


def unpatchify(patches: Tensor, patch_shape: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Join flattened patches `[B, N, C*ph*pw]` to images `[B, C, H, W]`."""
    cut = patches.unflatten(2, (-1, *patch_shape)).unflatten(1, grid)  # [B, h, w, C, ph, pw]
    return cut.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


class HFViTMaskToken(nn.Module):
    """Replace every masked patch by a learned token, as in SimMIM (arXiv:2111.09886)."""

    def __init__(self, config: HFViTConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, 1, config.hidden_size))

    def forward(self, patches: Tensor, is_masked: Tensor) -> Tensor:
        return torch.where(is_masked.unsqueeze(-1), self.weight.to(patches.dtype), patches)


class HFViTPaperCorruption(HFViTMaskToken):
    """Replace 80 % of the masked patches by the token and 10 % by another patch, and keep 10 % (appendix B.1.2).

    In evaluation every masked patch is replaced by the token, so that outputs are deterministic.
    """

    def forward(self, patches: Tensor, is_masked: Tensor) -> Tensor:
        masked = super().forward(patches, is_masked)
        if not self.training:
            return masked
        draw = torch.rand(is_masked.shape, device=patches.device).unsqueeze(-1)
        pool = patches.flatten(0, 1)  # [B*N, D]
        others = pool[torch.randint(len(pool), is_masked.shape, device=patches.device)]
        corrupted = torch.where(draw < 0.8, masked, torch.where(draw < 0.9, others, patches))
        return torch.where(is_masked.unsqueeze(-1), corrupted, patches)


class HFViTNoCorruption(nn.Module):
    """Leave masked patches as they are, since the encoder does not see them: a masked autoencoder."""

    def __init__(self, config: HFViTConfig) -> None:
        super().__init__()

    def forward(self, patches: Tensor, is_masked: Tensor) -> Tensor:
        return patches


class HFViTPatchDropout(nn.Module):
    """Keep a random subset of the patches in training (arXiv:2212.00794)."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, patches: Tensor, is_masked: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the remaining patches `[B, K, D]` and their indices `[B, K]`, or all patches and `None`.

        A mask, `[B, N]`, does not change which patches remain here.
        """
        if not self.training or not self.probability:
            return patches, None
        batch, number, _ = patches.shape
        kept = max(1, round(number * (1 - self.probability)))
        indices = torch.rand(batch, number, device=patches.device).argsort(dim=1)[:, :kept]
        return patches.take_along_dim(indices.unsqueeze(-1), dim=1), indices


CORRUPTIONS: dict[str, Any] = {
    "pixels": HFViTMaskToken,
    "mean_color": HFViTPaperCorruption,
    "autoencoder": HFViTNoCorruption,
}


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Compute attention by matrix products, from `[B, A, T, d]` to outputs `[B, T, A, d]`, weights `[B, A, T, T]`."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        mask = attention_mask if attention_mask.ndim == 4 else attention_mask[:, None, None]
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


HAS_AMX = torch.cpu._is_amx_tile_supported()  # matrix units of the CPU, which torch uses for products in bf16
SHORT_SEQUENCE = 1024  # tokens; in longer sequences, the attention weights would take too much memory


class HFViTProductAttention(torch.autograd.Function):
    """Compute attention by matrix products, forward and backward: `[B, A, T, d]` each to `[B, A, T, d]`.

    The weights, B * A * T^2 numbers, are saved for the backward. Autocast is off, since it would convert the input of
    the softmax to float32 and its output back.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.bfloat16)
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        shape = query.shape
        query, key, value = (part.reshape(-1, *shape[2:]) for part in (query, key, value))  # [B*A, T, d]
        weights = scaled_product(query, key.mT, scaling).softmax(dim=-1)  # [B*A, T, T]
        ctx.save_for_backward(query, key, value, weights)
        ctx.shape, ctx.scaling = shape, scaling
        return (weights @ value).view(shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, of_attended: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        query, key, value, weights = ctx.saved_tensors
        of_attended = of_attended.reshape(query.shape)
        of_weights = of_attended @ value.mT
        of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        of_query = scaled_product(of_scores, key, ctx.scaling)
        of_key = scaled_product(of_scores.mT, query, ctx.scaling)
        of_value = weights.mT @ of_attended
        return of_query.view(ctx.shape), of_key.view(ctx.shape), of_value.view(ctx.shape), None


def scaled_product(left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """Multiply `[n, i, j]` by `[n, j, k]` and by a scalar, with one rounding."""
    return torch.baddbmm(left.new_zeros(()), left, right, beta=0, alpha=scaling)


def sdpa_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention by torch's fused kernels, or by matrix products where these are faster.

    On a CPU, the backward of the fused kernel takes a third of a training step in bf16. For short sequences, matrix
    products on matrix units take a small part of that time. In evaluation the fused kernel is faster.
    """
    is_trained = torch.is_grad_enabled() and query.requires_grad
    is_plain = attention_mask is None and not dropout and query.shape[2] <= SHORT_SEQUENCE
    if HAS_AMX and is_trained and is_plain and query.device.type == "cpu" and query.dtype == torch.bfloat16:
        if torch.compiler.is_compiling():  # the compiler derives and fuses the backward
            attended = (query @ key.mT * scaling).softmax(dim=-1).to(value.dtype) @ value
        else:
            attended = HFViTProductAttention.apply(query, key, value, scaling)
    else:
        attended = F.scaled_dot_product_attention(query, key, value, attention_mask, dropout, scale=scaling)
    return attended.transpose(1, 2), None


class HFViTMLP(nn.Module):
    """Two linear layers with an activation between them, GELU in the paper; a LayerNorm may precede the second."""

    def __init__(self, config: HFViTConfig, bias: bool = True, use_layernorm: bool = False) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=bias)
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        norm = nn.LayerNorm if use_layernorm else nn.Identity
        self.layernorm = norm(config.intermediate_size, eps=config.layer_norm_eps)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(self.layernorm(self.dropout(self.hidden_layer(hidden_states))))

    def hidden_layer(self, hidden_states: Tensor) -> Tensor:
        return self.activation(self.fc1(hidden_states))


class HFViTGatedMLP(HFViTMLP):
    """An MLP with a second projection that gates the hidden layer (arXiv:2002.05202); SwiGLU with SiLU."""

    def __init__(self, config: HFViTConfig, bias: bool = True, use_layernorm: bool = False) -> None:
        super().__init__(config, bias, use_layernorm)
        self.gate = nn.Linear(config.hidden_size, config.intermediate_size, bias=bias)

    def hidden_layer(self, hidden_states: Tensor) -> Tensor:
        return self.activation(self.gate(hidden_states)) * self.fc1(hidden_states)


class HFViTLayerScale(nn.Module):
    """Scale every channel of a residual branch by a learned factor (arXiv:2103.17239)."""

    def __init__(self, config: HFViTConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states * self.weight


class HFViTDropPath(nn.Module):
    """Drop a residual branch per sample in training: stochastic depth (arXiv:1603.09382)."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, hidden_states: Tensor, packing: HFViTPacking | None = None) -> Tensor:
        if not self.training or not self.probability:
            return hidden_states
        keep = 1 - self.probability
        samples = len(hidden_states) if packing is None else len(packing.grids)
        kept = hidden_states.new_empty(samples, 1, 1).bernoulli_(keep)
        if packing is not None:
            kept = packing.spread(kept)  # [1, T, 1]
        return hidden_states * kept / keep
