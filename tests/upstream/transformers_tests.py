"""transformers' own common tests, importable as `transformers_tests.test_modeling_common` and so on.

The source distribution of transformers carries them, its wheel does not. That of the installed version is downloaded
once, by pip, into the user's cache; nothing of it enters this repository. `HF_VIT_UPSTREAM_TESTS` names a folder to be
used instead: `tests` of an unpacked source distribution.

This module has a `__path__`, which makes it the package that those files are modules of. What they import and the
source distribution leaves out comes from stand_ins.py, or is an empty class: enough to be named and inherited from.
"""

import atexit
import gc
import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
import transformers.processing_utils  # keeps the real `direct_transformers_import` in the shared session
import transformers.utils
from filelock import FileLock
from stand_ins import STAND_INS, write_tiny_models

import hf_vit


def tests_folder() -> Path:
    """Return the folder with the common tests of the installed transformers, fetched if need be."""
    if given := os.environ.get("HF_VIT_UPSTREAM_TESTS"):
        return Path(given)
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hf_vit"
    folder = cache / f"transformers-{transformers.__version__}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "lock"):  # the workers of pytest-xdist arrive here together
        if not folder.exists():
            fetch(folder)
    return folder / "tests"


def fetch(folder: Path) -> None:
    """Download the source distribution and unpack its tests as `folder`; skip the tests if that fails."""
    requirement = f"transformers=={transformers.__version__}"
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        pip = [sys.executable, "-m", "pip", "download", "--no-binary", "transformers", "--no-deps", "--retries", "1"]
        result = subprocess.run([*pip, "--dest", work, requirement], capture_output=True, text=True)
        if result.returncode:
            error = (result.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            pytest.skip(
                f"The source distribution of {requirement} could not be fetched ({error}): "
                "set HF_VIT_UPSTREAM_TESTS to its unpacked `tests` folder.",
                allow_module_level=True,
            )
        (archive,) = Path(work).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            members = [member for member in tar if member.name.split("/")[1:2] == ["tests"]]
            tar.extractall(work, members, filter="data")
        # Renamed last, so that an interrupted fetch leaves nothing that looks complete.
        (Path(work) / archive.name.removesuffix(".tar.gz")).rename(folder)


# The last one came after transformers 5.17; its mixin holds no tests.
MISSING = ("distributed_testing_utils", "exporters", "generation", "pipelines", "utils", "test_memory_cleanup_mixin")


class MissingModules(MetaPathFinder, Loader):
    """Make up the modules that the source distribution leaves out; asked last, after every real path."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        package, _, module = fullname.partition(".")
        missing = package == __name__ and module.split(".")[0] in MISSING
        return ModuleSpec(fullname, self, is_package=True) if missing or fullname in STAND_INS else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        def empty_class(name: str) -> type:
            if name.startswith("__"):
                raise AttributeError(name)
            setattr(module, name, type(name, (), {}))
            return getattr(module, name)

        module.__dict__.update(STAND_INS.get(module.__name__, {}), __getattr__=empty_class)


torch.set_num_threads(1)  # the models are so small that more threads take three times as long
# `MemoryCleanupMixin` collects garbage around every test, half a second of it among what is imported by now.
gc.freeze()
atexit.register(gc.unfreeze)
__path__ = [str(tests_folder())]
sys.meta_path.append(MissingModules())
# The tests load "transformers" from the source tree beside them, to find its classes by name: ours are found instead.
transformers.utils.direct_transformers_import = lambda path: hf_vit
# The models of the pipeline tests are looked for below this path, or on the Hub if it is unset.
_tiny_models = tempfile.TemporaryDirectory()
os.environ["TRANSFORMERS_TINY_MODEL_PATH"] = _tiny_models.name
write_tiny_models(_tiny_models.name)
