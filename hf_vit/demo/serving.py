"""The page of a model, served until it is asked to end; what was uploaded is removed then."""

import os
import signal
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from ..system.extras import need
from ..system.stopping import StopSignals
from .exhibit import Exhibit
from .markup import STYLE

LARGEST_FILE = 20 * 2**20  # bytes that an uploaded file may have
MOST_WAITING = 32  # requests that wait for the model; one at a time has it
KEPT = 3600  # seconds that an uploaded file stays, at least
TAKEN = "No page can be served at {}, port {}: it is taken, or the address is another machine's. Choose another."


def say_at_once(line: str) -> None:
    """Print a line, also where a pipe would keep it until there are more."""
    print(line, flush=True)


def serve(
    model: str,
    compare: str | None = None,
    host: str | None = None,
    port: int | None = None,
    say: Callable[[str], None] = say_at_once,
) -> None:
    """Show a model on a page, and return when SIGINT (Ctrl-C), SIGTERM or SIGHUP ends it; to be called once, at first.

    The page asks nothing of the outside, and sends no telemetry.

    Args:
        model: A classifier: a file, a folder or a name on the Hub, in any layout.
        compare: Another one, to be shown beside it.
        host: Address to listen at; `GRADIO_SERVER_NAME` of the environment if not given, else this machine alone.
        port: `GRADIO_SERVER_PORT` if not given, else the first free one from 7860.
        say: Takes the line with the page's address.

    Raises:
        ValueError: If Gradio is missing, a model is no classifier, or the port is taken.
    """
    need("demo", "gradio")
    with tempfile.TemporaryDirectory(prefix="hf-vit-demo-") as folder:
        # Gradio reads these. What is made for download lies elsewhere, so that it makes a copy for
        # everybody who asked for it.
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
                # Letters of the machine at hand: none are fetched. Gradio's own gray is too pale to be read with ease.
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
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it of SIGHUP
                signal.signal(number, lambda number, frame: ended.set())
        say(f"The page is at {address} and ends by Ctrl-C.")
        ended.wait()
        page.close(verbose=False)
