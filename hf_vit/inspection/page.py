"""The HTML page of `hf-vit inspect`: one self-contained file with all figures, without scripts or requests."""

import base64
from collections.abc import Iterable, Mapping
from html import escape as escape_markup
from pathlib import Path
from typing import Any, NamedTuple

from ..system.texts import visible

MEDIA = {".png": "image/png", ".svg": "image/svg+xml"}

STYLE = """
:root { color-scheme: light dark; --ink: #22262b; --soft: #5b616b; --ground: #fff; --line: #e1e4e8; --link: #1d5a9e; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #a4abb5; --ground: #16191d; --line: #2d333b; --link: #7db3ee; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0.5rem 0 1rem; }
h2 { font-size: 1.2rem; margin: 0 0 0.5rem; }
a { color: var(--link); }
section { border-top: 1px solid var(--line); padding: 1.75rem 0 1rem; }
nav ul { columns: 16rem; padding-left: 1.1rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.15rem 1.25rem; margin: 0 0 1.5rem; }
dt { color: var(--soft); }
dd { margin: 0; }
figure { margin: 0; }
img { display: block; max-width: 100%; height: auto; margin-top: 0.75rem; background: #fff; border-radius: 6px; }
figcaption { max-width: 46rem; }
.note { color: var(--soft); }
"""


class Entry(NamedTuple):
    """A figure on the page: its PNG or SVG file, heading, how to read it, and a caption for its alternative text."""

    path: Path
    heading: str
    reading: str
    caption: str


def write_page(
    path: Path, title: str, facts: Mapping[str, Any], entries: Iterable[Entry], notes: Iterable[str] = ()
) -> None:
    """Write an HTML file with the facts of a model, its embedded figures, and notes on skipped parts."""
    entries = list(entries)
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(fact))}</dd>\n" for name, fact in facts.items())
    links = "".join(
        f'<li><a href="#p{number}">{escape(entry.heading)}</a></li>\n' for number, entry in enumerate(entries)
    )
    sections = "".join(_section(number, entry) for number, entry in enumerate(entries))
    noted = "".join(f'<p class="note">{escape(note)}</p>\n' for note in notes)
    body = f"""<dl>
{listed}</dl>
<nav><ul>
{links}</ul></nav>
{noted}{sections}"""
    path.write_text(document(title, body), encoding="utf-8")


def document(title: str, body: str, style: str = "") -> str:
    """Return a complete page without scripts or requests; `body` is markup, `style` is added to `STYLE`."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{STYLE}{style}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
{body}</main>
</body>
</html>
"""


def escape(text: str) -> str:
    """Escape text for HTML."""
    return escape_markup(visible(text))


def _section(number: int, entry: Entry) -> str:
    data = base64.b64encode(entry.path.read_bytes()).decode()
    return f"""<section id="p{number}">
<h2>{escape(entry.heading)}</h2>
<figure>
<figcaption>{escape(entry.reading)}</figcaption>
<img src="data:{MEDIA[entry.path.suffix]};base64,{data}" alt="{escape(f"{entry.heading}. {entry.caption}")}">
</figure>
</section>
"""
