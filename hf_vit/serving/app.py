"""The HTTP interface of a model.

    POST /predict   labels, values, objects, masks or the answers of heads
    POST /features  pooled features
    GET  /          facts about the model
    GET  /health    200 unless the model has failed
    GET  /ready     200 if requests are answered now: after the warm-up, and before the end
    GET  /metrics   measurements in Prometheus' format

A body is an image, a form, or JSON; see `bodies`. A single image gets an object, and a form or a list gets
`{"predictions": [...]}` with an object for each. An error is `{"error": "..."}`: 422 for a broken image; of several,
only the object of the broken one is an error.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..prediction.masks import mask_picture
from ..prediction.predictor import Prediction
from .answers import answer_of, features_of, png
from .bodies import Bodies
from .engine import Engine, ModelFailed, QueueFull

Result = TypeVar("Result")

POSTS = ("/predict", "/features")
PATHS = (*POSTS, "/", "/health", "/ready", "/metrics", "/openapi.json")
GONE = 499  # the client closed the connection; for the metrics, since nobody reads the response
LATER = {"Retry-After": "1"}
# After the words that Starlette has for an unknown path and a wrong method.
ROUTES = f"{{}}: POST images to {' or '.join(POSTS)}, or GET one of {', '.join(sorted({*PATHS} - {*POSTS}))}."
_FILE = {"type": "string", "format": "binary"}
_BASE64 = {"type": "string", "contentEncoding": "base64"}
BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "image/*": {"schema": _FILE},
            "application/octet-stream": {"schema": _FILE},
            "multipart/form-data": {"schema": {"type": "object", "additionalProperties": _FILE}},
            "application/json": {
                "schema": {
                    "oneOf": [
                        {"type": "object", "properties": {"image": _BASE64}, "required": ["image"]},
                        {
                            "type": "object",
                            "properties": {"images": {"type": "array", "items": _BASE64}},
                            "required": ["images"],
                        },
                    ]
                }
            },
        },
    }
}


def build_app(engine: Engine, facts: dict[str, Any], largest_body: int) -> FastAPI:
    """Return the application of a model.

    Args:
        engine: Started and closed with the application.
        facts: Facts about the model, in the types of JSON.
        largest_body: Bytes of a request.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await engine.start()
        yield
        await engine.close()

    # The pages of documentation load scripts from other hosts; the description itself is at /openapi.json.
    app = FastAPI(title=facts["model"], version=facts["version"], lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Counted, engine=engine)
    bodies = Bodies(largest_body, engine.queue_size)
    for kind, response in (
        (HTTPException, lambda request, error: _error(error.status_code, _sentence(error), error.headers)),
        (QueueFull, lambda request, error: _error(503, "The queue is full: send it again later.", LATER)),
        (ModelFailed, lambda request, error: _error(500, str(error))),
        (ClientDisconnect, lambda request, error: _error(GONE, "")),
        (Exception, lambda request, error: _error(500, f"Internal error: {type(error).__name__}.")),
    ):
        app.add_exception_handler(kind, response)

    async def answered(request: Request, to_json: Callable[[Prediction], dict[str, Any]]) -> Response:
        try:
            return await answer(request, to_json)
        except asyncio.CancelledError:  # the time for accepted requests is over
            raise HTTPException(503, "The server stopped before it answered: send the request again.", LATER) from None

    async def answer(request: Request, to_json: Callable[[Prediction], dict[str, Any]]) -> Response:
        if engine.is_full:
            raise QueueFull
        async with bodies.read(request) as body:
            images, is_several = await bodies.images(request, body, engine.in_reader)
            is_mask = _wants_mask(request, is_several, facts["task"])
            predictions = await _while_connected(request, engine.predict(images))
        if not is_several and predictions[0].error is not None:
            raise HTTPException(422, predictions[0].error)
        if is_mask:
            data = await engine.in_reader(partial(_png_of, predictions[0], len(engine.predictor.labels)))
            return Response(data, media_type="image/png")
        try:
            answers = await engine.in_reader(lambda: [to_json(prediction) for prediction in predictions])
        except ValueError as error:  # NaN
            raise HTTPException(500, str(error)) from error
        return JSONResponse({"predictions": answers} if is_several else answers[0])

    @app.post("/predict", openapi_extra=BODY, summary="Answer images.")
    async def predict(request: Request) -> Response:
        if facts["task"] == "image-feature-extraction":
            raise HTTPException(404, "The model has no classifier: POST the image to /features.")
        return await answered(request, lambda prediction: answer_of(prediction, engine.predictor.labels))

    @app.post("/features", openapi_extra=BODY, summary="Return the pooled features of images.")
    async def features(request: Request) -> Response:
        if not engine.predictor.has_features:
            raise HTTPException(404, f"A model for {facts['task']} has no pooled features: POST to /predict.")
        return await answered(request, features_of)

    @app.get("/", summary="Return facts about the model.")
    async def model() -> Response:
        return JSONResponse(facts)

    @app.get("/health", summary="Return whether the model works.")
    async def health() -> Response:
        if engine.failure is not None:
            return JSONResponse({"status": "failed", "error": str(engine.failure)}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/ready", summary="Return whether requests are answered now.")
    async def ready() -> Response:
        status = "ready" if engine.is_ready else "stopping" if engine.failure or engine.is_closing else "starting"
        return JSONResponse({"status": status}, 200 if engine.is_ready else 503)

    @app.get("/metrics", summary="Return measurements in Prometheus' format.")
    async def metrics() -> Response:
        gauges = {"images_in_progress": engine.held, "images_waiting": len(engine.waiting)}
        text = engine.metrics.text(**gauges, body_bytes=bodies.held, ready=engine.is_ready)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    return app


class Counted:
    """Count the responses of an application, and measure those of the model."""

    def __init__(self, app: ASGIApp, engine: Engine) -> None:
        self.app, self.metrics = app, engine.metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        loop, status = asyncio.get_running_loop(), 500
        began = loop.time()

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            path = scope["path"] if scope["path"] in PATHS else "other"
            self.metrics.requests[path, status] += 1
            if path in POSTS and status == 200:
                self.metrics.seconds.add(loop.time() - began)


def _sentence(error: HTTPException) -> str:
    return ROUTES.format(error.detail) if error.detail in ("Not Found", "Method Not Allowed") else error.detail


def _error(status: int, sentence: str, headers: Any = None) -> Response:
    return JSONResponse({"error": sentence}, status, headers)


def _wants_mask(request: Request, is_several: bool, task: str) -> bool:
    """Return whether a client accepts PNG files alone; raise a 406 error if the answer is none."""
    accepted = [each.partition(";")[0].strip() for each in request.headers.get("accept", "*/*").split(",")]
    if accepted != ["image/png"]:
        return False
    if task != "image-segmentation" or is_several or request.url.path != "/predict":
        raise HTTPException(406, "Only the mask of a single image is sent as a PNG file: Accept application/json.")
    return True


def _png_of(prediction: Prediction, number: int) -> bytes:
    assert prediction.mask is not None
    return png(mask_picture(prediction.mask, number))


async def _while_connected(request: Request, work: Awaitable[Result]) -> Result:
    """Return the result of some work; cancel it if the client goes away."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.create_task(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
