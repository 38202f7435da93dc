"""The demo page in Gradio: its components, and the functions that answer its events.

Gradio would open uploaded images itself. Events without preprocessing pass the path of the file instead, so that
images are read by this package only. One event at a time uses the model.
"""

import csv
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..inspection.attention import READ_BY
from ..model.abstention_hf_vit import UNKNOWN
from ..prediction.predictor import Prediction
from ..system.texts import counted, one_line
from .exhibit import Exhibit, File
from .markup import alert, by, cards, heading, note

Uploaded = dict[str, Any] | None  # Gradio's description of a file

MOST_FILES = 200  # per batch
COLUMNS = {"file": pa.string(), "label": pa.string(), "score": pa.float64(), "error": pa.string()}
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # first characters of cells that a spreadsheet evaluates
TRIED = (0.5, 1.0, 1.5)  # image sizes that are selected at first, relative to the model's own
VIEWS = {"All layers up to the selected one (rollout)": "rollout", "The selected layer only": "layer"}

HOW = {
    "labels": "Drop an image, choose a file, paste one, or use the camera. The five most likely labels appear here.",
    "classes of pixels": "Drop an image, choose a file, paste one, or use the camera. The classes of its pixels and "
    "their shares of the image appear here.",
    "objects": "Drop an image, choose a file, paste one, or use the camera. The objects in it appear here.",
}
HOW_MANY = f"Up to {MOST_FILES} files at a time. A file that cannot be read is listed with its error."
HOW_COMPARED = "Choose an image to see the predictions and the attention of both models."
NOT_UPLOADED = "Expected an uploaded file, got an address: save the image and upload its file."
LOOKING = (
    "Seen from {viewer}. The darkest patches receive {low:.2%} of the attention, the brightest {high:.2%}; if it "
    "were uniform, each patch would receive {even:.2%}. Attention shows where information comes from, not whether it "
    "speaks for or against a label."
)


# ----------------------------------------------------------------------------------------------- event handlers


def file_of(uploaded: Uploaded) -> File | None:
    """Return the path of an uploaded file, and its original name on one line."""
    if not uploaded or not uploaded.get("path"):
        return None
    path = Path(uploaded["path"])
    return File(path, one_line(Path(uploaded.get("orig_name") or path).name))


def show_answer(exhibit: Exhibit, uploaded: Uploaded) -> str:
    """Return the most likely labels of an image, or its error, as HTML."""
    file = file_of(uploaded)
    if file is None:
        return note(HOW[exhibit.answers])
    answer = exhibit.answer(file)
    prediction = answer.prediction
    return cards([UNKNOWN if prediction.is_unknown else (prediction.labels or [file.name])[0]], [exhibit], [answer])


def show_overlay(exhibit: Exhibit, uploaded: Uploaded) -> np.ndarray | None:
    """Return an image with its classes or objects; nothing for an image whose error `show_answer` shows."""
    file = file_of(uploaded)
    if file is None:
        return None
    try:
        return exhibit.overlay(file)
    except (ValueError, OSError):
        return None


def show_attention(
    exhibit: Exhibit, uploaded: Uploaded, view: str, layer: float, head: float
) -> tuple[np.ndarray | None, str]:
    """Return an image lit by attention, and how to read it; nothing for an image whose error `show_answer` shows.

    Args:
        view: A key of `VIEWS`.
        head: 0 is the mean over all heads.
    """
    file = file_of(uploaded)
    if file is None:
        return None, ""
    try:
        found = exhibit.attention(file, VIEWS[view], int(layer), int(head) or None)
    except (ValueError, OSError):
        return None, ""
    viewer = READ_BY[exhibit.config.pooling]
    if VIEWS[view] == "layer":
        viewer = "the class token" if exhibit.config.use_cls_token else "all patches, averaged"
    return found.picture, note(LOOKING.format(viewer=viewer, low=found.low, high=found.high, even=found.even))


def show_sizes(exhibit: Exhibit, uploaded: Uploaded, chosen: Sequence[str]) -> str:
    """Return the predictions at chosen sizes as HTML; nothing for an image whose error `show_answer` shows."""
    file = file_of(uploaded)
    if file is None:
        return ""
    answers = [exhibit.answer(file, size) for size in exhibit.sizes if by(size) in chosen]
    if any(answer.prediction.error is not None for answer in answers):
        return ""
    return cards([f"{by(answer.size)} pixels" for answer in answers], [exhibit] * len(answers), answers)


def show_both(exhibits: Sequence[Exhibit], uploaded: Uploaded) -> tuple[Any, ...]:
    """Return the predictions of all models as HTML, and an attention figure of each."""
    file = file_of(uploaded)
    if file is None:
        return note(HOW_COMPARED), *(None for _ in exhibits)
    answers = [exhibit.answer(file) for exhibit in exhibits]
    is_broken = answers[0].prediction.error is not None
    pictures = (None if is_broken else exhibit.attention(file).picture for exhibit in exhibits)
    return cards([exhibit.name for exhibit in exhibits], exhibits, answers), *pictures


def show_many(
    exhibit: Exhibit, folder: Path, uploaded: Sequence[Uploaded] | None, progress: gr.Progress | None = None
) -> tuple[list[list[Any]], str, Any, Any]:
    """Return the table of files and labels, a note, and buttons to download the table as CSV and as Parquet."""
    files = [file for each in uploaded or () if (file := file_of(each)) is not None]
    nothing = gr.DownloadButton(value=None, interactive=False)
    if not files:
        return [], note(HOW_MANY), nothing, nothing
    if len(files) > MOST_FILES:
        error = f"Expected at most {MOST_FILES} files at a time, got {len(files)}: split them, or use hf-vit predict."
        return [], alert(error), nothing, nothing
    began = time.perf_counter()
    predictions = []
    for prediction in exhibit.label(files):
        predictions.append(prediction)
        if progress is not None:
            progress((len(predictions), len(files)), unit="images")
    rows = [_row(prediction) for prediction in predictions]
    speed = len(rows) / (time.perf_counter() - began)
    broken = sum(prediction.error is not None for prediction in predictions)
    summary = note(f"{counted(len(rows), 'image')}, {broken} broken, {speed:.1f} images/s.")
    as_csv, as_parquet = (gr.DownloadButton(value=path, interactive=True) for path in write_table(rows, folder))
    return rows, summary, as_csv, as_parquet


def _row(prediction: Prediction) -> list[Any]:
    if prediction.are_values or prediction.boxes is not None:
        return [prediction.source, one_line(", ".join(prediction.answers)), None, None]
    labels = [UNKNOWN] if prediction.is_unknown else prediction.labels
    label = one_line(", ".join(labels)) if labels else None
    score = round(min(prediction.scores), 4) if prediction.scores else None
    return [prediction.source, label, score, prediction.error]


def write_table(rows: Sequence[Sequence[Any]], folder: Path) -> tuple[str, str]:
    """Write rows of `COLUMNS` as CSV and as Parquet, over the previous ones, and return the files.

    Gradio copies them for the user before it handles another event. In the CSV, text that a spreadsheet would evaluate
    is prefixed with an apostrophe.
    """
    folder.mkdir(exist_ok=True)
    as_csv, as_parquet = folder / "labels.csv", folder / "labels.parquet"
    with open(as_csv, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for row in rows:
            writer.writerow(f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA) else cell for cell in row)
    columns = [list(column) for column in zip(*rows, strict=True)]
    pq.write_table(pa.table(columns, pa.schema(COLUMNS.items())), as_parquet)
    return str(as_csv), str(as_parquet)


def show_positions(exhibit: Exhibit, folder: Path) -> tuple[str | None, str]:
    """Return the figure of the model's positions and how to read it, or why there is none."""
    folder.mkdir(exist_ok=True)
    picture, reading = exhibit.positions()
    return None if picture is None else str(picture.save(folder, "png")), note(reading)


# ---------------------------------------------------------------------------------------------------- layout


def build(exhibits: Sequence[Exhibit], folder: Path, kept: int) -> gr.Blocks:
    """Return the page of one model, or of two with a tab that compares them.

    Args:
        folder: Folder for downloads.
        kept: Least number of seconds that uploaded files are kept.
    """
    exhibit = exhibits[0]
    title = " and ".join(each.name for each in exhibits)
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(kept, kept)) as page:
        gr.HTML(heading(exhibit))
        with gr.Tab("Image"):
            _one_image(exhibit)
        with gr.Tab("Batch"):
            _many_images(exhibit, folder)
        if len(exhibits) > 1:
            with gr.Tab("Compare"):
                _two_models(exhibits)
        with gr.Tab("Positions") as tab:
            reading = gr.HTML()
            picture = _shown("Learned position embeddings", show_label=False)
            _on(tab.select, cache(partial(show_positions, exhibit, folder)), [], [picture, reading])
    for block in page.blocks.values():
        _refuse_addresses(block)
    return page


def _one_image(exhibit: Exhibit) -> None:
    config = exhibit.config
    selected = {by(exhibit.near(factor)) for factor in TRIED} | {by(exhibit.own_size)}
    with gr.Row():
        with gr.Column(min_width=280):
            image = _dropped()
        with gr.Column(min_width=280):
            answer = gr.HTML(note(HOW[exhibit.answers]))
        if exhibit.has_overlay:
            with gr.Column(min_width=280):
                overlaid = _shown(f"The {exhibit.answers}")
    gr.Markdown("### Attention")
    with gr.Row():
        with gr.Column(min_width=280):
            picture = _shown("The image lit by attention", show_label=False)
        with gr.Column(min_width=280):
            view = gr.Radio(list(VIEWS), value=next(iter(VIEWS)), label="Attention of")
            layers, heads = config.num_hidden_layers, config.num_attention_heads
            layer = gr.Slider(1, layers, layers, step=1, label="Layer")
            head = gr.Slider(0, heads, 0, step=1, label="Head", info="0: mean over all heads")
            reading = gr.HTML()
    gr.Markdown("### Predictions at other resolutions")
    names = [by(size) for size in exhibit.sizes]
    info = "Height × width in pixels. Position embeddings are resampled to the grid of patches."
    chosen = [name for name in names if name in selected]
    sizes = gr.CheckboxGroup(names, value=chosen, label="Image sizes", info=info)
    compared = gr.HTML()

    attend = partial(show_attention, exhibit), [image, view, layer, head], [picture, reading]
    resize = partial(show_sizes, exhibit), [image, sizes], compared
    event = _on(image.change, partial(show_answer, exhibit), [image], answer)
    if exhibit.has_overlay:
        event = _on(event.then, partial(show_overlay, exhibit), [image], overlaid)
    _on(_on(event.then, *attend).then, *resize)
    for control in (view, layer, head):
        _on(control.change, *attend, trigger_mode="always_last")
    _on(sizes.change, *resize, trigger_mode="always_last")


def _many_images(exhibit: Exhibit, folder: Path) -> None:
    files = gr.File(file_count="multiple", file_types=["image"], height=240, label="Images")
    summary = gr.HTML(note(HOW_MANY))
    table = gr.Dataframe(
        headers=list(COLUMNS),
        datatype=["str", "str", "number", "str"],
        column_widths=["26%", "22%", "12%", "40%"],
        interactive=False,
        wrap=True,
        label="Labels",
    )
    with gr.Row():
        downloads = [
            gr.DownloadButton(f"Download as {kind}", interactive=False, min_width=140) for kind in ("CSV", "Parquet")
        ]

    def label(uploaded: Any, progress: gr.Progress = gr.Progress()) -> tuple[Any, ...]:  # noqa: B008
        return show_many(exhibit, folder, uploaded, progress)

    _on(files.change, label, [files], [table, summary, *downloads])


def _two_models(exhibits: Sequence[Exhibit]) -> None:
    image = _dropped()
    answers = gr.HTML(note(HOW_COMPARED))
    with gr.Row():
        pictures = [_shown(f"Attention of {exhibit.name} (rollout)") for exhibit in exhibits]
    _on(image.change, partial(show_both, exhibits), [image], [answers, *pictures])


def _dropped() -> gr.Image:
    """Return an input that takes an image by drop, file dialog, clipboard or camera."""
    return gr.Image(
        sources=["upload", "webcam", "clipboard"],
        webcam_options=gr.WebcamOptions(mirror=False),
        type="filepath",
        image_mode=None,
        height=360,
        label="Image",
    )


def _shown(label: str, **options: Any) -> gr.Image:
    """Return an output for a figure, with its label as alternative text."""
    buttons: Any = ["download", "fullscreen"]
    return gr.Image(interactive=False, format="png", buttons=buttons, label=label, alt_text=label, **options)


def _on(event: Any, handler: Callable[..., Any], inputs: Sequence[Any], outputs: Any, **options: Any) -> Any:
    """Register the handler of an event: one at a time, with files as they were uploaded."""
    return event(
        handler,
        inputs,
        outputs,
        preprocess=False,
        concurrency_id="model",
        concurrency_limit=1,
        api_visibility="private",
        show_progress="minimal",
        **options,
    )


def _refuse_addresses(block: Any) -> None:
    """Keep a component from downloading an address that a request gives in place of an uploaded file."""
    move = block.async_move_resource_to_block_cache

    async def move_file(path: Any) -> Any:
        if str(path).startswith(("http:", "https:")):
            raise gr.Error(NOT_UPLOADED)
        return await move(path)

    block.async_move_resource_to_block_cache = move_file
