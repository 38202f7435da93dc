"""Compare `pipeline("image-classification")` of our model and of stock ViT, and torch.compile with freezing.

    python scripts/benchmark_pipeline.py photos/ --model Ti/16

The weights, photos and preprocessing are the same. Everything runs in one process and one thread, in turns; the output
is the median over rounds, and the ratio to the first row within each round. The number of equal top labels is printed,
and the outputs of the forward passes must agree.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import pipeline

import hf_vit
from hf_vit.benchmark.preparation import write_models
from hf_vit.inference.optimize import optimize_for_inference
from hf_vit.system.machine import machine, versions


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="Folder of images.")
    parser.add_argument("--model", default="Ti/16", help="Variant.")
    parser.add_argument("--images", type=int, default=16, help="Number of photos per call.")
    parser.add_argument("--rounds", type=int, default=9, help="Number of rounds.")
    return parser.parse_args()


def compare(title: str, calls: dict[str, Callable[[], Any]], images: int, rounds: int) -> None:
    """Print images/s of each call, and its speed relative to the first call."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    first = seconds[next(iter(calls))]
    print(f"\n| {title} | images/s | speed |\n|---|---|---|")
    for name, times in seconds.items():
        ratios = [base / own for base, own in zip(first, times, strict=True)]
        speed = (
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if times is not first else "1"
        )
        print(f"| {name} | {images / statistics.median(times):.1f} | {speed} |")


def pipelines(folder: Path, photos: list[str], batch_size: int) -> dict[str, Callable[[], Any]]:
    """Return calls that label photos, after printing how many top labels are equal."""
    found = {
        name: pipeline("image-classification", str(folder / part), batch_size=batch_size)
        for name, part in (("transformers' ViT", "transformers"), ("hf_vit", "ours"))
    }
    labels = [[each[0]["label"] for each in classify(photos, top_k=1)] for classify in found.values()]
    agreement = sum(first == second for first, second in zip(*labels, strict=True))
    print(f"\nBatch size {batch_size}: {agreement} of {len(photos)} top labels are equal.")
    return {name: lambda classify=classify: classify(photos, top_k=1) for name, classify in found.items()}


def forwards(folder: Path, images: int) -> dict[str, Callable[[], Any]]:
    """Return forward passes of one batch of noise: eager, optimized, and compiled without and with freezing."""
    pixel_values = torch.randn(images, 3, 224, 224, generator=torch.Generator().manual_seed(0))

    def load() -> Any:
        return hf_vit.HFViTForImageClassification.from_pretrained(folder / "ours").eval()

    networks = {"eager": load(), "optimize_for_inference": optimize_for_inference(load())}
    networks["torch.compile"] = torch.compile(load())
    networks["torch.compile of optimize_for_inference"] = torch.compile(optimize_for_inference(load()))
    networks["torch.compile with freezing"] = torch.compile(load(), options={"freezing": True})
    calls = {
        name: torch.no_grad()(lambda network=network: network(pixel_values).logits)
        for name, network in networks.items()
    }
    expected = calls["eager"]()
    for call in calls.values():
        torch.testing.assert_close(call(), expected, atol=1e-3, rtol=1e-3)
    return calls


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    photos = sorted(str(path) for path in options.photos.iterdir() if path.is_file())[: options.images]
    print(machine(), versions(), sep="\n")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if failures := write_models(options.model, folder, ["transformers"]):
            raise SystemExit(f"Error: {failures}")
        for batch_size in (1, 8):
            calls = pipelines(folder, photos, batch_size)
            compare(f"pipeline, {options.model}, batch size {batch_size}", calls, len(photos), options.rounds)
        for batch_size in (1, 8):
            calls = forwards(folder, batch_size)
            compare(f"forward, {options.model}, batch size {batch_size}", calls, batch_size, 3 * options.rounds)


if __name__ == "__main__":
    main()
