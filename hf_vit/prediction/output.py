"""Files that predictions can be written to. Imports nothing heavy, so that a command can check its arguments first."""

import json
import re
from pathlib import Path

WITH_FEATURES = (".parquet", ".jsonl")
FORMATS = (".csv", ".tsv", ".jsonl", ".parquet")
# Columns or keys by which a result of an earlier call is recognized, which may be replaced.
WRITTEN = {
    "a table of predictions": {"image", "error"},
    "a table of search results": {"query", "rank", "error"},
    "a table of mistakes": {"image", "prediction", "confidence"},
    "a file of measurements": {"model", "data", "images_of_data"},
}


def check_output(output: Path, has_features: bool, is_half: bool = False) -> None:
    """Raise `ValueError` if the suffix is unknown or has no features, or the folder of the file does not exist."""
    if output.suffix not in FORMATS:
        raise ValueError(f"Expected --output to end in one of {', '.join(FORMATS)}; got {output}.")
    if has_features and output.suffix not in WITH_FEATURES:
        raise ValueError(f"Features are written to {' or '.join(WITH_FEATURES)} files only; got --output {output}.")
    if is_half and not (has_features and output.suffix == ".parquet"):
        raise ValueError(f"--half-features needs --features and a .parquet file; got --output {output}.")
    check_folder_of(output, "--output")


def check_folder_of(file: Path, option: str) -> None:
    """Raise `ValueError` if the folder of a file to be written does not exist."""
    if not file.absolute().parent.is_dir():
        raise ValueError(f"The folder of {option} {file} does not exist: create it first.")


def check_replaceable(file: Path, what: str = "a table of predictions", option: str = "--output") -> None:
    """Raise `ValueError` if a file exists and an earlier call cannot have written it; `what` is a key of `WRITTEN`."""
    if file.exists() and file.stat().st_size and not WRITTEN[what] <= _columns(file):
        raise ValueError(f"{file} exists and is not {what}: choose another {option}, or remove it first.")


def _columns(file: Path) -> set[str]:
    """Return the names of a table's columns, or the keys of a JSON object; none if it cannot be read."""
    try:
        if file.suffix == ".parquet":
            from pyarrow.parquet import read_schema

            return set(read_schema(file).names)
        with file.open(encoding="utf-8") as lines:
            text = lines.read() if file.suffix == ".json" else lines.readline()
        return set(json.loads(text)) if file.suffix in (".json", ".jsonl") else set(re.split("[,\t]", text.strip()))
    except (OSError, ValueError, TypeError):
        return set()
