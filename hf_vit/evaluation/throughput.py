"""Throughput of models, and a comparison of several forms of one classifier."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from types import MappingProxyType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..checkpoints.checkpoint import Checkpoint
from ..data.evaluated import load_evaluation_data
from ..data.images import normalize
from ..data.loaders import evaluation_loader
from ..inference.threads import BATCH_OF_CPU
from ..system.texts import counted
from .labels import align, contradiction, images_for_model, labels_of
from .metrics import evaluate_images

SHORT = {"mean_average_precision": "mAP", "r2": "R²"}


def compare(
    source: str,
    checkpoint: Checkpoint,
    data_source: str,
    processor: Any,
    models: dict[str, Any],
    turns: int = 9,
    sizes: Mapping[str, int] = MappingProxyType({}),
) -> list[str]:
    """Measure forms of one classifier on the same labelled images on the CPU, and return a table as lines.

    Args:
        source, checkpoint, processor: Of the classifier.
        data_source: As for `load_data`; if a run left the model, the images that the run held out are used.
        models: The forms by name; each maps `pixel_values` to outputs with `logits`.
        turns: Number of throughput measurements per form.
        sizes: Bytes of the files of some of the forms.

    Raises:
        ValueError: If the classes of the model are not those of the data.
    """
    accelerator = Accelerator(cpu=True)
    data, _ = load_evaluation_data(source, data_source, needs_train=False)
    config: Any = checkpoint.config
    data, classes, note = align(data, labels_of(checkpoint))
    if classes is None:
        raise ValueError(note)
    if problem := contradiction(config, data):
        raise ValueError(problem)
    images = images_for_model(data, data.evaluation, processor, classes, config.num_labels)
    loader = evaluation_loader(images, BATCH_OF_CPU, 0)
    to_model = partial(normalize, processor=processor)
    results = {name: evaluate_images(model, loader, accelerator, to_model, config) for name, model in models.items()}
    pixel_values = torch.zeros(BATCH_OF_CPU, checkpoint.config.num_channels, *checkpoint.config.image_shape)
    prepare: dict[Any, Callable[[], Any]] = {name: partial(models.get, name) for name in models}
    speeds = throughputs(prepare, pixel_values, accelerator, turns)
    first, threads = next(iter(results.values())), torch.get_num_threads()
    metric = next(iter(first.metrics()))
    lines = [
        f"{counted(len(first.labels), 'image')} of {data.name}, {data.eval_split}. Throughput: batch size "
        f"{BATCH_OF_CPU}, {counted(threads, 'thread')}, median of {turns} runs (min to max).",
        f"{'':28}{SHORT.get(metric, metric):>9}  {'agreement':>9}  {'MB':>7}  images/s",
    ]
    for name, result in results.items():
        agreement = result.agreement(first)
        speed = f"{median(speeds[name]):,.1f} ({min(speeds[name]):,.1f} to {max(speeds[name]):,.1f})"
        size = f"{sizes[name] / 1e6:,.1f}" if name in sizes else ""
        lines.append(f"{name:28}{result.metrics()[metric]:9.2%}  {agreement:9.2%}  {size:>7}  {speed}")
    return lines


@torch.no_grad()
def throughputs(
    prepare: dict[Any, Callable[[], Any]], pixel_values: Tensor, accelerator: Accelerator, turns: int = 5
) -> dict[Any, list[float]]:
    """Return images/s, over all processes, of models that have run before; `prepare` returns each model.

    Each runs for 0.1 seconds per turn, in turn, since the load of the machine varies.
    """
    synchronize = torch.accelerator.synchronize if pixel_values.device.type != "cpu" else lambda: None
    speeds: dict[Any, list[float]] = {name: [] for name in prepare}
    for _ in range(turns):
        for name, prepared in prepare.items():
            model = prepared().eval()
            synchronize()
            began, passes = time.perf_counter(), 0
            while (seconds := time.perf_counter() - began) < 0.1:
                model(pixel_values=pixel_values)
                synchronize()
                passes += 1
            speed = torch.tensor([passes * len(pixel_values) / seconds], device=pixel_values.device)
            speeds[name].append(accelerator.gather(speed).sum().item())
    return speeds
