"""`train_heads`: from a file of heads and an encoder to one folder that answers for all of them."""

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...checkpoints.checkpoint import MULTI_TASK, Checkpoint, usual_size
from ...checkpoints.models import load_multi_task
from ...checkpoints.opening import open_checkpoint
from ...data.dense import stop_cropping
from ...inference.optimize import inference_precision
from ...system.locking import alone_in
from ...system.stopping import StopSignals
from ...system.texts import counted, hanging, shortened
from ...variants import is_from_scratch
from ..fitting.fit import quiet_about_the_new_head
from ..fitting.state import FIT, FitState, check_fit_folder, stable
from ..run import save_model
from ..trained import TrainedModel, call_of
from ..views import describe_data
from .features import Features
from .fits import FITS, TrainedHead
from .plans import HeadPlan, read_plans
from .report import headline, next_commands, write_heads


def train_heads(
    heads: str | Path,
    *,
    model: str,
    output_dir: str | Path,
    data: str | list[str] | None = None,
    image_size: int | tuple[int, int] | None = None,
    seed: int = 0,
    resume: str = "auto",
    cache: str | Path | None = None,
    command: str | None = None,
    say: Callable[[str], None] = print,
) -> TrainedModel:
    """Train heads on one frozen encoder, and write them as one model.

    Every image passes once through the encoder, and the heads are trained on its features one after another. An
    interrupted call continues with the head that it was at. Heads that `model` has already stay as they are.

    Args:
        heads: A YAML file that maps names of heads to their task, data and options; see `plans`.
        model: Encoder: a file, a folder or a name on the Hub, or a multi-task model to add heads to.
        output_dir: Folder to write.
        data: Data of heads that state none.
        image_size: Pixels, or (height, width); by default that of the checkpoint's image processor.
        seed: Random seed.
        resume: `"auto"`, or `"never"` to train heads again that an earlier call has finished.
        cache: Folder of cached features; below that of Hugging Face by default.
        command: The command that repeats this, for the model card.
        say: Prints a line.

    Raises:
        Interrupted: If SIGINT, SIGTERM or SIGHUP came; the same call continues.
        ValueError: If the heads, the data or the folder do not allow the training.
    """
    began, output_dir = time.perf_counter(), Path(output_dir)
    plans = read_plans(heads, data)
    checkpoint = _opened(model)
    known = _known_heads(checkpoint, model, image_size, plans)
    sources = [str(source) for plan in plans for source in _listed(plan.recipe.data)]
    check_fit_folder(output_dir, model, sources)
    if resume == "never":
        shutil.rmtree(output_dir / FIT, ignore_errors=True)
    at_once = f": finished heads are saved in {output_dir / FIT}, and features in their cache."
    with alone_in(output_dir, say), StopSignals(at_once):
        size = (image_size,) * 2 if isinstance(image_size, int) else image_size or usual_size(checkpoint)
        state = FitState(output_dir / FIT, stable({"model": model, "image_size": size, "seed": seed}), began)
        features = Features(model, size, plans, None if cache is None else Path(cache), say)
        trained = {plan.name: _trained(plan, features, state, seed, say) for plan in plans}
        stated = {"heads": str(heads), "model": model, "output_dir": str(output_dir), "seed": seed}
        facts = {"model": model, "image_size": list(size), "seed": seed}
        facts |= {"precision": inference_precision("auto"), "command": command or call_of("train_heads", stated)}
        say(f"Writing the model with {len(known) + len(plans)} heads, and its card.")
        _write(model, trained, output_dir, size)
        rows = {plan.name: state["heads"][plan.name] for plan in plans}
        write_heads(output_dir, rows, known, facts, round(state.seconds, 1))
        for line in next_commands(output_dir, {**known, **{plan.name: plan.task for plan in plans}}):
            say(line)
    return TrainedModel(output_dir)


def _listed(data: str | Sequence[str]) -> list[str]:
    return [data] if isinstance(data, str) else list(data)


def _opened(model: str) -> Checkpoint:
    """Open the checkpoint; raise `ValueError` if the model has no weights."""
    if is_from_scratch(model):
        raise ValueError(
            f"Heads are trained on a frozen encoder, and {model} is a variant without weights: choose a checkpoint, "
            "such as facebook/dinov2-small."
        )
    return open_checkpoint(model)


def _known_heads(checkpoint: Checkpoint, model: str, image_size: Any, plans: list[HeadPlan]) -> dict[str, str]:
    """Return the tasks of the heads that a model has already; raise `ValueError` if a new one has the same name."""
    known = (checkpoint.config.task_heads or {}) if checkpoint.architecture == MULTI_TASK else {}
    if twice := [plan.name for plan in plans if plan.name in known]:
        same = f"{counted(len(twice), 'head')} of the same name ({shortened(twice)})"
        raise ValueError(f"{model} already has {same}: choose other names in the file of heads.")
    if known and image_size is not None:
        raise ValueError(f"The heads of {model} were trained at its image size: do not pass an image size.")
    return {name: head["task"] for name, head in known.items()}


def _trained(
    plan: HeadPlan, features: Features, state: FitState, seed: int, say: Callable[[str], None]
) -> TrainedHead:
    """Train a head, or read it if an earlier call has finished it."""
    done, stated = state.values.get("heads", {}).get(plan.name), stable(plan.stated)
    weights = state.tensors(f"head-{plan.name}")
    if done is not None and weights is not None and done["plan"] == stated:
        say("\n".join(hanging(f"{plan.name}: ", f"finished before. {headline(done)}")))
        return TrainedHead(done["fields"], weights, done["metrics"], done["facts"])
    say("\n".join(hanging(f"{plan.name}: ", f"{plan.task} on {shortened(_listed(plan.recipe.data))}.")))
    found = features.of(plan)
    for line in [*found.data.notes, *describe_data(found.data)]:
        say("\n".join(hanging("  ", line)))
    began = time.perf_counter()
    head = FITS[plan.task](plan, found, seed)
    row = {
        "plan": stated,
        "fields": stable(head.fields),
        "metrics": head.metrics,
        "facts": head.facts,
        "data": found.data.name,
        "eval_split": found.data.eval_split,
        "train_images": len(found.train.rows),
        "eval_count": len(found.evaluation.rows),
        "seconds": round(time.perf_counter() - began, 1),
    }
    state.put_tensors(f"head-{plan.name}", head.weights)
    state.put(heads={**state.values.get("heads", {}), plan.name: row})
    say("\n".join(hanging("  ", f"{headline(row)} Trained in {row['seconds']:.0f} s.")))
    return head


@torch.no_grad()
def _write(source: str, trained: dict[str, TrainedHead], output_dir: Path, image_size: tuple[int, int]) -> None:
    """Write the encoder with its old and new heads."""
    fields = {name: head.fields for name, head in trained.items()}
    with quiet_about_the_new_head():
        model, processor = load_multi_task(source, fields, image_size=image_size)
    stop_cropping(processor)
    encoder: Any = model.vit
    of_encoder: dict[str, Tensor] = encoder.pooler.state_dict()
    for name, head in trained.items():
        module: Any = model.heads[name]
        own = {part: tensor for part, tensor in module.state_dict().items() if part.startswith("pooler.")}
        own = {part: of_encoder[part.removeprefix("pooler.")] for part in own}
        module.load_state_dict({**own, **head.weights})
    save_model(model, model.state_dict(), processor, output_dir)
