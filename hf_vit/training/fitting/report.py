"""What a fit leaves: metrics, figures, recipe and model card."""

import json
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from ...data.audit import Audit
from ...data.labelled import RECIPE, ImageData
from ...evaluation.calibrate import HEADING, card_section
from ...evaluation.certainty import measure_certainty
from ...evaluation.metrics import Results, results_of
from ...hub.card import write_card
from ...inspection.drawing import save
from ...model.configuration_hf_vit import HFViTConfig
from ...model.image_processing_hf_vit import HFViTImageProcessor
from ...model.validation_hf_vit import OF_CERTAINTY
from ...system.machine import machine
from ...system.texts import code, counted, markdown
from ..recipe import TrainConfig
from ..report import base_model_of, fenced_command, for_others, license_of_base, public_command, public_paths
from ..run import METRICS
from ..views import VIEWS
from .heads import FittedHead, SingleLabel, shown
from .race import METHODS, Verdict
from .state import FitState

WIDE = 0.2  # an interval that says more than the metric
TITLES = {"accuracy": "Accuracy", "mean_average_precision": "Mean average precision", "r2": "R²"}


@dataclass
class Report:
    """Everything that the result of a fit says.

    Attributes:
        data, problem: The data, and the kind of its labels.
        head, verdict: The linear probe, and the result of the race.
        expected: Result of `expected_score`, with `source`, `choices` and `new_images`.
        held_out, evaluated: Calibrated logits, targets and rows of the training and the evaluation split.
        fields: Fields of the config that were fitted to held-out predictions: `temperature`, and thresholds.
        max_error: What the threshold of abstention was fitted for.
        audit: What is odd in the data.
        seconds: Time of each step.
        state: Plain values of the fit.
        facts: Arguments that are shown.
        command: What repeats the fit.
    """

    data: ImageData
    problem: SingleLabel
    head: FittedHead
    verdict: Verdict
    expected: dict[str, Any]
    held_out: tuple[Tensor, Tensor, Tensor]
    evaluated: tuple[Tensor, Tensor, Tensor] | None
    fields: dict[str, Any]
    max_error: float | None
    audit: Audit
    seconds: dict[str, float]
    state: FitState
    facts: dict[str, Any]
    command: str

    @property
    def method(self) -> str:
        """The name of the winner."""
        return "probe" if self.verdict.winner is None else self.verdict.winner.name

    @cached_property
    def certainty(self) -> dict[str, Any] | None:
        """The thresholds as `evaluation.calibrate` returns them, measured on the evaluation split; `None` without."""
        fields = {**dict.fromkeys(OF_CERTAINTY), **self.fields}
        if all(fields[name] is None for name in OF_CERTAINTY):
            return None
        images, measured = len(self.held_out[1]), None
        if self.evaluated is not None:
            logits, targets, _ = self.evaluated
            measured = measure_certainty(logits, targets, fields, images, self.data.label_names)
        return {"fields": fields, "images": images, "max_error": self.max_error, "measured": measured}

    @property
    def trained_images(self) -> int:
        """The number of images that the model was trained on."""
        folds = self.head.folds
        is_kept = self.verdict.winner is not None and not self.verdict.final
        return int((folds != 0).sum()) if is_kept else len(folds)


def results_for(config: HFViTConfig, logits: Tensor, targets: Tensor, rows: Tensor, broken: list[str]) -> Results:
    """Return the results per image of predictions for the rows of a split."""
    return replace(results_of(logits, targets, config), broken=broken, index=rows)


def write_fit(report: Report, output_dir: Path) -> dict[str, Any]:
    """Write metrics, figures, recipe and card next to the model; returns the metrics."""
    unreadable = report.audit.unreadable
    config = HFViTConfig.from_pretrained(output_dir)
    held_out = results_for(config, *report.held_out, unreadable["training"])
    measured = None
    if report.evaluated is not None:
        measured = results_for(config, *report.evaluated, unreadable["evaluation"])
    metrics = _metrics(report, held_out, measured)
    (output_dir / METRICS).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    if "recipe" in report.state:
        recipe = TrainConfig(**{**report.state["recipe"], "output_dir": f"{output_dir.resolve().name}-again"})
        recipe = replace(recipe, model=str(Path(output_dir.name) / "fit" / "probe"), auto=[])
        (output_dir / RECIPE).write_text(for_others(recipe).to_yaml(), encoding="utf-8")
    else:
        (output_dir / RECIPE).unlink(missing_ok=True)
    finished = _finished(report, held_out if measured is None else measured, measured is None, output_dir)
    view = VIEWS[report.data.problem_type]
    figures = view.figures(finished, output_dir.resolve().name)
    for name, figure in figures.items():
        save(figure, output_dir / name)
    view.write_tables(finished)
    title, split = output_dir.resolve().name, report.data.eval_split
    results = {report.problem.metric: metrics["eval_" + report.problem.metric]} if measured is not None else {}
    write_card(
        output_dir,
        title=title,
        description=_description(report, metrics),
        results=results,
        measured={
            "command": code(public_command(report.command)),
            "hardware": f"{machine()}, {report.facts['precision']}",
            "time": f"{metrics['seconds']['total']:,.0f} s",
            "seeds": str(report.facts["seed"]),
        },
        dataset=report.data.name,
        split=split or "held-out training images",
        sections=_sections(report, metrics, finished),
        images=list(figures),
        license=license_of_base(report.facts["model"]),
        base_model=base_model_of(TrainConfig(model=report.facts["model"])),
    )
    return metrics


def _metrics(report: Report, held_out: Any, measured: Any) -> dict[str, Any]:
    verdict, head = report.verdict, report.head
    model = report.facts["model"]
    public_model = Path(model).name if Path(model).exists() else model
    return {
        "method": report.method,
        "fitted_to": public_paths(report.facts["data"]),
        "metric": report.problem.metric,
        "expected": report.expected,
        **({} if measured is None else {f"eval_{name}": value for name, value in measured.metrics().items()}),
        "eval_split": report.data.eval_split,
        "held_out": held_out.metrics(),
        "probe": {
            "score": head.score,
            "loss": head.loss,
            "pooling": head.pooling,
            "strength": head.strength,
            "folds": len(head.folds.unique()),
            "tried": head.tried,
        },
        "race": verdict.rows,
        "why": verdict.why,
        "temperature": report.fields["temperature"],
        **({"certainty": report.certainty} if report.certainty is not None else {}),
        "train_images": report.trained_images,
        "audit": asdict(report.audit),
        **{**report.facts, "data": public_paths(report.facts["data"]), "model": public_model},
        "seconds": {**report.seconds, "total": round(report.state.seconds, 1)},
    }


def _expectation(metrics: dict[str, Any]) -> str:
    """Return the expected metric in a sentence, which states a wide interval before the metric itself."""
    metric, expected = metrics["metric"], metrics["expected"]
    score, low, high = (shown(metric, expected[name]) for name in ("score", "low", "high"))
    number = expected["new_images"]
    kind = f"prediction interval for {counted(number, 'image')}" if number else "confidence interval"
    what = f"{TITLES[metric]} to expect on new images of the same kind"
    if expected["high"] - expected["low"] > WIDE:
        images = counted(expected["images"], "held-out image")
        return f"{what}: {low} to {high}\n(95% {kind}; {score} on {images}, from {expected['source']})."
    return f"{what}: {score}\n(95% {kind}: {low} to {high}, from {expected['source']})."


def summary(metrics: dict[str, Any]) -> list[str]:
    """Return the result of a fit in a few lines."""
    metric = metrics["metric"]
    lines = [_expectation(metrics)]
    if f"eval_{metric}" in metrics:
        measured, low, high = metrics[f"eval_{metric}"], metrics["expected"]["low"], metrics["expected"]["high"]
        where = "within" if low <= measured <= high else "outside"
        lines.append(
            f"{TITLES[metric]} measured on {metrics['eval_count']:,} evaluation images ({metrics['eval_split']}): "
            f"{shown(metric, measured)},\n{where} this interval."
        )
    return [*lines, *_balanced(metrics)]


def _balanced(metrics: dict[str, Any]) -> list[str]:
    """Return a line on the balanced accuracy if it differs from the accuracy."""
    measured = {name.removeprefix("eval_"): value for name, value in metrics.items()}
    found = measured if "balanced_accuracy" in measured else metrics.get("held_out", {})
    if "balanced_accuracy" not in found or abs(found["balanced_accuracy"] - found["accuracy"]) < 0.02:
        return []
    return [
        "The classes have different numbers of images: the balanced accuracy (the\nmean over classes) is "
        f"{found['balanced_accuracy']:.1%}."
    ]


def _description(report: Report, metrics: dict[str, Any]) -> str:
    encoder, data = code(str(metrics["model"])), code(report.data.name)
    images = f"{metrics['train_images']:,} images"
    if report.verdict.winner is None:
        return (
            f"A linear classifier on the features of {encoder}, which is frozen. It was fitted to {images} of {data}."
        )
    return f"{encoder}, fine-tuned on {images} of {data}."


@dataclass
class Finished:
    """The results and images that a report shows; a `Run` has the same attributes."""

    data: ImageData
    processor: Any
    predictions: Results
    output_dir: Path
    measured_on: str
    thresholds_from: str = "held-out training images"


def _finished(report: Report, results: Results, is_held_out: bool, output_dir: Path) -> Finished:
    data = replace(report.data, evaluation=report.data.train) if is_held_out else report.data
    processor = HFViTImageProcessor.from_pretrained(output_dir)
    what = "held-out training images" if is_held_out else "evaluation images"
    return Finished(data, processor, results, output_dir, what)


def _sections(report: Report, metrics: dict[str, Any], finished: Finished) -> dict[str, str]:
    height, width = report.facts["image_size"]
    view = VIEWS[report.data.problem_type]
    limitations = [
        f"It was fitted to images of {code(report.data.name)} at {height}x{width} pixels. Expect other metrics on "
        "other images.",
        *view.limitations(finished),
    ]
    odd = [*report.data.notes, *report.audit.sentences()]
    sections = {
        "Expected metrics": _expected_section(report, metrics),
        "What was tried": _tried_section(report),
        **view.sections(finished),
        **({} if report.certainty is None else {HEADING: card_section(report.certainty, "held-out training images")}),
        "Data": "\n".join(f"- {markdown(line)}" for line in odd) or "No problems were found.",
        "Training": _training_section(report),
        "Limitations": "\n".join(f"- {line}" for line in limitations),
    }
    return sections


def _expected_section(report: Report, metrics: dict[str, Any]) -> str:
    choices = report.expected["choices"]
    how = {
        "accuracy": "The interval is Wilson's score interval over images that the model was not trained on",
    }.get(metrics["metric"], "The interval is from a bootstrap over images that the model was not trained on")
    chosen = "poolings" if report.verdict.winner is None else "methods"
    widened = f" It allows for the choice of the best of {choices} {chosen} on the same images." if choices > 1 else ""
    lines = [_expectation(metrics), f"{how}.{widened}"]
    if f"eval_{metrics['metric']}" in metrics:
        lines.append(
            f"Measured on the evaluation split, which was used for nothing else: "
            f"{shown(metrics['metric'], metrics['eval_' + metrics['metric']])}."
        )
    if report.problem.metric != "r2":
        lines.append(
            "The scores are calibrated: logits are divided by a temperature of "
            f"{report.fields['temperature']:.3f}, which was fitted to the same images."
        )
    if report.trained_images < len(report.head.folds):
        lines.append(
            f"No time was left to train on all {len(report.head.folds):,} images: the model has seen "
            f"{report.trained_images:,} of them."
        )
    return "\n\n".join(lines)


def _tried_section(report: Report) -> str:
    head, metric = report.head, report.problem.metric
    folds = len(head.folds.unique())
    parts = [f"{markdown(report.verdict.why)}.".replace("..", ".")]
    if report.verdict.rows:
        fold = head.folds == 0
        number = counted(int(fold.sum()), "image")
        reliable = f" The {metric} above is from cross-validation over all images, which is more reliable."
        probe = report.problem.score(head.logits[fold], head.targets[fold])
        methods = [
            f"| method | learning rate | steps | epochs | {metric} on the held-out fold | seconds |",
            "|---|---|---|---|---|---|",
            f"| linear probe ({head.pooling}) | | | | {shown(metric, probe)} | |",
        ]
        for row in report.verdict.rows:
            methods.append(
                f"| {METHODS[row['method']]} | {row['learning_rate']:g} | {row['steps']} | {row['epochs']} | "
                f"{shown(metric, row['score'])} | {row['seconds']:.0f} |"
            )
        parts += [
            "\n".join(methods),
            f"The held-out fold is one of {folds} parts of the training images, {number}. Use these numbers to "
            f"compare the methods.{reliable if report.verdict.winner is None else ''}",
        ]
    best_first = sorted(head.tried, key=lambda row: -row["score"])
    settings = [f"| pooling | C | {metric} |", "|---|---|---|"]
    settings += [f"| {row['pooling']} | {row['strength']:.2g} | {shown(metric, row['score'])} |" for row in best_first]
    parts += [
        f"Settings of the linear probe, in {folds}-fold cross-validation (C: inverse strength of the regularization):",
        "\n".join(settings),
    ]
    return "\n\n".join(parts)


def _training_section(report: Report) -> str:
    text = f"{fenced_command(report.command)}\n\nThe same command resumes an interrupted fit."
    if public_command(report.command) != report.command:
        text += " Local paths are shortened to their last parts."
    if "recipe" in report.state:
        text += (
            " `recipe.yaml` contains the final training, which starts from the linear probe in `fit/probe`: run "
            "`hf-vit train --recipe recipe.yaml` with its `data` and `model` set to your paths."
        )
    return text
