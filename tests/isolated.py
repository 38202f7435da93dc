"""Save a tiny model, and use it in a process of its own: with empty caches and, on request, without this package."""

import os
import subprocess
import sys
from pathlib import Path

import torch

import hf_vit

TESTS = Path(__file__).resolve().parent
BLOCKER = """
import sys


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_vit":
            raise ImportError("No module named 'hf_vit': the test hides it")


sys.meta_path.insert(0, Blocker())
"""


def save_tiny_classifier(folder: Path) -> Path:
    """Save a classifier of five classes, all of its weights drawn anew; return the folder."""
    config = hf_vit.HFViTConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=(32, 48),
        patch_size=8,
        num_labels=5,
        num_register_tokens=2,
        out_features=["stage2"],
    )
    model = hf_vit.HFViTForImageClassification(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    model.save_pretrained(folder)
    return folder


def environment(home: Path, *, has_package: bool, **variables: str) -> dict[str, str]:
    """Return the environment of a user who has nothing below `home` yet, and who has this package or not."""
    (home / "startup").mkdir(parents=True, exist_ok=True)
    (home / "startup" / "sitecustomize.py").write_text("" if has_package else BLOCKER)
    path = [str(home / "startup")] + [str(Path(hf_vit.__file__).parents[1])] * has_package
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON", "WANDB_"))}
    defaults = {"HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return {**kept, **defaults, **threads, "PYTHONPATH": os.pathsep.join(path), **variables}


def python(
    script: str | Path, *arguments: object, home: Path, has_package: bool = False, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a file, or a string of code, and return what came of it; a failure shows what the process wrote."""
    command = [sys.executable, str(script)] if isinstance(script, Path) else [sys.executable, "-c", script]
    result = subprocess.run(
        [*command, *map(str, arguments)],
        env=environment(home, has_package=has_package, **variables),
        cwd=home,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return result
