"""What can happen to a run ends in a result or in a sentence, and costs nothing that was saved."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_matrix import ROWS, Bench
from test_locking import held
from test_studies import tiny
from tiny_run import save_photos, tiny_recipe

from hf_vit.data.loaders import naming_dead_workers
from hf_vit.studies import run_study
from hf_vit.studies.positions import Positions
from hf_vit.training.loop import train
from hf_vit.training.run import CHECKPOINTS


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    yield Bench(tmp_path_factory.mktemp("faults"))


# The same mechanism as `sigterm`, `image_removed` and `full_disk`.
REPEATS = ("sigint", "sighup", "image_unreadable", "large_file")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.full] * (name in REPEATS)) for name in ROWS], ids=str
)
def test_nothing_is_lost(name: str, bench: Bench) -> None:
    bench.lost = 0
    ROWS[name].do(bench, ROWS[name].quick)
    assert bench.lost == 0


def test_a_run_leaves_the_folder_of_another_alone(tmp_path: Path) -> None:
    photos = save_photos(tmp_path / "photos")
    checkpoint = tmp_path / "run" / CHECKPOINTS / "step-00000003"
    checkpoint.mkdir(parents=True)
    with held(tmp_path / "run"), pytest.raises(ValueError, match="run is in use by process"):
        train(tiny_recipe(photos, tmp_path / "run", resume="never"))
    assert checkpoint.exists()
    assert train(tiny_recipe(photos, tmp_path / "run", resume="never", max_steps=1)).metrics["steps"] == 1


def test_a_study_leaves_the_folder_of_another_alone(tmp_path: Path) -> None:
    with held(tmp_path), pytest.raises(ValueError, match="is in use by process"):
        run_study(Positions(), tiny(), tmp_path, 1, "hf-vit study positions")
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_what_torch_says_of_a_dead_worker_is_a_sentence() -> None:
    said = "DataLoader worker (pid 12) is killed by signal: Killed. "
    sentence = r"\(DataLoader worker \(pid 12\) is killed by signal: Killed.\), often"
    with pytest.raises(ChildProcessError, match=sentence), naming_dead_workers():
        raise RuntimeError(f"{said}\nException raised from somewhere")
    with pytest.raises(RuntimeError, match="shapes"), naming_dead_workers():
        raise RuntimeError("shapes do not match")
