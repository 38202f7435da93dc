"""Checkpoints that are corrupt or made to do harm: one sentence that names the file, at once, and nothing more."""

import io
import json
import os
import pickle
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from isolated import python, save_tiny_classifier
from safetensors.torch import load_file, save_file
from test_checkpoints import Code, assert_refused
from test_checkpoints_google import Golden
from torch import Tensor
from transformers import AutoModelForImageClassification

from hf_vit import HFViTForImageClassification
from hf_vit.checkpoints import open_checkpoint
from hf_vit.checkpoints.models import load, load_classifier

WEIGHTS, INDEX, PICKLE = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
Damage = Callable[[Path], Any]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert_refused(folder, folder / "nothing")  # imports modules now, so that no test counts their time
    return save_tiny_classifier(folder / "model")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, whole: Path) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "model"
    HFViTForImageClassification.from_pretrained(whole).save_pretrained(folder, max_shard_size="40KB")
    return folder


def at_once(call: Callable[[], Any], seconds: float = 1) -> Any:
    """Return the result of a call that takes less than this CPU time in one of three attempts.

    A collection of garbage in the midst of a call takes a second where other tests left millions of objects.
    """
    for _ in range(3):
        before = time.process_time()
        result = call()
        if time.process_time() - before < seconds:
            return result
    raise AssertionError(f"every attempt took {seconds} s or more")


# ------------------------------------------------------------------------------------------------- safetensors


def bytes_of(header: bytes, body: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + body


def of_header(change: Callable[[dict[str, Any], str, str], Any]) -> Damage:
    """Change the header as JSON, given the names of two tensors in it; or replace it by what is returned."""

    def damage(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end])
        first, second = [name for name in header if name != "__metadata__"][:2]
        replaced = change(header, first, second)
        text = replaced if isinstance(replaced, bytes) else json.dumps(header).encode()
        (folder / WEIGHTS).write_bytes(bytes_of(text, data[end:]))

    return damage


def of_length(length: int) -> Damage:
    return lambda folder: (folder / WEIGHTS).write_bytes(
        length.to_bytes(8, "little") + (folder / WEIGHTS).read_bytes()[8:]
    )


def truncated(length: int) -> Damage:
    return lambda folder: os.truncate(folder / WEIGHTS, length % (folder / WEIGHTS).stat().st_size)


def twice(header: dict[str, Any], first: str, second: str) -> bytes:
    return json.dumps(header)[:-1].encode() + b"," + json.dumps({first: header[first]})[1:].encode()


SAFETENSORS: dict[str, tuple[Damage, str]] = {
    "a header of 2^60 bytes": (of_length(2**60), "1152921504606846976 bytes"),
    "a header beyond the file": (of_length(2**22), "4194304 bytes"),
    "a header of no JSON": (of_header(lambda header, *_: b"{" + b"x" * 99), "JSON"),
    "a header nested deep": (of_header(lambda header, *_: b'{"a":' + b"[" * 10**5), "recursion"),
    "offsets of another tensor": (
        of_header(lambda header, first, second: header[first].update(data_offsets=header[second]["data_offsets"])),
        "offset",
    ),
    "offsets beyond the file": (
        of_header(lambda header, first, _: header[first]["data_offsets"].__setitem__(1, 2**40)),
        "offset",
    ),
    "negative offsets": (of_header(lambda header, first, _: header[first].update(data_offsets=[-4, 4])), "-4"),
    "a shape of 2^80 numbers": (
        of_header(lambda header, first, _: header[first].update(shape=[2**40] * 2)),
        "corrupt",
    ),
    "an unknown dtype": (of_header(lambda header, first, _: header[first].update(dtype="F31")), "F31"),
    "a dtype that is not read": (
        of_header(lambda header, first, _: header[first].update(dtype="F8_E4M3", shape=[4, *header[first]["shape"]])),
        "F8_E4M3",
    ),
    "a name twice": (of_header(twice), "twice"),
    "an empty file": (truncated(0), "an empty file, not a checkpoint"),
    "half a length": (truncated(5), "not a checkpoint"),
    "half a header": (truncated(700), "bytes"),
    "a byte less": (truncated(-1), "incomplete"),
    "a byte more": (lambda folder: os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size + 1), "incomplete"),
}

# ---------------------------------------------------------------------------------------------------- pickles


def pickled(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Put a file of `torch.save` in the place of the weights."""

    def damage(folder: Path) -> None:
        state: dict[str, Any] = dict(load_file(folder / WEIGHTS))
        (folder / WEIGHTS).unlink()
        changed = change(state)
        torch.save(state if changed is None else changed, folder / PICKLE)

    return damage


def with_code(folder: Path) -> None:
    pickled(lambda state: state.update(code=Code(folder / "marker")))(folder)


def bare_code(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / PICKLE).write_bytes(pickle.dumps(Code(folder / "marker")))


def packed_anew(content: bytes | None = None) -> Damage:
    """Compress the parts of a file of torch, one of which may be replaced."""

    def damage(folder: Path) -> None:
        pickled(lambda state: None)(folder)
        parts = zipfile.ZipFile(io.BytesIO((folder / PICKLE).read_bytes()))
        with zipfile.ZipFile(folder / PICKLE, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
            for name in parts.namelist():
                is_replaced = content is not None and name.endswith("data.pkl")
                file.writestr(name, content if is_replaced else parts.read(name))

    return damage


def first_as(change: Callable[[Tensor], Tensor]) -> Damage:
    return pickled(lambda state: state.update({name: change(state[name]) for name in ["classifier.weight"]}))


PICKLES: dict[str, tuple[Damage, str]] = {
    "code beside tensors": (with_code, "could run code"),
    "code alone": (bare_code, "could run code"),
    "a module": (pickled(lambda state: torch.nn.Linear(2, 2)), "could run code"),
    "a number": (pickled(lambda state: 3), "holds a int"),
    "a list among tensors": (pickled(lambda state: state.update({"classifier.weight": [1.0]})), "is a list"),
    "a tensor without numbers": (first_as(lambda tensor: tensor.to("meta")), "on meta, expected a dense tensor"),
    "a sparse tensor": (first_as(lambda tensor: tensor.to_sparse()), "sparse_coo on cpu, expected a dense tensor"),
    "one number for 2^40": (first_as(lambda tensor: torch.zeros(1).expand(2**20, 2**20)), "larger than the file"),
    "compressed tensors": (packed_anew(), "is compressed"),
    "a pickle of zeros": (packed_anew(bytes(2**26 + 1)), "bytes unpack to"),
}

# ----------------------------------------------------------------------------------------------------- shards


def of_index(change: Callable[[dict[str, Any], Path], Any]) -> Damage:
    """Change the index, given its folder; or replace it by what is returned."""

    def damage(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        changed = change(index, folder)
        (folder / INDEX).write_text(changed if isinstance(changed, str) else json.dumps(index))

    return damage


def shards_of(index: dict[str, Any]) -> list[str]:
    return sorted(set(index["weight_map"].values()))


def outside(index: dict[str, Any], folder: Path) -> None:
    shard = shards_of(index)[0]
    (folder.parent / "other").mkdir()
    (folder / shard).rename(folder.parent / "other" / shard)
    index["weight_map"] = {
        name: f"../other/{shard}" if place == shard else place for name, place in index["weight_map"].items()
    }


def exchanged(index: dict[str, Any], folder: Path) -> None:
    first, second = shards_of(index)[:2]
    other = {first: second, second: first}
    index["weight_map"] = {name: other.get(shard, shard) for name, shard in index["weight_map"].items()}


def doubled(index: dict[str, Any], folder: Path) -> None:
    first, second = (folder / shard for shard in shards_of(index)[:2])
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: tensor + 1}, second, {"format": "pt"})


SHARDS: dict[str, tuple[Damage, str]] = {
    "a shard that is missing": (
        of_index(lambda index, folder: (folder / shards_of(index)[1]).unlink()),
        "are missing",
    ),
    "a shard outside of the folder": (of_index(outside), "outside of the folder"),
    "a file of the system": (
        of_index(lambda index, _: index["weight_map"].update({"classifier.bias": "/etc/passwd"})),
        "outside of the folder",
    ),
    "shards exchanged": (of_index(exchanged), "is not in this file"),
    "a tensor that is nowhere": (
        of_index(lambda index, _: index["weight_map"].update(ghost=shards_of(index)[0])),
        "'ghost' is not in this file",
    ),
    "a tensor in two shards": (of_index(doubled), "also in another shard"),
    "an index of no JSON": (of_index(lambda index, _: "{"), "not JSON"),
    "an index nested deep": (of_index(lambda index, _: "[" * 10**5), "not JSON"),
    "an index without map": (of_index(lambda index, _: "{}"), "it names none"),
    "an index with a list": (of_index(lambda index, _: index.update(weight_map=[1])), "expected a weight_map"),
    "an index with other places": (of_index(lambda index, _: index.update(weight_map={"a": 1})), "weight_map"),
}


def refuse(folder: Path, message: str) -> str:
    """Hold that commands and `from_pretrained` refuse a folder at once, in one sentence."""

    def refused() -> str:
        said = assert_refused(folder.parent, folder)
        for auto_class in (AutoModelForImageClassification, HFViTForImageClassification):
            with pytest.raises((ValueError, OSError), match=str(folder)):
                auto_class.from_pretrained(folder)
        return said

    said = at_once(refused, seconds=3)
    assert message in said and not (folder / "marker").exists()
    return said


@pytest.mark.parametrize(
    ("damage", "message"), [*SAFETENSORS.values(), *PICKLES.values()], ids=[*SAFETENSORS, *PICKLES]
)
def test_a_damaged_file_is_refused(whole: Path, damage: Damage, message: str, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "model")
    damage(folder)
    assert str(folder / WEIGHTS) in (said := refuse(folder, message)) or str(folder / PICKLE) in said


@pytest.mark.parametrize(("damage", "message"), SHARDS.values(), ids=SHARDS)
def test_damaged_shards_are_refused(shards: Path, damage: Damage, message: str, tmp_path: Path) -> None:
    folder = shutil.copytree(shards, tmp_path / "model")
    damage(folder)
    assert f"{folder}{os.sep}model" in refuse(folder, message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("\0", "not JSON"),
        ("[1]", "expected a JSON object"),
        ("[" * 10**5, "not JSON"),
        ('{"a":' * 10**5, "not JSON"),
        ({"model_type": "bert"}, "a model of type 'bert', which is not supported"),
        ({"model_type": 5}, "a model of type 5, which is not supported"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"hidden_size": 64}, "[1, 1, 32] gives"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be at least 1"),
        ({"num_hidden_layers": 1000}, "too few for num_hidden_layers=1000"),
        ({"num_labels": 10**12, "id2label": None}, "num_labels must be at least 0"),
        ({"architectures": ["getattr"]}, "expected one of HFViTModel"),
        ({"architectures": 5}, "architectures"),
        ({"id2label": {"0": "a"}}, "classifier.weight"),
        ({"image_size": [2**31, 2**31]}, "image_size"),
        ({"check": None}, "'check' is a part of"),
    ],
)
def test_a_damaged_config_is_refused(whole: Path, content: Any, message: str, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "model")
    file = folder / "config.json"
    file.write_text(content if isinstance(content, str) else json.dumps({**json.loads(file.read_text()), **content}))
    said = at_once(lambda: assert_refused(tmp_path, folder))
    assert str(folder) in said and message in said


# -------------------------------------------------------------------------------------------------------- npz


def npz(path: Path, change: Callable[[dict[str, bytes]], Any], method: int = zipfile.ZIP_STORED) -> Path:
    """Write a good checkpoint of the paper's code with changed members."""
    members = {}
    for name, array in Golden("google_token_pre_logits").arrays.items():
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, np.ascontiguousarray(array))
        members[f"{name}.npy"] = buffer.getvalue()
    change(members)
    with zipfile.ZipFile(path, "w", method, compresslevel=1) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def array_of(content: Any) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.array(content), allow_pickle=True)
    return buffer.getvalue()


def with_shape(content: bytes, shape: str) -> bytes:
    """Put another shape into the header of an array, and shorten the blanks at its end."""
    end = content.index(b"\n") + 1
    header = content[:end]
    start, stop = header.index(b"'shape': ") + 9, header.index(b"), }") + 1
    changed = header[:start] + shape.encode() + header[stop:].rstrip() + b" "
    return changed.ljust(end - 1)[: end - 1] + b"\n" + content[end:]


NPZ: dict[str, tuple[Callable[[dict[str, bytes]], Any], str]] = {
    "a pickled object": (
        lambda members: members.update({"head/bias.npy": array_of(Code(Path("marker")))}),
        "holds object, expected numbers",
    ),
    "more numbers than there are": (
        lambda members: members.update({"head/bias.npy": with_shape(members["head/bias.npy"], "(1000000,)")}),
        "but the shape [1000000]",
    ),
    "a shape whose product overflows": (
        lambda members: members.update({"head/bias.npy": with_shape(members["head/bias.npy"], f"({2**40}, {2**40})")}),
        "corrupt",
    ),
    "a negative shape": (
        lambda members: members.update({"head/bias.npy": with_shape(members["head/bias.npy"], "(-5,)")}),
        "corrupt",
    ),
    "no array": (lambda members: members.update({"head/bias.npy": b"a text"}), "corrupt"),
    "an empty member": (lambda members: members.update({"head/bias.npy": b""}), "corrupt"),
    "a header that is code": (
        lambda members: members.update(
            {
                "head/bias.npy": members["head/bias.npy"][:10]
                + b"__import__('os').system('touch marker')".ljust(117)
                + b"\n"
            }
        ),
        "corrupt",
    ),
}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
@pytest.mark.parametrize(("change", "message"), NPZ.values(), ids=NPZ)
def test_a_damaged_npz_is_refused(
    change: Any, message: str, method: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = npz(tmp_path / "ViT.npz", change, method)
    said = at_once(lambda: assert_refused(tmp_path, path))
    assert str(path) in said and message in said and not (tmp_path / "marker").exists()


def test_an_archive_that_unpacks_to_too_much_is_not_unpacked(tmp_path: Path) -> None:
    zeros = array_of(np.zeros(2**26 + 1, np.uint8))
    path = npz(tmp_path / "ViT.npz", lambda members: members.update({"opt/zeros.npy": zeros}), zipfile.ZIP_DEFLATED)
    assert "more than any weights" in at_once(lambda: assert_refused(tmp_path, path))


def test_a_name_twice_in_an_npz_is_refused(tmp_path: Path) -> None:
    path = npz(tmp_path / "ViT.npz", lambda members: None)
    with zipfile.ZipFile(path, "a") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr("head/bias.npy", file.read("head/bias.npy"))
    assert "'head/bias.npy' occurs twice" in assert_refused(tmp_path, path)


# ------------------------------------------------------------------------------------------- damage at any place


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, whole: Path) -> dict[str, Path]:
    """The formats, one file each, beside the config where the format has none."""
    place = tmp_path_factory.mktemp("files")
    made = {}
    for name in ("safetensors", "bin", "old bin"):
        made[name] = shutil.copytree(whole, place / name) / WEIGHTS
        if name != "safetensors":
            torch.save(load_file(whole / WEIGHTS), made[name], _use_new_zipfile_serialization=name == "bin")
    for name, method in {"npz": zipfile.ZIP_STORED, "packed npz": zipfile.ZIP_DEFLATED}.items():
        made[name] = npz(place / f"{name}.npz", lambda members: None, method)
    return made


@settings(max_examples=settings.default.max_examples // 4)
@pytest.mark.parametrize("name", ["safetensors", "bin", "old bin", "npz", "packed npz"])
@given(data=st.data())
def test_damage_at_any_place_is_refused_or_harmless(name: str, files: dict[str, Path], data: st.DataObject) -> None:
    path = files[name]
    good = path.read_bytes()
    damaged = bytearray(good)
    places = st.integers(0, len(good) - 1) | st.integers(0, 3000) | st.integers(len(good) - 3000, len(good) - 1)
    for place in data.draw(st.lists(places, max_size=4)):
        damaged[place] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del damaged[data.draw(places) :]
    path.unlink()  # what is mapped into memory must not be written over

    def read() -> None:
        try:
            state = open_checkpoint(path).state_dict()
            assert all(tensor.isfinite().all() for tensor in state.values())
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)

    try:
        path.write_bytes(damaged)
        at_once(read)
    finally:
        path.unlink()
        path.write_bytes(good)


# ------------------------------------------------------------------------------------------------------ links


def test_a_link_out_of_the_folder_is_not_followed(whole: Path, tmp_path: Path) -> None:
    for name in (WEIGHTS, "config.json", "preprocessor_config.json"):
        folder = shutil.copytree(whole, tmp_path / name / "model")
        (folder / name).rename(folder.parent / name)
        (folder / name).symlink_to(Path("..", name))
        said = refuse(folder, "is not followed") if name == WEIGHTS else assert_refused(tmp_path, folder)
        assert f"{folder / name}: the link to {folder.parent / name}, outside of the folder" in said
    elsewhere = tmp_path / WEIGHTS / WEIGHTS
    shutil.copy(whole / "config.json", elsewhere.parent)
    assert open_checkpoint(elsewhere).state_dict()  # the remedy that the error names


def test_a_link_within_the_folder_or_to_it_is_followed(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "model")
    (folder / "data").mkdir()
    (folder / WEIGHTS).rename(folder / "data" / "weights")
    (folder / WEIGHTS).symlink_to(Path("data", "weights"))
    (tmp_path / "newest").symlink_to(folder)
    for place in (folder, tmp_path / "newest", tmp_path / "newest" / WEIGHTS):
        assert open_checkpoint(place).state_dict()
        HFViTForImageClassification.from_pretrained(place)


def in_a_cache(folder: Path, cache: Path) -> Path:
    """Lay a folder out as the Hub's cache does; return the snapshot."""
    repository = cache / "models--someone--model"
    snapshot = repository / "snapshots" / ("a" * 40)
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(folder.iterdir()):
        shutil.copy(file, repository / "blobs" / str(number))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(number)))
    return snapshot


def test_the_cache_of_the_hub_consists_of_links(whole: Path, shards: Path, tmp_path: Path) -> None:
    for number, folder in enumerate((whole, shards)):
        snapshot = in_a_cache(folder, tmp_path / str(number))
        assert open_checkpoint(snapshot).state_dict()
        HFViTForImageClassification.from_pretrained(snapshot)
        if folder is whole:
            assert open_checkpoint(snapshot / WEIGHTS).state_dict()
        stranger = tmp_path / f"{number}.json"
        (snapshot / "config.json").resolve().rename(stranger)
        (snapshot / "config.json").unlink()
        (snapshot / "config.json").symlink_to(stranger)
        assert "is not followed" in assert_refused(tmp_path, snapshot)


# ---------------------------------------------------------------------------------------------------- no numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_serve_no_command(whole: Path, value: float, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "model")
    state = load_file(folder / WEIGHTS)
    name = "vit.layers.1.mlp.fc1.weight"
    state[name][3, 5] = value
    save_file(state, folder / WEIGHTS, {"format": "pt"})
    assert f"{name!r} holds NaN or infinity" in assert_refused(tmp_path, folder)
    for use in (lambda: load(str(folder)), lambda: load_classifier(folder, ["a", "b"])):
        with pytest.raises(ValueError, match=f"{name}' holds NaN"):
            use()
    open_checkpoint(folder)  # what it is, can be told
    loaded = HFViTForImageClassification.from_pretrained(folder)  # and it can be looked at, as any model
    assert not loaded.state_dict()[name].isfinite().all()


# ---------------------------------------------------------------------------------------------------- all memory

ALL = """
import json, resource, sys, time
from hf_vit.checkpoints import open_checkpoint

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

whole, *damaged = sys.argv[1:]
open_checkpoint(whole).state_dict()
worst = {}
for path in damaged:
    before, began = peak(), time.process_time()
    try:
        open_checkpoint(path).state_dict()
    except ValueError as error:
        assert path in str(error), error
    else:
        raise AssertionError(path)
    worst[path] = (peak() - before, time.process_time() - began)
print(json.dumps(worst))
"""


@pytest.mark.slow
def test_what_is_damaged_takes_no_memory(whole: Path, shards: Path, tmp_path: Path) -> None:
    places = []
    for kinds, source in ((SAFETENSORS, whole), (PICKLES, whole), (SHARDS, shards)):
        for number, (damage, _) in enumerate(kinds.values()):
            folder = shutil.copytree(source, tmp_path / f"{source.parent.name}-{len(kinds)}-{number}" / "model")
            damage(folder)
            places.append(folder)
    for number, (change, _) in enumerate(NPZ.values()):
        places.append(npz(tmp_path / f"{number}.npz", change, zipfile.ZIP_DEFLATED))
    zeros = array_of(np.zeros(2**27, np.uint8))
    places.append(
        npz(tmp_path / "zeros.npz", lambda members: members.update({"opt/a.npy": zeros}), zipfile.ZIP_DEFLATED)
    )
    worst = json.loads(python(ALL, whole, *places, home=tmp_path / "home", has_package=True).stdout)
    assert len(worst) == len(places) > 40
    assert max(memory for memory, _ in worst.values()) < 16, worst  # MB
    assert max(seconds for _, seconds in worst.values()) < 1, worst
