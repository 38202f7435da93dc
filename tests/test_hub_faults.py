"""A Hub that fails: whatever interrupts a push, the repository is whole; and what a user reads is a sentence."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from hub_server import SHAPED, Hub, Repository, set_address
from isolated import save_tiny_classifier
from PIL import Image
from process_of_a_run import CONTEXT
from tiny_run import tiny_recipe
from typer.testing import CliRunner, Result

import hf_vit
from hf_vit.cli.main import app
from hf_vit.hub.card import write_card
from hf_vit.hub.upload import BackgroundPush, push
from hf_vit.system.network import is_final, pause_after, sentence_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    pytest.mark.usefixtures("no_pause_between_tries"),
]
NAME = "tester/model"
OF_A_PUSH = "^(?!GET /api/agent)"  # what else the client asks for once


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_classifier(tmp_path_factory.mktemp("new") / "tiny")


@pytest.fixture(scope="module")
def old(new: Path) -> Path:
    """Another model, in shards: a push of the new one has something to remove."""
    folder = new.parents[1] / "old"
    model = hf_vit.HFViTForImageClassification.from_pretrained(new)
    for parameter in model.parameters():
        parameter.data += 1
    model.save_pretrained(folder, max_shard_size="50KB")
    write_card(folder, title="old")
    return folder


# ----------------------------------------------------------------------------------------------- all or nothing

# What happens to all requests of a push but the first ones; the last to a single one, behind which the client's own
# tries go on.
FAULTS: dict[str, Callable[[Hub, int], None]] = {
    "cut before it is done": lambda hub, number: hub.cut(OF_A_PUSH, when="before", times=10**9, skip=number),
    "cut when it is done": lambda hub, number: hub.cut(OF_A_PUSH, when="after", times=10**9, skip=number),
    "cut within the answer": lambda hub, number: hub.cut(OF_A_PUSH, when="within", times=10**9, skip=number),
    "503": lambda hub, number: hub.fail(OF_A_PUSH, 503, times=10**9, skip=number),
    "429": lambda hub, number: hub.fail(OF_A_PUSH, 429, times=10**9, skip=number, Retry_After="7"),
    "cut once": lambda hub, number: hub.cut(OF_A_PUSH, when="after", skip=number),
}


class States:
    """A repository as it was before a push and as it is behind one, to begin from again and again."""

    def __init__(self, hub: Hub, old: Path | None, new: Path) -> None:
        self.hub = hub
        if old is not None:
            push(old, NAME)
        self.start = copy.deepcopy((hub.repositories, hub.large))
        self.before = self.files()
        hub.requests.clear()
        push(new, NAME)
        self.requests, self.behind = len(hub.asked(OF_A_PUSH)), self.files()
        assert self.behind is not None and self.behind != self.before
        self.again()

    def files(self) -> dict[str, bytes] | None:
        """Return what is in the repository; nothing but what the Hub puts into a new one counts as nothing."""
        repository: Repository | None = self.hub.repositories.get(NAME)
        files = {} if repository is None else self.hub.files(NAME)
        return files if set(files) - {".gitattributes"} else None

    def again(self) -> None:
        self.hub.repositories, self.hub.large = copy.deepcopy(self.start)
        self.hub.troubles.clear()


@pytest.mark.parametrize(("fault", "is_first"), [*((fault, False) for fault in FAULTS), ("cut when it is done", True)])
def test_an_interrupted_push_leaves_the_old_or_the_new(
    fault: str, is_first: bool, client: Hub, old: Path, new: Path
) -> None:
    states, seen = States(client, None if is_first else old, new), set()
    for number in range(states.requests):
        FAULTS[fault](states.hub, number)
        try:
            push(new, NAME)
        except Exception as error:
            assert sentence_of(error) is not None, (number, repr(error))
            assert not is_final(error), (number, repr(error))
        else:
            assert states.files() == states.behind, number
        left = states.files()
        assert left in (states.before, states.behind), (number, sorted(left or {}))
        seen.add(left == states.behind)
        states.hub.troubles.clear()
        push(new, NAME)
        assert states.files() == states.behind, number
        assert len(states.hub.messages(NAME)) <= len(states.start[0].get(NAME, Repository(False)).messages) + 1
        states.again()
    assert False in seen or "once" in fault


def push_in_a_process(endpoint: str, folder: Path) -> None:
    huggingface_hub.constants.ENDPOINT = endpoint  # type: ignore[misc]
    huggingface_hub.constants.HF_HUB_OFFLINE = False  # type: ignore[misc]
    huggingface_hub.constants.HF_HUB_DISABLE_XET = True  # type: ignore[misc]
    push(folder, NAME, token=SHAPED)


@pytest.mark.slow
@pytest.mark.parametrize(
    "is_done",
    [False, pytest.param(True, marks=pytest.mark.full)],
    ids=["before the request is done", "when it is done"],
)
def test_a_killed_push_leaves_the_old_or_the_new(is_done: bool, client: Hub, old: Path, new: Path) -> None:
    states, hub, seen = States(client, old, new), client, []
    for number in range(states.requests):
        holding = hub.hold(OF_A_PUSH, cut="after" if is_done else "before", skip=number)
        process = CONTEXT.Process(target=push_in_a_process, args=(hub.url, new))
        process.start()
        assert holding.reached.wait(60), number
        process.kill()
        process.join(60)
        holding.release.set()
        assert states.files() in (states.before, states.behind), number
        seen.append(states.files() == states.behind)
        hub.troubles.clear()
        push(new, NAME)
        assert states.files() == states.behind, number
        states.again()
    assert seen.count(True) == is_done, seen  # the last request is the commit


def test_of_two_pushes_at_once_one_is_refused(client: Hub, old: Path, new: Path) -> None:
    """Both began from the same state: unchecked, the card of one would lie beside the weights of the other."""

    def write(folder: Path) -> None:
        shutil.copytree(new, folder, dirs_exist_ok=True)
        write_card(folder, title="late")

    push(new, NAME)
    holding = client.hold("/commit/")
    said: list[str] = []
    background = BackgroundPush(NAME, say=said.append, waits=())
    background.submit(write, "Late")
    assert holding.reached.wait(30)
    push(old, NAME, message="Early")
    holding.release.set()
    assert not background.finish(timeout=30) and "412" in said[0] and "try again" in said[0]
    assert client.messages(NAME) == ["Upload model", "Early"]

    background = BackgroundPush(NAME, say=said.append, waits=(0.01,))
    client.fail("/commit/", status=412)
    background.submit(write, "Later")
    assert background.finish(timeout=30) and client.messages(NAME)[-1] == "Later" and len(said) == 1
    assert "model.safetensors.index.json" not in client.files(NAME)


def test_a_silent_hub_is_given_up(client: Hub, new: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_vit.hub.upload.SILENCE", 0.2)
    huggingface_hub.close_session()
    client.delay("/commit/", seconds=3)
    with pytest.raises(Exception, match="timed out") as silence:
        push(new, NAME)
    huggingface_hub.close_session()
    assert "did not respond in time" in (sentence_of(silence.value) or "")
    assert not is_final(silence.value)


def test_the_hub_says_how_long_to_wait(client: Hub, new: Path) -> None:
    client.fail("/commit/", status=429, Retry_After="1")
    background = BackgroundPush(NAME, say=pytest.fail, waits=(0.0,))
    background.submit(lambda folder: shutil.copytree(new, folder, dirs_exist_ok=True), "Step 1")
    assert not background.finish(timeout=0.7)
    assert background.finish(timeout=30)


@pytest.mark.parametrize(("asked", "pause"), [("7", 7), ("99999", 600), ("soon", 0), ("", 0)])
def test_pauses_are_bounded(asked: str, pause: float, client: Hub, new: Path) -> None:
    client.fail("/commit/", status=429, Retry_After=asked)
    with pytest.raises(OSError) as refusal:
        push(new, NAME)
    assert pause_after(refusal.value) == pause
    assert (f"{pause:.0f} seconds" if pause else "a few minutes") in (sentence_of(refusal.value) or "")


# -------------------------------------------------------------------------------------- what a user reads of it


def hf_vit_command(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


def assert_is_a_sentence(result: Result, *words: str) -> None:
    """Hold the end of a command against what is promised: one line, what to do, exit code 2."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert result.exit_code == 2, (result.output, result.exception)
    assert len(lines) == 1 and lines[0].endswith(".") and "Traceback" not in result.stderr, result.stderr
    assert all(word in lines[0] for word in words), (words, lines)
    assert SHAPED not in result.output + result.stderr


STATUSES = {
    400: "the server rejects the request",
    401: "HF_TOKEN",
    403: "no permission for this",
    404: "check the name",
    409: "try again",
    412: "try again",
    413: "make it smaller",
    429: "in 9 seconds",
    500: "try again later",
    502: "try again later",
    503: "try again later",
    504: "try again later",
}
STEPS = ["POST /api/repos/create", "GET /api/models/", "/preupload/", "/info/lfs/", "PUT /large/", "/commit/"]


@pytest.mark.parametrize(
    ("step", "status"), [*(("/info/lfs/", status) for status in STATUSES), *((step, 403) for step in STEPS)]
)
def test_a_refused_push_ends_with_a_sentence(step: str, status: int, client: Hub, new: Path) -> None:
    client.fail(step, status, times=10**9, Retry_After="9")
    assert_is_a_sentence(hf_vit_command("push", new, NAME), STATUSES[status], f"returned {status}")


@pytest.mark.parametrize("step", STEPS)
def test_a_push_that_breaks_off_ends_with_a_sentence(step: str, client: Hub, new: Path) -> None:
    client.cut(step, "after", times=10**9)
    assert_is_a_sentence(hf_vit_command("push", new, NAME), "was lost", "try again")


UNREACHABLE = {"refused": "http://127.0.0.1:9", "without a name": "http://nowhere.invalid"}


@pytest.mark.parametrize("address", UNREACHABLE.values(), ids=UNREACHABLE)
def test_a_hub_out_of_reach_ends_with_a_sentence(
    address: str, client: Hub, new: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_address(address, monkeypatch)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert_is_a_sentence(hf_vit_command("push", new, NAME), "cannot be reached", "check the network")
    assert_is_a_sentence(hf_vit_command("inspect", NAME), "cannot be reached", "check the network")


# What asks the Hub for a model or for data.
LOADS: dict[str, list[Any]] = {
    "predict": ["predict", NAME, "PHOTO"],
    "predict of": ["predict", "FOLDER", NAME],
    "evaluate": ["evaluate", NAME, "digits"],
    "evaluate on": ["evaluate", "FOLDER", NAME],
    "convert": ["convert", NAME, "OUT"],
    "inspect": ["inspect", NAME],
    "export": ["export", NAME, "OUT", "--to", "timm"],
    "train from": ["train", "--recipe", "RECIPE", "--model", NAME, "--output-dir", "OUT"],
    "train on": ["train", "--recipe", "RECIPE", "--data", NAME, "--output-dir", "OUT"],
}
TROUBLES: dict[str, tuple[Callable[[Hub], None], str]] = {
    "401": (lambda hub: hub.fail("", 401, times=10**9), "log in"),
    "403": (lambda hub: hub.fail("", 403, times=10**9), "no permission for this"),
    "404": (lambda hub: None, "check the name"),
    "429": (lambda hub: hub.fail("", 429, times=10**9, Retry_After="9"), "in 9 seconds"),
    "500": (lambda hub: hub.fail("", 500, times=10**9), "try again later"),
    "503": (lambda hub: hub.fail("", 503, times=10**9), "try again later"),
    "cut": (lambda hub: hub.cut("", "before", times=10**9), "was lost"),
}


@pytest.fixture
def loading(client: Hub, new: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a command that loads, with an empty cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "recipe.yaml").write_text(tiny_recipe(Path("digits"), tmp_path / "unused").to_yaml())
    Image.new("RGB", (9, 9)).save(tmp_path / "photo.png")
    places = {"PHOTO": "photo.png", "OUT": "out", "RECIPE": "recipe.yaml"}
    named = {"FOLDER": new, **{word: tmp_path / place for word, place in places.items()}}

    def run(arguments: list[Any]) -> Result:
        return hf_vit_command(*(named.get(word, word) for word in arguments))

    return run


@pytest.mark.parametrize(
    ("command", "trouble"),
    [
        *((command, "404") for command in LOADS),
        *((command, trouble) for command in ("inspect", "evaluate on") for trouble in TROUBLES if trouble != "404"),
    ],
)
def test_what_cannot_be_loaded_ends_with_a_sentence(
    command: str, trouble: str, loading: Any, client: Hub, tmp_path: Path
) -> None:
    make, remedy = TROUBLES[trouble]
    make(client)
    result = loading(LOADS[command])
    assert_is_a_sentence(result, remedy)
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_a_file_that_cannot_be_fetched_is_not_taken_for_one_that_is_not_there(
    loading: Any, client: Hub, new: Path
) -> None:
    """Without its config or its preprocessing, a model would answer something else, and nobody would know."""
    push(new, NAME)
    for file in ("/config.json", "/preprocessor_config.json", "/processor_config.json"):
        client.fail(f"HEAD .*main{file}", 503, times=10**9)
        assert_is_a_sentence(loading(["inspect", NAME]), file, "try again later")
        client.troubles.clear()
    assert loading(["inspect", NAME]).exit_code == 0
    client.fail("", 503, times=10**9)  # all is in the cache now, also that there is no processor_config.json
    assert loading(["inspect", NAME]).exit_code == 0
