"""The package as others import it: light imports, registration in every order, and a border around remote code."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import hf_vit

PACKAGE = Path(hf_vit.__file__).parent
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
PACKAGES = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


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


@pytest.mark.parametrize("path", sorted((PACKAGE / "model").glob("*.py")), ids=lambda path: path.name)
def test_remote_code_stands_alone(path):
    allowed = {"torch", "torchvision", "transformers", "huggingface_hub", "numpy", "PIL", *sys.stdlib_module_names}
    # Where they are installed; see test_image_reading.py and test_channels.py for where they are not.
    allowed |= {"simplejpeg", "tifffile", "imagecodecs", "pillow_heif"}
    for name in imported_names(path):
        if name.startswith("."):
            # transformers copies what `from .name import` names, flat: other forms are not found by it.
            assert (PACKAGE / "model" / f"{name[1:]}.py").is_file(), name
        else:
            assert name.split(".")[0] in allowed, name


# ---------------------------------------------------------------------------------------------------- light imports


def run(code: str) -> str:
    """Run Python code in a fresh process and return what it prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_light():
    code = "import sys; before = {*sys.modules}; import hf_vit, hf_vit.training.recipe, hf_vit.studies.catalogue"
    imported = run(f"{code}\nprint(*{{name.split('.')[0] for name in {{*sys.modules}} - before}})").split()
    known = {"hf_vit", "yaml", "cython_runtime", "huggingface_hub", *sys.stdlib_module_names}
    assert {name for name in imported if not name.startswith("_")} <= known


@pytest.mark.parametrize("package", [name for name in PACKAGES if name not in ("model", "system")])
def test_public_names_exist(package):
    face = import_module(f"hf_vit.{package}")
    modules = {path.stem for path in (PACKAGE / package).glob("*.py")}
    assert face.__all__ and not modules & {*face.__all__}  # else the module would hide the name once it is imported
    assert all(getattr(face, name) is not None for name in face.__all__)
    assert {*face.__all__} <= {*dir(face)}
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = face.nothing_of_the_kind


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="HFVit"):
        _ = hf_vit.HFVit
    assert {*hf_vit.__all__} <= {*dir(hf_vit)}


# ----------------------------------------------------------------------------------------------------- registration

# Orders in which a program may import this package and transformers.
ORDERS = {
    "transformers first": "import transformers.pipelines, hf_vit",
    "transformers after": "import hf_vit, transformers.pipelines",
    "a model of transformers": "import hf_vit; from transformers import ViTModel",  # while modeling_layers is imported
    "Trainer": "import hf_vit; from transformers import Trainer",
    "AutoConfig only": "import hf_vit; from transformers import AutoConfig; AutoConfig.for_model('hf_vit')",
    "AutoImageProcessor only": "import hf_vit; from transformers import AutoImageProcessor",
    "config first": "import hf_vit; hf_vit.HFViTConfig()",
    "model first": "import hf_vit.model.modeling_hf_vit",
    "backbone after transformers": "import transformers.pipelines, hf_vit.model.dense_hf_vit",
    "processor first": "import hf_vit.model.image_processing_hf_vit",
    "processor after transformers": "import transformers.pipelines, hf_vit.model.image_processing_hf_vit",
    "other processor after transformers": "import transformers.pipelines, hf_vit.model.image_processing_pil_hf_vit",
    "reload": "import importlib, hf_vit; importlib.reload(hf_vit); import transformers.pipelines; "
    "importlib.reload(hf_vit)",
    "imported anew": """
import hf_vit, transformers.models.auto.configuration_auto
for name in [name for name in sys.modules if name.split(".")[0] == "hf_vit"]:
    del sys.modules[name]
import hf_vit""",
    "find_spec only": """
import hf_vit, importlib.util
assert importlib.util.find_spec("transformers.models.auto.modeling_auto").loader is not None""",
    "thread": """
from threading import Thread
def load(): import hf_vit
threads = [Thread(target=load) for _ in range(4)]
for thread in threads: thread.start()
import transformers.pipelines
for thread in threads: thread.join()""",
    "two threads of transformers": """
import hf_vit
from threading import Thread
def load(name): __import__(name)
names = "transformers.models.auto.modeling_auto", "hf_vit.model.dense_hf_vit", "transformers.pipelines"
threads = [Thread(target=load, args=(name,)) for name in names]
for thread in threads: thread.start()
for thread in threads: thread.join()""",
    "finder that is its own loader": """
from importlib.machinery import PathFinder
class Finder:  # as pytest's assertion rewriting: one loader for many modules
    def find_spec(self, name, path=None, target=None):
        if not name.startswith(("transformers.models.auto.", "hf_vit.model.")) or "." not in name: return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.origin is not None: self.loaders[name], spec.loader = spec.loader, self
        return spec
    loaders = {}
    def create_module(self, spec): return None
    def exec_module(self, module): self.loaders[module.__name__].exec_module(module)
finder = Finder()
sys.meta_path.insert(0, finder)
import hf_vit, transformers.pipelines
assert sys.modules["transformers.models.auto.modeling_auto"].__loader__ is finder
assert "exec_module" not in vars(finder)""",
    "import fails once": """
import hf_vit, transformers.models.auto
sys.modules["transformers.models.auto.auto_factory"] = None
try: import transformers.models.auto.modeling_auto
except ImportError: del sys.modules["transformers.models.auto.auto_factory"]""",
}

# Torch is imported once; every order then has a process that is forked from there.
FORKING = """
import os, sys, json, traceback
import torch, torchvision
def check():
    import hf_vit
    from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, AutoModelForMaskedImageModeling
    from transformers import AutoBackbone, AutoImageProcessor, IMAGE_PROCESSOR_MAPPING
    small = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=16)
    config = AutoConfig.for_model("hf_vit", **small)
    assert type(config) is hf_vit.HFViTConfig
    autos = AutoModel, AutoModelForImageClassification, AutoModelForMaskedImageModeling, AutoBackbone
    models = [type(auto.from_config(config)) for auto in autos]
    names = "Model", "ForImageClassification", "ForMaskedImageModeling", "Backbone"
    assert models == [getattr(hf_vit, "HFViT" + name) for name in names], models
    processors = IMAGE_PROCESSOR_MAPPING[type(config)]
    assert processors == {"pil": hf_vit.HFViTImageProcessorPil, "torchvision": hf_vit.HFViTImageProcessor}, processors
    assert all(getattr(hf_vit, name) is not None for name in hf_vit.__all__)
    # The hook is gone, and nothing of it stays in what it watched.
    assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("hf_vit")], sys.meta_path
    for name, module in sys.modules.items():
        if name.startswith(("transformers.models.auto", "hf_vit")):
            for loader in (module.__loader__, getattr(module.__spec__, "loader", None)):  # of old versions, no spec
                assert not type(loader).__module__.startswith("hf_vit"), name

results = {}
for name, order in json.load(sys.stdin).items():
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        try:
            exec(order)
            check()
        except BaseException:
            os.write(writer, traceback.format_exc()[-4000:].encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        results[name] = pipe.read()
    os.waitpid(child, 0)
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def results_of_orders():
    import json

    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FORKING], input=json.dumps(ORDERS), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("order", ORDERS)
def test_auto_classes_know_the_package(order, results_of_orders):
    assert results_of_orders[order] == ""


def test_auto_classes_know_the_package_in_a_spawned_process(tmp_path):
    (tmp_path / "child.py").write_text(
        "def name_of(config):\n"
        "    from transformers import AutoModel\n"
        "    return type(AutoModel.from_config(config)).__name__\n"
        "if __name__ == '__main__':\n"
        "    import multiprocessing, hf_vit\n"
        "    config = hf_vit.HFViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, "
        "intermediate_size=8, image_size=16)\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.apply(name_of, (config,)))\n"
    )
    done = subprocess.run([sys.executable, tmp_path / "child.py"], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["HFViTModel"], done.stderr


# ------------------------------------------------------------------------------------------------------ remote code

# Where text that asks for remote code may stand. The code of `quickstart` loads the folder that it has just written,
# as a user without the package would; the others are docstrings, and cards for readers.
SPEAK_OF_REMOTE_CODE = {
    "hf_vit/cli/quickstart.py",
    "hf_vit/model/pipeline_hf_vit.py",
    "hf_vit/model/repository_hf_vit.py",
}


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


@pytest.mark.parametrize(
    ("former", "name", "present"),
    [
        ("finetuning", "load_classifier", "checkpoints.models"),
        ("finetuning", "add_lora", "training.trainer"),
        ("assessment", "match_labels", "evaluation.labels"),
    ],
)
def test_modules_of_the_first_version_are_deprecated(former: str, name: str, present: str) -> None:
    module = import_module(f"hf_vit.{former}")
    with pytest.warns(FutureWarning, match=f"hf_vit.{former} is deprecated: .* hf_vit.{present}"):
        moved = getattr(module, name)
    assert moved is getattr(import_module(f"hf_vit.{present}"), name)


def test_results_of_a_classifier_have_their_former_name() -> None:
    evaluation = import_module("hf_vit.evaluation")
    assert evaluation.Predictions is evaluation.ImageResults
