"""Distillation: a student learns the features, and the labels, that teachers give for images without labels.

The student predicts every teacher's summary and patch features by a linear projection, as in AM-RADIO (Ranzinger et
al. 2024, arXiv:2312.06709), whose weights of cosine distance and smooth L1 are used. The features of each teacher are
standardized before: by their mean, and by one deviation over all dimensions, so that no teacher outweighs the others
(PHI-S, arXiv:2410.01680, without its rotation, which a linear projection can learn). Soft labels are those of Hinton
et al. 2015 (arXiv:1503.02531). The projections are part of the run, not of the saved model.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers.utils import ModelOutput

from ..checkpoints.models import fields_of_labels, load_classifier, load_encoder
from ..data.images import Visit, collate, image_digest, stored_rows
from ..data.labelled import ImageData
from ..model.image_processing_hf_vit import HFViTImageProcessor
from ..model.losses_hf_vit import scaled_logits
from ..model.modeling_hf_vit import HFViTForImageClassification, HFViTModel
from ..model.validation_hf_vit import OF_HEAD
from ..system.texts import shortened
from .objective import Objective, TrainedInside, means_over_images, refuse_mixing, without_wrapper
from .recipe import TrainConfig
from .teacher_cache import TeacherCache
from .teachers import Answers, Teachers

COSINE, SMOOTH_L1 = 0.9, 0.1  # weights of the two parts of the loss of features (arXiv:2312.06709)
SAMPLE = 512  # images by which features are standardized
SAMPLE_BATCH = 32


def soft_cross_entropy(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Return the divergence from a teacher's distribution over classes, `[B]`, times the squared temperature."""
    student, teacher = (F.log_softmax(each.float() / temperature, dim=-1) for each in (logits, targets))
    return temperature**2 * F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1)


def soft_binary_cross_entropy(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Return the mean over labels of the divergence from a teacher's probability, `[B]`, times T squared."""
    both = (
        torch.stack([logits, torch.zeros_like(logits)], dim=-1),
        torch.stack([targets, torch.zeros_like(targets)], -1),
    )
    student, teacher = (F.log_softmax(each.float() / temperature, dim=-1) for each in both)  # [B, labels, 2]
    return temperature**2 * F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1).mean(dim=-1)


LABEL_LOSSES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "single_label_classification": soft_cross_entropy,
    "multi_label_classification": soft_binary_cross_entropy,
}


@dataclass
class StudentOutput(ModelOutput):
    """Output of a `Student`.

    Attributes:
        predictions: Standardized patch features of all teachers, `[B, N, D]`; `None` if no features are learned.
        summaries: Their standardized summaries, `[B, S]`.
        logits: `[B, num_labels]` of a classifier.
    """

    predictions: Tensor | None = None
    summaries: Tensor | None = None
    logits: Tensor | None = None


class Student(TrainedInside):
    """The model that is saved, `student`, with projections to the features of all teachers.

    `with_widths` makes a class for given teachers, since the widths are not part of a model's config.
    """

    kept = "student"
    summary_width = patch_width = 0
    is_classifier = False

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.student: Any = (HFViTForImageClassification if self.is_classifier else HFViTModel)(config)
        self.to_summaries = self.to_patches = None
        if self.patch_width:
            pooled = config.representation_size or config.pooled_width
            self.to_summaries = nn.Linear(pooled, self.summary_width)
            self.to_patches = nn.Linear(config.hidden_size, self.patch_width)
            for name, width in (("summary", self.summary_width), ("patch", self.patch_width)):
                self.register_buffer(f"{name}_mean", torch.zeros(width))
                self.register_buffer(f"{name}_scale", torch.ones(width))
        self.post_init()

    @classmethod
    def with_widths(cls, summary_width: int, patch_width: int, is_classifier: bool) -> type["Student"]:
        """Return a class of students for teachers of these total widths; 0 learns no features."""
        widths = {"summary_width": summary_width, "patch_width": patch_width, "is_classifier": is_classifier}
        return type("Student", (cls,), {**widths, "__module__": cls.__module__})

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> StudentOutput:
        outputs = self.vit(pixel_values)
        pooled, output = outputs.pooler_output, StudentOutput()
        if self.to_patches is not None and self.to_summaries is not None:
            output["predictions"] = self.to_patches(outputs.last_hidden_state[:, self.config.num_prefix_tokens :])
            output["summaries"] = self.to_summaries(pooled)
        if self.is_classifier:
            output["logits"] = scaled_logits(self.student.classifier(pooled), self.config)
        return output


class Distillation(Objective):
    """Learn the outputs of teachers on images without labels."""

    needs_labels = False
    best_metric = "loss"
    problem_type = "distillation"  # by which the report is chosen

    def __init__(self, config: TrainConfig, data: ImageData) -> None:
        if not config.teachers:
            raise ValueError(
                "Distillation needs a teacher: add --teacher NAME, such as --teacher facebook/dinov2-small."
            )
        refuse_mixing(config, "Distillation does not mix images or weigh classes")
        if config.trained != "all":
            raise ValueError(f"Distillation trains the whole student: remove trained={config.trained}.")
        if config.loss != "cross_entropy":
            raise ValueError(f"Distillation has a loss of its own: remove loss={config.loss}.")
        self.config = config
        self.teachers = Teachers(config.teachers, config.teacher_image_size, config.teacher_channels)
        self.label_names, self.of_labels = self._labels()
        learned = config.distill or ("both" if self.label_names else "features")
        if learned != "features" and not self.label_names:
            raise ValueError(
                f"distill={learned} needs teachers that all classify the same labels, in the same order, which "
                f"{shortened(config.teachers)} do not: set distill to features."
            )
        self.teachers.has_logits = is_classifier = learned != "features"
        self.metric_names: tuple[str, ...] = ("loss", "agreement") if is_classifier else ("loss",)
        has_features = learned != "labels"
        widths = [has_features * sum(each) for each in (self.teachers.summary_widths, self.teachers.patch_widths)]
        self.model_class = Student.with_widths(widths[0], widths[1], is_classifier)
        self.processor: Any = None

    def _labels(self) -> tuple[list[str], dict[str, Any]]:
        """Return the labels that all teachers have, and the fields of the config for them."""
        first, *others = self.teachers.each
        kind = first.config.problem_type or "single_label_classification"
        kinds = {each.config.problem_type or "single_label_classification" for each in (first, *others)}
        names = first.label_names
        is_shared = kinds == {kind} and all(each.label_names == names for each in others)
        if not names or not is_shared or kind not in LABEL_LOSSES:
            return [], {}
        return names, {**fields_of_labels(names, kind), "thresholds": first.config.thresholds}

    @property
    def fields(self) -> dict[str, Any]:
        """Fields of the student's config that follow from the teachers."""
        return self.of_labels if self.teachers.has_logits else {}

    def load(self, source: str, **fields: Any) -> tuple[Any, HFViTImageProcessor]:
        """Load the student from a checkpoint, and its processor; the projections are new."""
        student: Any
        if self.teachers.has_logits:
            student, processor = load_classifier(source, self.label_names, **{**OF_HEAD, **self.of_labels, **fields})
        else:
            student, processor = load_encoder(source, **fields)
        return self.model_class.around(student), processor

    def begin(self, run: Any, model: Any) -> None:
        """Check channels, standardize the teachers' features, and store their answers, before the first step."""
        self.processor = run.processor
        self.teachers.check_channels(model.config.num_channels)
        if run.saved is None and model.to_patches is not None:
            self._standardize(run, model)
        if self.config.teacher_cache is not None:
            cache = TeacherCache(self.config, self.teachers, run, model.config.grid_size)
            cache.fill(self._answers)
            run.images.answers, run.images.views = cache.of_visit, self.config.teacher_views

    def _answers(self, pixel_values: Tensor, grid: tuple[int, int]) -> Answers:
        return self.teachers.answer(pixel_values, self.processor, grid)

    def _standardize(self, run: Any, model: Any) -> None:
        """Set mean and deviation of the features over some augmented training images."""
        grid, parts = model.config.grid_size, []
        for batch in _batches(run.images, sample_of(run.images), SAMPLE_BATCH):
            pixels = send_to_device(batch["pixel_values"], run.accelerator.device)
            answers = self._answers(run.to_model(pixels), grid)
            parts.append((answers.summaries, answers.patches))
        for name, which in (("summary", 0), ("patch", 1)):
            moments = [moments_of([part[which][index] for part in parts]) for index in range(len(self.teachers.each))]
            for value, values in zip(("mean", "scale"), zip(*moments, strict=True), strict=True):
                getattr(model, f"{name}_{value}").copy_(torch.cat(values))

    def loss(self, model: nn.Module, pixel_values: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Return the mean distance from the teachers' outputs; `labels` holds these outputs if they are stored."""
        return self._losses(model, pixel_values, labels)[0].mean()

    def _losses(self, model: Any, pixel_values: Tensor, stored: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of every image, `[B]`, and whether its most likely label is that of the first teacher."""
        grid = without_wrapper(model).config.grid_of(*pixel_values.shape[-2:])
        if stored.ndim == 2 and stored.dtype == torch.float16:
            answers = self.teachers.unpack(stored, grid[0] * grid[1])
        else:
            answers = self._answers(pixel_values, grid)
        outputs, bare = model(pixel_values=pixel_values), without_wrapper(model)
        losses: Any = 0.0
        if outputs.predictions is not None:
            for name, predicted, targets in (
                ("summary", outputs.summaries[:, None], [each[:, None] for each in answers.summaries]),
                ("patch", outputs.predictions, answers.patches),
            ):
                mean, scale = getattr(bare, f"{name}_mean"), getattr(bare, f"{name}_scale")
                standard = (torch.cat(targets, dim=-1) - mean) / scale
                losses = losses + feature_losses(predicted, standard, [each.shape[-1] for each in targets])
        agrees = torch.zeros(len(pixel_values), device=pixel_values.device)
        if outputs.logits is not None:
            measure = LABEL_LOSSES[self.of_labels["problem_type"]]
            of_labels = [measure(outputs.logits, each, self.config.temperature) for each in answers.logits]
            losses = losses + torch.stack(of_labels).mean(dim=0)
            agrees = (outputs.logits.argmax(dim=-1) == answers.logits[0].argmax(dim=-1)).float()
        return losses, agrees

    def evaluate(
        self, model: nn.Module, loader: Any, accelerator: Any, normalize: Callable[[Tensor], Tensor]
    ) -> tuple[dict[str, Any], list[str], None]:
        """Return the mean loss, the share of images on which a classifier agrees, and names of unreadable images."""

        def losses(pixel_values: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
            return self._losses(model, pixel_values, torch.empty(0))

        means, count, broken = means_over_images(losses, model, loader, accelerator, normalize)
        metrics = dict(zip(("loss", "agreement"), means, strict=True))
        return {**{name: metrics[name] for name in self.metric_names}, "count": count}, broken, None


def feature_losses(predicted: Tensor, targets: Tensor, widths: list[int]) -> Tensor:
    """Return the loss of every image `[B]`, the mean over teachers and tokens.

    Args:
        predicted: Standardized features of all teachers, `[B, N, D]`.
        targets: Their values.
        widths: Of each teacher.
    """
    losses = []
    for own, target in zip(predicted.float().split(widths, -1), targets.split(widths, -1), strict=True):
        cosine = 1 - F.cosine_similarity(own, target, dim=-1)  # [B, N]
        smooth = F.smooth_l1_loss(own, target, reduction="none").mean(dim=-1)
        losses.append((COSINE * cosine + SMOOTH_L1 * smooth).mean(dim=1))
    return torch.stack(losses).mean(dim=0)


def moments_of(features: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the mean of features `[..., D]`, and one deviation over all dimensions, repeated: `[D]` each."""
    values = torch.cat([each.flatten(0, -2) for each in features]).double()
    mean = values.mean(dim=0)
    scale = (values - mean).square().mean().sqrt().clamp(min=1e-6)
    return mean.float(), scale.float().expand_as(mean)


def sample_of(images: Any) -> Iterator[Visit]:
    """Return visits of images at equal distances, or of the first ones of a stream."""
    if hasattr(images.split, "__len__"):
        number = min(SAMPLE, len(images))
        return (Visit(0, index * len(images) // number) for index in range(number))
    rows = islice(stored_rows(images.split, images.columns), SAMPLE)
    return (Visit(0, image_digest(row[0]), row) for row in rows)


def _batches(images: Any, visits: Iterator[Visit], size: int) -> Iterator[dict[str, Any]]:
    while chosen := list(islice(visits, size)):
        yield collate([images[visit] for visit in chosen])
