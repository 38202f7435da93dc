"""Pipelines that pass files to the image processor instead of opening them first.

transformers' pipelines convert every file to 8-bit RGB before the processor: 16-bit grayscale becomes white,
transparent pixels get an arbitrary color, and an error does not name the file. With the package installed,
`pipeline("image-classification", model)` constructs these classes for our models; without it, with
`trust_remote_code=True`, the class that `HFViTConfig.custom_pipelines` names.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    BatchFeature,
    ImageClassificationPipeline,
    ImageFeatureExtractionPipeline,
    ImageSegmentationPipeline,
    ObjectDetectionPipeline,
    Pipeline,
)
from transformers.pipelines.image_classification import sigmoid, softmax

from .abstention_hf_vit import certainties, most_shown, with_certainty
from .image_reading_hf_vit import DOWNLOAD_TIMEOUT, download, is_url
from .losses_hf_vit import activation_of

# Activations that convert logits to scores, in NumPy as in transformers.
SCORES: dict[str, Callable[[Any], Any]] = {"softmax": softmax, "sigmoid": sigmoid, "none": lambda logits: logits}


class FilePreprocessing:
    """Preprocess any input that the image processor accepts; raise a `ValueError` that names an unreadable file."""

    def preprocess(self, image: Any, timeout: float | None = None, **options: Any) -> BatchFeature:
        """Return the model's inputs for an image; `timeout` is the maximum number of seconds without a response."""
        pipeline: Any = self
        if not hasattr(pipeline.image_processor, "least_size"):  # of another library, which may not read files
            parent: Any = super()
            return parent.preprocess(image, timeout=timeout, **options)
        if is_url(image):
            image = download(image, timeout or DOWNLOAD_TIMEOUT)
        return pipeline.image_processor(images=image, return_tensors="pt", **options).to(pipeline.dtype)


class HFViTImageClassificationPipeline(FilePreprocessing, ImageClassificationPipeline):  # type: ignore[misc]
    """Image classification that reads images like `hf_vit` and, with thresholds, can answer "unknown"."""

    def postprocess(  # type: ignore[override]
        self, model_outputs: Any, function_to_apply: Any = None, top_k: int | None = None
    ) -> Any:
        """Return labels and scores as in transformers or, for a model with thresholds, as in `with_certainty`.

        Only the returned labels get their names: naming and sorting all 1,000 takes 3 ms per image.
        """
        config: Any = self.model.config
        logits = model_outputs["logits"][0].float()
        (certainty,) = certainties(logits[None], config)
        activation = activation_of(config) if function_to_apply is None else function_to_apply.value
        scores = torch.from_numpy(SCORES[activation](logits.numpy()))
        best = scores.sort(descending=True, stable=True).indices[: most_shown(certainty, top_k)].tolist()
        names = config.id2label
        return with_certainty([{"label": names[index], "score": scores[index].item()} for index in best], certainty)


class HFViTImageFeatureExtractionPipeline(FilePreprocessing, ImageFeatureExtractionPipeline):  # type: ignore[misc]
    """Feature extraction that reads images like `hf_vit`."""


class SizedFilePreprocessing(FilePreprocessing):
    """`FilePreprocessing` that also returns the size of the upright image, which masks and boxes refer to."""

    def preprocess(self, image: Any, timeout: float | None = None, **options: Any) -> BatchFeature:
        """Return the model's inputs for an image, and its size; arguments as in transformers."""
        pipeline: Any = self
        if not hasattr(pipeline.image_processor, "original_size"):  # of another library
            return super().preprocess(image, timeout=timeout, **options)
        if is_url(image):
            image = download(image, timeout or DOWNLOAD_TIMEOUT)
        inputs = super().preprocess(image)
        inputs["target_size"] = torch.tensor([pipeline.image_processor.original_size(image)])
        return inputs

    def check_model_type(self, supported_models: Any) -> None:
        """Accept any model: the list of class names that transformers compares with lacks registered classes."""


class HFViTImageSegmentationPipeline(SizedFilePreprocessing, ImageSegmentationPipeline):  # type: ignore[misc]
    """Semantic segmentation that reads images like `hf_vit`; masks have the size of the upright image."""


class HFViTObjectDetectionPipeline(SizedFilePreprocessing, ObjectDetectionPipeline):  # type: ignore[misc]
    """Object detection that reads images like `hf_vit`; boxes are in pixels of the upright image."""


class HFViTMultiTaskPipeline(SizedFilePreprocessing, Pipeline):  # type: ignore[misc]
    """Pipeline of a multi-task model, which returns the answers of all heads by name.

    It accepts one image or a list of images: files, URLs, PIL images or arrays. A classification head returns labels
    and scores, a regression head a value for each target, a segmentation head a mask for each class, a detection head
    boxes, and an anomaly head a score and a map. `top_k` is the maximum number of labels or objects; by default, a
    classification head returns five labels or its whole label set, and multi-label and detection heads return those
    above their thresholds.
    """

    model: Any
    _load_processor: Any = False
    _load_image_processor: Any = True
    _load_feature_extractor: Any = False
    _load_tokenizer: Any = False

    def _sanitize_parameters(
        self, top_k: int | None = None, timeout: float | None = None, **unknown: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if unknown:
            raise ValueError(f"Unknown option {', '.join(unknown)}: the options are top_k and timeout.")
        before = {} if timeout is None else {"timeout": timeout}
        return before, {}, {} if top_k is None else {"top_k": top_k}

    def _forward(self, inputs: Any) -> Any:  # type: ignore[override]
        sizes = inputs.pop("target_size")
        outputs = self.model(**inputs)
        flat = {f"{name}.{key}": tensor for name in self.model.heads for key, tensor in outputs[name].items()}
        return {**flat, "target_size": sizes}

    def postprocess(self, outputs: Any, top_k: int | None = None) -> dict[str, Any]:  # type: ignore[override]
        """Return the answer of every head for one image."""
        height, width = outputs.pop("target_size")[0].tolist()
        by_head: dict[str, dict[str, Any]] = {}
        for name, tensor in outputs.items():
            head, _, key = name.partition(".")
            by_head.setdefault(head, {})[key] = tensor
        return {
            name: head.answer(by_head[name], self.image_processor, (height, width), top_k)
            for name, head in self.model.heads.items()
        }
