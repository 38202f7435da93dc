"""Write a model in the layout of another library: transformers' ViT, timm, or the npz of the paper's code.

Each layout is a `Target`. Features that it does not support are listed in one error before anything is written.
Whatever it loses outside of the architecture is returned as sentences. Graphs for other runtimes are in
`hf_vit.graphs`.
"""

from pathlib import Path

from ..model.configuration_hf_vit import HFViTConfig
from ..model.validation_hf_vit import OF_CERTAINTY
from ..system.texts import shortened
from .checkpoint import CLASSIFIER, Checkpoint
from .families import google_out, timm_out, transformers_out
from .layouts import rules_of
from .opening import open_checkpoint
from .writing import Target, differing

TARGETS = {"transformers": transformers_out.TARGET, "timm": timm_out.TARGET, "npz": google_out.TARGET}

# Fields that matter only in training, or to another model class.
OUTSIDE_ARCHITECTURE = (
    *("drop_path_rate", "patch_dropout_prob", "hidden_dropout_prob", "attention_probs_dropout_prob"),
    *("initializer_range", "zero_init_head", "problem_type", "mim_objective", "out_features", "apply_layernorm"),
    *("reshape_hidden_states", "decoder_hidden_size", "decoder_num_hidden_layers", "decoder_num_attention_heads"),
)


def export_checkpoint(source: str | Path, out: str | Path, to: str, force: bool = False) -> list[str]:
    """Write a model, from a checkpoint of any known family, in another library's layout.

    Args:
        source: A file, a folder, or a name on the Hub.
        out: The folder to write; for npz, the file.
        to: A key of `TARGETS`.
        force: Whether to replace an existing folder or file.

    Returns:
        Sentences about assumptions, and about what the layout loses outside of the architecture.

    Raises:
        ValueError: If the layout does not support a feature of the model; lists all of them.
    """
    if to not in TARGETS:
        raise ValueError(f"Unknown layout {to!r}: choose one of {', '.join(TARGETS)}.")
    checkpoint, target = open_checkpoint(source), TARGETS[to]
    folded = checkpoint.fold_head()
    if unsupported := _unsupported(checkpoint, target):
        raise ValueError(f"{checkpoint.source.name} does not fit into {to}: {'; '.join(unsupported)}.")
    rules = rules_of(target.table(checkpoint), checkpoint.config, checkpoint.shapes)
    target.write(checkpoint, rules, Path(out), force)
    sentences = _lost(checkpoint, target)
    if folded:
        sentences.append(f"Folded into the weights of the head, so that the logits are the same: {', '.join(folded)}.")
    return sentences


def no_certainty(config: HFViTConfig) -> list[str]:
    """Return a sentence that the other library has no thresholds of certainty, if the config has any."""
    names = [name for name in OF_CERTAINTY if getattr(config, name) is not None]
    if not names:
        return []
    return [f"{', '.join(names)} are not written: in the other library, every image is answered with one label."]


def _unsupported(checkpoint: Checkpoint, target: Target) -> list[str]:
    config = checkpoint.config
    features = differing(config, target.required)
    if checkpoint.architecture not in target.architectures:
        features.insert(0, f"{checkpoint.architecture} (only {' or '.join(target.architectures)})")
    if config.head_width * config.num_attention_heads != config.hidden_size:
        features.append(f"head_dim={config.head_dim} (only hidden_size / num_attention_heads)")
    return features + target.unsupported(checkpoint)


def _lost(checkpoint: Checkpoint, target: Target) -> list[str]:
    """Describe the assumptions, and what the layout loses without changing the model's outputs at its own size."""
    config = checkpoint.config
    default = HFViTConfig(num_hidden_layers=config.num_hidden_layers)  # out_features depend on the depth
    sentences = [f"Assumed: {sentence}" for sentence in checkpoint.assumed]
    for name in OUTSIDE_ARCHITECTURE:
        if name not in target.carries and getattr(config, name) != getattr(default, name):
            value = getattr(config, name)
            sentences.append(f"{name}={value!r} is not written; it does not change the trained model.")
    has_table = config.position_embedding_type in ("learned", "relative")
    if has_table and config.position_interpolation not in target.carries:
        sentences.append(
            f"The other library resamples positions by its own rule, not by {config.position_interpolation}."
        )
    if config.thresholds is not None:
        sentences.append("thresholds are not written: the other library has no thresholds per label.")
    sentences += no_certainty(config)
    if "labels" not in target.carries and checkpoint.architecture == CLASSIFIER:
        sentences.append("The labels are not written: the layout does not store them.")
    if "processor" not in target.carries:
        sentences.append("The image processor is not written: the layout does not store it.")
    if checkpoint.left_out:
        sentences.append(f"Left out: {shortened([repr(name) for name in checkpoint.left_out])}")
    return sentences + target.notes(checkpoint)
