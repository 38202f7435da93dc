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

    with _clear_endings(), _resumable():
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

    with _clear_endings(), _resumable():
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


# ---------------------------------------------------------------------------------------------------- checkpoints

ImageSize = Annotated[
    str | None,
    typer.Option(metavar="H[xW]", help="Pixels; positions are resampled. A fact where the file has no grid."),
]
PatchSize = Annotated[
    str | None, typer.Option(metavar="H[xW]", help="Pixels; the patch projection is resampled, as FlexiViT does.")
]
NumLabels = Annotated[int | None, typer.Option(help="A new head of so many classes, starting at zero.")]
NumHeads = Annotated[int | None, typer.Option(help="Heads of the attention, where the file does not say.")]
Pooling = Annotated[str | None, typer.Option(help="cls, mean, ...: where the tensors leave it open.")]
HiddenAct = Annotated[str | None, typer.Option(help="gelu, silu, ...: where only the code that trained it knows.")]
LayerNormEps = Annotated[float | None, typer.Option(help="The same for the epsilon of LayerNorm.")]
MlpGate = Annotated[str | None, typer.Option(help="first or last: the half of a packed gated MLP that is the gate.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what lies there.")]


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A file, a folder, or a name on the Hub, in any layout.")],
    out_dir: Annotated[Path, typer.Argument(help="Folder to write.")],
    image_size: ImageSize = None,
    patch_size: PatchSize = None,
    num_labels: NumLabels = None,
    num_heads: NumHeads = None,
    pooling: Pooling = None,
    hidden_act: HiddenAct = None,
    layer_norm_eps: LayerNormEps = None,
    mlp_gate: MlpGate = None,
    force: Force = False,
) -> None:
    """Read a ViT checkpoint of another library, and write it as a folder of this package with equal outputs.

    Google's and big_vision's npz, timm, transformers (ViT, DeiT, DINO, MAE, MSN, SigLIP, CLIP) and vit-pytorch: the
    layout is found by the tensors. For example: hf-vit convert ViT-B_16.npz vit-b16 --image-size 384
    """
    with _clear_endings():
        from .checkpoints import write_checkpoint

        checkpoint = _open_and_describe(
            source,
            image_size,
            patch_size,
            num_labels=num_labels,
            num_heads=num_heads,
            pooling=pooling,
            hidden_act=hidden_act,
            layer_norm_eps=layer_norm_eps,
            mlp_gate=mlp_gate,
        )
        write_checkpoint(checkpoint, out_dir, force)
        typer.echo(f"Written to {out_dir} and read back: {len(checkpoint.shapes)} tensors, bit for bit.")


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="A file, a folder, or a name on the Hub, in any layout.")],
    image_size: ImageSize = None,
    patch_size: PatchSize = None,
    num_labels: NumLabels = None,
    num_heads: NumHeads = None,
    pooling: Pooling = None,
    hidden_act: HiddenAct = None,
    layer_norm_eps: LayerNormEps = None,
    mlp_gate: MlpGate = None,
) -> None:
    """Say what a checkpoint is: family, variant, sizes, heads, pooling, parameters. Nothing is written.

    For example: hf-vit inspect ViT-B_16.npz
    """
    with _clear_endings():
        _open_and_describe(
            model,
            image_size,
            patch_size,
            num_labels=num_labels,
            num_heads=num_heads,
            pooling=pooling,
            hidden_act=hidden_act,
            layer_norm_eps=layer_norm_eps,
            mlp_gate=mlp_gate,
        )


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A file, a folder, or a name on the Hub, in any layout.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; for npz the file.")],
    to: Annotated[str, typer.Option(help="transformers (its own ViT), timm, or npz (the paper's code, big_vision).")],
    force: Force = False,
) -> None:
    """Write a model in another library's layout, or list the features that have no place there.

    A source that leaves something open goes through hf-vit convert first, which has options for it.
    For example: hf-vit export hf-vit-digits digits-timm --to timm
    """
    with _clear_endings():
        from .export import export as write_export

        for sentence in write_export(model, out, to, force):
            typer.echo(f"Note: {sentence}")
        typer.echo(f"Written to {out} and read back, bit for bit.")


def _size(option: str, text: str | None) -> tuple[int, int] | None:
    """Read H or HxW."""
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.strip().isdigit() and int(side) for side in sides):
        raise ValueError(f"{option} takes pixels as H or HxW, such as 224 or 224x320; got {text!r}.")
    return int(sides[0]), int(sides[-1])


def _open_and_describe(source: str, image_size: str | None, patch_size: str | None, **options: Any) -> Any:
    """Open a checkpoint with what the user says of it, and print what it is."""
    from .checkpoints import Options, open_checkpoint

    image, patch = _size("--image-size", image_size), _size("--patch-size", patch_size)
    checkpoint = open_checkpoint(source, Options(image_size=image, patch_size=patch, **options))
    for name, fact in checkpoint.describe().items():
        typer.echo(f"{name:>21}  {fact}")
    for sentence in checkpoint.assumed:
        typer.echo(f"Assumed: {sentence}")
    if checkpoint.left_out:
        some = ", ".join(checkpoint.left_out[:3]) + (", ..." if len(checkpoint.left_out) > 3 else "")
        typer.echo(f"Left out: {len(checkpoint.left_out)} tensors that are not of the encoder or its head: {some}")
    return checkpoint


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
def _resumable() -> Iterator[None]:
    """Say how an interrupted run goes on."""
    from .training import Interrupted

    try:
        yield
    except Interrupted as stop:
        if os.environ.get("RANK", "0") == "0":
            typer.echo(f"{stop}\nThe same command goes on from there:  {_command()}", err=True)
        raise typer.Exit(stop.exit_code) from None


@contextmanager
def _clear_endings() -> Iterator[None]:
    """Turn what a user can act on into a line and an exit code; anything else is a defect and keeps its traceback."""
    try:
        yield
    except (ValueError, FloatingPointError, OSError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from None
