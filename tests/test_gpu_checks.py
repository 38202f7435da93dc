"""The checks of a GPU, on a CPU: they pass, and find a fault that is planted."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hf_vit.benchmark import gpu as gpu_of_models
from hf_vit.benchmark.gpu import KINDS, SIZES, GPUChecks, free_memory_of_device
from hf_vit.cli import gpu as command
from hf_vit.cli.main import app
from hf_vit.system.checks import FAILED, NOT_RUN, OK, Check, NotPossible, Outcome, Row, run_checks, summary
from hf_vit.training import gpu as gpu_of_training
from hf_vit.training.gpu import TrainingChecks

runner = CliRunner()
CPU = torch.device("cpu")


def run(checks: Iterator[Check] | list[Check], minutes: float = 10.0) -> dict[str, Row]:
    return {row.name: row for row in run_checks(checks, minutes, free_memory_of_device)}


def named(checks: Iterator[Check], *names: str) -> list[Check]:
    return [check for check in checks if check.name in names]


def raising(error: Exception) -> Any:
    def fail() -> Outcome:
        raise error

    return fail


@pytest.fixture
def few_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {name: gpu_of_models.CONFIGURATIONS[name] for name in ("learned", "rotary, registers, qk norm")}
    monkeypatch.setattr(gpu_of_models, "CONFIGURATIONS", chosen)


def test_every_check_becomes_a_row() -> None:
    checks = [
        Check("a", "good", lambda: Outcome("1 of 1", values={"n": 1})),
        Check("a", "bad", lambda: Outcome("0 of 1", "too few")),
        Check("b", "impossible", raising(NotPossible("no torchao"))),
        Check("b", "broken", raising(RuntimeError("a\nb"))),
        Check("b", "long", lambda: Outcome(""), seconds=1000),
    ]
    rows = list(run_checks(checks, 1.0, lambda: None))
    assert [row.verdict for row in rows] == [OK, FAILED, NOT_RUN, FAILED, NOT_RUN]
    texts = [
        "1 of 1",
        "0 of 1; too few",
        "no torchao",
        "RuntimeError: a b",
        "about 1000 s are needed, and 60 s are left",
    ]
    assert [row.text for row in rows] == texts and rows[0].values == {"n": 1}
    assert summary(rows) == "5 checks: 1 ok, 2 failed, 2 not run."
    assert rows[1].lines() == ["FAILED   a          bad: 0 of 1; too few"]


def test_a_device_agrees_with_itself(few_configurations: None) -> None:
    names = ("training fp32", "training bf16", "inference fp32", "inference bf16", "inference fp8")
    rows = run(named(GPUChecks(CPU, is_tiny=True).agreement(), *names))
    assert [row.verdict for row in rows.values()] == [OK] * 4 + [NOT_RUN], rows
    assert set(rows["training fp32"].values["errors"]) == set(gpu_of_models.CONFIGURATIONS)
    assert "compute capability 8.9" in rows["inference fp8"].text


def test_a_wrong_device_is_found(few_configurations: None, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = GPUChecks(CPU, is_tiny=True)
    of_training, of_inference = checks._training, checks._inference
    monkeypatch.setattr(checks, "_inference", lambda *given: 1.001 * of_inference(*given))
    monkeypatch.setattr(checks, "_training", lambda *given: (of_training(*given)[0], 1.01 * of_training(*given)[1]))
    rows = run(named(checks.agreement(), "training fp32", "inference fp32"))
    assert [row.verdict for row in rows.values()] == [FAILED, FAILED]
    assert "gradients of learned differ by 1e-02" in rows["training fp32"].text
    assert "outputs of learned differ by 1e-03" in rows["inference fp32"].text


@pytest.mark.slow
def test_speed_is_a_share_of_the_measured_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = GPUChecks(CPU, is_tiny=True)
    names = ("bf16 products of 8192", "training S, timm", "training S, ours", "inference S, ours, compiled")
    rows = run(named(checks.speed(), *names))
    assert [row.verdict for row in rows.values()] == [OK] * 4, rows
    assert "x timm, target 1.15" in rows["training S, ours"].text
    assert ", target 50%" in rows["inference S, ours, compiled"].text
    assert checks.rate > 0 and rows["training S, ours"].values["share"] > 0


def test_a_slow_model_misses_its_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    """At full size, the share and the ratio to timm are compared with their targets."""
    checks = GPUChecks(CPU, is_tiny=True, rate=1e15)
    checks.speeds["inference", "S", "timm", True] = 100.0
    monkeypatch.setattr(checks, "_inference_step", lambda *given: lambda: None)

    def paces(call: Any, images: int) -> tuple[float, float, float]:
        checks.is_tiny = False
        return 110.0, 100.0, 120.0

    monkeypatch.setattr(checks, "_paces", paces)
    rows = run(named(checks.speed(), "inference S, ours, compiled"))
    [row] = rows.values()
    assert row.verdict == FAILED and "below the target of 50%, below 1.15 x timm" in row.text


def test_all_sizes_are_measured_on_a_gpu() -> None:
    names = [check.name for check in GPUChecks(CPU).speed()]
    assert len(names) == 1 + 2 * len(SIZES) * 4 and "training H, timm, compiled" in names
    assert {check.name for check in GPUChecks(CPU).agreement()} == set(KINDS)


@pytest.mark.slow
def test_a_run_resumes_exactly_or_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = TrainingChecks(tmp_path, CPU, is_tiny=True)
    name = "mixup, averaging, two parts"
    assert run(named(checks.resume(), name))[name].verdict == OK
    weights, number = gpu_of_training._weights, iter(range(9))
    monkeypatch.setattr(gpu_of_training, "_weights", lambda config: weights(config) + bytes(next(number)))
    row = run(named(checks.resume(), name))[name]
    assert row.verdict == FAILED and "the weights differ" in row.text


def test_waits_are_counted_in_steps_and_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA warns of a wait; here each step does."""
    apply = gpu_of_training.train.__globals__["compute_gradients"]

    def waiting(*given: Any) -> torch.Tensor:
        warnings.warn(gpu_of_training.WAITING, UserWarning, stacklevel=1)
        return apply(*given)

    monkeypatch.setitem(gpu_of_training.train.__globals__, "compute_gradients", waiting)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    count, checks = gpu_of_training.counted_waits, TrainingChecks(tmp_path, CPU, is_tiny=True)
    monkeypatch.setattr(gpu_of_training, "counted_waits", lambda device: count(torch.device("cuda")))
    monkeypatch.setattr(checks, "_is_counted", True)
    row = run(named(checks.waits(), "one batch"))["one batch"]
    assert row.verdict == FAILED and "1 per step, 0 per evaluation batch; more than 0 per step" in row.text


def test_the_command_prints_and_writes_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = [Outcome("as on a CPU"), Outcome("10 images/s", "below the target")]
    checks = [
        Check("agreement", str(number), lambda outcome=outcome: outcome) for number, outcome in enumerate(outcomes)
    ]
    monkeypatch.setattr(command, "_checks", lambda *given: checks)
    arguments = ["benchmark", "gpu", "--quick", "--output-dir", str(tmp_path)]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 1, result.output
    assert "FAILED   agreement  1: 10 images/s; below the target" in result.stdout
    assert "2 checks: 1 ok, 1 failed, 0 not run." in result.stdout
    [path] = tmp_path.glob("*-gpu.json")
    assert [row["verdict"] for row in json.loads(path.read_text())["rows"]] == [OK, FAILED]
    assert "| agreement | 0 | as on a CPU | ok |" in path.with_suffix(".md").read_text()
    checks.pop()
    assert runner.invoke(app, arguments).exit_code == 0


def test_the_command_needs_a_gpu_and_no_other_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = runner.invoke(app, ["benchmark", "gpu"])
    assert result.exit_code == 2 and "Found no CUDA GPU" in result.stderr
    for words in (["gpu", "training"], ["gpu", "--models", "B/16"]):
        result = runner.invoke(app, ["benchmark", *words])
        assert result.exit_code == 2 and "takes no other suites" in result.stderr


@pytest.mark.slow
def test_all_checks_run_at_tiny_sizes(tmp_path: Path) -> None:
    result = runner.invoke(app, ["benchmark", "gpu", "--quick", "--output-dir", str(tmp_path)])
    [path] = tmp_path.glob("*-gpu.json")
    rows = json.loads(path.read_text())["rows"]
    assert result.exit_code == 0, [row for row in rows if row["verdict"] == FAILED]
    assert {row["section"] for row in rows} == {"agreement", "waits", "resume", "speed", "processes", "quickstart"}
    needed = ("fp16 needs a GPU", "compiling takes", "only CUDA", "FP8 needs")
    assert all(any(words in row["text"] for words in needed) for row in rows if row["verdict"] == NOT_RUN)
