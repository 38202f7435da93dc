"""How a head is trained on cached features: a function for each kind of head.

Heads of images are linear, with pooling and regularization chosen by cross-validation as in `hf-vit fit`. Heads of
pixels are trained by AdamW. A head for anomalies stores a coreset of normal patches (PatchCore, arXiv:2106.08265).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data.images import derive_seed
from ...data.masks import MaskedEvaluationImages
from ...evaluation.calibration import fit_temperature
from ...evaluation.metrics import pixel_counts, results_of
from ...evaluation.results import LabelResults, MaskResults
from ...inference.threads import on_every_core
from ...model.heads_hf_vit import OF_ANOMALY, config_of_head
from ...model.multi_task_hf_vit import HFViTAnomalyHead, HFViTPixelHead
from ...model.pooling_hf_vit import classifier_of
from ..fitting.heads import fit_head, problem_of
from .features import PATCHES, HeadData, encoding_of, seeded
from .plans import HeadPlan

WEIGHT_DECAY = 0.01
MOST_PATCHES = 50_000  # that take part in the choice of a memory
PROJECTED = 128  # dimensions in which patches are compared for it, as in PatchCore (section 3.2)
KEPT_FOR_THRESHOLD = 5  # every fifth normal image is not in the memory
SHARE_BELOW = 0.99  # of the scores of these images, which lie below the threshold


@dataclass
class TrainedHead:
    """A head after its training.

    Attributes:
        fields: The head in the config.
        weights: By the names in the head's module.
        metrics: On the evaluation split.
        facts: How it was trained, in plain values.
    """

    fields: dict[str, Any]
    weights: dict[str, Tensor]
    metrics: dict[str, float]
    facts: dict[str, Any]


def fit_image_head(plan: HeadPlan, found: HeadData, seed: int) -> TrainedHead:
    """Fit a linear head to pooled features."""
    data, train, evaluation = found.data, found.train, found.evaluation
    problem = problem_of(data.problem_type, len(data.label_names))
    targets = problem.targets(found.labels(data.train, train))
    digests = [digest for digest in train.contents.digests if digest]
    fitted = fit_head(found.pooled(train), targets, problem, digests, seed)
    fields: dict[str, Any] = {
        "task": plan.task,
        "id2label": dict(enumerate(data.label_names)),
        "pooling": fitted.pooling,
        "representation_size": None,
        **{name: value for name, value in problem.fields(targets).items() if name != "problem_type"},
    }
    if problem.metric != "r2":
        fields["temperature"] = fit_temperature(fitted.logits, targets)
    if problem.metric == "mean_average_precision":
        scores = (fitted.logits / fields["temperature"]).sigmoid()
        fields["thresholds"] = LabelResults(targets, scores, torch.zeros_like(scores)).best_thresholds()
    config = config_of_head(found.encoder.config, fields)
    classifier = classifier_of(config)
    problem.in_model(fitted.head, targets).write_into(classifier)
    logits = fitted.head(found.pooled(evaluation)[fitted.pooling]) / fields.get("temperature", 1.0)
    results = results_of(logits, problem.targets(found.labels(data.evaluation, evaluation)), config)
    return TrainedHead(
        fields,
        {f"classifier.{name}": tensor for name, tensor in classifier.state_dict().items()},
        results.metrics(),
        {"pooling": fitted.pooling, "strength": fitted.strength, problem.metric + "_of_folds": fitted.score},
    )


def fit_pixel_head(plan: HeadPlan, found: HeadData, seed: int) -> TrainedHead:
    """Train a linear head for the classes of pixels by AdamW; the learning rate falls by a cosine after a warm-up."""
    data, recipe = found.data, plan.recipe
    fields = {"task": plan.task, "id2label": dict(enumerate(data.label_names)), **plan.own}
    with seeded(derive_seed(seed, plan.name, "weights")):
        head = HFViTPixelHead(found.encoder.config, fields)
        nn.init.trunc_normal_(head.decode_head.classifier.weight, std=head.config.initializer_range)
        nn.init.zeros_(head.decode_head.classifier.bias)
    patches, size = (
        found.train.features[PATCHES],
        [side * head.config.patch_subdivision for side in head.config.grid_size],
    )
    # At the resolution of the logits, the loss of a patch costs 1/12 of that of its pixels.
    masks = torch.stack([_resized(mask, size) for mask in _masks(found, data.train, found.train.rows)])
    config = found.encoder.config

    def loss(rows: Tensor) -> Tensor:
        output = head(encoding_of(patches[rows], config), masks[rows])
        return output.loss

    losses = train_on_batches(head, loss, len(patches), recipe, derive_seed(seed, plan.name, "order"))
    metrics = _pixel_metrics(head, found)
    facts = {"steps": recipe.max_steps, "learning_rate": recipe.learning_rate, "final_loss": losses}
    return TrainedHead(fields, head.state_dict(), metrics, facts)


def train_on_batches(head: nn.Module, loss: Callable[[Tensor], Tensor], number: int, recipe: Any, seed: int) -> float:
    """Train a head on random batches of cached features; return the mean loss of the last tenth of the steps.

    Args:
        head: The module to train.
        loss: Returns the loss of some rows.
        number: Number of rows.
        recipe: States `max_steps`, `batch_size` and `learning_rate`.
        seed: Seed of the order.
    """
    steps, generator = recipe.max_steps, torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(head.parameters(), lr=recipe.learning_rate, weight_decay=WEIGHT_DECAY)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (1 + math.cos(math.pi * step / steps)) / 2)
    )
    order, last = torch.empty(0, dtype=torch.int64), []
    for step in range(steps):
        if len(order) == 0:
            order = torch.randperm(number, generator=generator)
        rows, order = order[: recipe.batch_size], order[recipe.batch_size :]
        value = loss(rows)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        if step >= 0.9 * steps:
            last.append(value.detach())
    return torch.stack(last).mean().item()


def _resized(mask: Tensor, size: list[int]) -> Tensor:
    return F.interpolate(mask[None, None], size=size, mode="nearest-exact")[0, 0]


def _masks(found: HeadData, split: Any, rows: list[int]) -> Any:
    """Return an iterator over the masks of images as their processor resizes them, uint8 `[H, W]`."""
    data = found.data
    assert data.masks is not None and data.columns[1] is not None
    images = MaskedEvaluationImages(split, data.columns, found.encoder.processor, code=data.masks)
    return on_every_core(lambda row: images[row]["labels"], rows)


@torch.inference_mode()
def _pixel_metrics(head: HFViTPixelHead, found: HeadData) -> dict[str, float]:
    evaluation = found.evaluation
    masks = list(_masks(found, found.data.evaluation, evaluation.rows))
    columns, row = [], 0
    for encoding in found.encodings(evaluation.features[PATCHES]):
        logits = head(encoding).logits
        labels = torch.stack(masks[row : row + len(logits)])
        columns.append(pixel_counts(logits, labels, head.config.semantic_loss_ignore_index))
        row += len(logits)
    return MaskResults(*(torch.cat(column) for column in zip(*columns, strict=True))).metrics()


@torch.inference_mode()
def fit_anomaly_head(plan: HeadPlan, found: HeadData, seed: int) -> TrainedHead:
    """Fill a memory with normal patches, and choose the threshold on normal images that are not in it."""
    own = {name: value for name, value in plan.own.items() if name != "normal"}
    rows, is_anomaly = _normal_rows(plan, found)
    if len(rows) < 2:
        raise ValueError(f"The head {plan.name!r} needs at least two normal training images, got {len(rows)}.")
    number = len(rows)
    order = torch.randperm(number, generator=torch.Generator().manual_seed(derive_seed(seed, plan.name, "images")))
    kept, used = rows[order[: -(-number // KEPT_FOR_THRESHOLD)]], rows[order[-(-number // KEPT_FOR_THRESHOLD) :]]
    patches, config = found.train.features[PATCHES], found.encoder.config
    unit = F.normalize(patches[used].flatten(0, 1)[_sample(len(used) * patches.shape[1], seed)].float(), dim=-1)
    size = min(own.get("memory_size", OF_ANOMALY["memory_size"][0]), len(unit))
    fields = {"task": plan.task, **own, "memory_size": size}
    head = HFViTAnomalyHead(config, {**{name: default for name, (default, _) in OF_ANOMALY.items()}, **fields})
    head.memory.copy_(unit[coreset(unit, size, derive_seed(seed, plan.name, "memory"))])
    fields["threshold"] = _scores(head, found, patches[kept]).quantile(SHARE_BELOW).item()
    scores = _scores(head, found, found.evaluation.features[PATCHES])
    facts = {"normal_images": number, "memory_size": size, "kept_for_threshold": len(kept)}
    return TrainedHead(fields, head.state_dict(), _anomaly_metrics(scores, is_anomaly, fields["threshold"]), facts)


def _normal_rows(plan: HeadPlan, found: HeadData) -> tuple[Tensor, Tensor]:
    """Return the rows of normal training features, and whether each evaluation image is an anomaly."""
    data = found.data
    if (normal := plan.own.get("normal")) is None:
        return torch.arange(len(found.train.rows)), torch.zeros(len(found.evaluation.rows), dtype=torch.bool)
    if str(normal) not in data.label_names:
        raise ValueError(
            f"The head {plan.name!r} has normal: {normal}, which is no class of its data: choose one of "
            f"{', '.join(data.label_names)}."
        )
    index = data.label_names.index(str(normal))
    train, evaluation = (
        torch.tensor(found.labels(split, part)) == index
        for split, part in ((data.train, found.train), (data.evaluation, found.evaluation))
    )
    return train.nonzero().flatten(), ~evaluation


def _sample(number: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(derive_seed(seed, "patches"))
    return torch.randperm(number, generator=generator)[:MOST_PATCHES].sort().values


def coreset(vectors: Tensor, number: int, seed: int) -> Tensor:
    """Return the indices of vectors that cover all of them: each is the farthest one from those chosen before.

    Distances are measured after a random projection, as in PatchCore (arXiv:2106.08265, algorithm 1).

    Args:
        vectors: `[N, D]`, float32.
        number: Number of vectors to choose, at most N.
        seed: Seed of the projection.
    """
    from sklearn.random_projection import GaussianRandomProjection

    if vectors.shape[1] > PROJECTED:
        projection = GaussianRandomProjection(PROJECTED, random_state=seed % 2**32)
        vectors = torch.from_numpy(projection.fit_transform(vectors.numpy())).float()
    squares = vectors.square().sum(dim=-1)
    chosen = [int((squares - 2 * vectors @ vectors.mean(dim=0)).argmin())]  # nearest to the mean
    distances = torch.full((len(vectors),), torch.inf)
    while len(chosen) < number:
        last = vectors[chosen[-1]]
        distances = torch.minimum(distances, squares - 2 * vectors @ last + last.square().sum())
        distances[chosen[-1]] = -1.0  # rounding must not choose it again
        chosen.append(int(distances.argmax()))
    return torch.tensor(chosen)


def _scores(head: HFViTAnomalyHead, found: HeadData, patches: Tensor) -> Tensor:
    return torch.cat([head(encoding).scores for encoding in found.encodings(patches)])


def _anomaly_metrics(scores: Tensor, is_anomaly: Tensor, threshold: float) -> dict[str, float]:
    """Return the share of normal images above the threshold, and with anomalies how well scores separate them."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    is_above = scores > threshold
    metrics = {"false_alarms": is_above[~is_anomaly].double().mean().item()} if not is_anomaly.all() else {}
    if is_anomaly.any():
        metrics["recall"] = is_above[is_anomaly].double().mean().item()
        metrics["average_precision"] = float(average_precision_score(is_anomaly.numpy(), scores.numpy()))
        if not is_anomaly.all():
            metrics["auroc"] = float(roc_auc_score(is_anomaly.numpy(), scores.numpy()))
    return {**metrics, "count": len(scores)}


# By task; each gets the plan, the data with features, and the seed.
FITS: dict[str, Callable[[HeadPlan, HeadData, int], TrainedHead]] = {
    "classification": fit_image_head,
    "multi_label": fit_image_head,
    "regression": fit_image_head,
    "segmentation": fit_pixel_head,
    "anomaly": fit_anomaly_head,
}
