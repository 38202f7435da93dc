"""transformers' common tests of models, configurations, pipelines, training and sharding, on the plugin's classes."""

import unittest
from typing import Any
from unittest import mock

import pytest
import torch
from transformers_tests import test_modeling_common as common
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_fsdp_mixin import FSDPTesterMixin
from transformers_tests.test_memory_cleanup_mixin import MemoryCleanupMixin
from transformers_tests.test_pipeline_mixin import PipelineTesterMixin, pipeline_test_mapping
from transformers_tests.test_tensor_parallel_mixin import TensorParallelTesterMixin
from transformers_tests.test_training_mixin import TrainingTesterMixin

from hf_vit import (
    HFViTBackbone,
    HFViTConfig,
    HFViTForImageClassification,
    HFViTForMaskedImageModeling,
    HFViTForObjectDetection,
    HFViTForSemanticSegmentation,
    HFViTModel,
)

pytestmark = pytest.mark.upstream

# Newer versions name their pipeline tests by import path, in a package `tests`.
for entry in pipeline_test_mapping.values():
    if isinstance(entry["test"], str):
        entry["test"] = entry["test"].replace("tests.", "transformers_tests.", 1)

# By these lists of class names the tests know which labels a model takes and whether it can be trained. They are those
# of transformers' own models, which registration with the Auto classes leaves alone.
for mapping, model_class in {
    "MODEL_MAPPING_NAMES": HFViTModel,
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES": HFViTForImageClassification,
    "MODEL_FOR_MASKED_IMAGE_MODELING_MAPPING_NAMES": HFViTForMaskedImageModeling,
    "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES": HFViTForSemanticSegmentation,
    "MODEL_FOR_BACKBONE_MAPPING_NAMES": HFViTBackbone,
}.items():
    setattr(common, mapping, {**getattr(common, mapping), "hf_vit": model_class.__name__})

# The position tables of each kind of position embedding.
TABLES = {"learned": ["table"], "learned_2d": ["rows", "columns"], "relative": ["offsets"]}


class HFViTModelTester:
    """A ViT of two layers and its inputs; the mixins read these attributes and call these methods."""

    batch_size = 13
    image_size = 30
    patch_size = 2
    num_channels = 3
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    intermediate_size = 37
    num_labels = 10
    position_embedding_type = "learned"
    seq_length = (30 // 2) ** 2 + 1  # patches and the class token
    mask_length = seq_length - 1
    num_masks = mask_length // 2
    is_training = True
    sequence_classification_class = HFViTForImageClassification  # the model of the training test

    def get_config(self) -> HFViTConfig:
        return HFViTConfig(
            image_size=self.image_size,
            patch_size=self.patch_size,
            num_channels=self.num_channels,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=self.intermediate_size,
            num_labels=self.num_labels,
            position_embedding_type=self.position_embedding_type,
            patch_subdivision=1,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[HFViTConfig, dict[str, torch.Tensor]]:
        images = common.floats_tensor([self.batch_size, self.num_channels, self.image_size, self.image_size])
        return self.get_config(), {"pixel_values": images}


class HFViTModelTest(
    MemoryCleanupMixin,
    common.ModelTesterMixin,
    PipelineTesterMixin,
    TrainingTesterMixin,
    TensorParallelTesterMixin,
    FSDPTesterMixin,
    unittest.TestCase,
):
    all_model_classes = (
        HFViTModel,
        HFViTForImageClassification,
        HFViTForMaskedImageModeling,
        HFViTForSemanticSegmentation,
        HFViTForObjectDetection,
        HFViTBackbone,
    )
    pipeline_model_mapping = {
        "image-classification": HFViTForImageClassification,
        "image-feature-extraction": HFViTModel,
    }
    test_resize_embeddings = False  # there is no vocabulary
    test_can_init_all_missing_weights_before_2023 = True  # the test takes the age of a model from a copyright line
    run_under_no_grad = False  # most of these tests train
    model_tester: Any = None  # abstract in the mixins

    def setUp(self) -> None:
        super().setUp()
        self.model_tester = HFViTModelTester()

    def _prepare_for_class(self, inputs_dict: Any, model_class: Any, return_labels: bool = False) -> dict[str, Any]:
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if return_labels and model_class is HFViTForObjectDetection:  # the common tests know no labels for it
            box = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.3]])}
            inputs["labels"] = [box] * self.model_tester.batch_size
        return inputs

    def test_config(self) -> None:
        ConfigTester(self, config_class=HFViTConfig, has_text_modality=False, hidden_size=36).run_common_tests()

    def skipTest(self, reason: str) -> None:
        # The pipeline tests skip a model that fails to load: upstream's may be absent from the Hub, ours is a bug.
        self.assertNotIn("Could not", reason)
        super().skipTest(reason)

    def test_reverse_loading_mapping(self) -> None:
        # Each converter is for a table of one kind of positions. The common test requires that all of them match.
        find = common.get_model_conversion_mapping
        converters = find(HFViTModel(self.model_tester.get_config()), add_legacy=False)
        by_table = {converter.source_patterns[0].split(".")[1]: converter for converter in converters}
        self.assertEqual(sorted(by_table), sorted(table for tables in TABLES.values() for table in tables))
        for kind, tables in TABLES.items():
            of_kind = [by_table[table] for table in tables]
            with (
                mock.patch.object(self.model_tester, "position_embedding_type", kind),
                mock.patch.object(common, "get_model_conversion_mapping", mock.Mock(return_value=of_kind)),
            ):
                # The names on disk are the names in memory.
                super().test_reverse_loading_mapping(check_keys_were_modified=False)

    def test_model_get_set_embeddings(self) -> None:
        # The mixin's own asks for an `nn.Embedding`.
        for model_class in self.all_model_classes:
            model, other = model_class(self.model_tester.get_config()), torch.nn.Identity()
            self.assertIn("projection", dict(model.get_input_embeddings().named_modules()))
            model.set_input_embeddings(other)
            self.assertIs(model.get_input_embeddings(), other)
            self.assertIsNone(model.get_output_embeddings())

    def test_training_overfit(self) -> None:
        # Written for any modality, finished for text only: it gets images under that name.
        config = self.model_tester.get_config()
        config.vocab_size = config.num_labels
        with mock.patch.object(self.model_tester, "get_config", return_value=config):
            super().test_training_overfit()

    def _get_model_modality(self) -> str:
        return "text"

    def _create_text_training_batch(self, batch_size: int, **sizes: int) -> dict[str, Any]:
        tester = self.model_tester
        images = common.floats_tensor([batch_size, tester.num_channels, tester.image_size, tester.image_size])
        return {"pixel_values": images, "labels": torch.arange(batch_size)}
