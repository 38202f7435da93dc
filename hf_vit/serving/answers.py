"""Predictions and facts about a model as JSON."""

import base64
import io
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image

from ..prediction.masks import mask_picture
from ..prediction.predictor import BoxPredictor, MaskPredictor, MultiTaskPredictor, Prediction, Predictor

SIDES = ("xmin", "ymin", "xmax", "ymax")  # as in transformers' pipelines
LARGEST_DISTANCE = 2.0  # of a map of anomalies, cosine distances
TASKS: dict[type[Predictor], str] = {
    MaskPredictor: "image-segmentation",
    BoxPredictor: "object-detection",
    MultiTaskPredictor: "multi-task",
}


def task_of(predictor: Predictor) -> str:
    """Return the task of a model by the name of transformers' pipeline."""
    usual = "image-classification" if predictor.labels else "image-feature-extraction"
    return TASKS.get(type(predictor), usual)


def answer_of(prediction: Prediction, labels: Mapping[int, str]) -> dict[str, Any]:
    """Return a prediction in the types of JSON; masks and maps are PNG files in base64.

    Raises:
        ValueError: If a score is NaN or infinite.
    """
    if prediction.error is not None:
        return {"error": prediction.error}
    answer: dict[str, Any] = {}
    if prediction.size is not None:
        answer["size"] = dict(zip(("height", "width"), prediction.size, strict=True))
    pairs = list(zip(prediction.labels, prediction.scores, strict=True))
    if prediction.heads:
        answer["heads"] = {name: _plain(each) for name, each in prediction.heads.items()}
    elif prediction.mask is not None:
        answer["classes"] = [{"label": label, "share": share} for label, share in pairs]
        answer["mask"] = _base64(png(mask_picture(prediction.mask, len(labels))))
    elif prediction.boxes is not None:
        boxes = [dict(zip(SIDES, box, strict=True)) for box in prediction.boxes.tolist()]
        found = zip(pairs, boxes, strict=True)
        answer["objects"] = [{"label": label, "score": score, "box": box} for (label, score), box in found]
    elif prediction.are_values:
        answer["values"] = dict(pairs)
    else:
        answer["labels"] = [{"label": label, "score": score} for label, score in pairs]
        certainty = {"unknown": prediction.is_unknown, "label_set": prediction.label_set}
        answer |= {name: value for name, value in certainty.items() if value is not None}
    return _finite(answer)


def features_of(prediction: Prediction) -> dict[str, Any]:
    """Return the pooled features of a prediction; raise `ValueError` if one is NaN or infinite."""
    if prediction.error is not None:
        return {"error": prediction.error}
    assert prediction.features is not None
    return _finite({"features": prediction.features.tolist()})


def png(picture: Image.Image) -> bytes:
    """Return an image as a PNG file."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _plain(answer: Any) -> Any:
    """Replace images and maps in the answer of one head of a multi-task model."""
    if isinstance(answer, Image.Image):
        return _base64(png(answer))
    if isinstance(answer, np.ndarray):  # distances as 16-bit levels
        levels = np.rint(answer.clip(0, LARGEST_DISTANCE) * (65535 / LARGEST_DISTANCE)).astype(np.uint16)
        return _base64(png(Image.fromarray(levels)))
    if isinstance(answer, dict):
        return {name: _plain(value) for name, value in answer.items()}
    return [_plain(each) for each in answer] if isinstance(answer, list) else answer


def _finite(answer: dict[str, Any]) -> dict[str, Any]:
    if not all(map(math.isfinite, _numbers(answer))):  # JSON has no NaN
        raise ValueError("The model's output has NaN or infinite values: serve it with --precision fp32.")
    return answer


def _numbers(answer: Any) -> Iterator[float]:
    if isinstance(answer, dict | list):
        for each in answer.values() if isinstance(answer, dict) else answer:
            yield from _numbers(each)
    elif isinstance(answer, float):
        yield answer
