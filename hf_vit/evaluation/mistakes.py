"""The table of the images that a classifier gets wrong."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.opening import as_stored
from .results import ImageResults


def write_mistakes(
    path: Path, results: ImageResults, split: Any, columns: tuple[str, str | None], label_names: Sequence[str]
) -> int:
    """Write a CSV file of wrongly classified images, the most confident mistakes first, and return their number.

    Its columns are `image`, the path of the file, or without one the number of the row from 0; `label`, the true
    class; `prediction`; and `confidence`, the probability of the predicted class.

    Args:
        split: The evaluation split of the results, a data set in memory or on disk.
        columns: Names of its columns of images and labels.
        label_names: Names of the classes of the model.
    """
    wrong = (results.predicted != results.labels).nonzero().flatten()
    wrong = wrong[results.confidence[wrong].argsort(descending=True, stable=True)]
    stored, image = as_stored(split, columns), columns[0]
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["image", "label", "prediction", "confidence"])
        for position in wrong.tolist():
            row = int(results.index[position])
            label, predicted = (label_names[int(of[position])] for of in (results.labels, results.predicted))
            path_of_image = (stored[row][image] or {}).get("path")
            table.writerow([path_of_image or row, label, predicted, f"{results.confidence[position]:.6f}"])
    return len(wrong)
