"""A run from its recipe to a folder that people understand: pictures, a card with what was measured, and the push."""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from .. import inspection
from ..data.images import EvaluationImages, Visit
from ..data.labelled import RECIPE, ImageData
from ..evaluation.metrics import ImageResults
from ..hub.card import write_card
from ..hub.folder import copy_of_ours
from ..hub.upload import BackgroundPush
from ..inspection.drawing import save
from ..system.machine import machine
from ..system.texts import code, fenced, markdown, shell_word
from ..variants import VARIANTS
from .loop import Run, train
from .recipe import TrainConfig

SHOWN_CLASSES = 50  # of more, the best and the worst are listed
DRAWN_CLASSES = 120  # a confusion matrix of more cannot be read


def train_and_report(config: TrainConfig, command: str, say: Callable[[str], None]) -> Run:
    """Train, write pictures and card, and push while training and at the end if the recipe says where to.

    Args:
        config: The recipe.
        command: What the user typed, for the card.
        say: Prints a line.
    """
    hub = None
    if config.push_to_hub is not None and os.environ.get("RANK", "0") == "0":
        hub = BackgroundPush(config.push_to_hub, config.private, _beside_the_bar(say))

    def publish(step: int, write_model: Callable[[Path], None]) -> None:
        def write(folder: Path) -> None:
            write_model(folder)
            write_card(
                folder,
                title=Path(config.output_dir).resolve().name,
                description=f"After {step:,} steps of a run that goes on.",
                sections={"Recipe": _recipe(config)},
            )

        if hub is not None:
            hub.submit(write, f"Step {step}")

    run = train(config, publish if hub is not None else None)
    if not run.is_main_process:
        return run
    write_report(run, command)
    for line in summary(run):
        say(line)
    if hub is None:
        say(f"Publish it:  hf-vit push {run.output_dir} YOUR_NAME/{run.output_dir.resolve().name}")
    else:
        left: list[str] = []
        hub.submit(lambda folder: left.extend(copy_of_ours(run.output_dir, folder)), "Trained model")
        if left:
            say(f"Not pushed, since a run does not write them: {', '.join(left)}")
        if hub.finish(timeout=1800):  # a connection may hang for ever, and a finished job hold its GPUs
            say(f"Published at {hub.url}")
        else:
            say(f"Not published; try again:  hf-vit push {run.output_dir} {config.push_to_hub}")
    return run


def _beside_the_bar(say: Callable[[str], None]) -> Callable[[str], None]:
    """Return what says a line while a progress bar is shown."""

    def say_it(line: str) -> None:
        with tqdm.external_write_mode():
            say(line)

    return say_it


def summary(run: Run) -> list[str]:
    """Return what a run came to, in a line or two."""
    metrics, timing = run.metrics, run.timing
    effort = (
        f"after {metrics['steps']:,} steps in {timing['seconds']:.0f} s ({timing['images_per_second']:,.0f} images/s)"
    )
    figure = f"Accuracy {metrics['eval_accuracy']:.2%}" if run.predictions else f"Loss {metrics['eval_loss']:.4f}"
    lines = [f"{figure} on {metrics['eval_count']:,} held-out images ({run.data.eval_split}) {effort}."]
    if broken := metrics["broken_images"]:
        lines.append(f"{_images(len(broken))} unreadable and left out; metrics.json names them.")
    return [*lines, f"The model, its card and its pictures are in {run.output_dir}."]


def write_report(run: Run, command: str) -> None:
    """Write pictures and the card of a finished run into its folder."""
    title = run.output_dir.resolve().name
    figures = {"training.png": inspection.plot_training(run.log, f"{title}: {run.metrics['steps']:,} steps")}
    predictions, names = run.predictions, run.data.label_names
    if predictions is not None:
        if len(names) <= DRAWN_CLASSES:
            figures["confusion.png"] = inspection.plot_confusion(
                predictions.confusion(), names, f"{title}: what is taken for what"
            )
        figures["predictions.png"] = inspection.plot_predictions(
            _picture_of(run.data, run.processor, predictions), predictions, names, f"{title}: held-out images"
        )
    if hasattr(run.model.base_model.embeddings.position_embeddings, "on_grid"):
        figures["positions.png"] = inspection.plot_position_similarity(
            inspection.position_similarity(run.model), f"{title}: similarity of position embeddings"
        )
    for name, figure in figures.items():
        save(figure, run.output_dir / name)
    (run.output_dir / RECIPE).write_text(for_others(run.config).to_yaml(), encoding="utf-8")
    write_card(
        run.output_dir,
        title=title,
        description=_description(run),
        results=_results(run),
        measured={
            "command": code(command),
            "hardware": _hardware(run.metrics),
            "time": f"{run.timing['seconds']:,.0f} s, {run.timing['images_per_second']:,.0f} images/s",
            "seeds": str(run.config.seed),
        },
        dataset=run.data.name,
        split=run.data.eval_split,
        sections=_sections(run, command),
        images=list(figures),
        base_model=_base_model(run.config),
    )


def _picture_of(data: ImageData, processor: Any, predictions: ImageResults) -> Callable[[int], Tensor]:
    """Return a function from the place of a prediction to its image, uint8 `[C, H, W]`."""
    images = EvaluationImages(data.evaluation, data.columns, processor)
    if not data.is_stream:
        return lambda place: images[int(predictions.index[place])]["pixel_values"]
    # A stream is read through once more, for the few that are shown.
    places = {int(predictions.index[place]): place for place in inspection.shown_predictions(predictions)}
    rows = (Visit(0, number, row) for number, row in enumerate(images.rows()) if number in places)
    return {places[visit.index]: images[visit]["pixel_values"] for visit in rows}.__getitem__


def _hardware(metrics: dict[str, Any]) -> str:
    precision = "fp32" if metrics["precision"] == "no" else metrics["precision"]  # Accelerate's word for it
    processes = f", {metrics['processes']} processes" if metrics["processes"] > 1 else ""
    return f"{machine()}{processes}, {precision}"


def _description(run: Run) -> str:
    metrics = run.metrics
    learned = (
        f"on {metrics['train_images']:,} images of {markdown(run.data.name)} in {metrics['steps']:,} steps, and "
        f"measured on {metrics['eval_count']:,} others."
    )
    if run.predictions is not None:
        return f"Trained {learned}"
    return f"An encoder, pre-trained without labels by filling in masked patches, {learned}"


def _results(run: Run) -> dict[str, float]:
    names = {"eval_accuracy": "accuracy", "eval_top5_accuracy": "top_5_accuracy", "eval_loss": "loss"}
    return {name: run.metrics[key] for key, name in names.items() if key in run.metrics}


def _base_model(config: TrainConfig) -> str | None:
    """Return the name on the Hub of what was fine-tuned; a folder has none."""
    if config.model is None or config.model in VARIANTS or Path(config.model).exists():
        return None
    return config.model if config.model.count("/") == 1 else None


def _sections(run: Run, command: str) -> dict[str, str]:
    sections = {"Limits": _limits(run), "Train it again": _reproduction(run, command)}
    if run.predictions is not None:
        return {"Classes": _class_table(run.predictions, run.data.label_names), **sections}
    name = run.output_dir.resolve().name
    tuning = f"--model {shell_word(name)} --output-dir {shell_word(f'{name}-tuned')}"
    how = fenced(f"hf-vit train --recipe flowers --data FOLDER {tuning}", "bash")
    said = f"It has no classifier yet. Images in folders, a folder a class, of any size, teach it one:\n\n{how}"
    return {"Fine-tune": said, **sections}


def _reproduction(run: Run, command: str) -> str:
    return f"""{fenced(command, "bash")}

The same command goes on with a run that was stopped. `recipe.yaml` here holds every field, for
`hf-vit train --recipe recipe.yaml`; set its `data` and `output_dir` to your own first.

{_recipe(run.config)}"""


def _class_table(predictions: ImageResults, names: Sequence[str]) -> str:
    rows = predictions.per_class(names)
    heading = ""
    if len(rows) > SHOWN_CLASSES:
        ordered = sorted((row for row in rows if row["count"]), key=lambda row: -row["accuracy"])
        rows = ordered if len(ordered) <= 20 else [*ordered[:10], *ordered[-10:]]
        heading = f"The ten best and the ten worst of {len(names)}.\n\n"
    lines = ["| class | images | accuracy | precision |", "|---|---|---|---|"]
    for row in rows:
        accuracy, precision = ("-" if row[key] is None else f"{row[key]:.1%}" for key in ("accuracy", "precision"))
        lines.append(f"| {markdown(row['label'])} | {row['count']:,} | {accuracy} | {precision} |")
    return heading + "\n".join(lines)


def _limits(run: Run) -> str:
    """Say what the figures do not promise, from what was measured."""
    height, width = run.model.config.image_shape
    metrics, predictions, names = run.metrics, run.predictions, [markdown(name) for name in run.data.label_names]
    seen = f"{metrics['train_images']:,} images of {markdown(run.data.name)} at {height}x{width} pixels"
    lines = [f"It learned from {seen}; on other images its figures will be others."]
    if predictions is not None:
        lines.append(f"It answers with one of {len(names)} classes whatever it is shown.")
        rows = [row for row in predictions.per_class(names) if row["count"]]
        if len(rows) < len(names):
            lines.append(f"{len(names) - len(rows)} of the classes have no held-out image: nothing is known of them.")
        worst = min(rows, key=lambda row: row["accuracy"])
        if worst["accuracy"] < 1:
            lines.append(
                f"Its worst class is {worst['label']}, of which it recognises {worst['accuracy']:.1%} of "
                f"{worst['count']:,} images."
            )
        confusion = predictions.confusion()
        of_class = confusion.sum(dim=1)
        if (mistakes := confusion.fill_diagonal_(0)).any():
            true, taken = divmod(int(mistakes.argmax()), len(names))
            lines.append(
                f"Most often it takes {names[true]} for {names[taken]}: {int(mistakes.max()):,} of "
                f"{int(of_class[true]):,} images."
            )
        error = predictions.calibration_error()
        lines.append(f"Its confidence is off by {error:.1%} on average (expected calibration error, 15 bins).")
    if run.data.eval_split == "held out":
        share, seed = run.config.eval_fraction, run.config.split_seed
        lines.append(f"It is measured on {share:.0%} of the same data, held out by chance (split_seed {seed}).")
    if broken := metrics["broken_images"]:
        lines.append(f"{_images(len(broken))} unreadable and left out; `metrics.json` names them.")
    return "\n".join(f"- {line}" for line in lines)


def _images(number: int) -> str:
    return f"{number:,} image was" if number == 1 else f"{number:,} images were"


def _recipe(config: TrainConfig) -> str:
    return f"<details><summary>All fields</summary>\n\n{fenced(for_others(config).to_yaml(), 'yaml')}\n\n</details>"


def for_others(config: TrainConfig) -> TrainConfig:
    """Return a recipe that may be published: without absolute paths of this machine or the repository of its user."""
    values = {**asdict(config), "push_to_hub": None}
    for name in ("data", "model", "output_dir"):
        if (path := Path(values[name] or "")).is_absolute():
            values[name] = path.name
    return TrainConfig(**values)
