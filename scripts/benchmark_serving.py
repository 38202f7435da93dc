"""Measure a server of `hf-vit serve` under load, from this second process.

    hf-vit serve my-vit &
    python scripts/benchmark_serving.py photos/ --url http://127.0.0.1:8000 --clients 1 8 64

Each client sends a photograph, waits for the answer and sends the next one, over one connection. Printed are, for each
number of clients, the images per second, the median and 99th percentile of the latency in milliseconds, responses that
are no answers, and the mean batch of the model.
"""

import argparse
import asyncio
import statistics
import time
from itertools import count
from pathlib import Path
from urllib.parse import urlsplit


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="Folder of JPEG files.")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="Address of the server on this machine.")
    parser.add_argument("--clients", type=int, nargs="+", default=(1, 8, 64), help="Numbers of concurrent clients.")
    parser.add_argument("--requests", type=int, default=2000, help="Largest number of requests per measurement.")
    parser.add_argument("--seconds", type=float, default=10.0, help="Longest duration of a measurement.")
    parser.add_argument("--rounds", type=int, default=3, help="Number of measurements of each number of clients.")
    return parser.parse_args()


class Load:
    """Clients of one server that send photographs in turn until a number of requests or a time is reached."""

    def __init__(self, host: str, port: int, photos: list[bytes], requests: int, seconds: float) -> None:
        self.host, self.port, self.photos, self.requests = host, port, photos, requests
        self.end, self.numbers = time.perf_counter() + seconds, count()
        self.latencies: list[float] = []
        self.errors = 0

    async def client(self) -> None:
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            while (number := next(self.numbers)) < self.requests and time.perf_counter() < self.end:
                began = time.perf_counter()
                status, _ = await ask(reader, writer, "POST /predict", self.photos[number % len(self.photos)])
                self.latencies.append(time.perf_counter() - began)
                self.errors += status != 200
        finally:
            writer.close()


async def ask(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, what: str, body: bytes = b""
) -> tuple[int, bytes]:
    """Send a request, and return the status and the body of the response."""
    head = f"{what} HTTP/1.1\r\nHost: server\r\nContent-Type: image/jpeg\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().split("\r\n")
    length = next(int(line.partition(":")[2]) for line in lines if line.startswith("content-length:"))
    return int(lines[0].split()[1]), await reader.readexactly(length)


async def batches(host: str, port: int) -> tuple[float, float]:
    """Return the numbers of images and of batches that the model has computed."""
    reader, writer = await asyncio.open_connection(host, port)
    _, text = await ask(reader, writer, "GET /metrics")
    writer.close()
    values = dict(line.rsplit(" ", 1) for line in text.decode().splitlines() if not line.startswith("#"))
    return float(values["hf_vit_batch_images_sum"]), float(values["hf_vit_batch_images_count"])


async def measure(arguments: argparse.Namespace, clients: int, photos: list[bytes]) -> tuple[float, ...]:
    address = urlsplit(arguments.url)
    host, port = address.hostname or "", address.port or 80
    if host not in ("127.0.0.1", "localhost", "::1"):
        raise SystemExit(f"Expected a server on this machine, got {arguments.url}.")
    before = await batches(host, port)
    load = Load(host, port, photos, arguments.requests, arguments.seconds)
    began = time.perf_counter()
    await asyncio.gather(*(load.client() for _ in range(clients)))
    seconds = time.perf_counter() - began
    images, number = (new - old for new, old in zip(await batches(host, port), before, strict=True))
    percentiles = statistics.quantiles(load.latencies, n=100, method="inclusive")
    return len(load.latencies) / seconds, 1000 * percentiles[49], 1000 * percentiles[98], load.errors, images / number


def main() -> None:
    arguments = parse()
    photos = [
        path.read_bytes() for path in sorted(arguments.photos.iterdir()) if path.suffix.lower() in (".jpg", ".jpeg")
    ]
    print("| clients | images/s | p50, ms | p99, ms | errors | mean batch |\n|---|---|---|---|---|---|")
    for clients in arguments.clients:
        rounds = [asyncio.run(measure(arguments, clients, photos)) for _ in range(arguments.rounds)]
        columns = list(zip(*rounds, strict=True))
        cells = [f"{statistics.median(each):.1f} ({min(each):.1f} to {max(each):.1f})" for each in columns[:3]]
        print(
            f"| {clients} | {' | '.join(cells)} | {sum(columns[3])} | {statistics.median(columns[4]):.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
