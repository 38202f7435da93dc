"""The page of `hf-vit search`: every query with its most similar images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .cards import STYLE, Card, cards
from .page import document, escape


def write_search_page(path: Path, title: str, results: Sequence[Any], beside: Path) -> None:
    """Write an HTML file with small pictures.

    Args:
        path: The file.
        title: Heading of the page.
        results: Results of `FeatureIndex.search`.
        beside: Folder that image names may be relative to, besides the current directory.
    """
    body, are_missing = "", False
    for result in results:
        shown = [Card([_stored(str(result.query), beside)], [f"query {result.query}", result.error or ""])]
        for each in result.neighbors:
            stored = _stored(each.image, beside)
            are_missing |= stored["path"] is None
            shown.append(Card([stored], [f"{each.score:.4f}", each.label, each.image]))
        body += f"<section>\n<h2>{escape(Path(str(result.query)).name)}</h2>\n{cards(shown)}</section>\n"
    text = "Scores are cosine similarities of features, from -1 to 1."
    if are_missing:
        text += (
            " Images without a picture are not files that can be found from here, such as images inside parquet files."
        )
    path.write_text(document(title, f"<p>{text}</p>\n{body}", STYLE), encoding="utf-8")


def _stored(name: str, beside: Path) -> dict[str, Any]:
    """Return the image of a name as `datasets` stores it; the path is None if there is no such file."""
    found = (path for path in (Path(name), beside / name) if path.is_file())
    return {"bytes": None, "path": next((str(path) for path in found), None)}
