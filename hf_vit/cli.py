"""The command `hf-vit`: parse, call one function, print. What is heavy is imported inside the commands."""

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="The Vision Transformer for Hugging Face: train, look at, and publish it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

OutputDir = Annotated[
    str | None, typer.Option(help="Folder for the model; checkpoints lie below it. The recipe's if not given.")
]
Seed = Annotated[int | None, typer.Option(help="Of all that is random in the run. The recipe's if not given.")]
Resume = Annotated[
    str, typer.Option(help="'auto' goes on with the run that the output folder holds; 'never' starts it anew.")
]


@app.command()
def quickstart(
    output_dir: Annotated[str, typer.Option(help="Folder for the model.")] = "hf-vit-digits",
    seed: Annotated[int, typer.Option(help="Of all that is random; the held-out digits stay the same.")] = 0,
    resume: Resume = "auto",
) -> None:
    """Train a small ViT on handwritten digits, save it, and load it back as a user would.

    Needs no download and no GPU; under two minutes on two CPU cores. Stop it with Ctrl-C and run it again: it goes on.
    """
    from .quickstart import quickstart

    with _clear_endings():
        quickstart(output_dir, seed, resume, say=typer.echo)


@app.command()
def train(
    data: Annotated[
        str | None,
        typer.Option(help="Folder of images (one subfolder a class), parquet file or folder, or a name on the Hub."),
    ] = None,
    recipe: Annotated[str, typer.Option(help="A recipe of the package, or a YAML file.")] = "flowers",
    output_dir: OutputDir = None,
    seed: Seed = None,
    max_steps: Annotated[int | None, typer.Option(help="Length of the run in steps, instead of its epochs.")] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    num_workers: Annotated[int | None, typer.Option(help="Processes that load images.")] = None,
    resume: Resume = "auto",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Any field of the recipe; may be given many times."),
    ] = None,
) -> None:
    """Train an image classifier by a recipe; the same command again resumes it, exactly.

    For example: hf-vit train --data photos/ --set image_size=128 --set model_config.hidden_size=192
    """
    from .report import write_report
    from .training import TrainConfig
    from .training import train as run_training

    with _clear_endings():
        named: dict[str, Any] = {
            "data": data,
            "output_dir": output_dir,
            "seed": seed,
            "max_steps": max_steps,
            "save_every": save_every,
            "num_workers": num_workers,
        }
        given = {name: value for name, value in named.items() if value is not None}
        config = TrainConfig.from_recipe(recipe, **{**given, "resume": resume, **_assignments(set_ or [])})
        run = run_training(config)
        if run.is_main_process:
            write_report(run, _command())
            metrics = run.metrics
            typer.echo(
                f"Accuracy {metrics['eval_accuracy']:.2%} on {metrics['eval_count']:,} held-out images "
                f"({run.data.eval_split}) after {metrics['steps']:,} steps in {metrics['seconds']:.0f} s."
            )
            typer.echo(f"The model, its card and its pictures are in {run.output_dir}.")
            typer.echo(f"Publish it:  hf-vit push {run.output_dir} YOUR_NAME/{run.output_dir.resolve().name}")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="A model's folder, as training or save_pretrained wrote it.")],
    repo_id: Annotated[str, typer.Argument(help="Where to: USER/NAME on the Hub; made if need be.")],
    private: Annotated[bool, typer.Option(help="Whether a new repository is private.")] = False,
) -> None:
    """Publish a model's folder on the Hub: weights, config, processors, code, card and pictures."""
    from .hub import push

    with _clear_endings():
        typer.echo(f"Published at {push(folder, repo_id, private=private)}")


def _assignments(pairs: list[str]) -> dict[str, Any]:
    """Read FIELD=VALUE pairs; values are YAML."""
    import yaml

    values = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals):
            raise ValueError(f"--set takes FIELD=VALUE, got {pair!r}.")
        values[name.strip()] = yaml.safe_load(value)
    return values


def _command() -> str:
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


@contextmanager
def _clear_endings() -> Iterator[None]:
    """Turn what a user can act on into a line and an exit code; anything else is a defect and keeps its traceback."""
    from .training import Interrupted

    try:
        yield
    except Interrupted as stop:
        if os.environ.get("RANK", "0") == "0":
            typer.echo(f"{stop}\nThe same command goes on from there:  {_command()}", err=True)
        raise typer.Exit(stop.exit_code) from None
    except (ValueError, FloatingPointError, OSError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from None
