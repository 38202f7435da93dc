"""Studies of how a ViT is built and sized: what reads the class, what is scaled, how large its images are."""

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import log2
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_studies import TINY, row

from hf_vit import HFViTForImageClassification
from hf_vit.studies import SIZES
from hf_vit.studies.figures import ACCURACY
from hf_vit.studies.page import write_page
from hf_vit.studies.pooling import DOUBLINGS, Pooling, best_rate, cell, peak_of
from hf_vit.studies.resolution import KEPT, NEW, RESAMPLED, SCRATCH, Resolution, scratch, spent, tuned
from hf_vit.studies.running import PlannedRun, key_of
from hf_vit.studies.scaling import BASE, DIMENSIONS, Scaling, explained, front_of, scaled, slopes_of
from hf_vit.studies.study import Results, Study
from hf_vit.training.recipe import TrainConfig
from hf_vit.training.tasks import Classification, architecture_of, build_model

STUDIES = [Pooling(), Scaling(), Resolution()]
# Digits of 8 pixels and patches of 2, what a study varies at its quick and its full size, and photos for a variant.
RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "digits": lambda: TrainConfig.from_recipe(SIZES["quick"], **TINY),
    "quick": lambda: TrainConfig.from_recipe(SIZES["quick"]),
    "full": lambda: TrainConfig.from_recipe(SIZES["full"]),
    "photos": lambda: TrainConfig.from_recipe(SIZES["full"], model="ViT-Ti/16", image_size=[224, 160]),
}
QUICK = RECIPES["quick"]()
STEP = "Step 3: the loss is not finite."


def work_of(config: TrainConfig) -> float:
    """Return about the FLOPs of a model's training."""
    built = architecture_of(config)
    tokens, width = built.grid_size[0] * built.grid_size[1], built.hidden_size
    of_a_token = 4 * width**2 + 2 * width * built.intermediate_size + 2 * tokens * width
    return 6.0 * 5_000 * config.epochs * tokens * built.num_hidden_layers * of_a_token


def rows_of(
    study: Study, accuracy: Callable[[Mapping[str, Any], float], float], seeds: int = 3, noise: float = 0.002
) -> list[dict[str, Any]]:
    """Return rows of all cells, as accurate as `accuracy` says of factors and compute, with some noise."""
    rows = []
    for seed in range(seeds):
        draw = random.Random(seed)
        for of_study in study.cells(QUICK):
            work = work_of(of_study.config)
            level = accuracy(of_study.factors, work) + draw.uniform(-noise, noise)
            parameters = sum(of_study.config.model_config[name] for name in ("hidden_size", "intermediate_size"))
            figures = {"training_flops": work, "seconds": work / 1e14, "parameters": parameters}
            curve = [[epoch, level * (1 - 0.5**epoch), 1.0] for epoch in (1, 2, 3)]
            rows.append({**row(seed, level, **of_study.factors), **figures, "curve": curve})
    return rows


def failed(item: dict[str, Any]) -> dict[str, Any]:
    return row(item["seed"], failed=STEP, **item["factors"])


def verdicts(study: Study, rows: list[dict[str, Any]]) -> list[str]:
    return [finding.verdict for finding in study.findings(Results(rows))]


# ------------------------------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_cells_can_be_built(study: Study, recipe: str) -> None:
    cells = list(study.cells(RECIPES[recipe]()))
    keys = [key_of(of_study.factors, 0) for of_study in cells]
    assert len(set(keys)) == len(keys)
    assert all(of_study.begins_from is None or key_of(of_study.begins_from, 0) in keys for of_study in cells)
    shapes = set()
    for of_study in cells:
        task: Any = SimpleNamespace(fields={"num_labels": 10}, model_class=Classification.model_class)
        with torch.device("meta"):
            model, processor = build_model(of_study.config, task)
        shapes.add(str([parameter.shape for parameter in model.parameters()]))
        assert model.config.image_shape == (processor.size["height"], processor.size["width"])
    assert len(shapes) > 1


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_page_of_a_study(study: Study, tmp_path: Path) -> None:
    results = Results(rows_of(study, lambda factors, work: 0.5))
    page = write_page(study, results, tmp_path).read_text()
    assert study.question in page and all(finding.claim in page for finding in study.findings(results))
    assert (tmp_path / "picture.png").stat().st_size > 5000
    drawn = study.plot(results)
    assert all(axis.get_xlabel() and axis.get_title() for axis in drawn.axes)
    assert drawn.axes[0].get_ylabel() == ACCURACY


# Of all runs: one seed, half of them, those of them that did not fail, or none at all.
PARTS: dict[str, Callable[[list[dict[str, Any]]], list[dict[str, Any]]]] = {
    "one seed": lambda rows: [item for item in rows if item["seed"] == 0],
    "every other": lambda rows: rows[::2],
    "some failed": lambda rows: [failed(item) if index % 3 == 0 else item for index, item in enumerate(rows)],
    "all failed": lambda rows: [failed(item) for item in rows],
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_what_is_there_is_shown(study: Study, part: str, tmp_path: Path) -> None:
    rows = rows_of(study, lambda factors, work: 0.5)
    results = Results(PARTS[part](rows))
    study.plot(results).savefig(tmp_path / "picture.svg")
    assert (tmp_path / "picture.svg").stat().st_size > 5000
    whole, table = study.table(Results(rows)), study.table(results)
    assert (len(table), {len(line) for line in table}) == (len(whole), {len(whole[0])})
    holds = {finding.holds for finding in study.findings(results)}
    assert part != "all failed" or holds == {None}


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_noise_is_seldom_told_apart(study: Study) -> None:
    rows, draw, number = rows_of(study, lambda factors, work: 0.5), random.Random(0), 40
    told_apart = [0] * len(study.findings(Results(rows)))
    for _ in range(number):
        for item in rows:
            item["accuracy"] = draw.gauss(0.5, 0.05)
        for index, finding in enumerate(study.findings(Results(rows))):
            told_apart[index] += finding.holds is not None
    assert max(told_apart) <= 0.15 * number  # intervals of 95 %, up to three of them a claim


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_one_seed_tells_nothing_apart(study: Study) -> None:
    rows = rows_of(study, lambda factors, work: 0.5, seeds=1)
    assert {finding.holds for finding in study.findings(Results(rows))} == {None}


# --------------------------------------------------------------------------------------- class token or mean pooling


def pooled(cls: float, mean: float, higher: float = 0.0, noise: float = 0.002) -> list[dict[str, Any]]:
    """Return rows where each pooling is best at so many doublings of the learning rate, mean pooling by `higher`."""
    best = {"cls": cls, "mean": mean}

    def accuracy(factors: Mapping[str, Any], work: float) -> float:
        doublings = log2(factors["learning_rate"] / QUICK.learning_rate) - best[factors["pooling"]]
        return 0.6 + higher * (factors["pooling"] == "mean") - 0.03 * doublings**2

    return rows_of(Pooling(), accuracy, noise=noise)


@pytest.mark.parametrize("peak", [1.0, 1.3, 2.49, 3.0])
def test_peak_of_a_parabola_is_found(peak: float) -> None:
    assert peak_of([0.7 - (place - peak) ** 2 for place in range(6)]) == pytest.approx(peak)


def test_peak_where_a_neighbour_is_missing() -> None:
    assert peak_of([0.1, 0.3, 0.5]) == 2.0 and peak_of([0.5, 0.3]) == 0.0
    assert peak_of([0.1, 0.4, 0.5, None]) == 2.0 and peak_of([None, 0.4, 0.3]) == 1.0
    assert peak_of([0.5, 0.5, 0.5]) == 0.0


@pytest.mark.parametrize(
    ("cls", "mean", "higher", "expected"),
    [
        (1.0, -1.0, 0.0, ["agrees", "agrees", "agrees"]),
        (-1.0, 1.0, 0.0, ["agrees", "does not agree", "agrees"]),
        (0.0, 0.0, 0.1, ["does not agree", "no significant difference", "does not agree"]),
        (3.0, -1.0, 0.0, ["agrees", "inconclusive", "agrees"]),  # the sweep ends where the class token is best
    ],
)
def test_poolings_and_their_rates(cls: float, mean: float, higher: float, expected: list[str]) -> None:
    rows = pooled(cls, mean, higher)
    assert verdicts(Pooling(), rows) == expected
    assert best_rate(Results(rows), "cls") == QUICK.learning_rate * 2**cls


def test_doublings_between_the_best_rates() -> None:
    findings = Pooling().findings(Results(pooled(1.2, -0.7, noise=0.0)))
    assert findings[1].measured == "class token minus mean pooling: +1.9 doublings (+1.9 to +1.9)"
    ends = Pooling().findings(Results(pooled(3.0, -1.0)))[1].measured
    assert ends.endswith("3 of 6 best rates are at or beyond an end of the range")


def test_a_rate_at_which_runs_fail_is_not_the_best_one() -> None:
    """Mean pooling fails from its best rate on, for a seed of three."""
    rows = pooled(1.0, 1.0)
    base = QUICK.learning_rate
    fails = [
        item["seed"] == 1 and item["factors"]["pooling"] == "mean" and item["factors"]["learning_rate"] >= 2 * base
        for item in rows
    ]
    rows = [failed(item) if fails_here else item for item, fails_here in zip(rows, fails, strict=True)]
    assert best_rate(Results(rows), "mean") == base and best_rate(Results(rows), "cls") == 2 * base
    finding = Pooling().findings(Results(rows))[2]
    assert finding.verdict == "agrees" and finding.measured == "1 runs of mean pooling failed at that rate"
    table = {line[0]: line[1:] for line in Pooling().table(Results(rows))}
    assert table["0.004"][0].endswith("(best)") and table["0.002"][1].endswith("(best)")
    assert table["0.004"][1].endswith("(1 failed)") and "failed" not in "".join(table["0.002"])
    crosses = [line for line in Pooling().plot(Results(rows)).axes[0].lines if line.get_marker() == "x"]
    assert [list(line.get_xdata()) for line in crosses] == [[], [2 * base, 4 * base, 8 * base]]


def test_every_rate_is_tried_for_both() -> None:
    cells = {key_of(of_study.factors, 0): of_study.config for of_study in Pooling().cells(QUICK)}
    assert len(cells) == 2 * len(DOUBLINGS)
    config = cells[key_of(cell("mean", QUICK.learning_rate / 4), 0)]
    assert config.learning_rate == 0.0005 and config.model_config["pooling"] == "mean"
    assert not architecture_of(config).use_cls_token


# -------------------------------------------------------------------------------------------------------- scaling


def scaled_rows(gains: Mapping[str, float], noise: float = 0.002) -> list[dict[str, Any]]:
    """Return rows where a doubling of compute gains so much in each dimension."""
    base = work_of(QUICK)

    def accuracy(factors: Mapping[str, Any], work: float) -> float:
        return 0.5 + gains.get(factors["dimension"], 0.0) * log2(work / base)

    return rows_of(Scaling(), accuracy, noise=noise)


AS_IN_THE_PAPER = {"depth": 0.06, "width": 0.01, "MLP": 0.03, "patch": 0.04}


def test_gains_are_those_that_were_put_in() -> None:
    results = Results(scaled_rows(AS_IN_THE_PAPER, noise=0.0))
    for dimension, gain in AS_IN_THE_PAPER.items():
        assert list(slopes_of(results, dimension).values()) == pytest.approx([gain] * 3)
    assert slopes_of(results, BASE) == {}
    equal = Results(scaled_rows(dict.fromkeys(DIMENSIONS, 0.03), noise=0.0))
    assert list(explained(equal, "training_flops").values()) == pytest.approx([1.0] * 3)
    assert max(explained(equal, "parameters").values()) < 0.9


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        (AS_IN_THE_PAPER, ["agrees"] * 4),
        ({**AS_IN_THE_PAPER, "depth": 0.03}, ["does not agree", "agrees", "agrees", "agrees"]),
        ({**AS_IN_THE_PAPER, "MLP": 0.06}, ["no significant difference", "agrees", "agrees", "agrees"]),
        (
            {"depth": 0.01, "width": 0.06, "MLP": 0.05, "patch": -0.03},
            ["does not agree", "does not agree", "does not agree", "does not agree"],
        ),
    ],
)
def test_dimensions_are_told_apart(gains: dict[str, float], expected: list[str]) -> None:
    assert verdicts(Scaling(), scaled_rows(gains)) == expected


def test_one_dimension_at_a_time() -> None:
    base = architecture_of(QUICK)
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "patch_size")
    for of_study in Scaling().cells(QUICK):
        built = architecture_of(of_study.config)
        assert built.head_width == base.head_width
        changed = [name for name in names if getattr(built, name) not in (getattr(base, name), [4, 4])]
        assert len(changed) == (of_study.factors["dimension"] != BASE)


@pytest.mark.parametrize(
    ("fields", "half", "double"),
    [
        ({}, {"2 layers", "width 32", "MLP 64", "patch 2x2"}, {"8 layers", "width 128", "MLP 256", "patch 8x8"}),
        ({"num_attention_heads": 1, "patch_size": 32}, {"2 layers", "MLP 64", "patch 16x16"}, None),
        ({"patch_size": 1}, {"2 layers", "width 32", "MLP 64"}, None),
        ({"num_hidden_layers": 1, "patch_size": [4, 32]}, {"width 32", "MLP 64", "patch 2x16"}, None),
    ],
)
def test_what_cannot_be_scaled_is_left_out(fields: dict[str, Any], half: set[str], double: set[str] | None) -> None:
    config = replace(QUICK, model_config={**QUICK.model_config, **fields})
    assert {size for _, size, _ in scaled(config, 0.5)} == half
    assert double is None or {size for _, size, _ in scaled(config, 2.0)} == double


def test_three_heads_become_two() -> None:
    config = RECIPES["full"]()
    assert dict((name, size) for name, size, _ in scaled(config, 0.5))["width"] == "width 128"


def test_front_is_what_nothing_beats() -> None:
    draw = random.Random(0)
    for _ in range(20):
        points = [(draw.randint(1, 9), draw.randint(1, 9)) for _ in range(12)]
        best = [
            (cost, gain)
            for cost, gain in sorted(set(points))
            if not any(c <= cost and g >= gain and (c, g) != (cost, gain) for c, g in points)
        ]
        assert front_of(points) == best
    assert front_of([]) == []


def test_table_of_scaling() -> None:
    rows = scaled_rows(AS_IN_THE_PAPER, noise=0.0)
    heading, base, *others = Scaling().table(Results(rows))
    assert heading[3] == "training, 10^12 FLOP"
    assert base[:2] == ["base", "4 layers, width 64, MLP 128, patch 4x4"] and base[-2:] == ["50.0 ± 0.0", "–"]
    assert [line[0] for line in others] == [name for name in DIMENSIONS for _ in range(2)]
    assert [line[1] for line in others[:2]] == ["2 layers", "8 layers"]
    assert others[1][-2:] == ["56.0 ± 0.0", "6.0 ± 0.0"]


# ------------------------------------------------------------------------------------------------------ resolution


def tuned_rows(resampled: float, new: float, kept: float = 0.5, large: float = 0.6) -> list[dict[str, Any]]:
    """Return rows where models that were fine-tuned, and one from large images, are so accurate."""
    levels = {RESAMPLED: resampled, NEW: new, KEPT: kept}

    def accuracy(factors: Mapping[str, Any], work: float) -> float:
        return large if factors["trained"] == SCRATCH else levels[factors["positions"]]

    return rows_of(Resolution(), accuracy)


@pytest.mark.parametrize(
    ("resampled", "new", "expected"),
    [
        (0.6, 0.55, ["agrees", "agrees", "agrees"]),
        (0.4, 0.45, ["does not agree", "does not agree", "does not agree"]),
        (0.59, 0.59, ["no significant difference", "agrees", "inconclusive"]),
    ],
)
def test_positions_and_sizes_are_told_apart(resampled: float, new: float, expected: list[str]) -> None:
    assert verdicts(Resolution(), tuned_rows(resampled, new)) == expected


def test_no_saving_where_it_costs_more() -> None:
    rows = tuned_rows(0.7, 0.5)
    for item in rows:
        item["training_flops"] = 1.0
    finding = Resolution().findings(Results(rows))[2]
    assert finding.verdict == "does not agree" and finding.measured.endswith(", for 200% of the compute")


def test_what_was_spent_before_is_counted() -> None:
    rows = tuned_rows(0.6, 0.5)
    for item in rows:
        item["seconds"] = 10.0 + item["seed"] if item["factors"] == scratch("16x16") else 1.0
    results = Results(rows)
    assert spent(results, "seconds", scratch("16x16")).mean == 11.0
    assert spent(results, "seconds", scratch("32x32")).mean == 1.0
    assert spent(results, "seconds", tuned("32x32", NEW)).mean == 12.0
    table = Resolution().table(results)
    assert [line[:3] + line[-1:] for line in table[1:]] == [
        ["16x16", "from scratch", "–", "11.0"],
        ["24x24", "from scratch", "–", "1.0"],
        ["32x32", "from scratch", "–", "1.0"],
        ["16x16", "fine-tuned", "kept", "12.0"],
        ["24x24", "fine-tuned", "resampled", "12.0"],
        ["32x32", "fine-tuned", "resampled", "12.0"],
        ["24x24", "fine-tuned", "new", "12.0"],
        ["32x32", "fine-tuned", "new", "12.0"],
    ]


def test_sizes_are_whole_patches_and_the_schedule_is_a_third() -> None:
    cells = list(Resolution().cells(RECIPES["photos"]()))
    assert list(dict.fromkeys(of_study.factors["size"] for of_study in cells)) == ["112x80", "160x128", "224x160"]
    tuning = cells[-1].config
    assert (tuning.epochs, tuning.warmup_epochs) == pytest.approx((50 / 3, 5 / 3))
    assert tuning.learning_rate == pytest.approx(1e-4) and not tuning.resample_positions
    alone = Resolution().cells(replace(QUICK, model_config={**QUICK.model_config, "patch_size": 32}))
    assert [of_study.factors["size"] for of_study in alone] == ["32x32"] * 2


@pytest.mark.slow
def test_fine_tuning_begins_from_the_small_model(tmp_path: Path) -> None:
    """Without learning, weights of the small model are left; positions are resampled, or new."""
    study = Resolution()
    config = TrainConfig.from_recipe(SIZES["quick"], **{**TINY, "learning_rate": 0.0})
    cells = {key_of(of_study.factors, 0): of_study for of_study in study.cells(config)}
    figures, models = {}, {}
    for factors in (scratch("4x4"), tuned("8x8", RESAMPLED), tuned("8x8", NEW)):
        run = PlannedRun(study, cells[key_of(factors, 0)], 0, tmp_path)
        figures[run.name] = run.execute()
        models[run.name] = HFViTForImageClassification.from_pretrained(run.folder)
    small, resampled, new = models.values()
    assert [model.config.grid_size for model in models.values()] == [(2, 2), (4, 4), (4, 4)]
    flops = [item["forward_flops"] for item in figures.values()]
    assert flops[0] < flops[1] == flops[2]
    assert [item["images_seen"] for item in figures.values()] == [32, 16, 16]
    positions = "vit.embeddings.position_embeddings."
    for name, weights in small.state_dict().items():
        if not name.startswith(positions):
            assert torch.equal(weights, resampled.state_dict()[name]) and torch.equal(weights, new.state_dict()[name])
    pixel_values = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(resampled(pixel_values).logits, small(pixel_values).logits)
        assert not torch.allclose(new(pixel_values).logits, resampled(pixel_values).logits)
