"""The benchmark: what may be stated, that other work is found out, and that a variant that fails is a line."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from hf_vit.benchmark import compare, measure, preparation, table
from hf_vit.benchmark.compare import Measured, Spread, is_significant, judge, speedup, spread, take_turns
from hf_vit.benchmark.measure import CEILING, SUBJECTS, Job
from hf_vit.benchmark.suites import (
    BOUNDS,
    SUITES,
    Case,
    cases_of,
    libraries,
    model_fields,
    regret,
    relative_error,
    variants_of,
)
from hf_vit.checkpoints import open_checkpoint
from hf_vit.cli.main import app
from hf_vit.system.machine import FLAGS, hardware, installed_versions, slug

CASE = Case("inference", "quick, batch 2", 2, "quick")
runner = CliRunner()


# --------------------------------------------------------------------------------------------------- statistics


def test_spread_is_the_range_of_few_rounds_and_the_quartiles_of_many() -> None:
    assert spread([5.0, 1.0, 2.0]) == Spread(2.0, 1.0, 5.0)
    assert spread([float(value) for value in range(9)]) == Spread(4.0, 2.0, 6.0)


def test_ratios_are_of_the_same_round() -> None:
    """A machine that slows down to a tenth changes no ratio."""
    drift = [1.0, 2.0, 10.0, 3.0, 1.5]
    ratio = speedup([0.2 * slow for slow in drift], [0.1 * slow for slow in drift])
    assert ratio == pytest.approx((2.0, 2.0, 2.0))
    assert not is_significant(speedup([0.2 * slow for slow in drift], [0.1 * slow for slow in reversed(drift)]))


@pytest.mark.parametrize(
    ("ratio", "is_stated"),
    [
        (Spread(1.5, 1.4, 1.6), True),
        (Spread(0.5, 0.4, 0.6), True),
        (Spread(1.5, 0.99, 1.6), False),  # holds 1
        (Spread(0.9, 0.8, 1.0), False),  # ends at 1
        (Spread(1.1, 1.05, 1.2), False),  # wider than the difference
        (Spread(2.0, 1.5, 2.5), True),  # just as wide
        (Spread(1.0, 1.0, 1.0), False),
    ],
)
def test_a_ratio_is_stated_only_beyond_its_spread(ratio: Spread, is_stated: bool) -> None:
    assert is_significant(ratio) is is_stated


# ------------------------------------------------------------------------------------------------------ results


def measured(*rounds: float, **fields: object) -> Measured:
    return Measured(**{"precision": "fp32", "calls": [[seconds] * 3 for seconds in rounds], **fields})


def results_of(found: dict[str, Measured], errors: dict[str, float], operations: int | None = None) -> dict[str, dict]:
    return {result["variant"]: result for result in judge(CASE, found, errors, operations)}


def test_what_disagrees_gets_no_ratio() -> None:
    bound = BOUNDS["inference"][1]["fp32"]
    found = {"timm": measured(0.4, 0.4, 0.4), "ours": measured(0.1, 0.1, 0.1), "openvino": measured(0.2, 0.2, 0.2)}
    results = results_of(found, {"timm": bound, "ours": 1.01 * bound, "openvino": 0.0})
    assert not results["ours"]["agrees"] and "ratio" not in results["ours"]
    assert results["openvino"]["ratio"]["median"] == 2 and results["openvino"]["baseline"] == "timm"
    lines = table.table(list(results.values()))
    assert any("ours" in line and "outputs differ" in line for line in lines)


def test_the_baseline_agrees_itself() -> None:
    found = {"timm": measured(0.4), "transformers": measured(0.3), "ours": measured(0.1)}
    results = results_of(found, {"timm": 1.0, "transformers": 0.0, "ours": 0.0})
    assert results["ours"]["baseline"] == "transformers"
    assert results["timm"]["baseline"] is None and not results["timm"]["agrees"]


def test_bf16_is_compared_by_its_own_bound_and_ceiling() -> None:
    found = {"timm": measured(0.4, precision="bf16"), "onnxruntime": measured(0.1)}
    found[CEILING] = measured(0.5, precision="bf16", operations=10)
    results = results_of(found, {"timm": 0.01, "onnxruntime": 0.01}, operations=4)
    assert results["timm"]["agrees"] and not results["onnxruntime"]["agrees"]
    assert results["timm"]["share_of_ceiling"] == pytest.approx((4 / 0.4) / (10 / 0.5))
    assert results["onnxruntime"]["share_of_ceiling"] is None  # that of another precision


def test_the_share_is_of_the_best_product_of_the_same_round() -> None:
    limit = Measured(precision="fp32", calls=[[0.5, 1.0], [1.0, 2.0]], operations=10)
    results = results_of({"timm": measured(1.0, 2.0), CEILING: limit}, {"timm": 0.0}, operations=10)
    assert results["timm"]["share_of_ceiling"] == 0.5
    assert results[CEILING]["operations_per_second"] == {"median": 15.0, "low": 10.0, "high": 20.0}


def test_other_answers_are_far_away() -> None:
    reference = np.array([[3.0, 4.0]])
    assert relative_error(reference, reference) == 0
    assert relative_error(np.array([[3.0, 3.0]]), reference) == pytest.approx(0.2)
    assert relative_error(reference[0], reference) == relative_error(np.full((1, 2), np.nan), reference) == np.inf


def test_regret_forgives_ties_alone() -> None:
    probabilities = np.array([[0.5, 0.499, 0.001], [0.1, 0.1, 0.8]])
    assert regret(np.array([0, 2]), probabilities) == 0
    assert regret(np.array([1, 2]), probabilities) < BOUNDS["prediction"][1]["fp32"]
    assert regret(np.array([2, 2]), probabilities) > BOUNDS["prediction"][1]["bf16"]


# ---------------------------------------------------------------------------------------------------- the table


def test_table() -> None:
    found = {
        "timm": measured(0.4, 0.4, 0.5, peak_memory=2**30),
        "ours": measured(0.2, 0.2, 0.25, peak_memory=2**20),
        "openvino": measured(0.39, 0.41, 0.5),
        "vit-pytorch": Measured(failure="ModuleNotFoundError: No module named 'vit_pytorch'"),
        CEILING: measured(0.1, 0.1, 0.1, operations=10**9),
    }
    errors = {"timm": 1e-6, "ours": 2e-6, "openvino": 0.0}
    lines = table.table(judge(CASE, found, errors, operations=10**9))
    assert lines[0] == "### inference: quick, batch 2, speedup over timm"
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines[2:-3]}
    assert cells["variant"] == ["images/s", "speedup", "ceiling", "memory", "error"]
    assert cells["timm fp32"] == ["5 (4 to 5)", "1", "25%", "1,024 MiB", "1e-06"]
    assert cells["ours fp32"][:2] == ["10 (8 to 10)", "2.00 (2.00 to 2.00)"]
    assert cells["openvino fp32"][1] == "not significant" and cells["openvino fp32"][3] == ""
    assert cells[f"{CEILING} fp32"][0] == "10 (10 to 10) GFLOP/s"
    assert lines[-2] == "- vit-pytorch was not measured: ModuleNotFoundError: No module named 'vit_pytorch'"
    assert len({len(line) for line in lines[2:-3]}) == 1 and len(lines[2]) <= 100


def test_nothing_to_say_is_no_column_and_nothing_measured_no_table() -> None:
    case = Case("augmentation", "2 of photos", 2)
    of_photos = judge(case, {"torchvision": measured(0.1, precision="uint8")}, {"torchvision": 0.0}, None)
    assert "ceiling" not in table.table(of_photos)[2] and "memory" not in table.table(of_photos)[2]
    failed = judge(case, {"torchvision": Measured(failure="gone")}, {}, None)
    assert table.table(failed) == ["### augmentation: 2 of photos", "", "- torchvision was not measured: gone", ""]


def test_slug() -> None:
    assert slug({"processor": "Intel(R) Xeon(R) CPU @ 2.20GHz", "cores": 8}) == "intel-xeon-cpu-2-20ghz-8-cores"
    assert slug({"processor": "AMD EPYC", "cores": 2, "accelerator": "NVIDIA H200"}) == "nvidia-h200"


def test_the_machine_is_described() -> None:
    machine = hardware()
    assert machine["cores"] >= 1 and set(machine["flags"]) <= set(FLAGS)
    lines = table.describe(machine, installed_versions())
    assert f"{machine['cores']} CPU cores" in lines[0] and f"torch {torch.__version__.split('+')[0]}" in lines[1]


def test_runs_of_a_day_are_added(tmp_path: Path) -> None:
    machine, results = hardware(), judge(CASE, {"timm": measured(0.5)}, {"timm": 0.0}, None)
    for number in range(2):
        table.Report(tmp_path / "out", f"hf-vit benchmark {number}", machine, {"torch": "2"}).add(results)
    kept, shown = sorted((tmp_path / "out").iterdir())
    assert kept.suffix == ".jsonl" and kept.stem == shown.stem and kept.stem.startswith(slug(machine))
    entries = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [entry.get("command") for entry in entries] == ["hf-vit benchmark 0", None, "hf-vit benchmark 1", None]
    assert entries[1] == results[0]
    assert shown.read_text().count("hf-vit benchmark 1") == 1 and shown.read_text().count("| timm fp32 ") == 2


# ------------------------------------------------------------------------------------------------------ processes

# A process as measure.py is one, without a library: what it does is in its name.
STAND_IN = """
import importlib.util, json, os, sys, time
import numpy as np
spec = importlib.util.spec_from_file_location("measure", {path!r})
measure = importlib.util.module_from_spec(spec)
spec.loader.exec_module(measure)

def make(job):
    kind, _, milliseconds = job.variant.partition(" ")
    if kind == "missing":
        import a_library_that_is_not_there
    if kind == "killed":
        os.kill(os.getpid(), 9)
    calls = []
    def call():
        print("libraries print")
        calls.append(1)
        if kind == "late" and len(calls) > 6:
            raise RuntimeError("out of memory")
        time.sleep(int(milliseconds) / 1000 if milliseconds.isdigit() else 0.001)
    return measure.Subject(call, lambda: np.ones(2), "fp32", 7)

measure.main(measure.Job(**json.loads(sys.argv[1])), make)
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stand_in.py").write_text(STAND_IN.format(path=measure.__file__))
    monkeypatch.setattr(compare, "COMMAND", [sys.executable, "-P", str(tmp_path / "stand_in.py")])


def job(variant: str, folder: Path, suite: str = "inference", **fields: object) -> Job:
    defaults = {"device": "cpu", "precision": "fp32", "threads": 1, "seconds": 0.01}
    return Job(suite, variant, str(folder / "models"), str(folder), **{**defaults, **fields})


@pytest.mark.usefixtures("stand_in")
def test_variants_take_turns_and_failures_are_lines(tmp_path: Path) -> None:
    names = ["fast 2", "missing", "slow 8", "killed", "late"]
    found = take_turns([job(name, tmp_path) for name in names], rounds=4, say=lambda line: None)
    assert list(found) == names
    assert found["missing"].failure == "ModuleNotFoundError: No module named 'a_library_that_is_not_there'"
    assert "-9" in str(found["killed"].failure) and found["late"].failure == "RuntimeError: out of memory"
    fast, slow = found["fast 2"], found["slow 8"]
    assert fast.failure is None and slow.failure is None
    assert len(fast.rounds) == len(slow.rounds) == 4
    assert all(len(calls) >= measure.MIN_CALLS for calls in [*fast.calls, *slow.calls])
    assert min(fast.rounds) >= 0.002 and min(slow.rounds) >= 0.008
    assert fast.operations == 7 and (fast.peak_memory is None or fast.peak_memory > 2**20)
    assert np.load(tmp_path / "output of fast 2.npy").tolist() == [1, 1]


def test_the_process_of_a_variant_imports_no_library_by_itself() -> None:
    """Else its memory would be that of torch, whatever is measured."""
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("measure", {measure.__file__!r})
spec.loader.exec_module(importlib.util.module_from_spec(spec))
print([name for name in ("torch", "transformers", "hf_vit", "PIL") if name in sys.modules])
"""
    done = compare.subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_threads_are_not_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_PROC_BIND", "true")
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    variables = compare.environment(3)
    assert "OMP_PROC_BIND" not in variables and variables["OMP_NUM_THREADS"] == "3"
    assert variables["PYTHONPATH"].endswith(f"{compare.os.pathsep}elsewhere")


# ---------------------------------------------------------------------------------------------------- same work


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> preparation.Prepared:
    folder = tmp_path_factory.mktemp("benchmark")
    return preparation.prepare(CASE, folder, {"timm", "transformers", "vit-pytorch", "ours"})


def answer_of(variant: str, prepared: preparation.Prepared, suite: str = "inference") -> float:
    """Return the error of a variant, in this process."""
    prepared_job = job(variant, prepared.folder, suite, threads=torch.get_num_threads())
    made = SUBJECTS[suite][variant](prepared_job._replace(models=str(prepared.models)))
    return relative_error(made.output(), compare.reference_of(variant, prepared))


@pytest.mark.parametrize("variant", ["timm", "transformers", "vit-pytorch", "ours"])
def test_all_libraries_have_the_same_weights(variant: str, prepared: preparation.Prepared) -> None:
    assert prepared.failures == {}
    assert answer_of(variant, prepared) < 1e-5


def test_a_wrong_weight_is_found_out(prepared: preparation.Prepared, tmp_path: Path) -> None:
    """Of any tensor, the least of them: a LayerNorm's shift."""
    path = prepared.models / "timm" / "model.safetensors"
    right = load_file(path)
    try:
        save_file({**right, "blocks.1.norm2.bias": -right["blocks.1.norm2.bias"]}, path, metadata={"format": "pt"})
        error = answer_of("timm", prepared)
    finally:
        save_file(right, path, metadata={"format": "pt"})
    assert error > BOUNDS["inference"][1]["fp32"]
    (result,) = judge(CASE, {"timm": measured(0.1)}, {"timm": error}, None)
    assert not result["agrees"] and "ratio" not in result


@pytest.mark.parametrize("variant", ["timm", "ours"])
def test_steps_of_training_agree_and_learn(variant: str, prepared: preparation.Prepared, tmp_path: Path) -> None:
    case = Case("training", "quick, batch 3", 3, "quick")
    references = preparation.training_references(case, tmp_path, "cpu", ())
    learned = references[""]
    assert learned.shape == (measure.CHECKED_STEPS, 3, 10)
    assert relative_error(learned[1], learned[0]) > 3 * BOUNDS["training"][1]["fp32"]  # the steps show
    trained = prepared._replace(folder=tmp_path, references=references)
    assert answer_of(variant, trained, "training") < BOUNDS["training"][1]["fp32"]


def test_every_tensor_is_random(prepared: preparation.Prepared) -> None:
    checkpoint = open_checkpoint(prepared.models / "ours")
    assert all(tensor.std() > 0.01 for _, tensor in checkpoint.weights())


def test_operations_are_those_of_the_products() -> None:
    fields = model_fields("Ti/16")
    tokens, width, hidden, layers = 197, 192, 768, 12
    assert fields["hidden_size"] == width and fields["num_hidden_layers"] == layers
    layer = tokens * width * (4 * width + 2 * hidden) + 2 * tokens**2 * width
    assert preparation.count_operations("Ti/16") == 2 * (196 * 768 * width + layers * layer + width * 1000)


@pytest.mark.parametrize("suite", ["preprocessing", "augmentation"])
def test_photos_become_the_same_pixel_values(suite: str, tmp_path: Path) -> None:
    (case,) = cases_of(suite, "cpu", is_quick=True)
    prepared = preparation.prepare(case, tmp_path, ())
    for variant in variants_of(suite, "fp32"):
        assert answer_of(variant, prepared, suite) < BOUNDS[suite][1]["uint8"], variant


def test_photos_are_made_alike_and_cost_what_photos_do() -> None:
    first = preparation.photo_like((375, 500), 0)
    assert first == preparation.photo_like((375, 500), 0) != preparation.photo_like((375, 500), 1)
    assert 0.15 < len(first) / (375 * 500) < 0.6  # bytes a pixel


def test_photos_of_a_user_are_upright_jpegs(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (8, 6)).save(tmp_path / "b.jpg")
    Image.new("RGB", (8, 6)).save(tmp_path / "a.JPEG")
    Image.new("RGB", (8, 6)).save(tmp_path / "turned.jpg", exif=turned)
    Image.new("RGB", (8, 6)).save(tmp_path / "c.png")
    assert [path.name for path in preparation.upright_jpegs(tmp_path)] == ["a.JPEG", "b.jpg"]
    with pytest.raises(ValueError, match="found none"):
        preparation.upright_jpegs(tmp_path / "elsewhere")


# ---------------------------------------------------------------------------------------------------- the suites


def test_cases() -> None:
    names = [case.name for case in cases_of("inference", "cpu")]
    assert names == [f"{model}/16, batch {size}" for model in ("Ti", "S", "B") for size in (1, 16)]
    assert [case.images for case in cases_of("training", "cuda", ["B/16"], 7)] == [7]
    assert [case.name for case in cases_of("preprocessing", "cpu", photos=[Path("a.jpg")])] == ["1 of your photos"]
    with pytest.raises(ValueError, match="X/3"):
        cases_of("inference", "cpu", ["X/3"])


def test_variants() -> None:
    assert variants_of("inference", "fp32", ["openvino"]) == ["openvino", "ours", "ours optimized", CEILING]
    assert "ours compiled" not in variants_of("training", "fp32")
    assert "ours compiled" in variants_of("training", "fp32", is_compile_wanted=True)
    assert "transformers bf16" not in variants_of("prediction", "fp32")
    assert "transformers bf16" in variants_of("prediction", "bf16")
    assert {"timm", "transformers", "vit-pytorch", "onnxruntime", "openvino", "torchvision"} == set(libraries())


# ---------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["speed"], f"Unknown suite 'speed': choose one of {', '.join(SUITES)}"),
        (["--against", "timm,jax"], "Unknown library 'jax'"),
        (["--models", "X/3"], "Unknown variant 'X/3'"),
        (["--photos", "/no/such/folder"], "Expected upright JPEGs in"),
    ],
)
def test_what_a_user_can_mend_is_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = runner.invoke(app, ["benchmark", *arguments, "--output-dir", str(tmp_path / "out")])
    assert result.exit_code == 2 and message in result.stderr
    assert not (tmp_path / "out").exists()


def test_help() -> None:
    result = runner.invoke(app, ["benchmark", "--help"])
    assert result.exit_code == 0 and "Usage" in result.output


@pytest.mark.usefixtures("stand_in")
def test_the_command_prints_and_keeps_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = preparation.Prepared(tmp_path, tmp_path, {"": np.ones(2)}, 7, {"openvino": "no ONNX", "ours": "broken"})
    monkeypatch.setattr(compare, "prepare", lambda *arguments: ready)
    options = ["--quick", "--against", "timm,openvino", "--output-dir", str(tmp_path / "out")]
    result = runner.invoke(app, ["benchmark", "inference", *options])
    assert result.exit_code == 0, result.output
    (shown,) = (tmp_path / "out").glob("*.md")
    of_table = result.stdout[result.stdout.index("### inference: quick, batch 2") :].split("\nMedians")[0]
    assert of_table in shown.read_text() and "- openvino was not measured: no ONNX" in of_table
    assert "| timm fp32 " in of_table and "- ours optimized was not measured: broken" in of_table
    assert "CPU cores" in result.stdout


@pytest.mark.slow
def test_quick(tmp_path: Path) -> None:
    """Real processes of real libraries."""
    command = [sys.executable, "-m", "hf_vit.cli", "benchmark", "training", "prediction", "--quick"]
    done = compare.subprocess.run(
        [*command, "--against", "timm,transformers", "--precision", "fp32", "--output-dir", str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env=compare.environment(1),
    )
    (kept,) = tmp_path.glob("*.jsonl")
    entries = [json.loads(line) for line in kept.read_text().splitlines()[1:]]
    training = {entry["variant"]: entry for entry in entries if entry["suite"] == "training"}
    assert list(training) == ["timm", "transformers", "ours", CEILING], done.stdout
    assert all(training[variant]["agrees"] for variant in ("timm", "transformers", "ours")), done.stdout
    assert 0 < training["ours"]["share_of_ceiling"] < 1.5 and training["ours"]["baseline"] == "timm"
    predicted = {entry["variant"]: entry for entry in entries if entry["suite"] == "prediction"}
    assert list(predicted) == ["transformers", "timm", "ours", "ours openvino"]
    assert all(entry["agrees"] for entry in predicted.values())
