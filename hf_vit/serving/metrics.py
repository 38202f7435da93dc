"""Measurements of a server in the text format of Prometheus.

https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Histogram:
    """Count values by the first bound that is not below them."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self, name: str) -> Iterator[str]:
        """Yield the lines of the format: cumulative counts, the sum and the number of values."""
        below = 0
        for bound, count in zip((*self.bounds, "+Inf"), self.counts, strict=True):
            below += count
            yield f'{name}_bucket{{le="{bound}"}} {below}'
        yield f"{name}_sum {self.sum:.15g}"
        yield f"{name}_count {below}"


class Metrics:
    """What a server counts; used by one thread.

    Attributes:
        requests: Number of responses by path and status.
        images: Number of images by result: answered, broken, failed, or dropped because the client went away.
        seconds: Time from a request for answers to its response.
        batches: Number of images in each batch of the model.
    """

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.images: Counter[str] = Counter()
        self.seconds, self.batches = Histogram(SECONDS), Histogram(IMAGES)

    def text(self, **gauges: float) -> str:
        """Return all measurements, and current values by their names."""
        lines = ["# TYPE hf_vit_requests_total counter"]
        lines += [
            f'hf_vit_requests_total{{path="{path}",status="{status}"}} {number}'
            for (path, status), number in sorted(self.requests.items())
        ]
        lines += ["# TYPE hf_vit_images_total counter"]
        lines += [f'hf_vit_images_total{{result="{result}"}} {n}' for result, n in sorted(self.images.items())]
        for name, histogram in (("request_seconds", self.seconds), ("batch_images", self.batches)):
            lines += [f"# TYPE hf_vit_{name} histogram", *histogram.lines(f"hf_vit_{name}")]
        for name, value in gauges.items():
            lines += [f"# TYPE hf_vit_{name} gauge", f"hf_vit_{name} {value:.15g}"]
        return "\n".join(lines) + "\n"
