"""Text from outside, fit to be shown: names of labels and files, what servers say, and what may hold a token."""

import os
import re
import shlex
from collections.abc import Sequence

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


def shortened(names: Sequence[object], most: int = 3) -> str:
    """Return the first `most` names, separated by commas, with "..." for the others."""
    return ", ".join(map(str, names[:most])) + ", ..." * (len(names) > most)


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
    from huggingface_hub import get_token

    for known in (token, os.environ.get("HF_TOKEN"), get_token()):
        if known is not None and len(known) >= SHORTEST_TOKEN:
            text = text.replace(known, "TOKEN")
    for pattern in TOKENS:
        text = pattern.sub("TOKEN", text)
    return text


def has_token(text: str) -> bool:
    """Say whether a token stands in a text."""
    return without_tokens(text) != text
