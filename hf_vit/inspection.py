"""What a model has learned, as arrays and as pictures.

Functions that begin with `plot` return a matplotlib figure, to be saved by its `savefig`. Colours can be told apart by
the colour-blind: viridis, and blue against orange.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, GRAY, INK = "#2a6ebb", "#e07b00", "#8a8f98", "#22262b"


# ------------------------------------------------------------------------------------------------------ arrays


@torch.no_grad()
def position_similarity(model: Any) -> np.ndarray:
    """Return the cosine similarity of all pairs of position embeddings, `[rows, columns, rows, columns]`.

    The centre of figure 7 of the paper. Entry `[r, c]` compares the patch in row r, column c with every other.

    Raises:
        ValueError: If the positions of the model are no vectors that are added to patches.
    """
    encoder: Any = getattr(model, model.base_model_prefix, model)
    grid = model.config.grid_size
    positions = encoder.embeddings.position_embeddings
    if not hasattr(positions, "on_grid"):
        raise ValueError(
            f"position_embedding_type={model.config.position_embedding_type!r} has no vector for each patch, so there "
            "is nothing to compare."
        )
    directions = F.normalize(positions.on_grid(grid)[0].float(), dim=-1)  # [N, D]
    return (directions @ directions.T).cpu().numpy().reshape(*grid, *grid)


# ---------------------------------------------------------------------------------------------------- pictures


def plot_position_similarity(similarity: np.ndarray, title: str = "Similarity of position embeddings") -> "Figure":
    """Draw one heat map for each patch, laid out as the patches lie in the image."""
    rows, columns = similarity.shape[:2]
    itself = similarity.reshape(rows * columns, -1).argmax(axis=1).reshape(rows, columns)
    others = similarity.reshape(rows * columns, -1)[~np.eye(rows * columns, dtype=bool)]
    # Every patch is wholly similar to itself: without it, the scale shows the differences between the others.
    low, high = float(others.min()), float(others.max())
    cell = min(1.0, 7.0 / max(rows, columns))
    figure = _figure(columns * cell + 1.5, rows * cell + 1.3)
    axes = figure.subplots(rows, columns, squeeze=False, gridspec_kw={"wspace": 0.06, "hspace": 0.06})
    for row in range(rows):
        for column in range(columns):
            axis = axes[row, column]
            image = axis.imshow(similarity[row, column], vmin=low, vmax=high, cmap="viridis")
            here = divmod(int(itself[row, column]), columns)
            if rows * columns <= 256:
                axis.plot(here[1], here[0], marker="o", markersize=3 * cell + 1, color="white")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if column == 0:
                axis.set_ylabel(str(row + 1), rotation=0, labelpad=8, va="center")
            if row == rows - 1:
                axis.set_xlabel(str(column + 1))
    figure.supxlabel("column of the patch", fontsize=10, color=INK)
    figure.supylabel("row of the patch", fontsize=10, color=INK)
    figure.suptitle(title, fontsize=12, color=INK)
    scale = figure.colorbar(image, ax=axes, label="cosine similarity", shrink=0.8, aspect=35, pad=0.02)
    scale.outline.set_visible(False)
    return figure


def plot_training(log: Sequence[dict[str, Any]], title: str = "Training") -> "Figure":
    """Draw loss and accuracy over the epochs of a run's log."""
    training = [row for row in log if "loss" in row]
    evaluations = [row for row in log if "eval_accuracy" in row]
    figure = _figure(9, 3.6)
    losses, accuracies = figure.subplots(1, 2)
    losses.plot([r["epoch"] for r in training], [r["loss"] for r in training], color=GRAY, lw=1.2, label="training")
    epochs = [row["epoch"] for row in evaluations]
    marker = "o" if len(epochs) < 30 else None
    losses.plot(epochs, [r["eval_loss"] for r in evaluations], color=BLUE, marker=marker, ms=4, label="held out")
    losses.set(xlabel="epoch", ylabel="cross-entropy", ylim=(0, None))
    losses.legend(frameon=False)
    shares = [100 * row["eval_accuracy"] for row in evaluations]
    accuracies.plot(epochs, shares, color=BLUE, marker=marker, ms=4)
    accuracies.annotate(
        f"{shares[-1]:.1f} %", (epochs[-1], shares[-1]), xytext=(-4, -16), textcoords="offset points", ha="right",
        color=BLUE, fontweight="bold",
    )  # fmt: skip
    accuracies.set(xlabel="epoch", ylabel="accuracy on held-out images, %", ylim=(None, 101))
    for axis in (losses, accuracies):
        axis.set_xlim(0, None)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#e6e8eb", lw=0.8)
        axis.set_axisbelow(True)
    figure.suptitle(title, fontsize=12, color=INK)
    return figure


def plot_predictions(
    images: Sequence[Tensor],
    labels: Sequence[int],
    probabilities: Tensor,
    label_names: Sequence[str],
    title: str = "Predictions",
    columns: int = 8,
    seed: int = 0,
) -> "Figure":
    """Draw images that are drawn by chance, and below them the mistakes that the model was surest of.

    Args:
        images: uint8 `[C, H, W]` each.
        labels: True classes.
        probabilities: `[N, num_labels]`.
    """
    confidence, predicted = probabilities.max(dim=-1)
    is_wrong = predicted != torch.tensor(labels)
    chance = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[: 2 * columns]
    mistakes = is_wrong.nonzero().flatten()
    mistakes = mistakes[confidence[mistakes].argsort(descending=True)][: 2 * columns]
    shown = [("drawn by chance", chance.tolist())]
    if len(mistakes):
        shown.append((f"surest of the {int(is_wrong.sum())} mistakes among {len(labels)}", mistakes.tolist()))

    rows = [-(-len(indices) // columns) for _, indices in shown]
    figure = _figure(columns * 1.25, sum(rows) * 1.6 + 0.45 * len(shown) + 0.4)
    figure.suptitle(title, fontsize=12, color=INK)
    parts = figure.subfigures(len(shown), 1, height_ratios=[count + 0.3 for count in rows], squeeze=False)[:, 0]
    for part, (heading, indices), count in zip(parts, shown, rows, strict=True):
        part.suptitle(heading, fontsize=10, color=GRAY)
        axes = part.subplots(count, columns, squeeze=False)
        for axis in axes.flat:
            axis.axis("off")
        for axis, index in zip(axes.flat, indices, strict=False):
            picture = images[index].permute(1, 2, 0).squeeze(-1).numpy()
            # Few pixels are easier to recognise smoothed.
            smoothing = "bicubic" if min(picture.shape[:2]) < 32 else "antialiased"
            axis.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation=smoothing)
            answer = f"{label_names[int(predicted[index])]}  {confidence[index]:.0%}"
            color = ORANGE if is_wrong[index] else BLUE
            truth = f"\nis {label_names[labels[index]]}" if is_wrong[index] else ""
            axis.set_title(answer + truth, fontsize=9, color=color, pad=3)
    return figure


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure  # not pyplot: no window, no state

    return Figure(figsize=(width, height), dpi=150, layout="constrained")
