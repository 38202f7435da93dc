"""Several heads on one encoder: one forward pass computes the outputs of all heads.

A head of `HFViTForMultiTask` consists of the modules that the single-task model has in addition to its encoder.
`model.single(name)` therefore returns that model with shared weights. An anomaly head has no single-task model. It
compares patches with a memory of normal patches (PatchCore, arXiv:2106.08265; with a frozen ViT and cosine distances
as in AnomalyDINO, arXiv:2405.14529).
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
    ModelOutput,
    SemanticSegmenterOutput,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .abstention_hf_vit import certainties, most_shown, with_certainty
from .configuration_hf_vit import HFViTConfig
from .dense_hf_vit import reject_patch_dropout
from .detection_hf_vit import (
    HFViTDetectionHead,
    HFViTForObjectDetection,
    HFViTObjectDetectionOutput,
    logits_of_peaks,
    object_losses,
)
from .heads_hf_vit import checked_heads, config_of_head
from .image_geometry_hf_vit import resize_logits
from .losses_hf_vit import activation_of, classification_loss, scaled_logits, segmentation_loss
from .modeling_hf_vit import HFViTForImageClassification, HFViTModel, HFViTPreTrainedModel
from .packing_hf_vit import reject_packs
from .pooling_hf_vit import HFViTPooler, classifier_of
from .segmentation_hf_vit import HFViTForSemanticSegmentation, HFViTSegmentationHead

SHARE_OF_PATCHES = 0.01  # the score of an image is the mean of this share of largest distances (AnomalyDINO, sec. 3)


class Encoding(NamedTuple):
    """Input of the heads: the encoder's output, normalized patches `[B, N, D]` by stage, and their (rows, columns)."""

    outputs: BaseModelOutputWithPooling
    layers: dict[int, Tensor]
    grid: tuple[int, int]


class HFViTHead(nn.Module):
    """Base class of heads.

    Attributes:
        model_class: Class of the single-task model; `None` if there is none.
        stages: Stages whose patches the head reads; 0 is the stem.
        config: Config of the single-task model.
    """

    model_class: ClassVar[type[HFViTPreTrainedModel] | None] = None

    def __init__(self, config: HFViTConfig, head: dict[str, Any]) -> None:
        super().__init__()
        self.config = config_of_head(config, head)
        self.stages: list[int] = []

    def answer(self, outputs: dict[str, Tensor], processor: Any, size: tuple[int, int], top_k: int | None) -> Any:
        """Return the prediction of the head for one image, without tensors.

        Args:
            outputs: Outputs of `forward` for a batch of one image.
            processor: The image processor.
            size: (height, width) of the upright image.
            top_k: Maximum number of labels or objects; `None` for the head's default.
        """
        raise NotImplementedError


class HFViTImageHead(HFViTHead):
    """Classify images, or predict numbers: pooling and classifier of `HFViTForImageClassification`."""

    model_class = HFViTForImageClassification

    def __init__(self, config: HFViTConfig, head: dict[str, Any]) -> None:
        super().__init__(config, head)
        own = self.config
        is_shared = (own.pooling, own.representation_size) == (config.pooling, config.representation_size)
        self.pooler = None if is_shared else HFViTPooler(own)  # None: use the encoder's pooled output
        self.classifier = classifier_of(own)

    def forward(self, encoding: Encoding, labels: Tensor | None = None) -> ImageClassifierOutput:
        outputs = encoding.outputs
        pooled = outputs.pooler_output if self.pooler is None else self.pooler(outputs.last_hidden_state)
        logits = scaled_logits(self.classifier(pooled), self.config)
        loss = None if labels is None else classification_loss(labels, logits, self.config)
        return ImageClassifierOutput(loss=loss, logits=logits)

    def answer(self, outputs: dict[str, Tensor], processor: Any, size: tuple[int, int], top_k: int | None) -> Any:
        """Return labels and scores in the format of `with_certainty`, or the value of each regression target."""
        logits, names = outputs["logits"][0].float(), cast(dict[int, str], self.config.id2label)
        activation = activation_of(self.config)
        if activation == "none":
            return {names[index]: value for index, value in enumerate(logits.tolist())}
        is_several = activation == "sigmoid"
        scores = logits.sigmoid() if is_several else logits.softmax(dim=-1)
        least = [0.0] * len(names)
        if is_several and top_k is None:
            least = self.config.thresholds or [0.5] * len(names)
        order = scores.argsort(descending=True, stable=True).tolist()
        found = [
            {"label": names[index], "score": scores[index].item()} for index in order if scores[index] > least[index]
        ]
        (certainty,) = certainties(outputs["logits"][:1], self.config)
        number = len(names) if is_several and top_k is None else most_shown(certainty, top_k)
        return with_certainty(found[:number], certainty)


class HFViTPixelHead(HFViTHead):
    """Predict a class for every pixel: the head of `HFViTForSemanticSegmentation`."""

    model_class = HFViTForSemanticSegmentation

    def __init__(self, config: HFViTConfig, head: dict[str, Any]) -> None:
        super().__init__(config, head)
        self.stages = stages_of(self.config)
        self.decode_head = HFViTSegmentationHead(self.config)

    def reset_classifier(self) -> None:
        self.decode_head.classifier.reset(self.config.initializer_range)

    def forward(self, encoding: Encoding, labels: Tensor | None = None) -> SemanticSegmenterOutput:
        logits = self.decode_head([encoding.layers[stage] for stage in self.stages], encoding.grid)
        loss = None if labels is None else segmentation_loss(logits, labels, self.config)
        return SemanticSegmenterOutput(loss=loss, logits=logits)

    def answer(self, outputs: dict[str, Tensor], processor: Any, size: tuple[int, int], top_k: int | None) -> Any:
        """Return a label and a mask of 0 and 255, as large as the image, for every class in it."""
        logits, names = SimpleNamespace(logits=outputs["logits"]), cast(dict[int, str], self.config.id2label)
        (classes,) = processor.post_process_semantic_segmentation(logits, [size])
        found = classes.unique().tolist()
        masks = [Image.fromarray(((classes == index) * 255).byte().numpy(), mode="L") for index in found]
        return [{"label": names[index], "mask": mask} for index, mask in zip(found, masks, strict=True)]


class HFViTObjectHead(HFViTHead):
    """Predict boxes and classes of objects: the head of `HFViTForObjectDetection`."""

    model_class = HFViTForObjectDetection

    def __init__(self, config: HFViTConfig, head: dict[str, Any]) -> None:
        super().__init__(config, head)
        self.stages = [config.num_hidden_layers]
        self.detection_head = HFViTDetectionHead(self.config)

    def reset_classifier(self) -> None:
        self.detection_head.classifier.reset(self.config.initializer_range)

    def forward(self, encoding: Encoding, labels: Any = None) -> HFViTObjectDetectionOutput:
        patches = encoding.layers[self.stages[0]].transpose(1, 2).unflatten(2, encoding.grid)  # [B, D, h, w]
        heatmap, boxes = self.detection_head(patches.contiguous())
        outputs = HFViTObjectDetectionOutput(logits=logits_of_peaks(heatmap), pred_boxes=boxes, heatmap=heatmap)
        if labels is not None:
            outputs["loss"] = object_losses(outputs, labels).mean()
        return outputs

    def answer(self, outputs: dict[str, Tensor], processor: Any, size: tuple[int, int], top_k: int | None) -> Any:
        """Return a label, a score and a box in pixels for every object, the highest score first."""
        limits: dict[str, Any] = {"threshold": self.config.thresholds or 0.5}
        if top_k is not None:
            limits = {"threshold": 0.0, "top_k": top_k}
        (found,) = processor.post_process_object_detection(SimpleNamespace(**outputs), target_sizes=[size], **limits)
        names, sides = cast(dict[int, str], self.config.id2label), ("xmin", "ymin", "xmax", "ymax")
        rows = zip(found["scores"].tolist(), found["labels"].tolist(), found["boxes"].tolist(), strict=True)
        return [
            {"score": score, "label": names[index], "box": dict(zip(sides, box, strict=True))}
            for score, index, box in rows
        ]


@dataclass
class HFViTAnomalyOutput(ModelOutput):
    """Output of a head for anomalies.

    Attributes:
        scores: Mean distance of the most distant patches of an image, in [0, 2], `[B]`.
        anomaly_maps: Distance of every patch, `[B, h, w]`.
    """

    scores: torch.FloatTensor | None = None
    anomaly_maps: torch.FloatTensor | None = None


class HFViTAnomalyHead(HFViTHead):
    """Measure how far patches are from the nearest ones in a memory of normal patches, in cosine distance."""

    def __init__(self, config: HFViTConfig, head: dict[str, Any]) -> None:
        super().__init__(config, head)
        self.stages = stages_of(self.config)
        self.num_neighbors, self.threshold = head["num_neighbors"], head["threshold"]
        size = (head["memory_size"], len(self.stages) * config.hidden_size)
        self.memory = nn.Parameter(torch.empty(size), requires_grad=False)

    def init_own_weights(self) -> None:
        init.normal_(self.memory)

    def features(self, layers: list[Tensor]) -> Tensor:
        """Return patches `[B, N, D]` as vectors of length 1, float32."""
        return F.normalize(torch.cat(layers, dim=-1).float(), dim=-1)

    def forward(self, encoding: Encoding, labels: Tensor | None = None) -> HFViTAnomalyOutput:
        if labels is not None:
            raise ValueError("An anomaly head does not learn from labels: its memory is filled with normal patches.")
        patches = self.features([encoding.layers[stage] for stage in self.stages])
        similarity = patches @ self.memory.detach().float().T  # [B, N, M]
        distances = (1 - similarity.topk(self.num_neighbors, dim=-1).values.mean(dim=-1)).clamp(min=0)  # [B, N]
        number = max(1, round(SHARE_OF_PATCHES * distances.shape[1]))
        scores = distances.topk(number, dim=-1).values.mean(dim=-1)
        maps = distances.unflatten(1, encoding.grid)
        return HFViTAnomalyOutput(scores=cast(Any, scores), anomaly_maps=cast(Any, maps))

    def answer(self, outputs: dict[str, Tensor], processor: Any, size: tuple[int, int], top_k: int | None) -> Any:
        """Return the score, whether it is above the threshold if there is one, and a map of the size of the image."""
        found: dict[str, Any] = {"score": outputs["scores"][0].item()}
        if self.threshold is not None:
            found["is_anomaly"] = found["score"] > self.threshold
        found["map"] = resize_logits(outputs["anomaly_maps"][:, None], size)[0, 0].numpy()
        return found


def stages_of(config: HFViTConfig) -> list[int]:
    """Return the stages in `config.out_indices`, counted from the stem."""
    return [index % (config.num_hidden_layers + 1) for index in config.out_indices]


HEADS: dict[str, type[HFViTHead]] = {
    "classification": HFViTImageHead,
    "multi_label": HFViTImageHead,
    "regression": HFViTImageHead,
    "segmentation": HFViTPixelHead,
    "detection": HFViTObjectHead,
    "anomaly": HFViTAnomalyHead,
}


class HFViTForMultiTask(HFViTPreTrainedModel):
    """The encoder with the heads of `config.task_heads`, which share one forward pass of the encoder.

    Example:
        >>> small = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32}
        >>> heads = {
        ...     "species": {"task": "classification", "id2label": {0: "cat", 1: "dog"}},
        ...     "parts": {"task": "segmentation", "id2label": {0: "background", 1: "head", 2: "tail"}},
        ... }
        >>> model = HFViTForMultiTask(HFViTConfig(**small, patch_size=8, task_heads=heads)).eval()
        >>> outputs = model(torch.rand(2, 3, 32, 32))
        >>> outputs["species"].logits.shape, outputs["parts"].logits.shape
        (torch.Size([2, 2]), torch.Size([2, 3, 16, 16]))
        >>> type(model.single("species")).__name__
        'HFViTForImageClassification'
    """

    accepts_loss_kwargs = False  # the number of items in a batch differs between heads

    def __init__(self, config: HFViTConfig) -> None:
        super().__init__(config)
        reject_patch_dropout(self)
        if not config.task_heads:
            raise ValueError(
                "A multi-task model needs heads: set task_heads in the config, for example "
                "{'species': {'task': 'classification', 'id2label': {0: 'cat', 1: 'dog'}}}."
            )
        self.vit = HFViTModel(config)
        self.heads = nn.ModuleDict()
        for name, head in (checked_heads(config) or {}).items():
            if hasattr(self.heads, name):
                raise ValueError(f"A head cannot be named {name!r}, a name that PyTorch uses: choose another one.")
            self.heads[name] = HEADS[head["task"]](config, head)
        self.post_init()

    @can_return_tuple
    def forward(  # type: ignore[misc]
        self,
        pixel_values: Tensor | None = None,
        labels: dict[str, Any] | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ModelOutput:
        """Compute the outputs of all heads.

        Args:
            pixel_values: `[B, C, H, W]`, as for `HFViTModel`.
            labels: Labels by head name, in the format of the single-task models. If given, the output of each of these
                heads has a `loss`, and the model's output has the sum of these losses.
            output_hidden_states: Whether to return the hidden states of the encoder.
            kwargs: As for `HFViTModel`.

        Returns:
            An output for each head under its name, such as `outputs["species"].logits`.
        """
        reject_packs(self, kwargs.get("patch_grids"))
        if unknown := set(labels or ()) - set(self.heads):
            raise ValueError(f"There is no head {', '.join(sorted(unknown))}: the heads are {', '.join(self.heads)}.")
        if output_hidden_states is None:
            output_hidden_states = bool(self.config.output_hidden_states)
        encoding = self._encode(pixel_values, output_hidden_states, **kwargs)
        found = {name: head(encoding, (labels or {}).get(name)) for name, head in self.heads.items()}
        losses = [output.loss for output in found.values() if output.get("loss") is not None]
        entries = {
            "loss": torch.stack(losses).sum() if losses else None,
            **found,
            "hidden_states": encoding.outputs.hidden_states if output_hidden_states else None,
            "attentions": encoding.outputs.attentions,
        }
        return ModelOutput({name: entry for name, entry in entries.items() if entry is not None})

    def _encode(self, pixel_values: Tensor | None, output_hidden_states: bool, **kwargs: Any) -> Encoding:
        """Run the encoder; record hidden states only if requested, or if a head reads a layer before the last one."""
        last, heads = self.config.num_hidden_layers, cast(Any, self.heads.values())
        stages = {stage for head in heads for stage in head.stages}
        needs_states = output_hidden_states or bool(stages - {last})
        outputs = self.vit(pixel_values, output_hidden_states=needs_states, **kwargs)
        patches, layers = slice(self.config.num_prefix_tokens, None), {}
        for stage in stages:
            is_last = stage == last
            tokens = outputs.last_hidden_state if is_last else self.vit.layernorm(outputs.hidden_states[stage])
            layers[stage] = tokens[:, patches]
        return Encoding(outputs, layers, self.config.grid_of(*cast(Tensor, pixel_values).shape[-2:]))

    def single(self, name: str) -> HFViTPreTrainedModel:
        """Return the single-task model of a head, which shares its weights with this model.

        It can be used and saved like any other model. For an anomaly head, it is a multi-task model with only this
        head.

        Raises:
            ValueError: If there is no such head.
        """
        if name not in self.heads:
            raise ValueError(f"There is no head {name!r}: the heads are {', '.join(self.heads)}.")
        head = cast(HFViTHead, self.heads[name])
        with torch.device("meta"):  # every parameter is replaced
            if head.model_class is None:
                stated = {**self.config.to_dict(), "task_heads": {name: cast(Any, self.config.task_heads)[name]}}
                model: Any = type(self)(type(self.config).from_dict(stated))
            else:
                model = head.model_class(head.config)
        prefix = f"heads.{name}." if head.model_class is None else ""
        ours = {f"vit.{part}": parameter for part, parameter in self.vit.named_parameters()}
        for part, parameter in head.named_parameters():
            ours["vit." + part if part.startswith("pooler.") else prefix + part] = parameter
        # Parameters are shared, not modules: hooks on a shared module would record the hidden states of both models.
        for part, parameter in model.named_parameters():
            parameter.requires_grad_(ours[part].requires_grad)
        model.load_state_dict({part: ours[part] for part, _ in model.named_parameters()}, assign=True)
        model.config.name_or_path = self.config.name_or_path
        model.config._attn_implementation = self.config._attn_implementation
        model._image_processor = self._image_processor
        return model.train(self.training)


__all__ = ["HFViTForMultiTask"]
