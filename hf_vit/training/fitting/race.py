"""Decide whether fine-tuning pays: candidates race from the fitted head, and the better ones get more steps.

Each candidate starts from a model whose head is fitted already, so that the first steps do not distort the features
(LP-FT: Kumar et al. 2022, arXiv:2202.10054). It trains on four of the five folds and is judged on the fifth. All
candidates get a few steps, the better ones three times as many (successive halving: Jamieson and Talwalkar 2016,
arXiv:1502.07943). The numbers of steps follow from the measured throughput, once, and are saved. If there is no time
to train the winner again on all images, the model of the race is the result.
"""

import contextlib
import io
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

from torch import Tensor

from ...checkpoints.models import load
from ...data.labelled import ImageData
from ...system.texts import counted, hanging
from ..defaults import WIDTH_OF_RATE
from ..loop import remaining_steps, train
from ..recipe import TrainConfig
from ..run import Run
from .embedding import logits_of
from .heads import SingleLabel, shown
from .state import FitState

SIGNIFICANT = 0.05  # probability of a difference by chance
GROWTH = 3  # how many times more steps the finalists get
FINALISTS = 2
SHARE = 0.9  # of the time that is left is planned; the rest is for the report and for other users of the machine
# A race ends without a result if it exceeds the time that was left for all training by this share.
OVERTIME = 0.25
# A candidate trains at least for 2 epochs, if these are 10 to 40 steps: fewer say little about it.
LEAST_EPOCHS, FEWEST_STEPS, LEAST_STEPS = 2, 10, 40
LEAST_WARMUP = 5  # steps, or a third of all
MOST_EPOCHS = 20  # of the final training
REHEARSED_STEPS = 3
LEAST_SECONDS = 10  # left, to measure the speed of training
# Time of a step in forwards that compute features. Measured on 2 CPU cores, ViT-S/14, 224 pixels, batches of 16.
STEP_IN_FORWARDS = 4
SECONDS_BETWEEN_SAVES = 60  # what a kill loses; other signals save first


METHODS = {"all": "full fine-tuning", "lora": "LoRA", "head": "the head alone"}  # of what is trained


@dataclass(frozen=True)
class Candidate:
    """A way to fine-tune."""

    trained: str
    learning_rate: float

    @property
    def name(self) -> str:
        """A name for files and metrics, such as `"all 1e-04"`."""
        return f"{self.trained} {self.learning_rate:.0e}"

    @property
    def title(self) -> str:
        """A name for sentences, such as `"full fine-tuning (learning rate 1e-04)"`."""
        return f"{METHODS[self.trained]} (learning rate {self.learning_rate:.0e})"


def candidates_for(width: int) -> tuple[Candidate, ...]:
    """Return the ways to fine-tune a model of a width, the most promising first: with little time, only these race.

    The learning rates are those of width 384 (ViT-S) and fall with the width, as those of the recipe `finetune` do.
    """
    scale = WIDTH_OF_RATE / width
    return tuple(
        Candidate(trained, float(f"{rate * scale:.1g}"))
        for trained, rate in (("all", 3e-4), ("all", 1e-4), ("lora", 3e-3), ("lora", 1e-3), ("all", 3e-5))
    )


@dataclass
class Entrants:
    """What all fine-tunings of a fit share.

    Attributes:
        data: All readable training images.
        labels: Their labels, from `problem.targets`.
        problem: Kind of labels.
        fields: Fields of every recipe.
        folder: Folder of temporary runs.
        image_size: (height, width) in pixels.
        state: Finished steps.
        minutes: Time of the whole fit.
    """

    data: ImageData
    labels: Tensor
    problem: SingleLabel
    fields: dict[str, Any]
    folder: Path
    image_size: tuple[int, int]
    state: FitState
    minutes: float

    def batch_size(self, images: int) -> int:
        """Return the batch size: small for few images, so that an epoch has several steps."""
        return max(1, min(32 if images >= 256 else 16, images))

    def steps_per_epoch(self, images: int) -> int:
        """Return the number of steps of an epoch."""
        return max(1, images // self.batch_size(images))

    def recipe(self, candidate: Candidate, start: Path, images: int, steps: int, output_dir: Path) -> TrainConfig:
        """Return the recipe of a candidate, which starts from the model in `start`."""
        fields = {**self.fields, "task": self.problem.task, "trained": candidate.trained}
        speed = self.state.values.get("speed") or {}
        return TrainConfig(
            **fields,
            model=str(start),
            image_size=list(self.image_size),
            shorter_side=round(1.3 * max(self.image_size)),
            auto=["cache", "num_workers", "accumulation_steps"],
            augmentation="crop_flip",
            smallest_crop=0.5,
            label_smoothing=0.1 if self.problem.task == "classification" else 0.0,
            max_steps=steps,
            batch_size=self.batch_size(images),
            learning_rate=candidate.learning_rate,
            layer_decay=0.75 if candidate.trained == "all" else 1.0,
            warmup_steps=max(steps // 10, min(LEAST_WARMUP, steps // 3)),
            eval_every=1e6,
            save_every=max(1, round(SECONDS_BETWEEN_SAVES * speed.get("steps_per_second", steps))),
            keep_checkpoints=1,
            output_dir=str(output_dir),
        )

    def train(
        self,
        candidate: Candidate,
        start: Path,
        rows: Tensor,
        steps: int,
        name: str,
        taken: Callable[[Run], Iterable[int]] = remaining_steps,
    ) -> Run:
        """Train a candidate on some images, or resume that; returns the finished run in `folder/name`.

        `taken` gives the steps, as for `training.loop.train`.
        """
        output_dir = self.folder / name
        split = self.data.train.select(rows.tolist())
        # The loop evaluates once; the fold is evaluated afterwards, on every core.
        data = replace(self.data, train=split, evaluation=split.select([0]), train_length=len(rows))
        config = self.recipe(candidate, start, len(rows), steps, output_dir)
        with contextlib.redirect_stdout(io.StringIO()):  # the recipe, which a run prints
            return train(config, data=data, steps=taken)


@dataclass(frozen=True)
class Budget:
    """How many candidates race with how many steps.

    Attributes:
        candidates: Number of candidates.
        steps: Number of steps of each rung.
        final: Number of steps on all images; with 0, the model of the race is kept.
    """

    candidates: int
    steps: tuple[int, ...]
    final: int


def plan(
    seconds: float,
    steps_per_second: float,
    overhead: float,
    epoch: int,
    share: float,
    candidates: int,
    minutes: float = 0.0,
) -> Budget | str:
    """Return the largest race that fits, with the final training; or a sentence that says why none does.

    Args:
        seconds: Time that is left.
        steps_per_second: Measured speed of full fine-tuning.
        overhead: Seconds of a run apart from its steps.
        epoch: Number of steps of an epoch of the four folds.
        share: Number of all training images divided by that of the four folds.
        candidates: Number of candidates that are worth racing.
        minutes: Time of the whole fit.
    """
    least = _fewest_steps(epoch)
    most = max(least, MOST_EPOCHS * epoch)
    left = SHARE * seconds
    for number, rungs, finals in ((candidates, 2, 1), (min(2, candidates), 1, 1), (1, 1, 1), (1, 1, 0)):
        runs = number + (FINALISTS if rungs == 2 else 0) + finals
        growth = GROWTH if rungs == 2 else 1
        # In units of the steps of the first rung.
        units = number + (FINALISTS * growth if rungs == 2 else 0) + growth * share * finals
        steps = int((left - runs * overhead) * steps_per_second / units)
        if number <= FINALISTS and rungs == 2:
            continue
        if steps >= least:
            first = min(steps, max(least, most // growth))
            race = tuple(first * growth**rung for rung in range(rungs))
            return Budget(number, race, finals * max(1, round(race[-1] * share)))
    return _too_few_steps(least, 1 / steps_per_second / SHARE, overhead / SHARE, seconds, minutes)


def _too_few_steps(least: int, step_seconds: float, overhead: float, left: float, minutes: float) -> str:
    """Return a sentence that says why fine-tuning is not tried, and how many minutes it needs."""
    needed, left = least * step_seconds + overhead, max(0.0, left)
    more = max(1, math.ceil((needed - left) / 60))
    return (
        f"its {least} steps would take about {needed:.0f} s, and {left:.0f} s are left. "
        f"Give {counted(more, 'more minute')} to try it ({minutes + more:,g} minutes in total)"
    )


def _fewest_steps(epoch: int) -> int:
    return min(LEAST_STEPS, max(FEWEST_STEPS, LEAST_EPOCHS * epoch))


class _TimeIsOver(Exception):
    """A race has taken longer than it may."""


@dataclass
class Verdict:
    """The result of a race.

    Attributes:
        winner: The candidate to train on everything, or `None` for the probe.
        why: The reason in a sentence.
        rows: One row per run: `method`, `learning_rate`, `steps`, `epochs`, `score`, `loss`, `seconds`.
        logits: Predictions of the best fine-tuned candidate for the held-out fold, if there is one.
        final: Number of steps for the final training; with 0, the model of the race is kept, in the folder `kept`.
        finalists: Number of methods from which the winner was chosen.
    """

    winner: Candidate | None
    why: str
    rows: list[dict[str, Any]]
    logits: Tensor | None = None
    final: int = 0
    finalists: int = 1
    kept: str = ""

    @property
    def title(self) -> str:
        """What the winner is, for users."""
        return "linear probe" if self.winner is None else self.winner.title


def race(
    entrants: Entrants,
    start: Callable[[], Path],
    held_out: Tensor,
    probe_logits: Tensor,
    seconds: Callable[[], float],
    say: Callable[[str], None],
    candidates: tuple[Candidate, ...],
) -> Verdict:
    """Race candidates for the seconds that are left, and compare the best with the probe.

    Args:
        entrants: What they share.
        start: Returns the folder of a model whose head was fitted without the held-out fold.
        held_out: Which images are held out, `[N]`.
        probe_logits: The probe's predictions for these.
        seconds: Returns the seconds that are left, for the race and the final training.
        say: Prints a line.
        candidates: The candidates, the most promising first.
    """
    state, problem = entrants.state, entrants.problem
    trained, rows = (~held_out).nonzero().flatten(), held_out.nonzero().flatten()
    targets = entrants.labels[held_out]
    if "budget" not in state:
        state.put(budget=_budget(entrants, start, trained, rows, seconds, candidates, say))
    if "why" in state["budget"]:
        return Verdict(None, f"Fine-tuning was not tried: {state['budget']['why']}", [])
    saved: dict[str, Any] = state["budget"]
    budget = Budget(saved["candidates"], tuple(saved["steps"]), saved["final"])
    latest = -OVERTIME * saved.get("seconds", 0.0)

    def in_time(run: Run) -> Iterator[int]:
        for step in remaining_steps(run):
            if seconds() < latest:
                raise _TimeIsOver
            yield step

    racing = candidates[: budget.candidates]
    if len(racing) == 1 and budget.steps[0] < LEAST_STEPS:
        # 160 flowers, ViT-S/14, 16 to 19 steps: 3e-4 has 56 % where the probe has 84 %, and 1e-4 has 84 % (one seed).
        racing = candidates[1:2] or racing
    say("\n".join(hanging("", _description(racing, budget, entrants.batch_size(len(trained)) / len(trained)))))
    table: list[dict[str, Any]] = []
    for rung, steps in enumerate(budget.steps):
        keeps = budget.final == 0
        try:
            results = [
                _run(entrants, candidate, start(), trained, rows, steps, _name(candidate, rung), keeps, in_time, say)
                for candidate in racing
            ]
        except _TimeIsOver:
            why = "Fine-tuning was stopped when its time was over, since training became slower than measured"
            return Verdict(None, why, table)
        table += results
        ranked = sorted(zip(racing, results, strict=True), key=lambda pair: (-pair[1]["score"], pair[1]["loss"]))
        racing = tuple(candidate for candidate, _ in ranked[:FINALISTS])
    best = ranked[0][0]
    name = _name(best, len(budget.steps) - 1)
    tensors = state.tensors(name)
    assert tensors is not None
    is_better, why = beats(problem, tensors["logits"], probe_logits, targets, is_final=budget.final == 0)
    score = shown(problem.metric, problem.score(tensors["logits"], targets))
    why = f"On the held-out fold, {best.title} scores {score}; {why}"
    winner = best if is_better else None
    return Verdict(winner, why, table, tensors["logits"], budget.final, len(results) + 1, name)


def _description(racing: Sequence[Candidate], budget: Budget, epochs: float) -> str:
    """Return a sentence about the runs of a race; a step is `epochs` epochs."""
    titles, steps = ", ".join(candidate.title for candidate in racing), budget.steps
    each = " each" if len(racing) > 1 else ""
    then = f", then {steps[1]} steps for the best {FINALISTS}" if len(steps) > 1 else ""
    return f"Trying {titles}: {steps[0]} steps{each} ({steps[0] * epochs:.1f} epochs){then}."


def _budget(
    entrants: Entrants,
    start: Callable[[], Path],
    trained: Tensor,
    rows: Tensor,
    seconds: Callable[[], float],
    candidates: tuple[Candidate, ...],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Measure the speed of training unless it is known, and return the plan as plain values."""
    epoch = entrants.steps_per_epoch(len(trained))
    speed: dict[str, float] = entrants.state.values.get("speed") or {}
    if not speed:
        forward = entrants.state.values.get("forward_seconds", 0.0)
        least, step = _fewest_steps(epoch), STEP_IN_FORWARDS * forward * entrants.batch_size(len(trained))
        if step and least * step > SHARE * seconds():
            return {"why": _too_few_steps(least, step / SHARE, 0.0, seconds(), entrants.minutes)}
        if seconds() < LEAST_SECONDS:
            left = f"only {max(0.0, seconds()):.0f} s of {entrants.minutes:g} min are left"
            return {"why": f"{left}. Give more minutes to try it"}
        speed = _speed(entrants, start, trained, rows, seconds, candidates[0], epoch, say)
        entrants.state.put(speed=speed)
    share = len(entrants.labels) / len(trained)
    rate, overhead = speed["steps_per_second"], speed["overhead"]
    found = plan(seconds(), rate, overhead, epoch, share, len(candidates), entrants.minutes)
    return {"why": found} if isinstance(found, str) else {**asdict(found), "seconds": seconds()}


def _speed(
    entrants: Entrants,
    start: Callable[[], Path],
    trained: Tensor,
    rows: Tensor,
    seconds: Callable[[], float],
    candidate: Candidate,
    epoch: int,
    say: Callable[[str], None],
) -> dict[str, float]:
    """Measure steps per second, and the seconds of a run apart from its steps; in fewer steps if none will fit."""
    say(f"Measuring the speed of training: up to {REHEARSED_STEPS} steps.")
    longest = SHARE * seconds() / _fewest_steps(epoch)
    marks: list[float] = []

    def marked(run: Run) -> Iterator[int]:
        for step in remaining_steps(run):
            marks.append(time.perf_counter())
            # The first step also allocates memory.
            if len(marks) > 1 and marks[-1] - marks[-2] > longest * (2 if len(marks) == 2 else 1):
                raise _TimeIsOver
            yield step
        marks.append(time.perf_counter())

    began = time.perf_counter()
    with contextlib.suppress(_TimeIsOver):
        entrants.train(candidate, start(), trained, REHEARSED_STEPS, "rehearsal", marked)
    wall = time.perf_counter() - began
    # The first step allocates memory, and the last one evaluates and saves, so neither shows the speed.
    second = min(2, len(marks) - 1)
    step_seconds = max(1e-6, marks[second] - marks[second - 1])
    steps_per_second, training = 1 / step_seconds, (len(marks) - 1) * step_seconds
    shutil.rmtree(entrants.folder / "rehearsal", ignore_errors=True)
    # A forward is about a third of a step.
    batches = len(rows) / entrants.batch_size(len(trained))
    overhead = max(0.0, wall - training) + batches / steps_per_second / 3
    return {"steps_per_second": steps_per_second, "overhead": overhead}


def _name(candidate: Candidate, rung: int) -> str:
    return f"rung{rung}-{candidate.name.replace(' ', '-')}"


def _run(
    entrants: Entrants,
    candidate: Candidate,
    start: Path,
    trained: Tensor,
    rows: Tensor,
    steps: int,
    name: str,
    keeps: bool,
    taken: Callable[[Run], Iterable[int]],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Train a candidate, or return its saved result."""
    if name in entrants.state:
        return entrants.state[name]
    began = time.perf_counter()
    entrants.train(candidate, start, trained, steps, name, taken)
    model, processor = load(entrants.folder / name)
    logits = logits_of(model, processor, entrants.data.train.select(rows.tolist()), entrants.data.columns)
    targets, problem = entrants.labels[rows], entrants.problem
    entrants.state.put_tensors(name, {"logits": logits})
    row = {
        "method": candidate.trained,
        "learning_rate": candidate.learning_rate,
        "steps": steps,
        "epochs": round(steps * entrants.batch_size(len(trained)) / len(trained), 2),
        "score": problem.score(logits, targets),
        "loss": problem.loss(logits, targets),
        "seconds": round(time.perf_counter() - began, 1),
    }
    entrants.state.put(**{name: row})
    if not keeps:
        shutil.rmtree(entrants.folder / name, ignore_errors=True)
    score = shown(problem.metric, problem.score(logits, targets))
    say(f"  {candidate.title}: {steps} steps, {problem.metric} {score}, {row['seconds']:.0f} s")
    return row


def beats(
    problem: SingleLabel, logits: Tensor, probe_logits: Tensor, targets: Tensor, is_final: bool = False
) -> tuple[bool, str]:
    """Return whether predictions score better than the probe's, and a comparison.

    The better score decides, since both models cost the same to use. If the model `is_final`, it was trained on fewer
    images than the probe, so its difference must be significant. How likely a difference is by chance is stated: among
    the images on which only one of both is right (for several labels or numbers: the one with the smaller
    error), each would win half if both were equally good. That is a sign test, here McNemar's, with the mid-p value.
    """
    gains = problem.errors(probe_logits, targets) - problem.errors(logits, targets)
    wins, losses = int((gains > 0).sum()), int((gains < 0).sum())
    probability = _chance_of(wins, wins + losses)
    score, of_probe = problem.score(logits, targets), problem.score(probe_logits, targets)
    is_better = score > of_probe and (probability < SIGNIFICANT or not is_final)
    counts = f"{counted(wins, 'image')} better and {losses} worse after fine-tuning"
    significance = f"the difference is {'' if probability < SIGNIFICANT else 'not '}significant, p = {probability:.2g}"
    verdict = "so the probe is kept"
    if is_better:
        verdict = f"so fine-tuning is chosen ({significance})"
    elif score > of_probe:
        verdict += f", which is trained on all images ({significance})"
    return is_better, f"the probe scores {shown(problem.metric, of_probe)}, {counts}, {verdict}"


def _chance_of(wins: int, total: int) -> float:
    """Return the mid-p probability of at least `wins` heads among `total` tosses of a coin."""
    if total == 0:
        return 1.0
    if total > 1000:
        return 1 - NormalDist(total / 2, math.sqrt(total) / 2).cdf(wins)
    of = [math.comb(total, heads) / 2**total for heads in range(wins, total + 1)]
    return sum(of) - of[0] / 2
