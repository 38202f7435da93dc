"""Commands that run a model on images: evaluate, predict, demo, benchmark."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..prediction.output import check_output, check_replaceable
from ..system.extras import need
from ..system.places import check_exist
from ..system.texts import counted, one_line, shortened
from .endings import announce, echo, read_size, typed_command
from .models import Model

if TYPE_CHECKING:
    from ..data.sources import Sources
    from ..prediction.predict import Summary
    from ..prediction.shards import Settings

ImageSize = Annotated[str | None, typer.Option(metavar="H[xW]", help="Image size in pixels, if not the model's.")]
Windows = Annotated[
    bool,
    typer.Option("--windows", help="Sliding windows of the model's size over large images, for segmentation."),
]
LabelSeparator = Annotated[str | None, typer.Option(help="Separator between the labels of one image.")]
ImageColumn = Annotated[str | None, typer.Option(help="Image column, if ambiguous.")]
Head = Annotated[str | None, typer.Option(metavar="NAME", help="Head of a model with several heads.")]
Runtime = Annotated[
    Literal["torch", "onnxruntime", "openvino", "auto"],
    typer.Option(help="Runtime on a CPU; auto is the fastest that is installed."),
]
Coverage = Annotated[
    float | None,
    typer.Option(metavar="SHARE", help="Share of images whose label set contains the true label, such as 0.9."),
]
MaxError = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE", help="Largest share of wrong answers, such as 0.05; less certain answers become unknown."
    ),
]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Batch size per device (CPU core or GPU).")]
Precision = Annotated[
    Literal["auto", "fp32", "bf16", "fp16", "fp8"], typer.Option(help="Precision; auto is bf16 where it is fast.")
]


def evaluate(
    model: Model,
    data: Annotated[
        list[str],
        typer.Argument(metavar="DATA", help="Labeled images: folder, table, archive, parquet, or a name on the Hub."),
    ],
    head: Head = None,
    split: Annotated[str | None, typer.Option(help="Split to use. Default: the evaluation split.")] = None,
    image_column: ImageColumn = None,
    label_column: Annotated[
        list[str] | None, typer.Option(help="Label column, if ambiguous; may be repeated.")
    ] = None,
    label_separator: LabelSeparator = None,
    batch_size: BatchSize = None,
    num_workers: Annotated[int, typer.Option(min=0, help="Worker processes that load images.")] = 0,
    image_size: ImageSize = None,
    windows: Windows = False,
    precision: Precision = "auto",
    probe: Annotated[list[str] | None, typer.Option(help="Probe of the features: linear, knn or few-shot.")] = None,
    merge_tokens: Annotated[
        int, typer.Option(min=0, help="Also evaluate with this many tokens merged per layer (ToMe).")
    ] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="JSON file for all measurements.")] = None,
    mistakes: Annotated[
        Path | None, typer.Option(metavar="FILE.csv", help="Table of wrongly classified images.")
    ] = None,
    calibrate: Annotated[
        bool,
        typer.Option("--calibrate", help="Temperature and thresholds for MODEL, fitted to a part of the images."),
    ] = False,
    coverage: Coverage = None,
    max_error: MaxError = None,
    calibration_share: Annotated[
        float, typer.Option(metavar="SHARE", help="Part of the images to fit to; the others measure the result.")
    ] = 0.5,
) -> None:
    """Evaluate a model, or its features, on labeled images.

    Measures accuracy, loss, calibration and speed, and accuracy per class; with --probe, how well simple classifiers
    do on its features. Without --split, the evaluation split is used. If there is none, all images are evaluated, or
    only the held-out images if the model was trained on this data.

    With --calibrate, it fits a threshold for answering "unknown" (--max-error) and one for label sets (--coverage),
    measures both, and writes them into the folder MODEL.

    Example: hf-vit evaluate my-vit photos/ --mistakes mistakes.csv

    Quality of features: hf-vit evaluate ViT-B_16.npz photos/ --probe knn

    One head of several: hf-vit evaluate my-heads photos/ --head species

    Abstention: hf-vit evaluate my-vit photos/ --calibrate --max-error 0.02

    On several GPUs: accelerate launch -m hf_vit.cli evaluate MODEL DATA
    """
    check_exist(data, model)
    announce(f"Evaluating {model} on {shortened(data)}.")
    from ..evaluation.evaluate import evaluate_checkpoint
    from ..evaluation.report import report_lines

    for option, file, what in (
        ("--json", json_file, "a file of measurements"),
        ("--mistakes", mistakes, "a table of mistakes"),
    ):
        if file is not None and not file.absolute().parent.is_dir():
            raise ValueError(f"The folder {file.parent} for {option} does not exist: create it first.")
        if file is not None:
            check_replaceable(file, what, option)
    measured = evaluate_checkpoint(
        model,
        data,
        split=split,
        image_column=image_column,
        label_column=label_column,
        label_separator=label_separator,
        batch_size=batch_size,
        num_workers=num_workers,
        image_size=read_size("--image-size", image_size),
        windows=windows,
        precision=precision,
        probes=list(dict.fromkeys(probe or [])),
        merged_per_layer=merge_tokens,
        mistakes=mistakes,
        head=head,
        calibrate=calibrate,
        coverage=coverage,
        max_error=max_error,
        calibration_share=calibration_share,
    )
    if measured is not None:
        echo("\n".join(report_lines(measured)))
        if calibrate:
            echo(f"Wrote the thresholds into {Path(model) / 'config.json'}, and a section into its card.")
        if json_file is not None:
            json_file.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
        for file in filter(None, (json_file, mistakes)):
            echo(f"Wrote {file}")


def predict(
    model: Model,
    words: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE", help="Image files, folders, globs, zips, tables of paths, or data sets."),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Table: .csv, .tsv, .jsonl or .parquet; or a folder for masks or drawn boxes."
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(min=1, help="Number of labels per image. Default: 5, or those above thresholds."),
    ] = None,
    head: Head = None,
    features: Annotated[bool, typer.Option("--features", help="Also write the pooled features.")] = False,
    half_features: Annotated[
        bool, typer.Option("--half-features", help="Features in half precision, for half the space.")
    ] = False,
    split: Annotated[str | None, typer.Option(help="Split of a data set that has several.")] = None,
    image_column: ImageColumn = None,
    batch_size: BatchSize = None,
    workers: Annotated[int | None, typer.Option(min=1, help="CPU cores, or Ray actors. Default: all.")] = None,
    image_size: ImageSize = None,
    windows: Windows = False,
    precision: Precision = "auto",
    compile: Annotated[bool, typer.Option("--compile", help="Compile the model.")] = False,
    runtime: Runtime = "torch",
    engine: Annotated[
        Literal["processes", "ray"], typer.Option(help="Processes of a launcher, or Ray actors.")
    ] = "processes",
    restart: Annotated[bool, typer.Option("--restart", help="Discard results of an earlier run.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print only a summary, as JSON.")] = False,
) -> None:
    """Predict labels of images, on all CPU cores or on a GPU.

    An unreadable image does not stop the run; the table states the error. The same command resumes an interrupted
    run, which keeps finished results in OUTPUT.parts.

    Example: hf-vit predict my-vit photos/ --top-k 1 -o labels.csv

    Masks of a segmentation model: hf-vit predict my-segmenter photos/ -o masks/

    Boxes of a detector, one per row: hf-vit predict my-detector photos/ -o boxes.csv

    One head of several: hf-vit predict my-heads photos/ --head species -o labels.csv

    On several GPUs: accelerate launch -m hf_vit.cli predict ..., or --engine ray
    """
    check_exist(words, model)
    if output is not None and output.suffix:  # a folder is for masks or drawings
        check_output(output, features, half_features)
        check_replaceable(output)
    if output is None:
        needing = {"--features": features or half_features, "--engine ray": engine == "ray", "--restart": restart}
        needing["a launch with more than one process"] = int(os.environ.get("WORLD_SIZE", "1")) > 1
        if given := [name for name, is_given in needing.items() if is_given]:
            raise ValueError(f"Expected a file to write to, since you use {given[0]}: add --output labels.parquet.")
    announce(f"Predicting labels of {shortened(words)} with {model}.")
    from ..data.sources import Sources
    from ..prediction.shards import Settings

    sources = Sources(words, split, image_column)
    size = read_size("--image-size", image_size)
    settings = Settings(model, precision, size, compile, batch_size, workers, top_k, features, windows, head, runtime)
    summary: Summary | None
    if output is not None and not output.suffix:
        from ..prediction.masks import predict_masks

        summary = predict_masks(output, sources, settings, restart)
    elif output is not None:
        from ..prediction.predict import predict_to_file

        summary = predict_to_file(output, sources, settings, engine, restart, half_features)
    else:
        summary = _print_predictions(sources, settings, say=(lambda line: None) if as_json else typer.echo)
    if summary is None:  # in all processes but the first
        return
    if as_json:
        echo(json.dumps(asdict(summary)))
    else:
        if skipped := sources.skipped():
            echo(skipped, err=True)
        if output is not None:
            echo(f"Wrote {output}")
        speed, broken = summary.images_per_second, len(summary.broken)
        unreadable = f", {broken:,} unreadable" if broken else ""
        by = "" if summary.runtime == "torch" else f" in {summary.runtime}"
        echo(f"{counted(summary.images, 'image')}, {speed:,.1f} images/s{by}{unreadable}", err=True)


def _print_predictions(sources: "Sources", settings: "Settings", say: Callable[[str], None]) -> "Summary":
    """Print the labels of every image, one line per image."""
    from ..prediction.predict import Summary, predict_each

    broken, images, began = [], 0, time.perf_counter()
    for name, prediction in predict_each(sources, settings):
        images += 1
        line = prediction.line
        if prediction.error is not None:
            broken.append(name)
        say(one_line(line if line.startswith(name) else f"{name}  {line}"))  # errors often begin with the file name
    return Summary(images, broken, images / (time.perf_counter() - began))


def demo(
    model: Model,
    compare: Annotated[str | None, typer.Option(metavar="MODEL2", help="Second model, for comparison.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for other machines.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port. Default: the first free one from 7860.")
    ] = None,
    space: Annotated[
        Path | None,
        typer.Option("--export-space", metavar="DIR", help="Folder to export the page to, as a Space of the Hub."),
    ] = None,
) -> None:
    """Show a model on a web page.

    Drop an image to see its labels, the classes of its pixels or its objects, attention maps, and predictions at other
    resolutions; drop many to download a table. Nothing is sent to other machines. Ctrl-C stops the server. Needs
    pip install "hf-vit[demo]".

    Example: hf-vit demo my-vit --compare google/vit-base-patch16-224
    """
    check_exist([compare], model)
    need("demo", "gradio")
    announce(f"Loading {model}.")
    if space is None:
        from ..demo.serving import serve

        serve(model, compare, host, port, echo)
        return
    from ..demo.space import export_space

    export_space(space, model, compare)
    echo(f"Wrote {space}.")
    echo(f"To run it:      python {space / 'app.py'}")
    echo(f"To publish it:  hf upload YOUR_NAME/{space.resolve().name} {space} --repo-type space")


def benchmark(
    suites: Annotated[
        list[str] | None, typer.Argument(help="training, inference, preprocessing, augmentation, prediction; or gpu.")
    ] = None,
    models: Annotated[str | None, typer.Option(metavar="NAME,...", help="Models, such as Ti/16,B/16.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Batch size of training and inference.")] = None,
    against: Annotated[
        str | None, typer.Option(metavar="LIBRARY,...", help="Libraries, such as timm,transformers.")
    ] = None,
    precision: Annotated[
        Literal["auto", "fp32", "bf16"], typer.Option(help="Precision; auto is bf16 where it is fast.")
    ] = "auto",
    rounds: Annotated[int, typer.Option(min=5, help="Number of runs per variant.")] = 7,
    seconds: Annotated[float, typer.Option(min=0.0, help="Duration of each run in seconds.")] = 1.0,
    compile: Annotated[bool, typer.Option("--compile", help="Also measure compiled models.")] = False,
    photos: Annotated[Path | None, typer.Option(help="Folder of JPEG files. Default: generated ones.")] = None,
    output_dir: Annotated[Path | None, typer.Option(help="Folder for a file with the results.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One small case per suite, as a check.")] = False,
    minutes: Annotated[float, typer.Option(min=0.0, help="Time limit of gpu in minutes.")] = 8.0,
) -> None:
    """Compare speed and memory with other libraries, or check a GPU.

    Compares with timm, transformers, vit-pytorch and others, with the same weights and inputs. Every variant runs in a
    separate process, and they take turns. A speedup is printed only if it exceeds the measurement noise.

    gpu checks the GPU of this machine instead: whether outputs match those of a CPU, how often the CPU waits for the
    GPU, exact resume, two processes on one GPU, and the speed of ViT-S to ViT-H compared with timm. It exits with 1
    if a check fails.

    Example: hf-vit benchmark inference --models B/16 --batch-size 16
    """
    if suites and "gpu" in suites:
        others = {"--models": models, "--batch-size": batch_size, "--against": against, "--photos": photos}
        if len(suites) > 1 or any(value is not None for value in others.values()):
            raise ValueError(f"benchmark gpu takes no other suites, and none of {', '.join(others)}: remove them.")
        from .gpu import check_gpu

        if not check_gpu(quick, minutes, output_dir, typed_command(), echo):
            raise typer.Exit(1)
        return
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
            report = report or Report(output_dir, typed_command(), machine, installed)
            report.add(results)
    echo("\n".join(LEGEND))
