"""What a fit has finished so far, in `output_dir/fit`, so that the same command continues an interrupted one."""

import json
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from ...system.disk import check_output_folder, same_place

FIT, STATE = "fit", "state.json"  # folder in output_dir, and a file in it
# What does not depend on the time that a fit has.
KEPT = ("identity", "evaluation_seconds", "forward_seconds", "head", "speed")


def check_fit_folder(output_dir: Path, model: str, sources: str | list[str]) -> None:
    """Raise `ValueError` if a folder holds the model to start from, or files that do not belong to a fit."""
    if Path(model).resolve() == output_dir.resolve():
        raise ValueError(f"{output_dir} holds the model to start from: choose another --output-dir.")
    check_output_folder(output_dir, (output_dir / FIT / STATE).is_file(), sources)


class FitState:
    """Results of finished steps: plain values in one JSON file, and tensors in files of their own.

    Args:
        folder: `output_dir/fit`.
        identity: The arguments that decide the result, apart from the time.
        began: `time.perf_counter()` at the start of the command; now if not given.

    Raises:
        ValueError: If the folder holds a fit with other arguments.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], began: float | None = None) -> None:
        self.folder, self.path = folder, folder / STATE
        self.began = time.perf_counter() if began is None else began
        self.values: dict[str, Any] = {"identity": identity, "seconds": 0.0}
        if self.path.is_file():
            self.values = json.loads(self.path.read_text(encoding="utf-8"))
            saved = self.values["identity"]
            if changed := [
                f"{name} {saved.get(name)!r} -> {value!r}"
                for name, value in identity.items()
                if not same_place(saved.get(name), value)
            ]:
                raise ValueError(
                    f"{folder.parent} holds a fit with other arguments ({'; '.join(changed)}): choose another "
                    "--output-dir for a new fit, or repeat the earlier command to resume that one."
                )
        self.before = float(self.values["seconds"])

    @property
    def seconds(self) -> float:
        """Seconds that this fit has taken so far, including its earlier parts."""
        return self.before + time.perf_counter() - self.began

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    def put(self, **values: Any) -> None:
        """Add values, and write all of them."""
        self.values.update(values)
        self.write()

    def reopen(self) -> None:
        """Continue a finished fit: forget the race, and keep what more time does not change.

        Its minutes count anew, so that as many more as it said to need are enough, whatever its start takes.
        """
        self.values = {name: value for name, value in self.values.items() if name in KEPT}
        self.before = 0.0
        self.write()

    def write(self) -> None:
        """Write the file, completely or not at all."""
        self.values["seconds"] = round(self.seconds, 1)
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(self.values, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(self.path)

    def put_tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Write tensors into a file, completely or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self.folder / f"{name}.unfinished"
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, unfinished)
        unfinished.replace(self.folder / f"{name}.safetensors")

    def tensors(self, name: str) -> dict[str, Tensor] | None:
        """Return the tensors of a file, or `None` if it does not exist."""
        path = self.folder / f"{name}.safetensors"
        return load_file(path) if path.is_file() else None


def stable(value: Any) -> Any:
    """Return a value as JSON gives it back, so that identities can be compared."""
    return json.loads(json.dumps(value, default=str))
