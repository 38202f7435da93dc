"""Python: `hf_vit.fit`, `hf_vit.train` and the model that they return, and the notebook."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny_run import colored_images

import hf_vit
from hf_vit import HFViTConfig, HFViTForImageClassification, HFViTImageProcessor, TrainedModel

NOTEBOOK = Path(__file__).resolve().parents[1] / "scripts" / "notebooks" / "your_own_pictures.ipynb"
TINY: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 16,
    "patch_size": 4,
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("encoder")
    HFViTForImageClassification(HFViTConfig(**TINY)).save_pretrained(folder)
    HFViTImageProcessor.from_preset("original", 16).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for index, (image, label) in enumerate(zip(*colored_images(24, 0), strict=True)):
        path = folder / f"color {label}" / f"{index:02d}.png"
        path.parent.mkdir(exist_ok=True)
        image.save(path)
    return folder


@pytest.fixture(scope="module")
def fitted(encoder: str, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    folder = tmp_path_factory.mktemp("fitted")
    return hf_vit.fit(
        photos, model=encoder, minutes=0, output_dir=folder / "model", cache=folder, say=lambda line: None
    )


def test_fit_returns_a_model(fitted: TrainedModel) -> None:
    assert isinstance(fitted.model, HFViTForImageClassification)
    assert fitted.labels == list(fitted.model.config.id2label.values())
    assert fitted.metrics["method"] == "probe"
    assert "predictions.png" in [path.name for path in fitted.folder.iterdir()]
    assert "data:image/png;base64," in fitted._repr_html_()


def test_predictions_are_shown_with_their_images(fitted: TrainedModel, photos: Path, tmp_path: Path) -> None:
    files = sorted(map(str, photos.rglob("*.png")))
    by_path = fitted.predict(files)
    by_glob = fitted.predict(f"{photos}/**/*.png")
    opened = fitted.predict([Image.open(file) for file in files])
    for predictions in (by_path, by_glob, opened):
        assert len(predictions) == len(files)
        assert [each.labels for each in predictions] == [each.labels for each in by_path]
    assert sorted(each.source for each in by_glob) == files
    assert repr(by_path).splitlines()[0].startswith(files[0])
    assert by_path._repr_html_().count("<img") == min(24, len(files))
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    [broken] = fitted.predict(tmp_path / "broken.jpg")
    assert broken.error is not None and "broken.jpg" in broken.error
    summary = fitted.predict(files, tmp_path / "labels.jsonl", top_k=1)
    assert summary.images == len((tmp_path / "labels.jsonl").read_text().splitlines()) == len(files)
    with pytest.raises(ValueError, match="No such file or folder"):
        fitted.predict(str(tmp_path / "none"))


def test_an_evaluation_prints_as_the_command_does(fitted: TrainedModel, photos: Path) -> None:
    evaluation = fitted.evaluate(photos)
    assert evaluation["figures"]["accuracy"] >= 0
    assert "top-1 accuracy" in repr(evaluation)


def test_train_takes_the_fields_of_a_recipe(encoder: str, photos: Path, tmp_path: Path) -> None:
    model = hf_vit.train(
        photos, model=encoder, output_dir=tmp_path / "model", max_steps=2, batch_size=4, image_size=16
    )
    assert model.metrics["steps"] == 2
    card = (tmp_path / "model" / "README.md").read_text()
    assert "hf_vit.train(" in card
    with pytest.raises(ValueError, match="learning_rate"):
        hf_vit.train(photos, model=encoder, learning_rat=1)


@pytest.mark.slow
def test_the_notebook_runs(encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    [parameters] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    parameters.source = f"pictures, encoder, minutes = None, {encoder!r}, 0"
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "my-classifier" / "model.safetensors").is_file()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output]
    assert any("<img" in output["data"].get("text/html", "") for output in shown)


def test_the_notebook_is_saved_without_outputs() -> None:
    import nbformat

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)
