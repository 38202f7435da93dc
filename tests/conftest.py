"""What all tests share: a tiny architecture, a seed before every test, and outside data where it is there."""

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
from hypothesis import Phase, settings

import hf_vit

# Properties: the same examples at every run, or with `--hypothesis-profile=long` many, and others each time.
PHASES = (Phase.explicit, Phase.generate, Phase.shrink)
settings.register_profile("quick", max_examples=100, deadline=None, derandomize=True, database=None, phases=PHASES)
settings.register_profile("long", settings.get_profile("quick"), max_examples=2_000, derandomize=False)
settings.load_profile("quick")

# A shell ignores it in what runs behind; every process that a test starts would, too.
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


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_pause_between_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` sleeps for seconds at the end of every pass over a shuffled stream, for the threads of Arrow."""
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.0, raising=False)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums of several threads differ in the last bit; a process of `isolated` has one, too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny_config():
    """Build a config of 3 layers, width 32, 32x48 pixels, patches of 8 (a grid of 4x6), with any field changed."""
    return lambda **fields: hf_vit.HFViTConfig(**{**TINY, **fields})


@pytest.fixture
def pixel_values() -> torch.Tensor:
    """Two images of the tiny config's size."""
    return torch.randn(2, 3, 32, 48)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of data sets and reference checkpoints beside the project."""
    if not SHARED.is_dir():
        pytest.skip(f"no data at {SHARED}")
    return SHARED


@pytest.fixture
def standin() -> Iterator[Any]:
    """A Hub on 127.0.0.1, empty; at the end it must have seen no error and no token where none belongs."""
    with hub_server.running() as hub:
        yield hub
    assert hub.errors == [] and hub.leaks == [] and not hub.cdn_saw_token


@pytest.fixture
def client(standin: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The Hub that this process pushes to and loads from, with a token of the shape that tokens have."""
    for name, value in {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    hub_server.set_address(standin.url, monkeypatch)
    monkeypatch.setenv("HF_TOKEN", hub_server.SHAPED)
    return standin


@pytest.fixture
def no_pause_between_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client waits for half a minute in all before it gives a request up."""
    hasty = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    monkeypatch.setattr("huggingface_hub.utils._http.time", hasty)
