"""To the Hub: a folder's card, what must be in it, what must not, its upload, also while a run goes on.

The folder itself is what `save_pretrained` of any model of this package writes: weights, config, processors, code.
"""

import json
import math
import platform
import re
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from importlib.resources import files
from pathlib import Path
from typing import cast
from urllib.parse import quote

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
    get_session,
)
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import disable_progress_bars, validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import logging

from .model.configuration_hf_vit import CLASSES, HFViTConfig
from .system.machine import _version
from .system.network import is_final, pause_after, sentence_of
from .system.texts import has_token, markdown, one_line, shell_word, visible, without_tokens

logger = logging.get_logger(__name__)

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
# Left over in a repository from an earlier push, these would be loaded or run in place of the new ones.
REPLACED = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.py")
# Names of files that hold secrets; they are refused by a sentence of their own.
SECRETS = (
    ".env*", "*.pem", "*.key", "*.p12", "*.pfx", "id_rsa*", "id_ed25519*", ".netrc", ".git-credentials", ".npmrc",
    ".pypirc", "*credential*", "*secret*", "*token*",
)  # fmt: skip
PROCESSOR_BACKENDS = ("torchvision", "pil")
SILENCE = 120  # seconds without a byte after which a connection is given up
# What a figure needs to be measured again.
PROVENANCE = ("command", "hardware", "seeds")

# Identifiers that the Hub knows; "other" takes a licence of its own.
LICENSES = """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0
    etalab-2.0 eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0
    grok2-community h-research intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2
    llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openmdw-1.0 openrail openrail++ osl-3.0
    other pddl postgresql unknown unlicense wtfpl zlib
"""


# ---------------------------------------------------------------------------------------------------- the card


def write_card(
    folder: str | Path,
    *,
    title: str | None = None,
    description: str = "",
    results: Mapping[str, float] | None = None,
    measured: Mapping[str, str] | None = None,
    dataset: str | None = None,
    dataset_id: str | None = None,
    split: str = "test",
    sections: Mapping[str, str] | None = None,
    images: Sequence[str] = (),
    license: str = "apache-2.0",
    base_model: str | None = None,
) -> Path:
    """Write `folder/README.md`, in place of the card that `save_pretrained` wrote.

    Args:
        folder: What `save_pretrained` wrote; architecture, labels and number of parameters are read there.
        title: Heading; the folder's name if not given.
        description: First paragraph, Markdown.
        results: Figures that were measured on this very model, by the Hub's name of the metric: `{"accuracy": 0.981}`.
        measured: How: `command`, `hardware` (see `machine`) and `seeds` at least; versions are added.
        dataset: Name of the data for people; needed for results.
        dataset_id: Its name on the Hub, if it has one.
        split: Part of the data that the results were measured on.
        sections: More text by heading, Markdown.
        images: Names of pictures in the folder, shown at the end.
        license: The Hub's identifier of the licence of the weights.
        base_model: Name on the Hub of the model that this one was fine-tuned from.

    Raises:
        ValueError: For figures without their origin, and for front matter that the Hub would refuse.
    """
    folder = Path(folder)
    results, measured = dict(results or {}), dict(measured or {})
    _check_results(results, measured, dataset)
    _check_front_matter(license, dataset_id, base_model)
    if missing := [image for image in images if not (folder / image).is_file()]:
        raise ValueError(f"Pictures that are not in {folder}: {', '.join(missing)}. Save them there first.")

    config = HFViTConfig.from_pretrained(folder)
    is_classifier = any(name.endswith("ForImageClassification") for name in config.architectures or ())
    task = "image-classification" if is_classifier else "image-feature-extraction"
    title = title or folder.resolve().name
    evaluations = [
        EvalResult(
            task_type=task,
            dataset_type=dataset_id or "custom",
            dataset_name=str(dataset),
            dataset_split=split,
            metric_type=metric,
            metric_value=value,
        )
        for metric, value in results.items()
    ]
    card = ModelCard.from_template(
        ModelCardData(
            license=license,
            library_name="transformers",
            pipeline_tag=task,
            tags=["vision-transformer", "hf_vit"],
            datasets=[dataset_id] if dataset_id else None,
            base_model=base_model,
            metrics=list(results) or None,
            model_name=title if results else None,
            eval_results=evaluations or None,
        ),
        template_str=(files(__package__) / "model_card_template.md").read_text(encoding="utf-8"),
        title=markdown(title),
        name=_in_quotes(folder.resolve().name),
        description=description,
        config=config,
        image_shape=config.image_shape,
        patch_shape=config.patch_shape,
        labels=[markdown(str(label)) for label in (config.id2label or {}).values()] if is_classifier else [],
        parameters=sum(_parameters(folder)),
        results=results,
        measured={**measured, "versions": versions()},
        dataset=markdown(str(dataset)),
        split=markdown(split),
        sections=sections or {},
        images={markdown(image): quote(image) for image in images},
    )
    path = folder / "README.md"
    path.write_text(without_tokens(card.content) + "\n", encoding="utf-8")
    return path


def versions() -> str:
    """Return the versions of what computed the figures."""
    names = ("hf-vit", "torch", "transformers", "accelerate")
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {_version(name)}" for name in names)])


def _check_results(results: Mapping[str, float], measured: Mapping[str, str], dataset: str | None) -> None:
    if not results:
        return
    if missing := [name for name in PROVENANCE if name not in measured]:
        raise ValueError(
            f"Results need to say how they were measured: `measured` has {sorted(measured)} and lacks "
            f"{missing}. Give all of {list(PROVENANCE)}, or leave the results out."
        )
    if dataset is None:
        raise ValueError("Results need the name of the data they were measured on: set `dataset`.")
    if broken := [metric for metric, value in results.items() if not math.isfinite(value)]:
        raise ValueError(f"Results must be finite numbers; these are not: {broken}. Look into the run before pushing.")


def _check_front_matter(license: str, dataset_id: str | None, base_model: str | None) -> None:
    # The Hub refuses a card at the push, behind the training; here it costs nothing.
    if license not in LICENSES.split():
        raise ValueError(
            f"license must be an identifier of the Hub such as 'apache-2.0' or 'cc-by-nc-4.0', got {license!r}; "
            "use 'other' for any other licence."
        )
    for field, name in {"dataset_id": dataset_id, "base_model": base_model}.items():
        try:
            if name is not None:
                validate_repo_id(name)
        except HFValidationError as error:
            raise ValueError(f"{field} must be a name on the Hub such as 'user/name', got {name!r}: {error}") from None


def _parameters(folder: Path) -> Iterator[int]:
    """Yield the number of elements of every tensor in the folder's weights."""
    for name in _weights(folder):
        with safe_open(folder / name, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 -- not a dictionary
                yield math.prod(tensors.get_slice(key).get_shape())


def _in_quotes(name: str) -> str:
    """Return a name as it stands between the double quotes of code."""
    return json.dumps(visible(name), ensure_ascii=False)[1:-1]


# ---------------------------------------------------------------------------------------------------- the push


class BackgroundPush:
    """Pushes to one repository from a thread, so that a run neither waits for the Hub nor ends by it.

    One push is under way and at most one waits: a newer state takes the place of an older one that waits, or that
    failed and would be tried again. A push that fails is tried again after each of `waits`, unless it would fail
    again for certain; then it is said and given up, and the next state has its own tries.

    Args:
        repo_id: As for `push`, as are `private` and `token`.
        say: Prints a line.
        waits: Seconds before each new try; the client itself tries single requests for about half a minute.
    """

    def __init__(
        self,
        repo_id: str,
        private: bool = False,
        say: Callable[[str], None] = print,
        token: str | None = None,
        waits: Sequence[float] = (5, 30, 120),
    ) -> None:
        self.repo_id, self.private, self.say, self.token, self.waits = repo_id, private, say, token, waits
        self.url: str | None = None
        self.state = threading.Condition()
        self.waiting: tuple[Path, str] | None = None
        self.is_busy = False
        self.is_current = False  # whether the newest state that was submitted is on the Hub
        self.snapshots = tempfile.mkdtemp(prefix="hf-vit-push-")
        weakref.finalize(self, shutil.rmtree, self.snapshots, ignore_errors=True)  # at the end of the process, too
        # A daemon: the end of the process does not wait for the Hub.
        threading.Thread(target=self._work, name="push", daemon=True).start()

    def submit(self, write: Callable[[Path], None], message: str) -> None:
        """Have `write` fill an empty folder with what is to be pushed, and push that when its turn comes."""
        folder = None
        try:
            folder = Path(tempfile.mkdtemp(dir=self.snapshots))
            write(folder)
        except Exception as error:  # a full disk, say: no reason to end a run
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            self._give_up(message, error)
            with self.state:
                self.is_current = False
            return
        with self.state:
            if self.waiting is not None:
                shutil.rmtree(self.waiting[0], ignore_errors=True)
            self.waiting = folder, message
            self.is_current = False
            self.state.notify_all()

    def finish(self, timeout: float | None = None) -> bool:
        """Wait until nothing is under way, `timeout` seconds at most; say whether the newest state is on the Hub."""
        with self.state:
            self.state.wait_for(lambda: self.waiting is None and not self.is_busy, timeout)
            return self.is_current

    def _work(self) -> None:
        while True:
            with self.state:
                self.state.wait_for(lambda: self.waiting is not None)
                folder, message = cast(tuple[Path, str], self.waiting)
                self.waiting, self.is_busy = None, True
            is_pushed = self._try(folder, message)
            shutil.rmtree(folder, ignore_errors=True)
            with self.state:
                self.is_busy = False
                self.is_current = is_pushed and self.waiting is None
                self.state.notify_all()

    def _try(self, folder: Path, message: str) -> bool:
        disable_progress_bars()  # a bar for every upload would break up that of the run
        for wait in (*self.waits, None):
            try:
                self.url = push(folder, self.repo_id, private=self.private, message=message, token=self.token)
                return True
            except Exception as error:  # whatever it is, the run is worth more than the push
                if wait is None or is_final(error):
                    self._give_up(message, error)
                    return False
                pause = max(wait, pause_after(error))
            with self.state:
                if self.state.wait_for(lambda: self.waiting is not None, pause):
                    return False
        return False

    def _give_up(self, message: str, error: Exception) -> None:
        reason = sentence_of(error) or f"{type(error).__name__}: {error}"
        line = f"{message} was not pushed to {self.repo_id}, the run goes on. {reason}"
        self.say(one_line(without_tokens(line, self.token)))


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str = "Upload model",
    token: str | None = None,
) -> str:
    """Upload a folder to the Hub and return the address of the repository.

    The repository is created if need be; weights and code that it held from an earlier push and that the folder has
    not are removed in the same commit. All of it is one commit, on top of what was there when the push began: whatever
    interrupts a push, the repository is as before or as the folder, and the same push may be done again. The example
    on the card there names the repository.

    Args:
        folder: What `save_pretrained` wrote, with a card; see `check_folder`.
        repo_id: `"user/name"`, or `"name"` for the user that the token belongs to.
        private: Whether a new repository is private; one that exists is left as it is.
        revision: Branch to push to, made if need be; the main one if not given.
        message: Of the commit.
        token: To write with; the one of `hf auth login` or `HF_TOKEN` if not given.

    Raises:
        ValueError: If the folder is not complete, or holds what must not travel.
        HfHubHTTPError: If the Hub refuses; 412 where somebody else has pushed meanwhile.
    """
    folder = Path(folder)
    names = check_folder(folder)
    api = HfApi(token=token)
    client = get_session()
    if client.timeout.read is None:  # a Hub that falls silent would be waited for without end
        client.timeout = SILENCE
    url = api.create_repo(repo_id, private=private, exist_ok=True)
    if revision is not None:
        api.create_branch(url.repo_id, branch=revision, exist_ok=True)
    before = api.model_info(url.repo_id, revision=revision)
    there = [file.rfilename for file in before.siblings or ()]
    stale = [name for name in there if name not in names and any(fnmatch(name, pattern) for pattern in REPLACED)]
    card = (folder / "README.md").read_text(encoding="utf-8")
    contents = {"README.md": _card_for(card, folder, url.repo_id).encode()}
    additions = [CommitOperationAdd(name, contents.get(name, folder / name)) for name in names]
    for addition in additions:
        if addition.path_in_repo.endswith(".safetensors"):
            # One by one: several at once would go by threads that the end of the process waits for.
            api.preupload_lfs_files(url.repo_id, [addition], revision=revision)
    api.create_commit(
        url.repo_id,
        [*(CommitOperationDelete(name) for name in stale), *additions],
        commit_message=message,
        revision=revision,
        parent_commit=before.sha,  # two pushes at once must not become a mixture
    )
    return str(url)


def _card_for(card: str, folder: Path, repo_id: str) -> str:
    """Return a card whose examples name the repository instead of the folder that it was written for."""
    example = re.search(r'pipeline\("[a-z-]+", "((?:[^"\\/]|\\.)+)"', card)
    name = example[1] if example else _in_quotes(folder.resolve().name)
    in_code, in_shell = re.escape(f'"{name}"'), re.escape(shell_word(name))
    # As an argument alone: a label, or a task, may have the same name.
    calls = rf'(pipeline\("[a-z-]+", |from_pretrained\(){in_code}|(--model ){in_shell}'
    return re.sub(calls, lambda match: f'{match[1] or match[2]}"{repo_id}"', card)


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
