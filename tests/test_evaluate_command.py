"""`hf-vit evaluate`: a checkpoint and labelled images in, figures out; what does not fit together, a sentence."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from tiny_run import COLORS, colored_dataset, save_photos
from typer.testing import CliRunner

from hf_vit import HFViTConfig, HFViTForImageClassification, HFViTForMaskedImageModeling, HFViTImageProcessor
from hf_vit.cli.main import app
from hf_vit.data.images import EvaluationImages
from hf_vit.data.labelled import METRICS, RECIPE
from hf_vit.evaluation.labels import match_labels
from hf_vit.training.recipe import TrainConfig

runner = CliRunner()
ROOT = Path(__file__).resolve().parents[1]
TIMES = ("images_per_second", "seconds")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_photos(tmp_path_factory.mktemp("data") / "photos")


def save_model(folder: Path, names: list[str], model_class: Any = HFViTForImageClassification, **fields: Any) -> Path:
    """Save a model that sorts images by how red, green or blue they are, as far as its random encoder lets it."""
    torch.manual_seed(0)
    config = HFViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        initializer_range=0.3,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
        **fields,
    )
    model_class(config).save_pretrained(folder)
    HFViTImageProcessor.from_preset("original", (8, 8)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny", list(COLORS))


def evaluate(*arguments: object, exit_code: int = 0) -> str:
    result = runner.invoke(app, ["evaluate", *map(str, arguments)])
    assert result.exit_code == exit_code, result.output
    return result.output


def measure(tmp_path: Path, *arguments: object) -> dict[str, Any]:
    evaluate(*arguments, "--json", tmp_path / "measured.json")
    return json.loads((tmp_path / "measured.json").read_text())


def without_times(measured: Any) -> Any:
    if not isinstance(measured, dict):
        return measured
    return {name: without_times(value) for name, value in measured.items() if name not in TIMES}


def test_everything_is_measured_and_said(model: Path, photos: Path, tmp_path: Path) -> None:
    probes = ("--probe", "linear", "--probe", "knn", "--probe", "few-shot")
    file = tmp_path / "measured.json"
    output = evaluate(model, photos, *probes, "--json", file, "--precision", "fp32")
    measured = json.loads(file.read_text())
    dataset = colored_dataset(21, 1)
    classifier = HFViTForImageClassification.from_pretrained(model).eval()
    processor = HFViTImageProcessor.from_pretrained(model)
    with torch.no_grad():
        logits = classifier(**processor(dataset["image"][:], return_tensors="pt")).logits
    labels = torch.tensor(dataset["label"][:])
    figures = measured["figures"]
    assert figures["accuracy"] == (logits.argmax(-1) == labels).double().mean().item() and figures["count"] == 21
    assert figures["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), abs=1e-5)
    assert sum(cell["count"] for cell in measured["confusion"]) == 21
    assert [row["label"] for row in measured["per_class"]] == measured["labels"] == list(COLORS)
    assert measured["split"] == "test" and measured["model"] == "tiny" and measured["data"] == "photos"
    assert measured["probes"]["linear"]["accuracy"] == 1 and measured["probes"]["knn"]["train_images"] == 54
    assert list(measured["probes"]["few-shot"]["shots"]) == ["1", "5", "10"]
    assert all(pace > 0 for pace in measured["images_per_second"].values())
    assert "torch" in measured["versions"] and measured["hardware"] and measured["precision"] == "fp32"
    for words in (
        "tiny on photos, split test: 21 images of 8x8 pixels",
        f"top-1 accuracy  {figures['accuracy']:.2%}",
        "linear probe  100.00%",
        "20-NN",
        "10-shot",
        "'blue' has 18 training images",
        "with image decoding",
        "  green",
    ):
        assert words in output, (words, output)
    assert "top-5" not in output and "Note:" not in output


def test_neither_batches_nor_workers_change_the_figures(model: Path, photos: Path, tmp_path: Path) -> None:
    one = measure(tmp_path, model, photos, "--batch-size", 4, "--num-workers", 1)
    other = measure(tmp_path, model, photos)
    assert other["figures"] == pytest.approx(one["figures"], abs=1e-6)
    assert other["per_class"] == one["per_class"] and other["confusion"] == one["confusion"]
    assert without_times(measure(tmp_path, model, photos)) == without_times(other)


def test_another_size_is_measured_at_that_size(model: Path, photos: Path, tmp_path: Path) -> None:
    assert measure(tmp_path, model, photos, "--image-size", "12x16")["image_size"] == [12, 16]


def test_classes_in_another_order_are_matched_by_name(model: Path, photos: Path, tmp_path: Path) -> None:
    names = ["red", "yellow", "blue", "green", "black", "white"]
    other = save_model(tmp_path / "other", names)
    heads = [HFViTForImageClassification.from_pretrained(folder) for folder in (model, other)]
    with torch.no_grad():
        for parameter, theirs in zip(*(head.classifier.parameters() for head in heads), strict=True):
            theirs.fill_(-100) if theirs.ndim == 1 else theirs.zero_()
            theirs[[names.index(name) for name in COLORS]] = parameter
    heads[1].save_pretrained(other)
    expected, measured = measure(tmp_path, model, photos), measure(tmp_path, other, photos)
    assert measured["figures"].pop("top5_accuracy") == 1
    assert measured["figures"] == pytest.approx(expected["figures"])
    assert [row for row in measured["per_class"] if row["count"]] != expected["per_class"]  # the model's order
    for row in expected["per_class"]:
        assert row in measured["per_class"]
    assert "3 of the 6 classes" in measured["note"]
    assert "yellow" not in evaluate(other, photos).split("class\n")[1]


def test_a_split_is_what_was_asked_for(model: Path, photos: Path, tmp_path: Path) -> None:
    assert measure(tmp_path, model, photos, "--split", "train")["figures"]["count"] == 54
    DatasetDict(train=colored_dataset(30, 0)).save_to_disk(tmp_path / "alone")
    assert "all images: 30 images of" in evaluate(model, tmp_path / "alone")
    assert "Unknown split 'dev'" in evaluate(model, photos, "--split", "dev", exit_code=2)
    assert "Probes are fitted on" in evaluate(model, photos, "--split", "train", "--probe", "knn", exit_code=2)


def test_what_is_only_for_testing_is_measured_whole(model: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    colored_dataset(20, 0).to_parquet(str(tmp_path / "data" / "test.parquet"))
    assert "split test: 20 images" in evaluate(model, tmp_path / "data")
    colored_dataset(10, 1).to_parquet(str(tmp_path / "data" / "validation.parquet"))
    assert "split validation: 10 images" in evaluate(model, tmp_path / "data")
    assert "split test: 20 images" in evaluate(model, tmp_path / "data", "--split", "test")
    assert "Cannot infer train_split" in evaluate(model, tmp_path / "data", "--probe", "knn", exit_code=2)


def test_what_a_run_held_out_is_held_out(tmp_path: Path) -> None:
    DatasetDict(train=colored_dataset(40, 0)).save_to_disk(tmp_path / "alone")
    model = save_model(tmp_path / "tiny", list(COLORS))
    for fields, count, words in (
        ({"eval_fraction": 0.1, "split_seed": 3}, 3, "held-out split: 3 of 40 images of"),
        (
            {"streaming": True},
            9,
            "The model was trained on a stream, which holds out other images: it may have seen some of these.",
        ),
    ):
        (model / RECIPE).write_text(TrainConfig(data="alone", **fields).to_yaml())
        assert measure(tmp_path, model, tmp_path / "alone")["images"] == count
        assert words in evaluate(model, tmp_path / "alone")


def test_other_data_than_that_of_the_run_is_measured_whole(model: Path, tmp_path: Path) -> None:
    DatasetDict(train=colored_dataset(40, 0)).save_to_disk(tmp_path / "new")
    (model / RECIPE).write_text(TrainConfig(data="somewhere/photos").to_yaml())
    output = evaluate(model, tmp_path / "new")
    assert "all images: 40 images" in output
    assert "All images are evaluated, since the model was trained on other data (photos)." in output
    (model / RECIPE).write_text(TrainConfig(data="somewhere/new").to_yaml())
    assert "held-out split: 9 of 40 images" in evaluate(model, tmp_path / "new")
    assert "trained on these images, or on most" in evaluate(model, tmp_path / "new", "--split", "train")
    (model / METRICS).write_text('{"train_images": 31, "eval_count": 9}')
    assert "held-out split: 9 of 40 images" in evaluate(model, tmp_path / "new")
    (model / METRICS).write_text('{"train_images": 30, "eval_count": 9}')  # of another data set of this name
    output = evaluate(model, tmp_path / "new")
    assert "all images: 40 images" in output and "there are not as many as in the training data (new)" in output
    (model / METRICS).unlink()
    (model / RECIPE).unlink()


def test_a_few_images_are_measured_whole(model: Path, tmp_path: Path) -> None:
    """Two images of other data cannot be divided, and need not be; a table is called by the name of its folder."""
    (model / RECIPE).write_text(TrainConfig(data="somewhere/photos").to_yaml())
    (tmp_path / "few").mkdir()
    rows = zip(colored_dataset(3, 0)["image"], COLORS, strict=True)
    for image, name in rows:
        image.save(tmp_path / "few" / f"{name}.png")
    (tmp_path / "few" / "labels.csv").write_text("file,label\n" + "".join(f"{c}.png,{c}\n" for c in list(COLORS)[:2]))
    for source in ("few", "few/labels.csv"):
        assert "tiny on few, all images: 2 images of 8x8 pixels" in evaluate(model, tmp_path / source)
    (model / RECIPE).unlink()


def test_broken_images_are_left_out_and_named(model: Path, tmp_path: Path) -> None:
    for index, image in enumerate(colored_dataset(30, 0)["image"]):
        file = tmp_path / "photos" / list(COLORS)[index % 3] / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file)
        if index == 3:
            file.write_bytes(file.read_bytes()[:40])
    output = evaluate(model, tmp_path / "photos", "--split", "train")
    assert "29 images of" in output and "Skipped 1 unreadable image: blue/3.png." in output


def test_images_of_classes_that_the_model_lacks_are_left_out(photos: Path, tmp_path: Path) -> None:
    output = evaluate(save_model(tmp_path / "other", ["Blue", "cyan", "red"]), photos)
    assert "14 images of" in output and "Note: The model lacks 1 of the data's 3 classes (green)." in output
    assert "Left out: 7 of 21 images, which are of these classes." in output


def test_classes_that_do_not_match_are_an_error_or_leave_the_probes(photos: Path, tmp_path: Path) -> None:
    stranger = save_model(tmp_path / "stranger", ["azure", "cyan", "magenta"])
    output = evaluate(stranger, photos, exit_code=2)
    assert output.startswith("Error: The model lacks 3 of the data's 3 classes (blue, green, red); it has 3 classes")
    assert "--probe" in output and "Traceback" not in output
    encoder = save_model(tmp_path / "encoder", ["a"], HFViTForMaskedImageModeling)
    assert "no classifier" in evaluate(encoder, photos, exit_code=2)
    for folder in (stranger, encoder):
        output = evaluate(folder, photos, "--probe", "linear")
        assert "Only probes are run." in output and "linear probe" in output and "top-1" not in output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--json", "nowhere/figures.json"), "The folder nowhere for --json does not exist"),
        (("--probe", "quadratic"), "Unknown probe quadratic: choose one of linear, knn, few-shot"),
        (("--image-size", "big"), "Expected pixels as H or HxW for --image-size"),
        (("--image-size", "9"), "9"),
        (("--label-column", "colour"), "Unknown label_column 'colour'"),
    ],
)
def test_what_cannot_be_done_is_a_line(model: Path, photos: Path, arguments: tuple[str, ...], words: str) -> None:
    output = evaluate(model, photos, *arguments, exit_code=2)
    assert words in output and output.startswith("Error: ") and output.count("\n") == 1


def test_images_without_labels_are_refused(model: Path, photos: Path, tmp_path: Path) -> None:
    train = colored_dataset(9, 0)
    hidden = Dataset.from_dict({"image": train["image"][:], "label": [-1] * 9}, features=train.features)
    DatasetDict(train=train, test=hidden).save_to_disk(tmp_path / "hidden")
    assert "9 of 9 images have no label" in evaluate(model, tmp_path / "hidden", exit_code=2)


def test_matching_by_position_is_said() -> None:
    numbers = ["LABEL_0", "LABEL_1", "LABEL_2"]
    classes, sentence = match_labels(numbers, ["a", "b", "c"])
    assert classes == [0, 1, 2] and "by position: LABEL_0 is a, ..., LABEL_2 is c" in sentence
    assert match_labels(["a", "b", "c"], ["0", "1", "2"])[0] == [0, 1, 2]
    by_text = sorted(map(str, range(12)))  # 0, 1, 10, 11, 2, ...
    for of_model in ([f"LABEL_{index}" for index in range(12)], [f"n{index}" for index in range(12)]):
        assert match_labels(of_model, by_text)[0] == [int(name) for name in by_text]
    assert match_labels([f"LABEL_{index}" for index in range(12)], ["3", "11"])[0] == [3, 11]
    classes, sentence = match_labels(["cat", "dog"], ["Dog", "cat"])
    assert classes == [1, 0] and "Without regard to case, 'Dog' is 'dog'." in sentence
    assert match_labels(["cat", "dog"], ["ant", "dog"]) == (
        [None, 1],
        "The model lacks 1 of the data's 2 classes (ant).",
    )
    assert match_labels(numbers, ["a", "b"])[0] is None
    assert match_labels(["a", "b"], ["1", "2"])[0] is None  # names that happen to be digits
    assert match_labels(["1", "0"], ["0", "1"])[0] == [1, 0]
    assert match_labels(["crane", "owl", "crane"], ["owl", "crane"])[0] is None  # which of both?
    classes, sentence = match_labels(["crane", "owl", "crane"], ["crane", "owl", "crane bird"])
    assert classes == [0, 1, 2] and sentence == "Classes of the model that share a name are matched by position."


def test_of_many_classes_the_worst_are_printed(tmp_path: Path) -> None:
    names = [f"kind {index:02}" for index in range(30)]
    rows: dict[str, Any] = {"image": colored_dataset(60, 0)["image"][:], "label": [names[i % 30] for i in range(60)]}
    features = colored_dataset(1, 0).features.copy()
    features["label"] = features["label"].__class__(names=names)
    Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "kinds")
    output = evaluate(save_model(tmp_path / "model", names), tmp_path / "kinds", "--split", "train")
    assert "top-5" in output and "the 10 worst of 30 classes; --json writes all." in output
    assert output.count("kind ") == 10


def test_a_killed_process_that_loads_is_named(model: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def end(images: EvaluationImages, image: Any) -> torch.Tensor:
        assert os.getpid() != this
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("unreachable")

    this = os.getpid()
    monkeypatch.setattr(EvaluationImages, "prepare", end)
    output = evaluate(model, photos, "--num-workers", 1, exit_code=2)
    assert "Error: A data loading process was killed (DataLoader worker (pid" in output


@pytest.mark.full
def test_two_processes_measure_as_one(model: Path, photos: Path, tmp_path: Path) -> None:
    launchers = {"one": (), "two": ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")}
    measured = {}
    for name, launcher in launchers.items():
        file = tmp_path / f"{name}.json"
        command = [sys.executable, *launcher, "-m", "hf_vit.cli", "evaluate", str(model), str(photos)]
        command += ["--json", str(file), "--batch-size", "4", "--probe", "knn", "--probe", "linear"]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("top-1") == 1
        measured[name] = without_times(json.loads(file.read_text()))
    assert (measured["one"].pop("processes"), measured["two"].pop("processes")) == (1, 2)
    figures = [one.pop("figures") for one in measured.values()]
    assert figures[1] == pytest.approx(figures[0], abs=1e-6) and figures[0]["count"] == 21  # no multiple of 2 times 4
    assert measured["two"] == measured["one"]


@pytest.mark.parametrize(
    ("option", "name", "what"),
    [("--json", "mine.json", "a file of measurements"), ("--mistakes", "mine.csv", "a table of mistakes")],
)
def test_only_results_are_replaced(
    model: Path, photos: Path, tmp_path: Path, option: str, name: str, what: str
) -> None:
    file = tmp_path / name
    for _ in range(2):
        evaluate(model, photos, option, file)
    for text in ('{"image": "a.jpg", "label": "cat"}', "image,label\na.jpg,cat\n"):
        file.write_text(text)
        output = " ".join(evaluate(model, photos, option, file, exit_code=2).split())
        assert f"exists and is not {what}: choose another {option}, or remove it first" in output
        assert file.read_text() == text
