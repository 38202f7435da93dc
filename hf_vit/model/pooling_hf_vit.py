"""Pooling of all tokens to one vector per image, equation (4) of the paper, and the classifier of that vector.

`POOLINGS` maps the values of `HFViTConfig.pooling` to classes.
"""

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
    """Average the patches, without class and register tokens."""

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
    """Concatenate the class token and the average of the patches, `[B, 2*D]` (DINOv2, arXiv:2304.07193)."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.cat([hidden_states[:, 0], super().forward(hidden_states)], dim=-1)


class HFViTDistillationPooling(HFViTClassTokenPooling):
    """Concatenate the class and the distillation token, `[B, 2*D]` (DeiT, arXiv:2012.12877)."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states[:, :2].flatten(1)


class HFViTAttentionPooling(nn.Module):
    """Attend to all tokens with one learned query (arXiv:2106.04560, big_vision's MAP head)."""

    def __init__(self, config: HFViTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.head_dim = width // config.pooling_heads
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
    """Attend only to the patches with one learned query, as in timm."""

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
    """Reduce tokens `[B, T, D]` to the input of a head, `[B, pooled_width]` or `[B, representation_size]`."""

    def __init__(self, config: HFViTConfig) -> None:
        super().__init__()
        self.pooling = POOLINGS[config.pooling](config)
        width, size = config.pooled_width, config.representation_size
        norm = nn.LayerNorm if config.final_layernorm == "pooled" else nn.Identity
        self.layernorm = norm(width, eps=config.layer_norm_eps)
        # The paper's head for pre-training: one hidden layer with tanh (section 3.1).
        self.pre_logits = nn.Identity() if size is None else nn.Linear(width, size)
        self.activation = nn.Identity() if size is None else nn.Tanh()

    def forward(self, hidden_states: Tensor, packing: HFViTPacking | None = None) -> Tensor:
        if packing is None:
            pooled = self.pooling(hidden_states)
        else:
            pooled = torch.cat([self.pooling(images) for images in packing.split(hidden_states)])
        return self.activation(self.pre_logits(self.layernorm(pooled)))


class HFViTDistilledClassifier(nn.Module):
    """One classifier for the class token and one for the distillation token, averaged logits (arXiv:2012.12877)."""

    def __init__(self, width: int, num_labels: int) -> None:
        super().__init__()
        self.cls = nn.Linear(width // 2, num_labels)
        self.distillation = nn.Linear(width // 2, num_labels)

    def forward(self, pooled: Tensor) -> Tensor:
        cls, distillation = pooled.chunk(2, dim=-1)
        return (self.cls(cls) + self.distillation(distillation)) / 2


def classifier_of(config: HFViTConfig) -> nn.Module:
    """Return the layer that maps the pooled output to logits."""
    if not config.num_labels:
        return nn.Identity()
    classifier = HFViTDistilledClassifier if config.pooling == "cls_and_distillation" else nn.Linear
    return classifier(config.representation_size or config.pooled_width, config.num_labels)
