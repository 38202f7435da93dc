"""Measure how long commands and imports take to start, next to torch, transformers and timm.

    python scripts/benchmark_startup.py [--model MODEL --image IMAGE] [--rounds 10]

Every round starts each of them once, in a new process. The first round fills the bytecode cache and does not count.
Printed are the median, the fastest and the slowest wall time in seconds. With a model and an image, `hf-vit predict`
is measured, too.
"""

import os
import statistics
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from importlib.util import find_spec

COMMANDS = {
    "import torch": ["-c", "import torch"],
    "transformers": ["-c", "from transformers import ViTForImageClassification"],
    "import hf_vit": ["-c", "import hf_vit"],
    "hf-vit --help": ["-m", "hf_vit.cli", "--help"],
    "hf-vit train --help": ["-m", "hf_vit.cli", "train", "--help"],
    "hf-vit recipes": ["-m", "hf_vit.cli", "recipes"],
}


def parse() -> Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="Checkpoint for hf-vit predict.")
    parser.add_argument("--image", help="Image for hf-vit predict.")
    parser.add_argument("--rounds", type=int, default=10, help="Number of measurements of each command.")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    commands = dict(COMMANDS)
    if find_spec("timm"):
        commands["import timm"] = ["-c", "import timm"]
    if arguments.model and arguments.image:
        commands["hf-vit predict"] = ["-m", "hf_vit.cli", "predict", arguments.model, arguments.image]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(arguments.rounds + 1):
        for name, command in commands.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, capture_output=True, env=environment)
            seconds[name].append(time.perf_counter() - began)
    for name, (_, *measured) in seconds.items():
        print(f"{name:20} {statistics.median(measured):6.2f} s ({min(measured):.2f} to {max(measured):.2f})")


if __name__ == "__main__":
    main()
