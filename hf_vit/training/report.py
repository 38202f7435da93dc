"""From a recipe to a folder that people understand: train, draw figures, write the model card, push."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from .. import inspection
from ..data.images import EvaluationImages, Visit, stored_rows
from ..data.labelled import RECIPE, ImageData
from ..evaluation.metrics import ImageResults
from ..hub.card import write_card
from ..hub.folder import copy_of_ours
from ..hub.upload import BackgroundPush
from ..inspection.drawing import save
from ..system.machine import machine, precision_name
from ..system.texts import code, fenced, markdown, shell_word
from ..variants import VARIANTS
from .loop import train
from .recipe import TrainConfig
from .run import Run

LISTED_CLASSES = 50  # with more classes, the model card lists the best and the worst
DRAWN_CLASSES = 120  # a confusion matrix with more classes cannot be read
RESULTS = {"eval_accuracy": "accuracy", "eval_top5_accuracy": "top_5_accuracy", "eval_loss": "loss"}


def train_and_report(config: TrainConfig, command: str, say: Callable[[str], None]) -> Run:
    """Train, write figures and the model card, and push during and after training if the recipe names a repository.

    Args:
        config: The recipe.
        command: The command that the user typed, for the model card.
        say: Prints a line.
    """
    hub = None
    if config.push_to_hub is not None and os.environ.get("RANK", "0") == "0":
        hub = BackgroundPush(config.push_to_hub, config.private, tqdm.external_write_mode()(say))

    def publish(step: int, write_model: Callable[[Path], None]) -> None:
        def write(folder: Path) -> None:
            write_model(folder)
            write_card(
                folder,
                title=Path(config.output_dir).resolve().name,
                description=f"After {step:,} steps of a run that is still in progress.",
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
        skipped: list[str] = []
        hub.submit(lambda folder: skipped.extend(copy_of_ours(run.output_dir, folder)), "Trained model")
        if skipped:
            say(f"Not pushed, since a run does not write such files: {', '.join(skipped)}")
        if hub.finish(timeout=1800):  # a hanging connection must not keep a finished job on its GPUs
            say(f"Published at {hub.url}")
        else:
            say(f"Not published. Try again:  hf-vit push {run.output_dir} {config.push_to_hub}")
    return run


def summary(run: Run) -> list[str]:
    """Return the result of a run in two or three lines."""
    metrics, timing = run.metrics, run.timing
    result = f"Accuracy {metrics['eval_accuracy']:.2%}" if run.predictions else f"Loss {metrics['eval_loss']:.4f}"
    lines = [
        f"{result} on {metrics['eval_count']:,} evaluation images ({run.data.eval_split}) after {metrics['steps']:,} "
        f"steps in {timing['seconds']:.0f} s ({timing['images_per_second']:,.0f} images/s)."
    ]
    if broken := metrics["broken_images"]:
        lines.append(f"{_unreadable(len(broken))}; metrics.json lists them.")
    return [*lines, f"The model, its model card and its figures are in {run.output_dir}."]


def write_report(run: Run, command: str) -> None:
    """Write the figures and the model card of a finished run into its folder."""
    title, names = run.output_dir.resolve().name, run.data.label_names
    figures = {"training.png": inspection.plot_training(run.log, f"{title}: {run.metrics['steps']:,} steps")}
    if run.predictions is not None:
        if len(names) <= DRAWN_CLASSES:
            figures["confusion.png"] = inspection.plot_confusion(
                run.predictions.confusion(), names, f"{title}: confusion matrix"
            )
        figures["predictions.png"] = inspection.plot_predictions(
            _image_of(run.data, run.processor, run.predictions),
            run.predictions,
            names,
            f"{title}: evaluation images",
        )
    if hasattr(run.model.base_model.embeddings.position_embeddings, "on_grid"):
        figures["positions.png"] = inspection.plot_position_similarity(
            inspection.position_similarity(run.model), f"{title}: similarity of position embeddings"
        )
    for name, figure in figures.items():
        save(figure, run.output_dir / name)
    (run.output_dir / RECIPE).write_text(for_others(run.config).to_yaml(), encoding="utf-8")
    processes = f", {run.metrics['processes']} processes" if run.metrics["processes"] > 1 else ""
    write_card(
        run.output_dir,
        title=title,
        description=_description(run),
        results={name: run.metrics[key] for key, name in RESULTS.items() if key in run.metrics},
        measured={
            "command": code(command),
            "hardware": f"{machine()}{processes}, {precision_name(run.metrics['precision'])}",
            "time": f"{run.timing['seconds']:,.0f} s, {run.timing['images_per_second']:,.0f} images/s",
            "seeds": str(run.config.seed),
        },
        dataset=run.data.name,
        split=run.data.eval_split,
        sections=_sections(run, command),
        images=list(figures),
        base_model=_base_model(run.config),
    )


def _image_of(data: ImageData, processor: Any, predictions: ImageResults) -> Callable[[int], Tensor]:
    """Return a function from the position of a prediction to its image, uint8 `[C, H, W]`."""
    images = EvaluationImages(data.evaluation, data.columns, processor)
    if not data.is_stream:
        return lambda position: images[int(predictions.index[position])]["pixel_values"]
    # A stream is read once more, for the few images that are shown.
    positions = {int(predictions.index[position]): position for position in inspection.shown_predictions(predictions)}
    visits = (
        Visit(0, number, row)
        for number, row in enumerate(stored_rows(images.split, images.columns))
        if number in positions
    )
    return {positions[visit.index]: images[visit]["pixel_values"] for visit in visits}.__getitem__


def _description(run: Run) -> str:
    metrics = run.metrics
    kind = "Trained" if run.predictions is not None else "An encoder, pre-trained without labels on masked patches,"
    return (
        f"{kind} on {metrics['train_images']:,} images of {markdown(run.data.name)} for {metrics['steps']:,} steps, "
        f"and evaluated on {metrics['eval_count']:,} other images."
    )


def _base_model(config: TrainConfig) -> str | None:
    """Return the Hub name of the model that was fine-tuned; a folder has none."""
    if config.model is None or config.model in VARIANTS or Path(config.model).exists():
        return None
    return config.model if config.model.count("/") == 1 else None


def _sections(run: Run, command: str) -> dict[str, str]:
    training = f"""{fenced(command, "bash")}

The same command resumes an interrupted run. `recipe.yaml` contains all fields: set its `data` and `output_dir`, then
run `hf-vit train --recipe recipe.yaml`.

{_recipe(run.config)}"""
    sections = {"Limitations": _limitations(run), "Training": training}
    if run.predictions is not None:
        return {"Classes": _class_table(run.predictions, run.data.label_names), **sections}
    name = run.output_dir.resolve().name
    tuning = f"--model {shell_word(name)} --output-dir {shell_word(f'{name}-tuned')}"
    how = fenced(f"hf-vit train --recipe flowers --data FOLDER {tuning}", "bash")
    words = "The model has no classifier yet. Fine-tune it on a folder of images with one subfolder per class:"
    return {"Fine-tuning": f"{words}\n\n{how}", **sections}


def _class_table(predictions: ImageResults, names: Sequence[str]) -> str:
    rows = predictions.per_class(names)
    heading = ""
    if len(rows) > LISTED_CLASSES:
        ordered = sorted((row for row in rows if row["count"]), key=lambda row: -row["accuracy"])
        rows = ordered if len(ordered) <= 20 else [*ordered[:10], *ordered[-10:]]
        heading = f"The ten best and the ten worst of {len(names)} classes.\n\n"
    lines = ["| class | images | accuracy | precision |", "|---|---|---|---|"]
    for row in rows:
        accuracy, precision = ("-" if row[key] is None else f"{row[key]:.1%}" for key in ("accuracy", "precision"))
        lines.append(f"| {markdown(row['label'])} | {row['count']:,} | {accuracy} | {precision} |")
    return heading + "\n".join(lines)


def _limitations(run: Run) -> str:
    """Return what the metrics do not promise, as a list in Markdown."""
    height, width = run.model.config.image_shape
    metrics, predictions, names = run.metrics, run.predictions, [markdown(name) for name in run.data.label_names]
    lines = [
        f"The model was trained on {metrics['train_images']:,} images of {markdown(run.data.name)} at "
        f"{height}x{width} pixels. Expect other metrics on other images."
    ]
    if predictions is not None:
        lines.append(f"It predicts one of {len(names)} classes for any image, also for one that shows none of them.")
        rows = [row for row in predictions.per_class(names) if row["count"]]
        if len(rows) < len(names):
            lines.append(f"{len(names) - len(rows)} classes have no evaluation image: their accuracy is unknown.")
        worst = min(rows, key=lambda row: row["accuracy"])
        if worst["accuracy"] < 1:
            lines.append(
                f"Its worst class is {worst['label']}, with an accuracy of {worst['accuracy']:.1%} on "
                f"{worst['count']:,} images."
            )
        confusion = predictions.confusion()
        of_class = confusion.sum(dim=1)
        if (mistakes := confusion.fill_diagonal_(0)).any():
            true, predicted = divmod(int(mistakes.argmax()), len(names))
            lines.append(
                f"Its most frequent mistake is to predict {names[predicted]} for {names[true]}: "
                f"{int(mistakes.max()):,} of {int(of_class[true]):,} images."
            )
        error = predictions.calibration_error()
        lines.append(f"Its confidence is off by {error:.1%} on average (expected calibration error, 15 bins).")
    if run.data.eval_split == "held out":
        share, seed = run.config.eval_fraction, run.config.split_seed
        lines.append(f"It was evaluated on a random {share:.0%} of the same data (split_seed {seed}).")
    if broken := metrics["broken_images"]:
        lines.append(f"{_unreadable(len(broken))}; `metrics.json` lists them.")
    return "\n".join(f"- {line}" for line in lines)


def _unreadable(number: int) -> str:
    return f"{number:,} unreadable {'image was' if number == 1 else 'images were'} skipped"


def _recipe(config: TrainConfig) -> str:
    return f"<details><summary>All fields</summary>\n\n{fenced(for_others(config).to_yaml(), 'yaml')}\n\n</details>"


def for_others(config: TrainConfig) -> TrainConfig:
    """Return a recipe that may be published: without absolute paths of this machine or its user's repository."""
    paths = {name: getattr(config, name) for name in ("data", "model", "output_dir")}
    public: dict[str, Any] = {
        name: Path(value).name for name, value in paths.items() if value and Path(value).is_absolute()
    }
    return replace(config, push_to_hub=None, **public)
