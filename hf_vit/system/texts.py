"""Text from outside, fit to be shown: names of labels and files, what servers say, and what may hold a token."""

import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

# Obeyed by terminals and by readers of text instead of being shown: control characters, line separators, what turns
# the direction of writing; and halves of characters, which no file takes. Newline and tab are left.
HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
BREAK = re.compile(r"\s*\n\s*|\t")
# What means something in Markdown within a line; an underscore inside a word means nothing.
MARKUP = re.compile(r"[\\`*\[\]<>|~$]|(?<!\w)_|_(?!\w)|&(?=#?\w+;)")
SAFE_WORD = re.compile(r"[\w@%+=:,./-]+", re.ASCII)

# What a token of the Hub looks like, wherever it stands; whoever an address logs in; keys among its parameters.
TOKENS = tuple(
    map(
        re.compile,
        (
            r"(?:hf|api_org)_[A-Za-z0-9]{20,}",
            r"(?<=://)(?!git@)[\w.~%!$&*+:=-]+(?=@)",
            r"(?:(?<=http:/)|(?<=https:/))[\w.~%!$&*+:=-]+(?=@)",  # as a path is written
            r"(?i)(?<=[?&])[\w-]*(?:token|key|secret|password|signature|credential|sig)=[^\s&#\"'<>]+",
        ),
    )
)
SHORTEST_TOKEN = 8  # of the one in use; to hide less would hide words


def visible(text: str) -> str:
    """Return a text whose control characters are shown instead of obeyed, each as Python writes it."""
    return HIDDEN.sub(lambda match: ascii(match[0])[1:-1], text)


def one_line(text: str) -> str:
    """Return a text as `visible` does, on one line."""
    return visible(BREAK.sub(" ", text))


def markdown(text: str) -> str:
    """Return a text that Markdown shows as it is, within a line or a cell of a table."""
    return MARKUP.sub(r"\\\g<0>", one_line(text))


def code(text: str) -> str:
    """Return a text as code within a line of Markdown."""
    text = one_line(text)
    marks = _longer_than_in(text, 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{marks}{space}{text}{space}{marks}"


def fenced(text: str, language: str) -> str:
    """Return a text as a block of code in Markdown, which nothing within it ends."""
    marks = _longer_than_in(text, 3)
    return f"{marks}{language}\n{visible(text).rstrip()}\n{marks}"


def _longer_than_in(text: str, least: int) -> str:
    """Return backticks, more than stand together anywhere in a text."""
    return "`" * max(least, *(len(run) + 1 for run in re.findall("`+", text)), 0)


def shell_word(text: str) -> str:
    """Return a text as one word of a command, in double quotes unless it needs stronger ones."""
    return f'"{text}"' if SAFE_WORD.fullmatch(text) else shlex.quote(visible(text))


def without_tokens(text: str, token: str | None = None) -> str:
    """Return a text in which no token stands: none that looks like one, none in an address, and not the one in use."""
    for known in (token, *_tokens_in_use()):
        if known is not None and len(known) >= SHORTEST_TOKEN:
            text = text.replace(known, "TOKEN")
    for pattern in TOKENS:
        text = pattern.sub("TOKEN", text)
    return text


def _tokens_in_use() -> Iterator[str | None]:
    """Yield the tokens that huggingface_hub would find, without importing its HTTP client (0.3 s)."""
    from huggingface_hub import constants

    yield from map(os.environ.get, ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"))
    with suppress(OSError, UnicodeDecodeError):
        yield Path(constants.HF_TOKEN_PATH).read_text(encoding="utf-8").strip()
    if "huggingface_hub.utils" in sys.modules:  # it may know one from elsewhere, such as Colab
        from huggingface_hub import get_token

        yield get_token()


def has_token(text: str) -> bool:
    """Say whether a token stands in a text."""
    return without_tokens(text) != text
