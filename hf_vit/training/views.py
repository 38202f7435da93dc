"""What the report of a run shows of its results: a view for each kind of labels, and one for a run without labels.

It does not import runs, which describe their data before they start.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import inspection
from ..data.classes import DETECTION, SEGMENTATION
from ..data.dense import kinds_of_images
from ..data.images import EvaluationImages, Visit, stored_rows
from ..data.labelled import HELD_OUT, ImageData
from ..evaluation.flops import count_parameters
from ..evaluation.mistakes import write_mistakes
from ..evaluation.results import ImageResults
from ..inspection.drawing import Figure
from ..model.image_geometry_hf_vit import corners_of, resize_logits
from ..system.machine import device_name, precision_name
from ..system.texts import code, counted, fenced, hanging, markdown, one_line, shell_word
from ..variants import is_from_scratch

LISTED_CLASSES = 50  # with more classes, the model card lists the best and the worst
DRAWN_CLASSES = 120  # a confusion matrix with more classes cannot be read


class Unlabelled:
    """The results of a run without labels, and what all views have in common.

    Attributes:
        kind: Beginning of the description of the model.
        headline: Format of the main result, given the metrics of the run.
        results: Names of metrics in the model card, by their names in the metrics of the run.
        things: What rows of results are about.
        best: Value by which rows are ordered, with its sign: larger is better.
        columns: Values of a row by heading, and their formats.
    """

    kind = "An encoder, pre-trained without labels on masked patches,"
    headline = "Loss {eval_loss:.4f}"
    results = {"eval_loss": "loss"}
    things = "classes"
    best = ("recall", 1)
    columns: dict[str, tuple[str, str]] = {}

    def figures(self, run: Any, title: str) -> dict[str, Figure]:
        """Return figures of the results by file name."""
        return {}

    def write_tables(self, run: Any) -> None:
        """Write tables of the results into the folder of the run."""

    def limitations(self, run: Any) -> list[str]:
        """Return sentences on what the metrics do not promise."""
        return []

    def sections(self, run: Any) -> dict[str, str]:
        """Return the first sections of the model card."""
        name = run.output_dir.resolve().name
        tuning = f"--model {shell_word(name)} --output-dir {shell_word(f'{name}-tuned')}"
        how = fenced(f"hf-vit train --data FOLDER {tuning}", "bash")
        words = "The model has no classifier yet. Fine-tune it on a folder of images with one subfolder per class:"
        return {"Fine-tuning": f"{words}\n\n{how}"}

    def _table(self, run: Any) -> str:
        """Return the results per class, label or target as a table in Markdown."""
        rows, (key, sign) = run.predictions.per_class(run.data.label_names), self.best
        names = len(rows)
        text = ""
        if names > LISTED_CLASSES:
            ordered = sorted((row for row in rows if row[key] is not None), key=lambda row: -sign * row[key])
            rows = ordered if len(ordered) <= 20 else [*ordered[:10], *ordered[-10:]]
            text = f"The ten best and the ten worst of {names} {self.things}.\n\n"
        lines = [f"| {' | '.join(self.columns)} |", "|" + "---|" * len(self.columns)]
        for row in rows:
            shown = {**row, "label": markdown(row["label"])}
            cells = ("-" if shown[name] is None else form.format(shown[name]) for name, form in self.columns.values())
            lines.append(f"| {' | '.join(cells)} |")
        return text + "\n".join(lines)


class OfTeachers(Unlabelled):
    """Results of a student, which has a classifier if its teachers do."""

    kind = "A student, distilled from teachers without labels,"
    results = {"eval_loss": "loss", "eval_agreement": "agreement_with_teacher"}

    def sections(self, run: Any) -> dict[str, str]:
        # A path of this machine is of no use to others, and stays private.
        names = [Path(name).name if Path(name).is_absolute() else name for name in run.config.teachers]
        taught = f"It learned from {', '.join(map(code, names))}."
        agreement = run.metrics.get("eval_agreement")
        if agreement is None:
            return {"Teachers": taught, **super().sections(run)}
        return {
            "Teachers": f"{taught} On {agreement:.1%} of the evaluation images, the most likely label is the same."
        }


class OfClasses(Unlabelled):
    """Results of a classifier with one label per image."""

    kind = "Trained"
    headline = "Accuracy {eval_accuracy:.2%}"
    results = {
        "eval_accuracy": "accuracy",
        "eval_top5_accuracy": "top_5_accuracy",
        "eval_balanced_accuracy": "balanced_accuracy",
        "eval_macro_f1": "macro_f1",
        "eval_loss": "loss",
    }
    columns = {
        "class": ("label", "{}"),
        "images": ("count", "{:,}"),
        "recall": ("recall", "{:.1%}"),
        "precision": ("precision", "{:.1%}"),
        "F1": ("f1", "{:.1%}"),
    }

    def figures(self, run: Any, title: str) -> dict[str, Figure]:
        names, figures = run.data.label_names, {}
        if len(names) <= DRAWN_CLASSES:
            figures["confusion.png"] = inspection.plot_confusion(
                run.predictions.confusion(), names, f"{title}: confusion matrix of {run.measured_on}"
            )
        figures["predictions.png"] = inspection.plot_predictions(
            image_of(run.data, run.processor, run.predictions), run.predictions, names, f"{title}: {run.measured_on}"
        )
        return figures

    def write_tables(self, run: Any) -> None:
        if not run.data.is_stream:
            data, path = run.data, run.output_dir / "mistakes.csv"
            write_mistakes(path, run.predictions, data.evaluation, data.columns, data.label_names)

    def sections(self, run: Any) -> dict[str, str]:
        return {"Classes": self._table(run)}

    def limitations(self, run: Any) -> list[str]:
        predictions, names = run.predictions, [markdown(name) for name in run.data.label_names]
        rows = predictions.per_class(names)
        lines = [f"It predicts one of {len(names)} classes for any image, including images that show none of them."]
        known = [row for row in rows if row["count"]]
        if len(known) < len(names):
            without = counted(len(names) - len(known), "class", "classes")
            lines.append(f"The accuracy on {without} is unknown: there are no evaluation images of them.")
        lowest = min(row["recall"] for row in known)
        worst = [row for row in known if row["recall"] == lowest]
        if lowest < 1 and len(worst) <= max(1, len(known) // 4):  # more classes share it by chance
            images = counted(sum(row["count"] for row in worst), "image")
            lines.append(
                f"Its worst class is {worst[0]['label']}, with an accuracy of {lowest:.1%} on {images}."
                if len(worst) == 1
                else f"Its worst {len(worst)} classes have an accuracy of {lowest:.1%} on {images}."
            )
        mistakes = [pair for pair in predictions.pairs() if pair[0] != pair[1]]
        if mistakes:
            true, predicted, number = max(mistakes, key=lambda pair: pair[2])
            lines.append(
                f"Its most frequent mistake is to predict {names[predicted]} for {names[true]}: "
                f"{number:,} of {rows[true]['count']:,} images."
            )
        error = predictions.calibration_error()
        return [*lines, f"Its expected calibration error is {error:.1%} (15 bins)."]


class OfLabels(Unlabelled):
    """Results of a classifier with several labels per image."""

    kind = "Trained"
    headline = "Mean average precision {eval_mean_average_precision:.2%}, micro-F1 {eval_micro_f1:.2%}"
    results = {
        "eval_mean_average_precision": "mean_average_precision",
        "eval_micro_f1": "micro_f1",
        "eval_macro_f1": "macro_f1",
        "eval_loss": "loss",
    }
    things = "labels"
    best = ("average_precision", 1)
    columns = {
        "label": ("label", "{}"),
        "images": ("count", "{:,}"),
        "average precision": ("average_precision", "{:.1%}"),
        "F1": ("f1", "{:.1%}"),
        "threshold": ("threshold", "{:.3f}"),
    }

    def figures(self, run: Any, title: str) -> dict[str, Figure]:
        rows = run.predictions.per_class(run.data.label_names)
        if not any(row["count"] for row in rows):
            return {}
        return {"average_precision.png": inspection.plot_average_precision(rows, f"{title}: average precision")}

    def sections(self, run: Any) -> dict[str, str]:
        return {"Labels": self._table(run)}

    def limitations(self, run: Any) -> list[str]:
        rows = run.predictions.per_class([markdown(name) for name in run.data.label_names])
        known = [row for row in rows if row["count"]]
        lines = [f"The threshold of each label is the one with the highest F1 on the {run.thresholds_from}."]
        if run.thresholds_from == run.measured_on:
            lines[0] += " F1 was measured on the same images: expect a slightly lower one on others."
        if len(known) < len(rows):
            without = counted(len(rows) - len(known), "label")
            lines.append(f"The precision of {without} is unknown: there are no evaluation images with them.")
        worst = min(known, key=lambda row: row["average_precision"], default=None)
        if worst is not None and worst["average_precision"] < 1:
            lines.append(
                f"Its worst label is {worst['label']}, with an average precision of "
                f"{worst['average_precision']:.1%} on {counted(worst['count'], 'image')} with it."
            )
        return lines


class OfTargets(Unlabelled):
    """Results of a regression."""

    kind = "Trained"
    headline = "R² {eval_r2:.4f}, mean absolute error {eval_mae:.4g}"
    results = {"eval_r2": "r2", "eval_mae": "mae", "eval_rmse": "rmse", "eval_loss": "loss"}
    things = "targets"
    best = ("r2", 1)
    columns = {
        "target": ("label", "{}"),
        "images": ("count", "{:,}"),
        "MAE": ("mae", "{:.4g}"),
        "RMSE": ("rmse", "{:.4g}"),
        "R²": ("r2", "{:.4f}"),
    }

    def figures(self, run: Any, title: str) -> dict[str, Figure]:
        results = run.predictions
        return {
            "targets.png": inspection.plot_targets(
                results.labels, results.predicted, run.data.label_names, f"{title}: {run.measured_on}"
            )
        }

    def sections(self, run: Any) -> dict[str, str]:
        return {"Targets": self._table(run)}

    def limitations(self, run: Any) -> list[str]:
        lowest, highest = (run.predictions.labels.aminmax(dim=0)[index].tolist() for index in (0, 1))
        ranges = [
            f"{markdown(name)} from {low:.4g} to {high:.4g}"
            for name, low, high in zip(run.data.label_names, lowest, highest, strict=True)
        ][:MOST_RANGES]
        return [f"The evaluation images cover {', '.join(ranges)}: expect larger errors outside of that."]


class OfBoxes(Unlabelled):
    """Results of object detection."""

    kind = "Trained for object detection"
    headline = "mAP {eval_map:.2%}, AP50 {eval_map_50:.2%}"
    results = {"eval_map": "map", "eval_map_50": "map_50", "eval_map_75": "map_75", "eval_loss": "loss"}
    best = ("ap", 1)
    columns = {
        "class": ("label", "{}"),
        "images": ("count", "{:,}"),
        "boxes": ("boxes", "{:,}"),
        "AP": ("ap", "{:.1%}"),
        "AP50": ("ap_50", "{:.1%}"),
        "F1": ("f1", "{:.1%}"),
        "threshold": ("threshold", "{:.3f}"),
    }

    def figures(self, run: Any, title: str) -> dict[str, Figure]:
        results, images = run.predictions, _images_of(run)
        scores, is_shown, shown = results.image_f1(), results.shown(), []
        for position in inspection.chosen_images(scores):
            example = images[int(results.index[position])]
            pixels, truth = example["pixel_values"].byte(), example["labels"]
            rows = truth[truth[:, 0] >= 0], results.predicted[position][is_shown[position], 1:]
            both = [(corners_of(each[:, 1:]), each[:, 0].long().tolist()) for each in rows]
            shown.append((pixels, *both, f"F1 {scores[position]:.0%}"))
        what = f"{title}: {run.measured_on}, random ones and the worst"
        return {"predictions.png": inspection.plot_boxes(shown, run.data.label_names, what)}

    def sections(self, run: Any) -> dict[str, str]:
        return {"Classes": self._table(run)}

    def limitations(self, run: Any) -> list[str]:
        rows = run.predictions.per_class([markdown(name) for name in run.data.label_names])
        known = [row for row in rows if row["boxes"]]
        lines = [
            f"The threshold of each class is the score with the highest F1 at an IoU of 0.5 on the "
            f"{run.thresholds_from}. `hf-vit predict` reads it from `config.thresholds`; the pipeline takes a "
            "`threshold`, 0.5 if it is not given."
        ]
        if len(known) < len(rows):
            without = counted(len(rows) - len(known), "class", "classes")
            lines.append(f"The precision of {without} is unknown: there are no evaluation images with them.")
        worst = min(known, key=lambda row: row["ap_50"], default=None)
        if worst is not None and worst["ap_50"] < 1:
            lines.append(
                f"Its worst class is {worst['label']}, with an AP50 of {worst['ap_50']:.1%} on "
                f"{counted(worst['boxes'], 'box', 'boxes')}."
            )
        return lines


class OfPixels(Unlabelled):
    """Results of semantic segmentation."""

    kind = "Trained for semantic segmentation"
    headline = "Mean IoU {eval_mean_iou:.2%}, pixel accuracy {eval_pixel_accuracy:.2%}"
    results = {"eval_mean_iou": "mean_iou", "eval_pixel_accuracy": "pixel_accuracy", "eval_loss": "loss"}
    best = ("iou", 1)
    columns = {
        "class": ("label", "{}"),
        "images": ("count", "{:,}"),
        "share of pixels": ("share", "{:.1%}"),
        "IoU": ("iou", "{:.1%}"),
        "recall": ("recall", "{:.1%}"),
    }

    def figures(self, run: Any, title: str) -> dict[str, Figure]:
        accuracies, images = run.predictions.accuracies(), _images_of(run)
        shown = []
        for position in inspection.chosen_images(accuracies):
            example = images[int(run.predictions.index[position])]
            pixels, mask = example["pixel_values"], example["labels"]
            classes = _predicted_classes(run, pixels)
            shown.append((pixels.byte(), mask, classes, f"{accuracies[position]:.0%} of the pixels correct"))
        names = run.data.label_names
        what = f"{title}: {run.measured_on}, random ones and the worst"
        return {"predictions.png": inspection.plot_overlays(shown, names, what)}

    def sections(self, run: Any) -> dict[str, str]:
        return {"Classes": self._table(run)}

    def limitations(self, run: Any) -> list[str]:
        height, width = run.model.config.image_shape
        rows = run.predictions.per_class([markdown(name) for name in run.data.label_names])
        known = [row for row in rows if row["count"]]
        lines = [
            f"Metrics are measured at {height}x{width} pixels, to which masks are resized, too: small objects "
            "count less than in the original images."
        ]
        if len(known) < len(rows):
            without = counted(len(rows) - len(known), "class", "classes")
            lines.append(f"The IoU of {without} is unknown: there are no evaluation images with them.")
        worst = min(known, key=lambda row: row["iou"])
        if worst["iou"] < 1:
            lines.append(
                f"Its worst class is {worst['label']}, with an IoU of {worst['iou']:.1%}; it has "
                f"{worst['share']:.1%} of the pixels."
            )
        return lines


def _images_of(run: Any) -> Any:
    """Return the evaluation images of a run, with their labels."""
    return kinds_of_images(run.data)[1](run.data.evaluation, run.data.columns, run.processor)


@torch.inference_mode()
def _predicted_classes(run: Any, pixels: Tensor) -> Tensor:
    """Return the predicted classes `[H, W]` of a processed image `[C, H, W]`."""
    device = next(run.model.parameters()).device
    logits = run.model(pixel_values=run.to_model(pixels[None].to(device))).logits
    return resize_logits(logits, (pixels.shape[1], pixels.shape[2]))[0].argmax(dim=0).cpu()


MOST_RANGES = 10
# By transformers' name of what the labels are, as tasks have it.
VIEWS: dict[str | None, Unlabelled] = {
    None: Unlabelled(),
    "distillation": OfTeachers(),
    "single_label_classification": OfClasses(),
    "multi_label_classification": OfLabels(),
    "regression": OfTargets(),
    SEGMENTATION: OfPixels(),
    DETECTION: OfBoxes(),
}


def image_of(data: ImageData, processor: Any, predictions: ImageResults) -> Callable[[int], Tensor]:
    """Return a function from the position of a prediction to its image, uint8 `[C, H, W]`."""
    images = EvaluationImages(data.evaluation, data.columns, processor)
    if not data.is_stream:
        return lambda position: images[int(predictions.index[position])]["pixel_values"].byte()
    # A stream is read once more, for the few images that are shown.
    positions = {int(predictions.index[position]): position for position in inspection.shown_predictions(predictions)}
    visits = (
        Visit(0, number, row)
        for number, row in enumerate(stored_rows(images.split, images.columns))
        if number in positions
    )
    return {positions[visit.index]: images[visit]["pixel_values"].byte() for visit in visits}.__getitem__


# ---------------------------------------------------------------------------------------------- the training images


FEW_STEPS = 100  # to fine-tune
FEW_IMAGES = 1000  # for a model from scratch
LISTED_COUNTS, EXTREME_COUNTS = 12, 3
SHOWN_COUNTS = 3  # in the summary before a run


def summary_of_data(data: ImageData) -> str:
    """Return numbers of images and classes on one line, for the start of a run."""
    counts = data.class_counts()
    images = counted(data.train_length, "training image")
    if counts is not None:
        several = ("label", "labels") if data.problem_type == "multi_label_classification" else ("class", "classes")
        pairs = list(zip(counts, data.label_names, strict=True))
        more = ", ..." if len(pairs) > SHOWN_COUNTS else ""
        images += f" of {counted(len(counts), *several)} ({_listed(pairs[:SHOWN_COUNTS])}{more})"
    if data.evaluation is None:
        return f"{images}; no evaluation split"
    number = counted(len(data.evaluation), "evaluation image") if hasattr(data.evaluation, "__len__") else "evaluation"
    where = "held out" if data.eval_split == HELD_OUT else f"split {data.eval_split}"
    return f"{images}; {number} ({where})"


def summary_of_run(run: Any) -> list[str]:
    """Return what a run trains, on what, and for how long, as lines of at most 80 columns."""
    config, model = run.config, run.model
    trained, frozen = count_parameters(model)
    height, width = model.config.image_shape
    name = config.model or type(model).__name__
    start = "from scratch" if is_from_scratch(config.model) else "checkpoint"
    part = f", {_millions(trained)} of them trained" if frozen else ""
    processes = run.accelerator.num_processes
    epoch = run.plan.steps_per_epoch
    rows = {
        "Data": summary_of_data(run.data),
        "Model": f"{name} ({start}), {_millions(trained + frozen)} parameters{part}, {height}x{width} pixels",
        "Device": ", ".join(
            [
                device_name(run.accelerator.device),
                *([f"{processes} processes"] if processes > 1 else []),
                precision_name(run.accelerator.mixed_precision),
            ]
        ),
        "Steps": f"{run.plan.total_steps:,} of {counted(config.batch_size, 'image')} "
        f"({run.plan.total_steps / epoch:.3g} epochs of {counted(epoch, 'step')})",
    }
    if run.data.train_length < FEW_IMAGES and run.task.needs_labels and is_from_scratch(config.model):
        rows["Note"] = (
            f"{counted(run.data.train_length, 'image')} are few for training from scratch. Fine-tuning a checkpoint "
            "usually works much better, for example with --model facebook/dinov2-small."
        )
    elif run.plan.total_steps < FEW_STEPS and run.task.needs_labels:
        rows["Note"] = "With so few steps, hf-vit fit usually gives a better model."
    return [line for name, text in rows.items() for line in hanging(f"{name:8}", text)]


def _millions(number: int) -> str:
    return f"{number / 1e6:.3g} M" if number >= 1e6 else f"{number:,}"


def describe_data(data: ImageData) -> list[str]:
    """Return the number of training images per class, and the notes on the data, as lines for people."""
    counts = data.class_counts()
    return [*([] if counts is None else [_counts(data, counts)]), *data.notes]


def _counts(data: ImageData, counts: Sequence[int]) -> str:
    is_several = data.problem_type == "multi_label_classification"
    heading = f"Training images {'with each label' if is_several else 'per class'}"
    ordered = sorted(zip(counts, data.label_names, strict=True), key=lambda pair: pair[0])
    if len(counts) <= LISTED_COUNTS:
        return f"{heading}: {_listed(zip(counts, data.label_names, strict=True))}."
    empty = sum(count == 0 for count in counts)
    none = f"; {empty:,} have none" if empty else ""
    return (
        f"{heading}: {_listed(ordered[:EXTREME_COUNTS])} (the fewest) to {_listed(ordered[-EXTREME_COUNTS:])} (the "
        f"most), of {len(counts):,}{none}."
    )


def _listed(pairs: Any) -> str:
    return ", ".join(f"{one_line(name)} {count:,}" for count, name in pairs)
