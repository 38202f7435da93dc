"""The named sizes have the parameters that the literature gives them."""

import pytest
import torch

from hf_vit import HFViTForImageClassification
from hf_vit.variants import VARIANTS, config_of


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_are_exact(name):
    with torch.device("meta"):
        model = HFViTForImageClassification(config_of(name, num_labels=1000))
    assert sum(parameter.numel() for parameter in model.parameters()) == VARIANTS[name].num_parameters


def test_base_is_the_paper_s_86_million():
    assert VARIANTS["ViT-B/16"].num_parameters == 86_567_656  # also timm's vit_base_patch16_224


def test_fields_win_over_the_variant():
    config = config_of("ViT-S/16", image_size=(96, 160), hidden_size=192, num_attention_heads=3)
    assert (config.grid_size, config.hidden_size, config.intermediate_size) == ((6, 10), 192, 1536)


def test_unknown_name_lists_those_that_are_known():
    with pytest.raises(ValueError, match=r"'vit-b'.*ViT-B/16"):
        config_of("vit-b")
