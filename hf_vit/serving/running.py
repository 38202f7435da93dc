"""Load a model and serve it until a signal ends the server."""

import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..system.extras import need
from ..system.machine import cores
from ..system.texts import one_line

if TYPE_CHECKING:
    from torch import Tensor

    from ..prediction.predictor import Predictor
    from ..prediction.shards import Settings

TAKEN = "Cannot listen on {}, port {} ({}): choose another --port, or an address of this machine for --host."


def serve(
    settings: "Settings",
    host: str = "127.0.0.1",
    port: int = 8000,
    max_wait: float = 0.005,
    queue_size: int | None = None,
    max_upload: int = 20 * 2**20,
    timeout: float = 30.0,
    say: Callable[[str], None] = partial(print, flush=True),  # noqa: B008 # also shown at once through a pipe
) -> None:
    """Serve a model over HTTP until SIGINT (Ctrl-C) or SIGTERM; then answer what was accepted.

    Args:
        settings: The model and its options; `workers` is the number of threads that run it, one by default.
        host, port: Address to listen on; port 0 is a free one.
        max_wait, queue_size: As for `Engine`.
        max_upload: Bytes of a request.
        timeout: Seconds in which a request must arrive.
        say: Prints the line with the address.

    Raises:
        ValueError: If a package is missing, the address cannot be used, or the model cannot be loaded.
        OSError: If the model failed while it was served.
    """
    need("serve", "fastapi", "uvicorn", "python_multipart")
    with bound(host, port) as listener:
        from .app import build_app
        from .engine import Engine
        from .metrics import Metrics
        from .protocol import Server

        predictor, sample, facts = load(settings)
        engine = Engine(predictor, sample, Metrics(), settings.workers or 1, max_wait, queue_size)
        at = "http://{}:{}".format(f"[{host}]" if ":" in host else host, listener.getsockname()[1])
        path = "features" if facts["task"] == "image-feature-extraction" else "predict"
        said = f"Serving {settings.model} at {at} (Ctrl-C ends it).\nTo try it:  curl -F image=@photo.jpg {at}/{path}"
        server = Server(build_app(engine, facts, max_upload), timeout, on_start=lambda: say(said))
        engine.on_failure = server.end
        server.run([listener])
    if engine.failure is not None:
        raise OSError(f"The server stopped, since its model failed: {one_line(str(engine.failure))} Start it again.")


def load(settings: "Settings") -> "tuple[Predictor, Tensor, dict[str, Any]]":
    """Load a model; return its predictor, the pixels of a gray image of its size, and facts about it in JSON's types.

    Raises:
        ValueError: If the model cannot be loaded, or several threads were requested for an accelerator.
    """
    import hf_vit

    from ..data.images import gray_image, preprocess
    from ..inference.optimize import inference_precision
    from ..prediction.predictor import OF_HEADS, Predictor
    from .answers import task_of

    model, processor = settings.load()
    has_features = not any(hasattr(model, head) for head in OF_HEADS)
    threads = max(1, cores() // (settings.workers or 1))
    options = {**settings.options, "has_features": has_features, "threads": threads}
    predictor = Predictor.from_model(model, processor, name=settings.model, **options)
    if predictor.device.type != "cpu" and (settings.workers or 1) > 1:
        raise ValueError(f"Only a CPU can have several --workers, and the model runs on {predictor.device}: use one.")
    config, path = model.config, Path(settings.model)
    sample = preprocess(gray_image(processor)[:, :1, :1].expand(-1, *config.image_shape).contiguous(), processor)
    facts: dict[str, Any] = {
        "model": path.resolve().name if path.exists() else settings.model,
        "task": task_of(predictor),
        "labels": list(predictor.labels.values()),
        "heads": {name: head["task"] for name, head in (getattr(config, "task_heads", None) or {}).items()},
        "image_size": list(config.image_shape),
        "channels": config.num_channels,
        "precision": inference_precision(settings.precision),
        "runtime": predictor.runtime,
        "device": str(predictor.device),
        "batch_size": predictor.batch_size,
        "version": hf_vit.__version__,
    }
    return predictor, sample, {name: value for name, value in facts.items() if value not in ([], {})}


def bound(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address, so that a port in use is found before the model is loaded."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ValueError(TAKEN.format(host, port, error.strerror or error)) from None
    return listener
