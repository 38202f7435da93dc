"""Checkpoints of all families at the border: what is damaged is refused by name, what is read is a model of ours.

What each family's tensors mean is tested in a file of its own.
"""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import timm
import torch
import transformers
from family import TINY
from isolated import python
from PIL import Image
from safetensors.torch import load_file, save_file
from test_checkpoints_google import Golden
from timm.models._hub import save_for_hf
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTConfig, pipeline
from transformers import ViTForImageClassification as StockClassifier
from typer.testing import CliRunner
from vit_pytorch import vit

import hf_vit.checkpoints.export
import hf_vit.checkpoints.folder
import hf_vit.checkpoints.from_pretrained
from hf_vit import (
    HFViTBackbone,
    HFViTConfig,
    HFViTForImageClassification,
    HFViTForMaskedImageModeling,
    HFViTImageProcessor,
    HFViTModel,
)
from hf_vit.checkpoints import Options, open_checkpoint
from hf_vit.checkpoints.models import load_classifier
from hf_vit.cli.main import app

runner = CliRunner()
State = dict[str, Tensor]


class Kind(NamedTuple):
    """A family in one kind of file: a classifier's tensors, how they are written, and what must be said of them."""

    state: State
    write: Callable[[State, Path], Path]
    options: list[str]
    logits: Callable[[Tensor], Tensor]


def filled(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=float("norm" in name and name.endswith("weight")), std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    folder = tmp_path_factory.mktemp("kinds")
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 8}
    stock = StockClassifier(
        ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, num_labels=5, **sizes
        )
    )
    of_timm = timm.create_model(
        "vit_base_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=5
    )
    lucid = vit.ViT(num_classes=5, dim=48, depth=2, heads=2, dim_head=16, mlp_dim=40, **sizes)
    filled(stock).save_pretrained(folder / "transformers")
    save_for_hf(filled(of_timm), str(folder / "timm"), safe_serialization=True)
    golden = Golden("google_token_pre_logits")
    arrays = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in golden.arrays.items()}

    def beside(source: Path) -> Callable[[State, Path], Path]:
        def write(state: State, place: Path) -> Path:
            shutil.copytree(source, place)
            save_file(state, place / "model.safetensors")
            return place

        return write

    def file(name: str, save: Callable[[State, Path], Any]) -> Callable[[State, Path], Path]:
        def write(state: State, place: Path) -> Path:
            place.mkdir()
            save(state, place / name)
            return place / name

        return write

    def save_npz(state: State, path: Path) -> None:
        np.savez(path, **{name: tensor.numpy() for name, tensor in state.items()})

    stored = load_file(folder / "transformers" / "model.safetensors")
    return {
        "transformers": Kind(stored, beside(folder / "transformers"), [], lambda pixels: stock(pixels).logits),
        "timm": Kind(dict(of_timm.state_dict()), beside(folder / "timm"), [], of_timm),
        "timm, bare": Kind(
            dict(of_timm.state_dict()), file("model.safetensors", save_file), ["--num-heads", "4"], of_timm
        ),
        "vit-pytorch": Kind(
            dict(filled(lucid).state_dict()), file("model.pt", torch.save), ["--num-heads", "2"], lucid
        ),
        "google": Kind(arrays, file("ViT.npz", save_npz), [], lambda pixels: golden.runs[0][2]),
    }


NAMES = ["transformers", "timm", "timm, bare", "vit-pytorch", "google"]
every_kind = pytest.mark.parametrize("name", NAMES)


@pytest.fixture
def kind(kinds: dict[str, Kind], name: str) -> Kind:
    return kinds[name]


def options_of(kind: Kind) -> Options:
    return Options(num_heads=int(kind.options[1])) if kind.options else Options()


def refusal(kind: Kind, state: State, place: Path) -> str:
    """Return why a changed checkpoint is refused; the message names the file."""
    path = kind.write(state, place)
    with pytest.raises(ValueError) as refused:
        open_checkpoint(path, options_of(kind))
    shutil.rmtree(place)
    assert str(path) in str(refused.value)
    return str(refused.value)


def weights_of(path: Path) -> Path:
    return path / "model.safetensors" if path.is_dir() else path


# ------------------------------------------------------------------------------------------ tensors that do not fit


@every_kind
def test_every_missing_tensor_is_named(kind: Kind, tmp_path: Path) -> None:
    for name in kind.state:
        rest = {other: tensor for other, tensor in kind.state.items() if other != name}
        assert repr(name) in refusal(kind, rest, tmp_path / "model")


@every_kind
def test_every_tensor_with_one_row_more_is_named(kind: Kind, tmp_path: Path) -> None:
    for name, tensor in kind.state.items():
        axis = 3 if name == "embedding/kernel" else 0  # its rows are those of a patch: there would be more pixels
        more = torch.cat([tensor, tensor.narrow(axis, 0, 1)], dim=axis)
        assert repr(name) in refusal(kind, {**kind.state, name: more}, tmp_path / "model")


@every_kind
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_every_tensor_that_is_no_float_is_named(kind: Kind, dtype: torch.dtype, tmp_path: Path) -> None:
    for name in list(kind.state)[:: len(kind.state) // 3]:
        changed = {**kind.state, name: kind.state[name].to(dtype)}
        assert repr(name) in refusal(kind, changed, tmp_path / "model")


@every_kind
def test_scalars_in_place_of_tensors_are_refused(kind: Kind, tmp_path: Path) -> None:
    for name, tensor in list(kind.state.items())[::2]:
        assert repr(name) in refusal(kind, {**kind.state, name: tensor.flatten()[0].clone()}, tmp_path / "model")


@every_kind
@pytest.mark.parametrize("stranger", ["stranger.weight", "blocks.7.stranger", "vit.layers.0.stranger", "head/extra"])
def test_a_stranger_is_named(kind: Kind, stranger: str, tmp_path: Path) -> None:
    assert repr(stranger) in refusal(kind, {**kind.state, stranger: torch.ones(3)}, tmp_path / "model")


def test_numbers_damaged_in_the_midst_are_named(kinds: dict[str, Kind], tmp_path: Path) -> None:
    path = tmp_path / "packed.npz"
    state = kinds["google"].state
    np.savez_compressed(path, **{name: tensor.numpy() for name, tensor in state.items()})
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 64] = bytes(64)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"packed\.npz.*: '?.*'? cannot be read|packed\.npz: corrupt"):
        open_checkpoint(path).state_dict()


# ------------------------------------------------------------------------------------------------ files that are none


class Code:
    """What runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def assert_refused(tmp_path: Path, source: Path | str, *options: str) -> str:
    """Convert by the command, which must write nothing, and say in one line why; return that."""
    before = sorted(tmp_path.rglob("*"))
    result = runner.invoke(app, ["convert", str(source), str(tmp_path / "below" / "out"), *options])
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    return result.stderr


@every_kind
def test_a_truncated_file_is_refused(kind: Kind, tmp_path: Path) -> None:
    path = kind.write(kind.state, tmp_path / "model")
    file = weights_of(path)
    data = file.read_bytes()
    for length in (0, 3, 8, 9, 50, 1000, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:length])
        assert str(file) in assert_refused(tmp_path, path, *kind.options)


def test_a_truncated_file_of_an_old_torch_is_refused(kinds: dict[str, Kind], tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save(kinds["vit-pytorch"].state, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    open_checkpoint(path, Options(num_heads=2)).state_dict()
    for length in (1, 3, 9, 50, 1000, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        assert str(path) in assert_refused(tmp_path, path)


@every_kind
def test_code_is_not_run(kind: Kind, tmp_path: Path) -> None:
    path, marker = kind.write(kind.state, tmp_path / "model"), tmp_path / "marker"
    code = {**kind.state, "code": Code(marker)}
    for protocol in (2, 4):
        weights_of(path).write_bytes(pickle.dumps(Code(marker), protocol))
        assert str(weights_of(path)) in assert_refused(tmp_path, path)
    for is_zip in (True, False):
        torch.save(code, weights_of(path), _use_new_zipfile_serialization=is_zip)
        assert str(weights_of(path)) in assert_refused(tmp_path, path)
    torch.save(nn.Linear(2, 2), weights_of(path))
    assert str(weights_of(path)) in assert_refused(tmp_path, path)
    assert not marker.exists()


@every_kind
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a text\n", "not a checkpoint; expected safetensors, npz"),
        ("<!DOCTYPE html><html></html>\n", "a web page, as a failed download leaves it, not a checkpoint"),
        ("version https://git-lfs.github.com/", "a Git LFS pointer, which stands for the weights, not a checkpoint"),
    ],
)
def test_texts_are_refused(kind: Kind, content: str, message: str, tmp_path: Path) -> None:
    path = kind.write(kind.state, tmp_path / "model")
    weights_of(path).write_text(content)
    assert message in assert_refused(tmp_path, path)


def test_places_without_weights_are_refused(kinds: dict[str, Kind], tmp_path: Path) -> None:
    path = kinds["transformers"].write(kinds["transformers"].state, tmp_path / "model")
    (path / "model.safetensors").unlink()
    assert "no weights found" in assert_refused(tmp_path, path)
    for nowhere in (tmp_path / "nowhere", "./nowhere", "weights.npz", "a/b/c"):
        assert f"No such file or folder: {nowhere}" in assert_refused(tmp_path, nowhere)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not JSON"),
        ("[]", "expected a JSON object"),
        ({"weight_map": ["a"]}, "expected a weight_map"),
        ({"weight_map": {"a": 1}}, "expected a weight_map"),
        ({"weight_map": {}}, "these shards are missing: all, since it names none"),
        ({"weight_map": {"a": "no.safetensors"}}, "these shards are missing: no.safetensors"),
        ({"weight_map": {"a": "../other/model.safetensors"}}, "is outside of the folder"),
        ({"weight_map": {"a": "/etc/passwd"}}, "is outside of the folder"),
        ({"weight_map": {"a": ".."}}, "is outside of the folder"),
    ],
)
def test_an_index_of_other_files_is_refused(kinds: dict[str, Kind], index: Any, message: str, tmp_path: Path) -> None:
    kind = kinds["transformers"]
    kind.write(kind.state, tmp_path / "other")
    path = kind.write(kind.state, tmp_path / "model")
    (path / "model.safetensors").unlink()
    file = path / "model.safetensors.index.json"
    file.write_text(index if isinstance(index, str) else json.dumps(index))
    error = assert_refused(tmp_path, path)
    assert str(file) in error and message in error


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("transformers", "{", "config.json: not JSON"),
        ("transformers", "[]", "config.json: expected a JSON object"),
        ("transformers", {"num_hidden_layers": 3}, "missing: 'vit.encoder.layer.2."),
        ("transformers", {"num_hidden_layers": 1}, "no place for the tensors 'vit.encoder.layer.1."),
        ("transformers", {"num_hidden_layers": 0}, "num_hidden_layers must be at least 1"),
        ("transformers", {"hidden_size": 64}, "[1, 1, 32]"),
        ("transformers", {"hidden_size": "wide"}, "hidden_size"),
        ("transformers", {"num_attention_heads": 5}, "num_attention_heads=5"),
        ("transformers", {"intermediate_size": 32}, "'vit.encoder.layer.0.intermediate.dense.weight' [64, 32]"),
        ("transformers", {"image_size": 64}, "'vit.embeddings.position_embeddings' [1, 17, 32]"),
        ("transformers", {"id2label": {"0": "a"}}, "'classifier.weight' [5, 32]"),
        ("transformers", {"model_type": "bert"}, "states a model of type 'bert', which is not supported"),
        ("transformers", {"model_type": ["vit"]}, "not as expected"),
        ("timm", {"model_args": 3}, "not as expected"),
        ("timm", {"model_args": {"num_heads": 5}}, "5 heads do not divide a width of 32"),
        ("timm", {"model_args": {"num_heads": "many"}}, "not as expected"),
    ],
)
def test_a_config_that_contradicts_is_refused(kind: Kind, changed: Any, message: str, tmp_path: Path) -> None:
    path = kind.write(kind.state, tmp_path / "model")
    file = path / "config.json"
    file.write_text(changed if isinstance(changed, str) else json.dumps({**json.loads(file.read_text()), **changed}))
    error = assert_refused(tmp_path, path)
    assert str(path) in error and message in error


# ---------------------------------------------------------------------------------------------------------- commands


def facts(output: str) -> dict[str, str]:
    """Read what `inspect` and `convert` print of a model."""
    lines = (line.strip() for line in output.splitlines() if line.startswith(" "))
    pairs = (line.split("  ", 1) for line in lines if "  " in line)  # without continued sentences
    return {name: fact.strip() for name, fact in pairs}


@every_kind
def test_convert_writes_a_folder_that_transformers_reads(kind: Kind, name: str, tmp_path: Path) -> None:
    path, out = kind.write(kind.state, tmp_path / "model"), tmp_path / "out"
    result = runner.invoke(app, ["convert", str(path), str(out), *kind.options])
    assert result.exit_code == 0, result.output
    model = AutoModelForImageClassification.from_pretrained(out).eval()
    assert isinstance(model, HFViTForImageClassification)
    said = facts(result.output)
    number = sum(parameter.numel() for parameter in model.parameters())
    assert said["family"] == {"timm, bare": "timm", "google": "google npz"}.get(name, name)
    assert said["variant"] == "of no standard size"
    assert (said["image size"], said["pooling"], said["labels"]) == ("32x32", "cls", "5")
    assert said["heads"].startswith(f"{model.config.num_attention_heads}, width ")
    assert f"{number:,}" in said["parameters"]
    pixels = Golden("google_token_pre_logits").runs[0][1] if name == "google" else torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected, got = kind.logits(pixels), model(pixels).logits
    assert (got - expected).norm() / expected.norm() < 1e-5
    image = Image.new("RGB", (50, 40), "teal")
    assert AutoImageProcessor.from_pretrained(out)(image, return_tensors="pt").pixel_values.shape == (1, 3, 32, 32)
    assert len(pipeline("image-classification", str(out))(image)) == 5

    before = sorted(tmp_path.rglob("*"))
    inspected = runner.invoke(app, ["inspect", str(path), *kind.options])
    assert inspected.exit_code == 0 and facts(inspected.output) == said
    own = facts(runner.invoke(app, ["inspect", str(out)]).output)
    assert own.pop("family") == "hf_vit"
    assert own == {fact: value for fact, value in said.items() if fact != "family"}
    assert sorted(tmp_path.rglob("*")) == before


@every_kind
@pytest.mark.parametrize(("text", "size"), [("48", (48, 48)), ("24x40", (24, 40))])
def test_convert_at_another_size(kind: Kind, text: str, size: tuple[int, int], tmp_path: Path) -> None:
    path, out = kind.write(kind.state, tmp_path / "model"), tmp_path / "out"
    result = runner.invoke(app, ["convert", str(path), str(out), "--image-size", text, *kind.options])
    assert result.exit_code == 0, result.output
    model = HFViTForImageClassification.from_pretrained(out)
    assert model.config.image_shape == size
    processor = AutoImageProcessor.from_pretrained(out)
    assert processor(Image.new("RGB", (50, 40)), return_tensors="pt").pixel_values.shape == (1, 3, *size)
    if not kind.options:  # heads cannot be said to from_pretrained
        direct = HFViTForImageClassification.from_pretrained(path, image_size=size)
        assert_same_weights(model, direct)


def assert_same_weights(first: nn.Module, second: nn.Module) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@every_kind
def test_convert_with_a_new_head(kind: Kind, tmp_path: Path) -> None:
    path, out = kind.write(kind.state, tmp_path / "model"), tmp_path / "out"
    result = runner.invoke(app, ["convert", str(path), str(out), "--num-labels", "3", *kind.options])
    assert result.exit_code == 0, result.output
    model = HFViTForImageClassification.from_pretrained(out)
    assert model.config.num_labels == 3 and model.config.representation_size is None
    assert not model.classifier.weight.any() and not model.classifier.bias.any()
    whole = open_checkpoint(path, options_of(kind)).state_dict()
    kept = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("classifier.")}
    assert kept and all(torch.equal(tensor, whole[name]) for name, tensor in kept.items())


def test_what_lies_there_is_replaced_on_demand_alone(kinds: dict[str, Kind], tmp_path: Path) -> None:
    kind, out = kinds["transformers"], tmp_path / "out"
    path = kind.write(kind.state, tmp_path / "model")
    command = ["convert", str(path), str(out)]
    out.mkdir()
    assert runner.invoke(app, command).exit_code == 0  # into an empty folder
    (out / "model.safetensors").write_text("mine")
    (out / "notes.txt").touch()
    refused = runner.invoke(app, command)
    assert refused.exit_code == 2 and "--force" in refused.stderr
    assert (out / "model.safetensors").read_text() == "mine"
    assert runner.invoke(app, [*command, "--force"]).exit_code == 0
    assert not (out / "notes.txt").exists()
    HFViTForImageClassification.from_pretrained(out)
    (out / "config.json").unlink()
    refused = runner.invoke(app, [*command, "--force"])
    assert refused.exit_code == 2 and "no config.json" in refused.stderr
    assert (out / "model.safetensors").is_file()
    file = tmp_path / "file"
    file.write_text("mine")
    refused = runner.invoke(app, ["convert", str(path), str(file), "--force"])
    assert refused.exit_code == 2 and file.read_text() == "mine"
    assert {entry.name for entry in tmp_path.iterdir()} == {"model", "out", "file"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("No space left on device")])
@pytest.mark.parametrize("is_there", [True, False])
def test_what_is_interrupted_leaves_nothing(
    kinds: dict[str, Kind], error: Any, is_there: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kind = kinds["transformers"]
    path, out = kind.write(kind.state, tmp_path / "model"), tmp_path / "out"
    if is_there:
        assert runner.invoke(app, ["convert", str(path), str(out)]).exit_code == 0
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}

    def interrupt(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(hf_vit.checkpoints.folder, "verify", interrupt)
    assert runner.invoke(app, ["convert", str(path), str(out), "--force"]).exit_code != 0
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    assert out.exists() == is_there and not list(tmp_path.glob(".*"))


# --------------------------------------------------------------------------------------------------- from_pretrained


def stock(class_name: str = "ViTForImageClassification", **fields: Any) -> Any:
    model_class = getattr(transformers, class_name)
    return filled(model_class(ViTConfig(**{**TINY, **fields})))


def assert_equal(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape and expected.std() > 0
    assert (got - expected).norm() / expected.norm() < 1e-5


def save_shards(model: Any, folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2


def save_pickle(model: Any, folder: Path) -> None:
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


WAYS: dict[str, Callable[[Any, Path], None]] = {
    "old names": lambda model, folder: model.save_pretrained(folder),
    "new names": lambda model, folder: model.save_pretrained(folder, save_original_format=False),
    "shards": save_shards,
    "pytorch_model.bin": save_pickle,
}


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_every_class_of_ours_reads_stock_s(way: str, tmp_path: Path) -> None:
    pixels, mask = torch.randn(2, 3, 32, 32), torch.arange(16).expand(2, 16) % 3 == 0
    for name in ("classifier", "encoder", "masked"):
        (tmp_path / name).mkdir()
    theirs = stock(num_labels=5)
    WAYS[way](theirs, tmp_path / "classifier")
    expected = theirs(pixels, output_hidden_states=True)
    ours = HFViTForImageClassification.from_pretrained(tmp_path / "classifier")
    assert not ours.training and ours.name_or_path == str(tmp_path / "classifier")
    assert_equal(ours(pixels).logits, expected.logits)
    backbone = HFViTBackbone.from_pretrained(tmp_path / "classifier", out_features=["stage1"])
    (feature_map,) = backbone(pixels).feature_maps
    tokens = theirs.vit.layernorm(expected.hidden_states[1])[:, 1:]
    assert_equal(feature_map.flatten(2).transpose(1, 2), tokens)

    theirs = stock("ViTModel")
    WAYS[way](theirs, tmp_path / "encoder")
    expected = theirs(pixels)
    ours = HFViTModel.from_pretrained(tmp_path / "encoder")
    assert_equal(ours(pixels).last_hidden_state, expected.last_hidden_state)
    assert_equal(ours(pixels).pooler_output, expected.pooler_output)

    theirs = stock("ViTForMaskedImageModeling", encoder_stride=8)
    WAYS[way](theirs, tmp_path / "masked")
    ours = HFViTForMaskedImageModeling.from_pretrained(tmp_path / "masked")
    assert_equal(
        ours(pixels, bool_masked_pos=mask).reconstruction, theirs(pixels, bool_masked_pos=mask).reconstruction
    )


@pytest.mark.parametrize("name", ["timm", "google"])
def test_other_families_are_read(kind: Kind, name: str, tmp_path: Path) -> None:
    path = kind.write(kind.state, tmp_path / "model")
    pixels = Golden("google_token_pre_logits").runs[0][1]
    model = HFViTForImageClassification.from_pretrained(path)
    with torch.no_grad():
        assert_equal(model(pixels).logits, kind.logits(pixels))


def test_a_bare_file_of_torch_is_read(tmp_path: Path) -> None:
    model = filled(
        timm.create_model(
            "vit_base_patch16_224", img_size=32, embed_dim=128, depth=1, num_classes=5, patch_size=8, num_heads=2
        )
    )
    torch.save(
        {"state_dict": {f"module.{name}": tensor for name, tensor in model.state_dict().items()}}, tmp_path / "w.pth"
    )
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert_equal(HFViTForImageClassification.from_pretrained(tmp_path / "w.pth")(pixels).logits, model(pixels))


@pytest.mark.parametrize("name", ["google", "timm"])
def test_what_was_read_is_saved_and_read_again(kind: Kind, name: str, tmp_path: Path) -> None:
    model = HFViTForImageClassification.from_pretrained(kind.write(kind.state, tmp_path / "model"))
    model.save_pretrained(tmp_path / "own")
    assert_same_weights(HFViTForImageClassification.from_pretrained(tmp_path / "own"), model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock classifier of five named classes, with its processor."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("stock") / "model"
    names = dict(enumerate(["ant", "bee", "cat", "dog", "elk"]))
    stock(id2label=names, label2id={name: number for number, name in names.items()}).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    transformers.ViTImageProcessorPil(size=size, image_mean=[0.1, 0.2, 0.3]).save_pretrained(folder)
    return folder


def test_keywords_change_what_they_name(folder: Path) -> None:
    def load(**keywords: Any) -> Any:
        return HFViTForImageClassification.from_pretrained(folder, **keywords)

    plain = load()
    assert plain.config.id2label[4] == "elk" and plain.dtype == torch.float32
    assert plain.config.image_shape == (32, 32)
    larger, pixels = load(image_size=(40, 56)), torch.randn(2, 3, 40, 56)
    with torch.no_grad():
        expected = StockClassifier.from_pretrained(folder).eval()(pixels, interpolate_pos_encoding=True).logits
        assert larger.config.image_shape == (40, 56)
        assert_equal(larger(pixels).logits, expected)
    assert load(dtype=torch.bfloat16).dtype == load(dtype="bfloat16").dtype == torch.bfloat16
    assert_same_weights(load(device_map="cpu"), plain)
    model = load(drop_path_rate=0.25, attn_implementation="eager", id2label={n: str(n) for n in range(5)})
    assert (model.config.drop_path_rate, model.config._attn_implementation) == (0.25, "eager")
    assert model.config.id2label[4] == "4"
    assert_same_weights(model, plain)
    config = HFViTConfig.from_dict(plain.config.to_dict(), layer_norm_eps=1e-3)
    assert load(config=config).config.layer_norm_eps == 1e-3
    assert_same_weights(load(config=config), plain)


def test_a_head_of_other_labels_is_asked_for(folder: Path) -> None:
    with pytest.raises(RuntimeError, match=r"classifier|mismatched"):
        HFViTForImageClassification.from_pretrained(folder, num_labels=3)
    model, report = HFViTForImageClassification.from_pretrained(
        folder, num_labels=3, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {name for name, *_ in report["mismatched_keys"]} == {"classifier.weight", "classifier.bias"}
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.config.num_labels == 3 and not model.classifier.weight.any()


def test_what_is_missing_or_left_is_reported_as_by_stock(folder: Path, tmp_path: Path) -> None:
    stock("ViTModel").save_pretrained(tmp_path)
    for theirs, ours, source in (
        (StockClassifier, HFViTForImageClassification, folder),
        (transformers.ViTModel, HFViTModel, folder),
        (StockClassifier, HFViTForImageClassification, tmp_path),
    ):
        _, expected = theirs.from_pretrained(source, output_loading_info=True)
        _, got = ours.from_pretrained(source, output_loading_info=True)
        expected["missing_keys"] -= {
            "pooler.dense.weight",
            "pooler.dense.bias",
        }  # made up by stock, and left out by us
        assert {name for name in got["missing_keys"]} == expected["missing_keys"]
        expected["unexpected_keys"] -= {"pooler.dense.weight", "pooler.dense.bias"}
        assert not got["mismatched_keys"]
        assert {name for name in got["unexpected_keys"] if "pooler" not in name} == expected["unexpected_keys"]


def test_the_options_of_the_hub_are_passed_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def cached_file(name: str, file: str, **options: Any) -> str | None:
        asked.append({option: options.get(option) for option in ("revision", "token", "subfolder")})
        path = folder / file
        return str(path) if path.is_file() else None

    for module in (hf_vit.checkpoints.files, hf_vit.checkpoints.from_pretrained):
        monkeypatch.setattr(module, "cached_file", cached_file)
    options = {"revision": "v2", "token": "hf_token", "subfolder": "below"}
    model = HFViTForImageClassification.from_pretrained("someone/model", **options)
    assert model.config.id2label[4] == "elk" and model.name_or_path == "someone/model"
    assert len(asked) > 2 and all(request == options for request in asked)


def test_a_subfolder_is_read(folder: Path) -> None:
    model = HFViTForImageClassification.from_pretrained(folder.parent, subfolder=folder.name)
    assert_same_weights(model, HFViTForImageClassification.from_pretrained(folder))


def test_an_own_folder_is_transformers_matter(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = HFViTForImageClassification.from_pretrained(folder)
    model.save_pretrained(tmp_path / "own")

    def refuse(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError("read as another library's")

    monkeypatch.setattr(hf_vit.checkpoints.from_pretrained, "open_checkpoint", refuse)
    assert_same_weights(HFViTForImageClassification.from_pretrained(tmp_path / "own"), model)


USER = """
import sys, torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

own, stock, out = sys.argv[1:]
model = AutoModelForImageClassification.from_pretrained(own, trust_remote_code=True).eval()
AutoImageProcessor.from_pretrained(own, trust_remote_code=True)
pixels = torch.load(out + "/pixels.pt")
torch.save(model(pixels).logits.detach(), out + "/logits.pt")
assert type(model).__module__.startswith("transformers_modules")
try:
    loaded, report = type(model).from_pretrained(stock, output_loading_info=True)
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.slow
def test_what_was_read_travels_without_the_package(folder: Path, tmp_path: Path, one_thread: None) -> None:
    pixels = torch.randn(2, 3, 32, 32)
    model, processor = load_classifier(folder, ["ant", "bee", "cat", "dog", "elk"])
    model.save_pretrained(tmp_path / "own")
    processor.save_pretrained(tmp_path / "own")
    assert list(HFViTImageProcessor.from_pretrained(tmp_path / "own").image_mean) == [0.1, 0.2, 0.3]
    torch.save(pixels, tmp_path / "pixels.pt")
    done = python(USER, tmp_path / "own", folder, tmp_path, home=tmp_path / "user")
    assert torch.equal(torch.load(tmp_path / "logits.pt"), model.eval()(pixels).logits)
    assert done.stdout.startswith("RuntimeError")  # without the readers; MISSING and MISMATCH are listed


@pytest.mark.parametrize("name", ["transformers", "timm", "google"])
def test_fine_tuning_begins_from_any_family(kind: Kind, name: str, tmp_path: Path) -> None:
    path = kind.write(kind.state, tmp_path / "model")
    whole = open_checkpoint(path).state_dict()
    model, processor = load_classifier(path, ["a", "b", "c"], image_size=48)
    assert (model.config.num_labels, model.config.image_shape) == (3, (48, 48))
    assert not model.classifier.weight.any() and dict(processor.size) == {"height": 48, "width": 48}
    layer = "vit.layers.0.attention.qkv.weight"
    assert torch.equal(model.state_dict()[layer], whole[layer])
    same, _ = load_classifier(path, [f"LABEL_{number}" for number in range(5)])
    assert torch.equal(same.classifier.weight, whole["classifier.weight"])


BY_NAME = """
import sys, torch
from hf_vit import HFViTForImageClassification, HFViTImageProcessor
from hf_vit.checkpoints import open_checkpoint
from hf_vit.checkpoints.models import load_classifier
from huggingface_hub import HfApi

folder, timm_folder, out = sys.argv[1:]
api = HfApi()
for name, place in {"tester/stock": folder, "tester/timm": timm_folder}.items():
    api.create_repo(name)
    api.upload_folder(repo_id=name, folder_path=place)
api.create_branch("tester/stock", branch="v2")
api.upload_folder(repo_id="tester/stock", folder_path=folder, path_in_repo="below", revision="v2")
states = [
    HFViTForImageClassification.from_pretrained("tester/stock").state_dict(),
    HFViTForImageClassification.from_pretrained("tester/stock", revision="v2", subfolder="below").state_dict(),
    load_classifier("tester/stock", ["ant", "bee", "cat", "dog", "elk"])[0].state_dict(),
    HFViTForImageClassification.from_pretrained("tester/timm").state_dict(),
]
torch.save(states, out)
for missing in ("tester/nothing", "tester/stock"):
    try:
        open_checkpoint(missing, subfolder="elsewhere")
    except ValueError as error:
        assert missing in str(error) and "\\n" not in str(error), error
    else:
        raise AssertionError(missing)
"""


@pytest.mark.slow
def test_names_on_the_hub_are_read(folder: Path, kinds: dict[str, Kind], standin: Any, tmp_path: Path) -> None:
    of_timm = kinds["timm"].write(kinds["timm"].state, tmp_path / "timm")
    network = {
        "HF_ENDPOINT": standin.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "hf_standin_write",
    }
    out = tmp_path / "states.pt"
    python(BY_NAME, folder, of_timm, out, home=tmp_path / "user", has_package=True, **network)
    *stocks, last = torch.load(out)
    for states, source in ((stocks, folder), ([last], of_timm)):
        expected = HFViTForImageClassification.from_pretrained(source).state_dict()
        for state in states:
            assert state.keys() == expected.keys()
            assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())


# ---------------------------------------------------------------------------------------------------- peak of memory

PEAK = """
import resource, subprocess, sys

code = "from hf_vit.cli.main import app; app()"
done = subprocess.run([sys.executable, "-c", code, *sys.argv[1:]], capture_output=True, text=True)
assert done.returncode == 0, done.stderr
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
"""


def peak(home: Path, *arguments: object) -> int:
    """Return the most bytes that a command had in memory."""
    return int(python(PEAK, *arguments, home=home, has_package=True).stdout)


@pytest.mark.full
def test_converting_needs_a_part_of_the_file_in_memory(kinds: dict[str, Kind], tmp_path: Path) -> None:
    tiny = kinds["google"].write(kinds["google"].state, tmp_path / "tiny")
    least = peak(tmp_path / "home", "inspect", tiny)
    large = timm.create_model("vit_base_patch16_224", img_size=32, depth=7, num_classes=5, act_layer="gelu_tanh")
    save_for_hf(filled(large), str(tmp_path), safe_serialization=True)
    torch.save(large.state_dict(), tmp_path / "large.pth")
    hf_vit.checkpoints.export.export_checkpoint(tmp_path, tmp_path / "large.npz", "npz")
    for name in ("large.npz", "model.safetensors", "large.pth"):
        file = tmp_path / name
        assert file.stat().st_size > 190e6
        used = peak(tmp_path / "home", "convert", file, tmp_path / "out") - least
        shutil.rmtree(tmp_path / "out")
        assert used < 0.5 * file.stat().st_size, f"{name}: {used / 1e6:.0f} MB"
