"""A checkpoint of any family: its architecture as our config, and its weights under our names."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..model import model_class
from ..model.configuration_hf_vit import HFViTConfig
from ..model.image_processing_pil_hf_vit import PRESETS, HFViTImageProcessorPil
from ..model.positions_hf_vit import resample_table
from ..model.validation_hf_vit import OF_SCALE
from ..system.texts import shortened
from .files import PROCESSOR_FILES, Source
from .layouts import Row, Rule, adapt_channels, resample_patch_projection, rules_of

CLASSIFIER, ENCODER, MASKED = "HFViTForImageClassification", "HFViTModel", "HFViTForMaskedImageModeling"
SEGMENTER, DETECTOR = "HFViTForSemanticSegmentation", "HFViTForObjectDetection"
MULTI_TASK = "HFViTForMultiTask"
# Assumptions that options for the preprocessing replace.
OF_PREPROCESSING = re.compile(r"[Pp]reprocess|mean and standard deviation|[Ii]mages are centre-cropped")
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


# A command-line option in a message, with the suggested value; --names-template belongs to another command.
OPTION = re.compile(
    r"(?<![^\s(])--(?!names-template)(?:"
    r"(?P<word>weights|pooling|hidden-act|mlp-gate|preprocessing) (?P<value>\w[\w-]*)"
    r"|(?P<name>[a-z]+(?:-[a-z]+)*)(?P<size> HxW)?)"
)
KEYWORDS = {"num_heads": "num_attention_heads"}  # options whose config fields have other names


def _as_keyword(option: re.Match[str]) -> str:
    """Return an option of the command line as a keyword of `from_pretrained`."""
    name = (option["word"] or option["name"]).replace("-", "_")
    value = "=(height, width)" if option["size"] else f"={option['value']!r}" if option["word"] else ""
    return KEYWORDS.get(name, name) + value


@dataclass(frozen=True)
class Options:
    """What the user states about a checkpoint, or changes in it; `None` means as in the file.

    Attributes:
        image_size: `(height, width)` in pixels; positions are resampled to it. Required if the file has no grid.
        patch_size: `(height, width)` in pixels; the patch projection is resampled to it (FlexiViT, arXiv:2212.08013).
        num_channels: Channels of the images; the patch projection is adapted to them (`adapt_channels`).
        num_labels: Number of classes of a new head, whose weights are zero.
        num_heads: Number of attention heads, if the tensors do not determine it.
        pooling: A pooling of `HFViTConfig`, if the tensors do not determine it.
        hidden_act: Activation of the MLP, if only the training code determines it.
        layer_norm_eps: Epsilon of LayerNorm, if only the training code determines it.
        mlp_gate: Half of a gated MLP's packed projection that is the gate: "first" or "last".
        names: File with a table of the tensors' names, for a ViT of no known family (`families.named`).
        head: Name of the head of a multi-task model; the result is then a model of only this task.
        weights: Key or part of the prefix of the weights to read, if the file has several, such as "teacher".
        preprocessing: Name of a preset of the image processor (`PRESETS`), if the file has no preprocessing.
        mean: Mean of the pixels in [0, 1], one number or one per channel; it overrides that of the preprocessing.
        std: Standard deviation of the pixels, in the same form.
        spelling: How messages name these options: "command" for `hf-vit convert`, "python" for keywords of
            `from_pretrained`, "other" for commands that do not have the options.
    """

    image_size: tuple[int, int] | None = None
    patch_size: tuple[int, int] | None = None
    num_channels: int | None = None
    num_labels: int | None = None
    num_heads: int | None = None
    pooling: str | None = None
    hidden_act: str | None = None
    layer_norm_eps: float | None = None
    mlp_gate: str | None = None
    head: str | None = None
    names: str | Path | None = None
    weights: str | None = None
    preprocessing: str | None = None
    mean: float | Sequence[float] | None = None
    std: float | Sequence[float] | None = None
    spelling: Literal["command", "python", "other"] = "other"

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size"):
            size = getattr(self, name)
            if size is not None:  # one number, or a list from a JSON file
                object.__setattr__(self, name, (size, size) if isinstance(size, int) else tuple(size))
        if self.preprocessing not in (None, *PRESETS):
            raise ValueError(f"preprocessing must be one of {', '.join(PRESETS)}, got {self.preprocessing!r}.")
        if self.mlp_gate not in (None, "first", "last"):
            raise ValueError(f"mlp_gate must be first or last, got {self.mlp_gate!r}.")

    def spelled(self, sentence: str, is_error: bool = False) -> str:
        """Replace the command-line options in a sentence by names that the user can type."""
        if self.spelling == "python":
            return OPTION.sub(_as_keyword, sentence)
        is_elsewhere = is_error and self.spelling == "other" and OPTION.search(sentence)
        return f"{sentence} hf-vit convert has this option." if is_elsewhere else sentence


@dataclass
class Reading:
    """Result of reading a source with a family.

    Attributes:
        fields: Fields of `HFViTConfig` that describe the tensors as stored, with their own grid and head.
        architecture: Name of the model class.
        table: Rows of the family, for `rules_of`.
        left_out: Regular expressions that match the full names of tensors that do not belong to the model.
        assumed: Sentences about assumptions where neither the file nor an option states a fact.
        processor: The image processor of the source, or arguments for one; `None` if the source has neither.
        source: The source with renamed tensors, if their names differ from those in the file.
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
    """A layout of checkpoints.

    Attributes:
        name: Its name in reports.
        recognises: Returns whether a source has this layout.
        read: Reads a source of this layout.
        heads: Module names of its classifiers, which are linear layers. A head of another name in a file without
            these is renamed to the first of them. If empty, `read` gets all names unchanged.
        head_inputs: Possible widths of a classifier's input, as multiples of the width of the model.
    """

    name: str
    recognises: Callable[[Source], bool]
    read: Callable[[Source, Options], Reading]
    heads: tuple[str, ...] = ()
    head_inputs: tuple[int, ...] = (1,)


class Checkpoint:
    """A checkpoint whose names and shapes have been checked. Its tensors are read on request.

    Attributes:
        family: Name of the layout.
        config: The resulting architecture, with the sizes and the head that the options request.
        architecture: Name of the model class.
        options: What the user stated.
        assumed: Sentences about assumptions where neither the file nor an option states a fact.
        notes: Sentences about how names in the file were changed.
        left_out: Names of tensors in the file that do not belong to the model.
        lost_head: Sentence about a head that is left out, since no classifier of this package has its form; or empty.

    Raises:
        ValueError: For missing or unexpected tensors, and for shapes that contradict others.
    """

    def __init__(self, family: Family, source: Source, options: Options) -> None:
        reading = _read(family, source, options)
        self.options = options
        has_preprocessing = any((options.preprocessing, options.mean, options.std))
        self.family = family.name
        self.source = reading.source or source
        self.assumed = [
            options.spelled(sentence)
            for sentence in (*source.assumed, *reading.assumed)
            if not (has_preprocessing and OF_PREPROCESSING.search(sentence))
        ]
        self.notes = list(source.notes)
        self._outside = source.outside
        self.architecture = reading.architecture
        self._reading = reading
        self._own_config = HFViTConfig.from_dict(dict(reading.fields))
        check_depth(self.source, self._own_config)
        if options.num_heads not in (None, self._own_config.num_attention_heads):
            raise ValueError(
                f"{source.name} has {self._own_config.num_attention_heads} attention heads, and --num-heads "
                f"{options.num_heads} would mix their queries, keys and values: remove it."
            )
        self.config = self._target_config(options)
        # A requested head replaces the stored one, unless both have the same number of labels.
        self._has_new_head = self.architecture == CLASSIFIER and (
            reading.architecture != CLASSIFIER or self.config.num_labels != self._own_config.num_labels
        )
        parameters = parameters_of(reading.architecture, self._own_config)
        self.rules = rules_of(reading.table, self._own_config, parameters, self.source.tensors)
        self.left_out = self._check_names()
        self.lost_head = ""
        if source.head_layers and set(self.left_out).issuperset(f"{layer}.weight" for layer in source.head_layers):
            self.lost_head = (
                "The head is left out, since it is not one linear layer of the encoder's output: "
                f"{shortened(source.head_layers)}."
            )
            self.notes.append(self.lost_head)
        self._head_scale: tuple[Tensor, Tensor] | None = None
        if has_preprocessing:
            self.processor()  # raises an error if mean or std do not match the channels
        self._check_tensors(parameters)

    # ------------------------------------------------------------------------------------------------ architecture

    def _target_config(self, options: Options) -> HFViTConfig:
        """Return the stored config with the options' sizes and head; a new head makes an encoder a classifier."""
        sizes = {"image_size": options.image_size, "patch_size": options.patch_size, "num_labels": options.num_labels}
        changed: dict[str, Any] = {name: size for name, size in sizes.items() if size is not None}
        own, labels = self._own_config, options.num_labels
        if options.pooling is not None and options.pooling != own.pooling:
            if options.pooling.startswith("attention") and not own.pooling.startswith("attention"):
                raise ValueError(
                    f"{self.source.name}: pooling {options.pooling} needs weights that the file does not have: choose "
                    "another --pooling."
                )
            changed["pooling"] = options.pooling
            if HFViTConfig.from_dict(own.to_dict(), pooling=options.pooling).pooled_width != own.pooled_width:
                changed["representation_size"] = None  # the file's pre-logits have another width
        if labels is not None:
            if labels < 1:
                raise ValueError(f"num_labels must be at least 1, got {labels}.")
            if labels != own.num_labels or self.architecture == ENCODER:
                changed["representation_size"] = None  # it belongs to the head that is replaced
            if self.architecture == ENCODER:
                self.architecture = CLASSIFIER
        if options.num_channels not in (None, own.num_channels):
            changed["num_channels"] = self._checked_channels(options.num_channels)
        config = HFViTConfig.from_dict(own.to_dict(), **changed)
        config.architectures = [self.architecture]
        return config

    def _checked_channels(self, number: int) -> int:
        """Return a new number of channels, and state how the patch projection is adapted to it."""
        own = self._own_config
        if own.stem_layers is not None or own.use_patch_layernorm:
            part = "ResNet stem" if own.stem_layers is not None else "LayerNorm of patches"
            raise ValueError(
                f"{self.source.name} has a {part} for {own.num_channels} channels, which cannot be adapted to "
                f"{number}: use a model with a plain patch projection, or images of {own.num_channels} channels."
            )
        rule = (
            f"is the sum over the {own.num_channels} channels"
            if number == 1
            else f"repeats the filters of the {own.num_channels} channels, scaled by {own.num_channels}/{number}"
        )
        self.assumed.append(f"num_channels={number}: the patch projection {rule}.")
        return number

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """Names and shapes of the resulting model's parameters."""
        return parameters_of(self.architecture, self.config)

    @property
    def num_parameters(self) -> int:
        """Number of parameters of the resulting model."""
        return sum(shape.numel() for shape in self.shapes.values())

    @property
    def dtype(self) -> torch.dtype:
        """The widest floating-point type of the tensors; the others are cast to it, which changes no value."""
        dtypes = {self.source.tensors[name].dtype for rule in self.rules for name in rule.theirs}
        return reduce(torch.promote_types, dtypes)

    # ---------------------------------------------------------------------------------------------------- checks

    def _check_names(self) -> list[str]:
        """Return the names of the tensors that do not belong to the model."""
        name, tensors = self.source.name, self.source.tensors
        needed = {theirs for rule in self.rules for theirs in rule.theirs}
        if missing := sorted(needed - set(tensors)):
            raise ValueError(f"{name}: {self.family} needs tensors that are missing: {_quoted(missing)}.")
        patterns = [re.compile(pattern) for pattern in self._reading.left_out]
        over = sorted(set(tensors) - needed)
        unknown = [
            theirs
            for theirs in over
            if theirs not in self._outside
            and 0 not in tensors[theirs].shape
            and not any(pattern.fullmatch(theirs) for pattern in patterns)
        ]
        if unknown:
            raise ValueError(f"{name}: {self.family} has no place for the tensors {_quoted(unknown)}.")
        return over + [theirs for theirs, stored in self._outside.items() if tensors.get(theirs) is not stored]

    def _check_tensors(self, parameters: dict[str, torch.Size]) -> None:
        """Check dtypes, convert tensors without values, and compare the resulting shapes with the model's."""
        for rule in self.rules:
            for name in rule.theirs:
                if (dtype := self.source.tensors[name].dtype) not in FLOATS:
                    known = ", ".join(map(str, FLOATS))
                    raise ValueError(f"{self.source.name}: {name!r} holds {dtype}, expected one of {known}.")
            stored = [torch.empty(self.source.tensors[name].shape, device="meta") for name in rule.theirs]
            for name, tensor in zip(rule.ours, self._arrange(rule, stored), strict=True):
                if tensor.shape != parameters[name]:
                    raise self._contradiction(
                        rule, f"gives {list(tensor.shape)} where {list(parameters[name])} is expected"
                    )

    # -------------------------------------------------------------------------------------------------- tensors

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and value of every parameter, with the tensors of one rule in memory at a time."""
        shapes, dtype = self.shapes, self.dtype
        for rule in self.rules:
            names = [self._renamed(name) for name in rule.ours]
            if not any(name in shapes for name in names):
                continue  # part of a head that is replaced
            stored = [self._read(name) for name in rule.theirs]
            for name, tensor in zip(names, self._arrange(rule, stored), strict=True):
                if not self._is_new(name):
                    yield name, self._folded(name, self._fit(name, tensor)).to(dtype)
        for name, shape in shapes.items():
            if self._is_new(name):
                yield name, torch.zeros(shape, dtype=dtype)

    def fold_head(self) -> list[str]:
        """Fold the temperature and the units of the targets into the head's weights; return the fields that held them.

        The logits stay the same, even in a library without such fields.
        """
        if self.architecture != CLASSIFIER:
            return []
        config = self.config
        folded = [name for name, value in OF_SCALE.items() if getattr(config, name) != value]
        if folded:
            std, mean = (
                torch.tensor(values or [empty], dtype=torch.float64)
                for values, empty in (
                    (config.target_scale, 1.0),
                    (config.target_mean, 0.0),
                )
            )
            self._head_scale = (std / config.temperature, mean)
            self.config = HFViTConfig.from_dict({**config.to_dict(), **OF_SCALE})
        return folded

    def _folded(self, name: str, tensor: Tensor) -> Tensor:
        """Apply the scale of the logits to a parameter of the head."""
        if self._head_scale is None or not name.startswith("classifier."):
            return tensor
        factor, shift = self._head_scale
        if name.endswith(".bias"):
            return tensor.double() * factor + shift
        return tensor.double() * factor[:, None]

    def state_dict(self) -> dict[str, Tensor]:
        """Return all weights under our names."""
        return dict(self.weights())

    def _read(self, name: str) -> Tensor:
        try:
            tensor = self.source.tensors[name].read()
        except Exception as error:  # a corrupt file can fail in any way
            raise ValueError(f"{self.source.name}: {name!r} cannot be read ({error}).") from error
        if not tensor.isfinite().all():
            raise ValueError(
                f"{self.source.name}: {name!r} holds NaN or infinity: its training diverged, or the file is corrupt. "
                "Use an earlier checkpoint."
            )
        return tensor

    def _renamed(self, name: str) -> str:
        """Return the name of a parameter in the resulting model: a new head puts the encoder under `vit.`."""
        is_below = self._reading.architecture == ENCODER and self.architecture != ENCODER
        return f"vit.{name}" if is_below else name

    def _is_new(self, name: str) -> bool:
        return self._has_new_head and name.startswith("classifier.")

    def _arrange(self, rule: Rule, stored: list[Tensor]) -> list[Tensor]:
        try:
            return rule.layout.read(stored)
        except (RuntimeError, IndexError) as error:
            reason = str(error).splitlines()[0]
            raise self._contradiction(rule, f"does not fit the other tensors ({reason})") from error

    def _contradiction(self, rule: Rule, what: str) -> ValueError:
        shapes = ", ".join(f"{name!r} {list(self.source.tensors[name].shape)}" for name in rule.theirs)
        return ValueError(f"{self.source.name}: the shape of {shapes} {what}.")

    def _fit(self, name: str, tensor: Tensor) -> Tensor:
        """Resample position tables and the patch projection to the resulting sizes."""
        target = self.shapes[name]
        if tensor.shape == target:
            return tensor
        if ".position_embeddings." in f".{name}" and tensor.ndim == 4:
            return resample_table(tensor, (target[1], target[2]), self.config.position_interpolation)
        if name.endswith("patch_embeddings.projection.weight"):
            tensor = resample_patch_projection(tensor, self._own_config.patch_shape, self.config.patch_shape)
            old, new = self._own_config.num_channels, self.config.num_channels
            return tensor if new == old else adapt_channels(tensor, old, new)
        return tensor

    # ----------------------------------------------------------------------------------------------- processor

    def processor(self) -> HFViTImageProcessorPil:
        """Return the preprocessing that the source states, at the resulting image size."""
        stated, own, options = self._reading.processor, self._own_config, self.options
        if options.preprocessing is not None:
            stated = {"name": options.preprocessing}
        if isinstance(stated, HFViTImageProcessorPil):
            processor = stated
        else:
            arguments = {"name": "original", **(stated or {})}
            channels = own.num_channels
            processor = HFViTImageProcessorPil.from_preset(size=own.image_shape, num_channels=channels, **arguments)
        for name, values in (("image_mean", options.mean), ("image_std", options.std)):
            if values is not None:
                setattr(processor, name, _per_channel(name, values, own.num_channels))
        if self.config.image_shape != own.image_shape:
            processor.set_output_size(self.config.image_shape)
        if self.config.num_channels != own.num_channels:
            processor.set_num_channels(self.config.num_channels)
        return processor


def _read(family: Family, source: Source, options: Options) -> Reading:
    """Read a source; use the requested pooling only if the file does not determine its own."""
    if options.pooling is None:
        return family.read(source, options)
    try:
        own = family.read(source, replace(options, pooling=None))
    except ValueError:  # some files need the option
        return family.read(source, options)
    is_open = any("--pooling" in sentence for sentence in own.assumed)
    return family.read(source, options) if is_open else own


def _per_channel(name: str, values: float | Sequence[float], number: int) -> list[float]:
    values = [values] if isinstance(values, int | float) else values
    if len(values) not in (1, number):
        raise ValueError(
            f"--{name.removeprefix('image_')} has {len(values)} numbers: expected one, or one for each of {number} "
            "channels."
        )
    return [float(value) for value in values] * (number // len(values))


def usual_size(checkpoint: Checkpoint) -> tuple[int, int]:
    """Return the output (height, width) of a checkpoint's image processor if it is a multiple of the patch size.

    Otherwise return the image size of the config. DINOv2 has positions for 518 pixels and a processor for 224.
    """
    stated = checkpoint.processor().to_dict()
    size = stated.get("crop_size" if stated.get("do_center_crop") else "size") or {}
    height, width = size.get("height") or 0, size.get("width") or 0
    rows, columns = checkpoint.config.patch_shape
    is_divided = height and width and height % rows == width % columns == 0
    return (height, width) if is_divided else checkpoint.config.image_shape


def parameters_of(architecture: str, config: HFViTConfig) -> dict[str, torch.Size]:
    """Return names and shapes of a model's parameters, without memory for their values."""
    with torch.device("meta"):
        model: torch.nn.Module = model_class(architecture)(config)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def check_depth(source: Source, config: HFViTConfig) -> None:
    """Raise `ValueError` for more layers than there are tensors, before any layer is built."""
    if config.num_hidden_layers > len(source.tensors):
        raise ValueError(
            f"{source.name}: {len(source.tensors)} tensors are too few for num_hidden_layers="
            f"{config.num_hidden_layers}."
        )


def processor_beside(source: Source) -> HFViTImageProcessorPil | None:
    """Return the processor in the folder of the weights, if there is one."""
    if source.folder is None or not any((source.folder / file).is_file() for file in PROCESSOR_FILES):
        return None
    return HFViTImageProcessorPil.from_pretrained(source.folder)


def _quoted(names: Sequence[str]) -> str:
    return shortened([repr(name) for name in names], most=8)
