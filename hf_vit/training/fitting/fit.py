"""`fit`: from images and a number of minutes to the best classifier that they allow."""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from ...checkpoints.checkpoint import Options
from ...checkpoints.models import load, load_classifier
from ...checkpoints.models import logger as models_logger
from ...checkpoints.opening import open_checkpoint
from ...data.audit import Audit, audit, read_contents
from ...data.channels import adapt_processor, channels_of
from ...data.classes import TASK_OF
from ...data.labelled import ImageData, load_data
from ...evaluation.calibration import fit_temperature
from ...evaluation.certainty import CalibrationPlan, fit_certainty
from ...system.locking import alone_in
from ...system.stopping import StopSignals
from ...system.texts import counted, hanging
from ...variants import is_from_scratch
from ..report import next_commands
from ..run import METRICS, save_model
from ..trained import TrainedModel, call_of
from ..views import describe_data
from .calibration import expected_score
from .embedding import Embeddings, Encoder, embed, logits_of, with_bar
from .heads import FittedHead, LinearHead, calm_solvers, fit_head, problem_of, shown
from .race import Candidate, Entrants, Verdict, candidates_for, race
from .report import Report, summary, write_fit
from .state import FIT, FitState, check_fit_folder, stable

REPORT_SECONDS = 10  # reserved for figures and files


def fit(
    data: str | Sequence[str],
    *,
    model: str,
    minutes: float = 10,
    output_dir: str | Path = "my-classifier",
    seed: int = 0,
    image_size: int | tuple[int, int] | None = None,
    train_split: str | None = None,
    eval_split: str | None = None,
    image_column: str | None = None,
    label_column: str | Sequence[str] | None = None,
    label_separator: str | None = None,
    task: str | None = None,
    coverage: float | None = None,
    max_error: float | None = None,
    resume: str = "auto",
    cache: str | Path | None = None,
    command: str | None = None,
    candidates: Sequence[Candidate] | None = None,
    say: Callable[[str], None] = print,
    began: float | None = None,
) -> TrainedModel:
    """Choose and train the best image classifier that a given number of minutes allows.

    Every image passes once through the frozen encoder, and a linear head is fitted to these features. In the time that
    is left, short races show whether fine-tuning is better. The winner is trained on all training images. An
    evaluation split is only measured: nothing is chosen with it.

    Args:
        data: As for `load_data`.
        model: Encoder to start from: a file, a folder or a name on the Hub.
        minutes: Time for everything. With 0, only the linear head is fitted.
        output_dir: Folder to write. An interrupted fit continues there, and a finished one if it gets more minutes.
        seed: Random seed.
        image_size: Pixels, or (height, width); by default that of the checkpoint's image processor.
        train_split, eval_split, image_column, label_column, label_separator: As for `load_data`.
        task: `"classification"`, `"multi_label"` or `"regression"`, if it does not follow from the labels.
        coverage: Share of images whose label set has the true label, as for `hf-vit evaluate --calibrate`; without it,
            the model has no label sets. They are fitted to predictions for held-out images.
        max_error: Largest share of wrong answers, beside which the answer is unknown; without it, the model always
            answers.
        resume: `"auto"`, or `"never"` to discard an earlier fit in `output_dir`.
        cache: Folder of cached features; below that of Hugging Face by default.
        command: The command that repeats this, for the model card.
        candidates: Ways of fine-tuning to try, the most promising first; by default those of `candidates_for`.
        say: Prints a line.
        began: `time.perf_counter()` from which the minutes count; now if not given.

    Raises:
        Interrupted: If SIGINT, SIGTERM or SIGHUP came; the same call continues.
        ValueError: If the data cannot be fitted, or `output_dir` holds something else.
    """
    output_dir, size = Path(output_dir), (image_size,) * 2 if isinstance(image_size, int) else image_size
    options: dict[str, Any] = {"train_split": train_split, "eval_split": eval_split, "image_column": image_column}
    options |= {"label_column": label_column, "label_separator": label_separator}
    options |= {"problem_type": None if task is None else {name: kind for kind, name in TASK_OF.items()}[task]}
    plan = None if coverage is None and max_error is None else CalibrationPlan(coverage, max_error)
    sources = str(data) if isinstance(data, str | Path) else [str(source) for source in data]
    _check_encoder(model)
    check_fit_folder(output_dir, model, sources)
    if resume == "never":
        shutil.rmtree(output_dir / FIT, ignore_errors=True)
    at_once = f": what is finished is saved in {output_dir / FIT} and in the cache of features."
    with alone_in(output_dir, say), StopSignals(at_once):
        certain = {"coverage": coverage, "max_error": max_error}
        identity = stable({"data": sources, "model": model, "image_size": size, "seed": seed, **options, **certain})
        state = FitState(output_dir / FIT, identity, began)
        finished = json.loads((output_dir / METRICS).read_text(encoding="utf-8")) if "finished" in state else None
        if finished is not None and minutes > finished["minutes"]:
            say(f"Continuing the fit in {output_dir}, which was finished with --minutes {finished['minutes']:g}.")
            state.reopen()
        elif finished is not None:
            metrics = finished
            say(
                f"{output_dir} holds the finished result of this command (--minutes {metrics['minutes']:g}).\n"
                "To continue it, give a larger --minutes. To start again, use --resume never. Its result:"
            )
            say("\n".join(hanging("", f"{metrics['why']}.")))
            for line in (*summary(metrics), *next_commands(output_dir)):
                say(line)
            return TrainedModel(output_dir)
        fitting = _Fitting(sources, options, model, size, minutes, seed, state, cache, candidates, plan, say)
        stated = {"data": sources, "model": model, "minutes": minutes, "image_size": size, "seed": seed}
        stated |= {name: value for name, value in certain.items() if value is not None}
        fitting.run(output_dir, command or call_of("fit", stated))
    return TrainedModel(output_dir)


def _check_encoder(model: str) -> None:
    if is_from_scratch(model):
        raise ValueError(
            f"fit starts from a trained encoder, and {model} is a variant without weights: choose a checkpoint, such "
            "as facebook/dinov2-small."
        )


def open_data(source: str | list[str], **options: Any) -> ImageData:
    """Load data for a fit: all images of the training split, and an evaluation split only if the data has one.

    Nothing is held out, since the accuracy comes from cross-validation: the evaluation may be `None`.
    """
    data = load_data(source, holds_out=False, **options)
    if data.is_stream:
        raise ValueError("A stream cannot be fitted, since every image is read several times: save it to disk first.")
    return data


class _Fitting:
    """The steps of one fit, in order."""

    def __init__(
        self,
        sources: Any,
        options: dict[str, Any],
        model: str,
        size: tuple[int, int] | None,
        minutes: float,
        seed: int,
        state: FitState,
        cache: str | Path | None,
        candidates: Sequence[Candidate] | None,
        plan: CalibrationPlan | None,
        say: Callable[[str], None],
    ) -> None:
        self.plan = plan
        self.sources, self.options, self.source, self.size = sources, options, model, size
        self.minutes, self.seed, self.state, self.say, self.candidates = minutes, seed, state, say, candidates
        self.cache = None if cache is None else Path(cache)
        self.folder, self.seconds = state.folder, dict[str, float]()
        self.mark = state.began

    def lap(self, step: str) -> None:
        """Count the time since the last lap for a step, and over interruptions."""
        now = time.perf_counter()
        seconds = dict(self.state.values.get("step_seconds", {}))
        seconds[step] = round(seconds.get(step, 0.0) + now - self.mark, 1)
        self.state.put(step_seconds=seconds)
        self.mark = now

    def left(self) -> float:
        """Return the seconds that are left for the race and the final training."""
        measuring = self.state.values.get("evaluation_seconds", 0.0)
        return 60 * self.minutes - self.state.seconds - REPORT_SECONDS - measuring

    def run(self, output_dir: Path, command: str) -> None:
        """Run all steps, and write the result."""
        self.read()
        embedded = self.embed()
        head = self.fit_head(embedded)
        verdict = self.race(head)
        logits, targets, is_fold = self.held_out(head, verdict)
        temperature = fit_temperature(logits, targets) if self.problem.metric != "r2" else 1.0
        certain = self.fit_thresholds(logits / temperature, targets)
        self.say("Writing the model, its card and its figures.")
        fields = {"temperature": temperature, **certain}
        evaluated = self.train_winner(output_dir, head, verdict, logits, targets, fields, embedded)
        self.lap("final")
        report = Report(
            data=self.data,
            problem=self.problem,
            head=head,
            verdict=verdict,
            expected=self.expected(logits, targets, head, verdict),
            held_out=(logits / temperature, targets, self.rows_of(head, is_fold)),
            evaluated=None if evaluated is None else (evaluated[0] / temperature, *evaluated[1:]),
            fields=fields,
            max_error=None if self.plan is None else self.plan.max_error,
            audit=self.found,
            seconds=dict(self.state["step_seconds"]),
            state=self.state,
            facts={"data": self.sources, "model": self.source, "image_size": list(self.encoder.image_size),
                   "seed": self.seed, "minutes": self.minutes, "precision": self.encoder.precision},
            command=command,
        )  # fmt: skip
        metrics = write_fit(report, output_dir)
        self.state.put(finished=True)
        keeps = {"probe"} if "recipe" in self.state else set()  # what recipe.yaml starts from
        for path in self.folder.iterdir():
            if path.is_dir() and path.name not in keeps:
                shutil.rmtree(path, ignore_errors=True)
        seconds = metrics["seconds"]["total"]
        written = hanging(
            "",
            f"Wrote the model ({verdict.title}), its card (README.md), metrics.json, figures (PNG) and "
            f"mistakes.csv to {output_dir} after {seconds:.0f} s.",
        )
        for line in (*summary(metrics), *written, *next_commands(output_dir)):
            self.say(line)

    def read(self) -> None:
        """Open the data and the encoder."""
        open_checkpoint(self.source, Options(image_size=self.size))  # a wrong name is known before data is read
        data = self.data = open_data(self.sources, **self.options)
        self.problem = problem_of(data.problem_type, len(data.label_names))
        evaluation = "no evaluation split" if data.evaluation is None else f"{len(data.evaluation):,} for evaluation"
        labels = counted(len(data.label_names), "label")
        if self.plan is not None:
            if self.problem.metric != "accuracy":
                raise ValueError("--coverage and --max-error need one label per image: remove them for this data.")
            self.plan.check(len(data.train))
        self.say(f"{data.name}: {len(data.train):,} training images, {evaluation}, {labels}.")
        for line in describe_data(data):
            self.say("\n".join(hanging("", line)))
        self.channels = channels_of(data.train, data.columns)
        self.encoder = Encoder.from_pretrained(self.source, self.size, channels=self.channels)
        self.lap("read")

    def embed(self) -> tuple[Embeddings, Embeddings | None]:
        """Compute all features, report problems of the data, and drop unreadable images."""
        self.say("Computing the features of all images; those in the cache are reused.")
        splits = [self.data.train] + ([] if self.data.evaluation is None else [self.data.evaluation])
        columns = self.data.columns
        results = [
            embed(self.encoder, split, columns, self.cache, with_bar, read_contents(split, columns))
            for split in splits
        ]
        train, evaluation = results[0], results[1] if len(results) > 1 else None
        computed, seconds = sum(part.computed for part in results), sum(part.seconds for part in results)
        if "evaluation_seconds" not in self.state:
            each = seconds / computed if computed else 0.0
            self.state.put(evaluation_seconds=round(each * (len(splits[1]) if evaluation else 0), 1))
        if computed and self.encoder.device.type == "cpu":  # on a GPU, reading takes longer than the forward
            self.state.put(forward_seconds=seconds / computed)
        total = sum(len(part.rows) for part in results)
        cached = total - computed
        some = f" ({cached:,} from the cache)" if cached > 0 else ""
        made = f"Features of {total:,} images computed in {seconds:.0f} s{some}."
        self.say(made if computed else f"Features of {total:,} images loaded from the cache.")
        contents = train.contents, None if evaluation is None else evaluation.contents
        self.found: Audit = audit(self.data, contents)
        for sentence in self.found.sentences():
            self.say(sentence)
        if not train.rows:
            raise ValueError("No training image can be read: check the data.")
        labels = self.data.train[self.data.columns[1]][:]
        self.labels = self.problem.targets([labels[row] for row in train.rows])
        self.digests = [digest for digest in train.contents.digests if digest]
        if len(train.rows) < len(self.data.train):
            readable = self.data.train.select(train.rows)
            self.data = replace(self.data, train=readable, train_length=len(readable))
        self.lap("embed")
        return train, evaluation

    def fit_head(self, embedded: tuple[Embeddings, Embeddings | None]) -> FittedHead:
        """Fit the linear head, or load it."""
        tensors = self.state.tensors("head")
        if tensors is None or "head" not in self.state:
            head = fit_head(embedded[0].features, self.labels, self.problem, self.digests, self.seed)
            self.state.put_tensors(
                "head",
                {"weight": head.head.weight, "bias": head.head.bias, "folds": head.folds, "logits": head.logits},
            )
            values = {name: getattr(head, name) for name in ("pooling", "strength", "score", "loss", "tried")}
            self.state.put(head=values)
        else:
            head = FittedHead(
                LinearHead(tensors["weight"], tensors["bias"]), folds=tensors["folds"], logits=tensors["logits"],
                targets=self.labels, **self.state["head"],
            )  # fmt: skip
        self.features = embedded[0].features[head.pooling]
        score, folds = shown(self.problem.metric, head.score), len(head.folds.unique())
        self.say(
            f"Linear probe: {self.problem.metric} {score} in {folds}-fold cross-validation (pooling {head.pooling})."
        )
        self.lap("probe")
        return head

    def race(self, head: FittedHead) -> Verdict:
        """Race fine-tuning against the probe."""
        if self.minutes == 0:
            verdict = Verdict(
                None, "Fine-tuning was not tried: with 0 minutes, only a linear classifier is fitted", []
            )
        else:
            self.entrants, held_out = self._entrants(), head.folds == 0
            start = partial(self.starting_points, head, held_out)
            candidates = tuple(self.candidates or candidates_for(self.encoder.config.hidden_size))
            verdict = race(self.entrants, start, held_out, head.logits[held_out], self.left, self.say, candidates)
        self.say("\n".join(hanging("", f"{verdict.why}.")))
        self.lap("race")
        return verdict

    def starting_points(self, head: FittedHead, held_out: Tensor) -> Path:
        """Write the models to fine-tune, and return that for the race, whose head does not know the held-out fold."""
        fold = self.folder / "fold"
        if "starting_points" not in self.state:
            with calm_solvers():
                without = self.problem.fit(self.features[~held_out], self.labels[~held_out], head.strength)
            self.write_probe(without, head.pooling, fold)
            self.write_probe(head.head, head.pooling, self.folder / "probe")
            self.state.put(starting_points=True)
        return fold

    def _entrants(self) -> Entrants:
        names = ("train_split", "eval_split", "image_column", "label_column", "label_separator")
        fields = {name: self.options[name] for name in names}
        if self.data.evaluation is None:  # a recipe would hold out images otherwise
            fields["eval_split"] = self.options["train_split"] or "train"
        fields |= {"data": self.sources, "seed": self.seed}
        size = self.encoder.image_size
        return Entrants(self.data, self.labels, self.problem, fields, self.folder, size, self.state, self.minutes)

    def write_probe(self, head: LinearHead, pooling: str, folder: Path) -> None:
        """Write the encoder with a head as a classifier."""
        fields = {**self.problem.fields(self.labels), "pooling": pooling, "representation_size": None}
        fields |= {"num_channels": self.encoder.config.num_channels}
        with quiet_about_the_new_head():
            model, processor = load_classifier(
                self.source, self.data.label_names, image_size=self.encoder.image_size, **fields
            )
        adapt_processor(processor, self.channels, model.config.num_channels)
        scaled = self.problem.in_model(head, self.labels)
        scaled.write_into(model.classifier)
        save_model(model, model.state_dict(), processor, folder)

    def held_out(self, head: FittedHead, verdict: Verdict) -> tuple[Tensor, Tensor, bool]:
        """Return predictions of the winner for images that it was not trained on, and whether they are the fold's."""
        if verdict.winner is None:
            return head.logits, head.targets, False
        assert verdict.logits is not None
        return verdict.logits, head.targets[head.folds == 0], True

    def rows_of(self, head: FittedHead, is_fold: bool) -> Tensor:
        """Return the rows of the training split that have held-out predictions."""
        return (head.folds == 0).nonzero().flatten() if is_fold else torch.arange(len(head.folds))

    def expected(self, logits: Tensor, targets: Tensor, head: FittedHead, verdict: Verdict) -> dict[str, Any]:
        """Return the metric to expect, for the evaluation split if there is one."""
        new = None if self.data.evaluation is None else len(self.data.evaluation)
        source = "cross-validation" if verdict.winner is None else "the held-out fold"
        poolings = len({row["pooling"] for row in head.tried})
        choices = poolings if verdict.winner is None else verdict.finalists
        return {
            **expected_score(self.problem, logits, targets, choices, new, self.seed),
            "source": source,
            "choices": choices,
            "new_images": new,
        }

    def fit_thresholds(self, logits: Tensor, targets: Tensor) -> dict[str, float | None]:
        """Return the thresholds that the plan asks for; say why, if one cannot be fitted."""
        fields: dict[str, float | None] = {}
        for part in [] if self.plan is None else self.plan.parts:
            try:
                found = fit_certainty(logits, targets, part)
            except ValueError as error:
                self.say("\n".join(hanging("", f"One threshold is left out. {error}")))
            else:
                fields |= {name: value for name, value in found.items() if value is not None}
        return fields

    def train_winner(
        self,
        output_dir: Path,
        head: FittedHead,
        verdict: Verdict,
        logits: Tensor,
        targets: Tensor,
        fields: dict[str, Any],
        embedded: tuple[Embeddings, Embeddings | None],
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Train the winner on all images, and write it with `fields` of its config.

        Returns:
            Logits at temperature 1, targets and rows of the evaluation split, if there is one.
        """
        folder = self.folder / "final"
        if verdict.winner is None:
            self.write_probe(head.head, head.pooling, folder)
        elif not verdict.final:
            folder = self.folder / verdict.kept
            trained, total = int((head.folds != 0).sum()), len(self.labels)
            more = math.ceil(verdict.rows[-1]["seconds"] * total / trained / 60)
            sentence = (
                f"No time is left to train on all {total:,} images: the model that was trained on {trained:,} of them "
                f"is kept. Give {counted(more, 'more minute')} to train on all ({self.minutes + more:,g} minutes in "
                "total)."
            )
            self.say("\n".join(hanging("", sentence)))
        else:
            steps = self._final_steps(verdict)
            self.say(f"Training by {verdict.winner.title} on all {len(self.labels):,} images for {steps} steps.")
            rows = torch.arange(len(self.labels))
            run = self.entrants.train(verdict.winner, self.folder / "probe", rows, steps, "final")
            self.state.put(recipe=stable(vars(run.config)))
        model, processor = load(folder)
        evaluated = None
        if (of_split := embedded[1]) is not None and of_split.rows:
            split = self.data.evaluation.select(of_split.rows)
            labels = self.problem.targets(split[self.data.columns[1]][:])
            if verdict.winner is None:
                found = head.head(of_split.features[head.pooling])
            else:
                found = logits_of(model, processor, split, self.data.columns)
            evaluated = (found, labels, torch.tensor(of_split.rows))
        for name, value in fields.items():
            setattr(model.config, name, value)
        if self.problem.metric == "mean_average_precision":
            model.config.thresholds = _thresholds(logits / fields["temperature"], targets)
        save_model(model, model.state_dict(), processor, output_dir)
        return evaluated

    def _final_steps(self, verdict: Verdict) -> int:
        """Return the steps of the final training: as planned, fewer if the race was slower than planned."""
        if "final_steps" not in self.state:
            row = next(row for row in reversed(verdict.rows) if _is(row, verdict.winner))
            affordable = int(0.95 * self.left() * row["steps"] / row["seconds"])
            self.state.put(final_steps=min(verdict.final, max(affordable, verdict.final // 2, 1)))
        return int(self.state["final_steps"])


def _is(row: dict[str, Any], candidate: Candidate | None) -> bool:
    return candidate is not None and (row["method"], row["learning_rate"]) == (
        candidate.trained,
        candidate.learning_rate,
    )


@contextmanager
def quiet_about_the_new_head() -> Iterator[None]:
    """Silence the warnings about a head that is not in the checkpoint: it gets its weights at once."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    models_logger.disabled = True
    try:
        yield
    finally:
        models_logger.disabled = False
        transformers_logging.set_verbosity(level)


def _thresholds(logits: Tensor, targets: Tensor) -> list[float]:
    from ...evaluation.results import LabelResults

    return LabelResults(targets, logits.sigmoid(), torch.zeros_like(logits)).best_thresholds()
