"""Keep transformers' common tests apart: they are collected only where `-m` asks for `upstream`."""

import re
from pathlib import Path

import pytest

# Tests that cannot apply to a plugin, and why.
DESELECTED = {
    "test_pil_can_run_without_torchvision": "it loads in a process that knows transformers only, where a plugin is "
    "remote code: tests/test_remote_code.py loads it so",
}

# transformers' own markers, which `--strict-markers` asks for.
MARKERS = (
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "is_fsdp_test",
    "is_pipeline_test",
    "is_tensor_parallel_test",
    "is_training_test",
    "torch_compile_test",
)


def pytest_configure(config: pytest.Config) -> None:
    for name in MARKERS:
        config.addinivalue_line("markers", f"{name}: one of transformers' own")


def asked_for(config: pytest.Config) -> bool:
    """Return whether `-m` names `upstream`, other than by `not upstream`."""
    return re.search(r"(?<!not )\bupstream\b", config.getoption("markexpr")) is not None


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    # Importing the test modules fetches transformers' source distribution, before any marker is looked at.
    return None if asked_for(config) else True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    deselected = [item for item in items if item.name in DESELECTED and item.path.parent == Path(__file__).parent]
    config.hook.pytest_deselected(items=deselected)
    items[:] = [item for item in items if item not in deselected]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for name, reason in DESELECTED.items() if asked_for(config) else ():
        terminalreporter.write_line(f"DESELECTED {name}: {reason}")
