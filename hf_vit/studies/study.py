"""The parts of a study: runs that differ in one or two factors, repeated over seeds, and the claims they decide.

    Cell: one run without its seed -> Study: the question, its cells, table, figure and findings
    Results: what was measured -> Spread, Difference -> Finding

Seeds are paired: two cells with the same seed start from the same random draw and see the images in the same order.
A difference is therefore computed within each seed, and its interval is Student's t over seeds.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from math import inf, sqrt
from operator import sub
from statistics import fmean, stdev
from typing import Any

from ..inspection.drawing import Figure
from ..training.recipe import TrainConfig
from ..training.run import Run
from ..training.tasks import build_model
from .catalogue import CATALOGUE

Factors = Mapping[str, Any]
BySeed = Mapping[int, float]
CONFIDENCE = 0.95


# ------------------------------------------------------------------------------------------------------- the runs


@dataclass(frozen=True)
class Cell:
    """One run without its seed.

    Attributes:
        factors: The values, by name, that distinguish it from the other cells of its study; JSON types only.
        config: Its recipe; the seed and the folder are set when it runs.
        begins_from: Factors of the cell whose trained model, of the same seed, it starts from.
        build: Builds its model, as in `training.train`; a function of a module, so that it can be pickled.
    """

    factors: Factors
    config: TrainConfig
    begins_from: Factors | None = None
    build: Callable[..., Any] = build_model


def with_architecture(config: TrainConfig, **fields: Any) -> TrainConfig:
    """Return a recipe with other fields of the architecture."""
    return replace(config, model_config={**config.model_config, **fields})


def with_share(config: TrainConfig, share: float) -> TrainConfig:
    """Return a recipe that trains on a share of its images, repeated so that the number of steps stays the same."""
    return replace(config, train_share=share * config.train_share, train_repeats=config.train_repeats / share)


class Study:
    """A question, the runs that answer it, and how the results are shown.

    Attributes:
        name: Key in `CATALOGUE`, from which title and source are read.
        question: One paragraph: the question, what the paper found, and what is run here.
    """

    name: str = ""
    title: str
    source: str
    question: str

    def __init_subclass__(cls) -> None:
        if cls.name in CATALOGUE:
            cls.title, cls.source, _ = CATALOGUE[cls.name]

    def cells(self, config: TrainConfig) -> Iterable[Cell]:
        """Return the cells of this study around a recipe."""
        raise NotImplementedError

    def measure(self, run: Run) -> dict[str, Any]:
        """Return the measurements of a finished run that only this study takes."""
        return {}

    def table(self, results: "Results") -> list[list[str]]:
        """Return the measurements as rows of a table, heading first."""
        raise NotImplementedError

    def plot(self, results: "Results") -> Figure:
        """Draw the measurements."""
        raise NotImplementedError

    def findings(self, results: "Results") -> list["Finding"]:
        """Compare the measurements with the paper's claims."""
        raise NotImplementedError


# ---------------------------------------------------------------------------------------------------- the results


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over `number` seeds; one seed has no deviation."""

    mean: float
    deviation: float | None
    number: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread | None":
        """Return the spread of values, or `None` if there are none."""
        values = list(values)
        return cls(fmean(values), stdev(values) if len(values) > 1 else None, len(values)) if values else None

    def percent(self) -> str:
        """Return a share in percent, with its deviation."""
        deviation = "" if self.deviation is None else f" ± {100 * self.deviation:.1f}"
        return f"{100 * self.mean:.1f}{deviation}"


@dataclass(frozen=True)
class Difference:
    """The mean difference of two paired measurements, and its 95 % confidence interval."""

    mean: float
    low: float
    high: float
    number: int

    @classmethod
    def of(cls, pairs: Iterable[tuple[float, float]]) -> "Difference":
        """Return the first minus the second of each pair; the interval of one pair is unbounded."""
        differences = [first - second for first, second in pairs]
        mean, number = fmean(differences), len(differences)
        if number < 2:
            return cls(mean, -inf, inf, number)
        from scipy.stats import t  # a requirement of scikit-learn

        reach = float(t.ppf((1 + CONFIDENCE) / 2, number - 1)) * stdev(differences) / sqrt(number)
        return cls(mean, mean - reach, mean + reach, number)

    @classmethod
    def by_seed(cls, first: BySeed, second: BySeed) -> "Difference | None":
        """Return the first minus the second over the seeds that both have; `None` if they share none."""
        differences = over_seeds(sub, first, second)
        return cls.of((difference, 0.0) for difference in differences.values()) if differences else None

    def points(self) -> str:
        """Return a difference of shares in percentage points, with its interval."""
        if self.number < 2:
            return f"{100 * self.mean:+.1f} points (one seed, no interval)"
        return f"{100 * self.mean:+.1f} points ({100 * self.low:+.1f} to {100 * self.high:+.1f})"


def over_seeds(function: Callable[..., float], *by_seed: BySeed) -> dict[int, float]:
    """Apply a function to several measurements, for each seed that all of them have."""
    seeds = set.intersection(*map(set, by_seed))
    return {seed: function(*(values[seed] for values in by_seed)) for seed in sorted(seeds)}


class Results:
    """The rows of a study, one per run: its `factors`, its `seed` and its measurements.

    A run whose loss was not finite has `failed` set, and no measurements.
    """

    def __init__(self, rows: Iterable[dict[str, Any]]) -> None:
        self.rows = list(rows)

    def where(self, **factors: Any) -> "Results":
        """Return the runs whose factors have these values."""
        return Results(row for row in self.rows if all(row["factors"].get(k) == v for k, v in factors.items()))

    def levels(self, factor: str) -> list[Any]:
        """Return the different values of a factor, in the order of the runs."""
        return list(dict.fromkeys(row["factors"][factor] for row in self.rows if factor in row["factors"]))

    def by_seed(self, figure: str, **factors: Any) -> dict[int, Any]:
        """Return a measurement of one cell for each seed, without failed runs."""
        rows = self.where(**factors).rows
        assert len({json.dumps(row["factors"], sort_keys=True) for row in rows}) <= 1, f"{factors} is several cells"
        return {row["seed"]: row[figure] for row in rows if row.get(figure) is not None}

    def spread(self, figure: str = "accuracy", **factors: Any) -> Spread | None:
        """Return the spread of a measurement of one cell over its seeds; `None` if there is none."""
        return Spread.of(self.by_seed(figure, **factors).values())

    def difference(self, first: Factors, second: Factors, figure: str = "accuracy") -> Difference | None:
        """Return the first cell's measurement minus the second's; `None` if they share no seed."""
        return Difference.by_seed(self.by_seed(figure, **first), self.by_seed(figure, **second))

    def train_images(self, **factors: Any) -> int | None:
        """Return the number of distinct training images of some runs; `None` if all of them failed."""
        return next((row["train_images"] for row in self.where(**factors).rows if not row.get("failed")), None)


# --------------------------------------------------------------------------------------------------- the findings


@dataclass(frozen=True)
class Finding:
    """A claim, whether it holds here (`None` if the results do not decide), and the measurements that decide it."""

    claim: str
    holds: bool | None
    measured: str
    undecided: str = "no significant difference"

    @property
    def verdict(self) -> str:
        return {True: "agrees", False: "does not agree", None: self.undecided}[self.holds]


def is_more(claim: str, difference: Difference | None, what: str) -> Finding:
    """Judge a claim that a difference is positive: it is decided if the interval excludes 0."""
    if difference is None:
        return Finding(claim, None, f"{what}: not measured")
    holds = True if difference.low > 0 else False if difference.high < 0 else None
    return Finding(claim, holds, f"{what}: {difference.points()}")


def all_are_more(claim: str, differences: Mapping[str, Difference | None]) -> Finding:
    """Judge a claim that all differences are positive; one that is negative refutes it."""
    parts = [is_more(claim, difference, what) for what, difference in differences.items()]
    verdicts = [part.holds for part in parts]
    holds = False if False in verdicts else None if None in verdicts else True
    return Finding(claim, holds, "; ".join(part.measured for part in parts))


def are_alike(claim: str, differences: Mapping[str, Difference | None], within: float) -> Finding:
    """Judge a claim that differences are small: all intervals lie within a margin; one that lies beyond refutes it."""
    known = {what: difference for what, difference in differences.items() if difference is not None}
    are_within = [-within < d.low and d.high < within for d in known.values()]
    are_beyond = [d.low > within or d.high < -within for d in known.values()]
    holds = False if any(are_beyond) else True if known and all(are_within) else None
    measured = "; ".join(f"{what}: {difference.points()}" for what, difference in known.items()) or "not measured"
    margin = f"{100 * within:g} point" + "s" * (within != 0.01)
    return Finding(f"{claim} (within {margin})", holds, measured, "inconclusive")
