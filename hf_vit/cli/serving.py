"""The command `hf-vit serve`."""

from typing import Annotated

import typer

from ..system.extras import need
from ..system.places import check_exist
from .endings import announce, echo, read_size
from .models import Model
from .predictions import Head, ImageSize, Precision, Runtime, Windows


def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for other machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 for a free one.")] = 8000,
    top_k: Annotated[
        int | None,
        typer.Option(min=1, help="Number of labels per image. Default: 5, or those above thresholds."),
    ] = None,
    head: Head = None,
    image_size: ImageSize = None,
    windows: Windows = False,
    precision: Precision = "auto",
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the model, for batches of the full size only.")
    ] = False,
    runtime: Runtime = "torch",
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Largest batch. Default: 8 on a CPU, 256 on a GPU.")
    ] = None,
    max_wait_ms: Annotated[
        float, typer.Option(min=0.0, help="Maximum time that an image waits for others in its batch, in ms.")
    ] = 5.0,
    workers: Annotated[int, typer.Option(min=1, help="Threads for the model on a CPU, which share its cores.")] = 1,
    queue_size: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of images in progress; more are rejected. Default: 128.")
    ] = None,
    max_upload_mb: Annotated[float, typer.Option(min=0.001, help="Largest request in MiB.")] = 20.0,
    timeout: Annotated[float, typer.Option(min=0.1, help="Time limit for receiving a request, in seconds.")] = 30.0,
) -> None:
    """Serve a model over HTTP.

    POST an image to /predict for its labels, objects or mask, or to /features. Images of concurrent requests are
    answered in batches. On SIGTERM or Ctrl-C, the server finishes the requests that it has accepted; a second signal
    stops it at once. There is no encryption and no authentication: put a proxy in front of it if others can reach it.
    Needs pip install "hf-vit[serve]".

    Example: hf-vit serve my-vit --port 8000

    A request: curl -F image=@photo.jpg http://127.0.0.1:8000/predict
    """
    check_exist((), model)
    need("serve", "fastapi", "uvicorn", "python_multipart")
    announce(f"Loading {model}.")
    from ..prediction.shards import Settings
    from ..serving.running import serve as run

    size = read_size("--image-size", image_size)
    settings = Settings(model, precision, size, compile, batch_size, workers, top_k, False, windows, head, runtime)
    run(settings, host, port, max_wait_ms / 1000, queue_size, int(max_upload_mb * 2**20), timeout, echo)
