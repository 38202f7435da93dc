"""Figures of a training run: its log, its metrics per class, label or target, and its predictions."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .drawing import BLUE, GRAY, INK, ORANGE, Figure, bare, heading, new_figure, short
from .tiles import rgb

ROOT_TICKS = (0, 1, 5, 20, 50, 100)


# The first of these metrics that the log contains is drawn: axis label, factor, and the format of the printed value.
DRAWN = {
    "eval_accuracy": ("evaluation accuracy, %", 100, "{:.1f} %"),
    "eval_mean_average_precision": ("mean average precision, %", 100, "{:.1f} %"),
    "eval_r2": ("R²", 1, "{:.3f}"),
    "eval_mean_iou": ("mean IoU, %", 100, "{:.1f} %"),
}
LOSSES = {
    "eval_accuracy": "cross-entropy",
    "eval_mean_average_precision": "binary cross-entropy",
    "eval_r2": "squared error, standardized",
    "eval_mean_iou": "cross-entropy of pixels",
    None: "loss of masked patches",
}
MOST_BARS, MOST_TARGETS = 40, 9


def plot_training(log: Sequence[dict[str, Any]], title: str = "Training", saved_step: int | None = None) -> Figure:
    """Draw the loss of a run by epoch and, for a model with labels, its main metric.

    Args:
        log: Rows of the log.
        title: Heading of the figure.
        saved_step: Step of the saved model, if it is not the last one.
    """
    training = [row for row in log if "loss" in row]
    evaluations = [row for row in log if "eval_loss" in row]
    metric = next((name for name in DRAWN if name in evaluations[-1]), None)
    figure = new_figure(5.5 if metric is None else 9, 3.6)
    axes = figure.subplots(1, 1 if metric is None else 2, squeeze=False)[0]
    epochs = [row["epoch"] for row in evaluations]
    marker = "o" if len(epochs) < 30 else None
    losses = axes[0]
    dot = "." if len(training) < 3 else None  # a line of one point is invisible
    losses.plot(
        [r["epoch"] for r in training], [r["loss"] for r in training], color=GRAY, lw=1.2, marker=dot, label="training"
    )
    losses.plot(epochs, [r["eval_loss"] for r in evaluations], color=BLUE, marker=marker, ms=4, label="evaluation")
    highest = max([r["loss"] for r in training] + [r["eval_loss"] for r in evaluations])
    losses.set(xlabel="epoch", ylabel=LOSSES[metric], ylim=(0, 1.05 * highest if 0 < highest < math.inf else None))
    losses.legend(frameon=False)
    if metric is not None:
        label, factor, last = DRAWN[metric]
        values = [factor * row[metric] for row in evaluations]
        shown = next((i for i, row in enumerate(evaluations) if row.get("step") == saved_step), len(values) - 1)
        word = "final" if saved_step is None else "saved"
        if saved_step is not None:
            axes[1].plot(epochs[shown], values[shown], color=BLUE, marker="D", ms=8, fillstyle="none")
        axes[1].plot(epochs, values, color=BLUE, marker=marker, ms=4)
        axes[1].text(
            0.98, 0.06, f"{word}: {last.format(values[shown])}", transform=axes[1].transAxes, ha="right", color=BLUE,
            fontweight="bold",
        )  # fmt: skip
        lowest = min(0.0, values[0]) if len(values) == 1 else None  # one value has no range of its own
        axes[1].set(xlabel="epoch", ylabel=label, ylim=(lowest, 1.01 * factor))
    for axis in axes:
        bare(axis).set_xlim(0, None)
    return heading(figure, title)


def plot_average_precision(rows: Sequence[dict[str, Any]], title: str = "Average precision") -> Figure:
    """Draw the average precision of every label as bars, the best at the top; only the 40 worst if there are more.

    Args:
        rows: `LabelResults.per_class`.
    """
    known = sorted((row for row in rows if row["count"]), key=lambda row: row["average_precision"])[:MOST_BARS]
    figure = new_figure(7, max(2.0, 1.2 + 0.24 * len(known)))
    axis = bare(figure.subplots())
    names = [f"{short(row['label'])} ({row['count']:,})" for row in known]
    axis.barh(range(len(known)), [100 * row["average_precision"] for row in known], color=BLUE, height=0.7)
    axis.set_yticks(range(len(known)), names)
    axis.tick_params(axis="y", length=0)
    axis.set(xlim=(0, 100), xlabel="average precision, %; number of images with the label in brackets")
    return heading(figure, title)


def plot_targets(labels: Tensor, predicted: Tensor, names: Sequence[str], title: str = "Predictions") -> Figure:
    """Draw predicted against true values, one panel for each of the first nine targets.

    Args:
        labels, predicted: True and predicted values, `[N, targets]`.
    """
    shown = min(len(names), MOST_TARGETS)
    columns = min(shown, 3)
    rows = -(-shown // columns)
    figure = new_figure(3.6 * columns + 0.4, 3.4 * rows + 0.5)
    parts = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in parts:
        axis.axis("off")
    for index, axis in zip(range(shown), parts, strict=False):
        bare(axis).axis("on")
        true, said = labels[:, index].numpy(), predicted[:, index].numpy()
        axis.scatter(true, said, s=12, color=BLUE, alpha=0.5, linewidths=0)
        axis.axline((float(true.mean()), float(true.mean())), slope=1, color=GRAY, lw=1)
        axis.set(title=short(names[index]), xlabel="true value", ylabel="predicted value")
    return heading(figure, title)


def plot_confusion(confusion: Tensor, label_names: Sequence[str], title: str = "Confusion") -> Figure:
    """Draw a confusion matrix in percent of the true class, with numbers in the cells for at most 20 classes.

    Args:
        confusion: Numbers of images `[num_labels, num_labels]`; rows are true classes, columns predicted classes.
    """
    from matplotlib.colors import PowerNorm

    number = len(label_names)
    names = [short(name) for name in label_names]
    shares = (100 * confusion / confusion.sum(dim=1, keepdim=True).clamp(min=1)).numpy()
    is_right = np.eye(number, dtype=bool)
    side = min(18.0, 2.6 + 0.52 * number) if number <= 30 else min(18.0, 9 + 0.1 * number)
    size = max(5.0, min(9.0, 52 * side / number))  # points (72 per inch)
    figure = new_figure(side + 1.6, side)
    axis = figure.subplots()
    # Mistakes have a separate colour map, with a square-root scale on which a few percent are visible.
    layers = (
        ("Blues", "correct", "linear", None, ~is_right),
        ("Oranges", "wrong", PowerNorm(0.5), ROOT_TICKS, is_right),
    )
    for color, label, norm, ticks, hidden in layers:
        values = np.ma.masked_array(shares, hidden | ((shares == 0) & ~is_right))
        image = axis.imshow(values, cmap=color, norm=norm)
        image.set_clim(0, 100)
        label = f"{label}: % of the true class"
        scale = figure.colorbar(image, ax=axis, label=label, ticks=ticks, shrink=0.6, aspect=30, pad=0.02)
        scale.outline.set_visible(False)
        scale.ax.yaxis.set_major_formatter("{x:.0f}")
    is_small = number <= 20
    axis.set_xticks(range(number), names, rotation=45 if is_small else 90, ha="right" if is_small else "center")
    if is_small:
        for tick in axis.get_xticklabels():
            tick.set_rotation_mode("anchor")
    axis.set_yticks(range(number), names)
    axis.tick_params(labelsize=size, length=0)
    axis.set_xticks(np.arange(number + 1) - 0.5, minor=True)
    axis.set_yticks(np.arange(number + 1) - 0.5, minor=True)
    axis.grid(which="minor", color="#eceef1", lw=0.6)
    axis.tick_params(which="minor", length=0)
    axis.set(xlabel="predicted class", ylabel="true class")
    axis.spines[:].set_visible(False)
    for row, column in np.argwhere(shares > 0) if is_small else ():
        share = shares[row, column]
        color = "white" if share > (55 if row == column else 40) else INK
        text = "<1" if share < 1 else f"{int(share + 0.5)}"  # rounds halves up, unlike `round`
        axis.text(column, row, text, ha="center", va="center", color=color, fontsize=size)
    return heading(figure, title)


def shown_predictions(predictions: Any, columns: int = 8, seed: int = 0) -> list[int]:
    """Return the indices of the predictions that `plot_predictions` draws."""
    return [index for group in _chosen(predictions, columns, seed) for index in group]


def _chosen(predictions: Any, columns: int, seed: int) -> tuple[list[int], list[int]]:
    order = torch.randperm(len(predictions.labels), generator=torch.Generator().manual_seed(seed))
    mistakes = (predictions.predicted != predictions.labels).nonzero().flatten()
    surest = mistakes[predictions.confidence[mistakes].argsort(descending=True)]
    return order[: 2 * columns].tolist(), surest[: 2 * columns].tolist()


def plot_predictions(
    image_of: Callable[[int], Tensor],
    predictions: Any,
    label_names: Sequence[str],
    title: str = "Predictions",
    columns: int = 8,
    seed: int = 0,
) -> Figure:
    """Draw random images, and below them the most confident mistakes, with predicted labels and confidence.

    Args:
        image_of: Returns the image of a prediction by its index, uint8 `[C, H, W]`; called only for drawn images.
        predictions: Result of `evaluation.classify`.
    """
    random, mistakes = _chosen(predictions, columns, seed)
    is_wrong = predictions.predicted != predictions.labels
    shown = [("random images", random)]
    if mistakes:
        shown.append((f"most confident mistakes, {len(mistakes):,} of {int(is_wrong.sum()):,}", mistakes))

    rows = [-(-len(indices) // columns) for _, indices in shown]
    figure = new_figure(columns * 1.25, sum(rows) * 1.6 + 0.45 * len(shown) + 0.4)
    heading(figure, title)
    parts = figure.subfigures(len(shown), 1, height_ratios=[count + 0.3 for count in rows], squeeze=False)[:, 0]
    for part, (group, indices), count in zip(parts, shown, rows, strict=True):
        part.suptitle(group, fontsize=10, color=GRAY)
        axes = part.subplots(count, columns, squeeze=False)
        for axis in axes.flat:
            axis.axis("off")
        for axis, index in zip(axes.flat, indices, strict=False):
            picture = rgb(image_of(index).permute(1, 2, 0).cpu().numpy()).astype(np.uint8)
            # Small images are easier to recognize when smoothed.
            smoothing = "bicubic" if min(picture.shape[:2]) < 32 else "antialiased"
            axis.imshow(picture, interpolation=smoothing)
            label, truth = (
                short(label_names[int(labels[index])], 16) for labels in (predictions.predicted, predictions.labels)
            )
            text = f"{label}  {predictions.confidence[index]:.0%}" + f"\ntrue: {truth}" * bool(is_wrong[index])
            size, color = 9 if len(label) < 13 else 7, ORANGE if is_wrong[index] else BLUE
            axis.set_title(text, fontsize=size, color=color, pad=3)
    return figure
