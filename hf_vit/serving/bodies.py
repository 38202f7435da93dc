"""From the body of a request to encoded images: an image, a form with files, or JSON with base64.

All limits hold while a body arrives: it is not read to its end before it is rejected. Nothing is written to disk, and
nothing is fetched: a URL in a request is refused.
"""

import base64
import json
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from ..model.image_reading_hf_vit import NamedBytes
from ..system.texts import one_line

BODIES = 16  # of the largest size that are in memory together
MEBIBYTE = 2**20
EXPECTED = (
    "an image (Content-Type: image/jpeg or another image type, or application/octet-stream), a form with files "
    '(multipart/form-data), or JSON (application/json) such as {"image": "BASE64"} or {"images": ["BASE64", ...]}'
)
CURL = "; with curl add -H 'Content-Type: image/jpeg' to --data-binary"


class Bodies:
    """Bodies of requests in memory.

    Args:
        largest: Bytes of one body.
        most_images: Number of images in one body.
    """

    def __init__(self, largest: int, most_images: int) -> None:
        self.largest, self.most_images, self.held = largest, most_images, 0

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """Read a body, which counts as held in the context.

        Raises:
            HTTPException: 413 if it is too large, 503 if too many bodies are in memory, 415 if it is compressed.
        """
        if request.headers.get("content-encoding", "identity") != "identity":
            raise HTTPException(415, "Expected a body without Content-Encoding: send it uncompressed.")
        stated = request.headers.get("content-length", "")
        self._check(int(stated) if stated.isdecimal() else 0)
        chunks: list[bytes] = []
        size = 0
        try:
            async for chunk in request.stream():
                size += len(chunk)
                self.held += len(chunk)
                self._check(size)
                chunks.append(chunk)
            yield b"".join(chunks)
        finally:
            self.held -= size

    def _check(self, size: int) -> None:
        if size > self.largest:
            limit = f"{self.largest / MEBIBYTE:g} MiB"
            raise HTTPException(413, f"Expected a body of at most {limit}: send smaller or fewer images.")
        if self.held > BODIES * self.largest:
            raise HTTPException(503, "Too many large requests at once: try again later.", {"Retry-After": "1"})

    async def images(self, request: Request, body: bytes, in_thread: Callable[..., Any]) -> tuple[list[bytes], bool]:
        """Return the encoded images in a body, and whether it can have several.

        Args:
            in_thread: Awaits a function in another thread, for work that takes milliseconds.

        Raises:
            HTTPException: 415 for a type of content without images, 422 for one that has another form than expected.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "application/json":
            images, is_several = await in_thread(lambda: _of_json(body))
        elif kind == "multipart/form-data":
            images, is_several = await _of_form(request, body, self.most_images), True
        elif kind in ("", "application/octet-stream") or kind.startswith("image/"):
            images, is_several = [body], False
        else:
            hint = CURL if kind == "application/x-www-form-urlencoded" else ""
            raise HTTPException(415, f"Expected {EXPECTED}; got {one_line(kind)}{hint}.")
        if not images:
            raise HTTPException(422, "Expected at least one image, got none.")
        if len(images) > self.most_images:
            raise HTTPException(
                413, f"Expected at most {self.most_images} images in a request, got {len(images)}: divide them."
            )
        return images, is_several


class _InMemory(MultiPartParser):
    spool_max_size = sys.maxsize  # the body is in memory already


async def _of_form(request: Request, body: bytes, most: int) -> list[bytes]:
    async def chunks() -> Any:
        yield body
        yield b""

    parser = _InMemory(request.headers, chunks(), max_files=most, max_fields=most, max_part_size=len(body))
    try:
        form = await parser.parse()
    except (MultiPartException, ValueError, KeyError) as error:  # the last one if no boundary is stated
        raise HTTPException(422, f"Expected a form with files: {one_line(str(error))}.") from error
    images: list[bytes] = []
    try:
        for name, value in form.multi_items():
            if not isinstance(value, UploadFile):
                raise HTTPException(422, f"Expected files in the form, got the text {one_line(name)[:80]!r}.")
            images.append(_named(value.file.read(), value.filename or name))
    finally:
        await form.close()
    return images


def _of_json(body: bytes) -> tuple[list[bytes], bool]:
    try:
        content = json.loads(body)
    except ValueError as error:
        raise HTTPException(422, f"The body is not JSON: {one_line(str(error))}.") from error
    keys = sorted(content) if isinstance(content, dict) else []
    if keys == ["image"]:
        return [_decoded(content["image"], "image")], False
    if keys == ["images"] and isinstance(content["images"], list):
        return [_decoded(each, f"images[{number}]") for number, each in enumerate(content["images"])], True
    got = f"the keys {one_line(', '.join(keys))[:80]}" if keys else type(content).__name__
    raise HTTPException(422, f'Expected {{"image": "BASE64"}} or {{"images": ["BASE64", ...]}}; got {got}.')


def _decoded(text: Any, name: str) -> bytes:
    if not isinstance(text, str):
        raise HTTPException(422, f"Expected base64 text for {name}, got {type(text).__name__}.")
    if "://" in text[:20]:
        raise HTTPException(422, f"{name} is a URL, which this server does not fetch: send the image itself.")
    encoded = text.partition(",")[2] if text.startswith("data:") else text
    try:
        return _named(base64.b64decode("".join(encoded.split()), validate=True), name)
    except ValueError as error:
        raise HTTPException(422, f"{name} is not base64: {one_line(str(error))}.") from error


def _named(data: bytes, name: str) -> NamedBytes:
    """Return an image that errors call by its name."""
    named = NamedBytes(data)
    named.name = one_line(name)[:80]
    return named
