"""Object detection: boxes around the centers of objects, from the tokens of the patches.

The last layer's map is upsampled as in ViTDet (arXiv:2203.16527). Every point of it has a logit for each class, which
is high at the centers of objects (CenterNet, arXiv:1904.07850), and the distances to the four sides of a box (FCOS,
arXiv:1904.01355). All points near a center learn its box, weighted by their nearness, so that few images suffice
(TTFNet, arXiv:1909.00700). A point is a detection if its logit is the highest of its 3x3 neighbors; of detections
that overlap, `most_likely_objects` keeps the most likely one.
"""

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .configuration_hf_vit import HFViTConfig
from .dense_hf_vit import HFViTDenseClassifier, reject_patch_dropout
from .image_geometry_hf_vit import corners_of
from .modeling_hf_vit import HFViTModel, HFViTPreTrainedModel
from .packing_hf_vit import reject_packs
from .pyramid_hf_vit import HFViTPyramidLevel, map_of_patches, pyramid_channels

# Fields of a new detector: patches of 16 pixels have a point every 8 pixels. Denser points take longer to train.
NEW_DETECTOR = {"patch_subdivision": 2}
# Initial probability of an object at a point, 1 %: RetinaNet, arXiv:1708.02002, section 4.1.
LOGIT_OF_PRIOR = math.log(0.01 / 0.99)
SUPPRESSED = -1e4  # logit of a point that is not a peak, within the range of float16
MAX_LOG_DISTANCE = 7.0  # of a distance in patches; prevents infinity and is larger than any image
EXTENT = 0.54  # share of a box, along each side, in which points are near its center: TTFNet, section 4.2
LEAST_NEARNESS = math.exp(-4.5)  # at three standard deviations
WEIGHTS = {"heatmap": 1.0, "boxes": 5.0}  # of the losses, as in TTFNet


@dataclass
class HFViTObjectDetectionOutput(ModelOutput):
    """Output of `HFViTForObjectDetection`. A query is a point of the map, row by row.

    Attributes:
        loss: Weighted sum of the losses, a mean over images, if labels are given.
        loss_dict: Each of these losses by name.
        logits: `[B, Q, num_labels]`, whose sigmoid is a probability; very low at points that are not peaks.
        pred_boxes: `[B, Q, 4]`, float32: center x, center y, width, height, relative to the image.
        hidden_states: Tokens `[B, T, D]` of all layers, if requested.
        attentions: Attention weights `[B, A, T, T]` of all layers, if requested.
        heatmap: Logits of all points `[B, num_labels, h, w]`, from which the loss is computed.
    """

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    logits: Tensor | None = None
    pred_boxes: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    heatmap: Tensor | None = None


def padded_boxes(labels: Any) -> Tensor:
    """Return labels as a float32 tensor `[B, M, 5]`: class, center x, center y, width, height; class -1 is padding.

    Args:
        labels: Such a tensor, or for each image a dictionary of `class_labels` `[n]` and `boxes` `[n, 4]`, as the
            image processors of transformers return them. Boxes are relative to the image.
    """
    if not isinstance(labels, Tensor):
        rows = [torch.cat([each["class_labels"][:, None].float(), each["boxes"].float()], dim=1) for each in labels]
        labels = pad_sequence(rows, batch_first=True, padding_value=-1.0)
    if labels.ndim != 3 or labels.shape[2] != 5:
        raise ValueError(
            "Expected labels as a list of dictionaries with class_labels and boxes, or as a tensor [batch, boxes, 5], "
            f"got {list(labels.shape)}: prepare the annotations with the image processor, annotations=..."
        )
    return labels.float() if labels.shape[1] else labels.new_full((len(labels), 1, 5), -1.0).float()


def object_losses(outputs: HFViTObjectDetectionOutput, labels: Any) -> Tensor:
    """Return the weighted sum of the losses of every image, float32 `[B]`.

    Args:
        outputs: Output of the model.
        labels: As for `padded_boxes`.
    """
    losses = losses_by_name(cast(Tensor, outputs.heatmap), cast(Tensor, outputs.pred_boxes), labels)
    return torch.stack([WEIGHTS[name] * each for name, each in losses.items()]).sum(dim=0)


def losses_by_name(heatmap: Tensor, pred_boxes: Tensor, labels: Any) -> dict[str, Tensor]:
    """Return each loss of every image, float32 `[B]`, divided by the number of its boxes.

    Args:
        heatmap: Logits `[B, C, h, w]`.
        pred_boxes: `[B, h*w, 4]`, relative.
        labels: As for `padded_boxes`.
    """
    heatmap, pred_boxes = heatmap.float(), pred_boxes.float()
    classes, boxes = padded_boxes(labels).to(heatmap.device).split([1, 4], dim=2)
    is_box = classes >= 0  # [B, M, 1]
    number = is_box.sum(dim=(1, 2)).clamp(min=1)
    near = nearness(boxes, (heatmap.shape[2], heatmap.shape[3])) * is_box  # [B, M, h*w]
    losses = heatmap_loss(heatmap.flatten(2), classes, near), boxes_loss(pred_boxes, boxes, near)
    return {name: loss / number for name, loss in zip(WEIGHTS, losses, strict=True)}


def nearness(boxes: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the nearness of every point of a grid to the center of every box, `[B, M, h*w]`: 1 at the center's point.

    It is a Gaussian function whose standard deviations increase with the sides of the box.
    """

    def along(centre: Tensor, side: Tensor, points: int) -> Tensor:
        own = (centre * points).floor().clamp(0, points - 1)
        deviation = (EXTENT * side * points + 1) / 6
        offsets = torch.arange(points, device=boxes.device) - own.unsqueeze(-1)  # [B, M, points]
        return torch.exp(-0.5 * (offsets / deviation.unsqueeze(-1)).square())

    x, y, width, height = boxes.unbind(dim=2)
    return (along(y, height, grid[0]).unsqueeze(3) * along(x, width, grid[1]).unsqueeze(2)).flatten(2)


def heatmap_loss(heatmap: Tensor, classes: Tensor, near: Tensor) -> Tensor:
    """Return the focal loss of CenterNet, equation 1, `[B]`, for logits `[B, C, P]` and nearness `[B, M, P]`."""
    of_class = classes.clamp(min=0).long().expand_as(near)
    target = torch.zeros_like(heatmap).scatter_reduce(1, of_class, near, reduce="amax")  # [B, C, P]
    log_yes, log_no = F.logsigmoid(heatmap), F.logsigmoid(-heatmap)
    at_centre = (2 * log_no).exp() * log_yes
    elsewhere = (1 - target) ** 4 * (2 * log_yes).exp() * log_no
    return -torch.where(target == 1, at_centre, elsewhere).sum(dim=(1, 2))


def boxes_loss(pred_boxes: Tensor, boxes: Tensor, near: Tensor) -> Tensor:
    """Return the sum over boxes `[B, M, 4]` of the loss of the points `[B, P, 4]` near each box, `[B]`."""
    nearest, owner = near.max(dim=1)  # [B, P]
    weights = torch.where(nearest > LEAST_NEARNESS, nearest, 0)
    is_owner = owner.unsqueeze(1) == torch.arange(near.shape[1], device=near.device)[:, None]  # [B, M, P]
    of_box = (is_owner * weights.unsqueeze(1)).sum(dim=2)  # [B, M]
    shares = weights / of_box.gather(1, owner).clamp(min=LEAST_NEARNESS)
    targets = boxes.gather(1, owner.unsqueeze(2).expand(-1, -1, 4))
    return (shares * (1 - generalized_iou(pred_boxes, targets))).sum(dim=1)


def generalized_iou(first: Tensor, second: Tensor) -> Tensor:
    """Return the generalized IoU (arXiv:1902.09630) of boxes `[..., 4]`, from -1 to 1."""
    (low, high), (other_low, other_high) = (corners_of(boxes).split(2, dim=-1) for boxes in (first, second))
    common = (torch.minimum(high, other_high) - torch.maximum(low, other_low)).clamp(min=0).prod(dim=-1)
    around = (torch.maximum(high, other_high) - torch.minimum(low, other_low)).prod(dim=-1)
    union = first[..., 2:].prod(dim=-1) + second[..., 2:].prod(dim=-1) - common
    return common / union.clamp(min=1e-9) - (around - union) / around.clamp(min=1e-9)


class HFViTPointClassifier(HFViTDenseClassifier, nn.Conv2d):
    """Classify the points of a map; the initial bias makes objects rare."""

    def start(self) -> tuple[Tensor, Tensor]:
        return self.bias, torch.full_like(self.bias, LOGIT_OF_PRIOR)


class HFViTDetectionHead(nn.Module):
    """Predict classes and distances at `patch_subdivision` points along each side of a patch."""

    def __init__(self, config: HFViTConfig) -> None:
        super().__init__()
        channels = pyramid_channels(config)
        self.features = HFViTPyramidLevel(config, config.patch_subdivision.bit_length() - 1)
        self.class_conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.box_conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.classifier = HFViTPointClassifier(channels, cast(int, config.num_labels), kernel_size=1)
        self.distances = nn.Conv2d(channels, 4, kernel_size=1)

    def forward(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits `[B, num_labels, h*s, w*s]` and boxes `[B, h*s*w*s, 4]` for a map `[B, D, h, w]`."""
        features = F.gelu(self.features(patches))
        heatmap = self.classifier(F.gelu(self.class_conv(features)))
        distances = self.distances(F.gelu(self.box_conv(features))).float().clamp(max=MAX_LOG_DISTANCE).exp()
        return heatmap, boxes_at_points(distances, (patches.shape[2], patches.shape[3]))


def boxes_at_points(distances: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return relative boxes `[B, h*w, 4]` for distances `[B, 4, h, w]` of points to the left, top, right and bottom.

    Distances are in patches; `grid` is the (rows, columns) of patches. Points are at the centers of the map's cells.
    """
    rows, columns = distances.shape[-2:]
    y = (torch.arange(rows, device=distances.device) + 0.5) / rows
    x = (torch.arange(columns, device=distances.device) + 0.5) / columns
    left, right = distances[:, 0] / grid[1], distances[:, 2] / grid[1]
    top, bottom = distances[:, 1] / grid[0], distances[:, 3] / grid[0]
    centre_x, centre_y = x + (right - left) / 2, y[:, None] + (bottom - top) / 2
    return torch.stack([centre_x, centre_y, left + right, top + bottom], dim=-1).flatten(1, 2)


def logits_of_peaks(heatmap: Tensor) -> Tensor:
    """Return the logits of a heatmap `[B, C, h, w]` as `[B, h*w, C]`, suppressed at points that are not peaks."""
    is_peak = F.max_pool2d(heatmap, kernel_size=3, stride=1, padding=1) == heatmap
    return torch.where(is_peak, heatmap, SUPPRESSED).flatten(2).transpose(1, 2)


class HFViTForObjectDetection(HFViTPreTrainedModel):
    """The encoder with a head that predicts the boxes and classes of objects.

    Example:
        >>> small = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "num_labels": 5}
        >>> config = HFViTConfig(**small, image_size=32, patch_size=8, patch_subdivision=2)
        >>> outputs = HFViTForObjectDetection(config).eval()(torch.rand(2, 3, 40, 24))
        >>> outputs.logits.shape, outputs.pred_boxes.shape  # 10x6 points
        (torch.Size([2, 60, 5]), torch.Size([2, 60, 4]))
    """

    accepts_loss_kwargs = False  # the loss is a mean over images

    def __init__(self, config: HFViTConfig) -> None:
        super().__init__(config)
        reject_patch_dropout(self)
        if not config.num_labels:
            raise ValueError("Object detection needs at least one class, got num_labels=0: set num_labels.")
        if config.patch_subdivision.bit_count() != 1:
            raise ValueError(
                "Object detection upsamples the grid of patches by doubling it: set patch_subdivision to 1, 2, 4 or "
                f"another power of two, got {config.patch_subdivision}."
            )
        self.vit = HFViTModel(config, add_pooling_layer=False)
        self.detection_head = HFViTDetectionHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Any = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> HFViTObjectDetectionOutput:
        """Predict the boxes and classes of objects.

        Args:
            pixel_values: `[B, C, H, W]`, as for `HFViTModel`.
            labels: As for `padded_boxes`. If given, the loss is computed.
            kwargs: As for `HFViTModel`.

        Returns:
            `logits`, `pred_boxes` and, with labels, `loss`. `post_process_object_detection` of the image processor
            turns these into scores, labels and boxes in pixels.
        """
        reject_packs(self, kwargs.get("patch_grids"))
        outputs = self.vit(pixel_values, **kwargs)
        grid = self.config.grid_of(*cast(Tensor, pixel_values).shape[-2:])
        heatmap, boxes = self.detection_head(map_of_patches(outputs.last_hidden_state, self.config, grid))
        loss = losses = None
        if labels is not None:
            losses = {name: each.mean() for name, each in losses_by_name(heatmap, boxes, labels).items()}
            loss = torch.stack([WEIGHTS[name] * each for name, each in losses.items()]).sum()
        return HFViTObjectDetectionOutput(
            loss=loss,
            loss_dict=losses,
            logits=logits_of_peaks(heatmap),
            pred_boxes=boxes,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            heatmap=heatmap,
        )


__all__ = ["HFViTForObjectDetection"]
