"""`hf-vit search`: neighbours in a table of features, and models that did not make it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from test_audit import invoke, scene

import hf_vit

SIZE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def save_model(folder: Path, seed: int, **fields: Any) -> str:
    torch.manual_seed(seed)
    config = hf_vit.HFViTConfig(**SIZE, image_size=16, patch_size=8, id2label={0: "cat", 1: "dog"}, **fields)
    hf_vit.HFViTForImageClassification(config).save_pretrained(folder)
    hf_vit.HFViTImageProcessor.from_preset("original", 16).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=["24", None], ids=["chosen size", "size of the model"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make images, two models, and a table of features."""
    folder = tmp_path_factory.mktemp("search")
    (folder / "photos").mkdir()
    for seed in range(8):
        scene(seed).save(folder / "photos" / f"{seed}.png")
    (folder / "photos" / "8.png").write_text("no image")
    save_model(folder / "model", 0)
    save_model(folder / "other", 1)
    words = ("predict", folder / "model", folder / "photos", "--features", "-o", folder / "index.parquet")
    ended = invoke(*words, *(["--image-size", request.param] if request.param else []))
    assert ended.exit_code == 0, ended.output
    return folder


def test_an_image_is_its_own_nearest_neighbor(place: Path) -> None:
    index = hf_vit.FeatureIndex(place / "index.parquet")
    assert len(index) == 8 and index.facts["image_size"] in ([24, 24], [16, 16]) and index.facts["pooling"] == "cls"
    files = [str(place / "photos" / f"{number}.png") for number in (3, 8, 5)]
    own, broken, other = index.search(files, k=4)
    for result, number in ((own, 3), (other, 5)):
        assert [len(result.neighbors), result.neighbors[0].row, result.error] == [4, number, None]
        scores = [each.score for each in result.neighbors]
        assert scores[0] == pytest.approx(1, abs=2e-3) and scores == sorted(scores, reverse=True)
        assert {each.label for each in result.neighbors} <= {"cat", "dog"}
    assert broken.neighbors == [] and "8.png" in str(broken.error)
    assert len(index.search(files[:1], k=99)[0].neighbors) == 8


def test_scores_are_cosines_of_the_features(place: Path) -> None:
    features = [each for each in pq.read_table(place / "index.parquet")["features"].to_pylist() if each]
    unit = np.array(features) / np.linalg.norm(features, axis=1, keepdims=True)
    index = hf_vit.FeatureIndex(place / "index.parquet")
    [found] = index.nearest(torch.tensor(features[2:3]), 8)
    expected = np.sort(unit @ unit[2])[::-1]
    np.testing.assert_allclose([each.score for each in found], expected, atol=2e-3)


def test_half_precision_takes_half_the_space_and_finds_the_same(place: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.parquet"
    words = ("predict", place / "model", place / "photos", "--features", "--half-features", "-o", half)
    index = hf_vit.FeatureIndex(place / "index.parquet")
    assert invoke(*words, "--image-size", index.facts["image_size"][0]).exit_code == 0
    assert pq.read_schema(half).field("features").type == pa.list_(pa.float16())
    query = [str(place / "photos" / "1.png")]
    both = [hf_vit.FeatureIndex(path).search(query, 8)[0].neighbors for path in (half, place / "index.parquet")]
    np.testing.assert_allclose(*([each.score for each in found] for found in both), atol=2e-3)
    ended = invoke(*words[:-1], tmp_path / "half.jsonl")
    assert ended.exit_code == 2 and "--half-features needs --features and a .parquet file" in ended.output


def test_another_model_is_refused_and_a_moved_one_is_not(place: Path, tmp_path: Path) -> None:
    query, index = place / "photos" / "1.png", place / "index.parquet"
    ended = invoke("search", index, query, "--model", place / "other")
    assert ended.exit_code == 2 and "is not the model that made" in ended.output
    (place / "model").rename(tmp_path / "moved")
    try:
        assert invoke("search", index, query).exit_code == 2
        assert invoke("search", index, query, "--model", tmp_path / "moved").exit_code == 0
    finally:
        (tmp_path / "moved").rename(place / "model")


def test_a_table_that_states_no_model_needs_one(place: Path, tmp_path: Path) -> None:
    old, query = tmp_path / "old.parquet", place / "photos" / "1.png"
    pq.write_table(pq.read_table(place / "index.parquet").replace_schema_metadata(None), old)
    ended = invoke("search", old, query)
    assert ended.exit_code == 2 and "does not state its model: name it with --model" in ended.output
    assert invoke("search", old, query, "--model", place / "model").exit_code == 0
    wide = save_model(tmp_path / "wide", 0, representation_size=48)
    ended = invoke("search", old, query, "--model", wide)
    assert ended.exit_code == 2 and "the queries have 48: use the model that made" in " ".join(ended.output.split())


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_results_as_a_table_and_as_a_page(place: Path, ending: str, tmp_path: Path) -> None:
    table, page = tmp_path / f"found{ending}", tmp_path / "found.html"
    words = ("-k", "3", "-o", table, "--html", page)
    ended = invoke("search", place / "index.parquet", place / "photos" / "2.png", place / "photos" / "8.png", *words)
    assert ended.exit_code == 0, ended.output
    assert invoke("search", place / "index.parquet", place / "photos" / "2.png", *words).exit_code == 0  # replaced
    ended = invoke("search", place / "index.parquet", place / "photos" / "2.png", place / "photos" / "8.png", *words)
    assert ended.stdout.count("1.0000") >= 1 and page.read_text().count("data:image/jpeg;base64,") == 4
    if ending == ".parquet":
        rows = pq.read_table(table).to_pylist()
    elif ending == ".jsonl":
        rows = [json.loads(line) for line in table.read_text().splitlines()]
    else:
        lines = [line.split("\t" if ending == ".tsv" else ",") for line in table.read_text().splitlines()]
        rows = [dict(zip(lines[0], line, strict=False)) for line in lines[1:]]
    assert len(rows) == 4 and [str(row["rank"]) for row in rows[:3]] == ["1", "2", "3"]
    assert rows[0]["image"].endswith("2.png") and rows[3]["error"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing.parquet", "photos/1.png"], "No such file or folder: missing.parquet"),
        (["photos/1.png", "photos/1.png"], "is not a parquet file, or is corrupt"),
        (["plain.parquet", "photos/1.png"], "has no column 'features'"),
        (["index.parquet", "photos/1.png", "-o", "found.txt"], "Expected --output to end in"),
        (["index.parquet", "photos/1.png", "--html", "nowhere/found.html"], "does not exist: create it first"),
        (["index.parquet", "photos/1.png", "-o", "index.parquet"], "is not a table of search results: choose another"),
        (["index.parquet", "empty"], "Found no images in empty"),
    ],
)
def test_errors_say_what_to_do(place: Path, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    (place / "empty").mkdir(exist_ok=True)
    pq.write_table(pa.table({"image": ["a.png"]}), "plain.parquet")
    ended = invoke("search", *words)
    assert ended.exit_code == 2 and message in " ".join(ended.output.split())
