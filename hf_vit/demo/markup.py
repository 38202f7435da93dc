"""HTML of the demo page: predictions as bars, and errors. All text from outside is escaped."""

from collections.abc import Mapping, Sequence

from ..inspection.page import escape
from ..prediction.predictor import Prediction
from ..system.texts import shortened
from .exhibit import Answer, Exhibit

MOST_IN_SET = 10  # names of labels of a set that are shown

# Colours come from the page's theme, which has a light and a dark variant.
STYLE = """
.vit-facts, .vit-note { color: var(--body-text-color-subdued); margin: 0.25rem 0; }
.vit-title { font-size: 1.5rem; font-weight: 600; margin: 0; overflow-wrap: anywhere; }
.vit-cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(12rem, 100%), 1fr)); gap: 0.75rem; }
.vit-card { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 0.75rem 1rem;
  background: var(--block-background-fill); min-width: 0; }
.vit-card h3 { font-size: 1rem; font-weight: 600; margin: 0; overflow-wrap: anywhere; }
.vit-bars { list-style: none; margin: 0.5rem 0 0; padding: 0; }
.vit-bars li { display: grid; grid-template-columns: minmax(0, 1fr) auto; gap: 0 0.75rem; margin: 0 0 0.6rem;
  padding: 0; }
.vit-bars .label { overflow-wrap: anywhere; }
.vit-bars .score { font-variant-numeric: tabular-nums; }
.vit-bars .bar { grid-column: 1 / -1; height: 0.5rem; border-radius: 0.25rem;
  background: var(--border-color-primary); overflow: hidden; }
.vit-bars .bar span { display: block; height: 100%; background: #2a6ebb; }
.dark .vit-bars .bar span { background: #5b9be0; }
.vit-alert { border-left: 4px solid #c62828; padding: 0.5rem 0.75rem; margin: 0; overflow-wrap: anywhere; }
.gradio-container .html-container.html-container { padding: 0; }
@media (max-width: 640px) { .gradio-container .app.app { padding: 1rem 0.75rem; } }
"""


def by(size: Sequence[int]) -> str:
    """Return a size as text, height first."""
    return f"{size[0]} × {size[1]}"


def seconds(duration: float) -> str:
    """Return a duration in milliseconds or seconds."""
    return f"{1000 * duration:.0f} ms" if duration < 1 else f"{duration:.1f} s"


def heading(exhibit: Exhibit) -> str:
    """Return the model's name and size."""
    config = exhibit.config
    facts = (
        f"Vision Transformer: {config.num_hidden_layers} layers, {config.num_attention_heads} attention heads, "
        f"{by(exhibit.own_size)} pixels, patches of {by(config.patch_shape)}, {config.num_labels:,} labels."
    )
    return f'<h1 class="vit-title">{escape(exhibit.name)}</h1><p class="vit-facts">{escape(facts)}</p>'


def note(text: str) -> str:
    """Return a note in a subdued colour."""
    return f'<p class="vit-note">{escape(text)}</p>'


def alert(text: str) -> str:
    """Return an error message, which screen readers announce at once."""
    return f'<p class="vit-alert" role="alert">{escape(text)}</p>'


def cards(headings: Sequence[str], exhibits: Sequence[Exhibit], answers: Sequence[Answer]) -> str:
    """Return predictions side by side, each with a heading; for a broken image its error only, once."""
    for answer in answers:
        if answer.prediction.error is not None:
            return alert(answer.prediction.error)
    each = (
        f'<section class="vit-card"><h3>{escape(title)}</h3>{_cost(exhibit, answer)}'
        f"{_certainty(exhibit, answer.prediction)}{_bars(answer.prediction, exhibit.colors)}</section>"
        for title, exhibit, answer in zip(headings, exhibits, answers, strict=True)
    )
    return f'<div class="vit-cards">{"".join(each)}</div>'


def _cost(exhibit: Exhibit, answer: Answer) -> str:
    return note(f"{exhibit.patches(answer.size):,} patches, {seconds(answer.seconds)} from file to prediction")


def _certainty(exhibit: Exhibit, prediction: Prediction) -> str:
    """Return what the thresholds of the model say of an image, as notes."""
    said = []
    if prediction.is_unknown:
        said.append(f"Unknown: no label has a probability of at least {exhibit.config.abstention_threshold:.1%}.")
    if prediction.label_set is not None:
        names = shortened(prediction.label_set, MOST_IN_SET)
        said.append(f"Label set ({100 * exhibit.config.label_set_coverage:.4g}% coverage): {names}")
    return "".join(map(note, said))


def _bars(prediction: Prediction, colors: Mapping[str, str]) -> str:
    if prediction.are_values:
        values = (
            f'<li><span class="label">{escape(label)}</span><span class="score">{value:.4g}</span></li>'
            for label, value in zip(prediction.labels, prediction.scores, strict=True)
        )
        return f'<ol class="vit-bars">{"".join(values)}</ol>'
    bars = (
        f'<li><span class="label">{escape(label)}</span><span class="score">{score:.1%}</span>'
        f'<span class="bar"><span style="width: {score:.1%}{_background(colors.get(label))}"></span></span></li>'
        for label, score in zip(prediction.labels, prediction.scores, strict=True)
    )
    return f'<ol class="vit-bars">{"".join(bars)}</ol>'


def _background(color: str | None) -> str:
    return "" if color is None else f"; background: {color}"
