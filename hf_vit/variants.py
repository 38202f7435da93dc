"""Standard variants of the Vision Transformer under their names in the literature.

Sources: B, L and H from table 1 of Dosovitskiy et al. 2021 (arXiv:2010.11929); Ti and S from Touvron et al. 2021
(arXiv:2012.12877) and Steiner et al. 2022 (arXiv:2106.10270); g from Zhai et al. 2022 (arXiv:2106.04560), table 2.
"""

import difflib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from .model.configuration_hf_vit import HFViTConfig  # imports torch, which the command line avoids

# Common spellings of a variant: B/16, vit-b-16, ViT_B16.
LIKE_A_VARIANT = re.compile(
    r"(?:vit[-_ ]?(?:ti|tiny|[a-z]{1,2}|small|base|large|huge)|ti|[sblhg])[-_/ ]?\d{1,2}", re.I
)


class Size(NamedTuple):
    """Dimensions of an encoder, `HFViTConfig` fields."""

    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    num_attention_heads: int


class Variant(NamedTuple):
    """Size, patch size in pixels, and number of parameters of the classifier for 1,000 classes at 224 pixels."""

    size: Size
    patch_size: int
    num_parameters: int


SIZES = {
    "Ti": Size(192, 12, 768, 3),
    "S": Size(384, 12, 1536, 6),
    "B": Size(768, 12, 3072, 12),
    "L": Size(1024, 24, 4096, 16),
    "H": Size(1280, 32, 5120, 16),
    "g": Size(1408, 40, 6144, 16),
}

VARIANTS = {
    "ViT-Ti/16": Variant(SIZES["Ti"], 16, 5_717_416),
    "ViT-S/16": Variant(SIZES["S"], 16, 22_050_664),
    "ViT-S/32": Variant(SIZES["S"], 32, 22_878_952),
    "ViT-B/8": Variant(SIZES["B"], 8, 86_576_872),
    "ViT-B/16": Variant(SIZES["B"], 16, 86_567_656),
    "ViT-B/32": Variant(SIZES["B"], 32, 88_224_232),
    "ViT-L/14": Variant(SIZES["L"], 14, 304_203_752),
    "ViT-L/16": Variant(SIZES["L"], 16, 304_326_632),
    "ViT-L/32": Variant(SIZES["L"], 32, 306_535_400),
    "ViT-H/14": Variant(SIZES["H"], 14, 632_045_800),
    "ViT-g/14": Variant(SIZES["g"], 14, 1_012_611_432),
}


def variant_name(name: str) -> str | None:
    """Return the key of `VARIANTS` for a name, which may lack `"ViT-"`; `None` for the name of a checkpoint.

    Raises:
        ValueError: For a misspelled variant; the message lists the variants.
    """
    for known in (name, f"ViT-{name}"):
        if known in VARIANTS:
            return known
    if LIKE_A_VARIANT.fullmatch(name) is None or Path(name).exists():
        return None
    plain = {re.sub(r"[-_/ ]", "", known).lower(): known for known in VARIANTS}
    spelled = re.sub(r"[-_/ ]", "", name).lower().replace("tiny", "ti")
    nearest = difflib.get_close_matches("vit" + spelled.removeprefix("vit"), plain, n=1, cutoff=0.8)
    meant = f"did you mean {plain[nearest[0]]}? The variants are" if nearest else "choose one of"
    raise ValueError(f"Unknown variant {name!r}: {meant} {', '.join(VARIANTS)}.")


def is_from_scratch(model: str | None) -> bool:
    """Return whether a model is trained from scratch: a variant, or `None` for a model that a config describes."""
    return model is None or variant_name(model) is not None


def config_of(name: str, **fields: Any) -> "HFViTConfig":
    """Return the config of a variant.

    Args:
        name: A key of `VARIANTS`, with or without `"ViT-"`, for example `"ViT-B/16"`.
        fields: Further fields of `HFViTConfig`; they override those of the variant.

    Raises:
        ValueError: For an unknown name; the message lists the variants.

    Example:
        >>> config_of("ViT-S/16", num_labels=10, image_size=384).hidden_size
        384
    """
    from .model.configuration_hf_vit import HFViTConfig

    if (known := variant_name(name)) is None:
        raise ValueError(f"Unknown variant {name!r}: choose one of {', '.join(VARIANTS)}.")
    variant = VARIANTS[known]
    return HFViTConfig(**{**variant.size._asdict(), "patch_size": variant.patch_size, **fields})


def variant_of(config: "HFViTConfig") -> str:
    """Return the name of an architecture's size in the literature, for example `"ViT-B/16"`."""
    size = (config.hidden_size, config.num_hidden_layers, config.intermediate_size, config.num_attention_heads)
    letter = next((letter for letter, known in SIZES.items() if known == size), None)
    if letter is None:
        return "of no standard size"
    height, width = config.patch_shape
    prefix = "ViT-"
    if config.stem_layers is not None:  # three convolutions per unit, one in the root and the patch projection
        prefix = f"R{3 * sum(config.stem_layers) + 2 if config.stem_layers else ''}+"
    return f"{prefix}{letter}/{height if height == width else f'{height}x{width}'}"
