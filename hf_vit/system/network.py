"""What a request that failed means: a sentence with its remedy, and whether to try again."""

from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

from .texts import one_line, without_tokens

LOG_IN = "log in by `hf auth login`, or set HF_TOKEN"
AGAIN = "the fault is on the other side: try again later"
# What the client has found out beyond the status, the first that fits.
KINDS = (
    (GatedRepoError, "its authors ask for consent: give it on the repository's page, and log in"),
    (RepositoryNotFoundError, f"there is no such repository for you: check the name; if it is private, {LOG_IN}"),
)
REMEDIES = {
    401: f"it does not know who you are: {LOG_IN} to a token that is valid",
    403: f"the token may not do this: {LOG_IN} to one that has the right to it",
    404: "there is no such thing: check the name",
    408: AGAIN,
    409: "something else was written there meanwhile: try again",
    412: "something else was written there meanwhile: try again",
    413: "it is too large for it: make it smaller",
    429: "it was asked too often: try again in {seconds}",
}
OTHER_REMEDY = "it does not take what was sent: see what it says, and what of yours it concerns"
# Of the refusals, those that pass: a time-out, a commit of somebody else in between, too many requests.
PASSING = (408, 409, 412, 429)
LONGEST_MESSAGE = 200  # of what a server says
LONGEST_PAUSE = 600  # seconds that a server may ask to wait


def sentence_of(error: BaseException) -> str | None:
    """Say what failed on the network and what to do, in a sentence; `None` if it was something else that failed."""
    causes = list(_causes(error))
    if (response := _response(causes)) is not None:
        return _refusal(causes, response)
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in causes):
        return "It is not in the cache, and HF_HUB_OFFLINE forbids to fetch it: unset that, or fetch it before."
    for cause in reversed(causes):  # from what happened first to what was made of it
        kinds = {kind.__name__ for kind in type(cause).__mro__ if kind.__module__.startswith("httpx")}
        if not kinds and type(cause) is not ConnectionError:  # which datasets raises; a broken pipe is another thing
            continue
        where, said = _address(cause), one_line(without_tokens(str(cause)))[:LONGEST_MESSAGE]
        if "TimeoutException" in kinds:
            return f"{where} did not answer in time: see whether the network is slow, or try again later."
        if kinds.isdisjoint({"ReadError", "WriteError", "CloseError", "ProtocolError", "DecodingError"}):
            return f"{where} cannot be reached ({said}): check the network, a proxy and HF_ENDPOINT, and try again."
        return f"The connection to {where} broke off ({said}): try again."
    return None


def is_final(error: BaseException) -> bool:
    """Say whether to try again is of no use: what was sent is not fit, or is refused for good."""
    response = _response(list(_causes(error)))
    if response is not None:
        return 400 <= response.status_code < 500 and response.status_code not in PASSING
    return isinstance(error, ValueError)


def pause_after(error: BaseException) -> float:
    """Return how many seconds the server asks to wait before the next try; 0 if it does not say."""
    response = _response(list(_causes(error)))
    asked = "" if response is None else response.headers.get("Retry-After", "")
    return float(min(int(asked), LONGEST_PAUSE)) if asked.isascii() and asked.isdigit() else 0.0


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, and what lies behind it."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__  # datasets hides it, and it says what to do


def _response(causes: list[BaseException]) -> Any:
    responses = (getattr(cause, "response", None) for cause in causes)
    return next((response for response in responses if hasattr(response, "status_code")), None)


def _refusal(causes: list[BaseException], response: Any) -> str:
    status = response.status_code
    of_status = AGAIN if status >= 500 else REMEDIES.get(status, OTHER_REMEDY)
    of_kind = (remedy for kind, remedy in KINDS if any(isinstance(cause, kind) for cause in causes))
    wait = pause_after(causes[0])
    remedy = next(of_kind, of_status).format(seconds=f"{wait:.0f} seconds" if wait else "some minutes")
    said = next((text for cause in causes if (text := getattr(cause, "server_message", None))), "")
    said = one_line(without_tokens(said))[:LONGEST_MESSAGE]
    quoted = f' ("{said}")' if said else ""
    return f"{_address(response)} answers {status}{quoted}: {remedy}."


def _address(of: Any) -> str:
    """Return where a request went, without what may log in somebody: the signature of an address counts as that."""
    try:
        url = urlsplit(str(of.request.url))
    except (AttributeError, RuntimeError):  # it knows none
        return "The Hub"
    port = f":{url.port}" if url.port else ""
    return one_line(f"{url.scheme}://{url.hostname}{port}{url.path}")
