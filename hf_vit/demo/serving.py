"""Serve the demo page until a signal ends it, then remove uploaded files."""

import os
import signal
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..system.extras import need
from ..system.stopping import StopSignals
from .exhibit import Exhibit
from .markup import STYLE

PORT = 7860  # Gradio's default
LARGEST_FILE = 20 * 2**20  # bytes
MOST_WAITING = 32  # requests; one at a time uses the model
KEPT = 3600  # least number of seconds that an uploaded file is kept
TAKEN = (
    "Cannot serve a page at {}, port {}: the port is in use, or the address is not of this machine. Choose another."
)


def serve(
    model: str,
    compare: str | None = None,
    host: str | None = None,
    port: int | None = None,
    say: Callable[[str], None] = partial(print, flush=True),  # noqa: B008 # also shown at once through a pipe
) -> None:
    """Serve a model on a page until SIGINT (Ctrl-C), SIGTERM or SIGHUP; call it once, before Gradio is imported.

    The page makes no requests to other hosts, and sends no telemetry.

    Args:
        model: A classifier of images or pixels: a file, a folder or a name on the Hub, in any layout.
        compare: A second classifier to compare with.
        host: Address to listen on; by default `GRADIO_SERVER_NAME` of the environment, else this machine only.
        port: By default `GRADIO_SERVER_PORT`, else the first free port from 7860.
        say: Prints the line with the address of the page.

    Raises:
        ValueError: If Gradio is missing, a model has no classifier, or the port is in use.
    """
    need("demo", "gradio")
    with tempfile.TemporaryDirectory(prefix="hf-vit-demo-") as folder:
        # Gradio reads these variables. Downloads are written outside its folder, so that it copies them for each user.
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(Path(folder) / "uploads")}
        import gradio

        from .page import build

        exhibits = [Exhibit(source) for source in (model, compare) if source is not None]
        for exhibit in exhibits:
            exhibit.warm_up()
        page = build(exhibits, Path(folder) / "results", KEPT)
        page.queue(max_size=MOST_WAITING, api_open=False)
        try:
            _, address, _ = page.launch(
                server_name=host,
                server_port=port,
                share=False,
                prevent_thread_lock=True,
                quiet=True,
                max_file_size=LARGEST_FILE,
                footer_links=["settings"],
                run_history=False,
                ssr_mode=False,
                enable_monitoring=False,
                # System fonts, so that none are downloaded, and a gray with more contrast than Gradio's own.
                theme=gradio.themes.Default(
                    primary_hue="blue", font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")
                ).set(
                    body_text_color_subdued="*neutral_600",
                    body_text_color_subdued_dark="*neutral_300",
                    block_info_text_color="*neutral_600",
                    block_info_text_color_dark="*neutral_300",
                ),
                css=STYLE,
            )
        except OSError:
            raise ValueError(TAKEN.format(host or "this machine", port or "7860 to 7959")) from None
        ended = threading.Event()
        for number in StopSignals.SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, lambda number, frame: ended.set())
        other = "" if port is not None or address.rstrip("/").endswith(f":{PORT}") else f" Port {PORT} is in use."
        say(f"The page is at {address} (Ctrl-C ends it).{other}")
        ended.wait()
        page.close(verbose=False)
