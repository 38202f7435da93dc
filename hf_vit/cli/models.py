"""Commands for a checkpoint: convert, inspect, export, push."""

import inspect as introspection
import json
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..system.disk import check_new_file
from ..system.places import check_exist
from ..system.texts import counted, hanging, shortened
from .endings import announce, echo, read_numbers, read_size

if TYPE_CHECKING:
    from ..checkpoints.checkpoint import Checkpoint, Options

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Model: a folder, a file of weights, or a name on the Hub.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace existing files.")]

# Formats of an export.
ENDINGS = {".onnx": "onnx", ".xml": "openvino", ".pte": "executorch", ".pt2": "torch-export", ".npz": "npz"}
FORMATS = "onnx, openvino, executorch, torch-export, transformers-js, transformers, timm, npz"

# Fields of `checkpoints.Options`, by name.
CHECKPOINT_OPTIONS: dict[str, Any] = {
    "image_size": Annotated[str | None, typer.Option(metavar="H[xW]", help="Image size in pixels.")],
    "patch_size": Annotated[str | None, typer.Option(metavar="H[xW]", help="Patch size in pixels.")],
    "num_labels": Annotated[int | None, typer.Option(help="Number of classes of a new, zero-initialized head.")],
    "num_heads": Annotated[int | None, typer.Option(help="Number of attention heads, if the file has none.")],
    "pooling": Annotated[str | None, typer.Option(help="Pooling (cls, mean, ...), if ambiguous.")],
    "hidden_act": Annotated[str | None, typer.Option(help="Activation (gelu, silu, ...), if the file has none.")],
    "layer_norm_eps": Annotated[float | None, typer.Option(help="Epsilon of LayerNorm, if the file has none.")],
    "mlp_gate": Annotated[
        str | None,
        typer.Option(help="Half of the packed projection that is the gate: first or last."),
    ],
    "head": Annotated[
        str | None, typer.Option(metavar="NAME", help="Head of a model with several heads, as a standalone model.")
    ],
    "names": Annotated[
        str | None, typer.Option(metavar="FILE", help="Table of tensor names (YAML), for a ViT of another library.")
    ],
    "weights": Annotated[
        str | None, typer.Option(metavar="NAME", help="Key of the weights in a file with several, such as teacher.")
    ],
    "preprocessing": Annotated[
        Literal["original", "timm", "center_crop"] | None,
        typer.Option(help="Preset of the preprocessing, if the file has none."),
    ],
    "mean": Annotated[str | None, typer.Option(metavar="R,G,B", help="Mean of the pixels in [0, 1].")],
    "std": Annotated[str | None, typer.Option(metavar="R,G,B", help="Standard deviation of the pixels.")],
}


def with_checkpoint_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the parameter `options` of a command by the command-line options of CHECKPOINT_OPTIONS."""

    @wraps(command)
    def run(**given: Any) -> None:
        check_exist((), given["model"])
        from ..checkpoints.checkpoint import Options

        fields = {name: given.pop(name) for name in CHECKPOINT_OPTIONS}
        for name in ("image_size", "patch_size"):
            fields[name] = read_size(f"--{name.replace('_', '-')}", fields[name])
        for name in ("mean", "std"):
            fields[name] = read_numbers(f"--{name}", fields[name])
        command(**given, options=Options(**fields, spelling="command"))

    parameters = []
    for parameter in introspection.signature(command).parameters.values():
        if parameter.name == "options":
            kind = introspection.Parameter.POSITIONAL_OR_KEYWORD
            parameters += [
                introspection.Parameter(name, kind, default=None, annotation=annotation)
                for name, annotation in CHECKPOINT_OPTIONS.items()
            ]
        else:
            parameters.append(parameter)
    vars(run)["__signature__"] = introspection.Signature(parameters)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


@with_checkpoint_options
def convert(
    model: Model,
    out_dir: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    options: "Options",
    force: Force = False,
) -> None:
    """Convert a checkpoint from another library.

    Reads checkpoints of Google, timm, transformers, DINO, CLIP, MAE, BEiT, training scripts and others; the names of
    the tensors decide which one it is. The converted model gives the same outputs, unless --image-size or
    --patch-size resamples position embeddings or the patch projection.

    Example: hf-vit convert ViT-B_16.npz vit-b16 --image-size 384
    """
    from ..checkpoints.folder import write_checkpoint

    checkpoint = _open_and_describe(model, options)
    echo(f"Writing {out_dir} ...")
    write_checkpoint(checkpoint, out_dir, force)
    echo(f"Wrote {out_dir}, and read its {len(checkpoint.shapes)} tensors back: they are equal bit for bit.")


@with_checkpoint_options
def inspect(
    model: Model,
    options: "Options",
    images: Annotated[
        list[str] | None, typer.Argument(metavar="IMAGE...", help="Images or folders to draw maps for.")
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option("--output-dir", "-o", help="Folder for figures. Default: MODEL-pictures.")
    ] = None,
    layer: Annotated[int, typer.Option(help="Layer of the maps: 1 is the first, -1 the last.")] = -1,
    form: Annotated[Literal["png", "svg"], typer.Option("--format", help="Format of the figures.")] = "png",
    html: Annotated[bool, typer.Option("--html", help="Also write an HTML page of all figures.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as one line of JSON.")] = False,
    names_template: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File to write a table of tensor names to, for --names.")
    ] = None,
) -> None:
    """Describe a checkpoint, and draw what it learned.

    Prints family, variant, sizes, heads, pooling and number of parameters. Given images, --output-dir or --html, it
    also draws filters and position embeddings; for the images, attention distance; and for the first eight of them,
    attention, rollout, features and norms.

    For a ViT of another library, --names-template writes a table of tensor names to fill in, which --names reads.

    Example: hf-vit inspect ViT-B_16.npz photos/ --html
    """
    if names_template is not None:
        _write_template(model, names_template, options.weights)
        return
    _open_and_describe(model, options, as_json)
    if not (images or output_dir or html):
        return

    from ..inspection.gallery import draw, folder_for

    folder = output_dir or Path(folder_for(model))
    written = draw(model, folder, images or [], options, layer, form, html, echo)
    names = ", ".join(path.name for path in written if path.suffix != ".html")
    echo("\n".join(hanging("", f"Wrote to {folder}: {names}")))
    if html:
        echo(f"All figures on one page: {folder / 'index.html'}")


def export(
    model: Model,
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder to write, or a file: .npz, .onnx, .xml, .pte, .pt2.")
    ],
    to: Annotated[
        str | None,
        typer.Option(help=f"Format: {FORMATS} (big_vision). Default: by the file extension of OUT."),
    ] = None,
    int8: Annotated[
        Literal["weights", "dynamic", "static"] | None,
        typer.Option(
            help="8-bit quantization (onnx, openvino): weights alone, or matrix products too, with ranges from each "
            "call (dynamic) or from calibration images (static)."
        ),
    ] = None,
    precision: Annotated[
        Literal["fp32", "fp16", "bf16"], typer.Option(help="Precision of the graph's weights.")
    ] = "fp32",
    data: Annotated[
        str | None, typer.Option(help="Labeled images for comparing accuracy and speed with torch.")
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(metavar="DATA", help="Calibration images for --int8 static. Default: DATA of --data.")
    ] = None,
    with_preprocessing: Annotated[
        bool, typer.Option("--with-preprocessing", help="Graph from uint8 images of any size to probabilities.")
    ] = False,
    force: Force = False,
) -> None:
    """Export a model as a graph, or for another library.

    A graph (onnx, openvino, executorch, torch-export) accepts any batch size and image size. It is compared with the
    model in torch on random and real images, and deleted if the outputs differ; the error names the first layer that
    differs. The folder for transformers.js (transformers-js) holds a graph, and is also tried under Node if it is
    found. Export to another library (transformers, timm, npz) fails if the model has a feature that the library does
    not support. If the checkpoint is ambiguous, run hf-vit convert first; it has the options to resolve that.

    Example: hf-vit export hf-vit-digits digits.onnx --int8 dynamic --data digits
    """
    check_exist([data, calibration], model)
    to = to or ENDINGS.get(out.suffix.lower())
    if to is None:
        raise ValueError(f"{out} does not end in {', '.join(ENDINGS)}: add --to, one of {FORMATS}.")
    if out.suffix.lower() in ENDINGS:
        check_new_file(out, force)
    announce(f"Exporting {model} to {out}.")
    from ..checkpoints.export import TARGETS, export_checkpoint
    from ..graphs.export import export_graph
    from ..graphs.kinds import KINDS
    from ..graphs.transformers_js import NAME, export_transformers_js

    def measure(checkpoint: "Checkpoint", processor: Any, models: dict[str, Any], sizes: dict[str, int]) -> list[str]:
        from ..evaluation.throughput import compare

        return compare(model, checkpoint, str(data), processor, models, sizes=sizes)

    compare_on_data = None if data is None else measure
    if to == NAME and (calibration is not None or with_preprocessing):
        raise ValueError(f"--calibration and --with-preprocessing do not apply to {NAME}: remove them.")
    lines = None
    if to == NAME:
        lines = export_transformers_js(model, out, int8, compare_on_data, force, precision=precision, say=announce)
    elif to in KINDS:
        lines = export_graph(
            model,
            out,
            to,
            int8,
            compare_on_data,
            force,
            precision=precision,
            calibration=calibration or (data if int8 == "static" else None),
            with_preprocessing=with_preprocessing,
            say=announce,
        )
    if lines is not None:
        echo("\n".join(lines))
        echo(f"Wrote {out}, and compared its outputs with torch.")
        return
    if to not in TARGETS:
        raise ValueError(f"Unknown format {to!r} for --to: choose one of {FORMATS}.")
    if int8 is not None or data is not None or calibration is not None or precision != "fp32" or with_preprocessing:
        raise ValueError(
            f"--int8, --precision, --data, --calibration and --with-preprocessing apply only to {', '.join(KINDS)} "
            f"and {NAME}: remove them to export to {to}."
        )
    for sentence in export_checkpoint(model, out, to, force):
        echo(f"Note: {sentence}")
    echo(f"Wrote {out}, and read it back: all tensors are equal bit for bit.")


def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of a saved model.")],
    repo_id: Annotated[str, typer.Argument(metavar="USER/NAME", help="Repository on the Hub, new or existing.")],
    private: Annotated[bool, typer.Option(help="Make a new repository private.")] = False,
    license: Annotated[
        str | None, typer.Option(metavar="NAME", help="License for the model card, such as apache-2.0.")
    ] = None,
    with_handler: Annotated[
        bool, typer.Option("--with-handler", help="Also upload handler.py, the code of an Inference Endpoint.")
    ] = False,
) -> None:
    """Publish a model on the Hugging Face Hub.

    Uploads weights, config, processors, code, model card and figures in one commit, and no other files of the folder.
    The card states the license that you give, or else the license of the base model, if known.

    Example: hf-vit push my-vit YOUR_NAME/my-vit --private --license cc-by-4.0
    """
    from ..hub.upload import push

    url = push(folder, repo_id, private=private, license=license, with_handler=with_handler)
    echo(f"Published at {url}")


def _write_template(source: str, path: Path, weights: str | None) -> None:
    """Write a table of names to fill in."""
    from ..checkpoints.families.named import UNKNOWN
    from ..checkpoints.families.names_template import names_template

    if path.exists():
        raise ValueError(f"{path} exists: choose another name for the table.")
    template = names_template(source, weights)
    path.write_text(template, encoding="utf-8")
    left = counted(template.count(f'"{UNKNOWN}"  #'), "name")
    echo(f"Wrote {path} with {left} to fill in. Edit it, then run:\n  hf-vit inspect {source} --names {path}")


def _open_and_describe(source: str, options: "Options", as_json: bool = False) -> "Checkpoint":
    """Open a checkpoint, and print what it is."""
    from ..checkpoints.opening import open_checkpoint
    from ..inspection.facts import facts

    checkpoint = open_checkpoint(source, options)
    if as_json:
        rest = {
            "notes": checkpoint.notes,
            "assumed": checkpoint.assumed,
            "left_out": checkpoint.left_out,
            "config": checkpoint.config.to_dict(),
        }
        echo(json.dumps({**facts(checkpoint), **rest}))
        return checkpoint
    for name, fact in facts(checkpoint).items():
        echo("\n".join(hanging(f"{name:>21}  ", str(fact))))
    for kind, sentences in {"Note": checkpoint.notes, "Assumed": checkpoint.assumed}.items():
        for sentence in sentences:
            echo("\n".join(hanging(f"{kind}: ", sentence)))
    if checkpoint.left_out:
        names = shortened(checkpoint.left_out)
        number = counted(len(checkpoint.left_out), "tensor")
        echo("\n".join(hanging("", f"Skipped {number} outside of the encoder and its head: {names}")))
    return checkpoint
