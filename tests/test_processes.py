"""Runs in processes of their own: killed, stopped, out of space; and several that are one run."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from isolated import python
from process_of_a_run import ends, free_port, start, start_all
from tiny_run import RECIPE, colored_dataset, colored_images, log_of, save_photos, spoil_loss, stop_at, tiny_recipe

from hf_vit import HFViTForImageClassification
from hf_vit.hub.folder import check_folder
from hf_vit.system.locking import LONGEST_WAIT
from hf_vit.system.stopping import StopSignals
from hf_vit.training.recipe import TrainConfig
from hf_vit.training.run import CHECKPOINTS, LOG, METRICS

pytestmark = pytest.mark.slow
full = pytest.mark.full
ROOT = Path(__file__).resolve().parents[1]
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
WITHOUT_DROPOUT = {**RECIPE["model_config"], "hidden_dropout_prob": 0.0}  # each process draws its own
LEFT = (LOG, METRICS, "model.safetensors", "config.json", "preprocessor_config.json")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_photos(tmp_path_factory.mktemp("data") / "photos")


def finish(config: TrainConfig, number: int = 1, prepare: Any = None, **environment: str) -> str:
    output = Path(f"{config.output_dir}.txt")
    processes = (
        [start(config, output, prepare, **environment)]
        if number == 1
        else start_all(config, output, number, prepare, **environment)
    )
    return ends(processes, output)


def wait_for(condition: Any, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.002)


def lines_of(folder: Path) -> int:
    return len((folder / LOG).read_text().splitlines()) if (folder / LOG).exists() else 0


def assert_same_run(parts: Path, whole: Path) -> None:
    assert log_of(parts) == log_of(whole)
    for name in LEFT:
        assert (parts / name).read_bytes() == (whole / name).read_bytes(), name


def assert_close_run(one: Path, other: Path) -> None:
    """Hold that two runs went the same way but for rounding."""
    rows, others = log_of(one), log_of(other)
    assert len(rows) == len(others)
    for row, theirs in zip(rows, others, strict=True):
        assert theirs == pytest.approx(row, rel=1e-3, abs=1e-4)


# -------------------------------------------------------------------------------------------------------- killed

EVERYTHING: dict[str, Any] = {
    "num_workers": 2, "augmentation": "trivial", "mixup": 0.3, "cutmix": 0.5, "label_smoothing": 0.1,
    "accumulation_steps": 2, "ema_decay": 0.9, "epochs": 20, "eval_every": 3, "save_every": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("number", "environment"),
    [(2, {}), pytest.param(4, {}, marks=full), (2, FSDP)],
    ids=["ddp", "ddp-of-4", "fsdp2"],
)
def test_processes_killed_go_on_exactly(
    photos: Path, tmp_path: Path, number: int, environment: dict[str, str]
) -> None:
    fields = {**EVERYTHING, "epochs": 3, "num_workers": 0, "batch_size": 8, "log_every": 3}
    finish(tiny_recipe(photos, tmp_path / "whole", **fields), number, **environment)
    config = tiny_recipe(photos, tmp_path / "parts", **fields)
    for lines in (2, 4):
        processes = start_all(config, tmp_path / "parts.txt", number, **environment)
        wait_for(lambda lines=lines: lines_of(tmp_path / "parts") >= lines)
        for process in processes:
            process.kill()
            process.join()
    printed = finish(config, number, **environment)
    assert "Resuming from" in printed and "not be bit for bit" not in printed
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


# ------------------------------------------------------------------------------------------------------- stopped


@pytest.mark.parametrize(
    ("signum", "code", "send"),
    [
        (signal.SIGTERM, 143, os.kill),
        (signal.SIGINT, 130, os.killpg),
        (signal.SIGHUP, 129, os.kill),
        pytest.param(signal.SIGTERM, 143, os.killpg, marks=full),
        pytest.param(signal.SIGINT, 130, os.kill, marks=full),
        pytest.param(signal.SIGHUP, 129, os.killpg, marks=full),
    ],
)
def test_a_signal_saves_and_ends(photos: Path, tmp_path: Path, signum: int, code: int, send: Any) -> None:
    config = tiny_recipe(photos, tmp_path / "run", epochs=500, save_every=1000, eval_every=100, num_workers=1)
    process = start(config, tmp_path / "run.txt")
    wait_for(lambda: lines_of(tmp_path / "run") > 2)
    send(process.pid, signum)
    printed = ends([process], tmp_path / "run.txt", code)
    assert f"Stopped by {signal.Signals(signum).name} after step" in printed
    assert len(list((tmp_path / "run" / CHECKPOINTS).glob("step-*"))) == 1


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=full)])
def test_an_early_signal_ends_at_once(photos: Path, tmp_path: Path, signum: int, code: int) -> None:
    config = tiny_recipe(photos, tmp_path / "run", resume="never")
    process = start(config, tmp_path / "run.txt", say_and_wait)
    wait_for(lambda: "loading" in (tmp_path / "run.txt").read_text() if (tmp_path / "run.txt").exists() else False)
    os.kill(process.pid, signum)
    assert f"Stopped by {signal.Signals(signum).name} before the first step." in ends(
        [process], tmp_path / "run.txt", code, 10
    )


def say_and_wait() -> None:
    from hf_vit.training import run as training

    def load(*arguments: Any, **options: Any) -> None:
        print("loading", flush=True)
        try:
            time.sleep(60)
        except Exception as error:  # as libraries do
            raise RuntimeError("could not load") from error

    training.load_data = load


def test_a_signal_to_one_of_two_processes_stops_both(photos: Path, tmp_path: Path) -> None:
    config = tiny_recipe(photos, tmp_path / "run", epochs=500, save_every=1000)
    processes = start_all(config, tmp_path / "run.txt")
    wait_for(lambda: lines_of(tmp_path / "run") > 2)
    os.kill(processes[1].pid, signal.SIGTERM)
    printed = ends(processes, tmp_path / "run.txt", 143)
    assert "Stopped by SIGTERM after step" in printed


# ---------------------------------------------------------------------------------------------- several processes


def test_one_process_and_two_learn_alike(photos: Path, tmp_path: Path) -> None:
    fields = {"model_config": WITHOUT_DROPOUT, "ema_decay": 0.95, "max_grad_norm": 0.3, "epochs": 4, "log_every": 1}
    fields |= {"save_every": 100}  # to save brings shards to order: it must not be what makes them equal
    finish(tiny_recipe(photos, tmp_path / "one", **fields))
    finish(tiny_recipe(photos, tmp_path / "ddp", accumulation_steps=2, **fields), 2)
    finish(tiny_recipe(photos, tmp_path / "fsdp2", accumulation_steps=2, **fields), 2, **FSDP)
    for name in ("ddp", "fsdp2"):
        assert_close_run(tmp_path / "one", tmp_path / name)
        metrics = json.loads((tmp_path / name / METRICS).read_text())
        assert metrics["processes"] == 2
        assert metrics["eval_count"] == 21  # not divisible by two processes
    # What was sharded is whole on the disk.
    check_folder(tmp_path / "fsdp2")
    printed = python(READER, tmp_path / "fsdp2", home=tmp_path / "home")
    assert printed.stdout.split() == ["HFViTForImageClassification", "(1,", "3)"]


def test_a_sharded_run_gets_a_new_head_and_pushes(photos: Path, tmp_path: Path) -> None:
    # As under `accelerate launch --use_fsdp`, which has the first process alone load a checkpoint.
    environment = {**FSDP, "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    finish(tiny_recipe(photos, tmp_path / "start", max_steps=2))
    config_file = tmp_path / "start" / "config.json"
    config_file.write_text(config_file.read_text().replace('"red"', '"pink"'))  # so the head is replaced
    fields: dict[str, Any] = {"model": str(tmp_path / "start"), "model_config": {"hidden_dropout_prob": 0.0}}
    fields |= {"log_every": 1, "preprocessing": "original"}
    finish(tiny_recipe(photos, tmp_path / "one", **fields))
    config = tiny_recipe(photos, tmp_path / "two", **fields, push_to_hub="me/two", push_every=3)
    processes = start_all(partial(report_with_a_hub, config), tmp_path / "two.txt", **environment)
    printed = ends(processes, tmp_path / "two.txt")
    assert "New head" in printed and printed.count("pushed Step") == 2 and "pushed Trained model" in printed
    assert_close_run(tmp_path / "one", tmp_path / "two")


def report_with_a_hub(config: TrainConfig) -> None:
    """Train and report, with a Hub that takes a folder and prints what it was told."""
    from hf_vit.training import report

    class Hub:
        url = "https://hub"

        def __init__(self, *arguments: Any) -> None: ...

        def submit(self, write: Any, what: str) -> None:
            if dist.is_initialized():  # the others wait in a collective while the first process prepares data
                assert dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout == LONGEST_WAIT
            folder = Path(f"{config.output_dir}-pushed")
            folder.mkdir(exist_ok=True)
            write(folder)
            print("pushed", what, flush=True)

        def finish(self, timeout: float) -> bool:
            return True

    report.BackgroundPush = Hub  # type: ignore[assignment, misc]
    report.train_and_report(config, "hf-vit train", print)


@pytest.mark.parametrize(
    "fields",
    [{}, {"task": "masked_patches"}, pytest.param({"trained": "lora", "lora_rank": 2}, marks=full)],
    ids=["classification", "masked", "lora"],
)
def test_shards_compute_in_the_precision_of_the_recipe(photos: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    fields = {"model_config": WITHOUT_DROPOUT, "log_every": 1, "max_steps": 4, **fields}
    losses = {}
    for precision in ("fp32", "bf16"):
        finish(tiny_recipe(photos, tmp_path / precision, **{**fields, "precision": precision}), 2, **FSDP)
        losses[precision] = [row["loss"] for row in log_of(tmp_path / precision) if "loss" in row]
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.03)


READER = """
import sys, torch
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
print(type(model).__name__, tuple(model(pixel_values=torch.zeros(1, 3, 8, 8)).logits.shape))
"""


def test_a_run_goes_on_with_another_number_of_processes(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {
        "model_config": WITHOUT_DROPOUT,
        "ema_decay": 0.8,
        "save_every": 2,
        "log_every": 3,
        "accumulation_steps": 2,
    }
    finish(tiny_recipe(photos, tmp_path / "whole", **fields))
    config = tiny_recipe(photos, tmp_path / "parts", **fields)
    for number, environment, stop in ((2, FSDP, 2), (2, {}, 4), (1, {}, 6), (2, FSDP, None)):
        stopped = {} if stop is None else {"STOP_AT": str(stop)}
        output = tmp_path / f"parts-{stop}.txt"
        processes = start_all(config, output, number, stop_by_environment, **environment, **stopped)
        printed = ends(processes, output, 0 if stop is None else 143)
        assert ("not be bit for bit" in printed) == (stop in (6, None)), printed
    assert "Resuming on 2 processes a run that used 1." in printed
    assert_close_run(tmp_path / "whole", tmp_path / "parts")


def stop_by_environment() -> None:
    """Have a process stop behind a step; two agree on that at these steps only."""
    StopSignals.STEPS_BETWEEN_AGREEMENTS = 1
    if "STOP_AT" in os.environ:
        stop_at(int(os.environ["STOP_AT"]), pytest.MonkeyPatch(), signal.SIGTERM)


def spoil_in_one_of_two() -> None:
    if os.environ["RANK"] == "1":
        spoil_loss(pytest.MonkeyPatch(), step=4)


@pytest.mark.parametrize("environment", [pytest.param({}, marks=full), FSDP], ids=["ddp", "fsdp2"])
def test_what_is_not_finite_in_one_process_is_so_in_both(
    photos: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    config = tiny_recipe(photos, tmp_path / "skipped", on_nonfinite="skip", accumulation_steps=2)
    assert "Skipped step 5:" in finish(config, 2, spoil_in_one_of_two, **environment)
    assert [row["step"] for row in log_of(tmp_path / "skipped") if row.get("skipped")] == [5]
    processes = start_all(
        tiny_recipe(photos, tmp_path / "stopped"), tmp_path / "out.txt", 2, spoil_in_one_of_two, **environment
    )
    assert ends(processes, tmp_path / "out.txt", 2).count("of step 5 is not finite") == 2


# With a rate of 0, the first evaluation is the best, so its weights replace the last ones.
BEST: dict[str, Any] = {
    "trained": "lora", "lora_rank": 2, "sampling": "balanced", "ema_decay": 0.9, "batch_size": "auto",
    "best_metric": "auto", "learning_rate": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "environment"),
    [
        ({"streaming": True, "shuffle_buffer": 5}, {}),
        ({"task": "masked_patches"}, {}),
        ({"task": "distillation", "teacher_cache": "cache", "teacher_views": 2}, {}),
        pytest.param({"task": "lejepa", "local_views": 2}, {}, marks=full),
        (BEST, {}),
        (BEST, FSDP),
    ],
    ids=["stream", "masked", "distillation", "lejepa", "best", "best-fsdp2"],
)
def test_two_processes_with_other_kinds_go_on_exactly(
    photos: Path, tmp_path: Path, fields: dict[str, Any], environment: dict[str, str]
) -> None:
    if "streaming" in fields:
        photos = tmp_path / "shards"
        photos.mkdir()
        for number in range(4):
            colored_dataset(14, number).to_parquet(str(photos / f"train-{number}.parquet"))
        colored_dataset(21, 9).to_parquet(str(photos / "test.parquet"))
    if "teacher_cache" in fields:
        teacher = tmp_path / "teacher"
        finish(tiny_recipe(photos, teacher, max_steps=1))
        fields = {**fields, "teacher": str(teacher), "teacher_cache": str(tmp_path / "cache")}
    fields = {"batch_size": 8, "epochs": 3, **fields, "log_every": 3}
    fields |= {"epochs": 10} if fields["batch_size"] == "auto" else {}
    finish(tiny_recipe(photos, tmp_path / "whole", **fields), 2, **environment)
    config = tiny_recipe(photos, tmp_path / "parts", **fields)
    processes = start_all(config, tmp_path / "parts.txt", 2, stop_by_environment, STOP_AT="9", **environment)
    ends(processes, tmp_path / "parts.txt", 143)
    assert "Resuming from" in finish(config, 2, **environment)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    assert log_of(tmp_path / "whole")[-1]["eval_count"] == 21


def test_tensor_parallel_processes_learn_as_one(photos: Path, tmp_path: Path) -> None:
    fields = {"model_config": WITHOUT_DROPOUT, "ema_decay": 0.8, "max_grad_norm": 0.3, "epochs": 4, "log_every": 1}
    finish(tiny_recipe(photos, tmp_path / "one", **fields))
    config = tiny_recipe(photos, tmp_path / "tp", **fields)
    tensor_parallel = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"}
    finish(config, 2, allow_on_cpus, **tensor_parallel)
    assert_close_run(tmp_path / "one", tmp_path / "tp")
    assert HFViTForImageClassification.from_pretrained(tmp_path / "tp").num_parameters() > 0


def allow_on_cpus() -> None:
    """Accelerate's parallelism config asks for accelerators; what it then does needs none."""
    from accelerate.parallelism_config import ParallelismConfig

    ParallelismConfig._validate_accelerator = lambda self, accelerator: None


# ------------------------------------------------------------------------------------------------------ launchers


def launched(config: TrainConfig, tmp_path: Path, name: str, *launcher: str) -> subprocess.Popen[str]:
    recipe = tmp_path / f"{name}.yaml"
    recipe.write_text(config.to_yaml())
    command = [sys.executable, *launcher, str(ROOT / "scripts" / "train.py"), "--recipe", str(recipe)]
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(
        command, env={**os.environ, **variables}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.full
def test_two_machines_are_as_two_processes(photos: Path, tmp_path: Path) -> None:
    fields = {"model_config": WITHOUT_DROPOUT}
    finish(tiny_recipe(photos, tmp_path / "one-machine", **fields), 2)
    config = tiny_recipe(photos, tmp_path / "two-machines", **fields)
    port = str(free_port())
    machines = [
        launched(
            config, tmp_path, f"machine-{rank}", "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank",
            str(rank), "--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", port,
        )
        for rank in range(2)
    ]  # fmt: skip
    printed = [machine.communicate(timeout=120)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], printed
    assert_same_run(tmp_path / "two-machines", tmp_path / "one-machine")


def test_a_launcher_that_is_terminated_leaves_a_checkpoint(photos: Path, tmp_path: Path) -> None:
    config = tiny_recipe(photos, tmp_path / "run", epochs=2000, save_every=5000, eval_every=2000, num_workers=1)
    launcher = launched(
        config, tmp_path, "run", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"
    )
    wait_for(lambda: lines_of(tmp_path / "run") > 2)
    launcher.send_signal(signal.SIGTERM)
    printed = launcher.communicate(timeout=120)[0]
    assert launcher.returncode != 0
    assert "Stopped by SIGTERM after step" in printed and "The same command resumes the run:" in printed
    assert len(list((tmp_path / "run" / CHECKPOINTS).glob("step-*"))) == 1


def test_a_run_that_fails_ends_with_its_workers(tmp_path: Path) -> None:
    for place, image in enumerate(colored_images(40, seed=0)[0]):
        folder = tmp_path / "photos" / str(place % 2)
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{place}.png")
    for broken in (folder / f"{place}.png" for place in range(1, 19, 2)):
        broken.write_bytes(b"no image")
    config = tiny_recipe(tmp_path / "photos", tmp_path / "run", num_workers=2)
    process = launched(config, tmp_path, "run")
    printed = process.communicate(timeout=60)[0]
    assert (
        process.returncode == 2
        and "images of the training data cannot be read, more than max_broken allows" in printed
    )


# ------------------------------------------------------------------------------------------------------- compiled


def test_a_compiled_model_learns_and_resumes_as_one_that_is_not(photos: Path, tmp_path: Path) -> None:
    fields = {"model_config": WITHOUT_DROPOUT, "log_every": 1}
    finish(tiny_recipe(photos, tmp_path / "plain", **fields))
    finish(tiny_recipe(photos, tmp_path / "compiled", compile=True, **fields))
    assert_close_run(tmp_path / "plain", tmp_path / "compiled")
    config = tiny_recipe(photos, tmp_path / "parts", compile=True, **fields)
    ends([start(config, tmp_path / "parts.txt", stop_by_environment, STOP_AT="4")], tmp_path / "parts.txt", 143)
    finish(config)
    assert_same_run(tmp_path / "parts", tmp_path / "compiled")
