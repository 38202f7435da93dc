"""uvicorn's HTTP server with a time limit for requests and responses, and an end without loss.

uvicorn limits the time between two requests only: a client that sends a byte now and then would keep a connection,
and with it a place in memory, forever (https://github.com/Kludex/uvicorn/issues/157). h11 is the parser that uvicorn
always has; reading it takes under a millisecond.
"""

import asyncio
import os
from collections.abc import Callable
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

SHUTDOWN_SECONDS = 25  # for accepted requests; Kubernetes kills after 30
TYPE = ("Content-Type", "application/json")
LATE = b'{"error": "The request did not arrive in time: send it faster, or in parts."}'


class TimedProtocol(H11Protocol):
    """A protocol whose requests must arrive, and whose responses must be read, within `seconds`."""

    seconds: float
    timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._begin(self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._end()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._end()

    def _watch(self) -> None:
        """Start the time of a request with its first byte, or the connection; stop it with its last byte."""
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY) and not self.transport.is_closing():
            self._begin(self._reject)
        else:
            self._end()

    def _begin(self, late: Callable[[], None]) -> None:
        if self.timer is None:
            self.timer = self.loop.call_later(self.seconds, late)

    def _end(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def _reject(self) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and self.conn.their_state is not h11.ERROR:
            headers = [TYPE, ("Content-Length", str(len(LATE))), ("Connection", "close")]
            response = h11.Response(status_code=408, headers=headers, reason=b"Request Timeout")
            for event in (response, h11.Data(data=LATE), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class Server(uvicorn.Server):
    """A server that answers what it has accepted when a signal comes, and ends at once at the second one.

    Args:
        app: The application.
        seconds: Time in which a request must arrive, and a response must be read.
        on_start: Called when the server listens.
    """

    def __init__(self, app: Any, seconds: float, on_start: Callable[[], object]) -> None:
        config = uvicorn.Config(
            app,
            loop="asyncio",
            http=type("Timed", (TimedProtocol,), {"seconds": seconds}),
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        )
        super().__init__(config)
        self.on_start = on_start

    async def startup(self, sockets: Any = None) -> None:
        """Start to listen."""
        await super().startup(sockets)
        self.on_start()

    def end(self) -> None:
        """Stop accepting connections, and end when all accepted requests have a response."""
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End, as uvicorn does at a signal, but without its exit code."""
        if self.should_exit:
            os._exit(128 + sig)  # threads that compute cannot be stopped otherwise
        self.end()
