"""Files that predictions can be written to. Imports nothing heavy, so that a command can check its arguments first."""

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
