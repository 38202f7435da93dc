"""Measure what `hf-vit audit` finds of faults that are planted in a data set.

    python scripts/benchmark_audit.py labels flowers/ --model ENCODER --seeds 0 1 2
    python scripts/benchmark_audit.py copies flowers/ --model ENCODER --seeds 0 1 2
    python scripts/benchmark_audit.py plant flowers/ FOLDER --seeds 0

`labels` exchanges 5 % of the labels and states precision and recall of the listed ones, and the recall of several
rules at a precision of 0.7. `copies` adds copies of random images: encoded again, resized, mirrored, cropped by up to
10 % of each side, and all of this; it states the share that is found, from thumbnails and, for the first `--embedded`
copies of each kind, from features of ENCODER. `plant` writes the data with exchanged labels, to train an encoder on.

All splits are joined. Every line of the output has the CPU seconds of its step without the computation of features.
"""

import argparse
import json
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, Features, concatenate_datasets, load_dataset
from datasets import Image as ImageFeature
from PIL import Image
from torch import Tensor

from hf_vit import audit
from hf_vit.data.audit import picture_of, read_contents
from hf_vit.data.duplicates import gray_values, near_duplicates
from hf_vit.data.findings import WRONG_LABEL
from hf_vit.evaluation.label_noise import label_noise
from hf_vit.training.fitting.embedding import JOINED, Encoder, embed
from hf_vit.training.fitting.heads import SingleLabel, fit_head

COLUMNS = ("image", "label")
SHARE, COPIES, PRECISION = 0.05, 300, 0.7
KINDS = ("encoded again", "resized", "mirrored", "cropped", "all of these")
FEATURES_NEAR = (0.985, 0.95, 0.9)  # cosine similarities of centred features


def read(source: str) -> Dataset:
    """Return the images of all splits as one data set, as they are stored."""
    splits = load_dataset("parquet", data_files=sorted(map(str, Path(source).glob("*.parquet"))))
    return concatenate_datasets(list(splits.values())).cast_column("image", ImageFeature(decode=False))


def with_wrong_labels(data: Dataset, seed: int) -> tuple[Dataset, Tensor]:
    """Return the data with `SHARE` of the labels exchanged for other classes, and which."""
    generator = torch.Generator().manual_seed(seed)
    labels, number = torch.tensor(data["label"][:]), len(data)
    is_wrong = torch.zeros(number, dtype=torch.bool)
    is_wrong[torch.randperm(number, generator=generator)[: round(SHARE * number)]] = True
    classes = data.features["label"].num_classes
    others = (labels + torch.randint(1, classes, (number,), generator=generator)) % classes
    labels = torch.where(is_wrong, others, labels)
    changed = data.remove_columns("label").add_column("label", labels.tolist())
    return changed.cast_column("label", data.features["label"]), is_wrong


def recall_at(score: Tensor, is_wrong: Tensor) -> float:
    """Return the highest recall at which the precision is `PRECISION`."""
    found = is_wrong[score.argsort(descending=True)].cumsum(0)
    precise = (found / torch.arange(1, len(found) + 1) >= PRECISION).nonzero().flatten()
    return (found[precise[-1]] / is_wrong.sum()).item() if len(precise) else 0.0


def labels(data: Dataset, model: str, seed: int, cache: Path) -> dict[str, Any]:
    """Measure the labels that an audit lists, and other rules."""
    planted, is_wrong = with_wrong_labels(data, seed)
    encoder = Encoder.from_pretrained(model)
    embedded = embed(encoder, planted, COLUMNS, cache)
    began = time.process_time()
    result = audit({"train": planted}, model, cache=cache, seed=seed)
    seconds = time.process_time() - began
    listed = torch.zeros(len(planted), dtype=torch.bool)
    listed[[each.image for each in result.findings if each.kind == WRONG_LABEL]] = True
    targets = torch.tensor(planted["label"][:])
    digests = [str(digest) for digest in embedded.contents.digests]
    head = fit_head(embedded.features, targets, SingleLabel(data.features["label"].num_classes), digests, seed)
    noise = label_noise(head.logits, targets)
    probabilities = (head.logits / noise.temperature).softmax(dim=1)
    own = probabilities.gather(1, targets[:, None])[:, 0]
    typical = torch.stack([probabilities[targets == label, label].mean() for label in range(probabilities.shape[1])])
    confident = probabilities.where(probabilities >= typical, 0.0)
    confident_learning = (confident.amax(dim=1) > 0) & (confident.argmax(dim=1) != targets)
    ranked = torch.zeros(len(planted))
    for each in result.findings:
        if each.kind == WRONG_LABEL:
            ranked[each.image] = each.score
    hits = (listed & is_wrong).sum().item()
    return {
        "seed": seed, "wrong": int(is_wrong.sum()), "listed": int(listed.sum()), "precision": hits / int(listed.sum()),
        "recall": hits / int(is_wrong.sum()), "expected": result.wrong_labels, "probe": head.score,
        "recall at 0.7": {
            "noise model": recall_at(noise.probability, is_wrong),
            "listed, second round": recall_at(ranked, is_wrong),
            "low probability": recall_at(-own, is_wrong),
        },
        "confident learning": {
            "precision": is_wrong[confident_learning].float().mean().item(),
            "recall": (confident_learning & is_wrong).sum().item() / int(is_wrong.sum()),
        },
        "audit CPU seconds": seconds,
    }  # fmt: skip


def copy_of(content: bytes, kind: str, random: np.random.Generator) -> bytes:
    """Return a copy of an image as a JPEG file."""
    image = Image.open(BytesIO(content)).convert("RGB")
    width, height = image.size
    is_all = kind == "all of these"
    if is_all or kind == "mirrored":
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if is_all or kind == "cropped":
        inner = [int(side * (1 - random.uniform(0.02, 0.1))) for side in image.size]
        left, top = (int(random.integers(0, side - kept + 1)) for side, kept in zip(image.size, inner, strict=True))
        image = image.crop((left, top, left + inner[0], top + inner[1]))
    if is_all or kind == "resized":
        factor = random.uniform(0.4, 1.6)
        image = image.resize((round(width * factor), round(height * factor)), Image.Resampling.BICUBIC)
    file = BytesIO()
    image.save(file, "JPEG", quality=int(random.integers(20, 80)) if is_all or kind == "encoded again" else 90)
    return file.getvalue()


def copies(data: Dataset, model: str, seed: int, cache: Path, embedded: int) -> dict[str, Any]:
    """Measure which copies are found."""
    random, began = np.random.default_rng(seed), time.process_time()
    contents = read_contents(data, COLUMNS)
    thumbnails = gray_values([picture.small for picture in contents.pictures if picture])
    pairs = near_duplicates(thumbnails)
    seconds = time.process_time() - began
    chosen = random.choice(len(data), COPIES, replace=False).tolist()
    planted = {kind: [copy_of(data[row]["image"]["bytes"], kind, random) for row in chosen] for kind in KINDS}
    found = {}
    for kind, files in planted.items():
        near = near_duplicates(gray_values([picture_of(file).small for file in files]), thumbnails)
        found[kind] = len({pair.first for pair in near if pair.second == chosen[pair.first]}) / COPIES
    row = {"seed": seed, "found": found, "pairs in the data": len(pairs), "CPU seconds": seconds}
    if embedded:
        encoder = Encoder.from_pretrained(model)
        features = embed(encoder, data, COLUMNS, cache).features
        bank = features[JOINED if JOINED in features else next(iter(features))]
        mean = bank.mean(dim=0)
        bank = F.normalize(bank - mean, dim=1)
        within = bank @ bank.T
        within.fill_diagonal_(-1)
        row["pairs by features"] = {near: int((within >= near).sum()) // 2 for near in FEATURES_NEAR}
        row["found by features"] = {}
        for kind, files in planted.items():
            rows = {"image": [{"bytes": file, "path": None} for file in files[:embedded]], "label": [0] * embedded}
            split = Dataset.from_dict(rows, features=Features(data.features))
            own = embed(encoder, split, COLUMNS, cache).features
            queries = F.normalize(own[JOINED if JOINED in own else next(iter(own))] - mean, dim=1)
            similarity = (queries * bank[chosen[:embedded]]).sum(dim=1)
            row["found by features"][kind] = {
                near: (similarity >= near).float().mean().item() for near in FEATURES_NEAR
            }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subject", choices=["labels", "copies", "plant"])
    parser.add_argument("data", help="folder of parquet files with the columns image and label")
    parser.add_argument("folder", nargs="?", type=Path, help="folder that plant writes")
    parser.add_argument("--model", default="facebook/dinov2-small")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cache", type=Path, default=Path("audit-features"), help="folder of cached features")
    parser.add_argument("--embedded", type=int, default=60, help="copies of each kind that are embedded")
    options = parser.parse_args()
    data = read(options.data)
    if options.subject == "plant" and options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
        changed, _ = with_wrong_labels(data, options.seeds[0])
        changed.cast_column("image", ImageFeature()).to_parquet(options.folder / "train.parquet")
        return
    for seed in options.seeds:
        if options.subject == "labels":
            row = labels(data, options.model, seed, options.cache)
        else:
            row = copies(data, options.model, seed, options.cache, options.embedded)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
