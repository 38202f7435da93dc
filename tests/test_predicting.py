"""The table of answers: its columns, its end at one stroke, and the same rows however often it was stopped."""

import csv
import json
import os
import shutil
import signal
import sys
import tarfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import config, load_dataset
from isolated import save_tiny_classifier
from PIL import Image
from process_of_a_run import ends, start, start_all
from test_locking import held
from tiny_run import colored_dataset
from typer.testing import CliRunner

from hf_vit import HFViTForImageClassification, HFViTModel
from hf_vit.cli.main import app
from hf_vit.data.sources import Sources
from hf_vit.prediction import predict as predicting
from hf_vit.prediction import table as tables
from hf_vit.prediction.predict import Summary, predict_to_file
from hf_vit.prediction.predictor import Predictor
from hf_vit.prediction.ray import Division
from hf_vit.prediction.shards import Settings
from hf_vit.prediction.table import PredictionTable

ROOT = Path(__file__).resolve().parents[1]
SHARD = 2  # batches of a shard, so that there are several
ROWS, BROKEN = 96, ("photos/07.jpg", "43")  # of `sources`


class Killed(BaseException):
    """The end of a process that cannot do anything about it."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_classifier(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 20 photos, 35 images in one row group, 20 in small ones, and 16 and 5 in webdataset shards."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "photos").mkdir()
    random = np.random.default_rng(0)
    for number in range(20):
        pixels = random.integers(0, 256, (20 + number, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{number:02}.jpg")
    (folder / "photos" / "07.jpg").write_text("<html>")
    for name, number, row_group_size in (("long", 35, 35), ("short", 20, 3)):
        stored = colored_dataset(number, number).with_format("arrow")[:]["image"].combine_chunks()
        contents = stored.field("bytes").to_pylist()
        if name == "long":
            contents[23] = contents[23][:-50]  # row 43 of all
        pq.write_table(pa.table({"image": contents}), folder / f"{name}.parquet", row_group_size=row_group_size)
    (folder / "shards").mkdir()
    for name, number in (("0", 16), ("1", 5)):
        with tarfile.open(folder / "shards" / f"{name}.tar", "w") as tar:
            for index in range(number):
                tar.add(folder / "photos" / f"{8 + index % 12:02}.jpg", f"{index:02}.jpg")
    return folder


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predicting, "BATCHES_PER_SHARD", SHARD)


@pytest.fixture
def sources(data: Path, monkeypatch: pytest.MonkeyPatch) -> Sources:
    monkeypatch.chdir(data)
    return Sources(["photos", "long.parquet", "short.parquet", "shards"])


def settings_of(model: str, **fields: Any) -> Settings:
    return Settings(model, **{"precision": "fp32", "batch_size": 4, "top_k": 2, "has_features": True, **fields})


def predict(output: Path, sources: Sources, settings: Settings, **options: Any) -> Summary:
    summary = predict_to_file(output, sources, settings, **options)
    assert summary is not None
    assert not output.with_name(f"{output.name}.parts").exists()
    return summary


# ---------------------------------------------------------------------------------------------------------- the table


def test_a_row_an_image_in_order(model: str, sources: Sources, tmp_path: Path) -> None:
    output = tmp_path / "a.parquet"
    summary = predict(output, sources, settings_of(model))
    assert (summary.images, tuple(summary.broken)) == (ROWS, BROKEN) and summary.images_per_second > 0
    expected = list(Predictor.from_pretrained(model, "fp32", has_features=True, top_k=2)(sources.rows()))
    rows = pq.read_table(output).to_pylist()
    names = [prediction.source["path"] or str(number) for number, prediction in enumerate(expected)]
    assert [row["image"] for row in rows] == names
    for row, prediction in zip(rows, expected, strict=True):
        assert (row["labels"], row["error"]) == (prediction.labels, prediction.error)
        assert row["scores"] == pytest.approx(prediction.scores, abs=1e-5)
        if prediction.error is None:
            np.testing.assert_allclose(row["features"], prediction.features, atol=1e-5)
        else:
            assert row["features"] is None and row["labels"] == [] and row["scores"] == []


def test_others_read_it(model: str, sources: Sources, tmp_path: Path) -> None:
    table, lines = tmp_path / "a.parquet", tmp_path / "a.jsonl"
    for output in (table, lines):
        predict(output, sources, settings_of(model))
    rows = pq.read_table(table).to_pylist()
    assert [json.loads(line) for line in lines.read_text().splitlines()] == rows
    frame = pd.read_parquet(table)
    assert frame["labels"].map(len).tolist() == [len(row["labels"]) for row in rows]
    loaded = load_dataset("parquet", data_files=str(table), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.to_list() == rows
    assert str(loaded.features["features"]) == "List(Value('float32'))"


@pytest.mark.parametrize("kind", ["whole", "broken"])
def test_types_depend_on_nothing_that_was_read(model: str, data: Path, tmp_path: Path, kind: str) -> None:
    source = data / "photos" / {"whole": "01.jpg", "broken": "07.jpg"}[kind]
    for has_features in (False, True):
        output = tmp_path / f"{has_features}.parquet"
        predict(output, Sources([str(source)]), settings_of(model, has_features=has_features))
        assert pq.read_schema(output).equals(tables.schema_of(has_features))
    assert pq.read_schema(output).names == ["image", "labels", "scores", "error", "features"]


def test_an_encoder_gives_features_alone(tiny_config: Any, data: Path, tmp_path: Path) -> None:
    HFViTModel(tiny_config()).save_pretrained(tmp_path / "encoder")
    source, settings = Sources([str(data / "photos" / "01.jpg")]), settings_of(str(tmp_path / "encoder"))
    predict(tmp_path / "a.parquet", source, settings)
    [row] = pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert row["labels"] == [] and row["error"] is None and len(row["features"]) == 32


def test_names_that_are_no_text_are_written_too(model: str, data: Path, tmp_path: Path) -> None:
    odd = os.fsdecode(bytes(tmp_path / "odd") + b"\xff.jpg")
    Path(odd).write_bytes((data / "photos" / "01.jpg").read_bytes())
    assert predict(tmp_path / "a.parquet", Sources([odd]), settings_of(model)).broken == []
    [row] = pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert row["image"].endswith("odd\\udcff.jpg")


# ------------------------------------------------------------------------------------------------------ stopped


def stop_at(calls: int, target: Any, name: str, monkeypatch: pytest.MonkeyPatch, is_before: bool) -> None:
    """Have the process end at a call of something, before or behind it."""
    whole, number = getattr(target, name), 0

    def wrapped(*arguments: Any, **options: Any) -> Any:
        nonlocal number
        number += 1
        if number == calls and is_before:
            raise Killed
        result = whole(*arguments, **options)
        if number == calls:
            raise Killed
        return result

    monkeypatch.setattr(target, name, wrapped)


KILLS: dict[str, tuple[Any, str, int]] = {
    "writing the plan": (Path, "rename", 1),
    "writing the first shard": (tables.pq, "write_table", 1),
    "syncing the third shard": (tables, "sync", 4),
    "naming the fifth shard": (Path, "rename", 6),
    "joining": (tables.pq, "read_table", 3),
    "naming the last shard": (Path, "rename", 15),
    "naming the file": (Path, "rename", 16),
    "removing the plan": (Path, "unlink", 1),
    "removing the shards": (Path, "unlink", 4),
}


@pytest.mark.parametrize("is_before", [True, False], ids=["before", "behind"])
@pytest.mark.parametrize("where", KILLS)
def test_killed_anywhere_it_goes_on(
    where: str, is_before: bool, model: str, sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts, settings = tmp_path / "whole.parquet", tmp_path / "parts.parquet", settings_of(model, workers=1)
    predict(whole, sources, settings)
    with monkeypatch.context() as patch:
        target, name, calls = KILLS[where]
        stop_at(calls, target, name, patch, is_before)
        with pytest.raises(Killed):
            predict_to_file(parts, sources, settings)
    folder = Path(f"{parts}.parts")
    finished = sum(pq.read_metadata(path).num_rows for path in folder.glob("0*.shard")) if folder.exists() else 0
    answered: list[int] = []
    answer = Predictor._predict

    def counted(self: Predictor, predictions: list[Any], pixels: Any) -> Any:
        answered.append(len(predictions))
        return answer(self, predictions, pixels)

    monkeypatch.setattr(Predictor, "_predict", counted)
    if where.startswith("removing") and not (folder / tables.PLAN).exists():  # all was done: it is made anew
        finished = 0
    summary = predict(parts, sources, settings)
    assert (summary.images, tuple(summary.broken)) == (ROWS, BROKEN)
    assert sum(answered) == ROWS - finished
    assert parts.read_bytes() == whole.read_bytes()


def test_a_table_may_be_made_within_its_source(
    model: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("00.jpg", "01.jpg", "02.jpg"):
        (tmp_path / name).write_bytes((data / "photos" / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    for calls, is_before in ((2, False), (1, True)):  # behind the first shard, and before the file has its name
        with monkeypatch.context() as patch:
            stop_at(calls, Path, "rename", patch, is_before)
            with pytest.raises(Killed):
                predict_to_file(Path("a.parquet"), Sources(["."]), settings_of(model))
    assert predict(Path("a.parquet"), Sources(["."]), settings_of(model)).images == 3


def test_what_was_made_from_something_else_is_not_gone_on_with(
    model: str, sources: Sources, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, settings = tmp_path / "a.parquet", settings_of(model)

    def stop(monkeypatch: pytest.MonkeyPatch) -> None:
        stop_at(4, Path, "rename", monkeypatch, is_before=False)
        with pytest.raises(Killed):
            predict_to_file(output, sources, settings)

    with monkeypatch.context() as patch:
        stop(patch)
    other = tmp_path / "other"
    whole = HFViTForImageClassification.from_pretrained(model)
    whole.classifier.bias.data[0] += 1
    whole.save_pretrained(other)
    for different, said in (
        ((sources, settings_of(model, top_k=3)), r"\(top-k\)"),
        ((sources, settings_of(model, has_features=False)), r"\(features\)"),
        ((sources, settings_of(str(other))), r"\(model\)"),
        ((sources, settings_of(model, image_size=(16, 16))), r"\(model\)"),
        ((sources, settings_of(model, batch_size=2)), r"\(sources or batch size\)"),
        ((Sources(["photos", "short.parquet"]), settings), r"\(sources or batch size\)"),
    ):
        with pytest.raises(
            ValueError, match=f"were made with different settings {said}: use the same settings, choose"
        ):
            predict_to_file(output, *different)
    assert len(list(Path(f"{output}.parts").glob("0*"))) == 3
    summary = predict(output, Sources(["photos"]), settings, restart=True)
    assert summary.images == 20 == pq.read_metadata(output).num_rows
    assert predict(output, sources, settings).images == ROWS == pq.read_metadata(output).num_rows  # replaces it


def test_sources_that_change_meanwhile_end_it(
    model: str, sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = PredictionTable.write

    def change(self: PredictionTable, *arguments: Any) -> None:
        write(self, *arguments)
        os.utime("short.parquet")

    monkeypatch.setattr(PredictionTable, "write", change)
    with pytest.raises(ValueError, match="The sources changed during the run: start again with --restart"):
        predict_to_file(tmp_path / "a.parquet", sources, settings_of(model, workers=1))
    assert not (tmp_path / "a.parquet").exists()


def test_lost_shards_are_not_passed_over(
    model: str, sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    join = PredictionTable.join

    def lose(self: PredictionTable, parts: int) -> Any:
        next(self.folder.glob("00000003-000002*")).unlink()
        return join(self, parts)

    with monkeypatch.context() as patch:
        patch.setattr(PredictionTable, "join", lose)
        with pytest.raises(
            ValueError, match=r"lacks shards of 1 of \d+ parts: make sure that all processes see the same folder"
        ):
            predict_to_file(tmp_path / "a.parquet", sources, settings_of(model))
    assert predict(tmp_path / "a.parquet", sources, settings_of(model)).images == ROWS


def test_a_full_disk_is_said(model: str, sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, calls = pq.write_table, iter(range(100))

    def full(*arguments: Any) -> None:
        if next(calls) == 2:
            raise OSError(28, "No space left on device")
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(tables.pq, "write_table", full)
        with pytest.raises(OSError, match="No space left for predictions; finished shards are intact"):
            predict_to_file(tmp_path / "a.parquet", sources, settings_of(model))
    assert predict(tmp_path / "a.parquet", sources, settings_of(model)).images == ROWS


def test_what_a_user_has_put_there_stays(model: str, sources: Sources, tmp_path: Path) -> None:
    mine = tmp_path / "a.parquet.parts" / "mine.parquet"
    mine.parent.mkdir()
    mine.write_text("mine")
    assert predict_to_file(tmp_path / "a.parquet", sources, settings_of(model), restart=True) is not None
    assert list(mine.parent.iterdir()) == [mine] and mine.read_text() == "mine"


def test_two_at_once_are_refused(model: str, sources: Sources, tmp_path: Path) -> None:
    with (
        held(tmp_path / "a.parquet.parts"),
        pytest.raises(ValueError, match=r"a\.parquet\.parts is in use by process"),
    ):
        predict_to_file(tmp_path / "a.parquet", sources, settings_of(model))


# -------------------------------------------------------------------------------------------------- the command


def run(model: str, *arguments: object) -> Any:
    return CliRunner().invoke(app, ["predict", model, *map(str, arguments)])


def test_the_last_line_is_json(model: str, sources: Sources, tmp_path: Path) -> None:
    done = run(model, *sources.words, "-o", tmp_path / "a.parquet", "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["images"] == ROWS and tuple(said["broken"]) == BROKEN and said["images_per_second"] > 0
    assert "images/s" not in done.stderr  # nobody looks
    done = run(model, "photos", "--json")
    assert json.loads(done.stdout)["broken"] == list(BROKEN[:1])
    done = run(model, "photos", "--top-k", "1")
    assert len(done.stdout.splitlines()) == 20 and "photos/00.jpg  LABEL_" in done.stdout
    assert "20 images, " in done.stderr and ", 1 unreadable" in done.stderr


def test_a_table_for_spreadsheets_has_a_row_per_image(model: str, tmp_path: Path, sources: Sources) -> None:
    for ending, delimiter in ((".csv", ","), (".tsv", "\t")):
        file = tmp_path / f"labels{ending}"
        done = run(model, "photos", "--top-k", "2", "-o", file)
        assert done.exit_code == 0 and done.stdout == f"Wrote {file}\n", done.output
        with file.open(newline="") as lines:
            header, *rows = csv.reader(lines, delimiter=delimiter)
        assert header == ["image", "label", "score", "label_2", "score_2", "error"] and len(rows) == 20
        assert rows[0][0] == "photos/00.jpg" and rows[0][1].startswith("LABEL_") and 0 < float(rows[0][2]) <= 1
        assert [row[0] for row in rows if row[-1]] == list(BROKEN[:1])


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_only_a_table_of_predictions_is_replaced(model: str, tmp_path: Path, sources: Sources, ending: str) -> None:
    mine = tmp_path / f"mine{ending}"
    mine.write_text("path,label\na.jpg,cat\n")
    done = run(model, "photos", "-o", mine)
    assert done.exit_code == 2 and "exists and is not a table of predictions: choose another --output" in done.stderr
    assert mine.read_text() == "path,label\na.jpg,cat\n"
    for _ in range(2):
        assert run(model, "photos", "-o", tmp_path / f"labels{ending}").exit_code == 0


def test_an_archive_and_a_table_of_paths_are_read_as_in_training(
    model: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(data / "photos", "photos")
    for junk in (".DS_Store", "._00.jpg", "Thumbs.db"):
        Path("photos", junk).write_bytes(b"junk")
    shutil.make_archive("zipped", "zip", ".", "photos")
    Path("photos/table.csv").write_text("path,note\n00.jpg,a\nnone.jpg,b\n01.jpg,c\n")
    alone = run(model, "photos", "--top-k", "1").stdout.splitlines()
    of_archive = run(model, "zipped.zip", "--top-k", "1").stdout.splitlines()
    assert [line[:24] for line in of_archive] == [f"zipped.zip/{line[:13]}" for line in alone]
    of_table = run(model, "photos/table.csv", "--top-k", "1").stdout.splitlines()
    assert of_table[0] == alone[0] and of_table[2] == alone[1] and "photos/none.jpg" in of_table[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-o", "a.csv", "--features"], "Features are written to .parquet or .jsonl files only; got --output a.csv."),
        (["-o", "a"], "Expected --output to end in one of .csv, .tsv, .jsonl, .parquet; got a."),
        (["-o", "none/a.parquet"], "The folder of --output none/a.parquet does not exist: create it first"),
        (["--features"], "Expected a file to write to, since you use --features: add --output labels.parquet"),
        (["--engine", "ray"], "Expected a file to write to, since you use --engine ray"),
        (["--restart"], "Expected a file to write to, since you use --restart"),
        (["--split", "train"], "Image files take no --split: remove the option"),
        (["missing.jpg"], "No such file or folder: missing.jpg"),
    ],
)
def test_what_a_user_can_mend_is_a_sentence(arguments: list[str], said: str, model: str, sources: Sources) -> None:
    before = sorted(Path().rglob("*"))
    done = run(model, "photos", *arguments)
    assert done.exit_code == 2 and f"Error: {said}" in done.stderr
    assert sorted(Path().rglob("*")) == before


def test_nothing_to_read_leaves_nothing(model: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = run(model, tmp_path / "empty", "-o", tmp_path / "a.parquet")
    assert done.exit_code == 2 and "Found no images in" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_without_ray_its_install_command_is_said(
    model: str, sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    done = run(model, "photos", "-o", tmp_path / "a.parquet", "--engine", "ray")
    assert done.exit_code == 2 and 'pip install "hf-vit[ray]"' in done.stderr


def test_a_stopped_one_says_how_to_go_on(
    model: str, sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, output = PredictionTable.write, tmp_path / "a.parquet"

    def stop(self: PredictionTable, *arguments: Any) -> None:
        write(self, *arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(PredictionTable, "write", stop)
    monkeypatch.setattr(sys, "argv", ["hf-vit", "predict", "m", "photos", "-o", "a.parquet", "--restart"])
    done = run(model, "photos", "-o", output, "--restart")
    assert done.exit_code == 143
    assert f"Stopped by SIGTERM; finished shards are in {output}.parts.\n" in done.stderr
    assert "This command, without --restart, resumes the run:  hf-vit predict m photos -o a.parquet\n" in done.stderr


# ------------------------------------------------------------------------------------------------- many processes


def prepare_slow(seconds: float = 0.05) -> None:
    """Cut small shards, and take longer for each."""
    predicting.BATCHES_PER_SHARD = SHARD
    write = PredictionTable.write

    def slowly(self: PredictionTable, *arguments: Any) -> None:
        write(self, *arguments)
        time.sleep(seconds)

    PredictionTable.write = slowly  # type: ignore[method-assign]


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.002)


def shards_of(output: Path) -> int:
    return len(list(Path(f"{output}.parts").glob("0*.shard")))


@pytest.mark.slow
@pytest.mark.parametrize("number", [pytest.param(1, marks=pytest.mark.full), 2])
def test_killed_processes_go_on_to_the_same_table(number: int, model: str, sources: Sources, tmp_path: Path) -> None:
    whole, output = tmp_path / "whole.parquet", tmp_path / "parts.parquet"
    predict(whole, sources, settings_of(model, workers=1))
    work, printed = partial(predict_to_file, output, sources, settings_of(model)), tmp_path / "printed.txt"
    for shards in (2, 5):
        processes = (
            [start(work, printed, prepare_slow)] if number == 1 else start_all(work, printed, number, prepare_slow)
        )
        wait_for(lambda shards=shards: shards_of(output) >= shards)
        for process in processes:
            process.kill()
            process.join()
        assert not output.exists()
    before = shards_of(output)
    processes = [start(work, printed, prepare_slow)] if number == 1 else start_all(work, printed, number, prepare_slow)
    ends(processes, printed)
    assert before >= 5 and output.read_bytes() == whole.read_bytes()


@pytest.mark.slow
def test_a_lost_process_ends_the_others_and_the_rest_is_done_later(
    model: str, sources: Sources, tmp_path: Path
) -> None:
    whole, output, printed = (tmp_path / name for name in ("whole.parquet", "parts.parquet", "printed.txt"))
    predict(whole, sources, settings_of(model, workers=1))
    work = partial(predict_to_file, output, sources, settings_of(model))
    first, second = start_all(work, printed, 2, prepare_slow)
    wait_for(lambda: shards_of(output) >= 2)
    second.kill()
    assert "The process of rank 1 died before the run" in ends([first], printed, 2)
    ends([start(work, printed, prepare_slow)], printed)  # one alone takes what both had to do
    assert output.read_bytes() == whole.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "code"),
    [
        (signal.SIGINT, 130),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.full),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.full),
    ],
)
def test_signals_end_it(signum: int, code: int, model: str, sources: Sources, tmp_path: Path) -> None:
    output, printed = tmp_path / "a.parquet", tmp_path / "printed.txt"
    process = start(partial(predict_to_file, output, sources, settings_of(model)), printed, prepare_slow)
    wait_for(lambda: shards_of(output) >= 1)
    os.kill(process.pid, signum)
    said = ends([process], printed, code)
    assert f"Stopped by {signal.Signals(signum).name}; finished shards are in" in said
    assert "resumes the run:" in said and not output.exists()
    assert predict(output, sources, settings_of(model)).images == ROWS


@pytest.mark.slow
def test_ray_gives_the_same_table(model: str, sources: Sources, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    predict(tmp_path / "processes.parquet", sources, settings_of(model))
    work = partial(predict_to_file, tmp_path / "ray.parquet", sources, settings_of(model, workers=2), engine="ray")
    process = start(work, tmp_path / "printed.txt", prepare_slow, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    ends([process], tmp_path / "printed.txt", seconds=300)
    assert (tmp_path / "ray.parquet").read_bytes() == (tmp_path / "processes.parquet").read_bytes()


@pytest.mark.parametrize(
    ("nodes", "actors", "expected"),
    [
        ([{"CPU": 8}, {"CPU": 4}], None, ("cpu", 12, 1)),
        ([{"CPU": 8}], 3, ("cpu", 3, 1)),
        ([{"CPU": 16, "GPU": 4}, {"CPU": 64}, {"CPU": 6, "GPU": 1}], None, ("cuda", 5, 4)),
        ([{"CPU": 2, "GPU": 8}], None, ("cuda", 8, 1)),
    ],
)
def test_the_cores_of_a_machine_read_for_its_gpus(nodes: Any, actors: int | None, expected: tuple) -> None:
    assert Division.of(nodes, actors) == expected
