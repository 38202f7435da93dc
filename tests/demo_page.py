"""The page of `hf-vit demo`, served by a process of its own, in a real Chromium. As a program, the README's picture:

python tests/demo_page.py my-vit photo.jpg model_cards/pictures/demo.png
"""

import io
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image
from playwright.sync_api import Locator, Page, Request, expect, sync_playwright

CHROMIUM = shutil.which("chromium")
# Without what Chromium itself asks of its makers.
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
    "--disable-component-update", "--disable-sync", "--disable-quic",
    "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",  # a camera
)  # fmt: skip
PATIENCE = 30  # seconds for an answer, on a machine that other work keeps busy
START = 240  # and for a process to begin
DEMO = (sys.executable, "-m", "hf_vit.cli", "demo")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def served(command: Sequence[Any], environment: Mapping[str, str] | None = None, cwd: Any = None) -> Iterator[str]:
    """Run a command that serves a page, yield the address that it prints, and end it as Ctrl-C does: with 0."""
    process = subprocess.Popen(
        [*map(str, command)], env=environment, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    late = threading.Timer(START, process.kill)
    late.start()
    try:
        said = []
        for line in process.stdout:
            said.append(line)
            if line.startswith("The page is at "):
                break
        else:
            raise AssertionError("".join(said))
        late.cancel()
        yield said[-1].split()[4]
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0 and "Traceback" not in rest, rest
    finally:
        late.cancel()
        process.kill()
        process.communicate()


@dataclass
class Visit:
    """A page that is looked at, all that was asked of servers for it, and what went wrong in its scripts."""

    page: Page
    asked: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def hosts(self) -> set[str]:
        """Who was asked for anything, with the port; what the page makes itself has none."""
        return {host for address in self.asked if (host := urlsplit(address).netloc)}

    @property
    def tab(self) -> Locator:
        """What is seen of the tab that is open."""
        return self.page.get_by_role("tabpanel").filter(visible=True)

    def open(self, name: str) -> Locator:
        """Turn to a tab, on a narrow screen by the menu of those that have no room."""
        tab, menu = self.page.get_by_role("tab", name=name), self.page.get_by_label("More tabs")
        if tab.count() == 0:
            menu.click()
            tab = menu.locator("xpath=..").get_by_text(name)
        tab.click()
        return self.tab

    def drop(self, *files: Path) -> None:
        """Give files to the tab that is open."""
        self.tab.locator("input[type=file]").first.set_input_files(list(files))

    def picture(self, label: str) -> Locator:
        return self.tab.get_by_alt_text(label)


@contextmanager
def visiting(address: str, **options: Any) -> Iterator[Visit]:
    """Open a page in Chromium; options are those of a context, such as `viewport`."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(OPTIONS))
        page = browser.new_page(**options)
        page.set_default_timeout(1000 * PATIENCE)
        expect.set_options(timeout=1000 * PATIENCE)
        visit = Visit(page)

        def note(request: Request) -> None:
            visit.asked.append(request.url)

        page.on("request", note)
        page.on("pageerror", lambda error: visit.errors.append(str(error)))
        page.goto(address)
        page.get_by_role("tab", name="Image").wait_for()
        yield visit
        browser.close()


def take_picture(model: str, photo: Path, out: Path) -> None:
    """Show a photograph to a model, and keep what is seen of the page."""
    with (
        served([*DEMO, model, "--port", free_port()]) as address,
        visiting(address, viewport={"width": 1000, "height": 700}) as visit,
    ):
        visit.drop(photo)
        expect(visit.tab.locator(".vit-card")).to_have_count(4)
        visit.page.wait_for_timeout(1500)  # what fades in and out
        seen = Image.open(io.BytesIO(visit.page.screenshot(full_page=True))).convert("RGB")
    seen.quantize(256, dither=Image.Dither.NONE).save(out, optimize=True)  # a third of the bytes


if __name__ == "__main__":
    take_picture(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
