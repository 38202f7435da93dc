"""Push a folder to the Hub, also in the background of a run.

The folder is what `save_pretrained` of any model of this package writes: weights, config, processors, code.
"""

import re
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import cast

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_session, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import disable_progress_bars, validate_repo_id
from transformers.utils import logging

from ..system.network import is_final, pause_after, sentence_of
from ..system.texts import one_line, shell_word, without_tokens
from .card import in_quotes, state_license
from .folder import HANDLER, check_folder, write_handler

logger = logging.get_logger(__name__)

# Files of an earlier push that would be loaded or run instead of the new ones.
REPLACED = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.py")
ABOUT_HANDLER = """
## Inference Endpoints

`handler.py` answers the requests of a [dedicated endpoint](https://huggingface.co/docs/inference-endpoints):
`{"inputs": "<image in base64>", "parameters": {"top_k": 5}}`. The parameters are those of the pipeline.
"""
SILENCE = 120  # seconds without a byte until a connection is closed


class BackgroundPush:
    """Push to one repository from a thread, so that a run neither waits for the Hub nor fails with it.

    At most one push runs and one waits: a newer state replaces an older one that waits or would be retried. A failed
    push is retried after each of `waits`, unless the error is permanent. Then the error is printed, and the next state
    starts with all retries.

    Args:
        repo_id: As for `push`, like `private` and `token`.
        say: Prints a line.
        waits: Seconds before each retry; the client itself retries single requests for about half a minute.
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
        self.is_current = False  # whether the newest submitted state is on the Hub
        self.snapshots = tempfile.mkdtemp(prefix="hf-vit-push-")
        weakref.finalize(self, shutil.rmtree, self.snapshots, ignore_errors=True)  # also at the end of the process
        # A daemon, so that the process can end without waiting for the Hub.
        threading.Thread(target=self._work, name="push", daemon=True).start()

    def submit(self, write: Callable[[Path], None], message: str) -> None:
        """Call `write` with an empty folder, and queue its content to be pushed."""
        folder = None
        try:
            folder = Path(tempfile.mkdtemp(dir=self.snapshots))
            write(folder)
        except Exception as error:  # such as a full disk, which must not end the run
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
        """Wait up to `timeout` seconds for all pushes, and return whether the newest state is on the Hub."""
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
        disable_progress_bars()  # bars of uploads would interrupt the run's progress bar
        for wait in (*self.waits, None):
            try:
                self.url = push(folder, self.repo_id, private=self.private, message=message, token=self.token)
                return True
            except Exception as error:  # no failed push may end the run
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
        line = f"{message} was not pushed to {self.repo_id}; the run continues. {reason}"
        self.say(one_line(without_tokens(line, self.token)))


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    license: str | None = None,
    with_handler: bool = False,
    revision: str | None = None,
    message: str = "Upload model",
    token: str | None = None,
) -> str:
    """Upload a folder to the Hub and return the URL of the repository.

    The repository is created if it does not exist. The push is a single commit, which also deletes weights and code
    of an earlier push that are not in the folder: an interrupted push leaves the repository unchanged and can be
    repeated. The examples in the uploaded model card name the repository.

    Args:
        folder: Folder written by `save_pretrained`, with a model card; see `check_folder`.
        repo_id: `"user/name"`, or `"name"` for the owner of the token.
        private: Whether a new repository is private; an existing one is not changed.
        license: The Hub's identifier of a licence, which is written into the model card of the folder; the card keeps
            what it states if not given.
        with_handler: Whether to add `handler.py` and its requirements to the folder, for Inference Endpoints.
        revision: Branch to push to, created if it does not exist; `main` by default.
        message: Commit message.
        token: Token with write access; by default that of `hf auth login` or `HF_TOKEN`.

    Raises:
        ValueError: If the folder is incomplete, or has files that must not be uploaded; if the repository has no
            user, or the Hub must not be used (`HF_HUB_OFFLINE`).
        HfHubHTTPError: If the Hub rejects the push; 412 if there was another push at the same time.
    """
    folder = Path(folder)
    names = check_folder(folder)
    _check_target(repo_id, token)
    if with_handler:
        names = sorted({*names, *write_handler(folder)})
    if license is not None:
        state_license(folder / "README.md", license)
    api = HfApi(token=token)
    client = get_session()
    if client.timeout.read is None:  # without it, a Hub that stops responding would block forever
        client.timeout = SILENCE
    url = api.create_repo(repo_id, private=private, exist_ok=True)
    if revision is not None:
        api.create_branch(url.repo_id, branch=revision, exist_ok=True)
    before = api.model_info(url.repo_id, revision=revision)
    there = [file.rfilename for file in before.siblings or ()]
    stale = [name for name in there if name not in names and any(fnmatch(name, pattern) for pattern in REPLACED)]
    card = (folder / "README.md").read_text(encoding="utf-8")
    card = _card_for(card, folder, url.repo_id)
    if HANDLER in names and HANDLER not in card:
        card += ABOUT_HANDLER
    contents = {"README.md": card.encode()}
    additions = [CommitOperationAdd(name, contents.get(name, folder / name)) for name in names]
    for addition in additions:
        if addition.path_in_repo.endswith(".safetensors"):
            # One at a time: several would use threads that block the end of the process.
            api.preupload_lfs_files(url.repo_id, [addition], revision=revision)
    api.create_commit(
        url.repo_id,
        [*(CommitOperationDelete(name) for name in stale), *additions],
        commit_message=message,
        revision=revision,
        parent_commit=before.sha,  # two pushes at once must not be mixed
    )
    return str(url)


def _check_target(repo_id: str, token: str | None) -> None:
    """Raise `ValueError` if a push to a repository cannot succeed."""
    if constants.is_offline_mode():
        raise ValueError("HF_HUB_OFFLINE is set, so nothing can be pushed to the Hub: unset it.")
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise ValueError(
            f"Expected a repository USER/NAME of letters, digits, '-', '_' and '.', got {repo_id!r}."
        ) from None
    if "/" not in repo_id and not (token or get_token()):
        raise ValueError(
            f"The repository {repo_id!r} has no user, and nobody is logged in: write USER/{repo_id}, and log in with "
            "`hf auth login`."
        )


def _card_for(card: str, folder: Path, repo_id: str) -> str:
    """Return a model card whose examples name the repository instead of the local folder."""
    example = re.search(r'pipeline\("[a-z-]+", "((?:[^"\\/]|\\.)+)"', card)
    name = example[1] if example else in_quotes(folder.resolve().name)
    in_code, in_shell = re.escape(f'"{name}"'), re.escape(shell_word(name))
    # Only as an argument: a label or a task may have the same name.
    calls = rf'(pipeline\("[a-z-]+", |from_pretrained\(){in_code}|(--model ){in_shell}'
    return re.sub(calls, lambda match: f'{match[1] or match[2]}"{repo_id}"', card)
