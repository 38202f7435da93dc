"""What transformers' common tests import and its source distribution leaves out, in our own words.

`STAND_INS` says which module has which of them. Nothing here needs the Hub: the models of the pipeline tests are made
on the spot, and the photo is one that scikit-learn carries.
"""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import ImageClassificationPipeline, ImageFeatureExtractionPipeline, set_seed
from transformers.utils import is_torchvision_available

import hf_vit

PHOTO = str(files("sklearn.datasets") / "images" / "china.jpg")

BACKENDS = {"pil": "HFViTImageProcessorPil"} | (
    {"torchvision": "HFViTImageProcessor"} if is_torchvision_available() else {}
)

# No value is the default one, so that a lost one is seen.
CONFIG_KWARGS: dict[str, Any] = {
    "architectures": ["HFViTModel"],
    "chunk_size_feed_forward": 5,
    "dtype": "float16",
    "id2label": {0: "zero", 1: "one", 2: "two"},
    "is_encoder_decoder": True,
    "label2id": {"zero": 0, "one": 1, "two": 2},
    "output_attentions": True,
    "output_hidden_states": True,
    "problem_type": "regression",
    "return_dict": False,
}


class _PipelineTests:
    """What the pipeline mixin calls: build a pipeline with examples, then look at what it returns for them."""

    pipeline_class: Any

    def get_test_pipeline(
        self, model: Any, tokenizer: Any = None, image_processor: Any = None, dtype: str = "float32", **others: Any
    ) -> tuple[Any, list[Any]]:
        photo = Image.open(PHOTO)
        examples = [PHOTO, *(photo.convert(mode) for mode in ("RGB", "L", "LA", "RGBA", "P"))]
        return self.pipeline_class(model=model, image_processor=image_processor, dtype=dtype), examples


class ImageClassificationPipelineTests(_PipelineTests):
    pipeline_class = ImageClassificationPipeline

    def run_pipeline_test(self, pipe: Any, examples: list[Any]) -> None:
        labels = set(pipe.model.config.id2label.values())
        answers = [pipe(example) for example in examples]
        for answer in answers:
            assert {guess["label"] for guess in answer} == labels
            assert abs(sum(guess["score"] for guess in answer) - 1) < 1e-3
            assert answer == sorted(answer, key=lambda guess: -guess["score"])
        for batch_size in (1, len(examples)):
            for alone, batched in zip(answers, pipe(examples, batch_size=batch_size), strict=True):
                assert [guess["label"] for guess in alone] == [guess["label"] for guess in batched]
        assert len(pipe(PHOTO, top_k=1)) == 1


class ImageFeatureExtractionPipelineTests(_PipelineTests):
    pipeline_class = ImageFeatureExtractionPipeline

    def run_pipeline_test(self, pipe: Any, examples: list[Any]) -> None:
        tokens = torch.tensor(pipe(PHOTO))
        assert tokens.ndim == 3 and tokens.shape[::2] == (1, pipe.model.config.hidden_size)
        assert tokens.isfinite().all()
        pooled = pipe(PHOTO, pool=True, return_tensors=True)
        assert pooled.shape == (1, pipe.model.config.hidden_size)
        assert [torch.tensor(answer).shape for answer in pipe(examples)] == [tokens.shape] * len(examples)


def write_tiny_models(folder: str) -> None:
    """Write a model for each pipeline test, and the summary that names its image processors."""
    config_fields = {"image_size": 30, "patch_size": 2, "hidden_size": 32, "intermediate_size": 37}
    config_fields |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    summary = {}
    for model_class in (hf_vit.HFViTModel, hf_vit.HFViTForImageClassification):
        set_seed(0)
        path = Path(folder, model_class.config_class.model_type, model_class.__name__)
        model_class(model_class.config_class(**config_fields, num_labels=3)).save_pretrained(path)
        summary[model_class.__name__] = {"tokenizer_classes": [], "processor_classes": list(BACKENDS.values())}
    reports = Path(folder, "reports")
    reports.mkdir()
    (reports / "tiny_model_summary.json").write_text(json.dumps(summary))


STAND_INS: dict[str, dict[str, Any]] = {
    "fetch_hub_objects_for_ci": {"url_to_local_path": lambda url: PHOTO},
    # Asked for the number of possible processes; the tests that would start them are of language models and skip.
    "transformers_tests.distributed_testing_utils": {"_get_distributed_device_type": lambda: "cpu"},
    "transformers_tests.utils.test_configuration_utils": {"config_common_kwargs": CONFIG_KWARGS},
    "transformers_tests.pipelines.test_pipelines_image_classification": {
        "ImageClassificationPipelineTests": ImageClassificationPipelineTests
    },
    "transformers_tests.pipelines.test_pipelines_image_feature_extraction": {
        "ImageFeatureExtractionPipelineTests": ImageFeatureExtractionPipelineTests
    },
}
