"""The command that chooses: fit."""

import shlex
import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..system.places import check_exist
from ..system.texts import hanging, shortened
from .endings import announce, echo, read_size, typed_command
from .predictions import Coverage, LabelSeparator, MaxError

BEGAN = time.perf_counter()  # before the libraries load, which takes seconds

# Options of the data and of its features, for audit, too.
ImageSize = Annotated[
    str | None, typer.Option(metavar="H or HxW", help="Image size. Default: the size of the checkpoint's processor.")
]
TrainSplit = Annotated[str | None, typer.Option(help="Training split. Default: detected by name.")]
EvalSplit = Annotated[str | None, typer.Option(help="Evaluation split. Default: detected by name.")]
ImageColumn = Annotated[str | None, typer.Option(help="Image column. Default: detected by type.")]
LabelColumn = Annotated[
    list[str] | None, typer.Option(help="Label column, or several. Default: detected by name and type.")
]
FeatureCache = Annotated[Path | None, typer.Option(help="Folder for cached features. Default: under HF_HOME.")]
Seed = Annotated[int, typer.Option(help="Random seed.")]


def fit(
    data: Annotated[
        list[str],
        typer.Argument(metavar="DATA", help="Labeled images: a folder with a subfolder per class, a table, or a zip."),
    ],
    model: Annotated[str, typer.Option(help="Encoder to start from: a name on the Hub, a folder or a file.")],
    minutes: Annotated[float, typer.Option(min=0, help="Total time in minutes. 0: a linear classifier only.")] = 10,
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Folder for the model.")] = Path(
        "my-classifier"
    ),
    seed: Seed = 0,
    image_size: ImageSize = None,
    train_split: TrainSplit = None,
    eval_split: EvalSplit = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    label_separator: LabelSeparator = None,
    task: Annotated[
        Literal["classification", "multi_label", "regression"] | None,
        typer.Option(help="Training objective. Default: inferred from the labels."),
    ] = None,
    coverage: Coverage = None,
    max_error: MaxError = None,
    resume: Annotated[
        Literal["auto", "never"],
        typer.Option(help="'auto' resumes the fit in the output folder; 'never' discards it."),
    ] = "auto",
    cache: FeatureCache = None,
) -> None:
    """Train the best classifier possible in a given time.

    Computes the features of every image once, fits a linear classifier on them, and tests whether fine-tuning is
    better. States the accuracy to expect, with an interval. The same command resumes an interrupted fit.

    Example: hf-vit fit my_pictures/ --model facebook/dinov2-small -o my-classifier

    With an abstention threshold: hf-vit fit my_pictures/ --model facebook/dinov2-small --max-error 0.05
    """
    check_exist(data, model)
    limit = f" within about {minutes:g} min" if minutes else ""
    kind = "classifier" if minutes else "linear classifier"
    beginning = f"Fitting a {kind} to {shortened(data)}{limit}, starting from {model}."
    echo("\n".join(hanging("", beginning)))
    announce("Reading the images, and loading the encoder.")
    from ..training.fitting.fit import fit

    fit(
        data[0] if len(data) == 1 else data,
        model=model,
        minutes=minutes,
        output_dir=output_dir,
        seed=seed,
        image_size=read_size("--image-size", image_size),
        train_split=train_split,
        eval_split=eval_split,
        image_column=image_column,
        label_column=label_column,
        label_separator=label_separator,
        task=task,
        coverage=coverage,
        max_error=max_error,
        resume=resume,
        cache=cache,
        command=typed_command(),
        say=echo,
        began=BEGAN,
    )
    folder = shlex.quote(str(output_dir))  # more of the list of next commands
    echo(f"  hf-vit demo {folder}\n  hf-vit export {folder} {folder}.onnx\n  hf-vit serve {folder}")
