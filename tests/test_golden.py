"""All that users read, in two files that can be reviewed in one sitting: help texts, and messages of the code.

After a change of texts, write them anew and read the diff:

    python tests/test_golden.py
"""

import ast
import difflib
from collections.abc import Iterator
from inspect import cleandoc
from pathlib import Path
from typing import Any

import pytest
import typer

import hf_vit
from hf_vit.cli import app

PACKAGE = Path(hf_vit.__file__).parent
GOLDEN = Path(__file__).parent / "golden"
PRINTING = {"echo", "say", "print", "fail"}
LOGGING = {"warn", "warning", "warning_once", "warning_advice", "info", "error"}


def help_texts() -> str:
    """Return the help of `hf-vit` and of each of its commands, as the code states it; typer's layout varies."""
    group: Any = typer.main.get_command(app)
    texts, commands = [], {"": group}
    for name, command in group.commands.items():
        commands |= {
            name: command,
            **{f"{name} {each}": one for each, one in getattr(command, "commands", {}).items()},
        }
    for name, command in commands.items():
        lines = [f"$ hf-vit {name}".rstrip(), "", cleandoc(command.help), ""]
        for parameter in command.params:
            if getattr(parameter, "hidden", False):  # of a study: they are those of train
                continue
            words = ", ".join(parameter.opts) if parameter.opts[0].startswith("-") else parameter.metavar
            lines.append(f"{words or parameter.name}: {parameter.help}")
        texts.append("\n".join([*lines, *([command.epilog] if command.epilog else []), ""]))
    return "\n".join(texts)


def strings_in(node: ast.AST) -> Iterator[str]:
    """Yield the string literals below a node, f-strings as templates."""
    if isinstance(node, ast.Constant):
        if isinstance(node.value, str):
            yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield "".join(
            part.value if isinstance(part, ast.Constant) else f"{{{ast.unparse(part.value)}}}"  # type: ignore[attr-defined]
            for part in node.values
        )
    else:
        for child in ast.iter_child_nodes(node):
            yield from strings_in(child)


def messages_of(path: Path) -> list[str]:
    """Return what a file raises, warns, logs and prints."""
    messages = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        call = node.exc if isinstance(node, ast.Raise) else node
        if not isinstance(call, ast.Call):
            continue
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        if isinstance(node, ast.Raise) or name in PRINTING | LOGGING:
            messages += [(node.lineno, text) for argument in call.args for text in strings_in(argument)]
    # A sentence, not a separator or the name of a file.
    texts = [
        text.strip() for _, text in sorted(set(messages)) if sum(map(str.isalpha, text)) > 3 and " " in text.strip()
    ]
    return list(dict.fromkeys(text.replace("\n", "\\n") for text in texts))


def messages() -> str:
    """Return the messages of all files of the package."""
    found = {path.relative_to(PACKAGE).as_posix(): messages_of(path) for path in sorted(PACKAGE.rglob("*.py"))}
    return "\n".join(f"# {name}\n" + "".join(f"{text}\n" for text in texts) for name, texts in found.items() if texts)


FILES = {"help.txt": help_texts, "messages.txt": messages}


@pytest.mark.parametrize("name", FILES)
def test_texts_are_those_of_the_file(name: str) -> None:
    expected, found = (GOLDEN / name).read_text(encoding="utf-8"), FILES[name]()
    changes = "\n".join(difflib.unified_diff(expected.splitlines(), found.splitlines(), lineterm="", n=0))
    assert found == expected, f"run `python tests/test_golden.py` and review its diff:\n{changes}"


if __name__ == "__main__":
    for name, texts in FILES.items():
        (GOLDEN / name).write_text(texts(), encoding="utf-8")
