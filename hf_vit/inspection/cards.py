"""Small pictures with a few lines of text below them, for the pages of `hf-vit audit` and `hf-vit search`."""

import base64
from collections.abc import Callable, Iterable, Sequence
from io import BytesIO
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from ..data.images import read_stored
from ..model.image_conversion_hf_vit import convert_to_rgb, pil_of_tensor, to_8_bit, values_of_file
from .page import escape

SIDE, QUALITY = 144, 80  # longer side of a small picture in pixels, and its JPEG quality

STYLE = """
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: 1rem; margin: 1rem 0; }
.cards.pairs { grid-template-columns: repeat(auto-fill, minmax(min(100%, 18.5rem), 1fr)); }
.card { font-size: 0.8rem; line-height: 1.35; min-width: 0; }
.card .pictures { display: flex; gap: 0.25rem; }
.card .pictures > * { flex: 0 1 9rem; min-width: 0; height: 9rem; }
.card img { width: 100%; object-fit: contain; margin: 0; background: var(--line); }
.card p { margin: 0.25rem 0 0; overflow-wrap: anywhere; }
.card .missing { display: grid; place-items: center; background: var(--line); border-radius: 6px; color: var(--soft); }
.card b { font-weight: 600; }
table { border-collapse: collapse; margin: 0.5rem 0 1rem; font-size: 0.9rem; }
th, td { text-align: left; padding: 0.2rem 1.25rem 0.2rem 0; border-bottom: 1px solid var(--line); }
th, td { overflow-wrap: normal; vertical-align: top; }
td.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
"""


class Card(NamedTuple):
    """Images as `datasets` stores them, and lines of text, the first one in bold."""

    images: Sequence[dict[str, Any]]
    lines: Sequence[str]


def cards(shown: Iterable[Card]) -> str:
    """Return the markup of cards in a grid; an image that cannot be read is replaced by a placeholder."""
    shown = list(shown)
    pairs = " pairs" if any(len(card.images) > 1 for card in shown) else ""
    return f'<div class="cards{pairs}">\n{"".join(map(_card, shown))}</div>\n'


def _card(card: Card) -> str:
    pictures = "".join(map(_picture, card.images))
    first, *rest = card.lines
    lines = "".join(f"<p>{escape(line)}</p>" for line in rest if line)
    return f'<div class="card"><div class="pictures">{pictures}</div><p><b>{escape(first)}</b></p>{lines}</div>\n'


def _picture(stored: dict[str, Any]) -> str:
    try:
        data = base64.b64encode(thumbnail(stored)).decode()
    except Exception:  # some of the images to show are unreadable
        return '<div class="missing">no picture</div>'
    return f'<img src="data:image/jpeg;base64,{data}" alt="" loading="lazy">'


def thumbnail(stored: dict[str, Any]) -> bytes:
    """Return a small JPEG of a stored image. Raise the same errors as `read_stored`."""
    image = read_stored(stored, lambda size: (2 * SIDE, 2 * SIDE))
    if isinstance(image, Tensor):
        pixels = to_8_bit(values_of_file(image))
        image = pil_of_tensor(pixels if len(pixels) in (1, 3) else pixels[:1])
    image = convert_to_rgb(image)
    image.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC)
    file = BytesIO()
    image.save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], numbers: Callable[[int], bool]) -> str:
    """Return the markup of a table; `numbers` tells which columns are aligned to the right."""
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = ""
    for row in rows:
        cells = (f"<td{' class=number' * numbers(index)}>{escape(cell)}</td>" for index, cell in enumerate(row))
        body += f"<tr>{''.join(cells)}</tr>\n"
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>\n'
