"""Studies of what a ViT learns from: how many images, with which help, with labels or without."""

import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import DatasetDict, Image
from test_studies import TINY, row
from tiny_run import assert_same_weights, colored_dataset, stop_at, weights

from hf_vit import HFViTModel
from hf_vit.data.images import derive_seed
from hf_vit.data.labelled import load_data
from hf_vit.data.orders import steps_of
from hf_vit.evaluation.flops import count_flops
from hf_vit.studies import SIZES, data_size, pretraining
from hf_vit.studies.data_size import MODELS, SHARES, DataSize, as_hybrid
from hf_vit.studies.page import write_page
from hf_vit.studies.pretraining import AUTOENCODER, BOTH, LONGER, MASKED, SUPERVISED, TUNED, UNTRAINED, Pretraining
from hf_vit.studies.regularization import AUGMENTATION, METHODS, REGULARIZATION, Regularization
from hf_vit.studies.resnet import SmallBitForImageClassification, build_resnet
from hf_vit.studies.running import PlannedRun, key_of
from hf_vit.studies.study import Results, Study, with_share
from hf_vit.system.stopping import Interrupted
from hf_vit.training.loop import train
from hf_vit.training.optim import parameter_groups
from hf_vit.training.recipe import TrainConfig
from hf_vit.training.tasks import TASKS, architecture_of, build_model

STUDIES = [DataSize(), Pretraining(), Regularization()]
# Digits of 8 pixels and patches of 2, and what a study varies at its quick and its full size.
RECIPES = {
    "digits": lambda: TrainConfig.from_recipe(SIZES["quick"], **{**TINY, "max_steps": None}),
    "quick": lambda: TrainConfig.from_recipe(SIZES["quick"]),
    "full": lambda: TrainConfig.from_recipe(SIZES["full"]),
    "photos": lambda: TrainConfig.from_recipe(SIZES["full"], model="ViT-Ti/16", image_size=[64, 96]),
}


def tiny(**fields: Any) -> TrainConfig:
    return TrainConfig.from_recipe(SIZES["quick"], **{**TINY, **fields})


@pytest.fixture(scope="module")
def digits() -> Any:
    return load_data("digits")


def rows_of(
    study: Study, accuracy: Callable[[Mapping[str, Any]], float], seeds: int = 3, noise: float = 0.002, **figures: Any
) -> list[dict[str, Any]]:
    """Return rows of all cells, as accurate as `accuracy` says of their factors, with some noise."""
    rows = []
    for seed in range(seeds):
        draw = random.Random(seed)
        for cell in study.cells(tiny()):
            measured = {"images_seen": 1000, "forward_flops": 2_000_000, **figures}
            level = accuracy(cell.factors) + draw.uniform(-noise, noise)
            rows.append({**row(seed, level, **cell.factors), **measured})
    return rows


def verdicts(study: Study, rows: list[dict[str, Any]]) -> list[str]:
    return [finding.verdict for finding in study.findings(Results(rows))]


# --------------------------------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("recipe", ["digits", "quick"])
@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_cells_can_be_built(study: Study, recipe: str, digits: Any) -> None:
    config = RECIPES[recipe]()
    cells = list(study.cells(config))
    keys = [key_of(cell.factors, 0) for cell in cells]
    assert len(set(keys)) == len(keys)
    assert all(cell.begins_from is None or key_of(cell.begins_from, 0) in keys for cell in cells)
    built = set()
    for cell in cells:
        described = (repr(cell.config.model_config), cell.config.task, cell.build)
        if described not in built:  # a share changes no model
            built.add(described)
            with torch.device("meta"):
                model, processor = cell.build(cell.config, TASKS[cell.config.task](cell.config, digits))
            height, width = model.config.image_shape
            assert processor.size == {"height": height, "width": width}


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_whatever_is_there_is_drawn(study: Study, tmp_path: Path) -> None:
    """All of it, half of the cells, runs that failed, one seed, nothing that ended."""
    rows = rows_of(study, lambda factors: 0.5, shots_5=0.3, shots_10=0.4)
    failed = [
        {**row(item["seed"], failed="Step 3 is not finite", **item["factors"])} if index % 3 == 0 else item
        for index, item in enumerate(rows)
    ]
    alone = [{**row(0, failed="Step 1 is not finite", **item["factors"])} for item in rows if item["seed"] == 0]
    one_seed = [item for item in rows if item["seed"] == 0]
    page = write_page(study, Results(failed), tmp_path).read_text()
    assert all(finding.claim in page for finding in study.findings(Results(failed)))
    for number, some in enumerate((rows, rows[::2], one_seed)):
        study.plot(Results(some)).savefig(tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").stat().st_size > 5000
    assert {finding.holds for finding in study.findings(Results(one_seed))} == {None}
    table = study.table(Results(alone))
    assert {len(line) for line in table} == {len(table[0])}
    study.plot(Results(alone)).savefig(tmp_path / "alone.png")
    assert {finding.holds for finding in study.findings(Results(alone))} == {None}


# --------------------------------------------------------------------------------------------------- numbers of images


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 images a class to learn from, and some to test."""
    folder = tmp_path_factory.mktemp("data") / "photos"
    DatasetDict({"train": colored_dataset(300, 0), "test": colored_dataset(21, 1)}).save_to_disk(str(folder))
    return folder


def test_repeated_images_make_an_epoch_longer(photos: Path) -> None:
    data = load_data(photos, train_share=0.02, train_repeats=2.5)
    images = [image["bytes"] for image in data.train.cast_column("image", Image(decode=False))["image"]]
    assert data.train_length == len(data.train) == 15
    assert sorted(images.count(image) for image in set(images)) == [2, 2, 2, 3, 3, 3]
    assert len(data.evaluation) == 21
    with pytest.raises(ValueError, match=r"train_repeats must be at least 1, got 0\.5"):
        load_data(photos, train_repeats=0.5)
    with pytest.raises(ValueError, match="train_repeats need a prepared data set"):
        load_data(photos, train_repeats=2, streaming=True)


def test_every_share_takes_as_many_steps(photos: Path) -> None:
    config = tiny(data=str(photos), max_steps=None, epochs=3, train_share=0.97)
    lengths, sizes = set(), []
    for share in SHARES:
        recipe = with_share(config, share)
        data = load_data(photos, train_share=recipe.train_share, train_repeats=recipe.train_repeats)
        lengths.add(steps_of(recipe.epochs, data.train_length, recipe.batch_size))
        sizes.append(round(data.train_length / recipe.train_repeats))
    assert sizes == [3, 9, 30, 87, 291]
    assert lengths == {54}  # 3 epochs of 291 images


def test_where_the_curves_cross_the_paper_is_right() -> None:
    def crossing(factors: Mapping[str, Any]) -> float:
        gain = SHARES.index(factors["share"])
        return 0.3 + {"ViT": 0.1 * gain, "hybrid": 0.02 + 0.1 * gain, "ResNet": 0.15 + 0.05 * gain}[factors["model"]]

    def parallel(factors: Mapping[str, Any]) -> float:
        return 0.3 + 0.05 * SHARES.index(factors["share"]) + 0.1 * (factors["model"] == "ResNet")

    study = DataSize()
    assert verdicts(study, rows_of(study, crossing)) == ["agrees"] * 5
    above = verdicts(study, rows_of(study, parallel))
    assert above[:2] == ["agrees", "does not agree"] and above[2] == "no significant difference"


def test_the_table_says_how_large_models_and_data_are() -> None:
    study = DataSize()
    rows = rows_of(study, lambda factors: 0.25, noise=0.0, parameters=12_345)
    for item in rows:
        item["train_images"] = round(5000 * item["factors"]["share"])
    table = study.table(Results(rows))
    assert table[1] == ["1 % (50)", *["25.0 ± 0.0"] * 3] and table[5][0] == "100 % (5,000)"
    assert table[-2:] == [["parameters, thousands", *["12.3"] * 3], ["MFLOP per image", *["2.0"] * 3]]
    (axis,) = study.plot(Results(rows)).axes
    assert [text.get_text() for text in axis.get_xticklabels()][-1] == "5,000\n100 %"
    assert [text.get_text() for text in axis.get_legend().get_texts()] == list(MODELS)


@pytest.mark.parametrize(("patch", "stages"), [(2, 1), (4, 1), (8, 2), (16, 3), (32, 3), (14, 1)])
def test_a_hybrid_has_the_patches_of_the_vit(patch: int, stages: int) -> None:
    """As far as the root of its stem allows, which divides by 4; all of it but one pixel is the stem's, up to 16."""
    config = as_hybrid(tiny(**{"model_config.patch_size": patch, "image_size": 224}))
    vit = architecture_of(config)
    assert vit.patch_shape == ({2: 4, 14: 28}.get(patch, patch),) * 2
    assert len(vit.stem_layers) == stages and vit.num_hidden_layers == 1


# ---------------------------------------------------------------------------------------------------------- the ResNet


@pytest.mark.parametrize("recipe", ["quick", "full", "photos"])
def test_a_resnet_takes_what_the_vit_takes(recipe: str, digits: Any) -> None:
    config = RECIPES[recipe]()
    task = TASKS["classification"](config, digits)
    with torch.device("meta"):
        vit, resnet = (build(config, task)[0] for build in (build_model, build_resnet))
    flops, theirs = (count_flops(model, type(model))[0] for model in (resnet, vit))
    assert 0.6 < flops / theirs < 1.6
    assert 0.3 < resnet.num_parameters() / vit.num_parameters() < 3
    # Half as many places along each side at the end as there are patches.
    places = resnet.bit(torch.zeros(1, 3, *vit.config.image_shape, device="meta")).last_hidden_state.shape[-2:]
    assert tuple(places) == tuple(side // 2 for side in vit.config.grid_size)


def test_a_resnet_standardizes_its_weights(digits: Any) -> None:
    config = tiny()
    model, _ = build_resnet(config, TASKS["classification"](config, digits))
    pixels = torch.randn(2, 3, 8, 8)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.GroupNorm)]
    before = model(pixel_values=pixels).logits
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.weight.mul_(3).add_(0.5)
    assert norms and not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    torch.testing.assert_close(model(pixel_values=pixels).logits, before, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_resnet_resumes_exactly_and_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"max_steps": 4, "save_every": 2, "precision": "fp32"}
    whole = train(tiny(output_dir=str(tmp_path / "whole"), **fields), build=build_resnet)
    config = tiny(output_dir=str(tmp_path / "parts"), **fields)
    with monkeypatch.context() as context, pytest.raises(Interrupted):
        stop_at(2, context)
        train(config, build=build_resnet)
    resumed = train(config, build=build_resnet)
    assert_same_weights(weights(resumed.model), weights(whole.model))
    assert resumed.metrics == whole.metrics
    loaded = SmallBitForImageClassification.from_pretrained(tmp_path / "parts")
    assert_same_weights(weights(loaded), weights(whole.model))
    assert loaded.config.image_shape == (8, 8) and loaded.config.id2label[3] == "3"


def test_a_resnet_has_no_layers_to_slow_down(digits: Any) -> None:
    config = tiny()
    model, _ = build_resnet(config, TASKS["classification"](config, digits))
    groups = parameter_groups(model, weight_decay=0.1)
    decayed = sum(len(group["params"]) for group in groups if group["weight_decay"])
    assert decayed == sum(isinstance(module, torch.nn.Conv2d | torch.nn.Linear) for module in model.modules())
    with pytest.raises(ValueError, match="SmallBitForImageClassification has no layers"):
        parameter_groups(model, layer_decay=0.5)


def test_a_resnet_is_one_run_of_the_study(tmp_path: Path) -> None:
    study = DataSize()
    (cell,) = (cell for cell in study.cells(tiny(train_share=1)) if cell.factors == data_size.cell("ResNet", 0.1))
    figures = PlannedRun(study, cell, 0, tmp_path).execute()
    assert figures["train_images"] == 143 and figures["images_seen"] == 32  # a tenth of each class, rounded
    assert 0 <= figures["accuracy"] <= 1 and figures["forward_flops"] > 0


# -------------------------------------------------------------------------------------------------------- pre-training


def pretraining_rows(**accuracies: float) -> list[dict[str, Any]]:
    accuracies = {"autoencoder": accuracies["masked"], "tuned": accuracies["both"], **accuracies}
    by_name = {UNTRAINED: "untrained", SUPERVISED: "supervised", MASKED: "masked", BOTH: "both", LONGER: "longer"}
    by_name |= {AUTOENCODER: "autoencoder", TUNED: "tuned"}
    rows = rows_of(Pretraining(), lambda factors: accuracies[by_name[factors["training"]]], noise=0, images_seen=500)
    for item in rows:
        item["shots_10"] = item["accuracy"]
    return rows


def test_what_masked_patches_are_worth() -> None:
    study = Pretraining()
    paper = pretraining_rows(untrained=0.1, masked=0.3, supervised=0.5, both=0.6, longer=0.55)
    assert verdicts(study, paper) == [*["agrees"] * 4, "no significant difference", "agrees"]
    worthless = pretraining_rows(untrained=0.1, masked=0.1, supervised=0.5, both=0.5, longer=0.6)
    assert verdicts(study, worthless) == [
        "no significant difference",
        "agrees",
        "no significant difference",
        "does not agree",
        "no significant difference",
        "no significant difference",
    ]
    better = pretraining_rows(untrained=0.1, masked=0.1, autoencoder=0.2, supervised=0.5, both=0.5, longer=0.6)
    assert verdicts(study, better)[4] == "agrees"


def test_images_are_counted_over_both_trainings() -> None:
    table = Pretraining().table(Results(pretraining_rows(untrained=0, masked=0, supervised=0, both=0, longer=0)))
    assert {line[0]: line[1] for line in table[1:]} == {
        UNTRAINED: "0",
        SUPERVISED: "500",
        MASKED: "500",
        AUTOENCODER: "500",
        BOTH: "1,000",
        TUNED: "1,000",
        LONGER: "500",
    }


def test_trainings_are_equally_long() -> None:
    for config in (tiny(), RECIPES["quick"]()):
        recipes = {cell.factors["training"]: cell.config for cell in Pretraining().cells(config)}
        assert recipes[LONGER].epochs == 2 * config.epochs
        assert recipes[LONGER].max_steps == (4 if config.max_steps else None)
        for name in (SUPERVISED, MASKED, AUTOENCODER, BOTH, TUNED):
            assert (recipes[name].epochs, recipes[name].max_steps) == (config.epochs, config.max_steps)
        assert {recipe.model_config["pooling"] for recipe in recipes.values()} == {"mean"}


@pytest.mark.slow
def test_one_training_begins_from_the_other(tmp_path: Path) -> None:
    study = Pretraining()
    cells = {cell.factors["training"]: cell for cell in study.cells(tiny())}
    masked, both, untrained = (PlannedRun(study, cells[name], 0, tmp_path) for name in (MASKED, BOTH, UNTRAINED))
    figures = [run.execute() for run in (masked, both, untrained)]
    assert [figure["accuracy"] is None for figure in figures] == [True, False, False]
    for figure in figures:
        assert 0 < figure["shots_5"] <= 1 and 0 < figure["shots_10"] <= 1
    first, second = (HFViTModel.from_pretrained(run.folder).state_dict() for run in (masked, both))
    change = max((first[name] - second[name]).abs().max().item() for name in second)
    assert 0 < change < 0.02  # two small steps away, so it did begin there


def test_an_untrained_encoder_is_as_it_was_drawn(tmp_path: Path, digits: Any) -> None:
    (cell,) = (cell for cell in Pretraining().cells(tiny()) if cell.factors["training"] == UNTRAINED)
    run = train(replace(cell.config, output_dir=str(tmp_path)), build=cell.build)
    torch.manual_seed(derive_seed(cell.config.seed, "weights"))
    drawn, _ = build_model(cell.config, TASKS["classification"](cell.config, digits))
    assert_same_weights(weights(run.model), weights(drawn))


def test_features_are_of_few_images(digits: Any) -> None:
    few = pretraining.first_of_each_class(digits.train, "label", 7)
    labels = few["label"][:]
    assert [labels.count(label) for label in range(10)] == [7] * 10
    assert labels[:5] == digits.train["label"][:5]
    assert len(pretraining.first_of_each_class(digits.train, "label", 10_000)) == len(digits.train)


# ------------------------------------------------------------------------------------------------------ regularisation


def test_what_helps_with_few_images_hurts_with_many() -> None:
    def published(factors: Mapping[str, Any]) -> float:
        gain = 0.06 * (factors["added"] in AUGMENTATION) + 0.03 * (factors["added"] in REGULARIZATION)
        return 0.4 + gain if factors["share"] < 1 else 0.8 - gain

    def opposite(factors: Mapping[str, Any]) -> float:
        return 1.2 - published(factors)

    study = Regularization()
    assert verdicts(study, rows_of(study, published)) == ["agrees"] * 5
    assert verdicts(study, rows_of(study, opposite)) == ["does not agree"] * 5


def test_each_method_is_added_alone() -> None:
    cells = {(cell.factors["added"], cell.factors["share"]): cell.config for cell in Regularization().cells(tiny())}
    assert len(cells) == 2 * len(METHODS)
    plain = cells["none", 1.0]
    for (name, share), config in cells.items():
        changed = {field for field, value in asdict(plain).items() if asdict(config)[field] != value}
        of_share = {"train_share", "train_repeats"} if share < 1 else set()
        assert len(changed - of_share) == (name != "none") and of_share <= changed
        architecture_of(config)
    assert cells["dropout 0.1", 0.1].model_config["hidden_dropout_prob"] == 0.1
    assert cells["RandAugment (2, 10)", 0.1].mixup == 0.0  # of that set's mixup nothing


def test_the_picture_shows_differences_with_their_intervals() -> None:
    study = Regularization()
    rows = rows_of(study, lambda factors: 0.5 + 0.1 * (factors["added"] in AUGMENTATION), noise=0.0)
    for item in rows:
        item["train_images"] = round(5000 * item["factors"]["share"])
    (axis,) = study.plot(Results(rows)).axes
    few, many = (container.lines[0] for container in axis.containers)
    assert few.get_xdata().tolist() == pytest.approx([0, 0, 10, 10]) == many.get_xdata().tolist()
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["500 images", "5,000 images"]
    table = study.table(Results(rows))
    assert table[0] == ["added", "500 images, %", "difference from none", "5,000 images, %", "difference from none"]
    assert table[1][2] == "–" and table[4][2].startswith("+10.0 points")
