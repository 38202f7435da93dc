"""Commands that train: quickstart, train, recipes, study."""

import os
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from ..system.gpus import GPUS
from ..system.places import check_exist
from ..system.texts import hanging
from ..training.recipe import TrainConfig, default_recipe, recipe_header, shipped_recipes
from .endings import echo, read_size, typed_command
from .options import with_recipe_fields

# Options that train --heads has; all others are fields of a head.
OF_ALL_HEADS = ("data", "model", "output_dir", "image_size", "seed", "resume")
Resume = Annotated[str, typer.Option(help="'auto' resumes the run in the output folder; 'never' discards it.")]


def quickstart(
    output_dir: Annotated[str, typer.Option("--output-dir", "-o", help="Folder for the model.")] = "hf-vit-digits",
    seed: Annotated[int, typer.Option(help="Random seed. The evaluation split does not depend on it.")] = 0,
    resume: Resume = "auto",
) -> None:
    """Train, save and load a small ViT on handwritten digits.

    Needs no download and no GPU, and takes less than two minutes on two CPU cores. After Ctrl-C, the same command
    resumes the run.

    Example: hf-vit quickstart --output-dir digits --seed 1
    """
    from .quickstart import quickstart

    quickstart(output_dir, seed, resume, say=echo)


@with_recipe_fields()
def train(
    sources: Annotated[
        list[str] | None,
        typer.Argument(metavar="DATA", help="Labeled images: a folder with one subfolder per class, for example."),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Name of a recipe (see hf-vit recipes), or a YAML file. Default: finetune for a checkpoint, scratch "
            "for other models.",
            autocompletion=shipped_recipes,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Estimate the cost of the run, and write nothing.")
    ] = False,
    heads: Annotated[
        Path | None,
        typer.Option(metavar="FILE.yaml", help="File of heads to train on one frozen encoder, instead of a recipe."),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option("--for", metavar="GPU", help=f"GPU to estimate for, with --dry-run: {', '.join(GPUS)}."),
    ] = None,
    price_per_hour: Annotated[
        float | None, typer.Option(min=0, metavar="X", help="Price of all machines, per hour, for --dry-run.")
    ] = None,
    given: Any = None,
) -> None:
    """Train by a recipe. The same command resumes an interrupted run exactly.

    Trains from scratch, from a checkpoint, or by masked patch prediction. Every field of a recipe is an option.
    Fields that the recipe sets to auto are chosen from the data, the model and the machine, and printed with the
    reason. hf-vit recipes NAME prints a recipe with its defaults.

    Example: hf-vit train photos/ --model facebook/dinov2-small

    From scratch: hf-vit train photos/ --model ViT-Ti/16 --image-size 128

    Estimate of memory, time and price: hf-vit train photos/ --dry-run

    The same for a GPU that is not here: hf-vit train photos/ --dry-run --for h200

    Several heads on one encoder: hf-vit train photos/ --heads heads.yaml --model facebook/dinov2-small
    """
    if sources:
        named = given.get("data", [])
        data = [*sources, *([named] if isinstance(named, str) else named)]
        given["data"] = data if len(data) > 1 else data[0]
    if heads is not None:
        _train_heads(heads, given, {"--recipe": recipe, "--dry-run": dry_run, "--for": gpu})
        return
    recipe = recipe or default_recipe(given.get("model"))
    config = TrainConfig.from_recipe(recipe, **given)
    if not config.data:
        raise ValueError(
            "No data: give a folder of images with one subfolder per class, as in `hf-vit train photos/`. "
            "`hf-vit train --help` lists other sources."
        )
    check_exist([*([config.data] if isinstance(config.data, str) else config.data), config.model])
    if dry_run:
        from ..training.rehearsal import describe, rehearse

        if gpu is None:
            cost = rehearse(config)
        else:
            from ..training.estimate import estimate

            cost = estimate(config, gpu)
        if cost is not None:
            heading, *rows = describe(cost, price_per_hour)
            lines = [line for row in rows for line in hanging(row[:14], row[14:])]
            echo("\n".join([*hanging("", heading), *lines]))
        return
    for name, value in {"--price-per-hour": price_per_hour, "--for": gpu}.items():
        if value is not None:
            raise ValueError(f"{name} needs --dry-run: add --dry-run, or remove {name}.")
    from ..training.report import train_and_report

    if os.environ.get("RANK", "0") == "0":
        echo(f"Recipe  {recipe} (`hf-vit recipes {shlex.quote(recipe)}` explains its fields)")
    train_and_report(config, typed_command(), echo)


def _train_heads(heads: Path, given: dict[str, Any], others: dict[str, Any]) -> None:
    """Train several heads on one encoder; options other than the encoder's belong in the file of heads."""
    if wrong := [option for option, value in others.items() if value]:
        raise ValueError(f"--heads trains heads on features, and takes no {wrong[0]}: remove it.")
    if wrong := [f"--{name.replace('_', '-')}" for name in given if name not in OF_ALL_HEADS]:
        raise ValueError(f"With --heads, {wrong[0]} belongs to each head: state it in {heads}.")
    if "model" not in given:
        raise ValueError("--heads needs a trained encoder: add --model, such as --model facebook/dinov2-small.")
    data = given.get("data")
    check_exist([str(heads), *([data] if isinstance(data, str) else data or [])], given["model"])
    from ..training.multi_task.run import train_heads

    size = given.get("image_size")
    options = {name: given[name] for name in ("resume", "seed") if name in given}
    train_heads(
        heads,
        model=given["model"],
        output_dir=given.get("output_dir", "hf-vit-heads"),
        data=data,
        image_size=None if size is None else read_size("--image-size", str(size)),
        command=typed_command(),
        say=echo,
        **options,
    )


def recipes(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Recipe to print, or a YAML file.")] = None,
) -> None:
    """List the recipes, or print one with all its fields.

    Example: hf-vit recipes digits > mine.yaml && hf-vit train --recipe mine.yaml
    """
    if name is not None:
        echo(recipe_header(name) + TrainConfig.from_recipe(name).explain(), nl=False)
        return
    for recipe in shipped_recipes():
        echo(f"{recipe:22} {recipe_header(recipe).splitlines()[0].removeprefix('# ')}")


@with_recipe_fields(hidden=True)
def study(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Study to run.")] = None,
    data: Annotated[str | None, typer.Option(help="Labeled images, as for training. Default: CIFAR-10.")] = None,
    output_dir: Annotated[
        Path | None, typer.Option("--output-dir", "-o", help="Folder to write. Default: study-NAME.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs per variant. More can be added later.")] = 3,
    quick: Annotated[bool, typer.Option("--quick", help="Size for 2 CPU cores instead of a GPU.")] = False,
    recipe: Annotated[str | None, typer.Option(help="Recipe to vary, instead of the study's own.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Number of parallel runs. Default: automatic.")] = None,
    given: Any = None,
) -> None:
    """Repeat an experiment of the paper over several seeds.

    Without NAME, lists the experiments. Otherwise writes the results, a figure, and a page with the findings. The same
    command resumes an interrupted study. Fields of the recipe are options, as for hf-vit train.

    Example: hf-vit study positions --quick --data CIFAR10 --epochs 2
    """
    check_exist([data])
    from ..studies.catalogue import CATALOGUE, SIZES, load_study

    if name is None:
        for known, entry in CATALOGUE.items():
            echo("\n".join(hanging(f"{known:16} ", f"{entry.title}. {entry.source}")))
        return
    chosen = load_study(name)
    from ..studies.page import summary, write_page
    from ..studies.running import run_study

    given |= {} if data is None else {"data": data}
    size = recipe or SIZES["quick" if quick else "full"]
    config = TrainConfig.from_recipe(size, **given)
    folder = output_dir or Path(f"study-{name}")
    results = run_study(chosen, config, folder, seeds, typed_command(), jobs, echo)
    page = write_page(chosen, results, folder)
    echo("\n".join(["", *summary(chosen, results), "", f"Wrote the page {page}."]))
