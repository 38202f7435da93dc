"""The paper's own checkpoints: npz files of google-research/vision_transformer and of google-research/big_vision.

Sources: vit_jax/models_vit.py, models_resnet.py and checkpoint.py, and big_vision/models/vit.py and
models/proj/flexi/vit.py. Both use flax: LayerNorm with epsilon 1e-6, GELU in its tanh form, dense kernels `[in, out]`,
convolutions `[h, w, in, out]`, attention kernels `[D, A, d]` and `[A, d, D]`.

Before flax's linen, the parts of a block were numbered together (LayerNorm_0, MultiHeadDotProductAttention_1,
LayerNorm_2, MlpBlock_3); since then, each type is numbered separately. Positions moved from
Transformer/posembed_input to Transformer/ and then to the top level. Until 2022 they had a row for the class token.
"""

from functools import partial
from typing import Any

from torch import Tensor

from ...model.configuration_hf_vit import HFViTConfig
from ..checkpoint import CLASSIFIER, ENCODER, Family, Options, Reading
from ..files import Source, Stored
from ..layouts import Layout, Row, count, each, grid_of_table, heads_together, is_square, positions, reshaped

PRE_LINEN = ("LayerNorm_0", "MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3")
LINEN = ("LayerNorm_0", "MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0")
POSITION_NAMES = ("Transformer/posembed_input/pos_embedding", "Transformer/pos_embedding", "pos_embedding")
TABLE = "embeddings.position_embeddings.table.weight"
# Prefixes of the image model: one of two towers (`img/`), in a training checkpoint or an older one, or alone.
ROOTS = ("params/img/", "opt/target/img/", "img/", "params/", "opt/target/", "")
# Optimizer, counters, and the text tower with temperature and bias.
LEFT_OUT = (r"opt/(?!target/).*", r"(extra|chrono)/.*", r"((params|opt/target)/)?(txt/.*|t|b)")


def transposed(config: HFViTConfig) -> Layout:
    """Transpose a dense kernel `[in, out]`."""
    return each(lambda kernel: kernel.T, lambda weight: weight.T)


def convolution(config: HFViTConfig) -> Layout:
    """Convert a convolution `[h, w, in, out]` to `[out, in, h, w]`."""
    return each(lambda kernel: kernel.permute(3, 2, 0, 1), lambda weight: weight.permute(2, 3, 1, 0))


def patches(config: HFViTConfig) -> Layout:
    """Convert the patch convolution to a matrix."""
    shape = tuple(size // config.stem_stride for size in config.patch_shape)
    matrix = each(lambda kernel: kernel.flatten(1), lambda weight: weight.unflatten(1, (-1, *shape)))
    return convolution(config).then(matrix)


def by_heads(config: HFViTConfig, parts: int = 3) -> Layout:
    """Convert kernels `[D, A, d]` of queries, keys and values."""
    shape = (config.num_attention_heads, -1)
    return each(lambda kernel: kernel.flatten(1).T, lambda weight: weight.T.unflatten(1, shape)).then(
        heads_together(config, parts)
    )


def biases_by_heads(config: HFViTConfig, parts: int = 3) -> Layout:
    """Convert biases `[A, d]` of queries, keys and values."""
    shape = (config.num_attention_heads, -1)
    return each(lambda bias: bias.flatten(), lambda bias: bias.unflatten(0, shape)).then(heads_together(config, parts))


def from_heads(config: HFViTConfig) -> Layout:
    """Convert the output projection `[A, d, D]` to `[D, A*d]`."""
    shape = (config.num_attention_heads, -1)
    return each(lambda kernel: kernel.flatten(0, 1).T, lambda weight: weight.T.unflatten(0, shape))


def flat(config: HFViTConfig) -> Layout:
    """Flatten scales and biases to `[C]`; flax before 0.3.6 wrote them as `[1, 1, 1, C]`."""
    return reshaped((-1,), (-1,))


def without_first(config: HFViTConfig) -> Layout:
    """Remove the row for a class token from the positions of a model without one."""
    joined = positions(config)
    return Layout(lambda theirs: joined.read([theirs[0][:, 1:]]), joined.write)


def _norm(ours: str, theirs: str) -> list[Row]:
    return [Row(f"{ours}.weight", f"{theirs}/scale", flat), Row(f"{ours}.bias", f"{theirs}/bias", flat)]


def _dense(ours: str, theirs: str) -> list[Row]:
    return [Row(f"{ours}.weight", f"{theirs}/kernel", transposed), Row(f"{ours}.bias", f"{theirs}/bias")]


def _mlp(ours: str, theirs: str) -> list[Row]:
    return _dense(f"{ours}.fc1", f"{theirs}/Dense_0") + _dense(f"{ours}.fc2", f"{theirs}/Dense_1")


def _attention(ours: str, theirs: str, parts: dict[str, tuple[str, ...]]) -> list[Row]:
    rows = [
        Row(f"{ours}.o_proj.weight", f"{theirs}/out/kernel", from_heads),
        Row(f"{ours}.o_proj.bias", f"{theirs}/out/bias"),
    ]
    for name, names in parts.items():
        for kind, file_kind, layout in (("weight", "kernel", by_heads), ("bias", "bias", biases_by_heads)):
            stored = tuple(f"{theirs}/{part}/{file_kind}" for part in names)
            rows.append(Row(f"{ours}.{name}.{kind}", stored, partial(layout, parts=len(names))))
    return rows


def table(config: HFViTConfig, root: str = "", has_spare_position: bool = False) -> list[Row]:
    """Return our names and the names of every era; if several rows have the same names, the first is written."""
    rows = [
        Row("embeddings.cls_token", f"{root}cls"),
        Row("embeddings.patch_embeddings.projection.weight", f"{root}embedding/kernel", patches),
        Row("embeddings.patch_embeddings.projection.bias", f"{root}embedding/bias"),
        *_norm("layernorm", f"{root}Transformer/encoder_norm"),
        *_dense("pooler.pre_logits", f"{root}pre_logits"),
        *_dense("classifier", f"{root}head"),
    ]
    # vit_jax reads only its own name of the positions, big_vision reads all names. Models that only big_vision has get
    # its name.
    names = POSITION_NAMES[::-1] if is_of_big_vision(config) else POSITION_NAMES
    layout = without_first if has_spare_position else positions
    rows += [Row(("embeddings.position_embeddings.prefix", TABLE), f"{root}{name}", layout) for name in names]
    for before, attention, after, mlp in (LINEN, PRE_LINEN):
        block = f"{root}Transformer/encoderblock_{{}}"
        rows += _norm("layers.{}.layernorm_before", f"{block}/{before}")
        rows += _attention("layers.{}.attention", f"{block}/{attention}", {"qkv": ("query", "key", "value")})
        rows += _norm("layers.{}.layernorm_after", f"{block}/{after}")
        rows += _mlp("layers.{}.mlp", f"{block}/{mlp}")
    for head in (f"{root}MAPHead_0/", root):  # at the time of ViT-g, this head had no module of its own
        pooling = "pooler.pooling"
        parts = {"query": ("query",), "key_value": ("key", "value")}
        rows.append(Row(f"{pooling}.probe", f"{head}probe"))
        rows += _attention(pooling, f"{head}MultiHeadDotProductAttention_0", parts)
        rows += _norm(f"{pooling}.layernorm", f"{head}LayerNorm_0")
        rows += _mlp(f"{pooling}.mlp", f"{head}MlpBlock_0")
    return rows + _stem(config, root)


def is_of_big_vision(config: HFViTConfig) -> bool:
    """Return whether only big_vision has this model: attention pooling, or a class token without position."""
    return config.pooling == "attention" or bool(config.use_cls_token and not config.num_prefix_positions)


def _stem(config: HFViTConfig, root: str) -> list[Row]:
    stem = "embeddings.patch_embeddings.stem"
    rows = [
        Row(f"{stem}.conv.weight", f"{root}conv_root/kernel", convolution),
        *_norm(f"{stem}.norm", f"{root}gn_root"),
    ]
    for stage, units in enumerate(config.stem_layers or ()):
        for unit in range(units):
            ours, theirs = f"{stem}.stages.{stage}.{unit}", f"{root}block{stage + 1}/unit{unit + 1}"
            for number in (1, 2, 3):
                rows.append(Row(f"{ours}.conv{number}.weight", f"{theirs}/conv{number}/kernel", convolution))
                rows += _norm(f"{ours}.norm{number}", f"{theirs}/gn{number}")
            rows.append(Row(f"{ours}.shortcut.0.weight", f"{theirs}/conv_proj/kernel", convolution))
            rows += _norm(f"{ours}.shortcut.1", f"{theirs}/gn_proj")
    return rows


# ----------------------------------------------------------------------------------------------------- reading


def _recognises(source: Source) -> bool:
    return _root(source) is not None


def _root(source: Source) -> str | None:
    """Return the prefix of the image model's names, even if some of them are missing."""
    marks = ("embedding/kernel", "Transformer/encoder_norm/scale", "Transformer/encoder_norm/bias")
    found = {root: sum(f"{root}{mark}" in source.tensors for mark in marks) for root in ROOTS}
    best = max(found, key=lambda root: found[root])
    return best if found[best] else None


def _unstacked(source: Source, root: str) -> Source:
    """Split the blocks of a scan, which are stacked along the first axis."""
    stack = f"{root}Transformer/encoderblock/"
    tensors = {name: stored for name, stored in source.tensors.items() if not name.startswith(stack)}
    for name, stored in source.tensors.items():
        if name.startswith(stack):
            for number in range(stored.shape[0] if stored.shape else 0):
                block = f"{root}Transformer/encoderblock_{number}/{name.removeprefix(stack)}"
                tensors[block] = Stored(stored.shape[1:], stored.dtype, partial(_read_block, stored, number))
    return Source(source.name, tensors, source.config, source.folder)


def _read_block(stored: Stored, number: int) -> Tensor:
    return stored.read()[number]


def _read(source: Source, options: Options) -> Reading:
    root = _root(source)
    assert root is not None
    source = _unstacked(source, root)
    names = {name.removeprefix(root) for name in source.tensors if name.startswith(root)}

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        return source.shape(f"{root}{name}", dimensions)

    height, width, channels, size = shape("embedding/kernel", 4)
    block = "Transformer/encoderblock_0"
    era = max((LINEN, PRE_LINEN), key=lambda era: sum(name.startswith(f"{block}/{era[1]}/") for name in names))
    _, heads, head_dim = shape(f"{block}/{era[1]}/query/kernel", 3)
    fields: dict[str, Any] = {
        "hidden_size": size,
        "num_hidden_layers": count(names, "Transformer/encoderblock_{}/"),
        "num_attention_heads": heads,
        "head_dim": None if heads * head_dim == size else head_dim,
        "intermediate_size": shape(f"{block}/{era[3]}/Dense_0/kernel", 2)[1],
        "hidden_act": options.hidden_act or "gelu_pytorch_tanh",
        "layer_norm_eps": options.layer_norm_eps or 1e-6,
        "num_channels": channels,
        "pooling": options.pooling or _pooling(names),
        "use_cls_token": "cls" in names,
    }
    if "conv_root/kernel" in names:
        _, _, fields["num_channels"], fields["stem_width"] = shape("conv_root/kernel", 4)
        stages = count(names, "block{}/", first=1)
        fields["stem_layers"] = [count(names, f"block{stage}/unit{{}}/", first=1) for stage in range(1, stages + 1)]
        height, width = (side * 4 * 2 ** max(stages - 1, 0) for side in (height, width))
    fields["patch_size"] = (height, width)
    has_spare_position = _read_positions(source, root, names, fields, options)
    if "pre_logits/kernel" in names:
        fields["representation_size"] = shape("pre_logits/kernel", 2)[1]
    architecture = ENCODER
    if "head/kernel" in names:
        architecture = CLASSIFIER
        fields["num_labels"] = shape("head/kernel", 2)[1]
    rows = table(HFViTConfig(**fields), root, has_spare_position)
    return Reading(fields, architecture, rows, LEFT_OUT, source=source, processor={"name": "original"})


def _pooling(names: set[str]) -> str:
    if "MAPHead_0/probe" in names or "probe" in names:
        return "attention"
    return "cls" if "cls" in names else "mean"


def _read_positions(source: Source, root: str, names: set[str], fields: dict[str, Any], options: Options) -> bool:
    """Add type and grid of the positions to `fields`; return whether they have a row that the model does not use.

    Raises:
        ValueError: If the file does not determine the grid.
    """
    patch_size, use_cls_token = fields["patch_size"], fields["use_cls_token"]
    name = next((name for name in POSITION_NAMES if name in names), None)
    if name is None:
        if options.image_size is None:
            raise ValueError(
                f"{source.name}: no {' or '.join(repr(root + name) for name in POSITION_NAMES)}: the positions are "
                "sines and cosines, and the file does not store their grid: pass --image-size HxW."
            )
        if options.patch_size not in (None, patch_size):
            raise ValueError(f"{source.name}: --patch-size resamples learned positions; these are fixed (sin-cos).")
        fields.update(position_embedding_type="sincos_2d", image_size=options.image_size)
        return False
    number = source.shape(f"{root}{name}", 3)[1]
    stated = options.image_size if options.patch_size in (None, patch_size) else None
    patches = None if stated is None else stated[0] // patch_size[0] * (stated[1] // patch_size[1])
    if name == POSITION_NAMES[0]:  # the paper's code has a row for the class token if and only if there is one
        prefix = int(use_cls_token)
        if not prefix and patches != number and not is_square(number) and is_square(number - 1):
            raise ValueError(
                f"{source.name}: {root + name!r} has a row for a class token: {root + 'cls'!r} is missing."
            )
    else:
        prefix = 0 if number == patches or is_square(number) else 1
    rows, columns = grid_of_table(number - prefix, patch_size, stated, f"{source.name}: {root}{name}")
    fields.update(
        image_size=(rows * patch_size[0], columns * patch_size[1]),
        num_prefix_positions=prefix if use_cls_token else 0,
        # FlexiViT resizes positions with jax.image.resize, the others with scipy.ndimage.zoom.
        position_interpolation="bilinear_antialias" if options.patch_size else "bilinear_corners",
    )
    return bool(prefix) and not use_cls_token


FAMILY = Family("google npz", _recognises, _read)
