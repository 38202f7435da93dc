"""Options and fixtures of all tests: a tiny architecture, a seed before every test, and data sets if present."""

import gc
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hub_server
import huggingface_hub.constants
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

import hf_vit

# Property tests use the same examples in every run; `--hypothesis-profile=long` uses many and others each time.
PHASES = (Phase.explicit, Phase.generate, Phase.shrink)
settings.register_profile(
    "quick",
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    phases=PHASES,
    suppress_health_check=[HealthCheck.too_slow],  # it depends on the load of the machine
)
settings.register_profile("long", settings.get_profile("quick"), max_examples=2_000, derandomize=False)
settings.load_profile("quick")

# A shell starts background jobs with SIGINT ignored, and processes that tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": (32, 48),
    "patch_size": 8,
    "num_labels": 5,
}
SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--first-and-last-parameters",
        action="store_true",
        help="Run only the first and the last parameter set of every test function.",
    )


@pytest.hookimpl(trylast=True)  # after the selection by markers
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("first_and_last_parameters"):
        kept = first_and_last(items)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]
    items[:] = slow_first(items, getattr(config, "workerinput", {}).get("workercount", 1))


def first_and_last(items: list[pytest.Item]) -> set[pytest.Item]:
    """Return the first and the last item of every test function."""
    functions: dict[str, list[pytest.Item]] = {}
    for item in items:
        functions.setdefault(item.nodeid.partition("[")[0], []).append(item)
    return {item for of_function in functions.values() for item in (of_function[0], of_function[-1])}


def slow_first(items: list[pytest.Item], workers: int) -> list[pytest.Item]:
    """Order items so that every worker begins with slow tests: no worker is left alone with a slow one at the end.

    `--dist worksteal` gives each worker one of `workers` consecutive parts of equal length.
    """
    slow = [item for item in items if item.get_closest_marker("slow")]
    fast = [item for item in items if not item.get_closest_marker("slow")]
    ordered: list[pytest.Item] = []
    for worker in range(workers):
        slow_part = slow[len(slow) * worker // workers : len(slow) * (worker + 1) // workers]
        number = max(0, len(items) * (worker + 1) // workers - len(ordered) - len(slow_part))
        ordered += [*slow_part, *fast[:number]]
        fast = fast[number:]
    return ordered


@pytest.fixture(autouse=True, scope="module")
def short_collections() -> None:
    """Exclude all objects that exist when a file starts from later garbage collections.

    After thousands of tests, a collection takes seconds, and transformers' own tests start two for each test.
    """
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # nanobind reports what is left at the end as leaks


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_pause_between_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the seconds that `datasets` sleeps after every pass over a shuffled stream, for the threads of Arrow."""
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.0, raising=False)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Use one thread, as processes of `isolated` do: sums over several threads differ in the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny_config():
    """Return a function that builds a config: 3 layers, width 32, 32x48 pixels, a grid of 4x6 patches."""
    return lambda **fields: hf_vit.HFViTConfig(**{**TINY, **fields})


@pytest.fixture
def pixel_values() -> torch.Tensor:
    """Return two images of the tiny config's size."""
    return torch.randn(2, 3, 32, 48)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of data sets and reference checkpoints next to the project."""
    if not SHARED.is_dir():
        pytest.skip(f"no data at {SHARED}")
    return SHARED


@pytest.fixture
def standin() -> Iterator[Any]:
    """Serve an empty Hub on 127.0.0.1; afterwards, check that it saw no error and no token where none belongs."""
    with hub_server.running() as hub:
        yield hub
    assert hub.errors == [] and hub.leaks == [] and not hub.cdn_saw_token


@pytest.fixture
def client(standin: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make `standin` the Hub of this process, with a token in the format of real tokens."""
    for name, value in {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    hub_server.set_address(standin.url, monkeypatch)
    monkeypatch.setenv("HF_TOKEN", hub_server.SHAPED)
    return standin


@pytest.fixture
def no_pause_between_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the half minute that the client of the Hub waits in total before it gives up a request."""
    hasty = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    monkeypatch.setattr("huggingface_hub.utils._http.time", hasty)
