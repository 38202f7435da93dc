"""A Hub on 127.0.0.1 for tests: the part of its HTTP interface that the real client needs for a push and a load.

Repositories live in memory. Large files go by basic LFS, and come by a redirect to another host, as on the Hub. Every
request is recorded; faults and delays come on request:

    with running() as hub:
        hub.fail("/commit/", status=503, times=2)
        hub.delay("/preupload/", seconds=1)
        hub.cut("/commit/", when="after")
"""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NoReturn
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

WRITE, READ = "hf_standin_write", "hf_standin_read"
SHAPED = "hf_" + "AbCdE" * 7  # may write, and looks as tokens of the Hub do
USER = "tester"
LARGE = (".safetensors", ".bin", ".pt", ".pth", ".npz")


@dataclass
class Request:
    """What was asked: by which method, for what path, of which host, and whether a token came along.

    `sent` is all else that came: address, headers but the one for the token, and body.
    """

    method: str
    path: str
    host: str
    has_token: bool
    sent: bytes
    status: int = 0


@dataclass
class Repository:
    private: bool
    heads: dict[str, str] = field(default_factory=dict)  # branch -> commit
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        self.messages.append(message)
        oid = hashlib.sha1(f"{branch} {len(self.messages)}".encode()).hexdigest()
        self.heads[branch], self.commits[oid] = oid, files
        return oid


@dataclass
class Trouble:
    """What happens to the next `times` requests that fit, behind the first `skip` of them.

    Attributes:
        status: To answer with, instead of doing what is asked.
        headers: Of that answer.
        seconds: To wait before anything is done.
        cut: When to cut the connection: `"before"` anything is done, `"after"` it is done but not answered, or
            `"within"` the body of the answer.
        skip: How many of the requests that fit are let through first.
    """

    pattern: str
    status: int = 0
    times: int = 1
    seconds: float = 0.0
    cut: str = ""
    skip: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    holding: "Holding | None" = None

    def strikes(self, request: str) -> bool:
        if not self.times or not re.search(self.pattern, request):
            return False
        self.skip -= 1
        if self.skip >= 0:
            return False
        self.times -= 1
        return True

    def hold(self) -> None:
        if self.holding is not None:
            self.holding.reached.set()
            self.holding.release.wait(60)


@dataclass
class Holding:
    """A request that is held: that it was reached, and that it may end."""

    reached: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)


class Refusal(Exception):
    def __init__(self, status: int, message: str, code: str = "", headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers or {}


def refuse(status: int, message: str, code: str = "", headers: dict[str, str] | None = None) -> NoReturn:
    raise Refusal(status, message, code, headers)


class Hub:
    """What the server knows.

    Attributes:
        requests: All that were made.
        leaks: Files that were committed with a token of this server in them.
        errors: Faults of the server itself.
        cdn_saw_token: Whether a token was sent to the host of the large files.
    """

    def __init__(self) -> None:
        self.tokens = {WRITE: True, SHAPED: True, READ: False}  # whether it may write
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.troubles: list[Trouble] = []
        self.leaks: list[str] = []
        self.errors: list[str] = []
        self.cdn_saw_token = False
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def fail(self, pattern: str, status: int = 503, times: int = 1, skip: int = 0, **headers: str) -> None:
        """Answer the next `times` requests whose "METHOD path" the pattern is found in by a status."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.troubles.append(Trouble(pattern, status, times, skip=skip, headers=named))

    def cut(self, pattern: str, when: str, times: int = 1, skip: int = 0) -> None:
        """Cut the connection of such requests."""
        self.troubles.append(Trouble(pattern, times=times, cut=when, skip=skip))

    def delay(self, pattern: str, seconds: float, times: int = 10**9) -> None:
        """Let such requests wait."""
        self.troubles.append(Trouble(pattern, 0, times, seconds))

    def hold(self, pattern: str, cut: str = "", skip: int = 0) -> Holding:
        """Hold such a request until it is released; then do it, or cut its connection `"before"` or `"after"` that."""
        self.troubles.append(Trouble(pattern, cut=cut, skip=skip, holding=(holding := Holding())))
        return holding

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[name]
        return repository.commits[repository.heads[revision]]

    def messages(self, name: str) -> list[str]:
        """Return the messages of a repository's commits but the first, which creates it."""
        return self.repositories[name].messages[1:] if name in self.repositories else []

    def asked(self, pattern: str) -> list[Request]:
        with self.lock:
            return [r for r in self.requests if re.search(pattern, f"{r.method} {r.path}")]


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
        thread.join()


def set_address(url: str, monkeypatch: Any) -> None:
    """Have the clients of this process ask the Hub at an address."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    of_files = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", of_files)
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", url)


def blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_large(path: str) -> bool:
    return path.endswith(LARGE)


def problems_of_card(text: str) -> list[str]:
    """Check what the Hub refuses a card for, as far as this project may get it wrong."""
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    try:
        data = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError as error:
        return [str(error)]
    problems = [] if isinstance(data.get("license", ""), str) else ["license must be a text"]
    for index in data.get("model-index") or []:
        for result in index["results"]:
            given = (result["task"]["type"], result["dataset"]["type"], result["dataset"]["name"])
            metrics = [(metric["type"], float(metric["value"])) for metric in result["metrics"]]
            if not all(given) or not metrics or not index["name"]:
                problems.append(f"model-index lacks something: {index}")
    return problems


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body go by themselves: the second would wait for 40 ms

    def log_message(self, *arguments: Any) -> None:
        pass

    def handle_any(self) -> None:
        hub, url = self.hub, urlsplit(self.path)
        host = (self.headers.get("Host") or "").partition(":")[0]
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        try:
            self.body = self.read_body()
        except (OSError, ValueError):  # the client has gone in the middle of it
            self.close_connection = True
            return
        others = [f"{name}: {value}" for name, value in self.headers.items() if name.lower() != "authorization"]
        sent = "\n".join([self.path, *others]).encode() + self.body
        request = Request(self.command, url.path, host, bool(self.token), sent)
        with hub.lock:
            hub.requests.append(request)
            trouble = [one for one in hub.troubles if one.strikes(f"{self.command} {url.path}")]
        time.sleep(sum(one.seconds for one in trouble))
        ending = next((one for one in trouble if one.cut or one.holding), Trouble(""))
        self.close_connection = bool(ending.cut)
        if ending.cut != "after":
            ending.hold()
        if ending.cut == "before":
            return
        try:
            for one in trouble:
                if one.status:
                    refuse(one.status, "a fault that was asked for", headers=one.headers)
            status, headers, body = self.answer(unquote(url.path), parse_qs(url.query))
        except Refusal as refusal:
            said = {"X-Error-Message": str(refusal), "X-Error-Code": refusal.code}
            status, headers = refusal.status, {**said, **refusal.headers}
            body = json.dumps({"error": str(refusal)}).encode()
        except Exception as error:
            hub.errors.append(f"{self.command} {self.path}: {error!r}")
            status, headers, body = 500, {}, b"{}"
        request.status = status
        if ending.cut == "after":
            return ending.hold()
        with suppress(OSError):  # the client may have gone
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[: len(body) // 2] if ending.cut else body)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    # ---- who, and what

    def json(self, answer: Any, status: int = 200) -> tuple[int, dict[str, str], bytes]:
        return status, {"Content-Type": "application/json"}, json.dumps(answer).encode()

    def check(self, *, writes: bool) -> None:
        if self.token and self.token not in self.hub.tokens:
            refuse(401, "Invalid credentials in Authorization header")
        if writes and not self.hub.tokens.get(self.token):
            refuse(403 if self.token else 401, "a token that may write is needed")

    def repository(self, name: str) -> Repository:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self.token):
            refuse(404 if self.token else 401, "Repository not found", "RepoNotFound")
        return repository

    def commit_of(self, repository: Repository, revision: str) -> tuple[str, dict[str, bytes]]:
        oid = repository.heads.get(revision, revision)
        if oid not in repository.commits:
            refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid, repository.commits[oid]

    def answer(self, path: str, query: dict[str, list[str]]) -> tuple[int, dict[str, str], bytes]:
        hub = self.hub
        is_reading = self.command in ("GET", "HEAD")
        if match := re.fullmatch(r"/large/(\w+)", path):  # the other host: a token has no business here
            hub.cdn_saw_token |= bool(self.token)
            if is_reading:
                return self.send(hub.large[match[1]], match[1])
            if hashlib.sha256(self.body).hexdigest() != match[1]:
                refuse(400, "the content is not what was announced")
            hub.large[match[1]] = self.body
            return self.json({})
        self.check(writes=not is_reading and "/paths-info/" not in path)
        with hub.lock:
            if path == "/api/whoami-v2":
                self.token or refuse(401, "who are you?")
                return self.json({"type": "user", "name": USER, "orgs": []})
            if path == "/api/repos/create":
                return self.create(json.loads(self.body))
            if path == "/api/validate-yaml":
                problems = problems_of_card(json.loads(self.body)["content"])
                return self.json(
                    {"errors": [{"message": p} for p in problems], "warnings": []}, 400 * bool(problems) or 200
                )
            if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
                self.repository(match[1])
                return self.json(
                    {"transfer": "basic", "objects": [self.place(o) for o in json.loads(self.body)["objects"]]}
                )
            if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                return self.resolve(self.repository(match[1]), *match.groups()[1:])
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/([a-z-]+)(?:/([^/]+)(?:/(.+))?)?)?", path):
                name, verb, revision, below = match.groups()
                repository = self.repository(name)
                if verb == "branch" and self.command == "POST":
                    if revision in repository.heads:
                        refuse(409, "Reference already exists")
                    repository.heads[revision] = repository.heads["main"]
                    return self.json({})
                if verb in (None, "revision", "tree", "paths-info", "preupload", "commit"):
                    oid, files = self.commit_of(repository, revision or "main")
                    act = getattr(self, (verb or "revision").replace("-", "_"))
                    return act(name, repository, revision, oid, files, below or "")
        if re.match(r"(/api)?/datasets/", path):  # of which it has none
            refuse(404, "Repository not found", "RepoNotFound")
        refuse(404, f"this server does not speak {self.command} {path}")

    # ---- to write

    def create(self, wanted: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        name = f"{wanted.get('organization') or USER}/{wanted['name']}"
        is_there = name in self.hub.repositories
        if not is_there:
            is_private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
            self.hub.repositories[name] = Repository(is_private)
            self.hub.repositories[name].commit("main", {".gitattributes": b""}, "initial commit")
        return self.json({"url": f"{self.hub.url}/{name}", "name": name}, 409 if is_there else 200)

    def preupload(self, name: str, repository: Repository, revision: str, oid: str, files: dict, below: str) -> Any:
        return self.json({
            "files": [
                {"path": p, "uploadMode": "lfs" if is_large(p) else "regular", "shouldIgnore": False,
                 "oid": self.entry(p, files[p])["oid"] if p in files else None}
                for p in (file["path"] for file in json.loads(self.body)["files"])
            ],
            "commitOid": oid,
        })  # fmt: skip

    def place(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in self.hub.large:
            return wanted
        href = f"{self.hub.url.replace('127.0.0.1', 'localhost')}/large/{wanted['oid']}"
        return {**wanted, "actions": {"upload": {"href": href}}}

    def commit(self, name: str, repository: Repository, revision: str, oid: str, files: dict, below: str) -> Any:
        header, *operations = map(json.loads, self.body.splitlines())
        if header["value"].get("parentCommit", oid) != oid:
            refuse(412, "A commit has happened since. Please refresh and try again.")
        files = dict(files)
        for operation in operations:
            kind, value = operation["key"], operation["value"]
            if kind == "deletedFile":
                if files.pop(value["path"], None) is None:
                    refuse(404, "A file with this name doesn't exist", "EntryNotFound")
            else:
                data = self.hub.large[value["oid"]] if kind == "lfsFile" else base64.b64decode(value["content"])
                files[value["path"]] = data
                if any(token.encode() in data for token in self.hub.tokens):
                    self.hub.leaks.append(f"{name}:{value['path']}")
        oid = repository.commit(revision, files, header["value"]["summary"])
        return self.json({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}"})

    # ---- to read

    def entry(self, path: str, data: bytes) -> dict[str, Any]:
        sha = hashlib.sha256(data).hexdigest()
        large = {"lfs": {"oid": sha, "size": len(data), "pointerSize": 130}} if is_large(path) else {}
        return {"type": "file", "path": path, "oid": sha if large else blob_id(data), "size": len(data), **large}

    def revision(self, name: str, repository: Repository, revision: str, oid: str, files: dict, below: str) -> Any:
        siblings = [{"rfilename": path} for path in sorted(files)]
        return self.json({"id": name, "sha": oid, "private": repository.private, "tags": [], "siblings": siblings})

    def tree(self, name: str, repository: Repository, revision: str, oid: str, files: dict, below: str) -> Any:
        chosen = [path for path in sorted(files) if path.startswith(f"{below}/" if below else "")]
        if below and not chosen:
            refuse(404, f"{below} does not exist", "EntryNotFound")
        return self.json([self.entry(path, files[path]) for path in chosen])

    def paths_info(self, name: str, repository: Repository, revision: str, oid: str, files: dict, below: str) -> Any:
        asked = parse_qs(self.body.decode()).get("paths", [])
        return self.json([self.entry(path, files[path]) for path in asked if path in files])

    def resolve(self, repository: Repository, revision: str, path: str) -> tuple[int, dict[str, str], bytes]:
        oid, files = self.commit_of(repository, revision)
        if path not in files:
            refuse(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": oid})
        data, entry = files[path], self.entry(path, files[path])
        if not is_large(path):
            status, headers, body = self.send(data, entry["oid"])
            return status, {**headers, "X-Repo-Commit": oid}, body
        headers = {
            "Location": f"{self.hub.url.replace('127.0.0.1', 'localhost')}/large/{entry['oid']}",
            "X-Repo-Commit": oid,
            "X-Linked-Etag": f'"{entry["oid"]}"',
            "X-Linked-Size": str(len(data)),
        }
        return 302, headers, b""

    def send(self, data: bytes, etag: str) -> tuple[int, dict[str, str], bytes]:
        headers = {"ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, stop = int(match[1]), min(int(match[2] or len(data) - 1) + 1, len(data))
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            return 206, headers, data[start:stop]
        return 200, headers, data
