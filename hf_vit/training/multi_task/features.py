"""Features of a data set for all heads that learn from it: pooled, and where a head reads patches, patches too.

Patches are stored in float16: 0.2 MB per image for a ViT-S and 16x16 patches.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...data.labelled import ImageData, load_data
from ...model.multi_task_hf_vit import Encoding
from ..fitting.embedding import Embeddings, Encoder, embed, with_bar
from ..run import data_of
from .plans import HeadPlan

PATCHES = "patches"  # name of the features of patches beside those of poolings


class PatchEncoder(Encoder):
    """An encoder that also gives the normalized patches of the last layer, float16 `[B, N, D]`."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.stored_poolings = [*self.stored_poolings, PATCHES]
        self.fingerprint += f"-{PATCHES}"

    def _pooled(self, name: str, hidden_states: Tensor) -> Tensor:
        if name == PATCHES:
            return hidden_states[:, self.config.num_prefix_tokens :].half()
        return super()._pooled(name, hidden_states)


@dataclass
class HeadData:
    """What a head learns from, and is evaluated on.

    Attributes:
        data: Images and labels.
        train, evaluation: Features of the readable images of both splits.
        encoder: What computed them.
    """

    data: ImageData
    train: Embeddings
    evaluation: Embeddings
    encoder: Encoder

    def pooled(self, features: Embeddings) -> dict[str, Tensor]:
        """Return the features of images by pooling."""
        return {name: values for name, values in features.features.items() if name != PATCHES}

    def labels(self, split: Any, features: Embeddings) -> list[Any]:
        """Return the labels of the readable images of a split."""
        labels = split[self.data.columns[1]][:]
        return [labels[row] for row in features.rows]

    def encodings(self, patches: Tensor, size: int = 64) -> Iterator[Encoding]:
        """Yield patches `[N, patches, D]` as a head reads them, in batches."""
        config = self.encoder.config
        for batch in patches.split(size):
            yield encoding_of(batch, config)


def encoding_of(patches: Tensor, config: Any) -> Encoding:
    """Return patches `[B, N, D]` of the last layer as the head of a model reads them."""
    outputs: Any = None  # which heads for pixels do not read
    return Encoding(outputs, {config.num_hidden_layers: patches.float()}, config.grid_size)


class Features:
    """Loads the data of heads, and computes the features of each data set once.

    Args:
        source: The encoder.
        image_size: (height, width) in pixels; by default the checkpoint's own.
        plans: All heads, which decide whether patches of a data set are needed.
        cache: Folder of cached features.
        say: Prints a line.
    """

    def __init__(
        self,
        source: str,
        image_size: tuple[int, int] | None,
        plans: list[HeadPlan],
        cache: Path | None,
        say: Callable[[str], None],
    ) -> None:
        self.source, self.image_size, self.cache, self.say = source, image_size, cache, say
        self.dense = [plan.recipe.data for plan in plans if plan.is_dense]
        self.encoders: dict[type[Encoder], Encoder] = {}

    def of(self, plan: HeadPlan) -> HeadData:
        """Return the data of a head with its features."""
        data = data_for(plan)
        kind = PatchEncoder if plan.recipe.data in self.dense else Encoder
        if kind not in self.encoders:
            self.encoders[kind] = kind.from_pretrained(self.source, self.image_size, is_cropping=False)
        encoder = self.encoders[kind]
        columns = data.columns
        train, evaluation = (
            embed(encoder, split, columns, self.cache, with_bar) for split in (data.train, data.evaluation)
        )
        if not train.rows or not evaluation.rows:
            which = "training" if not train.rows else "evaluation"
            raise ValueError(f"No {which} image of the head {plan.name!r} can be read: check its data.")
        computed = train.computed + evaluation.computed
        if computed:
            self.say(f"Features of {computed:,} images computed in {train.seconds + evaluation.seconds:.0f} s.")
        return HeadData(data, train, evaluation, encoder)


def data_for(plan: HeadPlan) -> ImageData:
    """Load the images of a head; for anomalies they have labels only if the head names the class of normal ones."""
    if plan.task != "anomaly":
        return data_of(plan.recipe)
    recipe = plan.recipe
    names = ("train_split", "eval_split", "image_column", "label_column", "eval_fraction", "train_share", "split_seed")
    options = {name: getattr(recipe, name) for name in names}
    return load_data(recipe.data, **options, needs_labels="normal" in plan.own)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Use a seed for everything that draws random numbers without a generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
