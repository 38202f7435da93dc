"""A run on two machines: two network namespaces of Linux, joined by a virtual cable.

Each has its own addresses and routes, so nothing passes over the loopback interface. Creating namespaces needs root.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from process_of_a_run import ends, start_all
from tiny_run import RECIPE, log_of, save_photos, tiny_recipe

from hf_vit.system.presence import LONGEST_SILENCE
from hf_vit.training.recipe import TrainConfig
from hf_vit.training.run import CHECKPOINTS, LOG, METRICS

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
FIELDS: dict[str, Any] = {"model_config": {**RECIPE["model_config"], "hidden_dropout_prob": 0.0}}
LEFT = (LOG, METRICS, "model.safetensors", "config.json")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Machine(NamedTuple):
    """A network namespace with one interface."""

    name: str
    interface: str
    address: str

    def command(self, *words: str) -> list[str]:
        return ["ip", "netns", "exec", self.name, *words]

    def set_up(self) -> None:
        ip("link", "set", self.interface, "netns", self.name)
        ip("-n", self.name, "addr", "add", f"{self.address}/24", "dev", self.interface)
        for interface in (self.interface, "lo"):
            ip("-n", self.name, "link", "set", interface, "up")


@pytest.fixture
def machines() -> Iterator[list[Machine]]:
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the command ip")
    names = [f"hfvit{os.getpid()}{end}" for end in "ab"]  # an interface's name has at most 15 letters
    both = [Machine(name, name, f"10.77.0.{number}") for number, name in enumerate(names, start=1)]
    try:
        for machine in both:
            ip("netns", "add", machine.name)
        ip("link", "add", both[0].interface, "type", "veth", "peer", "name", both[1].interface)
        for machine in both:
            machine.set_up()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be created here: {error.stderr.strip()}")
    else:
        yield both
    finally:
        for machine in both:
            subprocess.run(["ip", "netns", "del", machine.name], capture_output=True)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_photos(tmp_path_factory.mktemp("data") / "photos")


def launch(machines: list[Machine], config: TrainConfig, recipe: Path) -> list[subprocess.Popen[str]]:
    """Start one process of a run on every machine; the first one is where they meet."""
    recipe.write_text(config.to_yaml())
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(len(machines)), "--nproc_per_node", "1"]
    place = ["--master_addr", machines[0].address, "--master_port", "29400"]
    script = [str(ROOT / "scripts" / "train.py"), "--recipe", str(recipe)]
    return [
        subprocess.Popen(
            machine.command(*launcher, "--node_rank", str(rank), *place, *script),
            env={
                **os.environ,
                **{"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"},
                **{"GLOO_SOCKET_IFNAME": machine.interface, "TP_SOCKET_IFNAME": machine.interface},
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for rank, machine in enumerate(machines)
    ]


def results(launchers: list[subprocess.Popen[str]], seconds: float = 180) -> list[tuple[int, str]]:
    """Return the exit code and the output of every machine; kill them if they take too long."""
    try:
        printed = [launcher.communicate(timeout=seconds)[0] for launcher in launchers]
    finally:
        for launcher in launchers:
            if launcher.poll() is None:
                os.killpg(launcher.pid, signal.SIGKILL)
    return [(launcher.returncode, text) for launcher, text in zip(launchers, printed, strict=True)]


def assert_same_run(parts: Path, whole: Path) -> None:
    assert log_of(parts) == log_of(whole)
    for name in LEFT:
        assert (parts / name).read_bytes() == (whole / name).read_bytes(), name


def on_one_machine(config: TrainConfig) -> None:
    output = Path(f"{config.output_dir}.txt")
    ends(start_all(config, output, 2), output)


@pytest.mark.full
def test_two_machines_give_the_run_of_one_also_over_a_slow_cable(
    machines: list[Machine], photos: Path, tmp_path: Path
) -> None:
    on_one_machine(tiny_recipe(photos, tmp_path / "one", **FIELDS))
    slow = ["tc", "qdisc", "add", "dev", machines[1].interface, "root", "netem", "delay", "5ms"]
    subprocess.run(machines[1].command(*slow), capture_output=True)  # not every kernel can delay packets
    config = tiny_recipe(photos, tmp_path / "two", **FIELDS)
    codes = results(launch(machines, config, tmp_path / "two.yaml"))
    assert [code for code, _ in codes] == [0, 0], codes
    assert_same_run(tmp_path / "two", tmp_path / "one")


def with_a_checkpoint(machines: list[Machine], photos: Path, folder: Path) -> tuple[TrainConfig, Any]:
    """Run a recipe as a whole, start it again on all machines, and wait for its first checkpoint."""
    fields = {**FIELDS, "epochs": 12, "save_every": 4}
    on_one_machine(tiny_recipe(photos, folder / "whole", **fields))
    config = tiny_recipe(photos, folder / "parts", **fields)
    launchers = launch(machines, config, folder / "parts.yaml")
    while not list((folder / "parts" / CHECKPOINTS).glob("step-*")):
        assert launchers[0].poll() is None, launchers[0].communicate()
    return config, launchers


def test_a_machine_that_dies_ends_the_run_which_resumes_on_one(
    machines: list[Machine], photos: Path, tmp_path: Path
) -> None:
    config, launchers = with_a_checkpoint(machines, photos, tmp_path)
    os.killpg(launchers[1].pid, signal.SIGKILL)
    for number in subprocess.run(
        ["ip", "netns", "pids", machines[1].name], capture_output=True, text=True, check=True
    ).stdout.split():
        os.kill(int(number), signal.SIGKILL)
    (code, printed), _ = results(launchers)
    assert code != 0 and "Traceback" not in printed.split("Root Cause")[0].split("Error:")[0]
    assert "Error:" in printed and "process" in printed, printed
    on_one_machine(config)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.full
def test_a_full_disk_of_the_first_machine_ends_both(machines: list[Machine], photos: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        config = tiny_recipe(photos, disk / "run", **FIELDS)
        codes = results(launch(machines, config, tmp_path / "full.yaml"))
    finally:
        subprocess.run(["umount", disk], check=True)
    assert all(code != 0 for code, _ in codes)
    assert "No space left" in codes[0][1] and "No space left" not in codes[1][1]


@pytest.mark.full
def test_a_cut_cable_ends_the_run_on_both_machines_and_it_resumes(
    machines: list[Machine], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cable that is cut closes no connection, and the time-out of a collective is a day."""
    monkeypatch.setenv(LONGEST_SILENCE, "6")
    config, launchers = with_a_checkpoint(machines, photos, tmp_path)
    ip("-n", machines[1].name, "link", "set", machines[1].interface, "down")
    endings = results(launchers, seconds=60)
    for code, printed in endings:
        assert code != 0 and "Saved checkpoints are intact: start all processes again" in printed, printed
    assert "gave no sign of life for 6 seconds" in endings[0][1] + endings[1][1]
    on_one_machine(config)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
