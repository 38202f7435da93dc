"""The check of a GPU: `hf-vit benchmark gpu`."""

import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import date
from pathlib import Path

import torch

from ..benchmark.gpu import KINDS, GPUChecks, free_memory_of_device
from ..benchmark.table import describe
from ..system.checks import FAILED, Check, Row, markdown_table, run_checks, summary
from ..system.machine import hardware, installed_versions, slug
from ..system.stopping import Interrupted
from ..training.gpu import TrainingChecks


def check_gpu(
    is_tiny: bool, minutes: float, output_dir: Path | None, command: str, say: Callable[[str], None]
) -> bool:
    """Check the GPU of this machine, and print a line per check.

    Args:
        is_tiny: Whether to run at tiny sizes, on the CPU if there is no GPU.
        minutes: Time limit. Checks for which no time is left are not run.
        output_dir: Folder for the results as JSON and as a Markdown table.
        command: Command line to record.
        say: Prints a line.

    Returns:
        Whether no check failed.

    Raises:
        ValueError: If there is no GPU, unless `is_tiny`.
        Interrupted: If SIGINT, SIGTERM or SIGHUP came.
    """
    if not torch.cuda.is_available() and not is_tiny:
        raise ValueError("Found no CUDA GPU: run this on a machine that has one. --quick tries the checks on a CPU.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for exact resume; read once, when cuBLAS starts
    machine, installed = hardware(), installed_versions(("hf-vit", "torch", "transformers", "timm", "torchao"))
    say("\n".join([*describe(machine, installed), ""]))
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="hf-vit-gpu-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for row in run_checks(_checks(Path(folder), device, is_tiny), minutes, free_memory_of_device):
                say("\n".join(row.lines()))
                rows.append(row)
        except Interrupted as stop:  # of a run in a folder that goes away
            raise Interrupted(stop.exit_code - 128, "Stopped; the checks leave no files.", can_resume=False) from None
    say(f"\n{summary(rows)}")
    if output_dir is not None:
        output_dir.mkdir(parents=True, exist_ok=True)
        path = output_dir / f"{slug(machine)}-{date.today().isoformat()}-gpu"
        facts = {"command": command, "hardware": machine, "versions": installed}
        content = json.dumps({**facts, "rows": [asdict(row) for row in rows]}, indent=1)
        path.with_suffix(".json").write_text(content + "\n", encoding="utf-8")
        lines = ["```bash", command, "```", "", *describe(machine, installed), "", *markdown_table(rows)]
        path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
        say(f"Wrote {path}.json and {path.name}.md.")
    return not any(row.verdict == FAILED for row in rows)


def _checks(folder: Path, device: torch.device, is_tiny: bool) -> Iterator[Check]:
    """Yield all checks; what is compiled for its outputs alone comes last, since it takes longest."""
    of_models, of_training = GPUChecks(device, is_tiny), TrainingChecks(folder, device, is_tiny)
    agreement = list(of_models.agreement())
    yield from (check for check in agreement if not KINDS[check.name].is_compiled)
    yield from of_training.waits()
    yield from of_training.resume()
    yield from of_models.speed()
    yield from of_training.runs()
    yield from (check for check in agreement if KINDS[check.name].is_compiled)
