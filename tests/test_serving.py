"""A served model: the predictor's answers in every form, an error for every other request, and no request lost."""

import base64
import http.client
import io
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from process_of_a_run import ends, start
from typer.testing import CliRunner

from hf_vit import (
    HFViTConfig,
    HFViTForImageClassification,
    HFViTForMultiTask,
    HFViTForObjectDetection,
    HFViTForSemanticSegmentation,
    HFViTImageProcessor,
    HFViTModel,
)
from hf_vit.cli.main import app as commands
from hf_vit.prediction.predictor import Predictor
from hf_vit.prediction.shards import Settings

pytest.importorskip("fastapi", reason="fastapi is not installed: pip install hf-vit[serve]")
pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install hf-vit[serve]")

from hf_vit.serving.app import build_app
from hf_vit.serving.engine import Engine
from hf_vit.serving.metrics import Histogram, Metrics
from hf_vit.serving.protocol import Server
from hf_vit.serving.running import bound, load, serve

PATIENCE = 60  # seconds, on a machine that other work keeps busy
JSON, JPEG = {"Content-Type": "application/json"}, {"Content-Type": "image/jpeg"}
TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": (32, 48),
    "patch_size": 8,
    "initializer_range": 0.5,
    "id2label": {0: "red", 1: "green", 2: "blue"},
}
HEADS = {
    "breed": {"task": "classification", "id2label": {0: "Bengal", 1: "pug"}},
    "animal": {"task": "segmentation", "id2label": {0: "background", 1: "cat"}},
    "head_box": {"task": "regression", "id2label": {0: "center_x", 1: "width"}},
}
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "classifier": (HFViTForImageClassification, {}),
    "several labels": (HFViTForImageClassification, {"problem_type": "multi_label_classification"}),
    "regression": (HFViTForImageClassification, {"problem_type": "regression"}),
    "13 channels": (HFViTForImageClassification, {"num_channels": 13}),
    "segmentation": (HFViTForSemanticSegmentation, {}),
    "detection": (HFViTForObjectDetection, {"thresholds": [0.0, 0.0, 0.0]}),
    "heads": (HFViTForMultiTask, {"id2label": None, "task_heads": HEADS}),
    "encoder": (HFViTModel, {"id2label": None}),
}


def save(folder: Path, kind: str) -> str:
    model_class, fields = MODELS[kind]
    model = model_class(
        HFViTConfig(**{name: value for name, value in {**TINY, **fields}.items() if value is not None})
    )
    if not (folder / "config.json").exists():
        model.save_pretrained(folder)
        channels = fields.get("num_channels", 3)
        values = {"image_mean": [0.5] * channels, "image_std": [0.5] * channels} if channels != 3 else {}
        processor = HFViTImageProcessor(size={"height": 32, "width": 48}, do_convert_rgb=channels == 3, **values)
        processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    folder = tmp_path_factory.mktemp("served")
    return lambda kind: save(folder / kind, kind)


def picture(seed: int = 0, channels: int = 3) -> bytes:
    """Return an encoded image: JPEG, or an array of NumPy for any number of channels."""
    random, file = np.random.default_rng(seed), io.BytesIO()
    pixels = random.integers(0, 256, (30 + seed, 60, channels), dtype=np.uint8)
    if channels == 3:
        Image.fromarray(pixels).save(file, "JPEG")
    else:
        np.save(file, pixels.transpose(2, 0, 1))
    return file.getvalue()


# ------------------------------------------------------------------------------------------------ a server to ask


@dataclass
class Reply:
    status: int
    headers: Any
    content: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.content)

    @property
    def error(self) -> str:
        assert self.status >= 400
        return self.json["error"]


@dataclass
class Client:
    """A client of a server on this machine, each of whose requests has its own connection."""

    port: int
    engine: Any = None

    def ask(self, method: str, path: str, body: Any = None, headers: Any = None) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return Reply(response.status, response.headers, response.read())
        finally:
            connection.close()

    def post(self, body: Any, headers: Any = JPEG, path: str = "/predict") -> Reply:
        return self.ask("POST", path, body, headers)

    def form(self, *images: bytes, path: str = "/predict") -> Reply:
        parts = [
            b'--limit\r\nContent-Disposition: form-data; name="image"; filename="%d.jpg"\r\n\r\n%s\r\n'
            % (number, each)
            for number, each in enumerate(images)
        ]
        return self.post(
            b"".join([*parts, b"--limit--\r\n"]), {"Content-Type": "multipart/form-data; boundary=limit"}, path
        )

    def measured(self, line: str) -> float:
        """Return the value of a line of the metrics, 0 without that line."""
        found = [
            each for each in self.ask("GET", "/metrics").content.decode().splitlines() if each.startswith(line + " ")
        ]
        return float(found[0].split()[-1]) if found else 0.0


def until(condition: Callable[[], Any]) -> None:
    """Wait for a condition."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@contextmanager
def served(model: str, prepare: Callable[[Any], object] = lambda predictor: None, **options: Any) -> Iterator[Client]:
    """Serve a model in a thread.

    Args:
        prepare: Changes the predictor before the server starts.
        options: Of `Settings`, `Engine`, `build_app` and `Server`.
    """
    largest, seconds = options.pop("largest", 2**20), options.pop("seconds", PATIENCE)
    of_engine = {name: options.pop(name) for name in ("workers", "max_wait", "queue_size") if name in options}
    predictor, sample, facts = load(Settings(model, "fp32", **options))
    prepare(predictor)
    engine = Engine(predictor, sample, Metrics(), **of_engine)
    started = threading.Event()
    server = Server(build_app(engine, facts, largest), seconds, started.set)
    engine.on_failure = server.end
    listener = bound("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        assert started.wait(PATIENCE)
        yield Client(listener.getsockname()[1], engine)
    finally:
        server.end()
        thread.join()


@pytest.fixture(scope="module")
def classifier(models: Any) -> Iterator[Client]:
    with served(models("classifier")) as client:
        yield client


class Gate:
    """Let batches through only while it is open, and count those that arrive; the two of the warm-up pass."""

    def __init__(self) -> None:
        self.arrived: list[int] = []
        self.open = threading.Event()

    def __call__(self, predictor: Any) -> None:
        compute = predictor.start

        def start(images: Any) -> Any:
            if images[0][0].size != (32, 48):  # not that of the warm-up
                self.arrived.append(len(images))
                assert self.open.wait(PATIENCE)
            return compute(images)

        predictor.start = start


# -------------------------------------------------------------------------------------------------------- answers


def expected(kind: str, prediction: Any) -> Any:
    """Return what a server must say, from a prediction, without masks."""
    pairs = list(zip(prediction.labels, prediction.scores, strict=True))
    if kind == "regression":
        return {"values": dict(pairs)}
    if kind == "segmentation":
        return {"size": {"height": 30, "width": 60}, "classes": [{"label": name, "share": s} for name, s in pairs]}
    if kind == "detection":
        boxes = [dict(zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)) for box in prediction.boxes.tolist()]
        objects = [{"label": n, "score": s, "box": box} for (n, s), box in zip(pairs, boxes, strict=True)]
        return {"size": {"height": 30, "width": 60}, "objects": objects}
    return {"labels": [{"label": name, "score": score} for name, score in pairs]}


def close(found: Any, wanted: Any) -> bool:
    """Return whether two answers are equal up to rounding."""
    if isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(close(found[name], wanted[name]) for name in wanted)
    if isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(close, found, wanted))
    return found == pytest.approx(wanted, rel=1e-4, abs=1e-5) if isinstance(wanted, float) else found == wanted


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind not in ("heads", "encoder")])
def test_answers_are_the_predictor_s_however_an_image_is_sent(kind: str, models: Any) -> None:
    image = picture(channels=MODELS[kind][1].get("num_channels", 3))
    predictor = Predictor.from_pretrained(models(kind), "fp32")
    (prediction,) = predictor([image])
    with served(models(kind)) as client:
        text = base64.b64encode(image).decode()
        alone = [
            client.post(image, {"Content-Type": "application/octet-stream"}),
            client.post(image, {}),
            client.post(json.dumps({"image": text}), JSON),
            client.post(json.dumps({"image": f"data:image/jpeg;base64,{text}"}), JSON),
        ]
        listed = [client.form(image, image), client.post(json.dumps({"images": [text, text]}), JSON)]
        assert {reply.status for reply in (*alone, *listed)} == {200}
        answers = [reply.json for reply in alone] + [each for reply in listed for each in reply.json["predictions"]]
        assert len(answers) == 8
        for answer in answers:
            mask = answer.pop("mask", None)
            assert close(answer, expected(kind, prediction))
            if mask is not None:
                np.testing.assert_array_equal(Image.open(io.BytesIO(base64.b64decode(mask))), prediction.mask)
        facts = client.ask("GET", "/").json
        assert facts["labels"] == ["red", "green", "blue"] and facts["image_size"] == [32, 48]
        if kind == "segmentation":
            drawn = client.post(image, {**JPEG, "Accept": "image/png"})
            assert drawn.headers["Content-Type"] == "image/png"
            with Image.open(io.BytesIO(drawn.content)) as mask_file:
                assert mask_file.mode == "P"
                np.testing.assert_array_equal(mask_file, prediction.mask)
        if predictor.has_features or kind in ("segmentation", "detection"):
            assert "no pooled features: POST to /predict" in client.post(image, path="/features").error


def test_heads_answer_together(models: Any) -> None:
    image = picture()
    (prediction,) = Predictor.from_pretrained(models("heads"), "fp32")([image])
    with served(models("heads")) as client:
        answer = client.post(image).json
        assert answer["size"] == {"height": 30, "width": 60} and answer["heads"].keys() == HEADS.keys()
        for name in ("breed", "head_box"):
            assert close(answer["heads"][name], prediction.heads[name])
        for found, wanted in zip(answer["heads"]["animal"], prediction.heads["animal"], strict=True):
            assert found["label"] == wanted["label"]
            with Image.open(io.BytesIO(base64.b64decode(found["mask"]))) as mask:
                np.testing.assert_array_equal(mask, wanted["mask"])
        assert client.ask("GET", "/").json["heads"] == {name: head["task"] for name, head in HEADS.items()}
    with served(models("heads"), head="breed") as client:
        assert close(client.post(image).json["labels"], prediction.heads["breed"])


@pytest.mark.parametrize("kind", ["classifier", "encoder"])
def test_features_are_the_predictor_s(kind: str, models: Any) -> None:
    image = picture()
    (prediction,) = Predictor.from_pretrained(models(kind), "fp32", has_features=True)([image])
    with served(models(kind)) as client:
        found = client.post(image, path="/features").json
        assert close(found, {"features": prediction.features.tolist()})
        assert close(client.form(image, path="/features").json, {"predictions": [found]})
        if kind == "encoder":
            assert "no classifier: POST the image to /features" in client.post(image).error


@pytest.mark.parametrize("workers", [1, 2])
def test_concurrent_requests_share_batches_and_get_their_own_answers(workers: int, models: Any) -> None:
    images = [picture(seed) for seed in range(24)]
    predictions = Predictor.from_pretrained(models("classifier"), "fp32")(images)
    wanted = [expected("classifier", prediction) for prediction in predictions]
    gate = Gate()
    with served(models("classifier"), gate, batch_size=4, workers=workers) as client:
        with ThreadPoolExecutor(24) as clients:
            replies = clients.map(client.post, images)
            until(lambda: len(gate.arrived) == workers and len(client.engine.waiting) == 24 - sum(gate.arrived))
            gate.open.set()
            assert all(close(reply.json, answer) for reply, answer in zip(replies, wanted, strict=True))
        assert sum(gate.arrived) == 24 and max(gate.arrived) == 4 and len(gate.arrived) <= 8 + workers
        until(lambda: client.measured("hf_vit_images_in_progress") == 0)
        assert client.measured('hf_vit_images_total{result="answered"}') == 24


def test_a_lone_request_does_not_wait_for_others(models: Any) -> None:
    with served(models("classifier"), max_wait=10 * PATIENCE) as client:
        assert client.post(picture()).status == 200


def test_it_is_ready_when_the_model_is_warm(models: Any) -> None:
    warm = threading.Event()

    def prepare(predictor: Any) -> None:
        compute = predictor.start
        predictor.start = lambda images: warm.wait(PATIENCE) and compute(images)

    with served(models("classifier"), prepare) as client, ThreadPoolExecutor() as clients:
        early = clients.submit(client.post, picture())
        assert client.ask("GET", "/ready").status == 503 and client.ask("GET", "/ready").json == {"status": "starting"}
        assert client.ask("GET", "/health").status == 200
        warm.set()
        assert early.result().status == 200
        assert client.ask("GET", "/ready").json == {"status": "ready"}


# --------------------------------------------------------------------------------------------------------- errors

BOMB = b"P6 60000 60000 255\n"  # the header of 3.6 thousand million pixels
FORM = {"Content-Type": "multipart/form-data; boundary=limit"}
REFUSED: dict[str, tuple[int, str, tuple[Any, ...]]] = {
    "text": (415, "Expected an image (Content-Type", ("POST", "/predict", "hello", {"Content-Type": "text/plain"})),
    "curl": (
        415,
        "with curl add -H",
        ("POST", "/predict", "x", {"Content-Type": "application/x-www-form-urlencoded"}),
    ),
    "gzip": (415, "send it uncompressed", ("POST", "/predict", b"x", {**JPEG, "Content-Encoding": "gzip"})),
    "empty": (422, "is empty: 0 bytes.", ("POST", "/predict", b"", JPEG)),
    "page": (422, "is a web page or SVG", ("POST", "/predict", b"<html>", JPEG)),
    "bomb": (422, "may be a decompression bomb", ("POST", "/predict", BOMB, JPEG)),
    "truncated": (422, "is corrupt, truncated", ("POST", "/predict", picture()[:-400], JPEG)),
    "no JSON": (422, "The body is not JSON", ("POST", "/predict", "{", JSON)),
    "other JSON": (422, "got the keys inputs", ("POST", "/predict", '{"inputs": []}', JSON)),
    "list": (422, "got list", ("POST", "/predict", "[1]", JSON)),
    "URL": (422, "image is a URL, which this server does not", ("POST", "/predict", '{"image": "http://a/b"}', JSON)),
    "path": (422, "images[0] is not base64", ("POST", "/predict", '{"images": ["/etc/passwd"]}', JSON)),
    "number": (422, "Expected base64 text for image, got int", ("POST", "/predict", '{"image": 1}', JSON)),
    "no images": (422, "Expected at least one image", ("POST", "/predict", '{"images": []}', JSON)),
    "no boundary": (422, "Expected a form", ("POST", "/predict", "x", {"Content-Type": "multipart/form-data"})),
    "broken form": (422, "Expected a form", ("POST", "/predict", "x", FORM)),
    "text in a form": (
        422,
        "got the text 'a'",
        ("POST", "/predict", b'--limit\r\nContent-Disposition: form-data; name="a"\r\n\r\nb\r\n--limit--\r\n', FORM),
    ),
    "PNG": (406, "Accept application/json.", ("POST", "/predict", picture(), {**JPEG, "Accept": "image/png"})),
    "path of nothing": (404, "Not Found", ("GET", "/docs")),
    "method": (405, "Method Not Allowed", ("GET", "/predict")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_told_why(name: str, classifier: Client) -> None:
    status, sentence, request = REFUSED[name]
    reply = classifier.ask(*request)
    assert reply.status == status and sentence in reply.error
    assert reply.headers["Content-Type"] == "application/json"


def test_a_broken_image_is_an_error_of_its_own(classifier: Client) -> None:
    good, broken = picture(), b"<html>"
    predictions = classifier.form(good, broken, good).json["predictions"]
    assert close(predictions[0], predictions[2]) and predictions[0]["labels"]
    assert predictions[1] == {
        "error": "1.jpg is a web page or SVG, not a bitmap image: use the image that the page shows."
    }


def test_too_many_images_in_a_request(models: Any) -> None:
    with served(models("classifier"), queue_size=3) as client:
        text = base64.b64encode(picture()).decode()
        assert client.post(json.dumps({"images": [text] * 3}), JSON).status == 200
        reply = client.post(json.dumps({"images": [text] * 4}), JSON)
        assert reply.status == 413 and "at most 3 images in a request, got 4" in reply.error
        assert client.form(*[picture()] * 4).status == 422  # the parser stops at the fourth


def test_a_huge_body_is_rejected_before_it_is_read(models: Any) -> None:
    with served(models("classifier"), largest=100_000) as client:
        with socket.create_connection(("127.0.0.1", client.port), PATIENCE) as sent:
            sent.sendall(b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000000000\r\n\r\n")
            assert sent.recv(100).startswith(b"HTTP/1.1 413 ")
        with socket.create_connection(("127.0.0.1", client.port), PATIENCE) as sent:  # of unknown length
            sent.sendall(b"POST /predict HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
            chunk = b"2710\r\n" + bytes(10_000) + b"\r\n"
            for _ in range(11):
                sent.sendall(chunk)
            assert sent.recv(100).startswith(b"HTTP/1.1 413 ")
            for _ in range(100):  # what still arrives is not kept
                sent.sendall(chunk)
            until(lambda: client.measured("hf_vit_body_bytes") == 0)
        assert client.post(picture()).status == 200


def test_many_large_bodies_are_rejected_while_they_arrive(models: Any) -> None:
    with served(models("classifier"), largest=100_000) as client:
        head = b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n"
        senders = [socket.create_connection(("127.0.0.1", client.port), PATIENCE) for _ in range(17)]
        try:
            for number, sender in enumerate(senders[:16]):
                sender.sendall(head + bytes(99_999))
                until(lambda number=number: client.measured("hf_vit_body_bytes") == 99_999 * (number + 1))
            senders[16].sendall(head + bytes(99_999))
            reply = senders[16].recv(1000)
            assert reply.startswith(b"HTTP/1.1 503 ") and b"retry-after: 1" in reply
        finally:
            for sender in senders:
                sender.close()
        until(lambda: client.measured("hf_vit_body_bytes") == 0)
        assert client.post(picture()).status == 200


def test_a_full_queue_rejects_and_recovers(models: Any) -> None:
    gate = Gate()
    with served(models("classifier"), gate, queue_size=4, batch_size=2) as client:
        with ThreadPoolExecutor() as clients:
            accepted = [clients.submit(client.post, picture(seed)) for seed in range(4)]
            until(lambda: client.measured("hf_vit_images_in_progress") == 4)
            reply = client.post(picture())
            assert reply.status == 503 and reply.headers["Retry-After"] == "1" and "queue is full" in reply.error
            assert client.ask("GET", "/health").status == 200
            gate.open.set()
            assert [each.result().status for each in accepted] == [200] * 4
        assert client.post(picture()).status == 200
        assert client.measured('hf_vit_requests_total{path="/predict",status="503"}') == 1


def test_the_work_of_a_client_that_went_away_is_dropped(models: Any) -> None:
    gate = Gate()
    with served(models("classifier"), gate, batch_size=1) as client, ThreadPoolExecutor() as clients:
        first = clients.submit(client.post, picture())
        until(lambda: gate.arrived)
        image = picture(1)
        with socket.create_connection(("127.0.0.1", client.port)) as gone:
            gone.sendall(b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%s" % (len(image), image))
            until(lambda: client.measured("hf_vit_images_waiting") == 1)
        until(lambda: client.measured('hf_vit_images_total{result="dropped"}') == 1)
        assert client.measured("hf_vit_images_in_progress") == 1
        assert client.measured('hf_vit_requests_total{path="/predict",status="499"}') == 1
        gate.open.set()
        assert first.result().status == 200
        assert client.post(picture(2)).status == 200 and gate.arrived == [1, 1]


def test_slow_clients_are_cut_off_and_others_are_answered(models: Any) -> None:
    parts = (b"", b"POST /pre", b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n", b"")
    with served(models("classifier"), seconds=2) as client:
        slow = [socket.create_connection(("127.0.0.1", client.port), PATIENCE) for _ in parts]
        for sender, part in zip(slow, parts, strict=True):
            sender.sendall(part)
        replies = []
        for sender in slow:
            with sender:
                replies.append(b"".join(iter(lambda sender=sender: sender.recv(1000), b"")))
        for reply in replies:
            assert reply.startswith(b"HTTP/1.1 408 ") and reply.endswith(b'send it faster, or in parts."}')
        until(lambda: client.measured("hf_vit_body_bytes") == 0)
        until(lambda: client.post(picture()).status == 200)


def test_a_client_that_sends_a_byte_at_a_time_is_cut_off_too(models: Any) -> None:
    with (
        served(models("classifier"), seconds=1) as client,
        socket.create_connection(("127.0.0.1", client.port), PATIENCE) as slow,
        pytest.raises(OSError),
    ):
        for byte in b"GET / HTTP/1.1\r\nX: " + b"a" * 10_000:
            slow.sendall(bytes([byte]))
            time.sleep(0.05)


# ------------------------------------------------------------------------------------------------ a model that fails


def broken_for(is_bad: Callable[[Any], bool]) -> Callable[[Any], None]:
    """Return a change of a predictor after which batches with certain pixels raise an error."""

    def prepare(predictor: Any) -> None:
        compute = predictor.start

        def start(images: Any) -> Any:
            if any(is_bad(pixels) for _, pixels in images):
                raise RuntimeError("out of\nmemory")
            return compute(images)

        predictor.start = start

    return prepare


def test_an_image_that_the_model_fails_on_harms_no_other(models: Any) -> None:
    black = io.BytesIO()
    Image.new("RGB", (40, 30)).save(black, "PNG")
    images = [picture(0), black.getvalue(), picture(1), picture(2)]
    gate, wanted = Gate(), Predictor.from_pretrained(models("classifier"), "fp32")
    answers = [expected("classifier", prediction) for prediction in wanted(images)]

    def prepare(predictor: Any) -> None:
        broken_for(lambda pixels: pixels.float().mean() < 1)(predictor)
        gate(predictor)

    with served(models("classifier"), prepare) as client:
        with ThreadPoolExecutor() as clients:
            first = clients.submit(client.post, picture(9))
            until(lambda: gate.arrived)
            replies = [clients.submit(client.post, image) for image in images]
            until(lambda: len(client.engine.waiting) == 4)
            gate.open.set()
            assert first.result().status == 200
            for number, reply in enumerate(replies):
                if number == 1:
                    assert reply.result().status == 500
                    assert reply.result().error == "The model failed (RuntimeError: out of memory)."
                else:
                    assert close(reply.result().json, answers[number])
        assert gate.arrived[:2] == [1, 4] and client.ask("GET", "/health").status == 200
        assert client.measured('hf_vit_images_total{result="failed"}') == 1


@pytest.mark.parametrize("error", [RuntimeError("device lost"), SystemExit(3)], ids=["error", "exit"])
def test_a_dead_model_answers_everybody_and_ends_the_server(error: BaseException, models: Any) -> None:
    gate = Gate()

    def prepare(predictor: Any) -> None:
        compute = predictor.start

        def start(images: Any) -> Any:
            if gate.open.is_set():
                raise error
            return compute(images)

        predictor.start = start
        gate(predictor)

    with served(models("classifier"), prepare, batch_size=2) as client, ThreadPoolExecutor() as clients:
        replies = [clients.submit(client.post, picture(seed)) for seed in range(5)]
        until(lambda: client.measured("hf_vit_images_in_progress") == 5 and gate.arrived)
        kept = http.client.HTTPConnection("127.0.0.1", client.port, timeout=PATIENCE)
        gate.open.set()
        assert [reply.result().status for reply in replies] == [500] * 5
        assert "The model failed" in replies[-1].result().error
        until(lambda: client.engine.failure is not None)
        with pytest.raises(OSError):  # the server has ended
            while True:
                assert client.ask("GET", "/health").status == 503
        kept.close()


def test_a_killed_task_answers_everybody(models: Any) -> None:
    gate = Gate()
    with served(models("classifier"), gate, batch_size=2) as client, ThreadPoolExecutor() as clients:
        replies = [clients.submit(client.post, picture(seed)) for seed in range(3)]
        until(lambda: client.measured("hf_vit_images_in_progress") == 3 and gate.arrived)
        client.engine.task.get_loop().call_soon_threadsafe(client.engine.task.cancel)
        assert [reply.result().status for reply in replies] == [500] * 3
        gate.open.set()


def test_values_that_are_no_numbers_are_an_error(models: Any) -> None:
    def prepare(predictor: Any) -> None:
        model = predictor.model
        predictor.model = lambda pixels: type(model(pixels))(logits=torch.full((len(pixels), 3), torch.nan))
        predictor.has_features = False

    with served(models("classifier"), prepare) as client:
        reply = client.post(picture())
        assert reply.status == 500 and "NaN or infinite values: serve it with --precision fp32" in reply.error


# ---------------------------------------------------------------------------------------------- a process of its own


@contextmanager
def serving(model: str, folder: Path, prepare: Any = None, **options: Any) -> Iterator[tuple[Any, Client, Path]]:
    """Serve a model by a process; yield it, a client, and the file with what it prints."""
    output = folder / "said.txt"
    process = start(partial(serve, Settings(model, "fp32"), port=0, **options), output, prepare)
    try:
        until(lambda: process.exitcode is not None or (output.exists() and "Serving" in output.read_text()))
        said = output.read_text()
        assert "Serving" in said, said
        yield process, Client(int(said.partition("http://127.0.0.1:")[2].partition(" ")[0])), output
    finally:
        process.kill()
        process.join()


def slow_model() -> None:
    """Make every batch take a second."""
    compute = Predictor.start

    def start(self: Any, images: Any) -> Any:
        time.sleep(1)
        return compute(self, images)

    Predictor.start = start  # type: ignore[method-assign]


def dying_model() -> None:
    """Make the third batch and all after it fail: the first two warm it up."""
    compute, batches = Predictor.start, iter(range(2))

    def start(self: Any, images: Any) -> Any:
        if next(batches, None) is None:
            raise RuntimeError("device lost")
        return compute(self, images)

    Predictor.start = start  # type: ignore[method-assign]


def send(client: Client) -> socket.socket:
    """Send a request without waiting for the response."""
    sent, image = socket.create_connection(("127.0.0.1", client.port), PATIENCE), picture()
    sent.sendall(b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%s" % (len(image), image))
    return sent


def receive(sent: socket.socket) -> bytes:
    with sent:
        return b"".join(iter(lambda: sent.recv(1000), b""))


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_after_all_answers(signum: int, models: Any, tmp_path: Path) -> None:
    with serving(models("classifier"), tmp_path, slow_model) as (process, client, output):
        until(lambda: client.ask("GET", "/ready").status == 200)
        sent = [send(client) for _ in range(12)]  # two batches, one of which waits
        until(lambda: client.measured("hf_vit_images_in_progress") == 12)
        os.kill(process.pid, signum)
        replies = [receive(each) for each in sent]
        assert all(reply.startswith(b"HTTP/1.1 200 ") and b'"labels"' in reply for reply in replies)
        assert "Traceback" not in ends([process], output, 0)
        with pytest.raises(ConnectionRefusedError):
            client.ask("GET", "/health")


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once(models: Any, tmp_path: Path) -> None:
    with serving(models("classifier"), tmp_path, slow_model) as (process, client, output):
        until(lambda: client.ask("GET", "/ready").status == 200)
        sent = [send(client) for _ in range(100)]  # thirteen seconds
        until(lambda: client.measured("hf_vit_images_in_progress") > 90)
        os.kill(process.pid, signal.SIGTERM)
        until(lambda: not is_open(client))
        os.kill(process.pid, signal.SIGTERM)
        ends([process], output, 143)
        for each in sent:
            each.close()


def is_open(client: Client) -> bool:
    try:
        socket.create_connection(("127.0.0.1", client.port)).close()
    except OSError:
        return False
    return True


@pytest.mark.slow
def test_a_dead_model_ends_the_process_with_an_error(models: Any, tmp_path: Path) -> None:
    with serving(models("classifier"), tmp_path, dying_model) as (process, client, output):
        until(lambda: client.ask("GET", "/ready").status == 200)
        replies = [receive(each) for each in [send(client) for _ in range(3)]]
        assert all(reply.startswith(b"HTTP/1.1 500 ") and b"device lost" in reply for reply in replies)
        said = ends([process], output, 2)
        assert (
            "Error: The server stopped, since its model failed: The model failed (RuntimeError: device lost)." in said
        )


@pytest.mark.slow
def test_clients_of_a_killed_process_get_an_error(models: Any, tmp_path: Path) -> None:
    with serving(models("classifier"), tmp_path, slow_model) as (process, client, _):
        until(lambda: client.ask("GET", "/ready").status == 200)
        sent = [send(client) for _ in range(3)]
        until(lambda: client.measured("hf_vit_images_in_progress") == 3)
        process.kill()
        for each in sent:
            with suppress(ConnectionResetError):
                assert receive(each) == b""  # no answer, and no wait for one


# --------------------------------------------------------------------------------------------------- the command


def run(*words: object) -> Any:
    return CliRunner().invoke(commands, ["serve", *map(str, words)])


def test_what_cannot_be_served_is_told_before_it_is_loaded(models: Any, tmp_path: Path) -> None:
    with bound("127.0.0.1", 0) as taken:
        taken.listen()
        ended = run(models("classifier"), "--port", taken.getsockname()[1])
        assert ended.exit_code == 2 and "choose another --port" in ended.output
    ended = run(tmp_path / "nothing")
    assert ended.exit_code == 2 and "No such file or folder" in ended.output
    ended = run(models("classifier"), "--host", "192.0.2.1")
    assert ended.exit_code == 2 and "an address of this machine" in ended.output


def test_a_missing_package_is_named(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_vit.system.extras.find_spec", lambda package: None if package == "fastapi" else package)
    ended = run(models("classifier"))
    assert ended.exit_code == 2 and 'pip install "hf-vit[serve]"' in ended.output


def test_histograms_are_cumulative() -> None:
    histogram = Histogram((1, 2))
    for value in (1, 1.5, 2, 3):
        histogram.add(value)
    assert list(histogram.lines("x")) == [
        'x_bucket{le="1"} 1',
        'x_bucket{le="2"} 3',
        'x_bucket{le="+Inf"} 4',
        "x_sum 7.5",
        "x_count 4",
    ]
