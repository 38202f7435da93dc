"""What commands print besides their results: bars, libraries, and Ctrl-C."""

import io
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from hf_vit.cli import endings
from hf_vit.cli.endings import clear_endings, typed_command
from hf_vit.data.loaders import evaluation_loader, training_loader
from hf_vit.registration import when_imported
from hf_vit.system.machine import cores
from hf_vit.system.progress import TimeLeft, no_bars_of_transformers, progress_bar, show


def by_import_error() -> None:
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt as error:
        raise ImportError("initialization failed") from error


def at_once() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("work", [at_once, by_import_error])
def test_an_interrupted_import_is_one_line(work: Any, capsys: pytest.CaptureFixture, monkeypatch: Any) -> None:
    monkeypatch.setattr(endings, "quiet_libraries", lambda: None)
    with pytest.raises(typer.Exit) as ended, clear_endings():
        work()
    assert ended.value.exit_code == 130
    assert capsys.readouterr().err == "Stopped by SIGINT.\n"


@pytest.mark.parametrize(
    ("error", "is_explained"),
    [
        (ModuleNotFoundError("No module named 'torchvision'", name="torchvision"), True),
        (RuntimeError("operator torchvision::nms does not exist"), True),
        (ModuleNotFoundError("No module named 'hf_vit.misspelled'", name="hf_vit.misspelled"), False),
        (RuntimeError("a defect"), False),
    ],
)
def test_a_broken_installation_is_a_sentence(
    error: Exception, is_explained: bool, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(typer.Exit if is_explained else type(error)), clear_endings():
        raise error
    said = capsys.readouterr().err
    assert (
        said.startswith(f"Error: An installed package is missing or does not fit ({error}; torch 2.") == is_explained
    )


def test_an_import_is_reported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "imported_by_a_test.py").touch()
    seen: list[int] = []
    when_imported("imported_by_a_test", lambda: seen.append(1))
    assert not seen
    __import__("imported_by_a_test")
    assert seen == [1]
    when_imported("imported_by_a_test", lambda: seen.append(2))
    assert seen == [1, 2]


QUIET = """
from hf_vit.cli.endings import quiet_libraries
quiet_libraries()
import datasets
from huggingface_hub.utils import are_progress_bars_disabled
from transformers.utils import logging
assert not logging.is_progress_bar_enabled() and logging.get_verbosity() == logging.ERROR
assert datasets.are_progress_bars_disabled() and not are_progress_bars_disabled()
"""


@pytest.mark.slow
def test_libraries_are_quiet_but_for_downloads() -> None:
    subprocess.run([sys.executable, "-c", QUIET], check=True)


def test_a_bar_fits_80_columns_and_keeps_the_accuracy() -> None:
    shown = {"accuracy": "98.7%", "loss": "0.1234", "images/s": "12,345", "data wait": "12%", "lr": "1.0e-03"}
    for total in (123_456, None):
        bar = progress_bar(total, "steps", "Features", file=(file := io.StringIO()), mininterval=0)
        bar.update(98_765)
        show(bar, shown)
        bar.close()
        lines = file.getvalue().replace("\n", "\r").split("\r")
        assert max(map(len, lines)) <= 80 and any("Features" in line and "98.7%" in line for line in lines)


def test_bars_in_a_file_are_lines(capsys: pytest.CaptureFixture) -> None:
    with progress_bar(3, "steps") as bar:
        for _ in range(3):
            bar.update()
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("0/3 steps") and last.startswith("3/3 steps")


@pytest.mark.parametrize("columns", [0, 100])
def test_a_terminal_without_a_size_has_a_bar(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

        def fileno(self) -> int:
            return 2

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr("os.get_terminal_size", lambda number: os.terminal_size((columns, 24 if columns else 0)))
    monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda file: (columns, 24 if columns else 0))
    with progress_bar(10, "steps", file=terminal, mininterval=0) as bar:
        bar.update(5)
    assert "5/10 steps" in terminal.getvalue()


def test_the_time_of_a_long_run_is_stated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for seconds, expected in ((1.0, "About 16 min left: 989 steps of 1 s"), (30.0, "About 8.3 hours left"), (0.1, "")):
        now, said = [0.0], list[str]()
        monkeypatch.setattr(time, "monotonic", lambda now=now: now[0])
        left = TimeLeft(1000, said.append)
        for step in range(1, 200):
            now[0] += seconds + 60 * (step == 1)  # compilation, for example
            left.after(step)
        assert [line.startswith(expected) for line in said] == [True] * bool(expected), said


@pytest.mark.parametrize("is_hidden", [False, True])
def test_bars_of_transformers_are_hidden_for_a_while(is_hidden: bool) -> None:
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    logging.enable_progress_bar()
    (disable_progress_bars if is_hidden else enable_progress_bars)()
    try:
        with no_bars_of_transformers():
            assert not logging.is_progress_bar_enabled()
        assert logging.is_progress_bar_enabled() and are_progress_bars_disabled() == is_hidden
    finally:
        enable_progress_bars()


def test_workers_do_not_exceed_the_cores() -> None:
    images: Any = SimpleNamespace(is_on_device=False)
    order: Any = [[0]]
    assert training_loader(images, order, 1000).num_workers == cores()
    assert training_loader(images, order, 0).num_workers == 0
    assert evaluation_loader(images, 1, 1000).num_workers == cores()


@pytest.mark.parametrize(
    ("path", "typed"),
    [
        ("/usr/bin/hf-vit", "hf-vit recipes"),
        ("/x/hf_vit/__main__.py", "python -m hf_vit recipes"),
        ("/x/hf_vit/cli/__main__.py", "python -m hf_vit.cli recipes"),
    ],
)
def test_a_command_is_repeated_as_it_was_typed(path: str, typed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [path, "recipes"])
    assert typed_command() == typed
