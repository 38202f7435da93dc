"""The command `hf-vit`: parse, call one function, print. What is heavy is imported inside the commands."""

import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
import yaml
from huggingface_hub.errors import StrictDataclassError

from ..system.texts import one_line, shortened, visible, without_tokens
from ..training.recipe import TrainConfig, recipe_header, shipped_recipes

if TYPE_CHECKING:
    from ..checkpoints.checkpoint import Checkpoint, Options
    from ..data.sources import Sources
    from ..prediction.predict import Summary
    from ..prediction.shards import Settings

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_show_locals=False,
    epilog="Commands end with 0; with 2 and one line that says what to do, where something outside is at fault; with "
    "129, 130 or 143 where a signal stopped a run, which is saved and goes on by the same command.",
)


# Options by which a command would begin anew instead of going on.
WITHOUT_RESUMING = r" (--resume[ =]never\b|--restart\b)"


def echo(text: str, err: bool = False, nl: bool = True) -> None:
    """Print a text; names of files and labels in it cannot steer the terminal, and no token is shown."""
    typer.echo(visible(without_tokens(text)), err=err, nl=nl)


def _say_version(wanted: bool) -> None:
    if wanted:
        import hf_vit

        echo(f"hf-vit {hf_vit.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Say the version, and end.")
    ] = False,
) -> None:
    """The Vision Transformer for Hugging Face: train, look at, and publish it.

    For example: hf-vit quickstart
    """


OutputDir = Annotated[
    str | None, typer.Option(help="Folder for the model; checkpoints lie below it. The recipe's if not given.")
]
Seed = Annotated[int | None, typer.Option(help="Of all that is random in the run. The recipe's if not given.")]
OtherSize = Annotated[
    str | None, typer.Option(metavar="H[xW]", help="Pixels, other than the model's; positions are resampled.")
]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Images of a core, or of a GPU, at a time.")]
Precision = Annotated[
    Literal["auto", "fp32", "bf16", "fp16", "fp8"], typer.Option(help="auto is bf16 on hardware fast at it.")
]
Resume = Annotated[
    str, typer.Option(help="'auto' goes on with the run that the output folder holds; 'never' starts it anew.")
]


@app.command()
def quickstart(
    output_dir: Annotated[str, typer.Option(help="Folder for the model.")] = "hf-vit-digits",
    seed: Annotated[int, typer.Option(help="Of all that is random; the held-out digits stay the same.")] = 0,
    resume: Resume = "auto",
) -> None:
    """Train a small ViT on handwritten digits, save it, load it.

    Needs no download and no GPU; under two minutes on two CPU cores. Stop it with Ctrl-C and run it again: it goes on.

    For example: hf-vit quickstart --output-dir digits --seed 1
    """
    from .quickstart import quickstart

    with _clear_endings(), _resumable():
        quickstart(output_dir, seed, resume, say=echo)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    recipe: Annotated[
        str,
        typer.Option(
            help="A recipe of the package (hf-vit recipes lists them), or a YAML file.", autocompletion=shipped_recipes
        ),
    ] = "flowers",
    data: Annotated[
        str | None,
        typer.Option(help="Folder of images (a subfolder a class), parquet, webdataset shards, or a name on the Hub."),
    ] = None,
    output_dir: OutputDir = None,
    seed: Seed = None,
    max_steps: Annotated[int | None, typer.Option(help="Length of the run in steps, instead of its epochs.")] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    num_workers: Annotated[int | None, typer.Option(help="Processes that load images.")] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="USER/NAME", help="Push there while training, and at the end.")
    ] = None,
    resume: Resume = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Measure some steps, say what the run takes, and leave nothing behind.")
    ] = False,
    price_per_hour: Annotated[
        float | None, typer.Option(min=0, help="Of all machines together, for --dry-run.")
    ] = None,
) -> None:
    """Train by a recipe. The same command resumes it, exactly.

    From scratch, from a checkpoint, or on masked patches. Every field of a recipe is an option, the architecture's
    behind model-config; hf-vit recipes NAME explains them.

    For example: hf-vit train --data photos/ --image-size 128 --batch-size 64 --model-config.hidden-size 192

    Parameters, FLOPs, memory, time and money before it starts: hf-vit train ... --dry-run --price-per-hour 2.5
    """
    from ..training.report import train_and_report

    with _clear_endings(), _resumable():
        named = {
            "data": data,
            "output_dir": output_dir,
            "seed": seed,
            "max_steps": max_steps,
            "save_every": save_every,
            "num_workers": num_workers,
            "push_to_hub": push_to_hub,
            "resume": resume,
        }
        given = {name: value for name, value in named.items() if value is not None}
        config = TrainConfig.from_recipe(recipe, **given, **_fields(context.args))
        if dry_run:
            _dry_run(config, price_per_hour)
        elif price_per_hour is not None:
            raise ValueError("--price-per-hour belongs to --dry-run: add it, or leave the price out.")
        else:
            train_and_report(config, _command(), echo)


@app.command()
def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="One of them, or a YAML file; all are listed if not given.")
    ] = None,
) -> None:
    """List the recipes, or show all fields of one.

    For example: hf-vit recipes digits > mine.yaml && hf-vit train --recipe mine.yaml
    """
    with _clear_endings():
        if name is not None:
            echo(recipe_header(name) + TrainConfig.from_recipe(name).explain(), nl=False)
            return
        for recipe in shipped_recipes():
            echo(f"{recipe:24} {recipe_header(recipe).splitlines()[0].removeprefix('# ')}")


@app.command()
def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A file, a folder, or a name on the Hub, in any layout.")
    ],
    data: Annotated[str, typer.Argument(help="Folder of images, parquet file or folder, or a name on the Hub.")],
    split: Annotated[str | None, typer.Option(help="To measure on; the held-out one if not given.")] = None,
    image_column: Annotated[str | None, typer.Option(help="Column of images, where it is not plain.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of labels, where it is not plain.")] = None,
    batch_size: BatchSize = None,
    num_workers: Annotated[int, typer.Option(min=0, help="Processes that load images.")] = 0,
    image_size: OtherSize = None,
    precision: Precision = "auto",
    probe: Annotated[
        list[str] | None,
        typer.Option(help="linear, knn or few-shot: how good the features are for the training split's labels."),
    ] = None,
    merge_tokens: Annotated[
        int, typer.Option(min=0, help="Measure it also with so many alike tokens merged in every layer (ToMe).")
    ] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for all that was measured.")] = None,
) -> None:
    """Measure a model, or its features, on labelled images.

    Accuracy, loss, calibration, speed and every class; by --probe what its features are worth.

    For example: hf-vit evaluate ViT-B_16.npz photos/ --probe linear --probe knn

    On several GPUs: accelerate launch -m hf_vit.cli evaluate MODEL DATA
    """
    with _clear_endings():
        from ..evaluation.evaluate import evaluate_checkpoint
        from ..evaluation.report import report_lines

        if json_file is not None and not json_file.absolute().parent.is_dir():
            raise ValueError(f"There is no folder {json_file.parent} for --json: make it first.")
        measured = evaluate_checkpoint(
            model,
            data,
            split=split,
            image_column=image_column,
            label_column=label_column,
            batch_size=batch_size,
            num_workers=num_workers,
            image_size=_size("--image-size", image_size),
            precision=precision,
            probes=list(dict.fromkeys(probe or [])),
            merged_per_layer=merge_tokens,
        )
        if measured is not None:
            echo("\n".join(report_lines(measured)))
            if json_file is not None:
                json_file.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")


@app.command()
def predict(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A file, a folder, or a name on the Hub, in any layout.")
    ],
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...", help="Image files, folders or globs; parquet; saved data sets, or on the Hub."
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A .parquet or .jsonl file; else answers are printed.")
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Labels an image.")] = 5,
    features: Annotated[
        bool, typer.Option("--features", help="Also the pooled features that the classifier reads.")
    ] = False,
    split: Annotated[str | None, typer.Option(help="Of a data set that has several.")] = None,
    image_column: Annotated[str | None, typer.Option(help="Column of images, where it is not plain.")] = None,
    batch_size: BatchSize = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Cores, or actors of Ray; all if not given.")] = None,
    image_size: OtherSize = None,
    precision: Precision = "auto",
    compile: Annotated[bool, typer.Option("--compile", help="Compile the model: for many images on a GPU.")] = False,
    engine: Annotated[
        Literal["processes", "ray"],
        typer.Option(help="This process and those that a launcher started, or Ray's actors."),
    ] = "processes",
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew; what is finished is removed.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="End with one line of JSON: images, pace, broken.")] = False,
) -> None:
    """Label images, on all cores or on the GPU.

    One that cannot be read has its reason in the table, and stops nothing. The same command goes on with one that was
    stopped: what is finished lies in OUTPUT.parts meanwhile.

    For example: hf-vit predict my-vit photos/ --top-k 1 -o labels.parquet

    On several GPUs or machines: accelerate launch -m hf_vit.cli predict ..., or --engine ray
    """
    with _clear_endings(), _resumable():
        from ..data.sources import Sources
        from ..prediction.shards import Settings

        if output is None:
            needing = {"--features": features, "--engine ray": engine == "ray", "--restart": restart}
            needing["more than one process"] = int(os.environ.get("WORLD_SIZE", "1")) > 1
            if given := [name for name, is_given in needing.items() if is_given]:
                raise ValueError(f"There is no file for {given[0]} to write to: add --output FILE.parquet.")
        sources = Sources(words, split, image_column)
        size = _size("--image-size", image_size)
        settings = Settings(model, precision, size, compile, batch_size, workers, top_k, features)
        if output is not None:
            from ..prediction.predict import predict_to_file

            summary = predict_to_file(output, sources, settings, engine, restart)
        else:
            summary = _print_answers(sources, settings, say=(lambda line: None) if as_json else typer.echo)
        if summary is None:  # of a process that is not the first
            return
        if as_json:
            echo(json.dumps(asdict(summary)))
        else:
            number, pace, broken = summary.images, summary.images_per_second, len(summary.broken)
            echo(f"{number:,} images, {pace:,.1f} a second, {broken:,} broken", err=True)


@app.command()
def demo(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A classifier: a file, a folder, or a name on the Hub, in any layout."),
    ],
    compare: Annotated[str | None, typer.Option(metavar="MODEL2", help="Another one, to be shown beside it.")] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines see the page, too.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="The first free one from 7860 if not given.")
    ] = None,
    space: Annotated[
        Path | None,
        typer.Option("--export-space", metavar="DIR", help="Write the page as a Space of the Hub, and end."),
    ] = None,
) -> None:
    """Show a model on a page in the browser.

    Drop an image, and see labels, attention, and what other sizes do; or many, and take home a table. Nothing leaves
    this machine; Ctrl-C ends it. Needs the extra demo: pip install "hf-vit[demo]".

    For example: hf-vit demo my-vit --compare google/vit-base-patch16-224
    """
    with _clear_endings():
        from ..demo import export_space, serve

        if space is None:
            serve(model, compare, host, port, echo)
            return
        export_space(space, model, compare)
        echo(f"Written to {space}. Run it:      python {space / 'app.py'}")
        echo(f"Publish it:  hf upload YOUR_NAME/{space.resolve().name} {space} --repo-type space")


@app.command()
def push(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A model's folder, as training or save_pretrained wrote it.")
    ],
    repo_id: Annotated[
        str, typer.Argument(metavar="USER/NAME", help="Where to: USER/NAME on the Hub; made if need be.")
    ],
    private: Annotated[bool, typer.Option(help="Whether a new repository is private.")] = False,
) -> None:
    """Publish a model's folder on the Hub.

    Weights, config, processors, code, card and pictures, in one commit; nothing else of the folder.

    For example: hf-vit push my-vit YOUR_NAME/my-vit --private
    """
    from ..hub.upload import push

    with _clear_endings():
        echo(f"Published at {push(folder, repo_id, private=private)}")


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
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A file, a folder, or a name on the Hub, in any layout.")
    ],
    out_dir: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
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
    """Make a folder with equal outputs of another library's model.

    Google's and big_vision's npz, timm, transformers (ViT, DeiT, DINO, MAE, MSN, SigLIP, CLIP) and vit-pytorch: the
    layout is found by the tensors.

    For example: hf-vit convert ViT-B_16.npz vit-b16 --image-size 384
    """
    with _clear_endings():
        from ..checkpoints.folder import write_checkpoint

        options = _options(
            image_size,
            patch_size,
            num_labels=num_labels,
            num_heads=num_heads,
            pooling=pooling,
            hidden_act=hidden_act,
            layer_norm_eps=layer_norm_eps,
            mlp_gate=mlp_gate,
        )
        checkpoint = _open_and_describe(source, options)
        write_checkpoint(checkpoint, out_dir, force)
        echo(f"Written to {out_dir} and read back: {len(checkpoint.shapes)} tensors, bit for bit.")


@app.command()
def inspect(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A file, a folder, or a name on the Hub, in any layout.")
    ],
    images: Annotated[
        list[str] | None,
        typer.Argument(metavar="IMAGE...", help="Image files, and folders of them, to draw what it makes of."),
    ] = None,
    image_size: ImageSize = None,
    patch_size: PatchSize = None,
    num_labels: NumLabels = None,
    num_heads: NumHeads = None,
    pooling: Pooling = None,
    hidden_act: HiddenAct = None,
    layer_norm_eps: LayerNormEps = None,
    mlp_gate: MlpGate = None,
    output_dir: Annotated[
        Path | None, typer.Option("--output-dir", "-o", help="Folder for pictures; MODEL-pictures if not given.")
    ] = None,
    layer: Annotated[int, typer.Option(help="Of maps; from 1, or negative from the end.")] = -1,
    form: Annotated[Literal["png", "svg"], typer.Option("--format", help="Of the pictures.")] = "png",
    html: Annotated[bool, typer.Option("--html", help="Also one page that holds all pictures.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Say what it is as one line of JSON.")] = False,
) -> None:
    """Say what a checkpoint is, and draw what it learned.

    Family, variant, sizes, heads, pooling, parameters. Nothing is written unless images, a folder or a page is asked
    for. Then filters and positions are drawn, and of images the attention distance of all, and for the first eight
    attention, rollout, features and norms.

    For example: hf-vit inspect ViT-B_16.npz photos/ --html
    """
    with _clear_endings():
        options = _options(
            image_size,
            patch_size,
            num_labels=num_labels,
            num_heads=num_heads,
            pooling=pooling,
            hidden_act=hidden_act,
            layer_norm_eps=layer_norm_eps,
            mlp_gate=mlp_gate,
        )
        _open_and_describe(model, options, as_json)
        if not (images or output_dir or html):
            return

        from ..inspection.gallery import draw, folder_for

        folder = output_dir or Path(folder_for(model))
        written = draw(model, folder, images or [], options, layer, form, html, echo)
        echo(f"Written to {folder}: {', '.join(path.name for path in written)}")


@app.command()
def export(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A file, a folder, or a name on the Hub, in any layout.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write, or a file: .npz, .onnx, .pt2.")],
    to: Annotated[
        str,
        typer.Option(
            help="onnx; torch-export; transformers (its own ViT); timm; or npz (the paper's code, big_vision)."
        ),
    ],
    int8: Annotated[
        Literal["weights", "dynamic"] | None,
        typer.Option(help="For onnx: weights in 8 bits, or also the products by them."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="For graphs: labelled images to measure accuracy and speed on, beside torch."),
    ] = None,
    force: Force = False,
) -> None:
    """Write a model as a graph, or in another library's layout.

    A graph (onnx, torch-export) takes any batch and size; it is left only if it answers as the model does in torch, on
    random and real images. A layout (transformers, timm, npz) that has no place for a feature is refused, and says it.
    A source that leaves something open goes through hf-vit convert first, which has options for it.

    For example: hf-vit export hf-vit-digits digits.onnx --to onnx --int8 dynamic --data digits
    """
    with _clear_endings():
        from ..checkpoints.export import TARGETS, export_checkpoint
        from ..graphs.export import export_graph
        from ..graphs.kinds import KINDS

        def measure(checkpoint: "Checkpoint", processor: Any, models: dict[str, Any]) -> list[str]:
            from ..evaluation.throughput import compare

            return compare(model, checkpoint, str(data), processor, models)

        if to in KINDS:
            echo("\n".join(export_graph(model, out, to, int8, None if data is None else measure, force)))
            echo(f"Written to {out} and compared with torch.")
            return
        if to not in TARGETS:
            raise ValueError(f"There is no --to {to!r}: choose one of {', '.join([*KINDS, *TARGETS])}.")
        if int8 is not None or data is not None:
            raise ValueError(f"--int8 and --data belong to {' and '.join(KINDS)}: leave them out for {to}.")
        for sentence in export_checkpoint(model, out, to, force):
            echo(f"Note: {sentence}")
        echo(f"Written to {out} and read back, bit for bit.")


# ------------------------------------------------------------------------------------------------------ benchmark


@app.command()
def benchmark(
    suites: Annotated[
        list[str] | None,
        typer.Argument(help="training, inference, preprocessing, augmentation, prediction; all if not given."),
    ] = None,
    models: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Such as Ti/16,B/16, at 224 pixels, for the usual ones.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="For training and inference.")] = None,
    against: Annotated[
        str | None, typer.Option(metavar="LIBRARY,...", help="Such as timm,transformers; all that are installed.")
    ] = None,
    precision: Annotated[
        Literal["auto", "fp32", "bf16"], typer.Option(help="auto is bf16 on hardware that is fast at it.")
    ] = "auto",
    rounds: Annotated[int, typer.Option(min=5, help="In which every variant has its turn.")] = 7,
    seconds: Annotated[float, typer.Option(min=0.0, help="Length of a turn.")] = 1.0,
    compile: Annotated[bool, typer.Option("--compile", help="Also what torch compiles; it takes minutes.")] = False,
    photos: Annotated[Path | None, typer.Option(help="Folder of JPEGs; some are made if not given.")] = None,
    output_dir: Annotated[Path | None, typer.Option(help="Folder for a file of this machine and day.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One small case a suite: to see whether all works.")] = False,
) -> None:
    """Compare speed and memory with other libraries.

    timm, transformers, vit-pytorch and others, with the same weights and inputs. Every variant has a process of its
    own; they take turns, and a ratio is stated only where it is beyond the noise.

    For example: hf-vit benchmark inference --models B/16 --batch-size 16
    """
    with _clear_endings():
        from ..benchmark.compare import benchmark as measure
        from ..benchmark.table import LEGEND, Report, describe, table
        from ..system.machine import hardware, installed_versions

        machine, installed = hardware(), installed_versions()
        echo("\n".join([*describe(machine, installed), ""]))
        report = None
        for results in measure(
            suites or (),
            models=models.split(",") if models else (),
            batch_size=batch_size,
            against=against.split(",") if against else (),
            precision=precision,
            rounds=rounds,
            seconds=seconds,
            is_compile_wanted=compile,
            photos=photos,
            is_quick=quick,
            say=lambda line: echo(line, err=True),
        ):
            echo("\n".join(["", *table(results)]))
            if output_dir is not None:
                report = report or Report(output_dir, _command(), machine, installed)
                report.add(results)
        echo("\n".join(LEGEND))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def study(
    context: typer.Context,
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Of the study; all are listed if not given.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Images with labels, as for training. CIFAR-10 if not given.")
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Folder for results, picture and page; study-NAME if not given.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each kind; more can be added later.")] = 3,
    quick: Annotated[bool, typer.Option("--quick", help="A size for 2 CPU cores instead of one for a GPU.")] = False,
    recipe: Annotated[str | None, typer.Option(help="What is varied, instead of the study's own recipe.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs side by side; as many as pay if not given.")] = None,
) -> None:
    """Run one of the paper's experiments over seeds.

    Results, a picture and a page with findings are written. The same command goes on with it. Fields of the recipe
    are options, as for training.

    For example: hf-vit study positions --quick --data CIFAR10 --epochs 2
    """
    with _clear_endings(), _resumable():
        from ..studies import SIZES, STUDIES, run_study, write_page
        from ..studies.page import summary

        if name is None:
            for known, its in STUDIES.items():
                echo(f"{known:16} {its.title}. {its.source}")
            return
        if name not in STUDIES:
            raise ValueError(f"There is no study {name!r}: choose one of {', '.join(STUDIES)}.")
        given = {} if data is None else {"data": data}
        size = recipe or SIZES["quick" if quick else "full"]
        config = TrainConfig.from_recipe(size, **given, **_fields(context.args))
        folder = output_dir or Path(f"study-{name}")
        results = run_study(STUDIES[name], config, folder, seeds, _command(), jobs, echo)
        page = write_page(STUDIES[name], results, folder)
        echo("\n".join(["", *summary(STUDIES[name], results), "", f"The page is {page}."]))


def _print_answers(sources: "Sources", settings: "Settings", say: Callable[[str], None]) -> "Summary":
    """Say what a model makes of images, line by line."""
    from ..prediction.predict import Summary, predict_each

    answers = predict_each(sources, settings)
    broken, images, began = [], 0, time.perf_counter()
    for name, prediction in answers:
        images += 1
        best = zip(prediction.labels, prediction.scores, strict=True)
        said = prediction.error or ", ".join(f"{label} {score:.1%}" for label, score in best)
        if prediction.error is not None:
            broken.append(name)
        say(one_line(said if said.startswith(name) else f"{name}  {said}"))  # what is wrong with a file begins so
    return Summary(images, broken, images / (time.perf_counter() - began))


def _size(option: str, text: str | None) -> tuple[int, int] | None:
    """Read H or HxW."""
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.strip().isdigit() and int(side) for side in sides):
        raise ValueError(f"{option} takes pixels as H or HxW, such as 224 or 224x320; got {text!r}.")
    return int(sides[0]), int(sides[-1])


def _options(image_size: str | None, patch_size: str | None, **others: Any) -> "Options":
    """Return what the user says of a checkpoint."""
    from ..checkpoints.checkpoint import Options

    image, patch = _size("--image-size", image_size), _size("--patch-size", patch_size)
    return Options(image_size=image, patch_size=patch, **others)


def _open_and_describe(source: str, options: "Options", as_json: bool = False) -> "Checkpoint":
    """Open a checkpoint with what the user says of it, and print what it is."""
    from ..checkpoints.opening import open_checkpoint
    from ..inspection.facts import facts

    checkpoint = open_checkpoint(source, options)
    if as_json:
        rest = {"assumed": checkpoint.assumed, "left_out": checkpoint.left_out, "config": checkpoint.config.to_dict()}
        echo(json.dumps({**facts(checkpoint), **rest}))
        return checkpoint
    for name, fact in facts(checkpoint).items():
        echo(f"{name:>21}  {fact}")
    for sentence in checkpoint.assumed:
        echo(f"Assumed: {sentence}")
    if checkpoint.left_out:
        echo(
            f"Left out: {len(checkpoint.left_out)} tensors that do not belong to the encoder or its head: "
            f"{shortened(checkpoint.left_out)}"
        )
    return checkpoint


def _fields(arguments: list[str]) -> dict[str, Any]:
    """Read --field VALUE and --field=VALUE; values are YAML, and a field of yes or no may stand alone."""
    fields: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        option, equals, value = rest.pop(0).partition("=")
        if not option.startswith("--"):
            raise ValueError(f"Unexpected {option!r}: fields of a recipe are set by --field VALUE.")
        name = option.removeprefix("--").replace("-", "_")
        if not equals:
            value = "true" if not rest or rest[0].startswith("--") else rest.pop(0)
        try:
            fields[name] = yaml.safe_load(value)
        except yaml.YAMLError:  # a name with a bracket, say
            fields[name] = value
    return fields


def _command() -> str:
    """Return what the user typed, as it may be kept: without tokens."""
    return without_tokens(shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]))


def _dry_run(config: TrainConfig, price_per_hour: float | None) -> None:
    from ..system.stopping import Interrupted
    from ..training.rehearsal import describe, rehearse

    try:
        cost = rehearse(config)
    except Interrupted as stop:
        if os.environ.get("RANK", "0") == "0":
            echo(str(stop), err=True)
        raise typer.Exit(stop.exit_code) from None
    if cost is not None:
        echo("\n".join(describe(cost, price_per_hour)))


@contextmanager
def _resumable() -> Iterator[None]:
    """Say how an interrupted run goes on."""
    from ..system.stopping import Interrupted

    try:
        yield
    except Interrupted as stop:
        if os.environ.get("RANK", "0") == "0":
            again = re.sub(WITHOUT_RESUMING, "", _command())  # which would remove what was saved
            removed = re.search(WITHOUT_RESUMING, _command())
            which = "The same command" if removed is None else f"This command, without {removed[1].replace('=', ' ')},"
            echo(f"{stop}\n{which} goes on from there:  {again}", err=True)
        raise typer.Exit(stop.exit_code) from None


@contextmanager
def _clear_endings() -> Iterator[None]:
    """Turn what a user can act on into a line and an exit code; anything else is a defect and keeps its traceback."""
    try:
        yield
    except (typer.Exit, BrokenPipeError):
        raise
    except Exception as error:
        from ..system.network import sentence_of

        said = sentence_of(error)
        if isinstance(error, StrictDataclassError):  # a field of a config that has another type; two lines
            said = one_line(str(error))
        if said is None and not isinstance(error, ValueError | FloatingPointError | OSError):
            raise
        _end_bars()
        echo(f"Error: {said or error}", err=True)
        raise typer.Exit(2) from None


def _end_bars() -> None:
    """Leave the line of a progress bar whose work has failed."""
    from tqdm import tqdm

    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
