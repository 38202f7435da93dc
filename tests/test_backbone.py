"""The backbone under the heads of other models of transformers, with the maps of layers or of a pyramid."""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List
from datasets import Image as ImageFeature
from PIL import Image
from transformers import (
    AutoBackbone,
    AutoModelForUniversalSegmentation,
    DetrConfig,
    DetrForObjectDetection,
    DFineConfig,
    DFineForObjectDetection,
    DPTConfig,
    DPTForDepthEstimation,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    MaskFormerConfig,
    MaskFormerForInstanceSegmentation,
    RTDetrConfig,
    RTDetrForObjectDetection,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from hf_vit import HFViTBackbone, HFViTConfig, HFViTForSemanticSegmentation

ROOT = Path(__file__).parents[1]
PIXELS = torch.rand(2, 3, 64, 96)
MASKS: dict[str, Any] = {
    "mask_labels": [torch.randint(2, (2, 64, 96)).float() for _ in range(2)],
    "class_labels": [torch.tensor([0, 2]), torch.tensor([1, 1])],
}
BOXES: dict[str, Any] = {
    "labels": [
        {"class_labels": torch.tensor([0, 2]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.3, 0.3, 0.1, 0.2]])},
        {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.7, 0.6, 0.5, 0.4]])},
    ]
}
DETR = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "num_queries": 10,
}
RT_DETR = {
    **DETR,
    "decoder_layers": 2,
    "encoder_hidden_dim": 32,
    "encoder_in_channels": [32] * 3,
    "decoder_in_channels": [32] * 3,
    "num_queries": 20,
    "num_denoising": 4,
}
MASK2FORMER = {
    "feature_size": 32,
    "mask_feature_size": 32,
    "hidden_dim": 32,
    "encoder_feedforward_dim": 32,
    "dim_feedforward": 32,
    "num_attention_heads": 2,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "num_queries": 8,
    "train_num_points": 64,
}


def upernet(backbone: HFViTConfig) -> Any:
    widths = {"hidden_size": 16, "auxiliary_in_channels": 32, "auxiliary_channels": 16}
    config = UperNetConfig(backbone_config=backbone, **widths, num_labels=3)
    return UperNetForSemanticSegmentation(config)


def maskformer(backbone: HFViTConfig) -> Any:
    config = MaskFormerConfig(
        fpn_feature_size=32,
        mask_feature_size=32,
        backbone_config=backbone,
        decoder_config=DetrConfig(**DETR),
        num_labels=3,
    )
    return MaskFormerForInstanceSegmentation(config)


def mask2former(backbone: HFViTConfig) -> Any:
    config = Mask2FormerConfig(backbone_config=backbone, **MASK2FORMER, num_labels=3)
    return Mask2FormerForUniversalSegmentation(config)


def dpt(backbone: HFViTConfig) -> Any:
    config = DPTConfig(
        backbone_config=backbone, neck_hidden_sizes=[16] * 4, fusion_hidden_size=16, reassemble_factors=[4, 2, 1, 0.5]
    )
    return DPTForDepthEstimation(config)


def detr(backbone: HFViTConfig) -> Any:
    return DetrForObjectDetection(DetrConfig(backbone_config=backbone, **DETR, num_labels=3))


def rt_detr(backbone: HFViTConfig) -> Any:
    return RTDetrForObjectDetection(RTDetrConfig(backbone_config=backbone, **RT_DETR, num_labels=3))


def d_fine(backbone: HFViTConfig) -> Any:
    return DFineForObjectDetection(DFineConfig(backbone_config=backbone, **RT_DETR, num_labels=3))


LAYERS = {"out_indices": [0, 1, 2, 3]}
STRIDES = {"feature_strides": [4, 8, 16, 32]}
HEADS = {
    "upernet-layers": (upernet, LAYERS, {"labels": torch.randint(3, (2, 64, 96))}),
    "upernet-strides": (upernet, STRIDES, {"labels": torch.randint(3, (2, 64, 96))}),
    "maskformer": (maskformer, STRIDES, MASKS),
    "mask2former": (mask2former, STRIDES, MASKS),
    "dpt": (dpt, {**LAYERS, "reshape_hidden_states": False}, {}),
    "detr": (detr, {}, BOXES),
    "rt-detr": (rt_detr, {"feature_strides": [8, 16, 32]}, BOXES),
    "d-fine": (d_fine, {"feature_strides": [8, 16, 32]}, BOXES),
}


SLOW = ("upernet-strides", "maskformer", "d-fine")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in HEADS]
)
def test_heads_of_transformers_learn_and_load(
    tiny_config: Callable[..., HFViTConfig], name: str, tmp_path: Path
) -> None:
    build, fields, labels = HEADS[name]
    model = build(tiny_config(image_size=(64, 96), **fields))
    outputs = model(PIXELS, **labels)
    (outputs.loss if labels else outputs.predicted_depth.mean()).backward()
    [backbone] = [part for part in model.modules() if isinstance(part, HFViTBackbone)]
    assert backbone.vit.embeddings.patch_embeddings.projection.weight.grad.abs().sum() > 0
    model.save_pretrained(tmp_path)
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        before, after = (each.eval()(PIXELS).to_tuple() for each in (model, loaded))
    for first, second in zip(before, after, strict=True):
        if isinstance(first, torch.Tensor):
            torch.testing.assert_close(first, second)


@pytest.mark.parametrize(("patch", "strides"), [(16, [4, 8, 16, 32]), (8, [4, 8, 16, 32]), (14, [7, 14, 28])])
def test_strides_are_those_of_the_maps(
    tiny_config: Callable[..., HFViTConfig], patch: int, strides: list[int], tmp_path: Path
) -> None:
    height, width = 7 * patch, 4 * patch
    config = tiny_config(image_size=(4 * patch, 4 * patch), patch_size=patch, feature_strides=strides)
    model = HFViTBackbone(config).eval()
    maps = model(torch.rand(1, 3, height, width)).feature_maps
    assert [each.shape[1:] for each in maps] == [(32, -(-height // side), -(-width // side)) for side in strides]
    assert model.channels == [32] * len(strides) and model.out_features == [f"stride{side}" for side in strides]
    model.save_pretrained(tmp_path)
    loaded = AutoBackbone.from_pretrained(tmp_path, out_features=[f"stride{patch}"])
    [single] = loaded(torch.ones(1, 3, height, width)).feature_maps
    torch.testing.assert_close(single, model(torch.ones(1, 3, height, width)).feature_maps[strides.index(patch)])
    assert HFViTBackbone.from_pretrained(tmp_path, feature_strides=None).out_features == ["stage3"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of Trainer and of the model are not ours
def test_the_script_trains_mask2former(tmp_path: Path) -> None:
    names, images, masks = ["sky", "field"], [], []
    for seed in range(4):
        classes = np.zeros((40, 60), dtype=np.uint8)
        classes[15 + seed :] = 1
        images.append(Image.fromarray(np.stack([classes * 200] * 3, axis=2)))
        masks.append(Image.fromarray(classes))
    features = Features({"image": ImageFeature(), "mask": ImageFeature(), "classes": List(ClassLabel(names=names))})
    data = Dataset.from_dict({"image": images, "mask": masks, "classes": [[0, 1]] * 4}, features=features)
    for split in ("train", "test"):
        data.to_parquet(tmp_path / "data" / f"{split}.parquet")
    main = runpy.run_path(str(ROOT / "scripts" / "segment_with_mask2former.py"))["main"]
    options = ["--steps", "2", "--batch-size", "2", "--size", "32", "64"]
    assert 0 <= main([str(tmp_path / "data"), str(tmp_path / "model"), *options]) <= 1
    loaded = AutoModelForUniversalSegmentation.from_pretrained(tmp_path / "model")
    assert loaded.config.id2label == {0: "sky", 1: "field"}


def test_strides_that_do_not_fit_are_refused(tiny_config: Callable[..., HFViTConfig]) -> None:
    with pytest.raises(ValueError, match=r"feature_strides must be among \[1, 2, 4, 8, 16, .* got \[4, 12\]"):
        tiny_config(feature_strides=[4, 12])
    with pytest.raises(ValueError, match="increasing order"):
        tiny_config(feature_strides=[8, 4])
    with pytest.raises(ValueError, match="a square patch"):
        tiny_config(patch_size=(8, 4), feature_strides=[8])
    with pytest.raises(ValueError, match="set reshape_hidden_states=True"):
        tiny_config(feature_strides=[8], reshape_hidden_states=False)
    with pytest.raises(ValueError, match="set feature_strides=None"):
        HFViTForSemanticSegmentation(tiny_config(feature_strides=[8]))
