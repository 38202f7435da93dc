"""The notebooks run from the first to the last cell, with small models; none is saved with outputs."""

from pathlib import Path
from typing import Any

import nbformat
import pytest

from hf_vit import HFViTConfig, HFViTForImageClassification, HFViTImageProcessor

FOLDER = Path(__file__).resolve().parents[1] / "scripts" / "notebooks"
# For each notebook: values of its parameters, with a tiny classifier as {model}; a file that it leaves; its figures.
NOTEBOOKS = {
    "attention_and_positions": ("model, photos = {model!r}, None", None, 4),
    "segmentation": ("scenes, steps = None, 20", "my-segmenter/model.safetensors", 1),
    "export_and_serve": ("model, photo = {model!r}, None", "my-vit.onnx", 0),
}


def read(name: str) -> Any:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = HFViTConfig(**sizes, image_size=32, patch_size=8, num_labels=3, initializer_range=0.5)
    HFViTForImageClassification(config).save_pretrained(folder)
    HFViTImageProcessor.from_preset("original", 32).save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(name: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nbclient import NotebookClient

    if name == "export_and_serve":
        for package in ("onnxruntime", "onnxscript", "fastapi", "uvicorn"):
            pytest.importorskip(package, reason=f"{package} is not installed: pip install hf-vit[onnx,serve]")
    notebook = read(name)
    [parameters] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    values, file, figures = NOTEBOOKS[name]
    parameters.source = values.format(model=model)
    if name == "export_and_serve":  # what is shown is compared: three answers are one
        notebook.cells.append(
            nbformat.v4.new_code_cell(
                "assert labels[best] == expected.labels[0] == answer['labels'][0]['label']\n"
                "assert abs(answer['labels'][0]['score'] - expected.scores[0]) < 1e-3\n"
                "assert abs(float(probabilities[0, best]) - expected.scores[0]) < 2e-2"  # resized in the graph
            )
        )
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert file is None or (tmp_path / file).is_file()
    outputs = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in data for data in outputs) == figures


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_is_saved_without_outputs(path: Path) -> None:
    notebook = read(path.stem)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)


def test_every_notebook_is_run() -> None:
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == {*NOTEBOOKS, "your_own_pictures"}  # test_trained.py
