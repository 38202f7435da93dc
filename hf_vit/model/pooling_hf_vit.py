"""Pooling: from all tokens to one vector per image."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_hf_vit import HFViTConfig
from .layers_hf_vit import HFViTMLP
from .packing_hf_vit import HFViTPacking


class HFViTClassTokenPooling(nn.Module):
    """Read the class token, equation (4)."""

    def __init__(self, config: HFViTConfig) -> None:
        super().__init__()

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states[:, 0]


class HFViTMeanPooling(nn.Module):
    """Average the patches; class and register tokens are left out."""

    def __init__(self, config: HFViTConfig) -> None:
        super().__init__()
        self.num_prefix_tokens = config.num_prefix_tokens

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states[:, self.num_prefix_tokens :].mean(dim=1)


class HFViTMeanOfAllPooling(HFViTClassTokenPooling):
    """Average all tokens."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states.mean(dim=1)


class HFViTClassTokenAndMeanPooling(HFViTMeanPooling):
    """Put the class token and the average of the patches one behind the other, `[B, 2*D]` (arXiv:2304.07193)."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.cat([hidden_states[:, 0], super().forward(hidden_states)], dim=-1)


class HFViTDistillationPooling(HFViTClassTokenPooling):
    """Put the class and the distillation token one behind the other, `[B, 2*D]` (arXiv:2012.12877)."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states[:, :2].flatten(1)


class HFViTAttentionPooling(nn.Module):
    """Let one learned query attend to all tokens (arXiv:2106.04560, big_vision's MAP head)."""

    def __init__(self, config: HFViTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.head_dim = width // config.num_attention_heads
        self.probe = nn.Parameter(torch.empty(1, 1, width))
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)  # rows ordered (head, k/v, head_dim)
        self.o_proj = nn.Linear(width, width)
        self.layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = HFViTMLP(config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        query = self.query(self.probe).expand(hidden_states.shape[0], -1, -1).unflatten(-1, (-1, self.head_dim))
        key, value = self.key_value(hidden_states).unflatten(-1, (-1, 2, self.head_dim)).transpose(1, 2).unbind(3)
        attended = F.scaled_dot_product_attention(query.transpose(1, 2), key, value)  # [B, A, 1, d]
        pooled = self.o_proj(attended.transpose(1, 2).flatten(2))
        return (pooled + self.mlp(self.layernorm(pooled))).squeeze(1)


class HFViTPatchAttentionPooling(HFViTAttentionPooling):
    """Let one learned query attend to the patches alone, as timm has it."""

    def __init__(self, config: HFViTConfig) -> None:
        super().__init__(config)
        self.num_prefix_tokens = config.num_prefix_tokens

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states[:, self.num_prefix_tokens :])


POOLINGS: dict[str, type[nn.Module]] = {
    "cls": HFViTClassTokenPooling,
    "mean": HFViTMeanPooling,
    "mean_all": HFViTMeanOfAllPooling,
    "attention": HFViTAttentionPooling,
    "attention_patches": HFViTPatchAttentionPooling,
    "cls_and_mean": HFViTClassTokenAndMeanPooling,
    "cls_and_distillation": HFViTDistillationPooling,
}


class HFViTPooler(nn.Module):
    """Reduce tokens `[B, T, D]` to what the head reads, `[B, pooled_width]` or `[B, representation_size]`."""

    def __init__(self, config: HFViTConfig) -> None:
        super().__init__()
        self.pooling = POOLINGS[config.pooling](config)
        width, size = config.pooled_width, config.representation_size
        norm = nn.LayerNorm if config.final_layernorm == "pooled" else nn.Identity
        self.layernorm = norm(width, eps=config.layer_norm_eps)
        # The paper's head in pre-training: one hidden layer with tanh.
        self.pre_logits = nn.Identity() if size is None else nn.Linear(width, size)
        self.activation = nn.Identity() if size is None else nn.Tanh()

    def forward(self, hidden_states: Tensor, packing: HFViTPacking | None = None) -> Tensor:
        pooled = self.pooling(hidden_states) if packing is None else packing.pool(self.pooling, hidden_states)
        return self.activation(self.pre_logits(self.layernorm(pooled)))
