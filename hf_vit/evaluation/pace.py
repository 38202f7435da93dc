"""Compare speed and outputs of two ways to run a model."""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..checkpoints.checkpoint import Checkpoint
from ..data.images import EvaluationImages, normalize
from ..data.labelled import ImageData, _held_out_by, _recipe_of, load_data
from ..data.loaders import evaluation_loader
from ..inference.threads import BATCH_OF_CPU, on_every_core
from ..inference.token_merging import merge_tokens
from .figures import Predictions, classify
from .labels import _classes_of, match_labels


def compare(
    source: str, checkpoint: Checkpoint, data_source: str, processor: Any, models: dict[str, Any], turns: int = 9
) -> list[str]:
    """Measure forms of one classifier on the same labelled images on the CPU, and return a table as lines.

    Args:
        source, checkpoint, processor: Of the model that all are forms of.
        data_source: As for `load_data`; of a folder that a run left, what it held out is measured on.
        models: By what each is called; each takes `pixel_values`, and gives `logits`.
        turns: In which they are timed, one behind the other, since other load comes and goes.

    Raises:
        ValueError: If the model's classes are not those of the data.
    """
    accelerator = Accelerator(cpu=True)
    data = load_data(data_source, needs_train=False, **_held_out_by(_recipe_of(source)))
    classes, sentence = match_labels(_classes_of(checkpoint), data.label_names)
    if classes is None:
        raise ValueError(sentence)
    images = EvaluationImages(data.evaluation, data.columns, processor)
    images.labels = [classes[label] for label in images.labels]
    loader = evaluation_loader(images, BATCH_OF_CPU, 0)
    to_model = partial(normalize, processor=processor)
    found = {name: classify(model, loader, accelerator, to_model) for name, model in models.items()}
    pixel_values = torch.zeros(BATCH_OF_CPU, checkpoint.config.num_channels, *checkpoint.config.image_shape)
    paces: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(turns):
        for name, model in models.items():
            paces[name].append(_pace(model, pixel_values, accelerator, at_least=0.1))
    first = next(iter(found.values()))
    threads = torch.get_num_threads()
    lines = [
        f"{len(first.labels):,} images of {data.name}, {data.eval_split}; pace in batches of {BATCH_OF_CPU} on "
        f"{threads} thread{'s' * (threads > 1)}, median of {turns} turns (least to most).",
        f"{'':28}{'accuracy':>9}  {'same answer':>11}  images/s",
    ]
    for name, answers in found.items():
        same = (answers.predicted == first.predicted).double().mean().item()
        pace = f"{median(paces[name]):,.1f} ({min(paces[name]):,.1f} to {max(paces[name]):,.1f})"
        lines.append(f"{name:28}{answers.figures()['accuracy']:9.2%}  {same:11.2%}  {pace}")
    return lines


def by_cores(model: Any, loader: Any, to_input: Callable[[Any], Tensor]) -> Iterator[tuple[Any, Any]]:
    """Yield each batch of a loader with what the model answers; a core reads a batch and answers for it alone."""

    @torch.inference_mode()
    def answer(visits: list[Any]) -> tuple[Any, Any]:
        batch = loader.collate_fn([loader.dataset[visit] for visit in visits])
        return batch, model(pixel_values=to_input(batch))

    return on_every_core(answer, loader.batch_sampler)


def _is_same(data: ImageData) -> bool:
    """Say whether the split to measure is the training split."""
    return len(data.train) == len(data.evaluation) and data.train[:1] == data.evaluation[:1]


@torch.no_grad()
def _pace(model: Any, pixel_values: Tensor, accelerator: Accelerator, at_least: float = 0.5) -> float:
    """Return images a second of a model that has run before, on all processes together."""
    synchronize = torch.accelerator.synchronize if pixel_values.device.type != "cpu" else lambda: None
    model.eval()
    synchronize()
    began, passes = time.perf_counter(), 0
    while (seconds := time.perf_counter() - began) < at_least:
        model(pixel_values=pixel_values)
        synchronize()
        passes += 1
    pace = torch.tensor([passes * len(pixel_values) / seconds], device=pixel_values.device)
    return accelerator.gather(pace).sum().item()


def _paces_by_turns(
    model: Any, numbers: Sequence[int], pixel_values: Tensor, accelerator: Accelerator, turns: int = 5
) -> list[float]:
    """Return images a second for each number of merged tokens: medians of turns, since other load comes and goes."""
    paces: dict[int, list[float]] = {number: [] for number in numbers}
    for _ in range(turns):
        for number in numbers:
            merge_tokens(model, number)
            paces[number].append(_pace(model, pixel_values, accelerator, at_least=0.1))
    return [median(paces[number]) for number in numbers]


def _answers(predictions: Predictions, label_names: list[str]) -> dict[str, Any]:
    # Most cells of a large matrix are empty.
    pairs, counts = torch.stack([predictions.labels, predictions.predicted]).unique(dim=1, return_counts=True)
    cells = [
        {"label": label_names[label], "predicted": label_names[predicted], "count": count}
        for label, predicted, count in zip(*pairs.tolist(), counts.tolist(), strict=True)
    ]
    return {
        "figures": predictions.figures(),
        "per_class": predictions.per_class(label_names),
        "confusion": cells,
    }
