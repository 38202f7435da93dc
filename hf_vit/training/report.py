"""From a recipe to a folder that people understand: train, draw figures, write the model card, push."""

import os
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from .. import inspection
from ..data.labelled import RECIPE
from ..hub.card import license_of, write_card
from ..hub.folder import copy_of_ours
from ..hub.upload import BackgroundPush
from ..inspection.drawing import save
from ..system.machine import machine
from ..system.texts import code, counted, fenced, hanging, markdown
from ..variants import is_from_scratch
from .loop import train
from .recipe import TrainConfig
from .run import METRICS, Run
from .views import VIEWS, Unlabelled, describe_data

LARGE = 100 << 20  # bytes of checkpoints that are worth a word

# An absolute path, or one that begins with ~, . or ..; its last part. Not the address of a page.
LOCAL_PATH = re.compile(r"(?<![\w:/.~-])(?:~|\.{1,2})?/(?:[^\s'\"=,:]*/)?([^\s'\"=,:/]+)/?")

WEIGHTED = {
    "balanced": "In the loss, classes have weights that are inverse to their numbers of images",
    "effective": "In the loss, classes have weights that are inverse to their effective numbers of images",
}


def train_and_report(config: TrainConfig, command: str, say: Callable[[str], None]) -> Run:
    """Train, write figures and the model card, and push during and after training if the recipe names a repository.

    Args:
        config: The recipe.
        command: The command that the user typed, for the model card.
        say: Prints a line.
    """
    hub = None
    if config.push_to_hub is not None and os.environ.get("RANK", "0") == "0":
        hub = BackgroundPush(config.push_to_hub, config.private, tqdm.external_write_mode()(say))

    license = None if hub is None else license_of_base(config.model)

    def publish(step: int, write_model: Callable[[Path], None]) -> None:
        def write(folder: Path) -> None:
            write_model(folder)
            write_card(
                folder,
                title=Path(config.output_dir).resolve().name,
                description=f"After {step:,} steps of a run that is still in progress.",
                sections={"Recipe": _recipe(config)},
                license=license,
                base_model=base_model_of(config),
            )

        if hub is not None:
            hub.submit(write, f"Step {step}")

    # All processes of a sharded model gather its weights, so `publish` does not depend on the rank.
    run = train(config, None if config.push_to_hub is None else publish)
    if not run.is_main_process:
        return run
    write_report(run, command)
    for line in summary(run):
        say(line)
    config, has_classes = run.config, run.task.needs_labels or hasattr(run.model, "classifier")
    say("\n".join(next_commands(run.output_dir, config.push_to_hub is not None, has_classes)))
    if hub is not None:
        skipped: list[str] = []
        hub.submit(lambda folder: skipped.extend(copy_of_ours(run.output_dir, folder)), "Trained model")
        if skipped:
            say(f"Not pushed, since a run does not write such files: {', '.join(skipped)}")
        if hub.finish(timeout=1800):  # a hanging connection must not keep a finished job on its GPUs
            say(f"Published at {hub.url}")
        else:
            say(f"Not published. Try again:  hf-vit push {run.output_dir} {config.push_to_hub}")
    return run


def summary(run: Run) -> list[str]:
    """Return the result of a run in two or three lines."""
    metrics, timing = run.metrics, run.timing
    result = view_of(run).headline.format(**metrics)
    steps, best = counted(metrics["steps"], "step"), metrics.get("best_step", metrics["steps"])
    which = "" if best == metrics["steps"] else f" for the model of step {best:,},"
    lines = [
        f"{result} on {metrics['eval_count']:,} evaluation images ({run.data.eval_split}){which} after {steps} in "
        f"{timing['seconds']:.0f} s ({timing['images_per_second']:,.0f} images/s)."
    ]
    if broken := metrics["broken_images"]:
        lines.append(f"{_unreadable(len(broken))}; metrics.json lists them.")
    figures = sorted(path.name for path in run.output_dir.glob("*.png"))
    files = ["model.safetensors", "README.md (model card)", METRICS, RECIPE, *figures]
    lines += hanging("", f"Wrote to {run.output_dir}: {', '.join(files)}.")
    size = sum(file.stat().st_size for file in run.checkpoints.folder.rglob("*") if file.is_file())
    if size > LARGE:
        folder = f"{run.checkpoints.folder} ({size / 2**20:,.0f} MiB)"
        lines += hanging("", f"{folder} is only needed to continue the training; otherwise you can delete it.")
    return lines


def next_commands(output_dir: Path, is_pushed: bool = False, is_classifier: bool = True) -> list[str]:
    """Return lines with commands that use the model in a folder."""
    folder = shlex.quote(str(output_dir))
    if not is_classifier:
        tuned = shlex.quote(f"{output_dir}-tuned")
        return ["Next:", f"  hf-vit train LABELED_IMAGES --model {folder} --output-dir {tuned}"]
    uses = [f"  hf-vit predict {folder} IMAGES", f"  hf-vit evaluate {folder} LABELED_IMAGES"]
    push = f"  hf-vit push {folder} YOUR_NAME/{shlex.quote(output_dir.resolve().name)}"
    return ["Next:", *uses, *([] if is_pushed else [push])]


def write_report(run: Run, command: str) -> None:
    """Write the figures and the model card of a finished run into its folder."""
    title, view = run.output_dir.resolve().name, view_of(run)
    figures = {
        "training.png": inspection.plot_training(
            run.log, f"{title}: {run.metrics['steps']:,} steps", run.metrics.get("best_step")
        ),
        **view.figures(run, title),
    }
    view.write_tables(run)
    if hasattr(run.model.base_model.embeddings.position_embeddings, "on_grid"):
        figures["positions.png"] = inspection.plot_position_similarity(
            inspection.position_similarity(run.model), f"{title}: similarity of position embeddings"
        )
    for name, figure in figures.items():
        save(figure, run.output_dir / name)
    (run.output_dir / RECIPE).write_text(for_others(run.config).to_yaml(), encoding="utf-8")
    processes = f", {run.metrics['processes']} processes" if run.metrics["processes"] > 1 else ""
    write_card(
        run.output_dir,
        title=title,
        description=_description(run),
        results={name: run.metrics[key] for key, name in view.results.items() if key in run.metrics},
        measured={
            "command": code(public_command(command)),
            "hardware": f"{machine()}{processes}, {run.metrics['precision']}",
            "time": f"{run.timing['seconds']:,.0f} s, {run.timing['images_per_second']:,.0f} images/s",
            "seeds": str(run.config.seed),
        },
        dataset=run.data.name,
        split=run.data.eval_split,
        sections=_sections(run, command),
        images=list(figures),
        license=license_of_base(run.config.model),
        base_model=base_model_of(run.config),
    )


def view_of(run: Run) -> Unlabelled:
    """Return the view on the results of a run."""
    return VIEWS[run.task.problem_type]


def _description(run: Run) -> str:
    metrics = run.metrics
    return (
        f"{view_of(run).kind} on {metrics['train_images']:,} images of {markdown(run.data.name)} for "
        f"{metrics['steps']:,} steps, and evaluated on {metrics['eval_count']:,} other images."
    )


def base_model_of(config: TrainConfig) -> str | None:
    """Return the Hub name of the model that was fine-tuned; a folder has none."""
    if is_from_scratch(config.model) or Path(str(config.model)).exists():
        return None
    return config.model if str(config.model).count("/") == 1 else None


def license_of_base(model: str | None) -> str | None:
    """Return the licence of the checkpoint that is fine-tuned, if its card states one."""
    return None if is_from_scratch(model) else license_of(str(model))


def fenced_command(command: str) -> str:
    """Return a command, or a call of this package, as a block of Markdown."""
    command = public_command(command)
    return fenced(command, "python" if command.startswith("hf_vit.") else "bash")


def _sections(run: Run, command: str) -> dict[str, str]:
    training = f"""{fenced_command(command)}

The same command resumes an interrupted run. `recipe.yaml` contains all fields: set its `data` and `output_dir`, then
run `hf-vit train --recipe recipe.yaml`.
{"".join(f"{chr(10)}- {line}" for line in _balance(run))}

{_recipe(run.config)}"""
    return {**view_of(run).sections(run), "Limitations": _limitations(run), "Training": training}


def _limitations(run: Run) -> str:
    """Return what the metrics do not promise, as a list in Markdown."""
    height, width = run.model.config.image_shape
    metrics, config = run.metrics, run.config
    lines = [
        f"The model was trained on {metrics['train_images']:,} images of {markdown(run.data.name)} at "
        f"{height}x{width} pixels. Expect other metrics on other images.",
        *view_of(run).limitations(run),
    ]
    if run.data.eval_split == "held out":
        lines.append(
            f"It was evaluated on a random {config.eval_fraction:.0%} of the same data (split_seed "
            f"{config.split_seed})."
        )
    if (metric := metrics.get("best_metric")) is not None:
        lines.append(
            f"It is the model of step {metrics['best_step']:,}, the best by {code(str(metric))} of all evaluations. "
            f"The metrics are of the images that chose it, so expect slightly lower ones on others."
        )
    if broken := metrics["broken_images"]:
        lines.append(f"{_unreadable(len(broken))}; `metrics.json` lists them.")
    return "\n".join(f"- {line}" for line in lines)


def _balance(run: Run) -> list[str]:
    """Return sentences on the training images, and on what the recipe does about classes of different size."""
    lines = [markdown(line) for line in describe_data(run.data)]
    if run.config.class_weights != "none":
        lines.append(f"{WEIGHTED[run.config.class_weights]} (`class_weights: {run.config.class_weights}`).")
    if run.config.sampling == "balanced":
        lines.append("Images were drawn so that every class came equally often (`sampling: balanced`).")
    return lines


def _unreadable(number: int) -> str:
    return f"{number:,} unreadable {'image was' if number == 1 else 'images were'} skipped"


def _recipe(config: TrainConfig) -> str:
    return f"<details><summary>All fields</summary>\n\n{fenced(for_others(config).to_yaml(), 'yaml')}\n\n</details>"


def public_command(command: str) -> str:
    """Return a command with the last parts of paths that state folders of this machine."""
    return LOCAL_PATH.sub(r"\1", command)


def public_paths(value: Any) -> Any:
    """Return a path, or a list of paths, without the folders of this machine."""
    if isinstance(value, list):
        return [public_paths(each) for each in value]
    return Path(value).name if value and Path(value).is_absolute() else value


def for_others(config: TrainConfig) -> TrainConfig:
    """Return a recipe that may be published: without absolute paths of this machine or its user's repository."""
    paths = {name: public_paths(getattr(config, name)) for name in ("data", "model", "output_dir", "teacher")}
    return replace(config, push_to_hub=None, teacher_cache=None, **paths)
