"""The handler of Inference Endpoints: what it answers without this package, and how it travels with a push."""

import base64
import importlib.util
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_server import Hub
from isolated import python
from PIL import Image
from test_multi_task import HEADS

from hf_vit import (
    HFViTForImageClassification,
    HFViTForObjectDetection,
    HFViTForSemanticSegmentation,
    HFViTImageProcessor,
    HFViTModel,
)
from hf_vit.hub.card import write_card
from hf_vit.hub.folder import check_folder, write_handler
from hf_vit.hub.upload import push
from hf_vit.model.multi_task_hf_vit import HFViTForMultiTask

# The client's own way of uploading, which its network library finds old.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

TINY: dict[str, Any] = {
    **{"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64},
    **{"image_size": (32, 48), "patch_size": 8, "num_labels": 5},
}
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "classes": (HFViTForImageClassification, {"num_labels": 7}),
    "masks": (HFViTForSemanticSegmentation, {"num_labels": 3, "patch_subdivision": 2}),
    "boxes": (HFViTForObjectDetection, {"num_labels": 3}),
    "heads": (HFViTForMultiTask, {"task_heads": {name: HEADS[name] for name in ("species", "parts", "things")}}),
    "features": (HFViTModel, {}),
}
# An endpoint imports handler.py from the folder of the repository, and serialises what it returns.
ENDPOINT = """
import importlib.util, json, sys
from pathlib import Path

requests = json.loads(Path(sys.argv[1]).read_text())
for folder in sys.argv[2:]:
    spec = importlib.util.spec_from_file_location("handler", f"{folder}/handler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    handler = module.EndpointHandler(folder)
    print("ANSWERS", json.dumps([handler(request) for request in requests]))
"""


def photo(size: tuple[int, int] = (57, 41)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, size=(*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def in_base64(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from hf_vit import HFViTConfig

    found = {}
    for name, (model_class, fields) in MODELS.items():
        found[name] = tmp_path_factory.mktemp("models") / name
        model_class(HFViTConfig(**{**TINY, **fields})).save_pretrained(found[name])
        HFViTImageProcessor(size={"height": 32, "width": 48}).save_pretrained(found[name])
        write_handler(found[name])
    return found


@pytest.mark.slow
def test_it_answers_for_every_task_without_the_package(folders: dict[str, Path], tmp_path: Path) -> None:
    text = in_base64(photo())
    requests = [{"inputs": text}, {"inputs": [f"data:image/png;base64,{text}", text]}]
    (tmp_path / "requests.json").write_text(json.dumps(requests))
    done = python(ENDPOINT, tmp_path / "requests.json", *folders.values(), home=tmp_path)
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS")]
    answers = dict(zip(folders, (json.loads(line.partition(" ")[2]) for line in lines), strict=True))
    for one, (first, second) in answers.values():
        assert one == first == second
    assert len(answers["classes"][0]) == 5 and answers["classes"][0][0].keys() == {"label", "score"}
    mask = Image.open(io.BytesIO(base64.b64decode(answers["masks"][0][0]["mask"])))
    assert mask.size == (57, 41)
    assert isinstance(answers["boxes"][0], list)
    assert answers["heads"][0].keys() == {"species", "parts", "things"}
    assert np.shape(answers["features"][0]) in ((32,), (1, 32))


def test_it_reads_images_and_refuses_everything_else(folders: dict[str, Path]) -> None:
    spec = importlib.util.spec_from_file_location("handler", folders["classes"] / "handler.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    answer = module.EndpointHandler()  # of the repository in whose folder it is
    image = photo()
    for given in (image, base64.b64decode(in_base64(image)), in_base64(image)):
        assert answer({"inputs": given, "parameters": {"top_k": 2}}) == answer({"inputs": [image]})[0][:2]
    deep = Image.fromarray((np.arange(64 * 64, dtype=np.float32) * 16).astype(np.uint16).reshape(64, 64))
    assert len(answer({"inputs": deep})) == 5
    for wrong, message in {
        "https://example.org/photo.jpg": "inputs 0: expected an image in base64",
        "/etc/hostname": "inputs 0: ",
        7: "inputs 0: expected an image, bytes of a file, or base64 text, got int",
        None: "got NoneType",
        b"no image": "inputs 0",
    }.items():
        with pytest.raises(ValueError, match=message):
            answer({"inputs": wrong})
    with pytest.raises(ValueError, match="inputs 1"):
        answer({"inputs": [image, b"no image"]})


def test_it_travels_with_a_push_on_request(folders: dict[str, Path], tmp_path: Path, client: Hub) -> None:
    folder = Path(shutil.copytree(folders["classes"], tmp_path / "ours"))
    (folder / "handler.py").unlink(), (folder / "requirements.txt").unlink()
    write_card(folder)
    push(folder, "tester/model")
    assert "handler.py" not in client.files("tester/model")
    push(folder, "tester/model", with_handler=True)
    there = client.files("tester/model")
    assert there["handler.py"] == (folders["classes"] / "handler.py").read_bytes()
    needed = there["requirements.txt"].decode().splitlines()
    assert {"transformers", "torch"} <= {each.partition(">=")[0] for each in needed} and "accelerate" not in needed
    assert "## Inference Endpoints" in there["README.md"].decode()
    assert {"handler.py", "requirements.txt"} <= set(check_folder(folder))
    (folder / "handler.py").write_text("own = True\n")
    with pytest.raises(ValueError, match=r"has its own handler\.py: remove it, or push without --with-handler"):
        push(folder, "tester/model", with_handler=True)
