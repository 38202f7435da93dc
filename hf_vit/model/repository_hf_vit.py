"""Saving and loading of a self-contained repository: weights, config, code, image processor and model card.

A folder saved by any model of this package works in `AutoModel`, `AutoImageProcessor` and `pipeline`, with the
package installed or with `trust_remote_code=True`.
"""

import json
import shutil
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from huggingface_hub import ModelCard
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import logging

from .configuration_hf_vit import CLASSES, HFViTConfig, task_of
from .image_processing_pil_hf_vit import HFViTImageProcessorPil

if TYPE_CHECKING:  # never executed: transformers copies the files that relative imports name, and needs these too
    from .dense_hf_vit import HFViTBackbone  # noqa: F401
    from .detection_hf_vit import HFViTForObjectDetection  # noqa: F401
    from .multi_task_hf_vit import HFViTForMultiTask  # noqa: F401
    from .pipeline_hf_vit import HFViTImageClassificationPipeline  # noqa: F401
    from .segmentation_hf_vit import HFViTForSemanticSegmentation  # noqa: F401

logger = logging.get_logger(__name__)

PUSH_OPTIONS = ("commit_message", "private", "token", "revision", "create_pr", "max_shard_size")
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

The code in this repository is a copy of the package `hf-vit`. With the package installed, `import hf_vit` replaces
`trust_remote_code=True`.
"""


class HFViTRepositoryMixin:
    """Save and load self-contained repositories; mixed into `HFViTPreTrainedModel`."""

    # Reads checkpoints of other libraries. Set by the installed package, since its reader is not copied to the Hub.
    checkpoint_reader: Callable | None = None
    _image_processor: HFViTImageProcessorPil | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Self:
        """Load a model as `PreTrainedModel` does; with the package installed, also from other libraries' checkpoints.

        If `image_size` is given, positions are resampled. All arguments are those of `PreTrainedModel`; for other
        libraries' checkpoints also those of `hf_vit.checkpoints.Options`, where `num_heads` is `num_attention_heads`.
        """
        parent: Any = super()
        name, read = pretrained_model_name_or_path, cls.checkpoint_reader
        if read is not None and name is not None:
            warn_of_other_code(Path(name))
        if read is not None and name is not None and kwargs.get("state_dict") is None:
            converted = read(str(name), cls.__name__, kwargs)
            if converted is not None:
                config, state_dict, processor, kwargs = converted
                result = parent.from_pretrained(None, *model_args, config=config, state_dict=state_dict, **kwargs)
                model = result[0] if isinstance(result, tuple) else result
                model.config.name_or_path = model.name_or_path = str(name)
                model._image_processor = processor  # saved with the model
                return result
        return parent.from_pretrained(name, *model_args, **kwargs)

    def save_pretrained(
        self,
        save_directory: str | PathLike,
        is_main_process: bool = True,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Save a self-contained folder: weights, config, image processors, code and model card.

        Weights keep the names of the modules in memory, so that `load_state_dict` reads them. An image processor or a
        model card that exists in the folder is not overwritten. Arguments are those of `PreTrainedModel`.
        """
        model: Any = self
        parent: Any = super()
        kwargs.setdefault("save_original_format", False)
        outputs = getattr(getattr(model, "classifier", None), "out_features", None)
        if outputs not in (None, model.config.num_labels):
            raise ValueError(
                f"The config names {model.config.num_labels} labels, but the classifier has {outputs} outputs: set "
                "config.id2label to the names of all outputs. A model saved like this could not be loaded."
            )
        parent.save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if model.should_save_on_this_rank(is_main_process):
            remove_replaced_weights(Path(save_directory))
            complete_repository(save_directory, model.config, self._image_processor)
            if push_to_hub:
                options = {name: value for name, value in kwargs.items() if name in PUSH_OPTIONS}
                model.push_to_hub(repo_id or Path(save_directory).name, **options)

    @classmethod
    def is_remote_code(cls) -> bool:
        """Return False. Otherwise transformers copies the code of the class's module, but FSDP replaces the class."""
        return False

    def _upload_modified_files(self, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        parent: Any = super()
        # On a push, transformers replaces our model card by its empty template.
        replace_card_template(working_dir, self.config, repo_id)  # type: ignore[attr-defined]
        return parent._upload_modified_files(working_dir, repo_id, *args, **kwargs)


def complete_repository(
    folder: str | PathLike, config: HFViTConfig, processor: HFViTImageProcessorPil | None = None
) -> None:
    """Write the code into `folder`, and the image processor and the model card if they are missing.

    The code consists of the files that `auto_map` names and the files that these import by relative imports. Without
    `processor`, the processor of the checkpoint that the model was loaded from is saved.
    """
    folder = Path(folder)
    entries = {str(Path(__file__).with_name(f"{reference.split('.')[0]}.py")) for reference in CLASSES.values()}
    code = entries.union(*map(get_relative_import_files, entries))
    if replaced := other_code(folder):
        logger.warning(f"Replaced {', '.join(replaced)} in {folder}, which differed from the code of this model.")
    for file in code:
        shutil.copyfile(file, folder / Path(file).name)
    for weights in folder.glob("*.safetensors"):  # safetensors 0.8 makes them readable by the owner only
        shutil.copymode(folder / "config.json", weights)
    if not (folder / "preprocessor_config.json").exists():
        processor = processor or processor_of(config)
        if processor is not None:
            processor.save_pretrained(folder)
    card = folder / "README.md"
    if not card.exists():
        card.write_text(card_of(config, folder.resolve().name), encoding="utf-8")


def other_code(folder: Path) -> list[str]:
    """Return the names of code files in a folder that differ from the files of the same names next to this file."""
    ours = (file for file in Path(__file__).parent.glob("*_hf_vit.py") if (folder / file.name).is_file())
    return sorted(file.name for file in ours if file.read_bytes() != (folder / file.name).read_bytes())


def warn_of_other_code(folder: Path) -> None:
    """Warn, once per folder, that the code in a folder is not used: transformers prefers registered classes."""
    if names := other_code(folder):
        logger.warning_once(
            f"{folder} has its own {', '.join(names)}, which differ from the installed hf-vit. The installed code is "
            "used, whatever trust_remote_code says. To use the folder's, load it in a process without `import hf_vit`."
        )


def remove_replaced_weights(folder: Path) -> None:
    """Remove weights of an earlier save: a single file next to new shards, or the index of shards next to a new file.

    transformers removes old shards, but prefers a single file to an index, so it would load the old weights.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not (single.is_file() and index.is_file()):
        return
    shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    old = single if all((folder / shard).is_file() for shard in shards) else index
    old.unlink()


def processor_of(config: HFViTConfig) -> HFViTImageProcessorPil | None:
    """Return the image processor of the checkpoint that a model was loaded from, at the model's image size.

    A new model gets the preprocessing of the paper's code. If the checkpoint has no processor on this machine, return
    `None`: a guessed mean and standard deviation could be silently wrong.
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
    """Return a model card with the facts of the config; metrics are added by the code that measured them."""
    height, width = config.image_shape
    patch_height, patch_width = config.patch_shape
    return CARD.format(
        task=task_of(config),
        name=json.dumps(name, ensure_ascii=False)[1:-1],  # escaped, since it is also part of a Python string
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        height=height,
        width_px=width,
        patch_height=patch_height,
        patch_width=patch_width,
    )


def replace_card_template(folder: str | PathLike, config: HFViTConfig, name: str) -> None:
    """Replace the empty model card template of transformers by our model card, and keep its tags."""
    path = Path(folder) / "README.md"
    template = ModelCard.load(path)
    if "[More Information Needed]" not in template.content:
        return
    card = ModelCard(card_of(config, name))
    card.data["tags"] = list(dict.fromkeys([*card.data["tags"], *(template.data.get("tags") or [])]))
    card.save(path)
