"""Find the encoder in files of training scripts, among their dictionaries, copies, prefixes, counters and heads.

The names of all tensors in a file are searched for prefixes below which a family recognizes a model. The prefix is
removed from all names that share it or a part of it. If there are several models, one is read, and `assumed` names the
others.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from ..system.texts import counted, shortened
from .files import Source
from .formats import Stored, Tensors
from .pickles import BELOW

BOUNDARY = re.compile(r" > |[./]")
DEEPEST = 8  # maximum number of parts of a prefix
FEWEST = 6  # minimum number of tensors of a model
# Parts that wrappers insert anywhere in a name: torch.compile, FSDP, activation checkpointing, and DeepSpeed.
INSERTED = re.compile(r"(?<![^./ ])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
# Counters of AveragedModel, of thop and of BatchNorm, and tensors of a loss, such as class weights.
COUNTERS = re.compile(
    r"(.*[./ ])?(n_averaged|total_ops|total_params|num_batches_tracked|(criterion|loss(_fn|_func|_function)?)\..*)"
)
# Keys of running averages of the weights, and of networks that only the training needs.
AVERAGED = re.compile(
    r"(.*_)?(ema|swa|averaged?|avg|shadow|momentum|teacher|target)(_.*)?(model|encoder)?", re.IGNORECASE
)
# Parts of the names of tensors outside of the encoder that change the encoder's outputs.
TUNING = re.compile(r"(^|[._])(w_[AB]s|lora|adapters?|prompts?)(?!_learner|[a-z])", re.IGNORECASE)
# Module names of a head outside of the encoder.
HEADS = re.compile(
    r"((cls|class|classification|mlp|lin|linear|final|last)_?)?(heads?|classifiers?|fc|linear|logits)|\d+"
)
# Modules that may be between the encoder and its head.
BETWEEN = re.compile(
    r"((batch|layer)_?)?norm\d*|[bl]n\d*|bottleneck|neck|proj|projection|mlp|fc\d+|dense\d*|hidden|embedding|linear\d+"
)
# Layers of a head that project to the space of another modality instead of labels.
PROJECTIONS = ("proj", "projection")
NOTHING = Stored((), torch.float32, partial(torch.zeros, ()))


def unwrapped(source: Source, is_model: Callable[[Source], bool], wanted: str | None = None) -> Source:
    """Return a source with the names of one model, and without the rest of a training checkpoint.

    Args:
        source: The tensors by their names in the file.
        is_model: Whether a family recognizes the tensors of a source by their names alone.
        wanted: Key or part of the prefix of the model to read; by default the trained one, not its running average.

    Raises:
        ValueError: If no weights have the key `wanted`; the message lists the keys.
    """
    tensors = {
        INSERTED.sub("", name): stored for name, stored in source.tensors.items() if not COUNTERS.fullmatch(name)
    }
    below = {
        prefix: {name.removeprefix(prefix) for name in tensors if name.startswith(prefix)}
        for prefix in _prefixes(tensors)
    }
    models = [
        prefix
        for prefix in below
        if is_model(Source(source.name, {name: tensors[prefix + name] for name in below[prefix]}))
    ]
    places = _separate(models, below) or _dictionaries(tensors)
    labels = _labels(places)
    chosen = _choose(source, places, labels, below, wanted)
    sentences = []
    if others := [label for place, label in labels.items() if place != chosen]:
        quoted = ", ".join(f"{label!r}" for label in others)
        sentences.append(
            f"The weights are those of {labels[chosen]!r}; the file also has {quoted} (--weights {others[0]})."
        )
    # Tensors of the other models are dropped.
    other = tuple(_up_to(place, label) for place, label in labels.items() if place != chosen and place)
    result, outside = _renamed({name: tensors[name] for name in tensors if not name.startswith(other)}, chosen)
    if tuning := [name for name in outside if TUNING.search(name)]:
        sentences.append(
            "The encoder is read without the adapters or prompts outside of it, which change the outputs in the "
            f"original code: {shortened(tuning)}."
        )
    number = len(below.get(chosen, ()))
    notes = []
    if chosen.replace("module.", ""):
        shown = chosen.replace(BELOW, ".")
        notes.append(f"The prefix {shown!r} is removed from the names of {counted(number, 'tensor')}.")
    return replace(source, tensors=result, outside=outside, assumed=sentences, notes=notes)


def _prefixes(tensors: Tensors) -> list[str]:
    """Return the prefixes that enough names for a model share, the shortest first."""
    counts = Counter(
        name[: boundary.end()] for name in tensors for boundary in islice(BOUNDARY.finditer(name), DEEPEST)
    )
    return ["", *sorted((prefix for prefix, count in counts.items() if count >= FEWEST), key=len)]


def _separate(models: list[str], below: dict[str, set[str]]) -> list[str]:
    """Return the prefixes without those that lie below another one and belong to the same model."""
    places: list[str] = []
    for prefix in models:
        above = [place for place in places if prefix.startswith(place)]
        if all(2 * len(below[prefix] & below[place]) >= len(below[prefix]) for place in above):
            places.append(prefix)
    return places


def _dictionaries(tensors: Tensors) -> list[str]:
    """Return the prefixes of nested dictionaries, whose tensors no family recognizes by their names alone."""
    counts = Counter("".join(name.rpartition(BELOW)[:2]) for name in tensors)
    most = max(counts.values(), default=0)
    places = [place for place, count in counts.items() if 2 * count > most]
    return [
        f"{place}module." if all(n.startswith(f"{place}module.") for n in tensors if n.startswith(place)) else place
        for place in places
    ]


def _parts(place: str) -> list[str]:
    return [part for part in BOUNDARY.split(place) if part]


def _labels(places: list[str]) -> dict[str, str]:
    """Return the first part of each place that the other places do not share."""
    parts = {place: _parts(place) for place in places}
    shared = set.intersection(*map(set, parts.values())) if len(places) > 1 else set()
    return {
        place: next((part for part in own if part not in shared), "the model itself") for place, own in parts.items()
    }


def _up_to(place: str, label: str) -> str:
    """Return the beginning of a place that ends with its label."""
    for boundary in BOUNDARY.finditer(place):
        if _parts(place[: boundary.end()])[-1:] == [label]:
            return place[: boundary.end()]
    return place


def _choose(
    source: Source, places: list[str], labels: dict[str, str], below: dict[str, set[str]], wanted: str | None
) -> str:
    """Return the place of the model that `wanted` selects, or of the one that the original code evaluates."""
    candidates = places or [""]
    if wanted is not None:
        candidates = [place for place in places if wanted in (*_parts(place), place.strip(" >./"))]
        if not candidates:
            there = ", ".join(dict.fromkeys(map(repr, labels.values()))) or "nothing"
            raise ValueError(f"{source.name}: it has no weights named {wanted!r} for --weights, but {there}.")
    parts = {place: set(_parts(place)) for place in candidates}
    known = set().union(*parts.values())

    def rank(place: str) -> tuple[bool, bool, int]:
        evaluated = (
            "state_dict_ema" in parts[place]  # timm/models/_helpers.py, load_state_dict
            or ("target_encoder" in parts[place] and "encoder" in known)  # I-JEPA, MSN
            or ("teacher" in parts[place] and "student" in known and _is_self_supervised(source))  # DINO, iBOT, DINOv2
        )
        is_averaged = any(AVERAGED.fullmatch(part) for part in parts[place])
        return not evaluated, is_averaged, -len(below.get(place, ()))

    return min(candidates, key=rank)


def _is_self_supervised(source: Source) -> bool:
    return any("last_layer" in name or "dino_loss" in name for name in source.tensors)


def _renamed(tensors: Tensors, prefix: str) -> tuple[Tensors, dict[str, Stored]]:
    """Remove a prefix, and from other names the part of it that they share.

    Returns:
        The tensors by their new names, and those outside of the prefix. The first result also contains the tensors
        outside of the prefix, except those whose first module also exists below it: a text tower has the same names
        as the image tower.
    """
    shared = [prefix[: boundary.end()] for boundary in BOUNDARY.finditer(prefix)][::-1]
    inside = {name.removeprefix(prefix): stored for name, stored in tensors.items() if name.startswith(prefix)}
    modules = {BOUNDARY.split(name)[0] for name in inside}
    outside = {}
    for name, stored in tensors.items():
        if not name.startswith(prefix):
            start = next((start for start in shared if name.startswith(start)), "")
            outside[name.removeprefix(start).replace(BELOW, ".")] = stored
    free = {name: stored for name, stored in outside.items() if BOUNDARY.split(name)[0] not in modules}
    return {**inside, **free}, outside


# ----------------------------------------------------------------------------------------------------------- heads


def with_head(source: Source, names: Sequence[str], inputs: Sequence[int] = (1,)) -> Source:
    """Rename a head that is one linear layer to the name that its family reads, the first of `names`.

    A head of several layers is left out, unless the family has a place for it. These layers include those between the
    head and the encoder.

    Args:
        source: Tensors whose names have no prefix.
        names: Module names of the family's classifiers.
        inputs: Possible widths of a head's input, as multiples of the width of the model.
    """
    tensors, width = source.tensors, _width(source.tensors)
    heads = {theirs: stored for theirs, stored in tensors.items() if HEADS.fullmatch(BOUNDARY.split(theirs)[0])}
    known = [f"{name}.weight" for name in names if f"{name}.weight" in tensors]
    is_outside = all(theirs in source.outside for theirs in known)
    if heads and is_outside:
        heads |= {
            theirs: stored
            for theirs, stored in source.outside.items()
            if BETWEEN.fullmatch(BOUNDARY.split(theirs)[0]) and width in stored.shape
        }
    layers = [theirs.removesuffix(".weight") for theirs in heads if theirs.endswith((".weight", ".weight_v"))]
    if not layers or (known and (not is_outside or len(layers) == 1)):
        return source
    norms = [theirs.removesuffix(".running_mean") for theirs in heads if theirs.endswith(".running_mean")]
    linears = [layer for layer in layers if layer not in norms]
    if not linears or BOUNDARY.split(linears[0])[-1] in PROJECTIONS:
        return replace(source, outside={**source.outside, **heads})
    linear, name = linears[0], names[0]
    shape = heads.get(f"{linear}.weight", NOTHING).shape
    is_linear = len(linears) == 1 and shape[1:] in [(number * width,) for number in inputs]
    if not is_linear or len(norms) > 1:
        rest = {theirs: stored for theirs, stored in tensors.items() if not (known and heads.get(theirs) is stored)}
        return replace(source, tensors=rest, outside={**source.outside, **heads}, head_layers=layers)
    weight = heads[f"{linear}.weight"]
    bias = heads.get(f"{linear}.bias", Stored(weight.shape[:1], weight.dtype, partial(torch.zeros, weight.shape[0])))
    notes = [f"The head is the linear layer {linear!r}; layers without weights before it are assumed to be dropout."]
    assumed = list(source.assumed)
    if norms:
        has_weights = norms[0] in layers
        eps = 1e-5 if has_weights else 1e-6
        weight, bias = _after_batch_norm(weight, bias, heads, norms[0], eps)
        usual = "torch's default" if has_weights else "that of MAE's linear probes"
        assumed.append(f"eps {eps:g} of the BatchNorm {norms[0]!r}, {usual}; it is folded into the linear layer.")
    encoder = {theirs: stored for theirs, stored in tensors.items() if heads.get(theirs) is not stored}
    return replace(
        source,
        tensors={**encoder, f"{name}.weight": weight, f"{name}.bias": bias},
        outside={theirs: stored for theirs, stored in source.outside.items() if theirs not in heads},
        notes=[*source.notes, *notes],
        assumed=assumed,
    )


def _after_batch_norm(weight: Stored, bias: Stored, heads: Tensors, norm: str, eps: float) -> tuple[Stored, Stored]:
    """Fold a BatchNorm, as in evaluation, into the following linear layer; return its weight and bias."""

    def statistic(name: str, default: float) -> Tensor:
        stored = heads.get(f"{norm}.{name}")
        return torch.tensor(default, dtype=torch.float64) if stored is None else stored.read().double()

    def factor() -> Tensor:
        return statistic("weight", 1) / (statistic("running_var", 1) + eps).sqrt()

    def folded_weight() -> Tensor:
        return (weight.read().double() * factor()).to(weight.dtype)

    def folded_bias() -> Tensor:
        shift = statistic("bias", 0) - statistic("running_mean", 0) * factor()
        return (bias.read().double() + weight.read().double() @ shift).to(bias.dtype)

    return weight._replace(read=folded_weight), bias._replace(read=folded_bias)


def _width(tensors: Tensors) -> int:
    """Return the most common size of vectors, which is the width of the model."""
    sizes = Counter(stored.shape[0] for stored in tensors.values() if len(stored.shape) == 1)
    return max(sizes, key=lambda size: sizes[size], default=0)
