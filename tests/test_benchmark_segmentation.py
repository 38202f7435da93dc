"""`scripts/benchmark_segmentation.py` on tiny images: every method trains, is measured and gets a row of the table."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, Features, Image
from PIL import Image as PILImage

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "benchmark_segmentation.py"
TINY = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}


def scenes(number: int, seed: int) -> Dataset:
    """Return noise with a bright square, which is the second class."""
    random = np.random.default_rng(seed)
    rows: dict[str, list[Any]] = {"image": [], "mask": []}
    for _ in range(number):
        mask, (top, left) = np.zeros((32, 48), dtype=np.uint8), random.integers(0, 16, 2)
        mask[top : top + 16, left : left + 16] = 1
        pixels = 150 * mask[..., None] + random.integers(0, 100, (32, 48, 3))
        rows["image"].append(PILImage.fromarray(pixels.astype(np.uint8)))
        rows["mask"].append(PILImage.fromarray(mask))
    return Dataset.from_dict(rows, features=Features({"image": Image(), "mask": Image()}))


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_methods_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    data, results = tmp_path / "scenes", tmp_path / "results.jsonl"
    data.mkdir()
    for split, number in {"train": 16, "validation": 4, "test": 4}.items():
        scenes(number, len(split)).to_parquet(str(data / f"{split}.parquet"))
    (data / "id2label.json").write_text(json.dumps({0: "noise", 1: "square"}))
    script = runpy.run_path(str(SCRIPT))

    def run(*words: object) -> None:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, words)])
        script["main"]()

    monkeypatch.setitem(script["main"].__globals__, "ENCODER", TINY)
    options = ["--minutes", 0.01, "--image-size", "32x48", "--width", 16, "--field", "batch_size=4"]
    for method in ("linear", "upernet", "segformer"):
        run(method, data, "--seed", 0, "--learning-rate", 1e-3, "--output", results, *options)
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [row["method"] for row in rows] == ["linear", "upernet", "segformer"]
    for row in rows:
        assert row["steps"] > 0 and 0 <= row["test_mean_iou"] <= 1 and row["validation_count"] == 4
        assert [each["label"] for each in row["classes"]["test"]] == ["noise", "square"]
    capsys.readouterr()
    run("table", results)
    assert sum(line.startswith("| from scratch |") for line in capsys.readouterr().out.splitlines()) == 3
