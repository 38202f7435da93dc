"""transformers' common tests of image processors, on both of the plugin's backends."""

import unittest
from typing import Any
from unittest import mock

import pytest
from stand_ins import BACKENDS
from transformers_tests.test_image_processing_common import (
    ImageProcessingTester,
    ImageProcessingTestMixin,
    PostProcessSemanticSegmentationTestMixin,
)

import hf_vit

pytestmark = pytest.mark.upstream
pytest.importorskip("torchvision", reason="AutoImageProcessor requires torchvision")


class HFViTImageProcessingTester(ImageProcessingTester):
    """The sizes of the pictures that the mixin makes up, and a processor other than the default one."""

    batch_size = 7
    num_labels = 5
    num_channels = 3
    min_resolution = 30
    max_resolution = 400
    size = {"height": 18, "width": 20}

    def __init__(self) -> None:
        """Leave out the parent's, which looks the classes up by the name of the folder that the test is in."""

    def prepare_image_processor_dict(self) -> dict[str, Any]:
        return {
            "do_resize": True,
            "size": self.size,
            "do_normalize": True,
            "image_mean": [0.4, 0.5, 0.6],
            "image_std": [0.2, 0.3, 0.4],
        }


class HFViTImageProcessingTest(PostProcessSemanticSegmentationTestMixin, ImageProcessingTestMixin, unittest.TestCase):
    image_processing_classes = {backend: getattr(hf_vit, name) for backend, name in BACKENDS.items()}
    test_cast_dtype = True

    def setUp(self) -> None:
        self.image_processor_tester = HFViTImageProcessingTester()

    @property
    def image_processor_dict(self) -> dict[str, Any]:
        return self.image_processor_tester.prepare_image_processor_dict()

    def test_call_numpy_4_channels(self) -> None:
        # transformers 5.17 expects four channels to stay four without asking for it.
        as_it_is = {**self.image_processor_dict, "do_convert_rgb": False}
        with mock.patch.object(self.image_processor_tester, "prepare_image_processor_dict", lambda: as_it_is):
            super().test_call_numpy_4_channels()
