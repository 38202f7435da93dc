"""LeJEPA: features that random views of an image share, without labels, teachers or negative pairs.

Balestriero and LeCun 2025 (arXiv:2511.08544). The first loss is the squared distance between the projections of an
image's views and the mean of its global views. Equal features for all images would minimize it. So a second loss,
SIGReg, compares the projections of a batch with an isotropic Gaussian: it averages the statistic of Epps and Pulley
over random directions. The projector is part of the run, not of the saved model.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from ..checkpoints.models import load_encoder
from ..data.images import derive_seed
from ..data.labelled import ImageData
from ..data.random_views import NUMBERS, Crops, views_of
from ..model.image_processing_hf_vit import HFViTImageProcessor
from ..model.modeling_hf_vit import HFViTModel
from ..system.transfers import to_device
from .objective import (
    Objective,
    TrainedInside,
    generators_of,
    means_over_images,
    refuse_mixing,
    without_wrapper,
)
from .recipe import TrainConfig

# As in the README and MINIMAL.md of rbalestr-lab/lejepa.
GLOBAL_AREAS, LOCAL_AREAS = (0.3, 1.0), (0.05, 0.3)
LOCAL_SIDE = 98 / 224  # of a local view, as a share of the image's
DIRECTIONS = 256  # random ones, new in every step
KNOTS, LAST_KNOT = 17, 3.0  # of the quadrature of the test
WIDTH, PROJECTION = 4, 128  # width of the projector as a multiple of the encoder's, and of its output


def sigreg(projections: Tensor, directions: Tensor) -> Tensor:
    """Return how far projections are from an isotropic Gaussian: the mean of Epps-Pulley statistics.

    The statistic of a direction is the squared difference between the empirical characteristic function and that of
    N(0, 1), weighted by the latter, integrated, and multiplied by the number of images.

    Args:
        projections: `[V, B, K]`, of V views of B images.
        directions: `[K, M]`, not normalized.
    """
    knots = torch.linspace(0, LAST_KNOT, KNOTS, device=projections.device)
    normal = (-knots.square() / 2).exp()
    step = LAST_KNOT / (KNOTS - 1)
    weights = torch.full_like(knots, 2 * step)  # the other half of the axis is a mirror image
    weights[0] = weights[-1] = step
    sketches = projections.float() @ (directions / directions.norm(dim=0))  # [V, B, M]
    angles = sketches.unsqueeze(-1) * knots
    difference = (angles.cos().mean(dim=1) - normal).square() + angles.sin().mean(dim=1).square()  # [V, M, knots]
    return (difference @ (weights * normal)).mean() * projections.shape[1]


class BatchStandardization(nn.Module):
    """Batch normalization with the statistics of the current batch, also in evaluation, without learned parameters.

    Without it, the initial projections of all images are almost equal, where the gradient of SIGReg almost vanishes.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        variance, mean = torch.var_mean(hidden_states.float(), dim=0, correction=0)
        return ((hidden_states - mean) * (variance + 1e-5).rsqrt()).to(hidden_states.dtype)


class ViewEncoder(TrainedInside):
    """An encoder, and a projector of its pooled features."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.encoder: Any = HFViTModel(config)
        pooled, width = config.representation_size or config.pooled_width, WIDTH * config.hidden_size
        self.projector = nn.Sequential(
            nn.Linear(pooled, width), BatchStandardization(), nn.GELU(),
            nn.Linear(width, width), BatchStandardization(), nn.GELU(),
            nn.Linear(width, PROJECTION),
        )  # fmt: skip
        self.post_init()

    def forward(self, pixel_values: Tensor, local_views: Tensor | None = None, **kwargs: Any) -> ModelOutput:
        """Return the projections of B global views, followed by those of L local views, `[B + L, K]`."""
        sizes = [pixel_values] if local_views is None else [pixel_values, local_views]
        pooled = torch.cat([self.vit(images).pooler_output for images in sizes])
        return ModelOutput(predictions=self.projector(pooled))


class LeJEPA(Objective):
    """Give all views of an image similar projections, and the projections of all images a Gaussian distribution."""

    needs_labels = False
    best_metric = "loss"
    metric_names = ("loss", "distance")
    problem_type = None
    model_class: Any = ViewEncoder
    fields: dict[str, Any] = {}

    def __init__(self, config: TrainConfig, data: ImageData) -> None:
        refuse_mixing(config, "LeJEPA does not mix images or weigh classes")
        if config.trained != "all":
            raise ValueError(f"LeJEPA trains the whole encoder: remove trained={config.trained}.")
        self.config = config
        self.views = config.global_views + config.local_views
        self.passes = config.global_views + LOCAL_SIDE**2 * config.local_views

    def load(self, source: str, **fields: Any) -> tuple[Any, HFViTImageProcessor]:
        """Load the encoder of a checkpoint, and its processor; the projector is new."""
        encoder, processor = load_encoder(source, **fields)
        return ViewEncoder.around(encoder), processor

    def loss(self, model: nn.Module, pixel_values: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Return the loss of a batch; `generator` draws its views and the directions of SIGReg.

        SIGReg is computed over the images of one forward pass, so the loss of a divided batch differs from that of the
        whole.
        """
        draws = torch.rand(len(pixel_values), self.views, NUMBERS, generator=generator)
        distances, regularization = self._losses(model, pixel_values, draws, generator)
        return self._weighted(distances.mean(), regularization)

    def evaluate(
        self, model: nn.Module, loader: Any, accelerator: Any, normalize: Callable[[Tensor], Tensor]
    ) -> tuple[dict[str, Any], list[str], None]:
        """Return the mean loss, the distance between views alone, and names of images that cannot be read.

        The views of an image are the same in every evaluation.
        """

        def losses(pixel_values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
            generators = generators_of("views", indices)
            draws = torch.stack([torch.rand(self.views, NUMBERS, generator=generator) for generator in generators])
            directions = torch.Generator().manual_seed(derive_seed("directions"))
            distances, regularization = self._losses(model, pixel_values, draws, directions)
            return self._weighted(distances, regularization), distances

        means, count, broken = means_over_images(losses, model, loader, accelerator, normalize)
        return {**dict(zip(self.metric_names, means, strict=True)), "count": count}, broken, None

    def _weighted(self, distances: Tensor, regularization: Tensor) -> Tensor:
        weight = self.config.sigreg_weight
        return (1 - weight) * distances + weight * regularization

    def _losses(
        self, model: Any, pixel_values: Tensor, draws: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return the mean squared distance of views from the mean of the global ones, `[B]`, and SIGReg of all."""
        number = self.config.global_views
        draws = to_device(draws, pixel_values.device)
        whole, smaller = self._crops(model, pixel_values)
        jitter, rows = self.config.view_jitter, draws.unbind(1)
        views = torch.cat([views_of(pixel_values, row, whole, jitter) for row in rows[:number]])
        local = [views_of(pixel_values, row, smaller, jitter) for row in rows[number:]]
        outputs = model(pixel_values=views, local_views=torch.cat(local) if local else None)
        projections = outputs.predictions.float()
        projections = projections.view(-1, len(pixel_values), projections.shape[-1])  # [V, B, K]
        center = projections[:number].mean(dim=0)
        distances = (projections - center).square().mean(dim=(0, 2))
        directions = torch.randn(projections.shape[-1], DIRECTIONS, generator=generator)
        return distances, sigreg(projections, to_device(directions, pixel_values.device))

    def _crops(self, model: Any, pixel_values: Tensor) -> tuple[Crops, Crops]:
        """Return global and local crops; the sides of the latter are whole patches, at least two."""
        (height, width), patch = pixel_values.shape[-2:], without_wrapper(model).config.patch_shape
        down, across = (
            max(2, round(LOCAL_SIDE * side / each)) * each for side, each in zip((height, width), patch, strict=True)
        )
        return Crops((height, width), GLOBAL_AREAS), Crops((down, across), LOCAL_AREAS)
