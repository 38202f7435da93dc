"""`audit`: problems of a data set.

Without a model, files, copies, leaks and spurious cues are checked. With one, its frozen features also tell which
labels are probably wrong and which images are outliers, and the accuracy is stated with and without leaks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoints.checkpoint import CLASSIFIER, Options
from ..checkpoints.models import load
from ..checkpoints.opening import open_checkpoint
from ..data.channels import adapt_processor, channels_of
from ..data.classes import DENSE, MULTI, REGRESSION, SINGLE, TASK_OF, UNKNOWN
from ..data.duplicates import SIDE
from ..data.findings import OUTLIER, WRONG_LABEL, Finding, Images, facts_of, findings_of, label_text, left_out
from ..data.labelled import ImageData, Unlabelled, load_data
from ..data.neighbors import nearest
from ..evaluation.cues import Cue, cues_of
from ..evaluation.intervals import interval_of
from ..evaluation.label_noise import binary_label_noise, far_from_others, label_noise, most_suspicious
from ..evaluation.labels import kind_of, labels_of, match_labels
from ..evaluation.slices import Slice, weak_slices
from ..system.texts import counted
from ..variants import is_from_scratch
from .fitting.embedding import JOINED, Encoder, embed, logits_of, with_bar
from .fitting.heads import FittedHead, SingleLabel, calm_solvers, fit_head, problem_of

NEIGHBORS = 10  # that the distance of an outlier is measured to
LEAST_TO_CHECK = 20  # training images with labels


@dataclass(frozen=True)
class Accuracy:
    """Accuracy on some evaluation images, with its 95 % interval."""

    what: str
    images: int
    value: float
    low: float
    high: float

    @classmethod
    def of(cls, what: str, is_right: Tensor) -> "Accuracy":
        value = is_right.double().mean().item()
        return cls(what, len(is_right), value, *interval_of(value, len(is_right)))


@dataclass
class AuditResult:
    """What an audit found.

    Attributes:
        images: The data and its files.
        findings: One per odd image and reason.
        cues: Results of `cues_of`.
        slices: Results of `weak_slices`, the last one of all images; empty without a classifier.
        sliced: What the slices are errors of.
        accuracies: Accuracy on the evaluation split with all images and without leaks; empty without a split.
        wrong_labels: Expected number of wrong labels, `None` if labels were not checked.
        notes: Sentences on what was not checked, and why.
        left_out: Images that cleaned data leaves out.
    """

    images: Images
    findings: list[Finding]
    cues: list[Cue] = field(default_factory=list)
    slices: list[Slice] = field(default_factory=list)
    sliced: str = ""
    accuracies: list[Accuracy] = field(default_factory=list)
    wrong_labels: float | None = None
    notes: list[str] = field(default_factory=list)
    left_out: set[int] = field(default_factory=set)


def audit(
    data: Any,
    model: str | None = None,
    *,
    image_size: tuple[int, int] | None = None,
    train_split: str | None = None,
    eval_split: str | None = None,
    image_column: str | None = None,
    label_column: str | Sequence[str] | None = None,
    label_separator: str | None = None,
    task: str | None = None,
    cache: str | Path | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> AuditResult:
    """Find problems of a data set: unreadable images, copies, leaks, wrong labels, outliers, cues, weak slices.

    Args:
        data: As for `load_data`.
        model: Encoder or classifier, as for `fit`: a file, a folder or a name on the Hub. Without it, labels and
            outliers are not checked.
        image_size: (height, width) in pixels; by default that of the checkpoint's image processor.
        train_split, eval_split, image_column, label_column, label_separator: As for `load_data`.
        task: `"classification"`, `"multi_label"`, `"regression"`, `"segmentation"` or `"detection"`, if it does not
            follow from the labels.
        cache: Folder of cached features, as for `fit`.
        seed: Seed of the folds of cross-validation.
        say: Prints a line.

    Raises:
        ValueError: If the data or the model cannot be opened, or the data is a stream.
    """
    if model is not None:
        if is_from_scratch(model):
            raise ValueError(
                f"An audit needs a trained encoder, and {model} is a variant without weights: choose a checkpoint, "
                "such as facebook/dinov2-small, or remove --model."
            )
        open_checkpoint(model, Options(image_size=image_size))  # a wrong name is known before data is read
    options = {"train_split": train_split, "eval_split": eval_split, "image_column": image_column}
    options |= {"label_column": label_column, "label_separator": label_separator}  # type: ignore[dict-item]
    found, notes = open_for_audit(data, {name: kind for kind, name in TASK_OF.items()}.get(task or ""), **options)
    evaluation = "no evaluation split" if found.evaluation is None else f"{len(found.evaluation):,} for evaluation"
    say(f"{found.name}: {len(found.train):,} training images, {evaluation}.")
    images = Images.read(found)
    result = AuditResult(images, findings_of(images), notes=[*found.notes, *notes])
    too_small = sum(picture is not None and not picture.is_comparable for picture in images.pictures)
    if too_small:
        result.notes.append(
            f"{counted(too_small, 'image')} of less than {SIDE} pixels not compared with others for near duplicates, "
            "since too little can be seen in them."
        )
    say(f"Checked {counted(len(images.names), 'image')} for unreadable files, copies and leaks.")
    _check_cues(result, seed)
    if model is None:
        result.notes.append(
            "Labels, outliers and weak slices were not checked, since they need the features of a model: add --model."
        )
    else:
        _WithModel(result, model, image_size, None if cache is None else Path(cache), seed, say).check()
    result.left_out = left_out(images, result.findings)
    return result


def open_for_audit(source: Any, problem_type: str | None, **options: Any) -> tuple[ImageData, list[str]]:
    """Load data with labels, or without if it has none; and return notes on what this means for the audit."""
    load_all = partial(load_data, source, holds_out=False, **options)
    notes = []
    try:
        data = load_all(problem_type=problem_type)
    except Unlabelled as error:
        if problem_type is not None or options["label_column"]:
            raise
        data = load_all(needs_labels=False)
        notes = [f"Labels were not checked: {error.short}"]
    if data.is_stream:
        raise ValueError("A stream cannot be audited, since every image is read several times: save it to disk first.")
    return data, notes


def _check_cues(result: AuditResult, seed: int) -> None:
    """Find out whether facts such as the file size reveal the class."""
    images = result.images
    if images.labels is None or images.data.problem_type != SINGLE:
        if images.data.problem_type is not None:
            result.notes.append("Spurious cues were not checked, since the data does not have one label per image.")
        return
    rows = [row for row in range(images.first_evaluation) if images.pictures[row] is not None]
    facts = facts_of([picture for row in rows if (picture := images.pictures[row]) is not None])
    result.cues = cues_of(facts, torch.tensor([images.labels[row] for row in rows], dtype=torch.int64), seed)


class _WithModel:
    """The checks of an audit that need features, in order."""

    def __init__(
        self,
        result: AuditResult,
        source: str,
        image_size: tuple[int, int] | None,
        cache: Path | None,
        seed: int,
        say: Callable[[str], None],
    ) -> None:
        self.result, self.source, self.image_size, self.cache, self.seed = result, source, image_size, cache, seed
        self.say, self.images, self.data = say, result.images, result.images.data

    def check(self) -> None:
        """Compute features, and run the checks that need them."""
        data, images = self.data, self.images
        self.channels = channels_of(data.train, data.columns)
        encoder = Encoder.from_pretrained(self.source, self.image_size, channels=self.channels)
        embedded = [
            embed(encoder, split, data.columns, self.cache, with_bar, part)
            for split, part in zip(images.splits, images.parts, strict=True)
        ]
        self.rows = [each.rows for each in embedded]
        self.poolings = [each.features for each in embedded]
        computed, seconds = sum(each.computed for each in embedded), sum(each.seconds for each in embedded)
        self.say(f"Features of {sum(map(len, self.rows)):,} images: {computed:,} computed in {seconds:.0f} s.")
        pooling = JOINED if JOINED in encoder.poolings else encoder.poolings[0]
        if (head := self._head()) is not None:
            pooling = head.pooling
            self._check_labels(head)
        self._check_outliers(pooling)
        self._check_classifier(head)

    def numbers(self, part: int) -> list[int]:
        """Return the numbers of the images of a split that have features."""
        first = self.images.first_evaluation * part
        return [first + row for row in self.rows[part]]

    def targets(self, part: int) -> Tensor:
        """Return the labels of the images of a split that have features."""
        assert self.images.labels is not None
        return self.problem.targets([self.images.labels[image] for image in self.numbers(part)])

    def _head(self) -> FittedHead | None:
        """Return a linear classifier that was cross-validated on the training split, or `None` without labels."""
        data = self.data
        if self.images.labels is None:
            if data.problem_type in DENSE:
                self.result.notes.append("Labels were not checked, since masks and boxes are not labels of images.")
            return None
        numbers = self.numbers(0)
        if len(numbers) < LEAST_TO_CHECK:
            self.result.notes.append(
                f"Labels were not checked: expected at least {LEAST_TO_CHECK} readable training images, got "
                f"{len(numbers)}."
            )
            return None
        self.problem: SingleLabel = problem_of(data.problem_type, len(data.label_names))
        targets = self.targets(0)
        if data.problem_type == SINGLE and len(targets.unique()) < 2:
            self.result.notes.append("Labels were not checked, since all training images have the same one.")
            return None
        digests = [str(self.images.digests[image]) for image in numbers]
        head = fit_head(self.poolings[0], targets, self.problem, digests, self.seed)
        if data.problem_type == SINGLE and (left := self._unsuspected(head)) is not None:
            logits = self._out_of_fold(head, left)
            head = replace(head, logits=logits)
        return head

    def _unsuspected(self, head: FittedHead) -> Tensor | None:
        """Return which training images have labels that are probably right, `None` if all of them do."""
        self.first_noise = label_noise(head.logits, head.targets)
        is_right = self.first_noise.probability < 0.5
        return None if bool(is_right.all()) else is_right

    def _out_of_fold(self, head: FittedHead, is_right: Tensor) -> Tensor:
        """Return predictions for every training image by classifiers that were fitted without wrong labels."""
        features, logits = self.poolings[0][head.pooling], head.logits.clone()
        with calm_solvers():
            for fold in head.folds.unique():
                held_out = head.folds == fold
                chosen = ~held_out & is_right
                fitted = self.problem.fit(features[chosen], head.targets[chosen], head.strength)
                logits[held_out] = fitted(features[held_out])
        return logits

    def _check_labels(self, head: FittedHead) -> None:
        """Compare labels with predictions of classifiers that were not trained on the image."""
        expected = 0.0
        for part in range(len(self.rows)):
            if not self.rows[part]:
                continue
            targets = head.targets if part == 0 else self.targets(part)
            logits = head.logits if part == 0 else head.head(self.poolings[part][head.pooling])
            check = {MULTI: self._several, REGRESSION: self._numbers}.get(str(self.data.problem_type), self._single)
            expected += check(part, logits, targets)
        self.result.wrong_labels = None if self.data.problem_type == REGRESSION else expected

    def _single(self, part: int, logits: Tensor, targets: Tensor) -> float:
        if logits.shape[1] < 2:
            return 0.0
        probability = label_noise(logits, targets, self.first_noise if part == 0 else None).probability
        numbers, names = self.numbers(part), self.data.label_names
        others = logits.scatter(1, targets[:, None], -torch.inf).argmax(dim=1)
        for row in most_suspicious(probability).tolist():
            suggestion = names[int(others[row])]
            reason = f"looks like {suggestion}"
            self._add(WRONG_LABEL, numbers[row], probability[row].item(), reason, suggestion)
        return probability.sum().item()

    def _several(self, part: int, logits: Tensor, targets: Tensor) -> float:
        probability = binary_label_noise(logits, targets, UNKNOWN)
        numbers, names = self.numbers(part), self.data.label_names
        for position in most_suspicious(probability.flatten()).tolist():
            row, label = divmod(position, len(names))
            right = targets[row].tolist()
            is_given = right[label] == 1
            right[label] = 1 - right[label]
            reason = f"{'does not look' if is_given else 'looks'} like {names[label]}"
            suggestion = label_text(right, self.data)
            self._add(WRONG_LABEL, numbers[row], probability[row, label].item(), reason, suggestion)
        return probability.sum().item()

    def _numbers(self, part: int, values: Tensor, targets: Tensor) -> float:
        """Add numbers that are far from the predicted ones; the score is relative to the largest error."""
        errors = self.problem.errors(values, targets).sqrt()
        numbers = self.numbers(part)
        for row in far_from_others(errors).tolist():
            suggestion = label_text(values[row].tolist(), self.data)
            score = (errors[row] / errors.max()).item()
            self._add(WRONG_LABEL, numbers[row], score, f"predicted as {suggestion}", suggestion)
        return 0.0

    def _add(self, kind: str, image: int, score: float, reason: str, suggestion: str = "") -> None:
        self.result.findings.append(Finding(kind, image, score, reason, None, suggestion))

    def _check_outliers(self, pooling: str) -> None:
        """Find images that are far from their nearest neighbors among the training images."""
        bank = self.poolings[0][pooling]
        if len(bank) <= NEIGHBORS:
            return
        mean = bank.mean(dim=0)
        of_training = F.normalize(bank - mean, dim=-1)
        numbers, distances = [], []
        for part in range(len(self.rows)):
            if not self.rows[part]:
                continue
            queries = F.normalize(self.poolings[part][pooling] - mean, dim=-1)
            similarity, _ = nearest(queries, of_training, NEIGHBORS + (part == 0))
            distances.append(1 - similarity[:, part == 0 :].mean(dim=1))
            numbers += self.numbers(part)
        values = torch.cat(distances)
        for position in far_from_others(values).tolist():
            score = values[position].item() / 2
            self._add(OUTLIER, numbers[position], score, f"distance {values[position]:.2f} to its nearest neighbors")

    def _check_classifier(self, head: FittedHead | None) -> None:
        """State accuracies on the evaluation split, and find weak slices: of the model if it is such a classifier."""
        if head is None or self.data.problem_type != SINGLE:
            return
        has_evaluation = len(self.rows) > 1 and bool(self.rows[1])
        logits = self._logits_of_model() if has_evaluation else None
        if has_evaluation:
            self._state_accuracies("a linear classifier", head.head(self.poolings[1][head.pooling]))
        if logits is not None:
            self._state_accuracies("the model", logits)
        part = 1 if logits is not None else 0
        predicted = (head.logits if logits is None else logits).argmax(dim=1)
        name = Path(self.source).name if Path(self.source).exists() else self.source
        who = f"a linear classifier on features of {name}, in cross-validation on the training split"
        self.result.sliced = who if logits is None else f"the model on the {self.data.eval_split} split"
        pictures = [picture for image in self.numbers(part) if (picture := self.images.pictures[image]) is not None]
        weak, everything = weak_slices(predicted, self.targets(part), self.data.label_names, pictures)
        self.result.slices = [*weak, everything]

    def _state_accuracies(self, who: str, logits: Tensor) -> None:
        is_right = logits.argmax(dim=1) == self.targets(1)
        leaks = {each.image for each in self.result.findings if "leak" in each.kind}
        is_clean = torch.tensor([image not in leaks for image in self.numbers(1)])
        self.result.accuracies.append(Accuracy.of(f"{who}, all images", is_right))
        if leaks and bool(is_clean.any()):
            self.result.accuracies.append(Accuracy.of(f"{who}, without leaks", is_right[is_clean]))

    def _logits_of_model(self) -> Tensor | None:
        """Return logits of the model's own classifier in the classes of the data, `None` if it has others."""
        checkpoint = open_checkpoint(self.source, Options(image_size=self.image_size))
        if checkpoint.architecture != CLASSIFIER or kind_of(checkpoint.config) != SINGLE:
            return None
        classes, note = match_labels(labels_of(checkpoint), self.data.label_names)
        if classes is None or None in classes:
            self.result.notes.append(f"The classifier of the model was not checked. {note}")
            return None
        model, processor = load(self.source, self.image_size, checkpoint)
        adapt_processor(processor, self.channels, model.config.num_channels)
        split = self.data.evaluation.select(self.rows[1])
        return logits_of(model, processor, split, self.data.columns)[:, classes]
