"""Tables of pages that follow from other files: `python docs/tables.py` writes them anew.

A table stands between two comments, `<!-- table: NAME -->` and `<!-- end -->`; `tests/test_site.py` compares it with
its sources.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import typer
import yaml

from hf_vit.cli.main import app

ROOT = Path(__file__).resolve().parents[1]
# The metric of a task that the zoo shows: its key in metrics.json, and its name.
SHOWN = {
    "image-classification": ("eval_accuracy", "accuracy"),
    "image-segmentation": ("eval_mean_iou", "mean IoU"),
    "object-detection": ("eval_map_50", "AP50"),
}
VERDICTS = ("agrees", "does not agree", "no significant difference", "inconclusive")


def models() -> str:
    """Return the table of trained models, from the files of their folders in `model_cards/`."""
    rows = ["| model | task | data | parameters | result | training | licence |", "|---|---|---|---|---|---|---|"]
    for card in sorted(ROOT.glob("model_cards/*/recipe.yaml")):
        rows.append("| " + " | ".join(_model(card.parent)) + " |")
    return "\n".join(rows)


def _model(folder: Path) -> Iterator[str]:
    """Yield the cells of a model.

    `seeds.json` has the values of the shown metric over seeds, where a model was trained with several.
    """
    metrics, timing = (json.loads((folder / f"{name}.json").read_text()) for name in ("metrics", "timing"))
    text = (folder / "README.md").read_text()
    facts: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    dataset = facts["model-index"][0]["results"][0]["dataset"]
    key, name = SHOWN[facts["pipeline_tag"]]
    values = json.loads((folder / "seeds.json").read_text()) if (folder / "seeds.json").exists() else [metrics[key]]
    spread = f"mean of {len(values)} seeds, sd {100 * stdev(values):.1f}" if len(values) > 1 else "one seed"
    (hardware,) = re.findall(r"^- hardware: (.+)$", text, re.MULTILINE)
    yield f"[{folder.name}]({folder.name}/README.md)"
    yield facts["pipeline_tag"].replace("-", " ")
    yield f"{metrics['train_images']:,} images of {dataset['name']}"
    yield f"{metrics['parameters']:,}"
    yield f"{name} {100 * mean(values):.1f} % of {metrics['eval_count']:,} images ({spread})"
    yield f"{timing['seconds']:,.0f} s on {hardware}"
    yield facts.get("license", "not stated")


def claims() -> str:
    """Return the claims that the studies have tested, by verdict, from the pages of the studies."""
    found: dict[str, list[str]] = {verdict: [] for verdict in VERDICTS}
    for page in sorted(ROOT.glob("model_cards/studies/*/README.md")):
        text, study = page.read_text(), page.parent.name
        title = text.partition("\n")[0].removeprefix("# ")
        link = f"[{title}, {study.rpartition('-')[2]}](../model_cards/studies/{study}/README.md)"
        for claim, verdict, measured in re.findall(r"^\| (.+) \| \*\*(.+)\*\* \| (.+) \|$", text, re.MULTILINE):
            found[verdict].append(f"| {link} | {claim} | {measured} |")
    parts = []
    for verdict, rows in found.items():
        parts += [f"### {verdict.capitalize()}: {len(rows)} claims", ""]
        parts += ["| study | claim | measured |", "|---|---|---|", *rows, ""]
    return "\n".join(parts).rstrip()


def commands() -> str:
    """Return the help of all commands as sections, from `tests/golden/help.txt`, with types, choices and defaults."""
    program: Any = typer.main.get_command(app)
    context = program.context_class(program, info_name="hf-vit")
    parts = []
    for text in re.split(r"^\$ ", (ROOT / "tests" / "golden" / "help.txt").read_text(), flags=re.MULTILINE)[1:]:
        command, _, body = text.partition("\n")
        options = options_of(program, context, command)
        blocks = []
        for line in body.strip().splitlines():
            name = re.split("[:,]", line)[0]
            if name in options:
                blocks.append("`{}`\n: {}\n".format(*options[name]))
            elif ": hf-vit " in line:
                blocks.append("{}:\n```bash\n{}\n```".format(*line.split(": ", 1)))
            else:
                blocks.append(line)
        parts.append(f"## {command}\n\n" + "\n".join(blocks))
    return "\n\n".join(parts)


def options_of(program: Any, context: Any, command: str) -> dict[str, tuple[str, str]]:
    """Return the options of a command by each of their names: names with types, and their help with defaults."""
    for name in command.split()[1:]:
        program = program.get_command(context, name)
        context = program.context_class(program, info_name=name, parent=context)
    records = filter(None, (each.get_help_record(context) for each in program.params))
    return {name: record for record in records for name in re.split("[ ,]+", record[0])}


TABLES: dict[str, Callable[[], str]] = {"models": models, "claims": claims}


def renewed(text: str) -> str:
    """Return a page with its tables written anew."""

    def table(match: re.Match[str]) -> str:
        return f"{match[1]}\n{TABLES[match[2]]()}\n{match[3]}"

    return re.sub(r"(<!-- table: (\w+) -->)\n.*?\n?(<!-- end -->)", table, text, flags=re.DOTALL)


def pages() -> Iterator[Path]:
    """Yield the pages that may have tables."""
    yield from (*sorted((ROOT / "docs").glob("*.md")), ROOT / "model_cards" / "README.md")


if __name__ == "__main__":
    for page in pages():
        page.write_text(renewed(page.read_text()))
