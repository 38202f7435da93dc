"""To the Hub: a folder's card, what must be in it, what must not, its upload, also while a run goes on.

The folder itself is what `save_pretrained` of any model of this package writes: weights, config, processors, code.
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

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_session,
)
from huggingface_hub.utils import disable_progress_bars
from transformers.utils import logging

from ..system.network import is_final, pause_after, sentence_of
from ..system.texts import one_line, shell_word, without_tokens
from .card import _in_quotes
from .folder import check_folder

logger = logging.get_logger(__name__)

# Left over in a repository from an earlier push, these would be loaded or run in place of the new ones.
REPLACED = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.py")
SILENCE = 120  # seconds without a byte after which a connection is given up


# ---------------------------------------------------------------------------------------------------- the card


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
