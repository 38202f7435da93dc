"""Write the model card of a saved model."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open

from ..model.configuration_hf_vit import PIPELINES, HFViTConfig, task_of
from ..system.disk import new_file
from ..system.machine import versions
from ..system.texts import markdown, nearest, visible, without_tokens
from .folder import weight_files

# What is needed to reproduce a result.
PROVENANCE = ("command", "hardware", "seeds")

SHORT_WAIT = 5  # seconds for the licence of a base model

# Identifiers of the Hub; "other" is for any other licence.
LICENSES = """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0
    etalab-2.0 eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0
    grok2-community h-research intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2
    llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openmdw-1.0 openrail openrail++ osl-3.0
    other pddl postgresql unknown unlicense wtfpl zlib
"""


def write_card(
    folder: str | Path,
    *,
    title: str | None = None,
    description: str = "",
    results: Mapping[str, float] | None = None,
    measured: Mapping[str, str] | None = None,
    dataset: str | None = None,
    dataset_id: str | None = None,
    split: str = "test",
    sections: Mapping[str, str] | None = None,
    images: Sequence[str] = (),
    license: str | None = None,
    base_model: str | None = None,
) -> Path:
    """Write the model card `folder/README.md`, replacing the one that `save_pretrained` wrote.

    Args:
        folder: Folder written by `save_pretrained`; architecture, labels and number of parameters are read from it.
        title: Heading; by default the folder's name.
        description: First paragraph, in Markdown.
        results: Metrics measured on this model, by their names on the Hub, such as `{"accuracy": 0.981}`.
        measured: How they were measured: at least `command`, `hardware` (see `machine`) and `seeds`. Versions are
            added.
        dataset: Name of the data set for readers; required for results.
        dataset_id: Name of the data set on the Hub, if it has one.
        split: Split that the results were measured on.
        sections: Further text in Markdown, by heading.
        images: Names of image files in the folder, shown at the end.
        license: The Hub's identifier of the licence of the weights, such as `license_of` a base model; the card states
            none if not given.
        base_model: Name on the Hub of the model that this one was fine-tuned from.

    Returns:
        The path of the card.

    Raises:
        ValueError: For results without their provenance, and for metadata that the Hub would reject.
    """
    folder = Path(folder)
    results, measured = dict(results or {}), dict(measured or {})
    _check_results(results, measured, dataset)
    if license is not None:
        check_license(license)
    _check_front_matter(dataset_id, base_model)
    if missing := [image for image in images if not (folder / image).is_file()]:
        raise ValueError(f"These images are not in {folder}: {', '.join(missing)}. Save them there first.")

    config = HFViTConfig.from_pretrained(folder)
    task = task_of(config)
    auto_class = PIPELINES[task][1]
    has_labels = auto_class != "AutoModel"
    title = title or folder.resolve().name
    data = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag=task,
        tags=["vision-transformer", "hf_vit"],
        datasets=[dataset_id] if dataset_id else None,
        base_model=base_model,
    )
    if results:
        data.metrics, data.model_name = list(results), title
        dataset_type = dataset_id or "custom"
        data.eval_results = [
            EvalResult(task, dataset_type, str(dataset), metric, value, dataset_split=split)
            for metric, value in results.items()
        ]
    card = ModelCard.from_template(
        data,
        template_str=(files(__package__) / "model_card_template.md").read_text(encoding="utf-8"),
        title=markdown(title),
        name=in_quotes(folder.resolve().name),
        description=description,
        config=config,
        is_rgb=config.num_channels in (1, 3),
        image_shape=config.image_shape,
        patch_shape=config.patch_shape,
        labels=[markdown(str(label)) for label in (config.id2label or {}).values()] if has_labels else [],
        auto_class=auto_class,
        parameters=sum(_parameters(folder)),
        results=results,
        measured={**measured, "versions": versions()},
        dataset=markdown(str(dataset)),
        split=markdown(split),
        sections=sections or {},
        images={markdown(image): quote(image) for image in images},
    )
    path = folder / "README.md"
    path.write_text(without_tokens(card.content) + "\n", encoding="utf-8")
    return path


def _check_results(results: Mapping[str, float], measured: Mapping[str, str], dataset: str | None) -> None:
    if not results:
        return
    if missing := [name for name in PROVENANCE if name not in measured]:
        raise ValueError(
            f"Results need their provenance: `measured` has {sorted(measured)} and lacks {missing}. Pass all of "
            f"{list(PROVENANCE)}, or leave the results out."
        )
    if dataset is None:
        raise ValueError("Results need the name of the data set that they were measured on: set `dataset`.")
    if broken := [metric for metric, value in results.items() if not math.isfinite(value)]:
        raise ValueError(f"Results must be finite numbers; these are not: {broken}. Check the run before pushing.")


def check_license(license: str) -> None:
    """Raise `ValueError` unless a licence is an identifier of the Hub."""
    if license in LICENSES.split():
        return
    near = nearest(license.lower(), LICENSES.split()) or "apache-2.0"
    raise ValueError(
        f"license must be an identifier of the Hub such as {near!r}, got {license!r}; "
        "use 'other' for any other licence."
    )


def state_license(card: Path, license: str) -> None:
    """Write a licence into the metadata of a model card.

    Raises:
        ValueError: If it is not an identifier of the Hub.
    """
    check_license(license)
    stated = ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    stated.data["license"] = license
    card.write_text(str(stated), encoding="utf-8")


def license_of(model: str | None) -> str | None:
    """Return the licence of a model, if its card states one that is an identifier of the Hub.

    Args:
        model: A folder or a file, with the card beside it; or a name on the Hub, whose card is in the cache or is
            downloaded.
    """
    if model is None:
        return None
    path = Path(model)
    try:
        if path.exists():
            card = (path if path.is_dir() else path.parent) / "README.md"
        else:
            card = Path(hf_hub_download(model, "README.md", etag_timeout=SHORT_WAIT))
        stated = ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.get("license")
    except Exception:  # without a card, a network or a valid name: nothing is known, and a run must not fail for it
        return None
    return stated if isinstance(stated, str) and stated in LICENSES.split() else None


def set_section(card: Path, heading: str, text: str) -> None:
    """Replace a section of a model card, or add it before the citation or at the end.

    Args:
        card: The file; nothing is written if it does not exist.
        heading: Heading of the section, in Markdown.
        text: The section, in Markdown.
    """
    if not card.is_file():
        return
    parts = re.split(r"^(?=## )", card.read_text(encoding="utf-8"), flags=re.MULTILINE)
    headings = [part.partition("\n")[0].removeprefix("## ").strip() for part in parts]
    section = f"## {heading}\n\n{without_tokens(text)}\n\n"
    if heading in headings[1:]:
        place = headings.index(heading, 1)
        parts[place] = section
    else:
        place = headings.index("Citation", 1) if "Citation" in headings[1:] else len(parts)
        parts[place - 1] = parts[place - 1].rstrip("\n") + "\n\n"
        parts.insert(place, section)
    with new_file(card, force=True) as unfinished:
        unfinished.write_text("".join(parts).rstrip("\n") + "\n", encoding="utf-8")


def _check_front_matter(dataset_id: str | None, base_model: str | None) -> None:
    # The Hub would reject the card only at the push, after the training.
    for field, name in {"dataset_id": dataset_id, "base_model": base_model}.items():
        try:
            if name is not None:
                validate_repo_id(name)
        except HFValidationError as error:
            raise ValueError(f"{field} must be a name on the Hub such as 'user/name', got {name!r}: {error}") from None


def _parameters(folder: Path) -> Iterator[int]:
    """Yield the number of elements of every tensor in the folder's weights."""
    for name in weight_files(folder):
        with safe_open(folder / name, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 -- not a dictionary
                yield math.prod(tensors.get_slice(key).get_shape())


def in_quotes(name: str) -> str:
    """Return a name escaped for double quotes in code."""
    return json.dumps(visible(name), ensure_ascii=False)[1:-1]
