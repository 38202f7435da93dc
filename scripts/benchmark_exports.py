"""Measure every export of a model beside torch: deviation, throughput and size.

    python scripts/benchmark_exports.py ViT-B/16 relative my-vit --images photos/

MODELS are folders, names on the Hub, names of architectures with random weights, or `relative` for a ViT-Ti/16 with
relative positions. Each format is exported as `hf-vit export` does, which compares it with torch. Throughput is that
of one thread, in turns that alternate between the formats, also as a ratio to torch in the same turn: median, minimum
and maximum. What a format refuses, or lacks packages for, is left out, with the reason.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # ExecuTorch and torch read it when they are loaded

import numpy as np
import torch

from hf_vit.benchmark.preparation import random_model
from hf_vit.checkpoints.models import load
from hf_vit.graphs.export import export_graph, largest_difference
from hf_vit.graphs.kinds import KINDS
from hf_vit.graphs.tracing import Graph
from hf_vit.graphs.transformers_js import NAME as TRANSFORMERS_JS
from hf_vit.graphs.transformers_js import export_transformers_js, node_modules
from hf_vit.model.image_processing_hf_vit import HFViTImageProcessor
from hf_vit.system.machine import machine, versions

RELATIVE = {"name": "ViT-Ti/16", "position_embedding_type": "relative"}
# Format, precision, and form of int8.
FORMS = (
    ("onnx", "fp32", None),
    ("onnx", "fp32", "dynamic"),
    ("onnx", "fp32", "static"),
    ("openvino", "fp32", None),
    ("openvino", "fp16", None),
    ("openvino", "fp32", "static"),
    ("torch-export", "fp32", None),
    ("executorch", "fp32", None),
    (TRANSFORMERS_JS, "fp32", None),
)
# Loads a folder, then answers each line "BATCH CHANNELS HEIGHT WIDTH" with the seconds of a forward pass.
NODE = """
import { createRequire } from 'node:module';
import { createInterface } from 'node:readline';
const [modules, parent, name] = process.argv.slice(1);
const { env, AutoModel, Tensor } = createRequire(modules + '/_')('@huggingface/transformers');
env.allowRemoteModels = false;
env.localModelPath = parent;
const model = await AutoModel.from_pretrained(name, { session_options: { intraOpNumThreads: 1 } });
for await (const line of createInterface({ input: process.stdin })) {
    const shape = line.split(' ').map(Number);
    const pixel_values = new Tensor('float32', new Float32Array(shape.reduce((a, b) => a * b)), shape);
    const began = performance.now();
    await model({ pixel_values });
    console.log((performance.now() - began) / 1000);
}
"""

Timer = Callable[[np.ndarray], float]  # from pixel values to the seconds of a forward pass


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODELS", help="Models, as described above.")
    parser.add_argument("--images", required=True, help="Folder of images for the calibration of int8 static.")
    parser.add_argument("--formats", nargs="+", choices=(*KINDS, TRANSFORMERS_JS), help="Formats; default: all.")
    parser.add_argument("--turns", type=int, default=7, help="Number of measurements of each format.")
    parser.add_argument("--output", type=Path, help="File to which each row is appended as a line of JSON.")
    return parser.parse_args()


def folder_of(name: str, parent: Path) -> str:
    """Return a folder with a model; one of random weights is written below `parent`."""
    if name != "relative" and not name.startswith("ViT-"):
        return name
    fields = RELATIVE if name == "relative" else {"name": name}
    model, folder = random_model(**fields), parent / "model"
    height, width = model.config.image_shape
    model.save_pretrained(folder)
    HFViTImageProcessor(size={"height": height, "width": width}).save_pretrained(folder)
    return str(folder)


def timed(run: Callable[[np.ndarray], Any]) -> Timer:
    def seconds(images: np.ndarray) -> float:
        began = time.perf_counter()
        run(images)
        return time.perf_counter() - began

    return seconds


def timed_in_node(folder: Path, stack: ExitStack) -> Timer:
    """Return the timer of a folder for transformers.js, which runs in a process of its own."""
    modules = node_modules()
    assert modules is not None
    command = ["node", "--input-type=module", "-e", NODE, str(modules.resolve()), str(folder.parent), folder.name]
    node = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert node.stdin is not None and node.stdout is not None
    answers, questions = node.stdout, node.stdin
    stack.callback(node.wait)
    stack.callback(questions.close)

    def seconds(images: np.ndarray) -> float:
        print(*images.shape, file=questions, flush=True)
        return float(answers.readline())

    return seconds


def exported(
    source: str, form: tuple[str, str, str | None], out: Path, images: str, stack: ExitStack
) -> tuple[Timer, float, int]:
    """Export a model; return its timer, its largest difference from torch, and the bytes of its files."""
    to, precision, int8 = form
    if to == TRANSFORMERS_JS:
        lines = export_transformers_js(source, out)
        stated = re.search(r"differ from torch's by at most (\S+);", lines[-1])  # absent where Node is missing
        if stated is None:
            raise ValueError(lines[-1])
        timer, difference = timed_in_node(out, stack), float(stated[1])
    else:
        calibration = images if int8 == "static" else None
        out = out.with_suffix(KINDS[to].suffix)
        export_graph(source, out, to, int8, precision=precision, calibration=calibration)
        model, processor = load(source)
        run = KINDS[to].read(out)
        graph = Graph(model, is_bounded=KINDS[to].is_bounded)
        timer, difference = timed(run), largest_difference(run, graph, processor)
    files = [path for path in out.parent.rglob("*") if path.is_file() and path.suffix != ".md"]
    return timer, difference, sum(path.stat().st_size for path in files)


@torch.inference_mode()
def measure(name: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for torch and for each format that a model has."""
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        parent = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        source = folder_of(name, parent)
        model, _ = load(source)
        graph = Graph(model.float().eval())
        timers = {"torch fp32": timed(lambda images: graph(torch.from_numpy(images)))}
        rows.append({"model": name, "form": "torch fp32", "bytes": sum(each.nbytes for each in model.parameters())})
        for form in FORMS:
            to, precision, int8 = form
            if arguments.formats and to not in arguments.formats:
                continue
            label = f"{to} {precision}" if int8 is None else f"{to} int8 {int8}"
            (parent / label).mkdir()
            try:
                timer, difference, size = exported(source, form, parent / label / "m", arguments.images, stack)
            except (ValueError, AssertionError) as error:
                print(f"{name}, {label}: {error}", file=sys.stderr)
                continue
            timers[label] = timer
            rows.append({"model": name, "form": label, "difference": difference, "bytes": size})
        for batch in (1, 16):
            shape = (batch, model.config.num_channels, *model.config.image_shape)
            images = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
            turns = [[timer(images) for timer in timers.values()] for _ in range(arguments.turns + 1)][1:]
            for row, seconds in zip(rows, zip(*turns, strict=True), strict=True):
                ratios = sorted(turn[0] / own for turn, own in zip(turns, seconds, strict=True))
                row[f"images/s at {batch}"] = batch / median(seconds)
                row[f"speedup at {batch}"] = [median(ratios), ratios[0], ratios[-1]]
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return rows as a table in Markdown."""
    lines = ["| model | form | largest difference | batch 1 | batch 16 | MB |", "|---|---|---|---|---|---|"]
    for row in rows:
        difference = row.get("difference")
        cells = [row["model"], row["form"], "" if difference is None else f"{difference:.1e}"]
        for batch in (1, 16):
            middle, low, high = row[f"speedup at {batch}"]
            ratio = "" if row["form"].startswith("torch fp32") else f", {middle:.2f} ({low:.2f} to {high:.2f})"
            cells.append(f"{row[f'images/s at {batch}']:.1f}{ratio}")
        lines.append(f"| {' | '.join(cells)} | {row['bytes'] / 1e6:,.1f} |")
    return "\n".join(lines)


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    facts = {"machine": machine(), "versions": versions(), "turns": arguments.turns}
    rows = []
    for name in arguments.models:
        rows += (found := measure(name, arguments))
        if arguments.output:
            with arguments.output.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row | facts) + "\n" for row in found)
    print(table(rows))


if __name__ == "__main__":
    main()
