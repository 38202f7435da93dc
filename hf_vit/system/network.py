"""Explain failed network requests: what happened, what to do, and whether to retry."""

from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

from .texts import one_line, without_tokens

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
AGAIN = "the server has a problem: try again later"
# Errors that huggingface_hub distinguishes beyond the status code; the first match counts.
KINDS = (
    (GatedRepoError, "the repository is gated: accept its terms on its page, then log in"),
    (
        RepositoryNotFoundError,
        f"no such repository, or no access to it: check the name; if it is private, {LOG_IN}",
    ),
)
REMEDIES = {
    401: f"the token is missing or invalid: {LOG_IN} to a valid token",
    403: f"the token has no permission for this: {LOG_IN} to a token that has it",
    404: "not found: check the name",
    408: AGAIN,
    409: "the repository changed at the same time: try again",
    412: "the repository changed at the same time: try again",
    413: "the file is too large for the server: make it smaller",
    429: "too many requests: try again in {seconds}",
}
OTHER_REMEDY = "the server rejects the request: its message says why"
# Temporary refusals: a time-out, a concurrent commit, too many requests.
PASSING = (408, 409, 412, 429)
LONGEST_MESSAGE = 200  # characters of a server's message
LONGEST_PAUSE = 600  # seconds


def sentence_of(error: BaseException) -> str | None:
    """Return a sentence that says what failed on the network and what to do; `None` for other errors."""
    causes = list(causes_of(error))
    if (response := _response(causes)) is not None:
        return _refusal(causes, response)
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in causes):
        return "Not in the local cache, and HF_HUB_OFFLINE forbids downloads: unset it, or download the files first."
    for cause in reversed(causes):  # the original error first
        kinds = {kind.__name__ for kind in type(cause).__mro__ if kind.__module__.startswith("httpx")}
        if not kinds and type(cause) is not ConnectionError:  # raised by datasets; not a broken pipe
            continue
        where, said = _address(cause), one_line(without_tokens(str(cause)))[:LONGEST_MESSAGE]
        if "TimeoutException" in kinds:
            return f"{where} did not respond in time: check the network, or try again later."
        if kinds.isdisjoint({"ReadError", "WriteError", "CloseError", "ProtocolError", "DecodingError"}):
            return f"{where} cannot be reached ({said}): check the network, the proxy and HF_ENDPOINT, and try again."
        return f"The connection to {where} was lost ({said}): try again."
    return None


def is_final(error: BaseException) -> bool:
    """Return whether a retry is useless: the data is invalid, or the server rejects it permanently."""
    response = _response(list(causes_of(error)))
    if response is not None:
        return 400 <= response.status_code < 500 and response.status_code not in PASSING
    return isinstance(error, ValueError)


def pause_after(error: BaseException) -> float:
    """Return the seconds that the server asks to wait before a retry (`Retry-After`), or 0."""
    response = _response(list(causes_of(error)))
    asked = "" if response is None else response.headers.get("Retry-After", "")
    return float(min(int(asked), LONGEST_PAUSE)) if asked.isascii() and asked.isdigit() else 0.0


def causes_of(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and its causes."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__  # datasets hides the error that says what to do


def _response(causes: list[BaseException]) -> Any:
    responses = (getattr(cause, "response", None) for cause in causes)
    return next((response for response in responses if hasattr(response, "status_code")), None)


def _refusal(causes: list[BaseException], response: Any) -> str:
    status = response.status_code
    of_status = AGAIN if status >= 500 else REMEDIES.get(status, OTHER_REMEDY)
    of_kind = (remedy for kind, remedy in KINDS if any(isinstance(cause, kind) for cause in causes))
    wait = pause_after(causes[0])
    remedy = next(of_kind, of_status).format(seconds=f"{wait:.0f} seconds" if wait else "a few minutes")
    said = next((text for cause in causes if (text := getattr(cause, "server_message", None))), "")
    said = one_line(without_tokens(said))[:LONGEST_MESSAGE]
    quoted = f' ("{said}")' if said else ""
    return f"{_address(response)} returned {status}{quoted}: {remedy}."


def _address(of: Any) -> str:
    """Return the URL of a request without credentials and query parameters, which may contain a signature."""
    try:
        url = urlsplit(str(of.request.url))
    except (AttributeError, RuntimeError):  # the error has no request
        return "The Hub"
    port = f":{url.port}" if url.port else ""
    return one_line(f"{url.scheme}://{url.hostname}{port}{url.path}")
