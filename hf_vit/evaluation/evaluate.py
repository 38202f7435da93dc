"""Evaluate a checkpoint on labelled images: the measurements of `hf-vit evaluate`."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor

from ..checkpoints.checkpoint import CLASSIFIER, MULTI_TASK, Checkpoint, Options
from ..checkpoints.from_pretrained import warn_of_assumptions
from ..checkpoints.models import load
from ..checkpoints.opening import open_checkpoint
from ..data.classes import DENSE, MULTI, REGRESSION, SINGLE
from ..data.evaluated import load_evaluation_data
from ..data.images import normalize
from ..data.labelled import HELD_OUT, ImageData
from ..data.loaders import evaluation_loader, naming_dead_workers
from ..inference.optimize import DTYPES, inference_precision, optimize_for_inference
from ..inference.threads import default_batch_size
from ..inference.token_merging import merge_tokens
from ..inference.windows import slide
from ..system.locking import LONGEST_WAIT
from ..system.machine import machine, versions
from ..system.progress import progress_bar
from . import probing
from .calibrate import calibrate as fit_to_images
from .calibrate import check_images, check_model, write_calibration
from .calibration import interval_for
from .certainty import SHARE, CalibrationPlan, plan_of
from .labels import OF_ARCHITECTURE, align, contradiction, images_for_model, kind_of, labels_of
from .metrics import Forward, Results, classify, evaluate_images, extract_features, forward_in_turn, forward_on_cores
from .mistakes import write_mistakes
from .report import split_in_words
from .results import ImageResults
from .throughput import throughputs

PROBES: dict[str, Callable[..., dict[str, Any]]] = {
    "linear": probing.linear_probe,
    "knn": probing.knn,
    "few-shot": probing.few_shot,
}


@naming_dead_workers()
def evaluate_checkpoint(
    source: str,
    data_source: str | Sequence[str],
    *,
    split: str | None = None,
    image_column: str | None = None,
    label_column: str | Sequence[str] | None = None,
    label_separator: str | None = None,
    batch_size: int | None = None,
    num_workers: int = 0,
    image_size: tuple[int, int] | None = None,
    windows: bool = False,
    precision: str = "auto",
    probes: Sequence[str] = (),
    merged_per_layer: int = 0,
    mistakes: str | Path | None = None,
    head: str | None = None,
    calibrate: bool = False,
    coverage: float | None = None,
    max_error: float | None = None,
    calibration_share: float = SHARE,
) -> dict[str, Any] | None:
    """Evaluate a checkpoint on labelled images, on one process or those of a launcher.

    Args:
        source: A file, a folder or a name on the Hub, of this package or another library.
        data_source: As for `load_data`.
        split: Split to evaluate on. If not given, the usual evaluation split; or else what was held out of the data
            that the model was trained on; or else all images.
        image_column, label_column, label_separator: As for `load_data`.
        batch_size: Batch size per device, chosen for the hardware if not given. It changes metrics by rounding only.
        num_workers: Data loading processes, per process.
        image_size: (height, width) in pixels; if not given, the checkpoint's, or with windows that of each image.
        windows: Whether windows of the model's size slide over the images, for segmentation.
        precision: `"fp32"`, `"bf16"`, `"fp8"`, or `"auto"`: as for `optimize_for_inference`.
        probes: Keys of `PROBES`. They are fitted on the training split, and need no classifier.
        merged_per_layer: Tokens to merge per layer by `merge_tokens`, in a second measurement of accuracy and
            throughput.
        mistakes: CSV file for the wrongly classified images; see `write_mistakes`.
        head: Head of a multi-task model to evaluate.
        calibrate: Whether to fit temperature and thresholds to `calibration_share` of the images, to measure them on
            the others, and to write them into the folder `source`.
        coverage, max_error: Coverage of label sets, and bound on the error of answers that are not unknown. If only
            one is given, the other is not fitted; if neither is, both are, to `COVERAGE` and `MAX_ERROR`.

    Returns:
        All measurements, of plain types; `None` on every process but the first.

    Raises:
        ValueError: If the classes of model and data differ and there are no probes; if there are no images to train
            on or to evaluate; if the model cannot merge tokens or be calibrated.
        ChildProcessError: If a data loading process was killed.
    """
    if unknown := set(probes) - set(PROBES):
        raise ValueError(f"Unknown probe {', '.join(sorted(unknown))}: choose one of {', '.join(PROBES)}.")
    plan = plan_of(calibrate, coverage, max_error, calibration_share)
    precision = inference_precision(precision)
    # Without mixed precision: the model itself is cast.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)])
    has_own_sizes = windows and image_size is None
    batch_size = 1 if has_own_sizes else batch_size or default_batch_size(accelerator.device.type)
    checkpoint = open_checkpoint(source, Options(image_size=None if windows else image_size, head=head))
    warn_of_assumptions(checkpoint)
    _check_head(checkpoint, source, head, probes)
    check_model(source, checkpoint.config, image_size is None, plan)
    columns = {"image_column": image_column, "label_column": label_column, "label_separator": label_separator}
    columns |= {"eval_split": split, "head": head}
    with accelerator.local_main_process_first():  # the others read its cache
        data, classes, note = _load_aligned(checkpoint, source, data_source, needs_train=bool(probes), **columns)
    _check_measurable(classes, note, data, split, probes, merged_per_layer, mistakes, plan)
    model, processor = load(source, checkpoint=checkpoint)
    if windows:
        slide(model, processor, image_size)
    model = _prepared(model.to(accelerator.device), precision, merged_per_layer)
    run = _Run(model, processor, data, classes, accelerator, batch_size, num_workers, has_logits=plan is not None)
    features, results, broken, seconds = run.measure(bool(probes), is_stateless=not merged_per_layer)
    speed, merged = run.speed(merged_per_layer) if merged_per_layer else ({}, {})
    accelerator.end_training()
    if not accelerator.is_main_process:
        return None
    label_names, facts = _names(checkpoint, data, classes), _facts(source, data, broken)
    if mistakes is not None and isinstance(results, ImageResults):
        write_mistakes(Path(mistakes), results, data.evaluation, data.columns, label_names)
    return {
        **facts,
        "image_size": None if has_own_sizes else list(image_size or model.config.image_shape),
        **({"windows": list(model.config.image_shape)} if windows else {}),
        "problem_type": data.problem_type if classes is None else kind_of(checkpoint.config),
        "labels": label_names,
        "note": note,
        "expected": None if data.is_seen else _expected(source, facts["images"]),
        "assumed": checkpoint.assumed,
        **({} if results is None else _by_class(results, label_names)),
        **_calibrated(results, source, checkpoint, data, plan, label_names, head),
        "probes": {name: _probe(name, features, label_names) for name in probes},
        "images_per_second": {"pipeline": facts["images"] / seconds, **speed},
        **merged,
        "precision": precision,
        **run.conditions(),
    }


def _prepared(model: Any, precision: str, merged_per_layer: int) -> Any:
    """Return a model in its precision, optimized unless tokens are to be merged."""
    if not merged_per_layer:
        return optimize_for_inference(model, precision)
    merge_tokens(merge_tokens(model, merged_per_layer), 0)  # fails now instead of after minutes
    return model.to(DTYPES[precision])  # tokens are merged within the layers, which the optimized model does not have


def _calibrated(
    results: Results | None,
    source: str,
    checkpoint: Checkpoint,
    data: ImageData,
    plan: CalibrationPlan | None,
    label_names: list[str],
    head: str | None,
) -> dict[str, Any]:
    """Carry out a planned calibration, and return its result under the key `calibration`."""
    if plan is None or not isinstance(results, ImageResults) or results.logits is None:
        return {}
    found = fit_to_images(results.logits, results.labels, checkpoint.config, plan, label_names)
    write_calibration(Path(source), found, f"{data.name}, {split_in_words(data.eval_split)}", head)
    return {"calibration": found}


def _names(checkpoint: Checkpoint, data: ImageData, classes: list[int] | None) -> list[str]:
    """Return the class names of the results: the model's if it knows the classes of the data, else the data's."""
    return data.label_names if classes is None else labels_of(checkpoint) or data.label_names


def _facts(source: str, data: ImageData, broken: list[str]) -> dict[str, Any]:
    """Return the names of model and data, the split, and the numbers of images."""
    return {
        "model": Path(source).resolve().name if Path(source).exists() else source,
        "data": data.name,
        "split": data.eval_split,
        "images": len(data.evaluation) - len(broken),
        "images_of_data": len(data.evaluation) + (len(data.train) if data.eval_split == HELD_OUT else 0),
        "broken": broken,
    }


def _check_head(checkpoint: Checkpoint, source: str, head: str | None, probes: Sequence[str]) -> None:
    """Raise a `ValueError` if a multi-task model has no one head to evaluate."""
    if checkpoint.architecture != MULTI_TASK or probes:
        return
    heads = checkpoint.config.task_heads or {}
    if head is not None:
        raise ValueError(f"An anomaly head such as {head!r} cannot be evaluated on labels: use hf-vit predict.")
    raise ValueError(f"{source} has several heads: choose one with --head, {' or '.join(heads)}.")


def _load_aligned(
    checkpoint: Checkpoint, source: str, data_source: str | Sequence[str], needs_train: bool, **options: Any
) -> tuple[ImageData, list[int] | None, str]:
    """Return the data, the model's index of each of its classes unless the features alone can be evaluated, a note."""
    kind = kind_of(checkpoint.config) if checkpoint.architecture in (CLASSIFIER, *OF_ARCHITECTURE) else None
    if kind in (MULTI, REGRESSION, *DENSE):  # whole numbers could also be classes
        options["problem_type"] = kind
    data, warning = load_evaluation_data(source, data_source, needs_train=needs_train, **options)
    data, classes, note = align(data, labels_of(checkpoint), needs_all=needs_train)
    if classes is not None and (problem := contradiction(checkpoint.config, data)):
        classes, note = None, problem
    return data, classes, " ".join(filter(None, [*data.notes, note, warning]))


def _check_measurable(
    classes: list[int] | None,
    note: str,
    data: ImageData,
    split: str | None,
    probes: Sequence[str],
    merged: int,
    mistakes: str | Path | None,
    plan: CalibrationPlan | None,
) -> None:
    """Raise `ValueError` if a requested measurement is impossible for this model and data."""
    if classes is None and not probes:
        raise ValueError(f"{note} To evaluate its features alone, add --probe.")
    if classes is None and merged:
        raise ValueError(f"{note} --merge-tokens needs a classifier: remove the option.")
    if merged and data.problem_type in DENSE:
        raise ValueError("--merge-tokens needs a classifier of whole images: remove the option.")
    if mistakes is not None and (classes is None or data.problem_type != SINGLE):
        raise ValueError("--mistakes needs a classifier with one label per image: remove the option.")
    if probes and data.problem_type != SINGLE:
        raise ValueError("Probes need one label per image, which this data does not have: remove --probe.")
    if probes and len(data.train) == len(data.evaluation) and data.train[:1] == data.evaluation[:1]:
        raise ValueError(
            f"Probes are fitted on the training split, so they cannot be evaluated on it: choose another --split than "
            f"{split}, or remove the option."
        )
    if plan is not None:
        check_images(classes, data, plan)


@dataclass
class _Run:
    """A model on its device and its data, with the measurements that need both."""

    model: Any
    processor: Any
    data: ImageData
    classes: list[int] | None
    accelerator: Accelerator
    batch_size: int
    num_workers: int
    has_logits: bool = False

    def loader(self, split: Any) -> Any:
        number = self.model.config.num_labels
        images = images_for_model(self.data, split, self.processor, self.classes, number)
        parts = self.accelerator.num_processes, self.accelerator.process_index
        return evaluation_loader(images, self.batch_size, self.num_workers, *parts)

    def features(self, split: Any) -> tuple[Tensor, Tensor, list[str]]:
        """Return the features, the labels and the names of broken images of a split."""
        to_model, pooled = partial(normalize, processor=self.processor), self.model.base_model.pooler
        forward = self.with_bar(forward_in_turn, split, "Features")
        return extract_features(self.model, self.loader(split), self.accelerator, to_model, pooled, forward)

    def measure(self, has_probes: bool, is_stateless: bool) -> tuple[dict[str, Any], Results | None, list[str], float]:
        """Return features and labels by split for probes, the results of a classifier, broken images, and seconds."""
        features: dict[str, Any] = {}
        results, broken = None, list[str]()
        began = time.perf_counter()
        if has_probes:
            *features["train"], _ = self.features(self.data.train)
            began = time.perf_counter()
            *features["test"], broken = self.features(self.data.evaluation)
        if self.classes is not None:
            began = time.perf_counter()
            results = self.results(is_stateless)
            broken = results.broken
        return features, results, broken, time.perf_counter() - began

    def results(self, is_stateless: bool) -> Results:
        """Return the results on the evaluation split; CPU cores may share a stateless model."""
        is_alone = self.accelerator.num_processes == 1 and not self.num_workers
        is_shared = is_stateless and is_alone and self.accelerator.device.type == "cpu"
        forward: Forward = forward_on_cores if is_shared else forward_in_turn
        to_model = partial(normalize, processor=self.processor)
        split = self.data.evaluation
        forward = self.with_bar(forward, split, "Evaluation")
        arguments = self.model, self.loader(split), self.accelerator, to_model
        if self.has_logits:
            return classify(*arguments, forward, has_logits=True)
        return evaluate_images(*arguments, self.model.config, forward)

    def with_bar(self, forward: Forward, split: Any, what: str) -> Forward:
        """Return a forward that shows a progress bar on the main process."""
        is_shown = self.accelerator.is_main_process
        total = -(-len(split) // self.accelerator.num_processes)

        def forward_with_bar(*arguments: Any) -> Iterator[tuple[Any, Any]]:
            with progress_bar(total, "images", what, disable=None if is_shown else True) as bar:
                for batch, outputs in forward(*arguments):
                    bar.update(int((batch["index"] >= 0).sum()))
                    yield batch, outputs

        return forward_with_bar

    def conditions(self) -> dict[str, Any]:
        """Return the conditions of the measurement."""
        return {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "processes": self.accelerator.num_processes,
            "device": self.accelerator.device.type,
            "hardware": machine(),
            "versions": versions(),
        }

    def speed(self, merged_per_layer: int) -> tuple[dict[str, float], dict[str, Any]]:
        """Return images/s of the model without image decoding, and metrics and images/s with merged tokens."""
        model, config = self.model, self.model.config
        shape = (min(self.batch_size, len(self.data.evaluation)), config.num_channels, *config.image_shape)
        pixel_values = torch.zeros(shape, device=self.accelerator.device)
        merge_tokens(model, merged_per_layer)
        metrics = self.results(is_stateless=False).metrics()
        prepare: dict[int, Callable[[], Any]] = {
            number: partial(merge_tokens, model, number) for number in (0, merged_per_layer)
        }
        speeds = throughputs(prepare, pixel_values, self.accelerator)
        merged = {"figures": metrics, "images_per_second": {"model": median(speeds[merged_per_layer])}}
        return {"model": median(speeds[0])}, {"merged": {"per_layer": merged_per_layer, **merged}}


def _by_class(results: Results, label_names: list[str]) -> dict[str, Any]:
    measured = {"figures": results.metrics(), "per_class": results.per_class(label_names)}
    if isinstance(results, ImageResults):
        # Only non-zero entries of the confusion matrix, since most are zero with many classes.
        measured["confusion"] = [
            {"label": label_names[label], "predicted": label_names[predicted], "count": count}
            for label, predicted, count in results.pairs()
        ]
    return measured


def _expected(source: str, number: int) -> dict[str, Any] | None:
    """Return the interval of a metric that `hf_vit.fit` expects on new images, if it made the model."""
    try:
        metrics = json.loads((Path(source) / "metrics.json").read_text(encoding="utf-8"))
        low, high = interval_for(metrics["expected"], max(1, number))
        return {"metric": metrics["metric"], "low": low, "high": high}
    except (OSError, ValueError, KeyError, TypeError):  # of another library, or of a run
        return None


def _probe(name: str, features: dict[str, Any], label_names: list[str]) -> dict[str, Any]:
    options = {"label_names": label_names} if name == "few-shot" else {}
    began = time.perf_counter()
    return {**PROBES[name](features["train"], features["test"], **options), "seconds": time.perf_counter() - began}
