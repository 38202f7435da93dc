"""Find out from the names and shapes of a checkpoint's tensors why it could not be read."""

import re

from .files import Source, Tensors


def explain(source: Source, error: Exception) -> str:
    """Return an error's message with the file's name, missing tensors and contradictory shapes."""
    sentence = " ".join(str(error).split("\n"))
    if not isinstance(error, ValueError):
        sentence = f"its tensors or the files beside them are not as expected ({type(error).__name__}: {sentence})."
    sentences = [sentence if source.name in sentence else f"{source.name}: {sentence}"]
    if sentence := hint(source):
        return " ".join([*sentences, sentence])
    missing = [name for name in _missing(source.tensors) if repr(name) not in sentences[0]]
    if missing:
        sentences.append(f"Judging by the other tensors, {', '.join(map(repr, missing[:4]))} is missing.")
    sentences += [f"The shapes of {pair} contradict each other." for pair in _contradictions(source.tensors)[:4]]
    return " ".join(sentences)


# Why a file could not be read and what to do, by a pattern that the name of one of its tensors matches.
HINTS = {
    r".*(\blora_|\.base_layer\.|\.linear_[ab]_[qkv]\.).*": (
        "It holds an adapter (LoRA) that is not merged into the weights. Merge it, and save the result: with peft, "
        "model.merge_and_unload().save_pretrained('merged')."
    ),
    r".*\.(parametrizations\..*|weight_[gv])": (
        "It holds the parts of weights that torch computes from them. Save it after "
        "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight')."
    ),
    r".*\.(SCB|weight\.absmax|qweight|_packed_params.*|weight_scale(_inv)?)": (
        "Its weights are quantized: use the checkpoint that they were made from."
    ),
    r".*\.rel_pos_[hw]": (
        "It has relative positions of rows and of columns, as SAM and ViTDet, which are not supported."
    ),
    r"weight": (
        "It holds one linear layer, a head without its encoder. Save both in one file: the encoder's names with "
        "'backbone.' before them, and linear_head.weight and linear_head.bias."
    ),
    r"(.*\W)?exp_avg(_sq)?": "It holds the state of an optimizer; the weights are in another file.",
}
# Names of CLIP, SigLIP and DINOv2 in transformers, whose config states facts that the tensors do not determine.
OF_TRANSFORMERS = re.compile(
    r"(.*\.)?(embeddings\.(position_embedding\.weight|mask_token)|(layer_scale1\.)?lambda_?1|ijepa\..*)"
)


def hint(source: Source) -> str:
    """Return why a file could not be read, judging by its tensors, and what to do; an empty string if unknown."""
    if source.tensors and all(0 in stored.shape for stored in source.tensors.values()):
        return (
            "All its tensors are empty, as in files of DeepSpeed's ZeRO-3, whose values are in other files: merge "
            "them with the script zero_to_fp32.py beside them, and pass its result."
        )
    for pattern, sentence in HINTS.items():
        if any(re.fullmatch(pattern, name) for name in source.tensors):
            return sentence
    if "model_type" in source.config or not any(map(OF_TRANSFORMERS.fullmatch, source.tensors)):
        return ""
    return "The tensors have the names of transformers: put the config.json of the model beside the file."


# A tensor of a layer: prefix, number of the layer, rest of the name.
OF_A_LAYER = re.compile(r"(.*(?:blocks|layers?|encoderblock)[._])(\d+)([./].+)")


def _missing(tensors: Tensors) -> list[str]:
    """Return the names of missing weights whose bias exists, and of missing tensors that half of the layers have."""
    missing = []
    layers: dict[str, dict[str, set[int]]] = {}  # {prefix: {rest: numbers}}
    for name in tensors:
        if name.endswith((".bias", "/bias")) and not any(weight in tensors for weight in _weights_of(name)):
            missing.append(_weights_of(name)[0])
        if match := OF_A_LAYER.fullmatch(name):
            layers.setdefault(match[1], {}).setdefault(match[3], set()).add(int(match[2]))
    for prefix, rests in layers.items():
        numbers = set().union(*rests.values())
        for rest, having in rests.items():
            if 2 * len(having) >= len(numbers):
                missing += [f"{prefix}{number}{rest}" for number in sorted(numbers - having)]
    return list(dict.fromkeys(missing))


def _contradictions(tensors: Tensors) -> list[str]:
    """Describe pairs of weight and bias with different widths: the first dimensions in torch, the last in flax."""
    pairs = []
    for bias, stored in tensors.items():
        for weight in _weights_of(bias) if bias.endswith((".bias", "/bias")) else ():
            if weight in tensors:
                shape, dimensions = tensors[weight].shape, len(stored.shape)
                width = shape[:dimensions] if bias.endswith(".bias") else shape[len(shape) - dimensions :]
                if width != stored.shape:
                    pairs.append(f"{weight!r} {list(shape)} and {bias!r} {list(stored.shape)}")
    return pairs


def _weights_of(bias: str) -> list[str]:
    stem = bias.removesuffix("bias")
    return [f"{stem}weight"] if stem.endswith(".") else [f"{stem}kernel", f"{stem}scale"]
