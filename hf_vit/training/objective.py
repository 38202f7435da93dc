"""What every training objective has, beside its loss and its evaluation."""

from collections.abc import Callable
from typing import Any, Self

import torch
from accelerate.utils import gather_object, send_to_device
from torch import Tensor, nn

from ..data.images import derive_seed
from ..model.modeling_hf_vit import HFViTPreTrainedModel
from ..system.transfers import to_device
from .recipe import TrainConfig


class TrainedInside(HFViTPreTrainedModel):
    """A model with layers that only its training needs; the attribute that `kept` names is saved without them."""

    _no_split_modules = ["HFViTLayer"]
    kept = "encoder"

    @property
    def vit(self) -> Any:
        """The encoder, where the optimizer and the report look for it."""
        return getattr(self, self.kept).base_model

    @classmethod
    def around(cls, kept: Any) -> Self:
        """Return a model with the weights of `kept`; its other layers are new."""
        model = cls(kept.config)
        getattr(model, model.kept).load_state_dict(kept.state_dict())
        return model


class Objective:
    """Base class of the objectives in `tasks.TASKS`.

    Attributes:
        passes: Forward passes per training image, in units of one with the whole image.
    """

    passes = 1.0

    def begin(self, run: Any, model: Any) -> None:
        """Prepare what depends on the images and the model of a run; called once, before anything is written."""

    def published(self, model: Any, weights: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        """Return the model that a run saves at its end, and its weights, from those that it trains."""
        if not isinstance(model, TrainedInside):
            return model, weights
        prefix = f"{model.kept}."
        saved = {name[len(prefix) :]: each for name, each in weights.items() if name.startswith(prefix)}
        return getattr(model, model.kept), saved


@torch.no_grad()
def means_over_images(
    measure: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
    model: nn.Module,
    loader: Any,
    accelerator: Any,
    normalize: Callable[[Tensor], Tensor],
) -> tuple[list[float], int, list[str]]:
    """Return means over the images of all processes, their number, and the names of those that cannot be read.

    Args:
        measure: Returns values of every image, `[B]` each, of pixel values `[B, C, H, W]` and the images' indices.
        model: The model, in evaluation mode meanwhile.
        loader: Batches of evaluation images; an index below 0 is an image that does not count.
        accelerator, normalize: Those of the run.
    """
    was_training = model.training
    model.eval()
    sums: list[Tensor] = []  # on the device: reading each would wait for it
    number = 0
    broken: list[str] = []
    for batch in loader:
        broken += batch["broken"]
        pixel_values = normalize(send_to_device(batch["pixel_values"], accelerator.device, non_blocking=True))
        indices = batch["index"].cpu()
        is_counted = to_device((indices >= 0).float(), pixel_values.device)
        sums.append(torch.stack([values.float() @ is_counted for values in measure(pixel_values, indices)]))
        number += int((indices >= 0).sum())
    model.train(was_training)
    totals = torch.stack(sums).cpu().double().sum(dim=0).tolist()
    total = torch.tensor([*totals, number], dtype=torch.float32, device=accelerator.device)
    *totals, counted = accelerator.reduce(total, "sum").tolist()
    broken = gather_object(broken) if accelerator.num_processes > 1 else broken
    return [each / max(1, counted) for each in totals], round(counted), sorted(broken)


def without_wrapper(model: Any) -> Any:
    """Return the model itself, without what Accelerate wraps around it for several processes."""
    return getattr(model, "module", model)


def generators_of(what: str, indices: Tensor) -> list[torch.Generator]:
    """Return a generator per image, seeded by its index, so that every evaluation draws the same numbers."""
    return [torch.Generator().manual_seed(derive_seed(what, index)) for index in indices.tolist()]


def refuse_mixing(config: TrainConfig, reason: str) -> None:
    """Raise `ValueError` if a recipe mixes images or weighs classes."""
    given = {name: getattr(config, name) for name in ("cutmix", "mixup", "label_smoothing")}
    given |= {"class_weights": config.class_weights} if config.class_weights != "none" else {}
    given |= {"sampling": config.sampling} if config.sampling == "balanced" else {}
    if mixing := [f"{name}={value}" for name, value in given.items() if value]:
        raise ValueError(f"{reason}: remove {', '.join(mixing)}.")
