"""The command line `hf-vit`: parse, call one function, print.

Commands import what they need when they run, so that help and lists appear at once.
"""

from typing import Annotated

import typer

from . import audits, data, environment, fitting, models, predictions, runs, serving
from .endings import clear_endings, echo
from .options import Command

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_show_locals=False,
    epilog="Exit codes: 0 on success; 2 for an error that you can fix (one line says how); 129, 130 or 143 "
    "if a signal stopped the run. An interrupted run is saved, and the same command resumes it.",
)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        from hf_vit import __version__

        echo(f"hf-vit {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """The Vision Transformer for Hugging Face: train, inspect and publish models.

    Example: hf-vit quickstart
    """


for command in (
    runs.quickstart,
    fitting.fit,
    runs.train,
    runs.recipes,
    audits.audit,
    predictions.evaluate,
    predictions.predict,
    audits.search,
    predictions.demo,
    serving.serve,
    models.push,
    models.convert,
    models.inspect,
    models.export,
    predictions.benchmark,
    runs.study,
    environment.env,
):
    app.command(cls=Command)(clear_endings()(command))

of_data = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Prepare data sets.\n\nExample: hf-vit data pack photos/ photos-256 --shorter-side 256",
)
of_data.command(cls=Command)(clear_endings()(data.pack))
of_data.callback()(lambda: None)  # otherwise a group of one command is that command
app.add_typer(of_data, name="data")
