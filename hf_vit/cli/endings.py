"""What all commands share: how they print, how they end, and how they read sizes."""

import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import typer

from ..registration import when_imported
from ..system import texts
from ..system.texts import one_line, visible, without_tokens

# Options that discard a saved run. They must not be repeated to resume it.
DISCARDING = r" (--resume[ =]never\b|--restart\b)"


def echo(text: str, err: bool = False, nl: bool = True) -> None:
    """Print a text without tokens, and without control characters from names of files and labels."""
    typer.echo(visible(without_tokens(text)), err=err, nl=nl)


def announce(text: str) -> None:
    """Tell a user at a terminal what a command begins to do, since its imports take seconds."""
    if os.environ.get("RANK", "0") == "0" and sys.stderr.isatty():
        echo(text, err=True)


def typed_command() -> str:
    """Return the command that the user typed, without tokens."""
    return without_tokens(shlex.join([*program(), *sys.argv[1:]]))


def program() -> list[str]:
    """Return the words that start this program, as the user typed them."""
    path = Path(sys.argv[0])
    if path.name != "__main__.py":
        return [path.name]
    return ["python", "-m", "hf_vit.cli" if path.parent.name == "cli" else "hf_vit"]


def quiet_libraries() -> None:
    """Silence what libraries print while they load local files: bars, and reports of weights.

    Commands print one bar and messages of their own. Bars of downloads stay. Environment variables that the user set
    are kept.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    # Each failed request is logged, and repeated; the error at the end says what failed.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    when_imported("transformers.utils.logging", _hide_bars_of_transformers)


def _hide_bars_of_transformers() -> None:
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    logging.disable_progress_bar()  # of the Hub's downloads too
    if os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS") is None:
        enable_progress_bars()


def read_size(option: str, text: str | None) -> tuple[int, int] | None:
    """Read a height and a width from H or HxW, if they are given."""
    return None if text is None else texts.read_size(option, text)


def read_numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    """Read numbers separated by commas, if they are given."""
    if text is None:
        return None
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise ValueError(f"{option} expects numbers separated by commas, got {text!r}.") from None


@contextmanager
def clear_endings() -> Iterator[None]:
    """Turn an interruption, and an error that the user can fix, into a message and an exit code.

    Any other error is a defect of the package and keeps its traceback.
    """
    quiet_libraries()
    try:
        yield
    except (typer.Exit, BrokenPipeError):
        raise
    except Exception as error:
        if _is_interrupt(error):
            _stop()
        from huggingface_hub.errors import StrictDataclassError

        from ..system.extras import broken_installation
        from ..system.network import sentence_of

        # Our own errors say more than their causes.
        message = None if type(error) is ValueError else sentence_of(error) or broken_installation(error)
        if isinstance(error, StrictDataclassError):  # a config field of the wrong type; two lines
            message = one_line(str(error))
        if message is None and not isinstance(error, ValueError | FloatingPointError | OSError):
            raise
        _end_progress_bars()
        echo(f"Error: {message or error}", err=True)
        raise typer.Exit(2) from None
    except BaseException as error:
        from ..system.stopping import Interrupted

        if _is_interrupt(error):
            _stop()
        if not isinstance(error, Interrupted):
            raise
        if os.environ.get("RANK", "0") == "0":
            echo(f"{error}\n{_how_to_resume()}" if error.can_resume else str(error), err=True)
        raise typer.Exit(error.exit_code) from None


def _is_interrupt(error: BaseException | None) -> bool:
    """Return whether Ctrl-C raised an error; an import that it interrupts may end in another one."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def _stop() -> NoReturn:
    _end_progress_bars()
    echo("Stopped by SIGINT.", err=True)
    raise typer.Exit(130) from None


def _how_to_resume() -> str:
    command = typed_command()
    resuming, discarding = re.sub(DISCARDING, "", command), re.search(DISCARDING, command)
    which = "The same command" if discarding is None else f"This command, without {discarding[1].replace('=', ' ')},"
    return f"{which} resumes the run:  {resuming}"


def _end_progress_bars() -> None:
    """Leave the line of a progress bar whose work has failed."""
    if "tqdm" in sys.modules:
        from tqdm import tqdm

        for bar in list(getattr(tqdm, "_instances", ())):
            bar.close()
