"""`from_pretrained` of our models on other libraries' checkpoints: a folder, a file, or a name on the Hub."""

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.utils import cached_file

from ..model.configuration_hf_vit import HFViTConfig
from ..model.image_processing_pil_hf_vit import HFViTImageProcessorPil
from . import open_checkpoint
from .checkpoint import CLASSIFIER, ENCODER
from .files import read_json, read_weights

OF_ALL_CONFIGS = ("num_labels", "id2label", "label2id", "problem_type", "output_attentions", "output_hidden_states")
OTHER_WEIGHTS = {"variant", "gguf_file", "use_safetensors"}
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def read_foreign(
    name: str, class_name: str, options: dict[str, Any]
) -> tuple[HFViTConfig, dict[str, Tensor], HFViTImageProcessorPil, dict[str, Any]] | None:
    """Read a checkpoint that is of another library, for a class of ours.

    Args:
        name: As given to `from_pretrained`.
        class_name: Of the model that will be filled.
        options: Keywords of `from_pretrained`; fields of the config among them win.

    Returns:
        Config, state dict, processor and the keywords that are left, or `None` if it is ours, or for transformers to
        refuse.
    """
    hub = {option: options[option] for option in HUB_OPTIONS if options.get(option) is not None}
    if not Path(name).is_file():
        found = cached_file(name, "config.json", _raise_exceptions_for_missing_entries=False, **hub)
        if found is None:
            return None
        if read_json(Path(found)).get("model_type") == HFViTConfig.model_type:
            if Path(name).is_dir() and not OTHER_WEIGHTS.intersection(options):
                read_weights(name, hub)  # refuses what transformers would not, or not by the name of the file
            return None
    checkpoint = open_checkpoint(name, **hub)
    rest = {option: value for option, value in options.items() if option not in hub}
    config = rest.pop("config", None)
    if not isinstance(config, HFViTConfig):
        fields = checkpoint.config.to_dict()
        labels = rest.get("num_labels") or len(rest.get("id2label") or checkpoint.config.id2label or ())
        is_new_head = checkpoint.architecture == ENCODER or labels != checkpoint.config.num_labels
        if class_name == CLASSIFIER and is_new_head:
            fields["representation_size"] = None  # pre-logits belong to the head of the pre-training
        changed = {*HFViTConfig.__annotations__, "out_features", "out_indices", *OF_ALL_CONFIGS}.intersection(rest)
        config = HFViTConfig.from_dict(fields, **{option: rest.pop(option) for option in changed})
    config.dtype = checkpoint.dtype
    processor = checkpoint.processor()
    processor.set_output_size(config.image_shape)
    return config, checkpoint.state_dict(), processor, rest
