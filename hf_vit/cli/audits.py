"""Commands that look at data: audit and search."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ..system.places import check_exist
from ..system.texts import shortened
from .endings import announce, echo, read_size
from .fitting import EvalSplit, FeatureCache, ImageColumn, ImageSize, LabelColumn, Seed, TrainSplit
from .predictions import LabelSeparator


def audit(
    data: Annotated[
        list[str],
        typer.Argument(metavar="DATA", help="Images: folder, table, archive, parquet, or a name on the Hub."),
    ],
    model: Annotated[
        str | None, typer.Option(help="Trained encoder or classifier. Default: none; skips checks that need one.")
    ] = None,
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Folder for the results.")] = Path("audit"),
    image_size: ImageSize = None,
    train_split: TrainSplit = None,
    eval_split: EvalSplit = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    label_separator: LabelSeparator = None,
    task: Annotated[
        Literal["classification", "multi_label", "regression", "segmentation", "detection"] | None,
        typer.Option(help="Type of the labels. Default: inferred from the labels."),
    ] = None,
    cache: FeatureCache = None,
    seed: Seed = 0,
) -> None:
    """Find wrong labels, duplicates and leaks in images.

    Without --model: unreadable, tiny and blank images, exact and near duplicates, leaks between the training and the
    evaluation split, and whether size, file or color reveal the class. With it, also labels that are probably wrong,
    outliers, weak slices, and the accuracy without leaks. Writes a page with pictures, a table of findings, and
    cleaned data for hf-vit train.

    Example: hf-vit audit my_pictures/ --model facebook/dinov2-small -o audit
    """
    check_exist(data, model)
    from ..training.audit_report import PAGE, check_audit_folder, write_audit

    check_audit_folder(output_dir, data)
    announce(f"Auditing {shortened(data)}.")
    from ..training.auditing import audit

    result = audit(
        data[0] if len(data) == 1 else data,
        model,
        image_size=read_size("--image-size", image_size),
        train_split=train_split,
        eval_split=eval_split,
        image_column=image_column,
        label_column=label_column,
        label_separator=label_separator,
        task=task,
        cache=cache,
        seed=seed,
        say=echo,
    )
    for line in write_audit(result, output_dir):
        echo(line)
    echo(f"Wrote {output_dir}: see {output_dir / PAGE}.")


def search(
    index: Annotated[
        Path, typer.Argument(metavar="INDEX", help="Table of features: a .parquet file of hf-vit predict.")
    ],
    images: Annotated[list[str], typer.Argument(metavar="IMAGE", help="Query images: files, folders or globs.")],
    neighbors: Annotated[int, typer.Option("-k", min=1, metavar="N", help="Number of neighbors per image.")] = 10,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Table: .csv, .tsv, .jsonl or .parquet.")
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Page with pictures.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Path or Hub name of the table's model. Default: the one recorded in the table."),
    ] = None,
) -> None:
    """Find the most similar images in a table of features.

    The score is the cosine similarity of the features of a model, from -1 to 1. Write the table once with hf-vit
    predict MODEL IMAGES --features -o index.parquet; queries are embedded by the same model in the same way.

    Example: hf-vit search index.parquet photo.jpg -k 5 --html similar.html
    """
    from ..prediction.output import check_folder_of, check_output, check_replaceable

    if output is not None:
        check_output(output, False)
        check_replaceable(output, "a table of search results")
    if html is not None:
        check_folder_of(html, "--html")
    check_exist([str(index), *images], model)
    from ..data.sources import files_of
    from ..prediction.search import FeatureIndex, write_results

    files = [str(file) for file in files_of(images)]
    if not files:
        raise ValueError(f"Found no images in {shortened(images)}.")
    found = FeatureIndex(index).search(files, neighbors, model)
    for result in found:
        for each in result.neighbors:
            echo(f"{result.query}  {each.score:.4f}  {each.image}{f'  {each.label}' * bool(each.label)}")
        if result.error is not None:
            echo(result.error, err=True)
    if output is not None:
        write_results(found, output)
        echo(f"Wrote {output}", err=True)
    if html is not None:
        from ..inspection.search_page import write_search_page

        write_search_page(html, f"Search in {index.name}", found, index.parent)
        echo(f"Wrote {html}", err=True)
