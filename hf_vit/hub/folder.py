"""Which files of a folder are uploaded, and whether the folder is complete."""

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.dynamic_module_utils import get_relative_import_files

from ..model.configuration_hf_vit import CLASSES
from ..system.texts import has_token

# Files that a repository of a model may have, beside its code. Anything else is refused: optimizer states are large,
# and pickles such as Trainer's training_args.bin hold the user's token in plain text.
TRAVELS = (
    "README.md",
    "LICENSE*",
    ".gitattributes",
    "config.json",
    "preprocessor_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "metrics.json",
    "timing.json",
    "log.jsonl",
    "recipe.yaml",
    "*.png",
    "*.jpg",
    "*.svg",
    "images/*.png",
    "images/*.jpg",
)


# Folders beside a model that are left where they are: the run that it came from, and the client's own notes.
STAYS = ("adapter", "checkpoints", "checkpoint-*", "runs", ".git", ".cache")


# Names of files that hold secrets; they are refused by a sentence of their own.
SECRETS = (
    ".env*", "*.pem", "*.key", "*.p12", "*.pfx", "id_rsa*", "id_ed25519*", ".netrc", ".git-credentials", ".npmrc",
    ".pypirc", "*credential*", "*secret*", "*token*",
)  # fmt: skip


PROCESSOR_BACKENDS = ("torchvision", "pil")


def check_folder(folder: str | Path) -> list[str]:
    """Return the names of the files in a folder that is fit for the Hub.

    Fit is: weights that can be read, a config and a processor with a full `auto_map`, all the code that these name,
    a card, and nothing else but what `TRAVELS` lists; no token in any of it. Folders that `STAYS` lists are passed
    over.

    Raises:
        ValueError: Names everything that is missing or must not travel, and what to do.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give the one that `save_pretrained` wrote.")
    code, problems = _code(folder)
    problems += _unreadable_weights(folder)
    if not (folder / "README.md").is_file():
        problems.append("README.md, the card, is missing")
    names = _names_in(folder)
    if secret := [name for name in names if _is_secret(name) and name not in code and not _travels(name)]:
        problems.append(f"these look like secrets, which must never leave the machine: {', '.join(secret)}")
    ours = [name for name in names if name in code or _travels(name)]
    if leaking := [name for name in ours if _has_token(folder / name)]:
        problems.append(f"a token stands in {', '.join(leaking)}: remove it there, and revoke it")
    if foreign := [name for name in names if name not in ours and name not in secret]:
        problems.append(f"these must not travel, since training state may hold your token: {', '.join(foreign)}")
    if problems:
        raise ValueError(
            f"{folder} is not fit for the Hub:\n- "
            + "\n- ".join(problems)
            + "\nMove out what does not belong there, or write a fresh folder by `model.save_pretrained(folder)` and "
            "`processor.save_pretrained(folder)`."
        )
    return names


def copy_of_ours(source: str | Path, folder: str | Path) -> list[str]:
    """Copy from one folder into another what may travel, and return the names of what was left where it is."""
    source, folder = Path(source), Path(folder)
    code, _ = _code(source)
    left = []
    for name in _names_in(source):
        if name not in code and not _travels(name):
            left.append(name)
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source / name, folder / name)
    return left


def _names_in(folder: Path) -> list[str]:
    paths = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    return [path.as_posix() for path in paths if not _stays(path)]


def _stays(path: Path) -> bool:
    return len(path.parts) > 1 and any(fnmatch(path.parts[0], pattern) for pattern in STAYS)


def _is_secret(name: str) -> bool:
    return any(fnmatch(name.rsplit("/", 1)[-1].lower(), pattern) for pattern in SECRETS)


def _has_token(path: Path) -> bool:
    """Say whether a token stands in a file: anywhere, but of weights in what describes them alone."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little") if path.suffix == ".safetensors" else path.stat().st_size
        file.seek(0)
        data = file.read(min(8 + size, path.stat().st_size))
    return has_token(data.decode("utf-8", errors="replace"))


def _travels(name: str) -> bool:
    # A star in a pattern would match the slash of a folder, too.
    return any(fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in TRAVELS)


def _code(folder: Path) -> tuple[set[str], list[str]]:
    """Return the files of code that config and processor name, with all they import, and what is wrong there."""
    problems = []
    classes = _read(folder / "config.json").get("auto_map", {})
    if missing := sorted(CLASSES.keys() - classes):
        problems.append(f"config.json: its auto_map lacks {', '.join(missing)}")
    processors = _read(folder / "preprocessor_config.json").get("auto_map", {}).get("AutoImageProcessor")
    if not isinstance(processors, dict):
        problems.append("preprocessor_config.json: its auto_map must name a processor for each backend")
        processors = {}
    if missing := [backend for backend in PROCESSOR_BACKENDS if backend not in processors]:
        problems.append(f"preprocessor_config.json: its auto_map lacks the backends {', '.join(missing)}")
    code: set[str] = set()
    for reference in [*classes.values(), *processors.values()]:
        entry = folder / f"{reference.partition('.')[0]}.py"
        code.add(entry.name)
        try:
            code.update(Path(file).name for file in get_relative_import_files(entry))
        except FileNotFoundError as error:
            problems.append(f"{Path(error.filename).name}, code of {reference}, is missing")
    return code, list(dict.fromkeys(problems))


def _weights(folder: Path) -> list[str]:
    index = _read(folder / "model.safetensors.index.json")
    return sorted(set(index["weight_map"].values())) if index else ["model.safetensors"]


def _unreadable_weights(folder: Path) -> list[str]:
    problems = []
    for name in _weights(folder):
        try:
            with safe_open(folder / name, framework="pt"):
                pass
        except FileNotFoundError:
            problems.append(f"{name} is missing")
        except SafetensorError as error:
            problems.append(f"{name} is not a complete safetensors file: {error}")
    return problems


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
