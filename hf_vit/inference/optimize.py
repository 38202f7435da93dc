"""Optimize a model for inference: the same outputs up to rounding, faster, without training.

Weights are converted once instead of by autocast at every forward. There are no submodules, hooks and output recorders
around each operation, which take as long as the arithmetic in small models on a CPU. Sums and activations are computed
in place. In bf16 on a CPU, weights are stored in oneDNN's blocked layout (oneDNN, "Understanding Memory Formats"), as
torch's inductor does. FP8 is torchao's, with weights and activations scaled by row.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput

from ..model.detection_hf_vit import HFViTForObjectDetection
from ..model.layers_hf_vit import HFViTGatedMLP, HFViTLayerScale
from ..model.losses_hf_vit import scaled_logits
from ..model.modeling_hf_vit import HFViTForImageClassification, HFViTLayer, HFViTModel
from ..model.multi_task_hf_vit import HFViTForMultiTask
from ..model.positions_hf_vit import rotate
from ..model.segmentation_hf_vit import HFViTForSemanticSegmentation
from ..system.machine import multiplies_in_8_bits, precision_name, resolve_precision

# Dtypes of the weights; for "fp8", of everything except the matrix products.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}

# Activations that torch computes in place, by their name in a config.
IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": torch.ops.aten.gelu_.default,
    "gelu_pytorch_tanh": lambda states: torch.ops.aten.gelu_(states, approximate="tanh"),
    "relu": torch.relu_,
    "silu": torch.ops.aten.silu_.default,
}


class PackedLinear(nn.Module):
    """Linear layer with weights in oneDNN's blocked layout; the matrix product also adds the bias."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        # An opaque tensor without strides, which cannot be saved or moved.
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.bias = None if linear.bias is None else nn.Buffer(linear.bias.detach())

    def forward(self, states: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(states, self.weight, self.bias, "none", [], "")


def linear_kind(device: torch.device, dtype: torch.dtype) -> Callable[[nn.Linear], nn.Module]:
    """Return the class that replaces linear layers. In float32, other layouts of the weights were not faster."""
    is_bf16_cpu = device.type == "cpu" and dtype == torch.bfloat16 and torch.backends.mkldnn.is_available()
    if is_bf16_cpu and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return PackedLinear
    return lambda linear: linear


def _after(norm: nn.Module, projection: nn.Module) -> nn.Module:
    """Return a projection with the LayerNorm before it, if there is one."""
    return projection if isinstance(norm, nn.Identity) else nn.Sequential(norm, projection)


class InferenceLayer(nn.Module):
    """Compute `HFViTLayer` in evaluation mode: equations (2) and (3), with sums in place."""

    def __init__(self, layer: HFViTLayer, kind: Callable[[nn.Linear], nn.Module]) -> None:
        super().__init__()
        attention, mlp = layer.attention, layer.mlp
        self.norms: Any = nn.ModuleList([layer.layernorm_before, layer.layernorm_after])
        self.head_dim, self.scaling = attention.head_dim, attention.scaling
        self.qkv = kind(attention.qkv)
        self.qk_norms: Any = (
            nn.ModuleList([attention.q_norm, attention.k_norm]) if attention.config.use_qk_norm else None
        )
        o_proj = kind(attention.o_proj) if isinstance(attention.o_proj, nn.Linear) else attention.o_proj
        self.o_proj = _after(attention.layernorm, o_proj)
        self.fc1, self.fc2 = kind(mlp.fc1), _after(mlp.layernorm, kind(mlp.fc2))
        self.gate = kind(mlp.gate) if isinstance(mlp, HFViTGatedMLP) else None
        self.activation = IN_PLACE.get(attention.config.hidden_act, mlp.activation)
        scales = [layer.attention_scale, layer.mlp_scale]
        self.scales: Any = nn.ModuleList(scales) if isinstance(scales[0], HFViTLayerScale) else None

    def forward(
        self, hidden_states: Tensor, bias: Tensor | None = None, rotation: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        attended = self.o_proj(self._attend(self._normed(0, hidden_states), bias, rotation))
        hidden_states = self._scaled(0, attended).add_(hidden_states)
        return self._scaled(1, self._transform(self._normed(1, hidden_states))).add_(hidden_states)

    def _normed(self, number: int, states: Tensor) -> Tensor:
        norm = self.norms[number]
        return F.layer_norm(states, norm.normalized_shape, norm.weight, norm.bias, norm.eps)

    def _scaled(self, number: int, states: Tensor) -> Tensor:
        return states if self.scales is None else states.mul_(self.scales[number].weight)

    def _attend(self, states: Tensor, bias: Tensor | None, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        qkv = self.qkv(states).unflatten(-1, (-1, 3, self.head_dim))  # [B, T, A, 3, d]
        query, key, value = qkv.transpose(1, 2).unbind(3)  # [B, A, T, d] each
        if self.qk_norms is not None:
            query, key = self.qk_norms[0](query), self.qk_norms[1](key)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        attended = F.scaled_dot_product_attention(query, key, value, bias, scale=self.scaling)
        return attended.transpose(1, 2).flatten(2)  # [B, T, A*d]

    def _transform(self, states: Tensor) -> Tensor:
        if self.gate is None:
            return self.fc2(self.activation(self.fc1(states)))
        return self.fc2(self.activation(self.gate(states)).mul_(self.fc1(states)))


@dataclass
class InferenceOutput(ImageClassifierOutput):
    """Output of a classifier: `logits` `[B, num_labels]` and their input, `pooler_output` `[B, pooled_width]`."""

    pooler_output: torch.FloatTensor | None = None


class InferenceModel(nn.Module):
    """Compute an encoder or a classifier for inference only; created by `optimize_for_inference`.

    Like the original model, it accepts images of any size that is a multiple of the patch size.
    """

    def __init__(self, model: HFViTModel | HFViTForImageClassification) -> None:
        super().__init__()
        vit: Any = model.base_model
        weight = vit.embeddings.patch_embeddings.projection.weight
        self.dtype = weight.dtype  # packed layers do not show it
        kind = linear_kind(weight.device, weight.dtype)
        self.config = model.config
        self.embeddings, self.pre_layernorm = vit.embeddings, vit.pre_layernorm
        patches = self.embeddings.patch_embeddings
        patches.projection = kind(patches.projection)
        self.layers = nn.ModuleList([InferenceLayer(layer, kind) for layer in vit.layers])
        self.layernorm, self.pooler = vit.layernorm, vit.pooler
        self.classifier: Any = model.classifier if isinstance(model, HFViTForImageClassification) else None

    @property
    def base_model(self) -> "InferenceModel":
        """This model, which has the `pooler`, as in transformers' models."""
        return self

    def forward(self, pixel_values: Tensor) -> InferenceOutput | BaseModelOutputWithPooling:
        """Return a classifier's `logits` and `pooler_output`, or an encoder's `last_hidden_state` and `pooler_output`.

        Args:
            pixel_values: `[B, C, H, W]`.
        """
        hidden_states, positions = self.embeddings(pixel_values.to(self.dtype))
        hidden_states = self.pre_layernorm(hidden_states)
        for number, layer in enumerate(self.layers):
            hidden_states = positions.add_to(hidden_states, number)
            hidden_states = layer(hidden_states, positions.add_to_mask(None, number), positions.rotation)
        hidden_states = self.layernorm(hidden_states)
        pooled = None if self.pooler is None else self.pooler(hidden_states)
        if self.classifier is None:
            return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)
        return InferenceOutput(logits=scaled_logits(self.classifier(pooled), self.config), pooler_output=pooled)


def inference_precision(precision: str) -> str:
    """Return a key of `DTYPES`; `"auto"` is bf16 on hardware with fast bf16, else fp32."""
    return precision_name(resolve_precision("auto")) if precision == "auto" else precision


def optimize_for_inference(model: Any, precision: str = "auto", compile: bool = False) -> Any:
    """Return a faster copy of a model for inference; `model` itself is not changed.

    In float32 the outputs are equal up to the order of summation.

    Args:
        model: An encoder or a classifier, on its device. For a model for segmentation, for detection or with several
            heads, only the precision changes.
        precision: `"fp32"`, `"bf16"`, `"fp16"`, or `"auto"` for bf16 on hardware with fast bf16. `"fp8"` computes the
            linear layers in FP8 and the rest in bf16 (Ada, Hopper and later GPUs; needs torchao). It is worthwhile for
            wide models; `hf-vit evaluate --precision fp8` measures its effect on accuracy.
        compile: Whether to use torch.compile too; on a GPU with CUDA graphs, one per input shape.

    Raises:
        ValueError: If the hardware does not support the precision.

    Example:
        >>> from hf_vit.variants import config_of
        >>> model = HFViTForImageClassification(config_of("ViT-Ti/16", num_labels=10, num_hidden_layers=2))
        >>> optimize_for_inference(model, "fp32")(torch.rand(1, 3, 224, 224)).logits.shape
        torch.Size([1, 10])
    """
    precision = inference_precision(precision)
    copied = deepcopy(model).eval().requires_grad_(False).to(DTYPES[precision])
    if isinstance(model, HFViTForSemanticSegmentation | HFViTForObjectDetection | HFViTForMultiTask):
        if precision == "fp8":
            raise ValueError("fp8 is not available for segmentation, detection and several heads: use bf16.")
        return copied
    optimized = InferenceModel(copied)
    if precision == "fp8":
        multiply_in_8_bits(optimized)
    if compile:
        optimized.compile(mode="max-autotune" if model.device.type == "cuda" else None, dynamic=False)
    return optimized


def multiply_in_8_bits(model: InferenceModel) -> None:
    """Convert the linear layers of the encoder to FP8; embeddings, norms, attention and head are not changed."""
    device = next(model.parameters()).device
    if not multiplies_in_8_bits(device):
        raise ValueError(f"fp8 needs a GPU of compute capability 8.9 or later, the model is on {device}: use bf16.")
    try:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_
    except ImportError:
        raise ValueError("fp8 needs torchao, which is not installed: pip install torchao") from None
    quantize_(model.layers, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
