"""The house keeps its order: a light import, imports in one direction, a border around what goes to the Hub."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hf_vit

PACKAGE = Path(hf_vit.__file__).parent
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")

# What a module may import of ours. The way of the data is the way of the imports, and nobody imports cli.
MAY_IMPORT = {
    "model": set(),
    "texts": set(),
    "network": {"texts"},
    "registration": {"model", "checkpoints"},
    "variants": {"model"},
    "checkpoints": {"model", "network", "texts", "variants"},
    "export": {"checkpoints", "model"},
    "extras": set(),
    "graphs": {"assessment", "checkpoints", "extras", "inference", "model"},
    "finetuning": {"checkpoints", "extras", "model"},
    "hub": {"model", "network", "texts"},
    "drawing": {"texts"},
    "inspection": {"checkpoints", "drawing", "inference", "loading", "model", "sources", "texts"},
    "demo": {
        "checkpoints",
        "extras",
        "inference",
        "inspection",
        "loading",
        "model",
        "prediction",
        "stopping",
        "texts",
    },
    "optim": set(),
    "augmentation": set(),
    "recipe": {"texts"},
    "data": {"texts"},
    "loading": {"data", "model", "texts"},
    "evaluation": set(),
    "probing": set(),
    "token_merging": {"model"},
    "inference": {"checkpoints", "model", "parallel"},
    "pipeline": {"model"},
    "prediction": {"inference", "loading", "model", "texts"},
    "sources": {"data", "texts"},
    "answers": {"checkpointing", "prediction"},
    "answering": {"answers", "inference", "parallel", "prediction", "sources"},
    "prediction_ray": {"answering", "answers", "extras", "inference", "prediction"},
    "predicting": {
        "answering",
        "answers",
        "inference",
        "parallel",
        "prediction",
        "prediction_ray",
        "sources",
        "stopping",
    },
    "assessment": {
        "recipe",
        "checkpoints",
        "data",
        "evaluation",
        "hub",
        "inference",
        "loading",
        "probing",
        "token_merging",
    },
    "checkpointing": set(),
    "locking": set(),
    "stopping": set(),
    "parallel": {"locking", "recipe"},
    "tasks": {"recipe", "data", "augmentation", "evaluation", "finetuning", "model", "variants"},
    "training": {
        "recipe",
        "data",
        "loading",
        "augmentation",
        "tasks",
        "parallel",
        "optim",
        "evaluation",
        "checkpointing",
        "model",
        "stopping",
    },
    "trainer": {"data", "loading", "augmentation", "optim"},
    "cost": {"recipe", "stopping", "training", "data", "loading", "parallel", "checkpointing", "hub"},
    "report": {
        "recipe",
        "variants",
        "training",
        "data",
        "drawing",
        "loading",
        "evaluation",
        "hub",
        "inspection",
        "model",
        "texts",
    },
    "quickstart": {"recipe", "report", "training", "data"},
    "benchmark": {
        "augmentation",
        "checkpoints",
        "cost",
        "data",
        "export",
        "graphs",
        "inference",
        "loading",
        "model",
        "parallel",
        "prediction",
        "variants",
    },
    "studies": {
        "benchmark",
        "cost",
        "data",
        "drawing",
        "evaluation",
        "hub",
        "loading",
        "locking",
        "model",
        "parallel",
        "probing",
        "recipe",
        "stopping",
        "tasks",
        "texts",
        "training",
    },
    "cli": {
        "studies",
        "assessment",
        "cost",
        "demo",
        "inspection",
        "answering",
        "predicting",
        "sources",
        "stopping",
        "benchmark",
        "recipe",
        "quickstart",
        "report",
        "training",
        "hub",
        "checkpoints",
        "export",
        "graphs",
        "network",
        "texts",
    },
}


def imported_names(path: Path) -> set[str]:
    """Return the modules that a file imports anywhere, absolute ones with their full name, ours with a dot before."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module or "")
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module] if node.module else [alias.name for alias in node.names]
            names |= {"." * node.level + str(module) for module in modules}
    return names


def unit_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    unit = unit_of(path)
    assert unit in MAY_IMPORT, f"say in MAY_IMPORT what {unit} may import"
    ours = {name.split(".")[1] for name in imported_names(path) if name.startswith("hf_vit.")}
    border = "." * len(path.relative_to(PACKAGE).parts)  # of a file in a folder, `.name` is its neighbour
    ours |= {name.lstrip(".").split(".")[0] for name in imported_names(path) if name.startswith(border)}
    assert ours - {unit} <= MAY_IMPORT[unit]


@pytest.mark.parametrize("path", sorted((PACKAGE / "model").glob("*.py")), ids=lambda path: path.name)
def test_remote_code_stands_alone(path):
    allowed = {"torch", "torchvision", "transformers", "huggingface_hub", "numpy", "PIL", *sys.stdlib_module_names}
    allowed |= {"simplejpeg"}  # where it is installed; see test_image_reading.py for where it is not
    for name in imported_names(path):
        if name.startswith("."):
            # transformers copies what `from .name import` names, flat: other forms are not found by it.
            assert (PACKAGE / "model" / f"{name[1:]}.py").is_file(), name
        else:
            assert name.split(".")[0] in allowed, name


def run(code: str) -> str:
    """Run Python code in a fresh process and return what it prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_light():
    heavy = ["torchvision", "matplotlib", "datasets", "sklearn", "typer", "transformers.modeling_utils"]
    assert run(f"import sys, hf_vit; print([name for name in {heavy} if name in sys.modules])") == "[]"


ORDERS = [
    "import transformers.pipelines, hf_vit",
    "import hf_vit, transformers.pipelines",
    "import hf_vit; from transformers import ViTModel",  # from the midst of transformers.modeling_layers
    "import hf_vit; from transformers import Trainer",
]


@pytest.mark.parametrize("order", ORDERS)
def test_auto_classes_know_the_package(order):
    code = f"""
{order}
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, AutoModelForMaskedImageModeling
from transformers import AutoBackbone, IMAGE_PROCESSOR_MAPPING
small = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=16)
config = AutoConfig.for_model("hf_vit", **small)
autos = AutoModel, AutoModelForImageClassification, AutoModelForMaskedImageModeling, AutoBackbone
print(*(type(auto.from_config(config)).__name__ for auto in autos))
print(*sorted(cls.__name__ for cls in IMAGE_PROCESSOR_MAPPING[type(config)].values()))
print(all(getattr(hf_vit, name) is not None for name in hf_vit.__all__))
"""
    models, processors, all_names_exist = run(code).splitlines()[-3:]
    assert models == "HFViTModel HFViTForImageClassification HFViTForMaskedImageModeling HFViTBackbone"
    assert processors == "HFViTImageProcessor HFViTImageProcessorPil"
    assert all_names_exist == "True"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="HFVit"):
        _ = hf_vit.HFVit


# Where text that asks for remote code may stand. The code of `quickstart` loads the folder that it has just written,
# as a user without the package would; the others are docstrings, and cards for readers.
SPEAK_OF_REMOTE_CODE = {"hf_vit/quickstart.py", "hf_vit/model/repository_hf_vit.py"}


def test_nothing_turns_remote_code_on():
    speaking = set()
    for path in [*MODULES, *(PACKAGE.parent / "scripts").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            # A keyword, a name, an attribute, or a key; texts are looked at below.
            names = [getattr(node, field, None) for field in ("arg", "id", "attr", "value", "name")]
            assert "trust_remote_code" not in names, f"{path}:{node.lineno}"
            if isinstance(node, ast.Constant) and "trust_remote_code" in str(node.value):
                speaking.add(path.relative_to(PACKAGE.parent).as_posix())
            # The Auto classes would ask at the terminal whether to run a stranger's code.
            if isinstance(node, ast.ImportFrom) and path.name != "registration.py":
                assert not [alias.name for alias in node.names if alias.name.startswith("Auto")], path
    assert speaking == SPEAK_OF_REMOTE_CODE
