"""A checkpoint on labelled images: what `hf-vit evaluate` measures, and how it says it."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..checkpoints.checkpoint import Options
from ..checkpoints.models import load
from ..checkpoints.opening import open_checkpoint
from ..data.images import EvaluationImages, normalize
from ..data.labelled import _held_out_by, _recipe_of, load_data
from ..data.loaders import evaluation_loader, naming_dead_workers
from ..inference.optimize import DTYPES, inference_precision, optimize_for_inference
from ..inference.threads import default_batch_size
from ..inference.token_merging import merge_tokens
from ..system.machine import machine, versions
from . import probing
from .figures import classify, extract, in_turn
from .labels import _classes_of, match_labels
from .pace import _answers, _is_same, _pace, _paces_by_turns, by_cores

PROBES: dict[str, Callable[..., dict[str, Any]]] = {
    "linear": probing.linear_probe,
    "knn": probing.knn,
    "few-shot": probing.few_shot,
}


@naming_dead_workers()
def assess(
    source: str,
    data_source: str,
    *,
    split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    batch_size: int | None = None,
    num_workers: int = 0,
    image_size: tuple[int, int] | None = None,
    precision: str = "auto",
    probes: Sequence[str] = (),
    merged_per_layer: int = 0,
) -> dict[str, Any] | None:
    """Measure a checkpoint on labelled images; on one process or on those that a launcher started.

    Args:
        source: A file, a folder or a name on the Hub, of this package or another library.
        data_source: As for `load_data`.
        split: To measure on; the one that is held out if not given.
        image_column, label_column: As for `load_data`.
        batch_size: Images of a core or of a GPU at a time, chosen by the hardware if not given. It changes no figure
            beyond rounding.
        num_workers: Processes that load images, for each process.
        image_size: Pixels, (height, width); the checkpoint's if not given.
        precision: `"fp32"`, `"bf16"`, `"fp8"`, or `"auto"`: as for `optimize_for_inference`.
        probes: Of `PROBES`. They learn from the training split, and need no head.
        merged_per_layer: Tokens to merge in every layer, as `merge_tokens` does, in a second measurement of accuracy
            and pace beside that of the model as it is.

    Returns:
        All that was measured, of plain types; `None` on every process but the first.

    Raises:
        ValueError: If the model's classes and the data's are not the same and there is no probe to run; if there is
            nothing to learn from or to measure; if tokens are to be merged that cannot be.
        ChildProcessError: If a process that loads images was killed.
    """
    if unknown := set(probes) - set(PROBES):
        raise ValueError(f"There is no probe {', '.join(sorted(unknown))}: choose of {', '.join(PROBES)}.")
    precision = inference_precision(precision)
    accelerator = Accelerator()  # the model is brought to its precision as a whole
    is_cpu = accelerator.device.type == "cpu"
    batch_size = batch_size or default_batch_size(accelerator.device.type)
    checkpoint = open_checkpoint(source, Options(image_size=image_size))
    of_model = _classes_of(checkpoint)
    recipe = _recipe_of(source)  # a part of the data that it held out is held out here
    with accelerator.local_main_process_first():  # the others read what it prepared
        data = load_data(
            data_source,
            eval_split=split,
            image_column=image_column,
            label_column=label_column,
            needs_train=bool(probes),
            **_held_out_by(recipe),
        )
    classes, sentence = match_labels(of_model, data.label_names)
    if data.eval_split == "held out" and recipe.get("streaming"):
        sentence = (
            f"{sentence} It learned from a stream, which holds out other images: it may have seen these.".strip()
        )
    if classes is None and not probes:
        raise ValueError(f"{sentence} To measure the features alone, add --probe.")
    if probes and _is_same(data):
        raise ValueError(
            f"Probes learn from the training split, so they cannot be measured on it: let --split be another than "
            f"{split}, or leave it out."
        )
    if merged_per_layer and classes is None:
        raise ValueError(f"{sentence} Merging is measured by the accuracy of a classifier: leave --merge-tokens out.")

    model, processor = load(source, image_size, checkpoint)
    if merged_per_layer:  # what cannot merge is refused before minutes of measuring
        merge_tokens(merge_tokens(model, merged_per_layer), 0)

    def loader_of(images: Any) -> Any:
        prepared = EvaluationImages(images, data.columns, processor)
        if classes is not None:
            prepared.labels = [classes[label] for label in prepared.labels]
        parts = accelerator.num_processes, accelerator.process_index
        return evaluation_loader(prepared, batch_size, num_workers, *parts)

    model.to(accelerator.device)
    # Merging works within the layers, which the faster model does not have.
    model = model.to(DTYPES[precision]) if merged_per_layer else optimize_for_inference(model, precision)
    to_model = partial(normalize, processor=processor)
    loader = loader_of(data.evaluation)
    predictions, features = None, {}
    if probes:
        pooled = model.base_model.pooler
        *features["train"], _ = extract(model, loader_of(data.train), accelerator, to_model, pooled)
        began = time.perf_counter()
        *features["test"], broken = extract(model, loader, accelerator, to_model, pooled)
    if classes is not None:
        began = time.perf_counter()
        # What merges tokens remembers one batch at a time; other processes are for other cores.
        is_alone = is_cpu and accelerator.num_processes == 1 and not num_workers and not merged_per_layer
        predictions = classify(model, loader, accelerator, to_model, by_cores if is_alone else in_turn)
        broken = predictions.broken
    seconds = time.perf_counter() - began
    count = len(data.evaluation) - len(broken)
    shape = (min(batch_size, len(data.evaluation)), model.config.num_channels, *model.config.image_shape)
    pixel_values = torch.zeros(shape, device=accelerator.device)
    merged = {}
    if not merged_per_layer:
        model_pace = _pace(model, pixel_values, accelerator)
    else:
        merge_tokens(model, merged_per_layer)
        figures = classify(model, loader, accelerator, to_model).figures()
        model_pace, pace = _paces_by_turns(model, (0, merged_per_layer), pixel_values, accelerator)
        merged["merged"] = {"per_layer": merged_per_layer, "figures": figures, "images_per_second": {"model": pace}}
    accelerator.end_training()
    if not accelerator.is_main_process:
        return None
    label_names = of_model if classes is not None and of_model is not None else data.label_names
    return {
        "model": Path(source).name if Path(source).exists() else source,
        "data": data.name,
        "split": data.eval_split,
        "images": count,
        "broken": broken,
        "image_size": list(model.config.image_shape),
        "labels": label_names,
        "note": sentence,
        "assumed": checkpoint.assumed,
        **({} if predictions is None else _answers(predictions, label_names)),
        "probes": {name: _probe(name, features, label_names) for name in probes},
        "images_per_second": {"pipeline": count / seconds, "model": model_pace},
        **merged,
        "precision": precision,
        "batch_size": batch_size,
        "num_workers": num_workers,
        "processes": accelerator.num_processes,
        "device": accelerator.device.type,
        "hardware": machine(),
        "versions": versions(),
    }


def _probe(name: str, features: dict[str, Any], label_names: list[str]) -> dict[str, Any]:
    more = {"label_names": label_names} if name == "few-shot" else {}
    began = time.perf_counter()
    return {**PROBES[name](features["train"], features["test"], **more), "seconds": time.perf_counter() - began}


# ------------------------------------------------------------------------------------------------------- in words
