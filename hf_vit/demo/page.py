"""The page in Gradio: what stands where, and what is asked of the model when something is touched.

Gradio would open uploaded images itself; events that are not preprocessed hand over where the file lies, so that the
one reader of this package decides. Of all events one at a time has the model.
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
from ..prediction.predictor import Prediction
from ..system.texts import one_line
from .exhibit import Exhibit, File
from .markup import by, cards, heading, note, refusal

Uploaded = dict[str, Any] | None  # a file as Gradio describes it

MOST_FILES = 200  # in a batch
COLUMNS = {"file": pa.string(), "label": pa.string(), "score": pa.float64(), "error": pa.string()}
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # with which cells begin that a spreadsheet computes
TRIED = (0.5, 1.5)  # sizes that are shown at first beside the model's own, of it
VIEWS = {"Through all layers up to this one (rollout)": "rollout", "This layer alone": "layer"}

HOW = "Drop an image, choose a file, paste one, or use the camera: the five likeliest labels come here."
HOW_MANY = f"Up to {MOST_FILES} files at a time. One that cannot be read is listed with the reason, and stops nothing."
HOW_COMPARED = "One image, and what both models say of it and look at."
NOT_UPLOADED = "Expected a file that was uploaded here, got an address: save the image, and drop its file."
LOOKING = (
    "Seen from {viewer}. Dark patches have {low:.2%} of the attention, bright ones {high:.2%}; spread evenly, each "
    "would have {even:.2%}. It says where information comes from, not whether it speaks for or against a label."
)


# ----------------------------------------------------------------------------------------------- what is answered


def file_of(uploaded: Uploaded) -> File | None:
    """Return where an uploaded file lies, and its own name in one line."""
    if not uploaded or not uploaded.get("path"):
        return None
    path = Path(uploaded["path"])
    return File(path, one_line(Path(uploaded.get("orig_name") or path).name))


def show_answer(exhibit: Exhibit, uploaded: Uploaded) -> str:
    """Return the likeliest labels of an image, or what is wrong with it, as HTML."""
    file = file_of(uploaded)
    if file is None:
        return note(HOW)
    answer = exhibit.answer(file)
    return cards((answer.prediction.labels or [file.name])[:1], [exhibit], [answer])


def show_attention(
    exhibit: Exhibit, uploaded: Uploaded, view: str, layer: float, head: float
) -> tuple[np.ndarray | None, str]:
    """Return an image in the light of attention, and how to read it; nothing of what `show_answer` refuses.

    Args:
        view: A key of `VIEWS`.
        head: 0 is all of them.
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
    """Return the answers at chosen sizes beside each other, as HTML; nothing of what `show_answer` refuses."""
    file = file_of(uploaded)
    if file is None:
        return ""
    answers = [exhibit.answer(file, size) for size in exhibit.sizes if by(size) in chosen]
    if any(answer.prediction.error is not None for answer in answers):
        return ""
    return cards([f"{by(answer.size)} pixels" for answer in answers], [exhibit] * len(answers), answers)


def show_both(exhibits: Sequence[Exhibit], uploaded: Uploaded) -> tuple[Any, ...]:
    """Return the answers of all models as HTML, and a picture of what each looks at."""
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
    """Return a table of files and their labels, a sentence, and the table as CSV and as parquet to download."""
    files = [file for each in uploaded or () if (file := file_of(each)) is not None]
    nothing = gr.DownloadButton(value=None, interactive=False)
    if not files:
        return [], note(HOW_MANY), nothing, nothing
    if len(files) > MOST_FILES:
        said = f"Expected at most {MOST_FILES} files at a time, got {len(files)}: divide them, or use hf-vit predict."
        return [], refusal(said), nothing, nothing
    began = time.perf_counter()
    predictions = []
    for prediction in exhibit.label(files):
        predictions.append(prediction)
        if progress is not None:
            progress((len(predictions), len(files)), unit="images")
    rows = [_row(prediction) for prediction in predictions]
    pace = len(rows) / (time.perf_counter() - began)
    broken = sum(prediction.error is not None for prediction in predictions)
    said = note(f"{len(rows)} images, {pace:.1f} a second, {broken} broken.")
    as_csv, as_parquet = (gr.DownloadButton(value=path, interactive=True) for path in write_table(rows, folder))
    return rows, said, as_csv, as_parquet


def _row(prediction: Prediction) -> list[Any]:
    label = one_line(prediction.labels[0]) if prediction.labels else None
    score = round(prediction.scores[0], 4) if prediction.scores else None
    return [prediction.source, label, score, prediction.error]


def write_table(rows: Sequence[Sequence[Any]], folder: Path) -> tuple[str, str]:
    """Write rows of `COLUMNS` as CSV and as parquet, in place of the last ones, and return the files.

    Gradio copies them for who asked before another event has its turn. In the CSV, text that a spreadsheet would
    compute stands behind an apostrophe.
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
    """Return the picture of what positions have learned, and how to read it, or why there is none."""
    folder.mkdir(exist_ok=True)
    picture, reading = exhibit.positions()
    return None if picture is None else str(picture.save(folder, "png")), note(reading)


# -------------------------------------------------------------------------------------------- what stands where


def build(exhibits: Sequence[Exhibit], folder: Path, kept: int) -> gr.Blocks:
    """Return the page of a model, and of a second one beside it if there are two.

    Args:
        folder: For what is made for download.
        kept: Seconds that uploaded files stay, at least.
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
            picture = _shown("What the model found out about where its patches lie", show_label=False)
            _on(tab.select, cache(partial(show_positions, exhibit, folder)), [], [picture, reading])
    for block in page.blocks.values():
        _take_no_addresses(block)
    return page


def _one_image(exhibit: Exhibit) -> None:
    config = exhibit.config
    usual = {by(exhibit.near(factor)) for factor in TRIED} | {by(exhibit.own_size)}
    with gr.Row():
        with gr.Column(min_width=280):
            image = _dropped()
        with gr.Column(min_width=280):
            answer = gr.HTML(note(HOW))
    gr.Markdown("### Where it looks")
    with gr.Row():
        with gr.Column(min_width=280):
            picture = _shown("The image in the light of attention", show_label=False)
        with gr.Column(min_width=280):
            view = gr.Radio(list(VIEWS), value=next(iter(VIEWS)), label="Attention")
            layers, heads = config.num_hidden_layers, config.num_attention_heads
            layer = gr.Slider(1, layers, layers, step=1, label="Layer")
            head = gr.Slider(0, heads, 0, step=1, label="Head", info="0 is all of them, averaged.")
            reading = gr.HTML()
    gr.Markdown("### What another size does")
    names = [by(size) for size in exhibit.sizes]
    said = "Height × width in pixels; positions are resampled to the patches that there are then."
    sizes = gr.CheckboxGroup(names, value=[name for name in names if name in usual], label="Sizes", info=said)
    compared = gr.HTML()

    attend = partial(show_attention, exhibit), [image, view, layer, head], [picture, reading]
    resize = partial(show_sizes, exhibit), [image, sizes], compared
    answered = _on(image.change, partial(show_answer, exhibit), [image], answer)
    _on(_on(answered.then, *attend).then, *resize)
    for control in (view, layer, head):
        _on(control.change, *attend, trigger_mode="always_last")
    _on(sizes.change, *resize, trigger_mode="always_last")


def _many_images(exhibit: Exhibit, folder: Path) -> None:
    files = gr.File(file_count="multiple", file_types=["image"], height=240, label="Images")
    said = gr.HTML(note(HOW_MANY))
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
            gr.DownloadButton(f"Download as {kind}", interactive=False, min_width=140) for kind in ("CSV", "parquet")
        ]

    def label(uploaded: Any, progress: gr.Progress = gr.Progress()) -> tuple[Any, ...]:  # noqa: B008 # Gradio's way
        return show_many(exhibit, folder, uploaded, progress)

    _on(files.change, label, [files], [table, said, *downloads])


def _two_models(exhibits: Sequence[Exhibit]) -> None:
    image = _dropped()
    answers = gr.HTML(note(HOW_COMPARED))
    with gr.Row():
        pictures = [_shown(f"What {exhibit.name} looks at (rollout)") for exhibit in exhibits]
    _on(image.change, partial(show_both, exhibits), [image], [answers, *pictures])


def _dropped() -> gr.Image:
    """Return where an image is dropped, chosen, pasted or taken by the camera."""
    return gr.Image(
        sources=["upload", "webcam", "clipboard"],
        webcam_options=gr.WebcamOptions(mirror=False),
        type="filepath",
        image_mode=None,
        height=360,
        label="Image",
    )


def _shown(label: str, **options: Any) -> gr.Image:
    """Return where a picture is shown; those who do not see it are told the label."""
    buttons: Any = ["download", "fullscreen"]
    return gr.Image(interactive=False, format="png", buttons=buttons, label=label, alt_text=label, **options)


def _on(event: Any, answer: Callable[..., Any], inputs: Sequence[Any], outputs: Any, **options: Any) -> Any:
    """Have an event answered, one at a time, with files as they were uploaded."""
    return event(
        answer,
        inputs,
        outputs,
        preprocess=False,
        concurrency_id="model",
        concurrency_limit=1,
        api_visibility="private",
        show_progress="minimal",
        **options,
    )


def _take_no_addresses(block: Any) -> None:
    """Keep a component from fetching what a request names by its address instead of uploading it."""
    move = block.async_move_resource_to_block_cache

    async def move_file(path: Any) -> Any:
        if str(path).startswith(("http:", "https:")):
            raise gr.Error(NOT_UPLOADED)
        return await move(path)

    block.async_move_resource_to_block_cache = move_file
