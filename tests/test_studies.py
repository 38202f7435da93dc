"""What a study is, how its runs are done side by side, and that nothing of them is lost or done twice."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hf_vit.cli.main import app
from hf_vit.studies import SIZES, STUDIES, read_rows, run_study, write_page
from hf_vit.studies.page import summary
from hf_vit.studies.positions import PAPER, Positions
from hf_vit.studies.running import RUNS, PlannedRun, ResultsFile
from hf_vit.studies.study import Cell, Difference, Results, Spread, are_alike, is_more
from hf_vit.training.recipe import TrainConfig
from hf_vit.training.tasks import Classification, build_model

TINY: dict[str, Any] = {
    "data": "digits",
    "model_config": {
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "patch_size": 2,
    },
    "image_size": 8,
    "max_steps": 2,
    "batch_size": 16,
}


def tiny(**fields: Any) -> TrainConfig:
    return TrainConfig.from_recipe(SIZES["quick"], **{**TINY, **fields})


def row(seed: int, accuracy: float | None = 0.5, failed: str | None = None, **factors: Any) -> dict[str, Any]:
    """Return a row of results as a run leaves it."""
    return {
        "study": "positions",
        "factors": factors,
        "seed": seed,
        "failed": failed,
        **({} if failed else {"accuracy": accuracy, "loss": 1.0, "seconds": 4.0, "train_images": 100}),
        **({} if failed else {"test_images": 50, "parameters": 1000}),
        "recipe": {"data": "digits", "begins_from": None, "epochs": 3.0},
        "command": "hf-vit study positions",
        "hardware": "2 CPU cores",
        "versions": "torch",
        "commit": "abc",
        "date": "2026-11-21",
    }


# ---------------------------------------------------------------------------------------------------- the statistics


def test_the_interval_of_a_difference_is_students() -> None:
    """Of 1, 2 and 3: 2 plus or minus 4.303 * 1 / sqrt(3), by any table of Student's distribution."""
    difference = Difference.of([(1.0, 0.0), (3.0, 1.0), (4.0, 1.0)])
    assert difference.mean == 2 and difference.number == 3
    assert difference.high - 2 == pytest.approx(2 - difference.low) == pytest.approx(4.3027 / 3**0.5, rel=1e-4)


def test_one_seed_tells_nothing_apart() -> None:
    difference = Difference.of([(0.9, 0.1)])
    assert is_more("more", difference, "a less b").holds is None
    assert are_alike("alike", {"a less b": difference}, 0.01).holds is None
    assert "no interval" in difference.points()
    assert Spread.of([0.5]).percent() == "50.0" and Spread.of([0.4, 0.6]).percent() == "50.0 ± 14.1"


def test_claims_are_judged_by_their_intervals() -> None:
    more = Difference.of([(0.62, 0.5), (0.6, 0.5), (0.61, 0.5)])
    less = Difference.of([(0.5, 0.62), (0.5, 0.6), (0.5, 0.61)])
    noisy = Difference.of([(0.9, 0.5), (0.2, 0.5), (0.61, 0.5)])
    same = Difference.of([(0.501, 0.5), (0.5, 0.501), (0.5, 0.5)])
    assert [is_more("", d, "").verdict for d in (more, less, noisy)] == [
        "agrees",
        "does not agree",
        "no significant difference",
    ]
    assert is_more("", None, "").holds is None
    assert [are_alike("", {"": d}, 0.01).holds for d in (same, more, noisy)] == [True, False, None]
    assert (
        are_alike("", {"a": same, "b": None}, 0.01).holds
        and are_alike("", {"a": same, "b": less}, 0.01).holds is False
    )


def test_results_pair_seeds_and_leave_out_what_failed() -> None:
    results = Results(
        [
            row(0, 0.5, kind="a"),
            row(1, 0.7, kind="a"),
            row(1, 0.4, kind="b"),
            row(2, 0.9, kind="b"),
            row(0, kind="b", failed="Step 3 is not finite"),
        ]
    )
    assert results.levels("kind") == ["a", "b"]
    assert results.by_seed("accuracy", kind="b") == {1: 0.4, 2: 0.9}
    difference = results.difference({"kind": "a"}, {"kind": "b"})
    assert difference is not None and difference.number == 1 and difference.mean == pytest.approx(0.3)
    assert results.difference({"kind": "a"}, {"kind": "c"}) is None and results.spread(kind="c") is None


# ------------------------------------------------------------------------------------------------------- positions


def position_rows(none: float, others: float, noise: float = 0.001) -> Iterator[dict[str, Any]]:
    for seed in range(3):
        for number, (positions, placement) in enumerate(PAPER):
            level = none if positions == "none" else others
            yield row(seed, level + noise * ((seed + number) % 3), positions=positions, placement=placement)


def test_findings_of_positions() -> None:
    study = Positions()
    like_the_paper = study.findings(Results(position_rows(0.5, 0.55)))
    assert [finding.verdict for finding in like_the_paper] == ["agrees"] * 3
    assert "5.0 points" in like_the_paper[0].measured
    assert study.findings(Results(position_rows(0.55, 0.5)))[0].holds is False
    assert study.findings(Results(position_rows(0.5, 0.5, noise=0.01)))[0].holds is None


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
@pytest.mark.parametrize("size", SIZES)
def test_cells_differ_and_can_be_built(study: Any, size: str) -> None:
    config = TrainConfig.from_recipe(SIZES[size], data="digits", **{"model_config.patch_size": 2}, image_size=8)
    config = replace(config, model_config={**config.model_config, "hidden_size": 32, "num_attention_heads": 2})
    cells = list(study.cells(config))
    factors = [json.dumps(dict(cell.factors), sort_keys=True) for cell in cells]
    assert len(set(factors)) == len(cells) > 1
    known = set()
    for cell, own in zip(cells, factors, strict=True):
        assert cell.begins_from is None or json.dumps(dict(cell.begins_from), sort_keys=True) in known
        known.add(own)


@pytest.mark.parametrize(("positions", "placement"), PAPER)
def test_every_kind_of_positions_is_that_of_its_model(positions: str, placement: str) -> None:
    cells = {tuple(cell.factors.values()): cell for cell in Positions().cells(tiny())}
    config = cells[positions, placement].config
    data = type("Data", (), {"label_names": list("0123456789")})()
    model, _ = build_model(config, Classification(config, data))  # type: ignore[arg-type]
    assert model.config.position_embedding_type == positions and model.config.position_placement == placement


# -------------------------------------------------------------------------------------------------------- the page


def test_the_page_says_what_was_measured(tmp_path: Path) -> None:
    results = Results([*position_rows(0.5, 0.55), row(3, failed="Step 3", positions="none", placement="input")])
    text = write_page(Positions(), results, tmp_path).read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "picture.png"}
    for words in (
        "50.1 ± 0.1",
        "| claim | here | measured |",
        "**agrees**",
        "over 4 seeds",
        "failed because the loss was not finite: 1",
    ):
        assert words in text, words
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write_page(Positions(), results, tmp_path)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert any(line.startswith("agrees: ") for line in summary(Positions(), results))


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_a_study_is_shown_from_one_run(study: Any, tmp_path: Path) -> None:
    """What is not measured yet is left out, and nothing is claimed of it."""
    cell = next(iter(study.cells(tiny())))
    results = Results(
        [{**row(0, **cell.factors), "training_flops": 1e9, "forward_flops": 1e6, "curve": [[1, 0.5, 1]]}]
    )
    assert all(finding.holds is None for finding in study.findings(results))
    write_page(study, results, tmp_path)


# --------------------------------------------------------------------------------------------------------- running


def test_a_run_has_its_row(tmp_path: Path) -> None:
    cell = next(iter(Positions().cells(tiny())))
    run = PlannedRun(Positions(), cell, 1, tmp_path / RUNS)
    file = ResultsFile(tmp_path / "results.jsonl", {"command": "c"})
    file.add(run, run.execute())
    (stored,) = read_rows(tmp_path / "results.jsonl")
    assert stored["factors"] == {"positions": "none", "placement": "input"} and stored["seed"] == 1
    assert stored["images_seen"] == 32 and stored["test_images"] == 359 and stored["train_images"] == 143
    assert stored["training_flops"] > 32 * 2 * stored["forward_flops"] > 0
    assert str(tmp_path) not in json.dumps(stored)
    again = ResultsFile(tmp_path / "results.jsonl", {"command": "c"})
    assert again.is_done(run) and not again.is_done(replace(run, seed=2))
    with pytest.raises(ValueError, match=r"other settings \(max_steps 2 -> 3\): choose another --output-dir"):
        again.is_done(replace(run, cell=replace(cell, config=replace(cell.config, max_steps=3))))


def test_a_line_that_was_cut_off_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert read_rows(path) == [{"a": 1}, {"a": 2}] and path.read_text() == '{"a": 1}\n{"a": 2}\n'


class Relay(Positions):
    """One run, one that begins from its model, and one that cannot be done if `broken`."""

    name = "relay"
    broken = False

    def cells(self, config: TrainConfig) -> Iterator[Cell]:
        yield Cell({"leg": "first"}, config)
        yield Cell({"leg": "second"}, replace(config, epochs=1), begins_from={"leg": "first"})
        if self.broken:
            yield Cell({"leg": "third"}, replace(config, data="nowhere/at/all"))


@pytest.mark.slow
def test_runs_are_done_once_and_one_can_begin_from_another(tmp_path: Path) -> None:
    said: list[str] = []
    results = run_study(Relay(), tiny(), tmp_path, 2, "hf-vit study relay", jobs=2, say=said.append)
    assert len(results.rows) == 4 and not (tmp_path / RUNS).exists()
    assert said[0] == "Position embeddings: 0 of 4 runs done, 4 to run." and said[-1].startswith("[4/4]")
    written = (tmp_path / "results.jsonl").read_text()
    said.clear()
    assert run_study(Relay(), tiny(), tmp_path, 2, "again", say=said.append).rows == results.rows
    assert not said and (tmp_path / "results.jsonl").read_text() == written
    # A third seed needs its own first leg, whose model is gone with the others'.
    assert len(run_study(Relay(), tiny(), tmp_path, 3, "more", say=said.append).rows) == 6
    assert said[0].endswith("4 of 6 runs done, 2 to run.")
    # A run does not depend on what is done beside it: here the second waits alone for the first.
    alone = run_study(Relay(), tiny(), tmp_path / "alone", 1, "alone", jobs=2, say=said.append)
    figures = ("accuracy", "loss", "curve", "parameters")
    assert [[r[f] for f in figures] for r in alone.rows] == [[r[f] for f in figures] for r in results.rows[:2]]


@pytest.mark.slow
def test_a_run_that_cannot_be_done_leaves_the_others(tmp_path: Path) -> None:
    study, said = Relay(), []
    study.broken = True
    with pytest.raises(ValueError, match="1 of 3 runs could not be completed"):
        run_study(study, tiny(), tmp_path, 1, "c", jobs=2, say=said.append)
    assert len(read_rows(tmp_path / "results.jsonl")) == 2
    assert "nowhere/at/all" in "".join(path.read_text() for path in (tmp_path / RUNS).glob("*.log"))


@pytest.mark.slow
def test_a_study_whose_data_cannot_be_read_ends_after_few_runs(tmp_path: Path) -> None:
    said: list[str] = []
    config = replace(tiny(), data=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"12 of 12 runs could not be completed \(.* and \d more: ValueError: "):
        run_study(Relay(), config, tmp_path / "study", 6, "c", jobs=1, say=said.append)
    assert sum(line.startswith("Error in ") for line in said) == 1
    log = "".join(path.read_text() for path in (tmp_path / "study" / RUNS).glob("*.log"))
    assert log.count("Traceback") == 3


COMMAND = [
    *(sys.executable, "-m", "hf_vit.cli", "study", "positions", "--quick", "--data", "digits", "--image-size", "8"),
    *("--model-config.patch-size", "2", "--model-config.hidden-size", "16", "--max-steps", "60", "--seeds", "1"),
    *("--jobs", "2", "--save-every", "20"),
]


# By default the one that trains in two stages.
@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.full] * (name != "pretraining")) for name in STUDIES],
)
def test_every_study_is_run_from_its_command(name: str, tmp_path: Path) -> None:
    """All cells of one seed, in steps that take no time; the same command then only draws, from the results alone."""
    sizes = "--image-size 8 --model-config.patch-size 2 --model-config.hidden-size 48 --batch-size 32 --train-share 1"
    runs = "--max-steps 2 --seeds 1 --jobs 1"
    command = ["study", name, "--quick", "--data", "digits", *sizes.split(), *runs.split()]
    command += ["--output-dir", str(tmp_path)]
    ran = CliRunner().invoke(app, command)
    assert ran.exit_code == 0, ran.output
    rows = read_rows(tmp_path / "results.jsonl")
    assert f"[{len(rows)}/{len(rows)}]" in ran.output and not any(row["failed"] for row in rows)
    page, picture = tmp_path / "README.md", (tmp_path / "picture.png").read_bytes()
    text = page.read_text()
    assert str(tmp_path) not in text.replace(f"--output-dir {tmp_path}", "")
    page.unlink()
    drawn = CliRunner().invoke(app, command)
    assert drawn.exit_code == 0 and "runs done" not in drawn.output, drawn.output
    assert page.read_text() == text and (tmp_path / "picture.png").read_bytes() == picture


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return the results of a study that was not stopped."""
    folder = tmp_path_factory.mktemp("whole")
    subprocess.run([*COMMAND, "--output-dir", str(folder)], env=ENVIRONMENT, check=True, capture_output=True)
    return read_rows(folder / "results.jsonl")


@pytest.mark.full
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_a_study_that_is_stopped_goes_on(tmp_path: Path, whole: list[dict[str, Any]], signum: int) -> None:
    """No process stays behind, no result is lost or doubled, and the end is that of a study that was not stopped."""
    command = [*COMMAND, "--output-dir", str(tmp_path / "stopped")]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    results = tmp_path / "stopped" / "results.jsonl"
    while not results.exists():
        assert process.poll() is None and not time.sleep(0.2)
    os.kill(process.pid, signum)
    _, said = process.communicate(timeout=120)
    assert process.returncode == (-signum if signum == signal.SIGKILL else 128 + signum), said
    if signum != signal.SIGKILL:
        assert "The same command resumes the run" in said
    until = time.monotonic() + 60
    while _has_processes(process.pid):
        assert time.monotonic() < until, "a worker stays behind"
        time.sleep(0.2)
    done = len(read_rows(results))
    assert 1 <= done < len(PAPER)
    subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True)
    rows = read_rows(results)
    assert len(rows) == len(PAPER) == len({json.dumps(row["factors"]) for row in rows})
    figures = {json.dumps(row["factors"]): (row["accuracy"], row["loss"]) for row in rows}
    for row in whole:
        assert figures[json.dumps(row["factors"])] == (row["accuracy"], row["loss"])


def _has_processes(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_command_lists_studies_and_refuses_others() -> None:
    listed = CliRunner().invoke(app, ["study"])
    assert listed.exit_code == 0 and all(name in listed.output for name in STUDIES)
    refused = CliRunner().invoke(app, ["study", "nothing"])
    assert refused.exit_code == 2 and "Unknown study 'nothing': choose one of positions" in refused.output
