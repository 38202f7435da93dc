"""The studies and their recipes, by name. Listing them imports no torch and no matplotlib."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .study import Study


class Entry(NamedTuple):
    """What is known of a study before its module is imported; `location` is `module:class`."""

    title: str
    source: str
    location: str


# First the inputs and how they are read, then model size, then the training data.
CATALOGUE = {
    "positions": Entry(
        "Position embeddings",
        "Dosovitskiy et al. 2021, appendix D.4, table 8 (ViT-B/16, 5-shot accuracy on ImageNet)",
        "positions:Positions",
    ),
    "pooling": Entry(
        "Class token or mean pooling",
        "Dosovitskiy et al. 2021, appendix D.3, figure 9 (5-shot accuracy on ImageNet)",
        "pooling:Pooling",
    ),
    "scaling": Entry(
        "Scaling each dimension",
        "Dosovitskiy et al. 2021, appendix D.2, figure 8, and section 4.4, figure 5 (accuracy against compute)",
        "scaling:Scaling",
    ),
    "resolution": Entry(
        "Fine-tuning on larger images",
        "Dosovitskiy et al. 2021, section 3.2; Touvron et al. 2019 (arXiv:1906.06423)",
        "resolution:Resolution",
    ),
    "data-size": Entry(
        "Accuracy against the number of training images",
        "Dosovitskiy et al. 2021, section 4.3, figures 3 and 4; for hybrids section 4.4, figure 5",
        "data_size:DataSize",
    ),
    "regularization": Entry(
        "Regularisation and augmentation",
        "Steiner et al. 2022, How to train your ViT? (arXiv:2106.10270), section 4.4, figure 4",
        "regularization:Regularization",
    ),
    "pretraining": Entry(
        "Masked patch prediction",
        "Dosovitskiy et al. 2021, section 4.6 and appendix B.1.2 (JFT-300M, then ImageNet)",
        "pretraining:Pretraining",
    ),
}

# The recipe that a study varies: one for a GPU, one for 2 CPU cores.
SIZES = {name: Path(__file__).with_name(f"{name}.yaml") for name in ("full", "quick")}


def load_study(name: str) -> "Study":
    """Import a study by its name.

    Raises:
        ValueError: If there is no study of this name.
    """
    if name not in CATALOGUE:
        raise ValueError(f"Unknown study {name!r}: choose one of {', '.join(CATALOGUE)}.")
    module, _, class_name = CATALOGUE[name].location.partition(":")
    return getattr(import_module(f".{module}", __package__), class_name)()
