"""What is said of files that are no checkpoints: what they are, and what to do."""

import io
import json
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_vit.checkpoints import open_checkpoint


def archive(*names: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for name in names:
            file.writestr(name, b"x")
    return content.getvalue()


FILES: dict[str, tuple[str, bytes, str]] = {
    "empty": ("m.pth", b"", "an empty file.*Download or copy it again"),
    "Git LFS": ("m.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "Git LFS.*git lfs pull"),
    "HTML": ("m.bin", b"\n<!DOCTYPE html><html>", "a web page.*Download the file itself"),
    "HDF5": ("m.h5", b"\x89HDF\r\n\x1a\n", "an HDF5 file of Keras or TensorFlow.*Load it with its library"),
    "Keras": ("m.keras", archive("config.json", "model.weights.h5"), "a model of Keras.*Load it with Keras"),
    "GGUF": ("m.gguf", b"GGUF\x03\0\0\0", "a GGUF file.*safetensors that it was made from"),
    "flax": ("flax_model.msgpack", b"\x83\xa6params", "a msgpack file of flax.*Use the safetensors"),
    "an archive": ("m.zip", archive("run/model.pth"), r"a zip archive of other files \(run/model.pth\). Unpack it"),
    "TorchScript": (
        *("m.pt", archive("m/data.pkl", "m/constants.pkl")),
        r"a TorchScript archive.*torch.jit.load\('m.pt'\).state_dict\(\)",
    ),
    "torch.export": ("m.pt2", archive("m/archive_format", "m/models/model.json"), r"torch.export.load\('m.pt2'\)"),
    "gzip": ("m.tar.gz", b"\x1f\x8b\x08", "a compressed archive.*Unpack it"),
    "something else": ("m.txt", b"hello", "expected safetensors, npz, or a file written by torch.save"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_of_another_kind_is_named_with_a_remedy(tmp_path: Path, kind: str) -> None:
    name, content, message = FILES[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        open_checkpoint(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_the_tensors_of_an_onnx_graph_are_named(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    tensor = onnx.helper.make_tensor("blocks.0.norm1.weight", onnx.TensorProto.FLOAT, [1], [1.0])
    other = onnx.helper.make_tensor("onnx::MatMul_7", onnx.TensorProto.FLOAT, [1], [1.0])
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], [tensor, other])), tmp_path / "m.onnx")
    with pytest.raises(ValueError, match=r"holds 2 tensors and names 1 of them \(blocks.0.norm1.weight\).*torch.save"):
        open_checkpoint(tmp_path / "m.onnx")


def test_an_adapter_is_named_with_its_base(tmp_path: Path) -> None:
    save_file({"base_model.model.lora_A.weight": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "google/vit"}))
    for source in (tmp_path, tmp_path / "adapter_model.safetensors"):
        with pytest.raises(ValueError, match=r"an adapter of google/vit, not a whole model. Load both with peft"):
            open_checkpoint(source)


def test_the_weights_of_another_name_are_pointed_out(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "best.pth")
    with pytest.raises(ValueError, match=r"no weights found.*Pass the path of a file or folder, such as .*best.pth"):
        open_checkpoint(tmp_path)


FOLDERS = {
    "shards of FSDP": ("__0_0.distcp", r"format_utils dcp_to_torch \S+ weights.pth"),
    "shards of FSDP by Accelerate": ("pytorch_model_fsdp_0/__0_0.distcp", "format_utils dcp_to_torch"),
    "DeepSpeed": ("zero_to_fp32.py", r"Merge it: python \S+zero_to_fp32.py \S+ NEW_FOLDER"),
    "a run of Trainer": ("checkpoint-500/model.safetensors", r"or folder, such as \S+/checkpoint-500\."),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_without_weights_is_named_with_a_remedy(tmp_path: Path, kind: str) -> None:
    file, message = FOLDERS[kind]
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_bytes(b"")
    with pytest.raises(ValueError, match=f"no weights found.*{message}"):
        open_checkpoint(tmp_path)


def test_a_model_type_that_is_not_supported_is_named(tmp_path: Path) -> None:
    save_file({"embeddings.cls_token": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dpt"}))
    with pytest.raises(ValueError, match="a model of type 'dpt', which is not supported"):
        open_checkpoint(tmp_path)


NAMES = {
    "weight": "a head without its encoder",
    "layer.0.query.lora_A.default.weight": r"an adapter \(LoRA\) that is not merged.*merge_and_unload",
    "blocks.0.attn.qkv.base_layer.weight": "an adapter",
    "blocks.0.attn.qkv.parametrizations.weight.original": "remove_parametrizations",
    "layer.0.query.SCB": "quantized: use the checkpoint that they were made from",
    "optimizer > 0 > exp_avg": "the state of an optimizer",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_s_name_says_what_a_file_is(tmp_path: Path, name: str) -> None:
    save_file({name: torch.ones(1)}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=NAMES[name]):
        open_checkpoint(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    "names",
    [
        ["vision_model.embeddings.class_embedding", "vision_model.embeddings.position_embedding.weight"],
        ["embeddings.cls_token", "embeddings.position_embeddings", "encoder.layer.0.layer_scale1.lambda1"],
    ],
    ids=["CLIP", "DINOv2"],
)
def test_a_file_of_transformers_needs_its_config(tmp_path: Path, names: list[str]) -> None:
    save_file({name: torch.ones(1) for name in names}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"names of transformers.*put the config.json of the model beside the file"):
        open_checkpoint(tmp_path / "m.safetensors")
