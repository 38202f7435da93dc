"""How a head is trained on cached features: a function for each kind of head.

Heads of images are linear, with pooling and regularization chosen by cross-validation as in `hf-vit fit`. Heads of
pixels and objects are trained by AdamW. A head for anomalies stores a coreset of normal patches (PatchCore,
arXiv:2106.08265).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data.dense import kinds_of_images
from ...data.images import derive_seed
from ...evaluation.calibration import fit_temperature
from ...evaluation.detection import BoxResults, need_pycocotools
from ...evaluation.metrics import objects_and_losses, pixel_counts, results_of
from ...evaluation.results import LabelResults, MaskResults
from ...inference.threads import on_every_core
from ...model.detection_hf_vit import NEW_DETECTOR
from ...model.heads_hf_vit import OF_ANOMALY, config_of_head
from ...model.multi_task_hf_vit import HFViTAnomalyHead, HFViTObjectHead, HFViTPixelHead
from ...model.pooling_hf_vit import classifier_of
from ..fitting.embedding import Embeddings
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
    """Train a linear head for the classes of pixels."""
    head, fields = _new_head(HFViTPixelHead, plan, found, seed)
    size = [side * head.config.patch_subdivision for side in head.config.grid_size]
    # At the resolution of the logits, the loss costs 1/12 of what it costs at full resolution.
    masks = torch.stack([_resized(mask, size) for mask in _dense_labels(found, found.data.train, found.train)])
    ignored = head.config.semantic_loss_ignore_index

    def measure(output: Any, labels: Tensor) -> tuple[Tensor, ...]:
        return pixel_counts(output.logits, labels, ignored)

    return _trained_on_patches(plan, found, head, fields, masks, measure, MaskResults, seed)


def fit_object_head(plan: HeadPlan, found: HeadData, seed: int) -> TrainedHead:
    """Train a head for objects; its convolutions cost more than heads of other kinds."""
    need_pycocotools()
    head, fields = _new_head(HFViTObjectHead, plan, found, seed)
    boxes = torch.stack(list(_dense_labels(found, found.data.train, found.train)))

    def results(labels: Tensor, predicted: Tensor, losses: Tensor) -> BoxResults:
        measured = BoxResults(labels, predicted, losses, num_labels=len(found.data.label_names))
        measured.thresholds = fields["thresholds"] = measured.best_thresholds()
        return measured

    return _trained_on_patches(plan, found, head, fields, boxes, objects_and_losses, results, seed)


def _new_head(kind: Any, plan: HeadPlan, found: HeadData, seed: int) -> tuple[Any, dict[str, Any]]:
    """Return a head for pixels or objects with its initial weights, and its fields in the config."""
    default = NEW_DETECTOR if plan.task == "detection" else {}
    fields = {"task": plan.task, "id2label": dict(enumerate(found.data.label_names)), **default, **plan.own}
    with seeded(derive_seed(seed, plan.name, "weights")):
        head = kind(found.encoder.config, fields)
        head.reset_classifier()
    return head, fields


def _trained_on_patches(
    plan: HeadPlan,
    found: HeadData,
    head: Any,
    fields: dict[str, Any],
    labels: Tensor,
    measure: Callable[[Any, Tensor], tuple[Tensor, ...]],
    results: Callable[..., Any],
    seed: int,
) -> TrainedHead:
    """Train a head on cached patches, and evaluate it.

    Args:
        plan, found, seed: As for all kinds of heads.
        head, fields: The head with its initial weights, and its fields in the config.
        labels: Labels of the training images, `[N, ...]`.
        measure: Returns the quantities of every image for an output and labels.
        results: Makes results of these quantities.
    """
    config, patches, recipe = found.encoder.config, found.train.features[PATCHES], plan.recipe

    def loss(rows: Tensor) -> Tensor:
        return head(encoding_of(patches[rows], config), labels[rows]).loss

    last = train_on_batches(head, loss, len(patches), recipe, derive_seed(seed, plan.name, "order"))
    known = list(_dense_labels(found, found.data.evaluation, found.evaluation))
    columns, row = [], 0
    with torch.inference_mode():
        for encoding in found.encodings(found.evaluation.features[PATCHES]):
            output = head(encoding)
            columns.append(measure(output, torch.stack(known[row : row + len(output.logits)])))
            row += len(output.logits)
    metrics = results(*(torch.cat(column) for column in zip(*columns, strict=True))).metrics()
    facts = {"steps": recipe.max_steps, "learning_rate": recipe.learning_rate, "final_loss": last}
    return TrainedHead(fields, head.state_dict(), metrics, facts)


def train_on_batches(head: nn.Module, loss: Callable[[Tensor], Tensor], number: int, recipe: Any, seed: int) -> float:
    """Train a head by AdamW on random batches, and return the mean loss of the last tenth of the steps.

    The learning rate follows a cosine schedule after a warm-up.

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


def _dense_labels(found: HeadData, split: Any, features: Embeddings) -> Any:
    """Return an iterator over the masks or boxes of the readable images of a split, at the size of the processor."""
    _, kind = kinds_of_images(found.data)
    images = kind(split, found.data.columns, found.encoder.processor)
    return on_every_core(images.label, features.rows)


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
            f"The head {plan.name!r} has normal: {normal}, which is not a class of its data: choose one of "
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
    "detection": fit_object_head,
    "anomaly": fit_anomaly_head,
}
