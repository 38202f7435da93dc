"""Files that predictions can be written to. Imports nothing heavy, so that a command can check its arguments first."""

import json
from pathlib import Path

WITH_FEATURES = (".parquet", ".jsonl")
FORMATS = (".csv", ".tsv", ".jsonl", ".parquet")


def check_output(output: Path, has_features: bool, is_half: bool = False) -> None:
    """Raise `ValueError` if the suffix is unknown or has no features, or the folder of the file does not exist."""
    if output.suffix not in FORMATS:
        raise ValueError(f"Expected --output to end in one of {', '.join(FORMATS)}; got {output}.")
    if has_features and output.suffix not in WITH_FEATURES:
        raise ValueError(f"Features are written to {' or '.join(WITH_FEATURES)} files only; got --output {output}.")
    if is_half and not (has_features and output.suffix == ".parquet"):
        raise ValueError(f"--half-features needs --features and a .parquet file; got --output {output}.")
    if not output.absolute().parent.is_dir():
        raise ValueError(f"The folder of --output {output} does not exist: create it first.")


def check_replaceable(output: Path) -> None:
    """Raise `ValueError` if a file exists and is not a table of predictions: it may list the images themselves."""
    if output.exists() and output.stat().st_size and not {"image", "error"} <= _columns(output):
        raise ValueError(
            f"{output} exists and is not a table of predictions: choose another --output, or remove it first."
        )


def _columns(table: Path) -> set[str]:
    """Return the names of a table's columns; none if it cannot be read."""
    try:
        if table.suffix == ".parquet":
            from pyarrow.parquet import read_schema

            return set(read_schema(table).names)
        with table.open(encoding="utf-8") as file:
            first = file.readline()
        return set(json.loads(first)) if table.suffix == ".jsonl" else set(first.strip().replace("\t", ",").split(","))
    except (OSError, ValueError, TypeError):
        return set()
