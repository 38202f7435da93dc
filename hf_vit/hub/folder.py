"""Check that a folder is complete, and select the files to upload."""

import json
import re
import shutil
from fnmatch import fnmatch
from importlib.metadata import requires
from importlib.resources import files
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.dynamic_module_utils import get_relative_import_files

from ..model.configuration_hf_vit import CLASSES
from ..system.places import is_junk
from ..system.texts import counted, has_token, shortened

# Files of a model's repository apart from its code. All others are rejected: optimizer states are large, and pickles
# such as Trainer's training_args.bin hold the user's token in plain text.
UPLOADED = (
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
    "handler.py",
    "requirements.txt",
    "*.png",
    "*.jpg",
    "*.svg",
    "images/*.png",
    "images/*.jpg",
)

# Folders that are ignored: the run that a model came from, its last model, and files of git and of the Hub's client.
IGNORED = ("adapter", "checkpoints", "checkpoint-*", "fit", "last", "runs", ".git", ".cache")

# Files of a run that stay here: they name the images of its user.
LOCAL = ("mistakes.csv",)

# Names of files that may hold secrets, which have an error of their own.
SECRETS = (
    ".env*", "*.pem", "*.key", "*.p12", "*.pfx", "id_rsa*", "id_ed25519*", ".netrc", ".git-credentials", ".npmrc",
    ".pypirc", "*credential*", "*secret*", "*token*",
)  # fmt: skip

HANDLER = "handler.py"
NEEDED = ("transformers", "torch", "torchvision", "safetensors")  # by the handler, of what this package requires
LISTED = 10  # files in an error
PROCESSOR_BACKENDS = ("torchvision", "pil")


def check_folder(folder: str | Path) -> list[str]:
    """Check that a folder can be uploaded, and return the names of its files.

    It must have readable weights, config and processor with a complete `auto_map`, all code that these name, and a
    model card. It must have no other files than `UPLOADED`, and no token in any of them. It skips `IGNORED` folders,
    `LOCAL` files, and what operating systems leave in folders.

    Raises:
        ValueError: Names everything that is missing or must not be uploaded, and what to do.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise ValueError(f"{folder} {what}: pass the folder of a model that `save_pretrained` wrote.")
    names = files_in(folder)
    if "config.json" not in names and not any(name.endswith(".safetensors") for name in names):
        raise ValueError(
            f"{folder} holds no model: expected config.json, weights and a model card, as `hf-vit train` and "
            f"`save_pretrained` write them; found {_some(names)}."
        )
    code, problems = _code(folder)
    problems += _unreadable_weights(folder)
    if not (folder / "README.md").is_file():
        problems.append("README.md, the model card, is missing")
    if secret := [name for name in names if _is_secret(name) and name not in code and not _is_uploaded(name)]:
        problems.append(f"these look like secrets, which must not be uploaded: {_some(secret)}")
    ours = [name for name in names if name in code or _is_uploaded(name)]
    if leaking := [name for name in ours if _has_token(folder / name)]:
        problems.append(f"there is a token in {', '.join(leaking)}: remove it from there, and revoke it")
    if foreign := [name for name in names if name not in ours and name not in secret]:
        problems.append(f"these do not belong to a model, and training state may hold your token: {_some(foreign)}")
    if problems:
        raise ValueError(
            f"{folder} cannot be uploaded to the Hub:\n- "
            + "\n- ".join(problems)
            + "\nMove other files out of the folder, or write a new one with `model.save_pretrained(folder)` and "
            "`processor.save_pretrained(folder)`."
        )
    return names


def write_handler(folder: Path) -> list[str]:
    """Write the handler of Inference Endpoints and its requirements into a folder; return the names of the files.

    Raises:
        ValueError: If the folder has another file of one of these names.
    """
    versions = [each for each in requires("hf-vit") or () if re.split(r"[^\w-]", each)[0] in NEEDED]
    contents = {
        HANDLER: (files(__package__) / "handler_template.txt").read_text(encoding="utf-8"),
        "requirements.txt": "".join(f"{each}\n" for each in versions),
    }
    for name, content in contents.items():
        if (folder / name).exists() and (folder / name).read_text(encoding="utf-8") != content:
            raise ValueError(f"{folder} has its own {name}: remove it, or push without --with-handler.")
    for name, content in contents.items():
        (folder / name).write_text(content, encoding="utf-8")
    return list(contents)


def copy_of_ours(source: str | Path, folder: str | Path) -> list[str]:
    """Copy the files that can be uploaded to another folder, and return the names of the others."""
    source, folder = Path(source), Path(folder)
    code, _ = _code(source)
    left = []
    for name in files_in(source):
        if name not in code and not _is_uploaded(name):
            left.append(name)
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source / name, folder / name)
    return left


def files_in(folder: Path) -> list[str]:
    paths = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    return [path.as_posix() for path in paths if not _is_ignored(path)]


def _some(names: list[str]) -> str:
    """Return up to ten names, and how many there are if there are more."""
    if not names:
        return "no files"
    return ", ".join(names) if len(names) <= LISTED else f"{counted(len(names), 'file')}, such as {shortened(names)}"


def _is_ignored(path: Path) -> bool:
    return (
        any(map(is_junk, path.parts))
        or path.as_posix() in LOCAL
        or (len(path.parts) > 1 and any(fnmatch(path.parts[0], pattern) for pattern in IGNORED))
    )


def _is_secret(name: str) -> bool:
    return any(fnmatch(name.rsplit("/", 1)[-1].lower(), pattern) for pattern in SECRETS)


def _has_token(path: Path) -> bool:
    """Return whether a file contains a token; of safetensors, only the header is searched."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little") if path.suffix == ".safetensors" else path.stat().st_size
        file.seek(0)
        data = file.read(min(8 + size, path.stat().st_size))
    return has_token(data.decode("utf-8", errors="replace"))


def _is_uploaded(name: str) -> bool:
    # A star in a pattern would also match the slash after a folder.
    return any(fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in UPLOADED)


def _code(folder: Path) -> tuple[set[str], list[str]]:
    """Return the code files that config and processor name, with their imports, and a list of problems."""
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
            problems.append(f"{Path(error.filename).name}, the code of {reference}, is missing")
    return code, list(dict.fromkeys(problems))


def weight_files(folder: Path) -> list[str]:
    """Return the names of the files with a model's weights, in one file or in shards."""
    index = _read(folder / "model.safetensors.index.json")
    return sorted(set(index["weight_map"].values())) if index else ["model.safetensors"]


def _unreadable_weights(folder: Path) -> list[str]:
    problems = []
    for name in weight_files(folder):
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
