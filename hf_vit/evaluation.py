"""Figures over a loader."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.no_grad()
def evaluate(model: nn.Module, loader: Any, accelerator: Any, normalize: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Measure a classifier on every image of a loader, each counted once however many processes share the work.

    Args:
        model: Prepared by `accelerator`. Its mode is left as it was.
        loader: Prepared too, so that the images which fill up the last batch of a process are not counted.
        normalize: Brings the loader's uint8 pixels to what the model takes.

    Returns:
        `accuracy` in 0 to 1, `loss` (mean cross-entropy), and the `count` of images.
    """
    was_training = model.training
    model.eval()
    losses, hits = [], []
    for batch in loader:
        logits = model(pixel_values=normalize(batch["pixel_values"])).logits.float()  # [B, num_labels]
        loss = F.cross_entropy(logits, batch["labels"], reduction="none")
        hit = logits.argmax(dim=-1) == batch["labels"]
        loss, hit = accelerator.gather_for_metrics((loss, hit))
        losses.append(loss.double())
        hits.append(hit)
    model.train(was_training)
    count = sum(len(hit) for hit in hits)
    return {
        "accuracy": torch.cat(hits).sum().item() / count,
        "loss": torch.cat(losses).sum().item() / count,
        "count": count,
    }


@torch.no_grad()
def predict(model: nn.Module, loader: Any, normalize: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the probabilities of all images of a loader in their order, float32 `[N, num_labels]` on the CPU."""
    model.eval()
    device = next(model.parameters()).device
    return torch.cat(
        [
            model(pixel_values=normalize(batch["pixel_values"].to(device))).logits.float().softmax(dim=-1).cpu()
            for batch in loader
        ]
    )
