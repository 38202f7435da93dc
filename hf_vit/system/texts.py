"""Make untrusted text safe to print: label and file names, messages of servers, and text that may contain a token."""

import difflib
import os
import re
import shlex
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

# Characters that terminals and text viewers execute instead of showing: control characters, line separators, changes
# of the writing direction; and lone surrogates, which cannot be encoded. Newline and tab are allowed.
HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
BREAK = re.compile(r"\s*\n\s*|\t")
# Markdown syntax within a line; an underscore inside a word has no meaning there.
MARKUP = re.compile(r"[\\`*\[\]<>|~$]|(?<!\w)_|_(?!\w)|&(?=#?\w+;)")
SAFE_WORD = re.compile(r"[\w@%+=:,./-]+", re.ASCII)

# Tokens of the Hub anywhere in a text, credentials in a URL, and secret query parameters of a URL.
TOKENS = tuple(
    map(
        re.compile,
        (
            r"(?:hf|api_org)_[A-Za-z0-9]{20,}",
            r"(?<=://)(?!git@)[\w.~%!$&*+:=-]+(?=@)",
            r"(?:(?<=http:/)|(?<=https:/))[\w.~%!$&*+:=-]+(?=@)",  # a URL that was normalised like a path
            r"(?i)(?<=[?&])[\w-]*(?:token|key|secret|password|signature|credential|sig)=[^\s&#\"'<>]+",
        ),
    )
)
COLUMNS = 80  # of a terminal
SHORTEST_TOKEN = 8  # a shorter configured token could be an ordinary word


def visible(text: str) -> str:
    """Replace control characters by Python's escape sequences."""
    return HIDDEN.sub(lambda match: ascii(match[0])[1:-1], text)


def one_line(text: str) -> str:
    """Replace line breaks and tabs by spaces, and other control characters as `visible` does."""
    return visible(BREAK.sub(" ", text))


def shortened(names: Sequence[object], most: int = 3) -> str:
    """Return the first `most` names, separated by commas, with "..." for the others."""
    return ", ".join(map(str, names[:most])) + ", ..." * (len(names) > most)


def hanging(start: str, text: str) -> list[str]:
    """Return a text in lines of at most 80 columns after a start, to whose width the other lines are indented."""
    return textwrap.wrap(
        text,
        COLUMNS,
        initial_indent=start,
        subsequent_indent=" " * len(start),
        break_on_hyphens=False,
        break_long_words=False,
    )


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is most similar to a misspelled one; `None` if none is similar."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.7)), None)


def read_size(option: str, text: str) -> tuple[int, int]:
    """Read a height and a width from `"H"` or `"HxW"`; `option` is for the error."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.strip().isdecimal() and int(side) for side in sides):
        raise ValueError(f"Expected pixels as H or HxW for {option}, such as 224 or 224x320; got {text!r}.")
    return int(sides[0]), int(sides[-1])


def counted(number: int, one: str, many: str | None = None) -> str:
    """Return a number with its noun, such as `"1 image"` or `"2,000 images"`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def markdown(text: str) -> str:
    """Escape a text for a line of Markdown or a cell of a table."""
    return MARKUP.sub(r"\\\g<0>", one_line(text))


def code(text: str) -> str:
    """Format a text as inline code in Markdown."""
    text = one_line(text)
    marks = _longer_than_in(text, 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{marks}{space}{text}{space}{marks}"


def fenced(text: str, language: str) -> str:
    """Format a text as a fenced code block in Markdown; the fence is longer than any inside the text."""
    marks = _longer_than_in(text, 3)
    return f"{marks}{language}\n{visible(text).rstrip()}\n{marks}"


def _longer_than_in(text: str, least: int) -> str:
    """Return a run of backticks that is longer than every run in a text."""
    return "`" * max(least, *(len(run) + 1 for run in re.findall("`+", text)), 0)


def shell_word(text: str) -> str:
    """Quote a text as one word of a shell command."""
    return f'"{text}"' if SAFE_WORD.fullmatch(text) else shlex.quote(visible(text))


def without_tokens(text: str, token: str | None = None) -> str:
    """Replace everything that is or looks like an access token by `TOKEN`, the configured Hub token included."""
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
    """Return whether a text contains an access token."""
    return without_tokens(text) != text
