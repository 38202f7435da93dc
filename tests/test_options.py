"""Options of commands: fields of recipes, names from other libraries, sizes, variants, and unknown options."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import hf_vit.training.report
from hf_vit.cli.main import app
from hf_vit.cli.options import ALIASES, ANSWERS, FIRST, GROUPS
from hf_vit.system.places import check_exist, missing
from hf_vit.system.texts import COLUMNS
from hf_vit.training.recipe import TrainConfig, default_recipe
from hf_vit.variants import VARIANTS, config_of, variant_name

runner = CliRunner()


@pytest.fixture
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[TrainConfig]:
    """The recipes that `hf-vit train` would train, in a folder with `photos`."""
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    found: list[TrainConfig] = []
    monkeypatch.setattr(hf_vit.training.report, "train_and_report", lambda config, command, say: found.append(config))
    return found


def train(*words: str) -> Result:
    return runner.invoke(app, ["train", *words])


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        (["photos/"], {"data": "photos/"}),
        (["a", "--epochs", "3", "b"], {"data": ["a", "b"], "epochs": 3.0}),
        (["--data", "a", "--data", "b"], {"data": ["a", "b"]}),
        (["--train-dir", "a", "--lr", "1e-3", "--wd", "0", "--bs", "8"],
         {"data": "a", "learning_rate": 1e-3, "weight_decay": 0.0, "batch_size": 8}),
        (["a", "-o", "out"], {"output_dir": "out"}),
        (["a", "--output_dir", "out", "--batch_size=4"], {"output_dir": "out", "batch_size": 4}),
        (["--streaming", "a"], {"streaming": True, "data": "a"}),
        (["a", "--no-resample-positions"], {"resample_positions": False}),
        (["a", "--private", "true", "--compile=false"], {"private": True, "compile": False}),
        (["a", "--eval-split", "no"], {"eval_split": "no"}),
        (["a", "--label-column", "x", "--label-column", "y"], {"label_column": ["x", "y"]}),
        (["a", "--betas", "[0.9, 0.95]"], {"betas": [0.9, 0.95]}),
        (["a", "--max-grad-norm", "null"], {"max_grad_norm": None}),
        (["a", "--model", "null", "--model-config.hidden-size", "32", "--model-config", "patch_size=16x8"],
         {"model": None}),
        (["a", "--image-size", "224x160"], {"image_size": [224, 160]}),
        (["a", "--image-size", "[224, 160]"], {"image_size": [224, 160]}),
        (["a", "--image-size", "64x64"], {"image_size": 64}),
        (["a", "--model", "Ti/16"], {"model": "ViT-Ti/16"}),
    ],
)  # fmt: skip
def test_options_of_train_are_fields_of_the_recipe(
    words: list[str], fields: dict[str, Any], recipes: list[TrainConfig]
) -> None:
    result = train(*words)
    assert result.exit_code == 0, result.output
    assert {name: getattr(recipes[0], name) for name in fields} == fields
    if "--model-config" in words:
        assert recipes[0].model_config["hidden_size"] == 32 and recipes[0].model_config["patch_size"] == [16, 8]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "`hf-vit train photos/`"),
        (["a", "--epoch", "3"], "There is no option --epoch: did you mean --epochs?"),
        (["a", "--frobnicate", "3"], "There is no option --frobnicate."),
        (["a", "--device", "cuda"], "CUDA_VISIBLE_DEVICES"),
        (["a", "--pretrained"], "--model facebook/dinov2-small"),
        (["a", "--validation-dir", "b"], "photos/train and photos/val"),
        (["a", "--epochs", "0"], "epochs must be more than 0"),
        (["a", "--image-size", "224x"], "Expected pixels as H or HxW for image_size"),
        (["a", "--epochs"], "--epochs"),
        (["a", "--model-config.hidden-size"], "--model-config.hidden-size requires a value"),
        (["a", "--model", "vit-s/16"], "did you mean ViT-S/16? The variants are ViT-Ti/16"),
        (["a", "--model", "ViT-S16"], "did you mean ViT-S/16?"),
        (["a", "--compile=maybe"], "compile must be true or false, got 'maybe'"),
    ],
)
def test_a_wrong_option_is_answered(words: list[str], said: str, recipes: list[TrainConfig]) -> None:
    result = train(*words)
    assert result.exit_code == 2 and said in " ".join(result.output.split()) and not recipes


def test_fields_that_are_not_similar_suggest_nothing() -> None:
    with pytest.raises(ValueError, match="Unknown recipe field 'epoch': did you mean 'epochs'"):
        TrainConfig.from_recipe("digits", epoch=3)
    with pytest.raises(ValueError, match="Unknown recipe field 'zzz': `hf-vit recipes NAME`"):
        TrainConfig.from_recipe("digits", zzz=3)


def test_the_help_of_train_begins_with_what_people_want() -> None:
    lines = train("--help").output.splitlines()
    assert max(map(len, lines)) <= COLUMNS
    headings = [line.removesuffix(":") for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert headings == ["Arguments", "Options", *GROUPS.values()]
    options = [word for line in lines for word in line.split()[:2] if line.startswith("  -") and word[:2] == "--"]
    assert options[: len(FIRST)] == [f"--{name.replace('_', '-')}" for name in FIRST]


def test_every_other_name_is_that_of_an_option() -> None:
    fields = {f"--{name.replace('_', '-')}" for name in vars(TrainConfig())}
    assert {*ALIASES.values()} <= fields and not fields & {*ALIASES, *ANSWERS}


def test_a_variant_has_one_name() -> None:
    for name in VARIANTS:
        assert variant_name(name) == variant_name(name.removeprefix("ViT-")) == name
        assert default_recipe(name.removeprefix("ViT-")) == "scratch"
    assert config_of("Ti/16").to_dict() == config_of("ViT-Ti/16").to_dict()
    assert variant_name("google/vit-base-patch16-224") is None and variant_name("facebook/dinov2-small") is None


@pytest.mark.parametrize("name", ["vit-s/16", "ViT-S16", "vit_s_16", "s16", "ViT-Ti/8", "vit_tiny_16"])
def test_a_misspelled_variant_is_not_a_name_on_the_hub(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(ValueError, match="ViT-Ti/16, ViT-S/16"):
        variant_name(name)
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir(parents=True)  # a folder of the user
    assert variant_name(name) is None


def test_the_package_is_a_program() -> None:
    command = [sys.executable, "-m", "hf_vit", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("hf-vit ")


def test_an_option_of_train_is_named_elsewhere() -> None:
    result = runner.invoke(app, ["fit", "photos", "--model", "m", "--lr", "1e-3"])
    assert result.exit_code == 2 and "--learning-rate is an option of hf-vit train" in result.stderr


def test_a_missing_path_names_the_most_similar_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-vit").mkdir()
    assert missing("my-vti") == "No such file or folder: my-vti (did you mean my-vit?)"
    assert missing("elsewhere/x") == "No such file or folder: elsewhere/x"
    assert missing("./my-vti").endswith("(did you mean my-vit?)")
    with pytest.raises(ValueError, match="did you mean my-vit"):
        check_exist([], model="my-vti")
    check_exist(["my-vti"], model="google/vit")  # may be on the Hub


PATHS = """
import sys
from typer.testing import CliRunner
from hf_vit.cli.main import app

for words in (
    ["train", "photos", "--model", "./none"],
    ["train", "none/", "--model", "google/vit-base-patch16-224"],
    ["fit", "photos", "./none", "--model", "m"],
    ["evaluate", "./none", "photos"],
    ["predict", "m.safetensors", "photos"],
    ["inspect", "./none"],
    ["convert", "./none", "out"],
    ["export", "./none", "m.onnx"],
    ["demo", "./none"],
    ["study", "pooling", "--data", "./none"],
):
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2 and "Error: No such file or folder: " in result.stderr, (words, result.output)
    assert "torch" not in sys.modules, words
"""


def test_a_missing_path_is_found_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    subprocess.run([sys.executable, "-c", PATHS], check=True, cwd=tmp_path)


def test_a_missing_argument_is_answered_by_an_example() -> None:
    for words in (["fit"], ["fit", "photos"], ["predict"], ["push", "my-vit"]):
        result = runner.invoke(app, words)
        assert result.exit_code == 2 and f"Example: hf-vit {words[0]} " in result.stderr
