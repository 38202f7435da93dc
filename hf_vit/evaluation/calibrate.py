"""Fit temperature and thresholds to held-out images, and write them into the folder of a model."""

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from ..data.classes import SINGLE
from ..data.labelled import ImageData
from ..hub.card import set_section
from ..model.configuration_hf_vit import HFViTConfig
from ..model.losses_hf_vit import activation_of
from ..model.repository_hf_vit import complete_repository
from ..model.validation_hf_vit import OF_CERTAINTY
from ..system.disk import new_file, writing
from ..system.texts import counted, markdown
from .calibration import fit_temperature
from .certainty import DOUBT, CalibrationPlan, fit_certainty, measure_certainty
from .metrics import results_of

CONFIG = "config.json"
HEADING = "Unknown images"
SAME_KIND = (
    "This holds for images of the same kind. It does not reliably detect out-of-distribution images, which can "
    "also get a high probability."
)


def check_model(source: str, config: HFViTConfig, has_own_size: bool, plan: CalibrationPlan | None) -> None:
    """Raise `ValueError` if a calibration is planned that a model or its folder does not allow.

    Args:
        source: As for `evaluate_checkpoint`.
        config: Config of the classifier.
        has_own_size: Whether images have the size that the model states.
    """
    if plan is None:
        return
    folder = Path(source)
    if not (folder / CONFIG).is_file() or _read(folder).get("model_type") != HFViTConfig.model_type:
        raise ValueError(
            f"--calibrate writes thresholds into a model folder of this package, and {source} is not one: make one "
            f"with hf-vit convert {source} FOLDER, and calibrate that folder."
        )
    if not (os.access(folder, os.W_OK) and os.access(folder / CONFIG, os.W_OK)):
        raise ValueError(f"{source} is read-only, and --calibrate writes into it: calibrate a copy of the folder.")
    if activation_of(config) != "softmax" or len(config.id2label or ()) < 2:
        raise ValueError(
            "--calibrate needs a classifier with one of several labels per image: remove the option. With several "
            "labels per image, the thresholds of the labels already allow an answer without labels."
        )
    if not has_own_size:
        raise ValueError(
            "--calibrate calibrates the model at its own image size, and --image-size changes its probabilities: "
            "remove one of them."
        )


def check_images(classes: list[int] | None, data: ImageData, plan: CalibrationPlan) -> None:
    """Raise `ValueError` if the evaluation split cannot be calibrated on.

    Args:
        classes: Indices of the classes of the data in the model, if they are known to it.
    """
    if classes is None or data.problem_type != SINGLE:
        raise ValueError("--calibrate needs images with labels of the model, one for each: remove the option.")
    if data.is_seen:
        raise ValueError(
            "--calibrate needs images that the model was not trained on, and it was trained on some or all of these: "
            "choose another --split, or other data."
        )
    plan.check(round(plan.share * len(data.evaluation)))


def calibrate(
    logits: Tensor, labels: Tensor, config: HFViTConfig, plan: CalibrationPlan, label_names: list[str]
) -> dict[str, Any]:
    """Fit temperature and thresholds to a part of the images, and measure them on the others.

    Args:
        logits: `[N, num_labels]`, at the temperature of `config`.
        labels: Class indices, `[N]`.

    Returns:
        `fields` of the config; the number of `images` that they were fitted to, `max_error` as in the plan; and
        `measured`, the result of `measure_certainty` with the `calibration_error` before and after, or `None` if all
        images were fitted to.

    Raises:
        ValueError: As for `fit_certainty`.
    """
    fitted, rest = plan.divide(len(labels))
    plan.check(len(fitted))
    unscaled = logits * config.temperature
    temperature = fit_temperature(unscaled[fitted], labels[fitted])
    scaled = unscaled / temperature
    fields = {"temperature": temperature, **fit_certainty(scaled[fitted], labels[fitted], plan)}
    measured = None
    if len(rest):
        errors = [
            results_of(each[rest], labels[rest], config).metrics()["calibration_error"] for each in (logits, scaled)
        ]
        measured = measure_certainty(scaled[rest], labels[rest], fields, len(fitted), label_names)
        measured["calibration_error"] = dict(zip(("before", "after"), errors, strict=True))
    return {"fields": fields, "images": len(fitted), "max_error": plan.max_error, "measured": measured}


def write_calibration(folder: Path, found: dict[str, Any], where: str, head: str | None = None) -> None:
    """Write the result of `calibrate` into the config of a model, and a section into its card.

    The code in the folder is brought up to date, so that it knows the thresholds without the package, too.

    Args:
        where: Images that were calibrated on, for the card.
        head: Head of a multi-task model.

    Raises:
        OSError: If a file cannot be written; the old config is intact then.
    """
    stored = _read(folder)
    of_head = stored if head is None else stored["task_heads"][head]
    of_head.update(found["fields"])
    for name in OF_CERTAINTY:
        if of_head[name] is None:
            del of_head[name]
    config = HFViTConfig.from_dict(stored)
    with writing("the thresholds; the old config is intact", folder / CONFIG):
        complete_repository(folder, config)
        with new_file(folder / CONFIG, force=True) as unfinished:
            unfinished.write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        heading = HEADING if head is None else f"{HEADING}: {markdown(head)}"
        set_section(folder / "README.md", heading, card_section(found, where))


def _read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text(encoding="utf-8"))


def sentences(found: dict[str, Any]) -> list[str]:
    """Return the result of `calibrate` in sentences."""
    fields, measured = found["fields"], found["measured"]
    said = [f"The temperature is {fields['temperature']:.3g}."]
    if measured is not None and "calibration_error" in measured:
        said[0] += " With it, the calibration error changes from {before:.1%} to {after:.1%}.".format_map(
            measured["calibration_error"]
        )
    if fields["label_set_threshold"] is not None:
        said.append(_of_label_sets(fields, measured))
    if fields["abstention_threshold"] is not None:
        said.append(_of_abstention(fields, found["max_error"], measured))
    return said


def _percent(share: float) -> str:
    return f"{100 * share:.6g}%"


def _of_label_sets(fields: dict[str, Any], measured: dict[str, Any] | None) -> str:
    said = (
        f"Label sets have all labels with a probability of at least {fields['label_set_threshold']:.3g}, and the "
        f"most likely one. At least {_percent(fields['label_set_coverage'])} of them are expected to contain the "
        "true label."
    )
    if measured is None:
        return said
    found = measured["label_set"]
    said += (
        f" Measured: {found['coverage']:.1%}, with {found['mean_size']:.2f} labels on average (95% of such "
        f"measurements lie between {found['low']:.1%} and {found['high']:.1%})."
    )
    if (lowest := found["lowest"]) is not None:
        said += f" The lowest coverage is that of {lowest['label']}, {lowest['coverage']:.1%}."
    if measured["risk_coverage"][0]["accuracy"] >= fields["label_set_coverage"]:
        said += " The most likely label alone is right that often: only a higher coverage gives larger sets."
    return said


def _of_abstention(fields: dict[str, Any], max_error: float, measured: dict[str, Any] | None) -> str:
    said = (
        f"The answer is unknown if no label has a probability of at least {fields['abstention_threshold']:.3g}. With "
        f"{1 - DOUBT:.0%} confidence, at most {_percent(max_error)} of the other answers are wrong."
    )
    if measured is None:
        return said
    found = measured["abstention"]
    if found["error"] is None:
        return f"{said} Measured: no image is answered."
    return (
        f"{said} Measured: {found['answered']:.1%} of the images are answered, and {found['error']:.1%} of these "
        f"answers are wrong (95% interval {found['low']:.1%} to {found['high']:.1%})."
    )


def card_section(found: dict[str, Any], where: str) -> str:
    """Return the result of `calibrate` in Markdown."""
    measured = found["measured"]
    others = "" if measured is None else f", and measured on {counted(measured['images'], 'other image')}"
    lines = [f"Fitted to {counted(found['images'], 'image')} ({markdown(where)}){others}.", ""]
    lines += [f"- {markdown(sentence)}" for sentence in sentences(found)]
    if measured is not None:
        lines += ["", "| images answered | accuracy of the answers | minimum probability |", "|---|---|---|"]
        lines += [
            f"| {row['answered']:.0%} | {row['accuracy']:.1%} | {row['threshold']:.3f} |"
            for row in measured["risk_coverage"]
        ]
    return "\n".join([*lines, "", SAME_KIND])
