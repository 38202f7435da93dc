"""Measure the throughput for images of many sizes: packed, padded to the largest, or resized to one square.

    python scripts/benchmark_packing.py photos/ --model Ti/16 --scales 0.12 0.6

All three use the same photos and model with random weights, in one process and one thread. They are measured in turns;
the output is the median over rounds. The logits of the pack are compared with those of single images. Padded images
have other logits, since their positions belong to the padded grid.
"""

import argparse
import random
import statistics
import time
from pathlib import Path

import torch
from PIL import Image

from hf_vit import HFViTForImageClassification, HFViTImageProcessor
from hf_vit.model.layers_hf_vit import unpatchify
from hf_vit.variants import config_of


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="Folder of images.")
    parser.add_argument("--model", default="Ti/16", help="Variant with patches of 16 pixels.")
    parser.add_argument("--images", type=int, default=16, help="Batch size.")
    parser.add_argument("--packing", type=int, default=196, help="Maximum number of patches per image.")
    parser.add_argument("--scales", type=float, nargs=2, default=(1.0, 1.0), help="Range of random scales of photos.")
    parser.add_argument("--rounds", type=int, default=9, help="Number of rounds.")
    return parser.parse_args()


def read(arguments: argparse.Namespace) -> list[Image.Image]:
    """Read photos and resize each by a random factor."""
    draw, images = random.Random(0), []
    for path in sorted(path for path in arguments.photos.iterdir() if path.is_file())[: arguments.images]:
        with Image.open(path) as image:
            scale = draw.uniform(*arguments.scales)
            size = (max(16, round(image.width * scale)), max(16, round(image.height * scale)))
            images.append(image.convert("RGB").resize(size))
    return images


def padded(pack: dict, prefix: int) -> dict[str, torch.Tensor]:
    """Pad every image of a pack to the largest grid at its bottom and right, and mask the padding."""
    grids = pack["patch_grids"].tolist()
    rows, columns = (max(side) for side in zip(*grids, strict=True))
    pixel_values = torch.zeros(len(grids), 3, 16 * rows, 16 * columns)
    mask = torch.zeros(len(grids), rows, columns, dtype=torch.long)
    parts = pack["pixel_values"].split([h * w for h, w in grids])
    for number, ((h, w), patches) in enumerate(zip(grids, parts, strict=True)):
        pixel_values[number, :, : 16 * h, : 16 * w] = unpatchify(patches[None], (16, 16), (h, w))[0]
        mask[number, :h, :w] = 1
    ones = torch.ones(len(grids), prefix, dtype=torch.long)
    return {"pixel_values": pixel_values, "attention_mask": torch.cat([ones, mask.flatten(1)], dim=1)}


@torch.inference_mode()
def main() -> None:
    arguments = parse()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = HFViTForImageClassification(config_of(arguments.model, initializer_range=0.1)).eval()
    images = read(arguments)
    processor = HFViTImageProcessor(packing=arguments.packing, patch_size=16)
    pack = processor(images, return_tensors="pt")
    inputs = {
        "packed": dict(pack),
        "padded": padded(pack, model.config.num_prefix_tokens),
        "square": dict(HFViTImageProcessor(size=224)(images, return_tensors="pt")),
    }
    alone = torch.cat([model(**processor([image], return_tensors="pt")).logits for image in images])
    torch.testing.assert_close(model(**inputs["packed"]).logits, alone, rtol=1e-3, atol=1e-3)

    throughput: dict[str, list[float]] = {name: [] for name in inputs}
    for _ in range(arguments.rounds):
        for name, batch in inputs.items():
            began = time.perf_counter()
            model(**batch)
            throughput[name].append(len(images) / (time.perf_counter() - began))
    sizes = pack["patch_grids"].prod(dim=1)
    share = 1 - sizes.float().mean() / inputs["padded"]["attention_mask"].shape[1]
    print(f"{len(images)} images with {int(sizes.min())} to {int(sizes.max())} patches; padding share {share:.0%}")
    for name, values in throughput.items():
        print(f"{name}  {statistics.median(values):6.1f} images/s ({min(values):.1f} to {max(values):.1f})")


if __name__ == "__main__":
    main()
