"""What a study is: runs that differ in one thing or two, over seeds; and what may be said of them.

    Cell: one run but for its seed -> Study: the question, its cells, table, picture and findings
    Results: what was measured -> Spread, Difference -> Finding

Seeds are paired: two cells with the same seed begin from the same draw and see images in the same order, so that a
difference is taken within each seed, and its interval is Student's over seeds.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from ..training.recipe import TrainConfig
from ..training.run import Run
from ..training.tasks import build_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Factors = Mapping[str, Any]
CONFIDENCE = 0.95


# ------------------------------------------------------------------------------------------------------- the runs


@dataclass(frozen=True)
class Cell:
    """One run but for its seed.

    Attributes:
        factors: What makes it another run than the others of its study, by name; what JSON can hold.
        config: Its recipe; seed and folder are set for it.
        begins_from: Factors of the cell whose model it begins from, with the same seed.
        build: What makes its model, as `training.train` takes it; a function of a module.
    """

    factors: Factors
    config: TrainConfig
    begins_from: Factors | None = None
    build: Callable[..., Any] = build_model


def with_architecture(config: TrainConfig, **fields: Any) -> TrainConfig:
    """Return a recipe with other fields of the architecture."""
    return replace(config, model_config={**config.model_config, **fields})


def with_share(config: TrainConfig, share: float) -> TrainConfig:
    """Return a recipe that learns from a share of its images, each seen more often: as many steps."""
    return replace(config, train_share=share * config.train_share, train_repeats=config.train_repeats / share)


class Study:
    """A question, the runs that answer it, and how the answer is shown.

    Attributes:
        name: On the command line.
        title: In a few words.
        question: What it asks, and what the paper found; a paragraph.
        source: Where the question is from.
    """

    name: str
    title: str
    question: str
    source: str

    def cells(self, config: TrainConfig) -> Iterable[Cell]:
        """Return the runs of this study around a recipe."""
        raise NotImplementedError

    def measure(self, run: Run) -> dict[str, Any]:
        """Return what is measured of a run that ended, beside what every run measures."""
        return {}

    def table(self, results: "Results") -> list[list[str]]:
        """Return what was measured as rows of a table, the heading first."""
        raise NotImplementedError

    def plot(self, results: "Results") -> "Figure":
        """Draw what was measured."""
        raise NotImplementedError

    def findings(self, results: "Results") -> list["Finding"]:
        """Hold what was measured against what was claimed."""
        raise NotImplementedError


# -------------------------------------------------------------------------------------------------- what came out


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over `number` seeds; of one seed there is no deviation."""

    mean: float
    deviation: float | None
    number: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(fmean(values), stdev(values) if len(values) > 1 else None, len(values))

    def percent(self) -> str:
        """Return a share in percent, with its deviation."""
        deviation = "" if self.deviation is None else f" ± {100 * self.deviation:.1f}"
        return f"{100 * self.mean:.1f}{deviation}"


@dataclass(frozen=True)
class Difference:
    """By how much one figure is more than another, the mean over pairs of the same seed, and its 95 % interval."""

    mean: float
    low: float
    high: float
    number: int

    @classmethod
    def of(cls, pairs: Sequence[tuple[float, float]]) -> "Difference":
        """Return the difference of the first and the second of each pair; of one pair nothing bounds it."""
        differences = [first - second for first, second in pairs]
        mean, number = fmean(differences), len(differences)
        if number < 2:
            return cls(mean, -float("inf"), float("inf"), number)
        from scipy.stats import t  # what scikit-learn stands on

        reach = float(t.ppf((1 + CONFIDENCE) / 2, number - 1)) * stdev(differences) / sqrt(number)
        return cls(mean, mean - reach, mean + reach, number)

    @classmethod
    def by_seed(cls, first: Mapping[int, float], second: Mapping[int, float]) -> "Difference | None":
        """Return the difference of two figures over the seeds that both have; `None` if there is none."""
        seeds = sorted(first.keys() & second.keys())
        return cls.of([(first[seed], second[seed]) for seed in seeds]) if seeds else None

    def points(self) -> str:
        """Return a difference of shares in percentage points, with its interval."""
        if self.number < 2:
            return f"{100 * self.mean:+.1f} points (one seed, so no interval)"
        return f"{100 * self.mean:+.1f} points ({100 * self.low:+.1f} to {100 * self.high:+.1f})"


class Results:
    """The rows of a study, one a run: its `factors`, its `seed`, and the figures that were measured.

    A run whose loss left the finite numbers has `failed`, and no figures.
    """

    def __init__(self, rows: Iterable[dict[str, Any]]) -> None:
        self.rows = list(rows)

    def where(self, **factors: Any) -> "Results":
        """Return the runs whose factors have these values."""
        return Results(row for row in self.rows if all(row["factors"].get(k) == v for k, v in factors.items()))

    def levels(self, factor: str) -> list[Any]:
        """Return the values that a factor has, in the order of the runs that have it."""
        values = [row["factors"][factor] for row in self.rows if factor in row["factors"]]
        return [json.loads(text) for text in dict.fromkeys(json.dumps(value) for value in values)]

    def by_seed(self, figure: str, **factors: Any) -> dict[int, float]:
        """Return a figure of one cell for each of its seeds; those of failed runs are left out."""
        rows = self.where(**factors).rows
        assert len({json.dumps(row["factors"], sort_keys=True) for row in rows}) <= 1, f"{factors} is several cells"
        return {row["seed"]: row[figure] for row in rows if row.get(figure) is not None}

    def spread(self, figure: str = "accuracy", **factors: Any) -> Spread | None:
        """Return a figure of one cell over its seeds; `None` if there is none."""
        values = list(self.by_seed(figure, **factors).values())
        return Spread.of(values) if values else None

    def difference(self, first: Factors, second: Factors, figure: str = "accuracy") -> Difference | None:
        """Return by how much a cell's figure is more than another's; `None` without a seed that both have."""
        return Difference.by_seed(self.by_seed(figure, **first), self.by_seed(figure, **second))


def images_of(results: Results, **factors: Any) -> int | None:
    """Return the number of different images that runs learned from; `None` if all of them failed."""
    return next((row["train_images"] for row in results.where(**factors).rows if not row.get("failed")), None)


def cell_of(spread: Spread | None) -> str:
    """Return a share for a table: percent with deviation, or a dash where there is none."""
    return "–" if spread is None else spread.percent()


# ------------------------------------------------------------------------------------------------ what is said of it


@dataclass(frozen=True)
class Finding:
    """A claim, whether it holds here (`None` if that cannot be told), and the figures that say so."""

    claim: str
    holds: bool | None
    measured: str

    @property
    def verdict(self) -> str:
        return {True: "agrees", False: "does not agree", None: "not told apart"}[self.holds]


def is_more(claim: str, difference: Difference | None, what: str) -> Finding:
    """Judge a claim that one figure is more than another: told apart if the interval leaves out 0."""
    if difference is None:
        return Finding(claim, None, f"{what}: not measured")
    holds = True if difference.low > 0 else False if difference.high < 0 else None
    return Finding(claim, holds, f"{what}: {difference.points()}")


def are_alike(claim: str, differences: Mapping[str, Difference | None], within: float) -> Finding:
    """Judge a claim that figures are alike: all intervals lie within a margin, or one wholly beyond it."""
    known = {what: difference for what, difference in differences.items() if difference is not None}
    are_within = [-within < d.low and d.high < within for d in known.values()]
    are_beyond = [d.low > within or d.high < -within for d in known.values()]
    holds = False if any(are_beyond) else True if known and all(are_within) else None
    measured = "; ".join(f"{what}: {difference.points()}" for what, difference in known.items()) or "not measured"
    margin = f"{100 * within:g} point" + "s" * (within != 0.01)
    return Finding(f"{claim} (within {margin})", holds, measured)
