"""Teachers of a distillation: frozen models that answer for the images of a student.

A teacher sees what the student sees: the augmented image, resized to the teacher's size and normalized as its image
processor does. Its answer is a summary (what its head reads: the class token, or a pooling), the features of its
patches on the student's grid, and, if it has classes, its logits.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoints.checkpoint import CLASSIFIER, usual_size
from ..checkpoints.models import load
from ..checkpoints.opening import open_checkpoint
from ..data.images import levels_of, normalize
from ..inference.digest import digest_of
from ..model.losses_hf_vit import scaled_logits
from ..system.texts import counted, without_tokens


@dataclass
class Answers:
    """The outputs of teachers for a batch of images: one entry for each teacher.

    Attributes:
        summaries: `[B, S]` each, with the width of the teacher's pooled features.
        patches: `[B, N, D]` each, on the student's grid.
        logits: `[B, num_labels]` each; empty if no labels are learned.
    """

    summaries: list[Tensor]
    patches: list[Tensor]
    logits: list[Tensor]

    def packed(self) -> Tensor:
        """Return all answers as one row per image, `[B, width]`."""
        return torch.cat([part.flatten(1) for part in (*self.summaries, *self.patches, *self.logits)], dim=1)


class Teacher:
    """A frozen model that answers for normalized images of a student.

    Args:
        name: A file, a folder or a name on the Hub, in any layout.
        image_size: Side in pixels of the images that it sees; that of its image processor by default.
    """

    def __init__(self, name: str, image_size: int | None = None) -> None:
        checkpoint = open_checkpoint(name)
        self.name = without_tokens(name)
        self.shape = usual_size(checkpoint) if image_size is None else (image_size, image_size)
        checkpoint.config.grid_of(*self.shape)  # raises an error if patches do not divide it
        self.model, self.processor = load(name, checkpoint=checkpoint)
        self.model.float().requires_grad_(False)
        self.config = self.model.config
        self.encoder = self.model.base_model
        self.is_classifier = type(self.model).__name__ == CLASSIFIER

    @property
    def summary_width(self) -> int:
        """The width of the pooled features, or of the patches if the model has no pooling."""
        if getattr(self.encoder, "pooler", None) is None:
            return self.config.hidden_size
        return self.config.representation_size or self.config.pooled_width

    @property
    def label_names(self) -> list[str]:
        return list((self.config.id2label or {}).values()) if self.is_classifier else []

    def digest(self) -> str:
        """Return a digest of the weights and the preprocessing."""
        return digest_of(self.model, self.config, self.processor, self.shape)

    def answer(self, levels: Tensor, grid: tuple[int, int], has_logits: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return summary `[B, S]`, patches `[B, N, D]` on a grid, and logits or `None`, in float32.

        Args:
            levels: `[B, C, H, W]` from 0 to 255, with the channels of this model.
            grid: (rows, columns) of the student.
            has_logits: Whether to compute logits.
        """
        self.model.to(levels.device)  # which copies nothing after the first call
        with torch.inference_mode():
            own_grid = self.config.grid_of(*self.shape)
            outputs = self.encoder(pixel_values=self._normalized(levels))
            patches = outputs.last_hidden_state[:, self.config.num_prefix_tokens :]
            pooled = outputs.pooler_output
            summary = patches.mean(dim=1) if pooled is None else pooled
            logits = scaled_logits(self.model.classifier(pooled), self.config).float() if has_logits else None
            patches = on_grid(patches.float(), own_grid, grid)
        # Outside of the inference mode, copies are tensors that a loss may keep for its backward.
        return summary.float().clone(), patches.clone(), None if logits is None else logits.clone()

    def _normalized(self, levels: Tensor) -> Tensor:
        if levels.shape[-2:] != self.shape:
            levels = F.interpolate(levels, self.shape, mode="bicubic", antialias=True, align_corners=False)
            levels = levels.clamp(0, 255)
        return normalize(levels, self.processor)


def on_grid(patches: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Resample features of patches `[B, N, D]` from one grid of (rows, columns) to another."""
    if grid == new_grid:
        return patches
    maps = patches.transpose(1, 2).unflatten(2, grid)  # [B, D, h, w]
    return F.interpolate(maps, new_grid, mode="bilinear", antialias=True).flatten(2).transpose(1, 2)


class Teachers:
    """All teachers of a student.

    Args:
        names: Checkpoints.
        image_size: As for `Teacher`.
        channels: Numbers of the channels that the teachers see; all if it is empty.
    """

    def __init__(self, names: list[str], image_size: int | None = None, channels: list[int] | None = None) -> None:
        self.each = [Teacher(name, image_size) for name in names]
        self.channels = channels or []
        self.has_logits = False

    @property
    def summary_widths(self) -> list[int]:
        return [teacher.summary_width for teacher in self.each]

    @property
    def patch_widths(self) -> list[int]:
        return [teacher.config.hidden_size for teacher in self.each]

    @property
    def label_numbers(self) -> list[int]:
        return [teacher.config.num_labels for teacher in self.each] if self.has_logits else []

    def check_channels(self, number: int) -> None:
        """Raise `ValueError` unless the teachers can see images of this many channels.

        One channel is repeated for a teacher of several, as a gray photograph is.
        """
        if wrong := [channel for channel in self.channels if not 0 <= channel < number]:
            raise ValueError(
                f"teacher_channels has {wrong[0]}, but the images have {counted(number, 'channel')}: use numbers from "
                f"0 to {number - 1}."
            )
        seen = len(self.channels) or number
        for teacher in self.each:
            wanted = teacher.config.num_channels
            if seen not in (1, wanted):
                raise ValueError(
                    f"The teacher {teacher.name} takes {counted(wanted, 'channel')}, and would see {seen}: name the "
                    f"channels for it with teacher_channels, such as {list(range(min(wanted, number)))}."
                )

    def answer(self, pixel_values: Tensor, processor: Any, grid: tuple[int, int]) -> Answers:
        """Return the answers for images that the student's image processor has normalized.

        Args:
            pixel_values: `[B, C, H, W]`.
            processor: The image processor of the student.
            grid: (rows, columns) of the student's patches.
        """
        levels = levels_of(pixel_values, processor)
        if self.channels:
            levels = levels[:, self.channels]
        answers = Answers([], [], [])
        for teacher in self.each:
            seen = levels.expand(-1, teacher.config.num_channels, -1, -1) if levels.shape[1] == 1 else levels
            summary, patches, logits = teacher.answer(seen, grid, self.has_logits)
            answers.summaries.append(summary)
            answers.patches.append(patches)
            answers.logits += [] if logits is None else [logits]
        return answers

    def unpack(self, packed: Tensor, patches: int) -> Answers:
        """Return the answers that `Answers.packed` made one row of, in float32."""
        widths = [*self.summary_widths, *(patches * width for width in self.patch_widths), *self.label_numbers]
        parts, number = list(packed.float().split(widths, dim=1)), len(self.each)
        of_patches = [part.unflatten(1, (patches, -1)) for part in parts[number : 2 * number]]  # [B, N, D] each
        return Answers(parts[:number], of_patches, parts[2 * number :])
