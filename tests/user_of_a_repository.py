"""What a user does with a saved folder or a repository, through nothing but transformers.

As a program, it writes what every Auto class gives for each source to OUTPUTS/0.npz, OUTPUTS/1.npz and so on; where
asked to, it saves the first source again, and has Trainer write a checkpoint of it.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    pipeline,
)

TRUST: dict[str, Any] = {"trust_remote_code": True}


def images(number: int = 3) -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, size=(number, 41, 57, 3), dtype=np.uint8)
    return [Image.fromarray(pixels) for pixels in noise]


def backbone_of(source: str) -> torch.nn.Module:
    if not os.path.isdir(source):
        return AutoBackbone.from_pretrained(source, **TRUST)
    # Before it looks at a folder, transformers asks the Hub for a repository of that name, which a path is not.
    return type(AutoBackbone.from_config(AutoConfig.from_pretrained(source, **TRUST), **TRUST)).from_pretrained(source)


@torch.no_grad()
def outputs(source: str) -> dict[str, np.ndarray]:
    """Return what every Auto class and both pipelines make of the same images."""
    pixels = {
        backend: np.asarray(
            AutoImageProcessor.from_pretrained(source, backend=backend, **TRUST)(images(), return_tensors="pt")[
                "pixel_values"
            ]
        )
        for backend in ("torchvision", "pil")
    }
    pixel_values = torch.from_numpy(pixels["torchvision"])
    encoder = AutoModel.from_pretrained(source, **TRUST).eval()(pixel_values)
    classifier = AutoModelForImageClassification.from_pretrained(source, **TRUST).eval()
    feature_maps = backbone_of(source).eval()(pixel_values).feature_maps
    torch.manual_seed(0)  # a classifier's checkpoint has no decoder
    masked = AutoModelForMaskedImageModeling.from_pretrained(source, **TRUST).eval()
    classify = pipeline("image-classification", source, **TRUST)
    extract = pipeline("image-feature-extraction", source, **TRUST)
    scores = classify(images(), batch_size=2, top_k=None)
    return {
        **{f"pixels_{backend}": values for backend, values in pixels.items()},
        "last_hidden_state": encoder.last_hidden_state.numpy(),
        "pooler_output": encoder.pooler_output.numpy(),
        "logits": classifier(pixel_values).logits.numpy(),
        "feature_map": feature_maps[0].numpy(),
        "reconstruction": masked(pixel_values).reconstruction.numpy(),
        "scores": np.array([[guess["score"] for guess in guesses] for guesses in scores]),
        "features": np.array(extract(images(), batch_size=2)),
        "modules": np.array([type(each).__module__.partition(".")[0] for each in (classifier, masked, classify)]),
    }


def save_again(source: str, resaved: str, trained: str) -> None:
    """Save what was loaded, and have Trainer write a checkpoint behind a step that changes nothing."""
    from transformers import Trainer, TrainingArguments

    model = AutoModelForImageClassification.from_pretrained(source, **TRUST)
    processor = AutoImageProcessor.from_pretrained(source, **TRUST)
    model.save_pretrained(resaved)
    processor.save_pretrained(resaved)
    values = processor(images(), return_tensors="pt")["pixel_values"]
    arguments = TrainingArguments(
        trained, max_steps=1, save_steps=1, learning_rate=0.0, use_cpu=True, report_to=[], disable_tqdm=True
    )
    examples = [{"pixel_values": value, "labels": label} for label, value in enumerate(values)]
    Trainer(model, arguments, train_dataset=examples, processing_class=processor).train()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("outputs", type=Path)
    parser.add_argument("sources", nargs="+")
    parser.add_argument("--save-again", nargs=2, metavar=("RESAVED", "TRAINED"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.outputs.mkdir()
    for number, source in enumerate(options.sources):
        np.savez(options.outputs / f"{number}.npz", **outputs(source))
    if options.save_again:
        save_again(options.sources[0], *options.save_again)
