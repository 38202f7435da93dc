"""A checkpoint of any family, understood: its architecture as a config, and its weights as those of our model."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from typing import Any

import torch
from torch import Tensor

from ..model import model_class
from ..model.configuration_hf_vit import HFViTConfig
from ..model.image_processing_pil_hf_vit import HFViTImageProcessorPil
from ..model.positions_hf_vit import resample_table
from ..variants import SIZES
from .files import PROCESSOR_FILES, Source
from .layouts import Row, Rule, resample_patch_projection, rules_of

CLASSIFIER, ENCODER, MASKED = "HFViTForImageClassification", "HFViTModel", "HFViTForMaskedImageModeling"
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Options:
    """What a user may say of a checkpoint; `None` is "as the file has it".

    Attributes:
        image_size: `(height, width)` in pixels; positions are resampled to it. For files without a grid, a fact.
        patch_size: Pixels; the projection of patches is resampled to it (FlexiViT, arXiv:2212.08013).
        num_labels: A new head of so many classes, of zeros.
        num_heads: Of the attention, where the tensors do not say.
        pooling: A pooling of `HFViTConfig`, where the tensors leave it open.
        hidden_act: Activation of the MLP, where only the code that trained it knows.
        layer_norm_eps: The same for the epsilon of LayerNorm.
        mlp_gate: Which half of a gated MLP's packed projection is the gate: "first" or "last".
    """

    image_size: tuple[int, int] | None = None
    patch_size: tuple[int, int] | None = None
    num_labels: int | None = None
    num_heads: int | None = None
    pooling: str | None = None
    hidden_act: str | None = None
    layer_norm_eps: float | None = None
    mlp_gate: str | None = None

    def __post_init__(self) -> None:
        if self.mlp_gate not in (None, "first", "last"):
            raise ValueError(f"mlp_gate must be first or last, got {self.mlp_gate!r}.")


@dataclass
class Reading:
    """What a family makes of a source.

    Attributes:
        fields: Of `HFViTConfig`, as the tensors are: their own grid, their own head.
        architecture: Name of the model class.
        table: Rows of the family, for `rules_of`.
        left_out: Regular expressions, matched in full, of tensors that do not belong to the model.
        assumed: Sentences about what neither the file nor an option said.
        processor: What the source says of preprocessing, a processor or the arguments of one; `None`: nothing.
        source: The source again if its tensors go by other names than in the file.
    """

    fields: dict[str, Any]
    architecture: str
    table: Sequence[Row]
    left_out: Sequence[str] = ()
    assumed: list[str] = field(default_factory=list)
    processor: HFViTImageProcessorPil | dict[str, Any] | None = None
    source: Source | None = None


@dataclass(frozen=True)
class Family:
    """A layout of checkpoints: how to know it, and how to read it."""

    name: str
    recognises: Callable[[Source], bool]
    read: Callable[[Source, Options], Reading]


class Checkpoint:
    """A checkpoint that is understood. Making one checks names and shapes; tensors are read when they are asked for.

    Attributes:
        family: Name of the layout.
        config: The architecture that comes out, with the options' sizes and head.
        architecture: Name of the model class.
        assumed: Sentences about what neither the file nor an option said.
        left_out: Names of tensors in the file that do not belong to the model.

    Raises:
        ValueError: For tensors that are missing, left over, or of a shape that contradicts the others.
    """

    def __init__(self, family: Family, source: Source, options: Options) -> None:
        reading = family.read(source, options)
        self.family = family.name
        self.source = reading.source or source
        self.assumed = reading.assumed
        self.architecture = reading.architecture
        self._reading = reading
        self._own_config = HFViTConfig.from_dict(dict(reading.fields))
        refuse_depth(self.source, self._own_config)
        self.config = self._target_config(options)
        self._new_head = self._has_new_head()
        parameters = parameters_of(reading.architecture, self._own_config)
        self.rules = rules_of(reading.table, self._own_config, parameters, self.source.tensors)
        self.left_out = self._check_names()
        self._check_types()
        self._check_shapes(parameters)

    # ------------------------------------------------------------------------------------------------ architecture

    def _target_config(self, options: Options) -> HFViTConfig:
        changed: dict[str, Any] = {}
        for name in ("image_size", "patch_size", "num_labels"):
            if getattr(options, name) is not None:
                changed[name] = getattr(options, name)
        own = self._own_config
        labels = changed.get("num_labels")
        if labels is not None and labels < 1:
            raise ValueError(f"num_labels must be at least 1, got {labels}.")
        if self.architecture == ENCODER and labels is not None:
            self.architecture = CLASSIFIER
        if labels is not None and (labels != own.num_labels or self._reading.architecture == ENCODER):
            changed["representation_size"] = None  # it belongs to the head that goes
        config = HFViTConfig.from_dict(own.to_dict(), **changed)
        config.architectures = [self.architecture]
        return config

    def _has_new_head(self) -> bool:
        if self.architecture != CLASSIFIER:
            return False
        return self._reading.architecture != CLASSIFIER or self.config.num_labels != self._own_config.num_labels

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """Names and shapes of all parameters that come out."""
        return parameters_of(self.architecture, self.config)

    @property
    def num_parameters(self) -> int:
        """Number of parameters of the model that comes out."""
        return sum(shape.numel() for shape in self.shapes.values())

    @property
    def dtype(self) -> torch.dtype:
        """The widest floating-point type of the tensors; the others are widened to it, which changes no value."""
        dtypes = {self.source.tensors[name].dtype for rule in self.rules for name in rule.theirs}
        return reduce(torch.promote_types, dtypes)

    # ---------------------------------------------------------------------------------------------------- names

    def _check_names(self) -> list[str]:
        name, tensors = self.source.name, self.source.tensors
        needed = {theirs for rule in self.rules for theirs in rule.theirs}
        missing = sorted(needed - set(tensors))
        if missing:
            raise ValueError(f"{name}: {self.family} needs tensors that are missing: {_some(missing)}.")
        patterns = [re.compile(pattern) for pattern in self._reading.left_out]
        over = sorted(set(tensors) - needed)
        strangers = [
            theirs
            for theirs in over
            if 0 not in tensors[theirs].shape and not any(pattern.fullmatch(theirs) for pattern in patterns)
        ]
        if strangers:
            raise ValueError(f"{name}: {self.family} has no place for the tensors {_some(strangers)}.")
        return over

    def _check_types(self) -> None:
        for theirs in (theirs for rule in self.rules for theirs in rule.theirs):
            dtype = self.source.tensors[theirs].dtype
            if dtype not in FLOATS:
                known = ", ".join(str(known) for known in FLOATS)
                raise ValueError(f"{self.source.name}: {theirs!r} holds {dtype}, expected one of {known}.")

    def _check_shapes(self, parameters: dict[str, torch.Size]) -> None:
        """Let every layout read tensors without values."""
        for rule in self.rules:
            stored = [torch.empty(self.source.tensors[name].shape, device="meta") for name in rule.theirs]
            for name, tensor in zip(rule.ours, self._arrange(rule, stored), strict=True):
                if tensor.shape != parameters[name]:
                    raise self._contradiction(
                        rule, f"gives {list(tensor.shape)} where {list(parameters[name])} is due"
                    )

    # -------------------------------------------------------------------------------------------------- tensors

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Give every parameter's name and value, one rule's tensors in memory at a time."""
        shapes, dtype = self.shapes, self.dtype
        for rule in self.rules:
            wanted = [name for name in (self._renamed(name) for name in rule.ours) if name in shapes]
            if not wanted:
                continue  # of a head that goes
            stored = [self._read(name) for name in rule.theirs]
            for ours, tensor in zip(rule.ours, self._arrange(rule, stored), strict=True):
                name = self._renamed(ours)
                if not (self._is_head(name) and self._new_head):
                    yield name, self._fit(name, tensor).to(dtype)
        for name, shape in shapes.items():
            if self._is_head(name) and self._new_head:
                yield name, torch.zeros(shape, dtype=dtype)

    def _read(self, name: str) -> Tensor:
        try:
            tensor = self.source.tensors[name].read()
        except Exception as error:  # a damaged file can fail in any way
            raise ValueError(f"{self.source.name}: {name!r} cannot be read ({error}).") from error
        refuse_not_finite(self.source.name, {name: tensor})
        return tensor

    def state_dict(self) -> dict[str, Tensor]:
        """Return all weights by our names."""
        return dict(self.weights())

    def _renamed(self, name: str) -> str:
        """Bring a name of the model as read to the model that comes out: a new head puts the encoder under `vit.`."""
        if self._reading.architecture == ENCODER and self.architecture != ENCODER:
            return f"vit.{name}"
        return name

    @staticmethod
    def _is_head(name: str) -> bool:
        return name.startswith("classifier.")

    def _arrange(self, rule: Rule, stored: list[Tensor]) -> list[Tensor]:
        try:
            return rule.layout.read(stored)
        except (RuntimeError, IndexError) as error:
            raise self._contradiction(rule, f"does not fit the rest ({str(error).splitlines()[0]})") from error

    def _contradiction(self, rule: Rule, what: str) -> ValueError:
        shapes = ", ".join(f"{name!r} {list(self.source.tensors[name].shape)}" for name in rule.theirs)
        return ValueError(f"{self.source.name}: the shape of {shapes} {what}.")

    def _fit(self, name: str, tensor: Tensor) -> Tensor:
        """Resample what depends on sizes to those that were asked for."""
        target = self.shapes[name]
        if tensor.shape == target:
            return tensor
        if ".position_embeddings." in f".{name}" and tensor.ndim == 4:
            return resample_table(tensor, (target[1], target[2]), self.config.position_interpolation)
        if name.endswith("patch_embeddings.projection.weight"):
            old, new = self._own_config.patch_shape, self.config.patch_shape
            return resample_patch_projection(tensor, old, new)
        return tensor

    # ----------------------------------------------------------------------------------------------- processor

    def processor(self) -> HFViTImageProcessorPil:
        """Return the preprocessing that the source states, at the size that comes out."""
        stated, config = self._reading.processor, self.config
        if isinstance(stated, HFViTImageProcessorPil):
            processor = stated
        else:
            arguments = {"name": "original", **(stated or {})}
            size = self._own_config.image_shape
            processor = HFViTImageProcessorPil.from_preset(size=size, num_channels=config.num_channels, **arguments)
        if config.image_shape != self._own_config.image_shape:
            processor.set_output_size(config.image_shape)
        return processor

    # -------------------------------------------------------------------------------------------------- report

    def describe(self) -> dict[str, Any]:
        """Say what was found, in the words of the field."""
        config = self.config
        rows, columns = config.grid_size
        facts: dict[str, Any] = {
            "family": self.family,
            "variant": variant_of(config),
            "architecture": self.architecture,
            "image size": _by(config.image_shape),
            "patch size": f"{_by(config.patch_shape)}, a grid of {rows}x{columns}",
            "width": config.hidden_size,
            "layers": config.num_hidden_layers,
            "heads": f"{config.num_attention_heads} of {config.head_width}",
            "MLP": f"{config.intermediate_size}, {'gated ' if config.use_gated_mlp else ''}{config.hidden_act}",
            "positions": _positions(config),
            "tokens before patches": _prefix(config),
            "pooling": config.pooling,
            "LayerNorm eps": f"{config.layer_norm_eps:g}",
            "labels": config.num_labels if self.architecture == CLASSIFIER else "no head",
            "parameters": f"{self.num_parameters:,} ({str(self.dtype).removeprefix('torch.')})",
        }
        others = {
            name: getattr(config, name)
            for name in HFViTConfig.__annotations__
            if name not in SAID and getattr(config, name) != getattr(HFViTConfig(), name)
        }
        if others:
            facts["also"] = ", ".join(f"{name}={value}" for name, value in others.items())
        return facts


# Fields that `describe` has a line for, or that follow from others.
SAID = {
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
    "intermediate_size",
    "hidden_act",
    "use_gated_mlp",
    "image_size",
    "patch_size",
    "position_embedding_type",
    "position_interpolation",
    "num_prefix_positions",
    "use_cls_token",
    "use_distillation_token",
    "num_register_tokens",
    "pooling",
    "layer_norm_eps",
    "_out_features",
    "_out_indices",
}


def parameters_of(architecture: str, config: HFViTConfig) -> dict[str, torch.Size]:
    """Return names and shapes of a model's parameters, without memory for their values."""
    with torch.device("meta"):
        model: torch.nn.Module = model_class(architecture)(config)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def refuse_depth(source: Source, config: HFViTConfig) -> None:
    """Raise `ValueError` for more layers than there are tensors, before any is built."""
    if config.num_hidden_layers > len(source.tensors):
        raise ValueError(
            f"{source.name}: {len(source.tensors)} tensors are too few for num_hidden_layers="
            f"{config.num_hidden_layers}."
        )


def refuse_not_finite(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise `ValueError` for weights that are NaN or infinite: every answer of their model would be."""
    for tensor_name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"{name}: {tensor_name!r} holds NaN or infinity: its training diverged, or the file is damaged. Take "
                "an earlier checkpoint."
            )


def processor_beside(source: Source) -> HFViTImageProcessorPil | None:
    """Return the processor that lies beside the weights, if one does."""
    if source.folder is None or not any((source.folder / file).is_file() for file in PROCESSOR_FILES):
        return None
    return HFViTImageProcessorPil.from_pretrained(source.folder)


def variant_of(config: HFViTConfig) -> str:
    """Return the name that the literature has for an architecture's size, for example `"ViT-B/16"`."""
    size = (config.hidden_size, config.num_hidden_layers, config.intermediate_size, config.num_attention_heads)
    letter = next((letter for letter, known in SIZES.items() if tuple(known) == size), None)
    if letter is None:
        return "of no standard size"
    height, width = config.patch_shape
    stem = "ViT-"
    if config.stem_layers is not None:  # a unit has three convolutions; the root and the patches count, too
        stem = f"R{3 * sum(config.stem_layers) + 2 if config.stem_layers else ''}+"
    return f"{stem}{letter}/{height if height == width else _by((height, width))}"


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _positions(config: HFViTConfig) -> str:
    kind = config.position_embedding_type
    has_table = kind in ("learned", "learned_2d", "relative")
    return f"{kind}, resampled {config.position_interpolation}" if has_table else kind


def _prefix(config: HFViTConfig) -> str:
    counts = {
        "class": config.use_cls_token,
        "distillation": config.use_distillation_token,
        "register": config.num_register_tokens,
    }
    return ", ".join(f"{int(number)} {name}" for name, number in counts.items() if number) or "none"


def _some(names: list[str], limit: int = 8) -> str:
    shown = ", ".join(repr(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
