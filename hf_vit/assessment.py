"""A checkpoint on labelled images: what `hf-vit evaluate` measures, and how it says it."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from . import probing
from .checkpoints import Checkpoint, Options, open_checkpoint
from .checkpoints.checkpoint import CLASSIFIER
from .checkpoints.models import load
from .data.images import EvaluationImages, normalize
from .data.labelled import ImageData, _held_out_by, _recipe_of, load_data
from .data.loaders import evaluation_loader, naming_dead_workers
from .evaluation import Predictions, classify, extract, in_turn
from .hub import versions
from .inference.optimize import DTYPES, inference_precision, optimize_for_inference
from .inference.threads import BATCH_OF_CPU, default_batch_size, on_every_core
from .inference.token_merging import merge_tokens
from .system.machine import machine

PROBES: dict[str, Callable[..., dict[str, Any]]] = {
    "linear": probing.linear_probe,
    "knn": probing.knn,
    "few-shot": probing.few_shot,
}
LONG, WORST = 20, 10  # with more classes than the one, only so many of the worst are printed


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


def match_labels(of_model: list[str] | None, of_data: list[str]) -> tuple[list[int] | None, str]:
    """Return the model's class for each class of the data, and a sentence where that is not plain.

    By name. By position only where one side has but numbers for names, and as many of them.

    Args:
        of_model: Names of classes in the model's order; `None` for a model without a head.
    """
    if of_model is None:
        return None, "The model has no head that tells classes apart."
    if of_model == of_data:
        return list(range(len(of_data))), ""
    number = Counter(of_model)  # two of ImageNet's classes are called crane
    pairs = list(zip(of_model, of_data, strict=False))
    if len(of_model) == len(of_data) and all(ours == theirs or number[ours] > 1 for ours, theirs in pairs):
        return list(range(len(of_data))), "Classes of the model that share a name are taken by position."
    place = {name: index for index, name in enumerate(of_model) if number[name] == 1}
    if all(name in place for name in of_data):
        sentence = "Classes are matched by name; their order differs."
        if len(of_model) > len(of_data):
            sentence = f"The data has {len(of_data)} of the {len(of_model)} classes that the model chooses from."
        return [place[name] for name in of_data], sentence
    if len(of_model) == len(of_data) and (_are_numbers(of_model) or _are_numbers(of_data)):
        side = "model" if _are_numbers(of_model) else "data"
        return list(range(len(of_data))), (
            f"The {side}'s classes have no names, so they are taken by position: {of_model[0]} is {of_data[0]}, ..., "
            f"{of_model[-1]} is {of_data[-1]}."
        )
    strangers = [name for name in of_data if name not in place]
    return None, (
        f"The model does not know {len(strangers)} of the data's {len(of_data)} classes ({_some(strangers)}); it "
        f"tells {len(of_model)} apart ({_some(of_model)}). Name the data's classes as the model does, or choose the "
        f"--label-column that it was trained for."
    )


def _are_numbers(names: list[str]) -> bool:
    return all(name in (str(index), f"LABEL_{index}") for index, name in enumerate(names))


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _classes_of(checkpoint: Checkpoint) -> list[str] | None:
    """Return the names of the classes that a checkpoint tells apart, `None` without a classifier."""
    config: Any = checkpoint.config
    if checkpoint.architecture != CLASSIFIER or not config.num_labels:
        return None
    return [config.id2label[index] for index in range(config.num_labels)]


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


def _probe(name: str, features: dict[str, Any], label_names: list[str]) -> dict[str, Any]:
    more = {"label_names": label_names} if name == "few-shot" else {}
    began = time.perf_counter()
    return {**PROBES[name](features["train"], features["test"], **more), "seconds": time.perf_counter() - began}


# ------------------------------------------------------------------------------------------------------- in words


def describe(measured: dict[str, Any]) -> list[str]:
    """Return what `assess` measured as lines for a terminal."""
    height, width = measured["image_size"]
    split = "the part that is held out" if measured["split"] == "held out" else f"split {measured['split']}"
    lines = [
        f"{measured['model']} on {measured['data']}, {split}: {measured['images']:,} images of {height}x{width} "
        f"pixels, {measured['precision']}, {measured['hardware'] if measured['device'] != 'cpu' else 'CPU'}"
    ]
    if measured["note"]:
        probes_alone = "" if "figures" in measured else " Only probes are run."
        lines.append(f"Note: {measured['note']}{probes_alone}")
    lines += [f"Assumed: {assumed}" for assumed in measured["assumed"]]
    if broken := measured["broken"]:
        lines.append(f"Left out, since they cannot be read: {len(broken)} images ({_some(broken)})")
    lines += [f"{name:>17}  {value}" for name, value in _rows(measured)]
    lines += [sentence for probe in measured["probes"].values() for sentence in probe.get("skipped", [])]
    lines += _merging_table(measured, measured["merged"]) if "merged" in measured else []
    return lines + (_class_table(measured["per_class"]) if "per_class" in measured else [])


def _rows(measured: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    if figures := measured.get("figures"):
        rows.append(("top-1", f"{figures['accuracy']:.2%}"))
        if "top5_accuracy" in figures:
            rows.append(("top-5", f"{figures['top5_accuracy']:.2%}"))
        rows.append(("loss", f"{figures['loss']:.4f}"))
        rows.append(("calibration error", f"{figures['calibration_error']:.2%}  (15 bins of confidence)"))
    for name, probe in measured["probes"].items():
        learned = f"{probe['train_images']:,} training images"
        if name == "linear":
            failed = "" if probe["converged"] else ", not converged"
            rows.append(("linear probe", f"{probe['accuracy']:.2%}  (C={probe['C']:g}{failed}, {learned})"))
        elif name == "knn":
            rows.append((f"{probe['k']}-NN", f"{probe['accuracy']:.2%}  ({learned})"))
        else:
            for shots, result in probe["shots"].items():
                deviation = "" if result["std"] is None else f" ± {100 * result['std']:.2f}"
                rows.append((f"{shots}-shot", f"{result['mean']:.2%}{deviation}  ({len(probe['seeds'])} draws)"))
    pace = measured["images_per_second"]
    processes = f", {measured['processes']} processes" if measured["processes"] > 1 else ""
    paces = f"{pace['pipeline']:,.0f} with reading and decoding, {pace['model']:,.0f} the model alone{processes}"
    return [*rows, ("images/s", paces)]


def _merging_table(measured: dict[str, Any], merged: dict[str, Any]) -> list[str]:
    lines = ["", f"{'top-1':>8}  {'loss':>7}  {'images/s':>9}  the model alone"]
    for row, name in ((measured, "as it is"), (merged, f"{merged['per_layer']} tokens merged in every layer")):
        figures, pace = row["figures"], row["images_per_second"]["model"]
        lines.append(f"{figures['accuracy']:>8.2%}  {figures['loss']:>7.4f}  {pace:>9,.0f}  {name}")
    return lines


def _class_table(per_class: list[dict[str, Any]]) -> list[str]:
    shown = [row for row in per_class if row["count"]]
    absent, is_long = len(per_class) - len(shown), len(shown) > LONG
    if is_long:
        shown = sorted(shown, key=lambda row: row["accuracy"])[:WORST]
    lines = ["", f"{'images':>8}  {'recall':>7}  {'precision':>9}  class"]
    for row in shown:
        precision = "-" if row["precision"] is None else f"{row['precision']:.1%}"
        lines.append(f"{row['count']:>8,}  {row['accuracy']:>7.1%}  {precision:>9}  {row['label']}")
    if is_long:
        lines.append(f"These are the {WORST} worst of {len(per_class) - absent} classes; --json writes all.")
    return lines
