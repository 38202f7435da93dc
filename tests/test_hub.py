"""The card, what may travel to the Hub, and the way there and back through the real clients."""

import json
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from hub_server import READ, SHAPED, WRITE, Hub
from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.errors import HfHubHTTPError
from isolated import TESTS, python, save_tiny_classifier
from safetensors.torch import load_file

import hf_vit
from hf_vit import HFViTConfig, HFViTForImageClassification
from hf_vit.hub import upload
from hf_vit.hub.card import license_of, state_license, write_card
from hf_vit.hub.folder import check_folder
from hf_vit.hub.upload import BackgroundPush, push, without_tokens
from hf_vit.system.machine import machine, versions

# The client's own way of uploading, which its network library finds old.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

SCRIPTS = TESTS.parent / "scripts"
MEASURED = {"command": "hf-vit quickstart", "hardware": "2 CPU cores", "seeds": "0, 1, 2 (mean)"}
CODE = [path.name for path in Path(hf_vit.__file__).parent.glob("model/*_hf_vit.py")]
FILES = ["README.md", "config.json", "model.safetensors", "preprocessor_config.json", *CODE]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_classifier(tmp_path_factory.mktemp("saved") / "tiny-vit")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "tiny-vit"))


# ---------------------------------------------------------------------------------------------------- the card


def test_card_states_what_was_measured_and_how(folder: Path) -> None:
    (folder / "training.png").touch()
    path = write_card(
        folder,
        title="Tiny: a ViT",
        description="Made in a test.",
        results={"accuracy": 0.98131},
        measured=MEASURED,
        dataset="Ten photos",
        dataset_id="user/photos",
        split="validation",
        sections={"Training": "Three epochs."},
        images=["training.png"],
        license="mit",
        base_model="user/base",
    )
    card = ModelCard.load(path)
    assert card.data.to_dict() == {
        "license": "mit",
        "library_name": "transformers",
        "pipeline_tag": "image-classification",
        "tags": ["vision-transformer", "hf_vit"],
        "datasets": ["user/photos"],
        "base_model": "user/base",
        "metrics": ["accuracy"],
        "model-index": [
            {
                "name": "Tiny: a ViT",
                "results": [
                    {
                        "task": {"type": "image-classification"},
                        "dataset": {"name": "Ten photos", "type": "user/photos", "split": "validation"},
                        "metrics": [{"type": "accuracy", "value": 0.98131}],
                    }
                ],
            }
        ],
    }
    number = sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
    for line in (
        "# Tiny: a ViT",
        "Made in a test.",
        'model = pipeline("image-classification", "tiny-vit", trust_remote_code=True)',
        "| Ten photos, validation | accuracy | 0.9813 |",
        "- command: hf-vit quickstart",
        "- hardware: 2 CPU cores",
        "- seeds: 0, 1, 2 (mean)",
        f"- versions: {versions()}",
        "## Training",
        "Three epochs.",
        "![training.png](training.png)",
        "Classes (5): LABEL_0, LABEL_1, LABEL_2, LABEL_3, LABEL_4.",
    ):
        assert line in card.text.splitlines()
    assert f"with {number:,}\nparameters: 3 layers, width 32, 4 heads, on images of 32x48 pixels" in card.text


def test_card_without_figures_claims_none(folder: Path) -> None:
    card = ModelCard.load(write_card(folder))
    assert card.data.eval_results is None and card.data.metrics is None
    assert "Results" not in card.text and "measured" not in card.text
    assert "\n\n\n" not in card.text


def test_card_of_an_encoder_is_for_features(tmp_path: Path) -> None:
    config = hf_vit.HFViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    hf_vit.HFViTModel(config).save_pretrained(tmp_path / "encoder")
    card = ModelCard.load(write_card(tmp_path / "encoder"))
    assert card.data.pipeline_tag == "image-feature-extraction"
    assert "classes" not in card.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"results": {"accuracy": 0.9}, "dataset": "d"}, r"lacks \['command', 'hardware', 'seeds'\]"),
        ({"results": {"accuracy": 0.9}, "measured": MEASURED}, "set `dataset`"),
        ({"results": {"accuracy": float("nan")}, "measured": MEASURED, "dataset": "d"}, "finite"),
        ({"license": "Apache 2"}, "identifier of the Hub"),
        ({"dataset_id": "a/b/c"}, "dataset_id must be a name on the Hub"),
        ({"base_model": "./runs/base"}, "base_model must be a name on the Hub"),
        ({"images": ["nothing.png"]}, "not in .*nothing.png"),
    ],
)
def test_card_refuses(folder: Path, arguments: dict[str, Any], message: str) -> None:
    before = (folder / "README.md").read_text()
    with pytest.raises(ValueError, match=message):
        write_card(folder, **arguments)
    assert (folder / "README.md").read_text() == before


def test_machine_is_named() -> None:
    assert machine() and "\n" not in machine()


# ------------------------------------------------------------------------------------------------ what may travel


def test_what_was_saved_may_travel(folder: Path) -> None:
    (folder / "predictions [1].png").touch()
    for name in (".git/config", "checkpoints/step-1/state.pt", "checkpoint-1/training_args.bin"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).touch()
    assert check_folder(folder) == sorted([*FILES, "predictions [1].png"])


def test_shards_may_travel(folder: Path) -> None:
    hf_vit.HFViTForImageClassification.from_pretrained(folder).save_pretrained(folder, max_shard_size="50KB")
    names = check_folder(folder)
    assert "model.safetensors.index.json" in names and len(names) > len(FILES) + 1
    shard = next(folder.glob("model-*.safetensors"))
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name} is missing"):
        check_folder(folder)


def drop_from_auto_map(file: str, key: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / file).read_text())
        del config["auto_map"][key]
        (folder / file).write_text(json.dumps(config))

    return change


def name_one_backend(folder: Path) -> None:
    path = folder / "preprocessor_config.json"
    config = json.loads(path.read_text())
    config["auto_map"]["AutoImageProcessor"] = "image_processing_pil_hf_vit.HFViTImageProcessorPil"
    path.write_text(json.dumps(config))


def truncate_weights(folder: Path) -> None:
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(5000)


def add(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()

    return change


def test_a_folder_of_images_is_no_model(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"token_{number}.png").touch()
    with pytest.raises(
        ValueError, match=r"holds no model: .*; found 30 files, such as token_0\.png, .*\.\.\.\."
    ) as refusal:
        push(tmp_path, "user/name")
    assert "token_7" not in str(refusal.value)
    with pytest.raises(ValueError, match="nowhere does not exist"):
        push(tmp_path / "nowhere", "user/name")


@pytest.mark.parametrize(("repo_id", "message"), [("a/b/c", "Expected a repository USER/NAME"), ("x", "has no user")])
def test_a_push_needs_a_user_and_a_network(
    folder: Path, repo_id: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(upload, "get_token", lambda: None)
    with pytest.raises(ValueError, match=message):
        push(folder, repo_id)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
        push(folder, "user/name")


def test_junk_and_the_table_of_mistakes_stay_here(folder: Path) -> None:
    names = check_folder(folder)
    for name in (
        ".DS_Store",
        "._config.json",
        "Thumbs.db",
        "mistakes.csv",
        ".ipynb_checkpoints/a.py",
        "images/._a.png",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    assert check_folder(folder) == names


def test_the_license_is_that_of_the_user_or_of_the_base_model(folder: Path, tmp_path: Path) -> None:
    card = write_card(folder)
    assert ModelCard(card.read_text()).data.license is None and license_of(str(folder)) is None
    state_license(card, "cc-by-4.0")
    assert license_of(str(folder)) == license_of(str(folder / "model.safetensors")) == "cc-by-4.0"
    again = ModelCard(card.read_text())
    assert again.data.license == "cc-by-4.0" and "hf_vit" in again.data.tags and "## Use" in again.text
    assert license_of(str(tmp_path / "nowhere")) is license_of(None) is None
    with pytest.raises(ValueError, match=r"such as 'apache-2\.0', got 'Apache 2\.0'"):
        state_license(card, "Apache 2.0")


def test_the_card_of_other_channels_reads_files(tmp_path: Path) -> None:
    config = HFViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4,
        num_channels=5,
    )  # fmt: skip
    HFViTForImageClassification(config).save_pretrained(tmp_path / "five")
    np.save(tmp_path / "image.npy", np.zeros((5, 9, 9), np.uint8))
    for text in ((tmp_path / "five/README.md").read_text(), write_card(tmp_path / "five").read_text()):
        names: dict[str, Any] = {}
        for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            code = block.replace('"five"', repr(str(tmp_path / "five"))).replace("trust_remote_code=True", "")
            exec(code.replace('"image.tif"', repr(str(tmp_path / "image.npy"))), names)
        classify = transformers.pipeline("image-classification", str(tmp_path / "five"))
        assert len(classify(str(tmp_path / "image.npy"))) == 2
        assert "outputs" not in names or names["outputs"].logits.shape == (1, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *[(lambda folder, name=name: (folder / name).unlink(), name) for name in FILES],
        (drop_from_auto_map("config.json", "AutoBackbone"), "config.json: its auto_map lacks AutoBackbone"),
        (drop_from_auto_map("preprocessor_config.json", "AutoImageProcessor"), "a processor for each backend"),
        (name_one_backend, "a processor for each backend"),
        (truncate_weights, "not a complete safetensors file"),
        *[
            (add(name), f"do not belong to a model.*{name}")
            for name in ("training_args.bin", "optimizer.pt", "other.py", "data/model.safetensors")
        ],
    ],
)
def test_push_refuses(folder: Path, change: Callable[[Path], Any], message: str) -> None:
    change(folder)
    with pytest.raises(ValueError, match=message) as refusal:
        push(folder, "user/name")  # before anything is sent
    assert "save_pretrained(folder)" in str(refusal.value)


@pytest.mark.parametrize(
    "name",
    [
        ".env",
        ".env.local",
        "key.pem",
        "id_rsa",
        ".netrc",
        ".git-credentials",
        "credentials.json",
        "token",
        "secrets.py",
    ],
)
def test_secrets_are_refused_as_such(folder: Path, name: str) -> None:
    (folder / name).write_text(SHAPED)
    with pytest.raises(ValueError, match=f"look like secrets, .*: {re.escape(name)}\n") as refusal:
        check_folder(folder)
    assert "may hold your token" not in str(refusal.value) and SHAPED not in str(refusal.value)


@pytest.mark.parametrize(
    "name", ["README.md", "config.json", "preprocessor_config.json", "recipe.yaml", "metrics.json", "log.jsonl"]
)
@pytest.mark.parametrize("token", [SHAPED, "in-use-of-another-shape"])
def test_texts_with_a_token_are_refused(folder: Path, name: str, token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "in-use-of-another-shape")
    text = (folder / name).read_text() if (folder / name).exists() else "{}"
    is_json = name.endswith(".json")
    (folder / name).write_text(json.dumps({**json.loads(text), "note": token}) if is_json else text + token)
    with pytest.raises(ValueError, match=f"there is a token in {name}") as refusal:
        check_folder(folder)
    assert token not in str(refusal.value)


def test_no_token_comes_into_a_card(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "in-use-of-another-shape")
    path = write_card(
        folder,
        description=f"By {SHAPED}.",
        results={"accuracy": 0.5},
        measured={**MEASURED, "command": f"hf-vit train --token {SHAPED} --other in-use-of-another-shape"},
        dataset="photos",
        sections={"Recipe": f"token: {SHAPED}"},
    )
    text = path.read_text()
    assert SHAPED not in text and "in-use" not in text
    assert "- command: hf-vit train --token TOKEN --other TOKEN" in text
    assert check_folder(folder)


def test_words_are_no_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "the")
    assert without_tokens("the hf_vit of hf_vit_configuration") == "the hf_vit of hf_vit_configuration"
    assert without_tokens(f"'{SHAPED}'", token=None) == "'TOKEN'"


def test_push_refuses_what_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        push(tmp_path / "nowhere", "user/name")


# ------------------------------------------------------------------------------------------ through the real clients


def copying(folder: Path, note: str = "") -> Callable[[Path], None]:
    """Return what writes a folder like another one, with a note in its card."""

    def write(target: Path) -> None:
        shutil.copytree(folder, target, dirs_exist_ok=True)
        write_card(target, title="tiny", description=note)

    return write


def test_a_push_arrives(folder: Path, client: Hub) -> None:
    write_card(folder)
    assert push(folder, "tester/model", message="First") == f"{client.url}/tester/model"
    assert sorted(client.files("tester/model")) == sorted([".gitattributes", *FILES])
    assert client.files("tester/model")["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    card = client.files("tester/model")["README.md"].decode()
    assert card.count('"tester/model"') == 3 and '"tiny-vit"' not in card
    assert client.messages("tester/model") == ["First"]
    assert {request.has_token for request in client.asked("PUT /large/")} == {False}
    assert {request.has_token for request in client.asked("POST /api/")} == {True}


def test_a_wrong_token_is_refused(folder: Path, client: Hub) -> None:
    wrong = "hf_" + "Wrong" * 7
    with pytest.raises(HfHubHTTPError, match="401") as refusal:
        push(folder, "tester/model", token=wrong)
    assert wrong not in str(refusal.value)


def test_a_run_does_not_wait_for_its_pushes(folder: Path, client: Hub) -> None:
    client.delay("POST /api/repos/create", seconds=3)
    said: list[str] = []
    hub = BackgroundPush("tester/run", say=said.append)
    hub.submit(copying(folder, "note 0"), "Step 0")
    while not client.asked("/api/repos/create"):  # the first is under way
        time.sleep(0.01)
    for step in range(1, 5):
        hub.submit(copying(folder, f"note {step}"), f"Step {step}")
    assert client.messages("tester/run") == [] and len(list(Path(hub.snapshots).iterdir())) == 2
    assert hub.finish(timeout=30)
    assert client.messages("tester/run") == ["Step 0", "Step 4"]  # those between were overtaken
    card = client.files("tester/run")["README.md"].decode()
    assert "note 4" in card and 'pipeline("image-classification", "tester/run"' in card
    assert hub.url == f"{client.url}/tester/run" and said == []
    assert list(Path(hub.snapshots).iterdir()) == []


def test_a_failed_push_is_tried_again(folder: Path, client: Hub) -> None:
    client.fail("POST /api/repos/create", status=503, times=2)
    said: list[str] = []
    hub = BackgroundPush("tester/run", say=said.append, waits=(0.01, 0.02))
    hub.submit(copying(folder), "Step 1")
    assert hub.finish(timeout=60)
    assert client.messages("tester/run") == ["Step 1"] and said == []
    assert [request.status for request in client.asked("/api/repos/create")] == [503, 503, 200]


def test_a_lost_folder_of_snapshots_ends_no_run(folder: Path, client: Hub) -> None:
    said: list[str] = []
    hub = BackgroundPush("tester/run", say=said.append, token=SHAPED)
    shutil.rmtree(hub.snapshots)
    hub.submit(copying(folder), "Step 1")
    assert said[0].startswith("Step 1 was not pushed to tester/run; the run continues. FileNotFoundError: ")


def test_a_push_is_given_up_and_the_next_one_tried(folder: Path, client: Hub) -> None:
    client.fail("POST /api/repos/create", status=507, times=3)
    said: list[str] = []
    hub = BackgroundPush("tester/run", say=said.append, token=SHAPED, waits=(0.01, 0.02))
    hub.submit(copying(folder), f"Step 1 of {SHAPED}")
    assert not hub.finish(timeout=60)
    assert len(said) == 1 and "\n" not in said[0] and SHAPED not in said[0]
    assert said[0].startswith("Step 1 of TOKEN was not pushed to tester/run; the run continues. http://")
    assert "returned 507" in said[0] and said[0].endswith("try again later.")
    hub.submit(copying(folder), "Step 2")
    assert hub.finish(timeout=60)
    assert client.messages("tester/run") == ["Step 2"] and len(said) == 1


def test_what_lies_behind_a_failure_is_said(folder: Path, client: Hub) -> None:
    client.fail("PUT /large/", status=403, times=9)
    said: list[str] = []
    hub = BackgroundPush("tester/run", say=said.append, waits=())
    hub.submit(copying(folder), "Step 1")
    assert not hub.finish(timeout=30)
    assert re.search(r"/large/\w+ returned 403 .*: the token has no permission for this: ", said[0])


def test_what_fails_for_certain_is_not_tried_again(folder: Path, client: Hub) -> None:
    said: list[str] = []
    hub = BackgroundPush("tester/run", say=said.append, token="hf_" + "Wrong" * 7, waits=(60,))
    hub.submit(copying(folder), "Step 1")
    assert not hub.finish(timeout=30)
    assert len(said) == 1 and "401" in said[0] and "Wrong" not in said[0]
    assert len(client.asked("/api/repos/create")) == 1

    (folder / "token").touch()
    hub = BackgroundPush("tester/run", say=said.append, waits=(60,))
    hub.submit(copying(folder), "Step 2")
    assert not hub.finish(timeout=30)
    assert "look like secrets" in said[1] and "\n" not in said[1]


def test_a_folder_that_cannot_be_written_ends_no_run(client: Hub) -> None:
    def write(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    said: list[str] = []
    hub = BackgroundPush("tester/run", say=said.append)
    hub.submit(write, "Step 1")
    assert not hub.finish(timeout=5)
    assert said == [
        "Step 1 was not pushed to tester/run; the run continues. OSError: [Errno 28] No space left on device"
    ]
    assert list(Path(hub.snapshots).iterdir()) == []


def test_a_newer_state_ends_the_tries_of_an_older_one(folder: Path, client: Hub) -> None:
    client.fail("POST /api/repos/create", status=507)
    said: list[str] = []
    hub = BackgroundPush("tester/run", say=said.append, waits=(600,))
    hub.submit(copying(folder), "Step 1")
    while not [request for request in client.asked("/api/repos/create") if request.status]:
        time.sleep(0.01)
    assert not hub.finish(timeout=0.2)  # it waits for its second try
    hub.submit(copying(folder), "Step 2")
    assert hub.finish(timeout=60)
    assert client.messages("tester/run") == ["Step 2"] and said == []


# A run that is stopped in the middle of an upload, of several large files at that.
STOPPED = """
import os, shutil, signal, sys, time
from functools import partial
from pathlib import Path

from hf_vit.hub import BackgroundPush

hub = BackgroundPush("tester/run")
hub.submit(lambda folder: shutil.copytree(sys.argv[1], folder, dirs_exist_ok=True), "Step 1")
while not Path(sys.argv[2]).exists():
    time.sleep(0.01)
print(hub.snapshots, flush=True)
try:
    os.kill(os.getpid(), signal.SIGINT)
    hub.finish()
except KeyboardInterrupt:
    print(time.time(), flush=True)
"""


def test_a_stopped_run_does_not_wait_for_its_push(folder: Path, standin: Hub, tmp_path: Path) -> None:
    model = hf_vit.HFViTForImageClassification.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="50KB")
    standin.delay("PUT /large/", seconds=30)

    def tell() -> None:
        while not standin.asked("PUT /large/"):
            time.sleep(0.01)
        (tmp_path / "uploading").touch()

    threading.Thread(target=tell, daemon=True).start()
    network = {"HF_ENDPOINT": standin.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": SHAPED}
    stopped = python(STOPPED, folder, tmp_path / "uploading", home=tmp_path / "home", has_package=True, **network)
    snapshots, interrupted_at = stopped.stdout.split()
    assert time.time() - float(interrupted_at) < 10
    assert not Path(snapshots).exists()
    assert standin.messages("tester/run") == [] and SHAPED not in stopped.stderr


PUSHES = """
import sys
from pathlib import Path

from huggingface_hub import HfApi

import hf_vit
from hf_vit.hub import push

folder = Path(sys.argv[1])
(folder / "predictions [1].png").touch()
(folder / "checkpoint-1").mkdir()
(folder / "checkpoint-1" / "training_args.bin").write_text("hf_standin_write")
model = hf_vit.HFViTForImageClassification.from_pretrained(folder)
model.push_to_hub("tester/model")
hf_vit.HFViTImageProcessor.from_pretrained(folder).push_to_hub("tester/model")

shards = folder.parent / "shards"
model.save_pretrained(shards, max_shard_size="50KB")
print(push(shards, "folder", private=True))
print(push(folder, "tester/folder"))
print(push(folder, "tester/folder", revision="other", message="Again"))

sys.path.insert(0, sys.argv[2])
import finetune_with_trainer

arguments = ["--data", "digits", "--model", str(folder), "--output_dir", "script", "--max_steps", "1", "--use_cpu"]
arguments += ["--eval_strategy", "no", "--save_strategy", "steps", "--save_steps", "1", "--disable_tqdm", "true"]
finetune_with_trainer.main([*arguments, "--push_to_hub", "--hub_model_id", "script", "--hub_token", sys.argv[3]])

api = HfApi()
assert api.list_repo_files("tester/folder") == api.list_repo_files("tester/folder", revision="other")
assert api.repo_info("tester/folder").private
"""


@pytest.mark.slow
def test_to_the_hub_and_back_without_the_package(folder: Path, standin: Hub, tmp_path: Path) -> None:
    token = WRITE
    network = {"HF_ENDPOINT": standin.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    pushed = python(
        PUSHES, folder, SCRIPTS, token, home=tmp_path / "author", has_package=True, HF_TOKEN=token, **network
    )
    addresses = [line for line in pushed.stdout.splitlines() if line.startswith("http")]
    assert addresses == [f"{standin.url}/tester/{name}" for name in ("folder", "folder", "folder", "script")]
    api = HfApi(endpoint=standin.url, token=READ)
    cards = {}
    for name, others in {
        "model": [],
        "folder": ["predictions [1].png"],
        "script": ["metrics.json", "recipe.yaml"],
    }.items():
        assert sorted(api.list_repo_files(f"tester/{name}")) == sorted([".gitattributes", *others, *FILES])
        cards[name] = ModelCard.load(api.hf_hub_download(f"tester/{name}", "README.md", cache_dir=tmp_path / name))
        assert f'pipeline("image-classification", "tester/{name}", trust_remote_code=True)' in cards[name].text
    assert "--hub_token TOKEN" in cards["script"].text

    user = tmp_path / "user"
    python(
        TESTS / "user_of_a_repository.py",
        tmp_path / "outputs",
        folder,
        "tester/model",
        "tester/folder",
        home=user,
        HF_TOKEN=READ,
        **network,
    )
    saved, *pulled = (np.load(tmp_path / "outputs" / f"{number}.npz") for number in range(3))
    for outputs in pulled:
        assert outputs.keys() == saved.keys()
        assert all(np.array_equal(outputs[name], saved[name]) for name in saved)
