"""What makes a saved folder complete beside weights and config: the code, an image processor and a card.

A folder saved by any model of this package works in `AutoModel`, `AutoImageProcessor` and `pipeline`, with the
package installed or with `trust_remote_code=True`.
"""

import json
import shutil
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard
from transformers.dynamic_module_utils import get_relative_import_files

from .configuration_hf_vit import CLASSES, HFViTConfig
from .image_processing_pil_hf_vit import HFViTImageProcessorPil

if TYPE_CHECKING:  # never true: makes transformers download and copy this file with the others
    from .dense_hf_vit import HFViTBackbone  # noqa: F401

CARD = """---
library_name: transformers
pipeline_tag: {task}
tags:
- vision-transformer
- hf_vit
---

# {name}

A Vision Transformer ([Dosovitskiy et al., 2021](https://arxiv.org/abs/2010.11929)) of {layers} layers, width {width}
and {heads} heads, on images of {height}x{width_px} pixels in patches of {patch_height}x{patch_width}.

```python
from transformers import pipeline

model = pipeline("{task}", "{name}", trust_remote_code=True)
```

The code beside the weights is that of the package `hf-vit`; where it is installed, `import hf_vit` does instead of
`trust_remote_code=True`.
"""


def complete_repository(
    folder: str | PathLike, config: HFViTConfig, processor: HFViTImageProcessorPil | None = None
) -> None:
    """Write into `folder` the code, and the image processor and the card if it does not have them yet.

    The code is each file that `auto_map` names, and what these import from beside themselves. `processor` is the one
    at hand; without it, that of the checkpoint that the model came from.
    """
    folder = Path(folder)
    entries = {str(Path(__file__).with_name(f"{place.split('.')[0]}.py")) for place in CLASSES.values()}
    for file in entries.union(*map(get_relative_import_files, entries)):
        shutil.copyfile(file, folder / Path(file).name)
    if not (folder / "preprocessor_config.json").exists():
        processor = processor or processor_of(config)
        if processor is not None:
            processor.save_pretrained(folder)
    card = folder / "README.md"
    if not card.exists():
        card.write_text(card_of(config, folder.resolve().name), encoding="utf-8")


def replace_empty_form(folder: str | PathLike, config: HFViTConfig, name: str) -> None:
    """Put a card in the place of the form that transformers leaves for the author to fill in; keep its tags."""
    path = Path(folder) / "README.md"
    form = ModelCard.load(path)
    if "[More Information Needed]" not in form.content:
        return
    card = ModelCard(card_of(config, name))
    card.data["tags"] = list(dict.fromkeys([*card.data["tags"], *(form.data.get("tags") or [])]))
    card.save(path)


def processor_of(config: HFViTConfig) -> HFViTImageProcessorPil | None:
    """Return the processor of the checkpoint that the model came from, at the model's size.

    A model that came from nowhere gets the original's preprocessing; one whose source has no processor at hand gets
    none, since a guess of mean and standard deviation would be wrong in silence.
    """
    if not config.name_or_path:
        return HFViTImageProcessorPil.from_preset("original", config.image_shape, num_channels=config.num_channels)
    try:
        processor = HFViTImageProcessorPil.from_pretrained(config.name_or_path, local_files_only=True)
    except OSError:
        return None
    processor.set_output_size(config.image_shape)
    return processor


def card_of(config: HFViTConfig, name: str) -> str:
    """Return a card that says what the config knows; measured figures are for whoever trained the model."""
    is_classifier = any(name.endswith("ForImageClassification") for name in config.architectures or ())
    height, width = config.image_shape
    patch_height, patch_width = config.patch_shape
    return CARD.format(
        task="image-classification" if is_classifier else "image-feature-extraction",
        name=json.dumps(name, ensure_ascii=False)[1:-1],  # between quotes, too, and on one line
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        height=height,
        width_px=width,
        patch_height=patch_height,
        patch_width=patch_width,
    )
