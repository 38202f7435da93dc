"""Commands that train: quickstart, train, recipes, study."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..training.recipe import TrainConfig, default_recipe, recipe_header, shipped_recipes
from .endings import echo, typed_command

Resume = Annotated[str, typer.Option(help="'auto' resumes the run in the output folder; 'never' discards it.")]


def quickstart(
    output_dir: Annotated[str, typer.Option(help="Folder for the model.")] = "hf-vit-digits",
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


def train(
    context: typer.Context,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Name of a recipe (see hf-vit recipes), or a YAML file. Default: finetune for a checkpoint, scratch "
            "for other models.",
            autocompletion=shipped_recipes,
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Folder with one subfolder per class, table, archive, parquet, webdataset shards, or a name on the "
            "Hub. May be repeated."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Checkpoint to fine-tune, or variant such as ViT-S/16 to train from scratch.")
    ] = None,
    output_dir: Annotated[str | None, typer.Option(help="Folder for the model. Default: the recipe's.")] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed. Default: the recipe's.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Number of steps, instead of a number of epochs.")] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    num_workers: Annotated[int | None, typer.Option(help="Worker processes that load images.")] = None,
    push_to_hub: Annotated[str | None, typer.Option(metavar="USER/NAME", help="Repository to push to.")] = None,
    resume: Resume = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Estimate the cost of the run, and write nothing.")
    ] = False,
    price_per_hour: Annotated[
        float | None, typer.Option(min=0, help="Price of all machines, per hour, for --dry-run.")
    ] = None,
) -> None:
    """Train by a recipe. The same command resumes an interrupted run exactly.

    Trains from scratch, from a checkpoint, or by masked patch prediction. Every field of a recipe is an option;
    fields of the architecture are --model-config.NAME. hf-vit recipes NAME explains all fields. What a recipe states
    as auto is chosen from the data, the model and the machine, and printed with the reason.

    Example: hf-vit train --data photos/ --model facebook/dinov2-small

    From scratch: hf-vit train --data photos/ --image-size 128 --batch-size 64 --model-config.hidden-size 192

    Estimate of parameters, FLOPs, memory, time and price: hf-vit train ... --dry-run --price-per-hour 2.5
    """
    named: dict[str, Any] = dict(output_dir=output_dir, seed=seed, max_steps=max_steps, save_every=save_every)
    named |= dict(num_workers=num_workers, push_to_hub=push_to_hub, resume=resume)
    given = {name: value for name, value in named.items() if value is not None}
    if data:
        given["data"] = data if len(data) > 1 else data[0]
    if model is not None:
        given["model"] = None if model == "null" else model  # as in a recipe
    config = TrainConfig.from_recipe(recipe or default_recipe(given.get("model")), **given, **_fields(context.args))
    if dry_run:
        from ..training.rehearsal import describe, rehearse

        if (cost := rehearse(config)) is not None:
            echo("\n".join(describe(cost, price_per_hour)))
        return
    if price_per_hour is not None:
        raise ValueError("--price-per-hour needs --dry-run: add --dry-run, or remove the price.")
    from ..training.report import train_and_report

    train_and_report(config, typed_command(), echo)


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
        echo(f"{recipe:24} {recipe_header(recipe).splitlines()[0].removeprefix('# ')}")


def study(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Study to run.")] = None,
    data: Annotated[str | None, typer.Option(help="Labeled images, as for training. Default: CIFAR-10.")] = None,
    output_dir: Annotated[Path | None, typer.Option(help="Folder to write. Default: study-NAME.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs per variant. More can be added later.")] = 3,
    quick: Annotated[bool, typer.Option("--quick", help="Size for 2 CPU cores instead of a GPU.")] = False,
    recipe: Annotated[str | None, typer.Option(help="Recipe to vary, instead of the study's own.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Number of parallel runs. Default: automatic.")] = None,
) -> None:
    """Repeat an experiment of the paper over several seeds.

    Without NAME, lists the experiments. Otherwise writes the results, a figure, and a page with the findings. The same
    command resumes an interrupted study. Fields of the recipe are options, as for hf-vit train.

    Example: hf-vit study positions --quick --data CIFAR10 --epochs 2
    """
    from ..studies.catalogue import CATALOGUE, SIZES, load_study

    if name is None:
        for known, entry in CATALOGUE.items():
            echo(f"{known:16} {entry.title}. {entry.source}")
        return
    chosen = load_study(name)
    from ..studies.page import summary, write_page
    from ..studies.running import run_study

    given = {} if data is None else {"data": data}
    size = recipe or SIZES["quick" if quick else "full"]
    config = TrainConfig.from_recipe(size, **given, **_fields(context.args))
    folder = output_dir or Path(f"study-{name}")
    results = run_study(chosen, config, folder, seeds, typed_command(), jobs, echo)
    page = write_page(chosen, results, folder)
    echo("\n".join(["", *summary(chosen, results), "", f"Wrote the page {page}."]))


def _fields(arguments: list[str]) -> dict[str, Any]:
    """Read --field VALUE and --field=VALUE. Values are YAML; a boolean field needs no value."""
    import yaml

    fields: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        option, equals, value = rest.pop(0).partition("=")
        if not option.startswith("--"):
            raise ValueError(f"Unexpected {option!r}: set fields of the recipe by --field VALUE.")
        name = option.removeprefix("--").replace("-", "_")
        if not equals:
            value = "true" if not rest or rest[0].startswith("--") else rest.pop(0)
        try:
            fields[name] = yaml.safe_load(value)
        except yaml.YAMLError:  # for example a name with a bracket
            fields[name] = value
    return fields
