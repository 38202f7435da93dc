"""transformers' common tests of backbones, on the plugin's."""

import unittest

import pytest
from test_upstream_modeling import HFViTModelTester
from transformers_tests.test_backbone_common import BackboneTesterMixin

from hf_vit import HFViTBackbone, HFViTConfig

pytestmark = pytest.mark.upstream


class HFViTBackboneTester(HFViTModelTester):
    def get_config(self) -> HFViTConfig:
        config = super().get_config()
        config.out_features = ["stage1", "stage2"]
        return config


class HFViTBackboneTest(BackboneTesterMixin, unittest.TestCase):
    all_model_classes = (HFViTBackbone,)
    config_class = HFViTConfig

    def setUp(self) -> None:
        self.model_tester = HFViTBackboneTester()
