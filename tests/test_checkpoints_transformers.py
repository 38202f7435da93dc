"""Checkpoints of transformers' own Vision Transformers give what those models compute, whatever names and files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from family import TINY
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_vit.checkpoints import Checkpoint, Options, open_checkpoint
from hf_vit.model import model_class

TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 50,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
LABELS = {"num_labels": 5}
DECODER = {"decoder_num_hidden_layers": 1, "decoder_hidden_size": 32, "decoder_num_attention_heads": 4}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    # What is tested: the class, and the fields of its config beside the tiny ones.
    "ViT": ("ViTModel", {}),
    "ViT without pooler": ("ViTModel", {"add_pooling_layer": False}),
    "ViT without biases": ("ViTModel", {"qkv_bias": False}),
    "ViT, classifier": ("ViTForImageClassification", {**LABELS, "layer_norm_eps": 1e-6}),
    "ViT, masked": ("ViTForMaskedImageModeling", {"encoder_stride": 8}),
    "DeiT": ("DeiTModel", {}),
    "DeiT, classifier": ("DeiTForImageClassification", LABELS),
    "DeiT, two classifiers": ("DeiTForImageClassificationWithTeacher", LABELS),
    "DeiT, masked": ("DeiTForMaskedImageModeling", {"encoder_stride": 8}),
    "DINOv2": ("Dinov2Model", {}),
    "DINOv2, gated": ("Dinov2Model", {"use_swiglu_ffn": True}),
    "DINOv2, classifier": ("Dinov2ForImageClassification", LABELS),
    "DINOv2 with registers": ("Dinov2WithRegistersModel", {"num_register_tokens": 2}),
    "DINOv2 with registers, classifier": (
        "Dinov2WithRegistersForImageClassification",
        {**LABELS, "use_swiglu_ffn": True},
    ),
    "DINOv3": ("DINOv3ViTModel", {"num_register_tokens": 0}),
    "DINOv3, gated": ("DINOv3ViTModel", {"num_register_tokens": 2, "use_gated_mlp": True}),
    "DINOv3, all biases": ("DINOv3ViTModel", {"num_register_tokens": 2, "key_bias": True}),
    "DINOv3, no biases": ("DINOv3ViTModel", {"query_bias": False, "value_bias": False, "mlp_bias": False}),
    "MAE": ("ViTMAEModel", {"mask_ratio": 0.0}),
    "MAE with decoder": ("ViTMAEForPreTraining", {"mask_ratio": 0.0, **DECODER}),
    "MSN": ("ViTMSNModel", {}),
    "MSN, classifier": ("ViTMSNForImageClassification", LABELS),
    "SigLIP, tower": ("SiglipVisionModel", {}),
    "SigLIP, tower without head": ("SiglipVisionModel", {"vision_use_head": False}),
    "SigLIP, both towers": ("SiglipModel", {"text_config": TEXT}),
    "SigLIP, classifier": ("SiglipForImageClassification", {"text_config": TEXT, **LABELS}),
    "CLIP, tower": ("CLIPVisionModel", {}),
    "CLIP, tower with projection": ("CLIPVisionModelWithProjection", {}),
    "CLIP, both towers": ("CLIPModel", {"text_config": TEXT}),
    "CLIP, classifier": ("CLIPForImageClassification", {"text_config": TEXT, **LABELS}),
    "MetaCLIP 2, tower": ("MetaClip2VisionModel", {}),
    "MetaCLIP 2, both towers": ("MetaClip2Model", {"text_config": TEXT}),
    "ChineseCLIP, tower": ("ChineseCLIPVisionModel", {}),
    "AltCLIP, tower": ("AltCLIPVisionModel", {}),
    "CLIPSeg, tower": ("CLIPSegVisionModel", {}),
    "MetaCLIP 2, classifier": ("MetaClip2ForImageClassification", {"text_config": TEXT, **LABELS}),
}
every_case = pytest.mark.parametrize("case", CASES)


def stock_model(case: str, **fields: Any) -> nn.Module:
    """Build the model of a case with random numbers in every tensor; in eval."""
    name, own = CASES[case]
    model_class = getattr(transformers, name)
    own = {**own, **fields}
    arguments = {"add_pooling_layer": own.pop("add_pooling_layer")} if "add_pooling_layer" in own else {}
    if "text_config" in own:
        tower = {name: own.pop(name) for name in list(own) if name not in ("text_config", "num_labels")}
        own["vision_config"] = {**TINY, **tower}
    else:
        own = {**TINY, **own}
    model = model_class(model_class.config_class(**own), **arguments).eval()
    std = 0.3 * (32 / fields.get("hidden_size", 32)) ** 0.5  # scores of the attention stay where it is not chaotic
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=float("norm" in name and name.endswith("weight")), std=std)
    return model


def opened(source: Path, **options: Any) -> tuple[Checkpoint, nn.Module]:
    """Open a checkpoint, and build our model with its weights; in eval."""
    checkpoint = open_checkpoint(source, Options(**options))
    ours = model_class(checkpoint.architecture)(checkpoint.config).eval()
    ours.load_state_dict(checkpoint.state_dict(), strict=True)
    return checkpoint, ours


@torch.no_grad()
def outputs(stock: nn.Module, ours: nn.Module, pixel_values: Tensor, **arguments: Any) -> list[tuple[Tensor, Tensor]]:
    """Return everything that both models compute, stock's and ours."""
    if type(stock).__name__.startswith("ViTMAE"):
        patches = ours.config.grid_of(*pixel_values.shape[-2:])
        noise = torch.arange(float(patches[0] * patches[1])).expand(len(pixel_values), -1)  # shuffles nothing
        stock, arguments = getattr(stock, "vit", stock), {"noise": noise, **arguments}
    elif type(ours).__name__ == "HFViTForMaskedImageModeling":
        arguments["bool_masked_pos"] = torch.rand(len(pixel_values), 16) > 0.5
    elif type(ours).__name__ == "HFViTModel" and hasattr(stock, "vision_model"):
        stock = stock.vision_model  # of two towers
    expected = stock(pixel_values, **arguments)
    got = ours(pixel_values, **{name: arguments[name] for name in arguments if name == "bool_masked_pos"})
    names = ("logits", "reconstruction", "last_hidden_state", "pooler_output")
    pairs = [(expected[name], got[name]) for name in names if expected.get(name) is not None]
    assert pairs
    return pairs


def assert_equal_outputs(
    stock: nn.Module, ours: nn.Module, pixel_values: Tensor | None = None, **arguments: Any
) -> None:
    pixel_values = torch.randn(2, 3, 32, 32) if pixel_values is None else pixel_values
    for expected, got in outputs(stock, ours, pixel_values, **arguments):
        assert got.shape == expected.shape
        assert (got - expected).norm() / expected.norm() < 1e-5


# ------------------------------------------------------------------------------------------------------ every class


@every_case
@pytest.mark.parametrize("is_old", [True, False], ids=["names on the Hub", "names in memory"])
def test_outputs_are_stock_s(case, is_old, tmp_path):
    stock = stock_model(case)
    stock.save_pretrained(tmp_path, save_original_format=is_old)
    checkpoint, ours = opened(tmp_path)
    assert checkpoint.family == "transformers" and not checkpoint.assumed
    assert_equal_outputs(stock, ours)


@every_case
def test_rules_give_the_file_back_bit_for_bit(case, tmp_path):
    stock_model(case).save_pretrained(tmp_path)
    checkpoint, ours = opened(tmp_path)
    state, stored = ours.state_dict(), load_file(tmp_path / "model.safetensors")
    written = set()
    for rule in checkpoint.rules:
        for name, tensor in zip(rule.theirs, rule.layout.write([state[name] for name in rule.ours]), strict=True):
            assert torch.equal(tensor, stored[name]), name
            written.add(name)
    assert written | set(checkpoint.left_out) == stored.keys()


OTHER_SIZE = ("ViT", "DeiT", "DINOv2", "DINOv2 with registers", "DINOv3, gated", "MAE", "MSN", "SigLIP, tower")
OTHER_SIZE = (*OTHER_SIZE, "CLIP, tower", "ViT, classifier", "DeiT, two classifiers", "DINOv2, classifier")


@pytest.mark.parametrize("case", OTHER_SIZE)
def test_another_resolution_is_stock_s_interpolation(case, tmp_path):
    stock = stock_model(case)
    stock.save_pretrained(tmp_path)
    always = case.startswith("DINO")
    arguments = {} if always else {"interpolate_pos_encoding": True}
    pixel_values = torch.randn(2, 3, 40, 56)
    _, ours = opened(tmp_path)
    assert_equal_outputs(stock, ours, pixel_values, **arguments)
    checkpoint, ours = opened(tmp_path, image_size=(40, 56))
    assert checkpoint.config.grid_size == (5, 7)
    assert_equal_outputs(stock, ours, pixel_values, **arguments)


@pytest.mark.parametrize("case", ["ViT", "ViT, classifier", "DeiT", "MSN"])
@pytest.mark.parametrize("patch_size", [8, (8, 16)])
def test_rectangles_are_read(case, patch_size, tmp_path):
    stock = stock_model(case, image_size=(32, 48), patch_size=patch_size)
    stock.save_pretrained(tmp_path)
    checkpoint, ours = opened(tmp_path)
    assert checkpoint.config.image_shape == (32, 48)
    assert_equal_outputs(stock, ours, torch.randn(2, 3, 32, 48))


# ------------------------------------------------------------------------------------------------------------ files


def test_shards_are_read(tmp_path):
    stock = stock_model("ViT, classifier")
    stock.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_equal_outputs(stock, opened(tmp_path)[1])


@pytest.mark.parametrize("case", ["ViT, classifier", "DeiT, two classifiers", "CLIP, both towers"])
def test_pickles_are_read(case, tmp_path):
    stock = stock_model(case)
    stock.config.save_pretrained(tmp_path)
    torch.save(stock.state_dict(), tmp_path / "pytorch_model.bin")
    assert_equal_outputs(stock, opened(tmp_path)[1])
    assert_equal_outputs(stock, opened(tmp_path / "pytorch_model.bin")[1])


@pytest.mark.parametrize("is_old", [True, False])
@pytest.mark.parametrize(
    "case", ["ViT", "ViT, classifier", "ViT without biases", "ViT, masked", "DeiT", "DeiT, two classifiers"]
)
def test_a_vit_without_config_is_read(case, is_old, tmp_path):
    stock = stock_model(case, hidden_size=128, num_attention_heads=2)
    stock.save_pretrained(tmp_path, save_original_format=is_old)
    (tmp_path / "config.json").unlink()
    options = {"layer_norm_eps": 1e-6} if case == "ViT, classifier" else {}
    checkpoint, ours = opened(tmp_path / "model.safetensors", **options)
    assert any("2 heads" in sentence and "--num-heads" in sentence for sentence in checkpoint.assumed)
    assert_equal_outputs(stock, ours)


def test_heads_that_nothing_says_are_asked_for(tmp_path):
    stock = stock_model("ViT")
    save_file(stock.state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"weights\.safetensors: .*--num-heads"):
        open_checkpoint(tmp_path / "weights.safetensors")
    checkpoint, ours = opened(tmp_path / "weights.safetensors", num_heads=4)
    assert not any("heads" in sentence for sentence in checkpoint.assumed)
    assert_equal_outputs(stock, ours)


def test_a_rectangle_that_nothing_says_is_asked_for(tmp_path):
    stock = stock_model("ViT", image_size=(32, 48))
    save_file(stock.state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"weights\.safetensors: .*--image-size"):
        open_checkpoint(tmp_path / "weights.safetensors", Options(num_heads=4))
    _, ours = opened(tmp_path / "weights.safetensors", num_heads=4, image_size=(32, 48))
    assert_equal_outputs(stock, ours, torch.randn(2, 3, 32, 48))


@pytest.mark.parametrize("case", ["ViT, classifier", "DINOv3, gated", "CLIP, tower"])
def test_bfloat16_stays(case, tmp_path):
    stock = stock_model(case)
    stock.to(torch.bfloat16).save_pretrained(tmp_path)
    checkpoint, ours = opened(tmp_path)
    assert {tensor.dtype for tensor in checkpoint.state_dict().values()} == {torch.bfloat16}
    in_float32 = type(stock).from_pretrained(tmp_path, dtype=torch.float32)
    assert_equal_outputs(in_float32.eval(), ours.float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("vit.layernorm.weight"), r"missing: 'vit\.layernorm\.weight'"),
        (lambda state: state.update({"vit.stranger": torch.ones(1)}), r"no place for the tensors 'vit\.stranger'"),
        (lambda state: state.update({"classifier.bias": torch.ones(4)}), r"'classifier\.bias' \[4\]"),
    ],
)
def test_what_does_not_fit_is_named(change, message, tmp_path):
    stock = stock_model("ViT, classifier")
    stock.config.save_pretrained(tmp_path)
    state = stock.state_dict()
    change(state)
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path).state_dict()


# ---------------------------------------------------------------------------------------------------------- configs


def edit_config(folder: Path, change: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_activation_epsilon_and_labels_are_the_config_s(tmp_path):
    names = {0: "cat", 1: "dog", 2: "owl"}
    stock = stock_model(
        "ViT, classifier",
        hidden_act="gelu_new",
        layer_norm_eps=1e-2,
        num_labels=3,
        id2label=names,
        label2id={name: number for number, name in names.items()},
        problem_type="multi_label_classification",
    )
    stock.save_pretrained(tmp_path)
    checkpoint, ours = opened(tmp_path)
    config = checkpoint.config
    assert (config.hidden_act, config.layer_norm_eps, config.num_labels) == ("gelu_new", 1e-2, 3)
    assert (config.id2label, config.label2id["owl"]) == (names, 2)
    assert config.problem_type == "multi_label_classification"
    assert_equal_outputs(stock, ours)
    checkpoint, _ = opened(tmp_path, hidden_act="relu", layer_norm_eps=1e-3)
    assert (checkpoint.config.hidden_act, checkpoint.config.layer_norm_eps) == ("relu", 1e-3)


@pytest.mark.parametrize("case", ["CLIP, both towers", "SigLIP, both towers"])
def test_what_a_vision_config_leaves_out_is_stock_s_default(case, tmp_path):
    stock = stock_model(case)
    stock.save_pretrained(tmp_path)

    def shorten(config: dict[str, Any]) -> None:
        config["vision_config"] = {name: config["vision_config"][name] for name in TINY}
        del config["text_config"]

    edit_config(tmp_path, shorten)
    checkpoint, ours = opened(tmp_path)
    assert checkpoint.config.hidden_act == {"C": "quick_gelu", "S": "gelu_pytorch_tanh"}[case[0]]
    assert_equal_outputs(stock, ours)


def test_a_config_of_an_older_transformers_is_read(tmp_path):
    stock = stock_model("ViT, classifier")
    stock.save_pretrained(tmp_path)

    def age(config: dict[str, Any]) -> None:
        for name in ("dtype", "pooler_act", "pooler_output_size", "encoder_stride"):
            config.pop(name, None)
        config.update(torch_dtype="float32", transformers_version="4.13.0.dev0")

    edit_config(tmp_path, age)
    assert_equal_outputs(stock, opened(tmp_path)[1])


def test_a_biased_query_alone_is_refused(tmp_path):
    stock_model("DINOv3").save_pretrained(tmp_path)
    edit_config(tmp_path, lambda config: config.update(value_bias=False))
    with pytest.raises(ValueError, match="a bias of only queries or only values"):
        open_checkpoint(tmp_path)


# ------------------------------------------------------------------------------------------------------- processors

PROCESSORS = {
    "ViT": transformers.ViTImageProcessorPil(
        size={"height": 32, "width": 32},
        image_mean=[0.4, 0.5, 0.6],
        image_std=[0.2, 0.3, 0.4],
        resample=Image.Resampling.BICUBIC,
    ),
    "CLIP": transformers.CLIPImageProcessorPil(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}),
    "SigLIP": transformers.SiglipImageProcessorPil(size={"height": 32, "width": 32}),
    "DINOv2": transformers.BitImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}),
    "DeiT": transformers.DeiTImageProcessorPil(
        size={"height": 40, "width": 40}, crop_size={"height": 32, "width": 32}
    ),
}


@pytest.mark.parametrize("is_nested", [False, True], ids=["preprocessor_config.json", "processor_config.json"])
@pytest.mark.parametrize("kind", PROCESSORS)
def test_the_processor_is_carried(kind, is_nested, tmp_path):
    stock = PROCESSORS[kind]
    stock_model("ViT").save_pretrained(tmp_path)
    stock.save_pretrained(tmp_path)
    if is_nested:
        (tmp_path / "preprocessor_config.json").unlink()
        content = {"image_processor": stock.to_dict(), "processor_class": "SiglipProcessor"}
        (tmp_path / "processor_config.json").write_text(json.dumps(content))
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((140, 100))
    processor = open_checkpoint(tmp_path).processor()
    expected = stock(image, return_tensors="pt").pixel_values
    got = processor(image, return_tensors="pt").pixel_values
    assert got.shape == (1, 3, 32, 32)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_a_processor_of_an_older_transformers_is_carried(tmp_path):
    stock_model("ViT").save_pretrained(tmp_path)
    content = {"feature_extractor_type": "ViTFeatureExtractor", "size": 32, "resample": 2, "do_normalize": True}
    content.update(do_resize=True, image_mean=[0.5] * 3, image_std=[0.25] * 3)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    image = Image.fromarray(np.full((50, 70, 3), 255, dtype=np.uint8))
    pixel_values = open_checkpoint(tmp_path).processor()(image, return_tensors="pt").pixel_values
    torch.testing.assert_close(pixel_values, torch.full((1, 3, 32, 32), 2.0))


def test_without_a_processor_the_paper_s_preprocessing_is_taken(tmp_path):
    stock_model("ViT").save_pretrained(tmp_path)
    processor = open_checkpoint(tmp_path).processor()
    assert (list(processor.image_mean), list(processor.image_std)) == ([0.5] * 3, [0.5] * 3)
    assert (processor.size["height"], processor.size["width"]) == (32, 32)


@pytest.mark.parametrize("name", ["Siglip2VisionModel", "Siglip2ForImageClassification"])
def test_siglip_2_packs_images_of_any_size(name, tmp_path):
    tower = {**{key: TINY[key] for key in TINY if key != "image_size"}, "num_patches": 16}
    outer = {"text_config": TEXT, "vision_config": tower, **LABELS} if name.endswith("Classification") else tower
    stock = getattr(transformers, name)(getattr(transformers, name).config_class(**outer)).eval()
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.normal_(std=0.3)
    stock.save_pretrained(tmp_path)
    transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=20).save_pretrained(tmp_path)
    checkpoint, ours = opened(tmp_path)
    assert any("set packing=20" in sentence for sentence in checkpoint.assumed)
    assert checkpoint.config.image_shape == (32, 32)
    processor = checkpoint.processor()
    assert (processor.packing, processor.size["height"], processor.image_mean[0]) == (None, 32, 0.5)
    processor.do_resize, processor.packing = False, 20
    images = [np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((32, 32), (40, 16))]
    theirs = transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=20, do_resize=False)
    with torch.no_grad():
        expected = stock(**theirs(images, return_tensors="pt"))
        got = ours(**processor(images, return_tensors="pt"))
    key = "logits" if "logits" in expected else "pooler_output"
    assert (got[key] - expected[key]).norm() / expected[key].norm() < 1e-5
