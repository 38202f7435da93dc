"""What all commands share: how they print, how they end, and how they read sizes."""

import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from ..system.texts import one_line, visible, without_tokens

# Options that discard a saved run. They must not be repeated to resume it.
DISCARDING = r" (--resume[ =]never\b|--restart\b)"


def echo(text: str, err: bool = False, nl: bool = True) -> None:
    """Print a text without tokens, and without control characters from names of files and labels."""
    typer.echo(visible(without_tokens(text)), err=err, nl=nl)


def typed_command() -> str:
    """Return the command that the user typed, without tokens."""
    name = Path(sys.argv[0]).name
    program = ["python", "-m", "hf_vit.cli"] if name == "__main__.py" else [name]
    return without_tokens(shlex.join([*program, *sys.argv[1:]]))


def read_size(option: str, text: str | None) -> tuple[int, int] | None:
    """Read a height and a width from H or HxW."""
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.strip().isdigit() and int(side) for side in sides):
        raise ValueError(f"Expected pixels as H or HxW for {option}, such as 224 or 224x320; got {text!r}.")
    return int(sides[0]), int(sides[-1])


@contextmanager
def clear_endings() -> Iterator[None]:
    """Turn an interruption, and an error that the user can fix, into a message and an exit code.

    Any other error is a defect of the package and keeps its traceback.
    """
    try:
        yield
    except (typer.Exit, BrokenPipeError):
        raise
    except Exception as error:
        from huggingface_hub.errors import StrictDataclassError

        from ..system.network import sentence_of

        message = None if type(error) is ValueError else sentence_of(error)  # ours say more than their causes
        if isinstance(error, StrictDataclassError):  # a config field of the wrong type; two lines
            message = one_line(str(error))
        if message is None and not isinstance(error, ValueError | FloatingPointError | OSError):
            raise
        _end_progress_bars()
        echo(f"Error: {message or error}", err=True)
        raise typer.Exit(2) from None
    except BaseException as error:
        from ..system.stopping import Interrupted

        if not isinstance(error, Interrupted):
            raise
        if os.environ.get("RANK", "0") == "0":
            echo(f"{error}\n{_how_to_resume()}" if error.can_resume else str(error), err=True)
        raise typer.Exit(error.exit_code) from None


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
