"""From a recipe to a folder that people understand: its pictures, its card, and its pushes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from hub_server import SHAPED, Hub
from huggingface_hub import ModelCard
from isolated import python
from PIL import Image
from tiny_run import save_photos, tiny_recipe
from transformers import pipeline

from hf_vit.evaluation.metrics import ImageResults
from hf_vit.hub.folder import check_folder
from hf_vit.training import report
from hf_vit.training.recipe import TrainConfig
from hf_vit.training.report import train_and_report
from hf_vit.training.views import VIEWS, describe_data

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
# What a user without the package does.
LOADS = """
import sys, torch
from transformers import pipeline

name, photo, logits = sys.argv[1:]
classify = pipeline("image-classification", name, trust_remote_code=True, device="cpu")
assert {answer["label"] for answer in classify(photo)} == {"blue", "green", "red"}
pixels = classify.preprocess(photo)["pixel_values"]
torch.save(classify.model(pixels).logits.detach(), logits)
"""
COMMAND = f"hf-vit train --data photos --token {SHAPED}"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_photos(tmp_path_factory.mktemp("data") / "photos")


def finish(photos: Path, folder: Path, **fields: Any) -> tuple[Any, list[str]]:
    said: list[str] = []
    return train_and_report(tiny_recipe(photos, folder, **fields), COMMAND, said.append), said


def test_card_of_a_classifier(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    run, said = finish(photos, folder, max_steps=4)
    metrics = run.metrics
    names = {"training.png", "confusion.png", "predictions.png", "positions.png"}
    assert {path.name for path in folder.glob("*.png")} == names
    assert names <= set(check_folder(folder)) and "timing.json" in check_folder(folder)
    table = (folder / "mistakes.csv").read_text().splitlines()
    assert table[0] == "image,label,prediction,confidence" and "mistakes.csv" not in check_folder(folder)
    assert len(table) - 1 == round((1 - metrics["eval_accuracy"]) * metrics["eval_count"])

    card = ModelCard.load(folder / "README.md")
    (entry,) = card.data.to_dict()["model-index"]
    assert entry["name"] == "tiny"
    measured = {metric["type"]: metric["value"] for metric in entry["results"][0]["metrics"]}
    assert measured == {
        name: metrics[f"eval_{name}"] for name in ("accuracy", "balanced_accuracy", "macro_f1", "loss")
    }
    assert entry["results"][0]["dataset"] == {"name": "photos", "type": "custom", "split": "test"}

    text = card.text
    assert SHAPED not in text and "- command: `hf-vit train --data photos --token TOKEN`" in text
    for row in run.predictions.per_class(["blue", "green", "red"]):
        precision = "-" if row["precision"] is None else f"{row['precision']:.1%}"
        assert f"| {row['label']} | 7 | {row['recall']:.1%} | {precision} | {row['f1']:.1%} |" in text
    assert "- Training images per class: blue 18, green 18, red 18." in text and "class_weights: balanced" not in text
    assert "The model was trained on 54 images of photos at 8x8 pixels" in text
    assert f"Its expected calibration error is {metrics['eval_calibration_error']:.1%}" in text
    for part in ("- hardware: ", "- time: ", "- versions: Python", "@inproceedings{dosovitskiy2021image", "<details>"):
        assert part in text
    recipe = text.partition("```yaml\n")[2].partition("```")[0]
    assert yaml.safe_load(recipe) == yaml.safe_load((folder / "recipe.yaml").read_text())
    assert said[0].startswith(f"Accuracy {metrics['eval_accuracy']:.2%} on 21 evaluation images (test) after 4 steps")
    assert f"Wrote to {folder}:" in " ".join(said[:-1]) and "predictions.png" in " ".join(said[:-1])
    commands = [line.strip() for line in said[-1].splitlines()[1:]]
    assert commands == [
        f"hf-vit predict {folder} IMAGES",
        f"hf-vit evaluate {folder} LABELED_IMAGES",
        f"hf-vit push {folder} YOUR_NAME/tiny",
    ]


def test_card_names_what_was_fine_tuned(tmp_path: Path) -> None:
    named = {None: None, "ViT-Ti/16": None, str(tmp_path): None, "someone/a-vit": "someone/a-vit"}
    for model, expected in named.items():
        assert report.base_model_of(TrainConfig(model=model)) == expected


def test_card_of_an_encoder_tells_how_to_go_on(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "encoder"
    run, said = finish(photos, folder, task="masked_patches", max_steps=2)
    assert run.predictions is None
    assert {path.name for path in folder.glob("*.png")} == {"training.png", "positions.png"}
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "image-feature-extraction"
    assert card.text.count("pre-trained without labels on masked patches") == 1
    assert 'hf-vit train --data FOLDER --model "encoder"' in card.text
    assert 'AutoModel.from_pretrained("encoder"' in card.text and "AutoModelForImageClassification" not in card.text
    assert f"| photos, test | loss | {run.metrics['eval_loss']:.4g} |" in card.text
    assert "## Classes" not in card.text and said[0].startswith("Loss ")

    tuned, _ = finish(photos, tmp_path / "tuned", model=str(folder), model_config={}, max_steps=1)
    assert tuned.metrics["eval_count"] == 21


def test_a_run_is_pushed_as_it_goes(photos: Path, tmp_path: Path, client: Hub, one_thread: None) -> None:
    folder = tmp_path / "tiny"
    run, said = finish(photos, folder, max_steps=6, push_to_hub="tester/tiny", push_every=2, private=True)
    assert said[-1] == f"Published at {client.url}/tester/tiny" and SHAPED not in "\n".join(said)
    messages = client.messages("tester/tiny")
    assert messages[-1] == "Trained model" and set(messages[:-1]) <= {"Step 2", "Step 4"}
    assert client.repositories["tester/tiny"].private
    files = client.files("tester/tiny")
    assert sorted(files) == sorted([".gitattributes", *check_folder(folder)])
    card = files["README.md"].decode()
    assert 'pipeline("image-classification", "tester/tiny"' in card and '"tiny"' not in card

    network = {"HF_ENDPOINT": client.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": SHAPED}
    image = Image.effect_noise((9, 9), 60).convert("RGB")
    image.save(tmp_path / "photo.png")
    pixels = run.processor(image, return_tensors="pt")["pixel_values"]
    python(LOADS, "tester/tiny", tmp_path / "photo.png", tmp_path / "logits.pt", home=tmp_path / "user", **network)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), run.model(pixels).logits)


def test_a_run_that_cannot_be_pushed_is_finished(
    photos: Path, tmp_path: Path, client: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", wrong := "hf_" + "Wrong" * 7)
    folder = tmp_path / "tiny"
    _, said = finish(photos, folder, max_steps=3, push_to_hub="tester/tiny", push_every=1)
    assert said[-1] == f"Not published. Try again:  hf-vit push {folder} tester/tiny"
    assert wrong not in "\n".join(said) and "401" in "\n".join(said)
    assert pipeline("image-classification", str(folder), device="cpu")(Image.new("RGB", (9, 9)))


# ------------------------------------------------------------------------------------------- what the card says


def predictions_of(labels: list[int], predicted: list[int], num_labels: int) -> ImageResults:
    count = len(labels)
    answers = torch.tensor(labels), torch.tensor(predicted), torch.full((count,), 0.75)
    return ImageResults(*answers, torch.zeros(count), torch.zeros(count, dtype=torch.long), num_labels)


def a_run(predictions: ImageResults, names: list[str], **fields: Any) -> Any:
    metrics = {"train_images": 1234, "broken_images": [], **fields}
    return SimpleNamespace(
        model=SimpleNamespace(config=SimpleNamespace(image_shape=(32, 48))),
        data=SimpleNamespace(name="pets", label_names=names, eval_split="held out"),
        config=SimpleNamespace(eval_fraction=0.2, split_seed=3),
        metrics=metrics,
        predictions=predictions,
        task=SimpleNamespace(problem_type="single_label_classification"),
    )


def test_limits_follow_from_the_figures() -> None:
    predictions = predictions_of([0] * 4 + [1] * 4, [0, 1, 1, 1] + [1] * 4, 3)
    limits = report._limitations(a_run(predictions, ["cat", "dog", "eel"], broken_images=["cat/1.jpg"]))
    assert limits.splitlines() == [
        "- The model was trained on 1,234 images of pets at 32x48 pixels. Expect other metrics on other images.",
        "- It predicts one of 3 classes for any image, including images that show none of them.",
        "- The accuracy on 1 class is unknown: there are no evaluation images of them.",
        "- Its worst class is cat, with an accuracy of 25.0% on 4 images.",
        "- Its most frequent mistake is to predict dog for cat: 3 of 4 images.",
        "- Its expected calibration error is 12.5% (15 bins).",
        "- It was evaluated on a random 20% of the same data (split_seed 3).",
        "- 1 unreadable image was skipped; `metrics.json` lists them.",
    ]


def test_limits_of_a_model_without_mistakes_name_no_worst() -> None:
    limits = report._limitations(a_run(predictions_of([0, 1], [0, 1], 2), ["cat", "dog"]))
    assert "worst" not in limits and "frequent mistake" not in limits and "unreadable" not in limits


def test_of_many_classes_the_best_and_the_worst_are_listed() -> None:
    names = [f"class|{number}" for number in range(60)]
    labels = [number for number in range(60) for _ in range(60)]
    predicted = [label if place < label else (label + 1) % 60 for label in range(60) for place in range(60)]
    table = VIEWS["single_label_classification"]._table(a_run(predictions_of(labels, predicted, 60), names))
    table = table.splitlines()
    assert table[0] == "The ten best and the ten worst of 60 classes." and len(table) == 2 + 2 + 20
    assert table[4].startswith("| class\\|59 | 60 | 98.3% |") and table[-1].startswith("| class\\|0 | 60 | 0.0% |")


def test_chosen_metrics_are_said_to_be_chosen() -> None:
    run = a_run(predictions_of([0, 1], [0, 1], 2), ["cat", "dog"], best_metric="macro_f1", best_step=20)
    limits = report._limitations(run)
    assert "It is the model of step 20, the best by `macro_f1` of all evaluations." in limits


def test_numbers_of_training_images() -> None:
    def data(counts: list[int] | None, **fields: Any) -> Any:
        names = [f"class {number}" for number in range(len(counts or ()))]
        kind = {"problem_type": "single_label_classification", "notes": [], **fields}
        return SimpleNamespace(label_names=names, class_counts=lambda: counts, **kind)

    assert describe_data(data(None, notes=["3 files are no images."])) == ["3 files are no images."]
    assert describe_data(data([1200, 0])) == ["Training images per class: class 0 1,200, class 1 0."]
    assert describe_data(data([2, 1], problem_type="multi_label_classification")) == [
        "Training images with each label: class 0 2, class 1 1."
    ]
    assert describe_data(data([9, 0, *range(100, 150)])) == [
        "Training images per class: class 1 0, class 0 9, class 2 100 (the fewest) to class 49 147, class 50 148, "
        "class 51 149 (the most), of 52; 1 have none."
    ]


def test_what_may_be_published_names_no_folder_of_this_machine(photos: Path, tmp_path: Path) -> None:
    finish(photos, tmp_path / "tiny", max_steps=1)
    for name in ("README.md", "recipe.yaml"):
        assert str(tmp_path) not in (tmp_path / "tiny" / name).read_text()
    assert yaml.safe_load((tmp_path / "tiny" / "recipe.yaml").read_text())["data"] == "photos"


def test_recipes_for_others_name_no_folders() -> None:
    config = TrainConfig(data=["/home/me/photos", "USER/more"], model="/home/me/vit", output_dir="run")
    public = report.for_others(config)
    assert (public.data, public.model, public.output_dir) == (["photos", "USER/more"], "vit", "run")
    assert report.for_others(TrainConfig(data="/home/me/photos")).data == "photos"
