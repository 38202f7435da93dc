"""Results of object detection per image, and COCO's metrics, which pycocotools computes.

Boxes are relative to their images: intersection over union, and so every metric over all sizes of objects, is the same
as in pixels.
"""

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..model.detection_boxes_hf_vit import MOST_OBJECTS
from ..model.image_geometry_hf_vit import corners_of
from ..system.extras import need
from .results import Indexed, ratio

DEFAULT_THRESHOLD = 0.5


def need_pycocotools() -> None:
    """Raise `ValueError` with the command to install pycocotools if it is missing."""
    need("detection", "pycocotools")


@dataclass
class BoxResults(Indexed):
    """Results of a detector per image, in the order of the data, on the CPU.

    Attributes:
        labels: True objects, float32 `[N, M, 5]`, as in a batch.
        predicted: The most likely objects, float32 `[N, K, 6]`, as `most_likely_objects` returns them.
        losses: `[N]`.
        num_labels: Number of classes.
        thresholds: Least score of an object of each class that is shown; 0.5 if not given.
        broken, index: As for `ImageResults`.
    """

    labels: Tensor
    predicted: Tensor
    losses: Tensor
    num_labels: int
    thresholds: Sequence[float] | None = None
    broken: list[str] = field(default_factory=list)
    index: Tensor = field(default_factory=lambda: torch.empty(0))

    def metrics(self) -> dict[str, float]:
        """Return mAP over IoU 0.5 to 0.95, AP at 0.5 and at 0.75, in [0, 1], the mean loss, and the image count.

        As in COCO, classes without objects do not count.
        """
        precisions = self._precisions()
        is_known = (precisions > -1).all(axis=(0, 1))  # [C]
        known = precisions[..., is_known] if is_known.any() else np.zeros((*precisions.shape[:2], 1))
        return {
            "map": float(known.mean()),
            "map_50": float(known[0].mean()),
            "map_75": float(known[5].mean()),
            "loss": self.losses.double().mean().item(),
            "count": len(self.labels),
        }

    def agreement(self, other: Any) -> float:
        """Return the share of images with the same numbers of shown objects of every class."""
        both = (each.shown_counts() for each in (self, other))
        first, second = both
        return (first == second).all(dim=1).double().mean().item()

    def shown(self) -> Tensor:
        """Return whether each predicted object is shown, `[N, K]`: its score is above the threshold of its class."""
        thresholds = torch.tensor(self.thresholds or [DEFAULT_THRESHOLD] * self.num_labels)
        return self.predicted[..., 0] > thresholds[self.predicted[..., 1].long()]

    def shown_counts(self) -> Tensor:
        """Return the numbers of shown objects by image and class, `[N, num_labels]`."""
        classes = torch.nn.functional.one_hot(self.predicted[..., 1].long(), self.num_labels)
        return (classes * self.shown().unsqueeze(2)).sum(dim=1)

    def per_class(self, label_names: Sequence[str]) -> list[dict[str, Any]]:
        """Return `label`, `count` (images with it), `boxes`, `ap`, `ap_50`, `f1` and `threshold` of every class.

        F1 is that of the shown objects at an IoU of 0.5. A value that is undefined is `None`.
        """
        precisions, thresholds = self._precisions(), self.thresholds or [DEFAULT_THRESHOLD] * self.num_labels
        rows = []
        for index, (name, threshold) in enumerate(zip(label_names, thresholds, strict=True)):
            is_class = self.labels[..., 0] == index
            own = precisions[..., index]
            is_known = bool((own > -1).all())
            scores, hits, positives = self._matches(index)
            is_shown = scores > threshold
            rows.append(
                {
                    "label": name,
                    "count": int(is_class.any(dim=1).sum()),
                    "boxes": int(is_class.sum()),
                    "ap": float(own.mean()) if is_known else None,
                    "ap_50": float(own[0].mean()) if is_known else None,
                    "f1": ratio(2 * float(hits[is_shown].sum()), positives + float(is_shown.sum())),
                    "threshold": threshold,
                }
            )
        return rows

    def best_thresholds(self) -> list[float]:
        """Return the threshold of every class with the highest F1 at an IoU of 0.5; 0.5 for a class without objects.

        It is the midpoint between two scores, so that rounding does not change which objects are shown.
        """
        chosen = []
        for index in range(self.num_labels):
            scores, hits, positives = self._matches(index)
            if not hits.any():
                chosen.append(DEFAULT_THRESHOLD)
                continue
            f1 = 2 * hits.cumsum() / (positives + np.arange(1, len(hits) + 1))
            f1[:-1][scores[:-1] == scores[1:]] = 0  # a threshold cannot lie between equal scores
            best = int(f1.argmax())
            below = scores[best + 1] if best + 1 < len(scores) else 0.0
            chosen.append(float(scores[best] + below) / 2)
        return chosen

    def image_f1(self) -> Tensor:
        """Return F1 of the shown objects of every image at an IoU of 0.5, `[N]`; 1 for no objects and none shown."""
        evaluated, number = self._evaluated.evalImgs, len(self.labels)
        thresholds = self.thresholds or [DEFAULT_THRESHOLD] * self.num_labels
        hits, both = np.zeros(number), np.zeros(number)
        for position, each in enumerate(evaluated):
            if each is not None:
                index, image = divmod(position, number)
                is_shown = (np.array(each["dtScores"]) > thresholds[index]) & ~each["dtIgnore"][0].astype(bool)
                hits[image] += (is_shown & (each["dtMatches"][0] > 0)).sum()
                both[image] += is_shown.sum() + (~np.array(each["gtIgnore"], dtype=bool)).sum()
        return torch.from_numpy(np.where(both > 0, 2 * hits / both.clip(min=1), 1.0))

    def _matches(self, index: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Return scores and hits at an IoU of 0.5 of all predictions of a class, the best first, and its objects."""
        number = len(self.labels)
        own = [each for each in self._evaluated.evalImgs[index * number : (index + 1) * number] if each is not None]
        scores = np.concatenate([np.zeros(0), *(each["dtScores"] for each in own)])
        hits = np.concatenate([np.zeros(0, dtype=bool), *(each["dtMatches"][0] > 0 for each in own)])
        is_counted = ~np.concatenate([np.zeros(0), *(each["dtIgnore"][0] for each in own)]).astype(bool)
        positives = sum(int((~np.array(each["gtIgnore"], dtype=bool)).sum()) for each in own)
        order = np.argsort(-scores[is_counted], kind="stable")
        return scores[is_counted][order], hits[is_counted][order], positives

    def _precisions(self) -> np.ndarray:
        """Return precision by IoU, recall and class, `[10, 101, num_labels]`; -1 for a class without objects."""
        return self._evaluated.eval["precision"][:, :, :, 0, 0]

    @cached_property
    def _evaluated(self) -> Any:
        """pycocotools' evaluation over objects of all sizes."""
        need_pycocotools()
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        image, row = (self.labels[..., 0] != -1).nonzero(as_tuple=True)
        objects = self.labels[image, row].double()
        lefts = torch.cat([corners_of(objects[:, 1:])[:, :2], objects[:, 3:]], dim=1)
        is_ignored = objects[:, 0] < 0
        classes = torch.where(is_ignored, -2 - objects[:, 0], objects[:, 0]).long()
        columns = zip(image.tolist(), lefts.tolist(), classes.tolist(), is_ignored.tolist(), strict=True)
        annotations = [
            # pycocotools takes an object of the id 0 for one without a match.
            {"id": number, "image_id": where, "bbox": box, "category_id": index, "iscrowd": int(crowd), "area": 1.0}
            for number, (where, box, index, crowd) in enumerate(columns, start=1)
        ]
        number, found = self.predicted.shape[:2]
        predicted = self.predicted.double().flatten(0, 1)
        where = torch.arange(number).repeat_interleave(found).double()
        corners = corners_of(predicted[:, 2:])[:, :2]
        rows = torch.cat([where[:, None], corners, predicted[:, 4:], predicted[:, :2]], dim=1)
        with redirect_stdout(io.StringIO()):
            truth = COCO()
            truth.dataset = {
                "info": {},
                "images": [{"id": index} for index in range(number)],
                "categories": [{"id": index} for index in range(self.num_labels)],
                "annotations": annotations,
            }
            truth.createIndex()
            evaluation = COCOeval(truth, truth.loadRes(rows.numpy()), "bbox")
            evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0.0, 1e10]], ["all"]
            evaluation.params.maxDets = [MOST_OBJECTS]
            evaluation.evaluate()
            evaluation.accumulate()
        return evaluation
