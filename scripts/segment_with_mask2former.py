"""Train transformers' Mask2Former on a backbone of this package, with Trainer.

    python scripts/segment_with_mask2former.py camvid/ mask2former/ --steps 2000
    python scripts/segment_with_mask2former.py camvid/ mask2former/ --model my-encoder/ --size 384 512

DATA is a folder of parquet files, or a data set on the Hub, with the splits train and test, and with the columns
`image` and `mask`. Masks hold class indices, 255 where unknown; a column of lists of `ClassLabel` has their names. The
backbone returns maps of the strides 4, 8, 16 and 32, which Mask2Former was made for. Every class in an image is one
mask to predict.
"""

import argparse
from typing import Any

import torch
from datasets import load_dataset
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Trainer, TrainingArguments

from hf_vit import HFViTBackbone, HFViTConfig, HFViTImageProcessor
from hf_vit.data.masks import names_in_features

STRIDES = [4, 8, 16, 32]
SMALL = {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 768}


def build_model(arguments: argparse.Namespace, names: list[str]) -> Mask2FormerForUniversalSegmentation:
    """Return a Mask2Former on the encoder of a checkpoint, or on a small new one."""
    fields = {"image_size": arguments.size, "feature_strides": STRIDES}
    if arguments.model is None:
        backbone = HFViTBackbone(HFViTConfig(**SMALL, **fields, pooling="mean"))
    else:
        backbone = HFViTBackbone.from_pretrained(arguments.model, **fields)
    options = {"id2label": dict(enumerate(names)), "decoder_layers": 4, "num_queries": 30}
    config = Mask2FormerConfig(backbone_config=backbone.config, **options)
    model = Mask2FormerForUniversalSegmentation(config)
    model.model.pixel_level_module.encoder.load_state_dict(backbone.state_dict())
    return model


class MaskCollator:
    """Prepare a batch of images, and one mask for every class in each."""

    def __init__(self, processor: HFViTImageProcessor) -> None:
        self.processor = processor

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        images, masks = ([row[column] for row in rows] for column in ("image", "mask"))
        batch = self.processor(images, masks, return_tensors="pt")
        classes = [labels.unique() for labels in batch["labels"]]
        classes = [each[each != 255] for each in classes]
        of_class = [labels == each[:, None, None] for labels, each in zip(batch["labels"], classes, strict=True)]
        return {
            "pixel_values": batch["pixel_values"],
            "mask_labels": [each.float() for each in of_class],
            "class_labels": classes,
        }


def pixel_accuracy(model: Any, rows: Any, processor: HFViTImageProcessor) -> float:
    """Return the share of known pixels with the right class, at the size of the model."""
    right = known = 0
    for row in rows:
        batch = processor(row["image"], row["mask"], return_tensors="pt").to(model.device)
        with torch.no_grad():
            outputs = model.eval()(pixel_values=batch["pixel_values"])
        scores = outputs.masks_queries_logits.sigmoid().flatten(2)  # [1, Q, h*w]
        of_classes = outputs.class_queries_logits.softmax(dim=-1)[..., :-1].mT @ scores
        sizes = outputs.masks_queries_logits.shape[-2:], batch["labels"].shape[-2:]
        logits = torch.nn.functional.interpolate(of_classes.unflatten(2, sizes[0]), sizes[1], mode="bilinear")
        right += int((logits.argmax(dim=1) == batch["labels"]).sum())
        known += int((batch["labels"] != 255).sum())
    return right / known


def main(given: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="Folder, or name on the Hub.")
    parser.add_argument("folder", help="Folder of the trained model.")
    parser.add_argument("--model", help="Checkpoint of an encoder; a small new one by default.")
    parser.add_argument("--size", type=int, nargs=2, default=(192, 256), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    arguments = parser.parse_args(given)
    data = load_dataset(arguments.data)
    names = names_in_features(data["train"].features)
    if names is None:
        raise SystemExit("The features name no classes: add a column of ClassLabel.")
    model, processor = build_model(arguments, names), HFViTImageProcessor.from_preset("original", arguments.size)
    options = TrainingArguments(
        arguments.folder,
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="cosine",
        remove_unused_columns=False,
        save_strategy="no",
        report_to=[],
    )
    Trainer(model, options, train_dataset=data["train"], data_collator=MaskCollator(processor)).train()
    model.save_pretrained(arguments.folder)
    processor.save_pretrained(arguments.folder)
    accuracy = pixel_accuracy(model, data["test"], processor)
    print(f"Pixel accuracy on {len(data['test'])} test images: {accuracy:.1%}")
    return accuracy


if __name__ == "__main__":
    main()
