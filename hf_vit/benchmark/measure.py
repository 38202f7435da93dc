"""Measurement of one variant in a separate process.

    python -P measure.py JOB        JOB is a `Job` as JSON

The file is run by its path and imports only the library that it measures: libraries in one process influence each
other, and `import hf_vit` would add the memory of torch and transformers to that of any library. Output, JSON lines:

    {"precision", "operations"}    after building, checking and warm-up; the outputs are in `Job.output_file`
    {"seconds": [...]}             for each line on stdin, one round: seconds of each call
    {"peak_memory": bytes}         at the end of stdin
    {"failed": "reason"}           instead of any of these
"""

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MIN_CALLS = 3  # per round
CHECKED_STEPS = 3
LEARNING_RATE = 1e-4
MAX_MATRIX_SIDE = {"cpu": 2048, "cuda": 8192}


class Job(NamedTuple):
    """Describe what a process measures.

    Attributes:
        suite, variant: Keys of `SUBJECTS`.
        models, folder: Folder of the weights in all layouts, and of the inputs and outputs.
        device, precision: `"cpu"` or `"cuda"`, `"fp32"` or `"bf16"`.
        threads: Number of threads; torch reads it from OMP_NUM_THREADS.
        seconds: Duration of a round.
        cores: CPU cores to run on if the threads of the parent are bound to fewer.
    """

    suite: str
    variant: str
    models: str
    folder: str
    device: str
    precision: str
    threads: int
    seconds: float
    cores: list[int] | None = None

    @property
    def output_file(self) -> Path:
        """File for the outputs that are compared with the reference."""
        return Path(self.folder, f"output of {self.variant}.npy")


class Subject(NamedTuple):
    """Work to measure.

    Attributes:
        call: Does the work once and waits for the device.
        output: Does the work and returns outputs that can be compared.
        precision: Precision of the computation.
        operations: Floating-point operations per call, if only the subject knows them.
    """

    call: Callable[[], Any]
    output: Callable[[], np.ndarray]
    precision: str
    operations: int | None = None


def array(job: Job, name: str) -> np.ndarray:
    """Read an input array."""
    return np.load(Path(job.folder, f"{name}.npy"))


# ------------------------------------------------------------------------------------------------------- networks
# Loaders return a module that returns logits, or an output with logits.


def load_timm(job: Job) -> Any:
    import timm

    return timm.create_model(f"local-dir:{job.models}/timm", pretrained=True)


def load_transformers(job: Job) -> Any:
    from transformers import ViTForImageClassification

    return ViTForImageClassification.from_pretrained(Path(job.models, "transformers"), attn_implementation="sdpa")


def load_vit_pytorch(job: Job) -> Any:
    from safetensors.torch import load_file
    from vit_pytorch import ViT

    folder = Path(job.models, "vit-pytorch")
    network = ViT(**json.loads((folder / "arguments.json").read_text(encoding="utf-8")))
    network.load_state_dict(load_file(folder / "model.safetensors"))
    return network


def load_ours(job: Job) -> Any:
    from hf_vit import HFViTForImageClassification

    return HFViTForImageClassification.from_pretrained(Path(job.models, "ours"))


def logits_of(output: Any) -> Any:
    """Return the logits of a network's output."""
    return output["logits"] if isinstance(output, dict) else output


def torch_dtype(precision: str) -> Any:
    """Return the dtype of a precision."""
    import torch

    return torch.bfloat16 if precision == "bf16" else torch.float32


def synchronizer(job: Job) -> Callable[[], None]:
    """Return a function that waits for the device."""
    import torch

    return torch.cuda.synchronize if job.device == "cuda" else lambda: None


def training(load: Callable[[Job], Any], job: Job, is_compiled: bool = False) -> Subject:
    """Measure training steps on one batch: forward, loss, backward, AdamW. Outputs: logits of the first steps."""
    import torch
    import torch.nn.functional as F

    network = load(job).to(job.device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=0.05, fused=True)
    if is_compiled:
        network.compile()
    pixel_values = torch.from_numpy(array(job, "pixel_values")).to(job.device)
    labels = torch.from_numpy(array(job, "labels")).to(job.device)
    synchronize = synchronizer(job)

    def step() -> Any:
        with torch.autocast(job.device, torch.bfloat16, enabled=job.precision == "bf16"):
            logits = logits_of(network(pixel_values))
            loss = F.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize()
        return logits

    def output() -> np.ndarray:
        return torch.stack([step().detach().float() for _ in range(CHECKED_STEPS)]).cpu().numpy()

    return Subject(step, output, job.precision)


def inference(load: Callable[[Job], Any], job: Job) -> Subject:
    """Measure the logits of one batch. In bf16 both weights and images are bf16."""
    return forward_subject(load(job).to(job.device, torch_dtype(job.precision)).eval(), job)


def optimized_inference(job: Job, is_compiled: bool = False) -> Subject:
    """Measure `optimize_for_inference`."""
    from hf_vit.inference.optimize import optimize_for_inference

    return forward_subject(optimize_for_inference(load_ours(job).to(job.device), job.precision, is_compiled), job)


def forward_subject(network: Any, job: Job) -> Subject:
    import torch

    pixel_values = torch.from_numpy(array(job, "pixel_values")).to(job.device, torch_dtype(job.precision))
    synchronize = synchronizer(job)

    @torch.inference_mode()
    def forward() -> Any:
        logits = logits_of(network(pixel_values))
        synchronize()
        return logits

    return Subject(forward, lambda: forward().float().cpu().numpy(), job.precision)


def onnxruntime_inference(job: Job) -> Subject:
    """Measure the exported graph. On a CPU it always computes in fp32."""
    import onnxruntime

    provider = "CUDAExecutionProvider" if job.device == "cuda" else "CPUExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        raise ValueError(f"this onnxruntime has no {provider}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job.threads
    session = onnxruntime.InferenceSession(Path(job.folder, "model.onnx"), options, providers=[provider])
    pixel_values = {session.get_inputs()[0].name: array(job, "pixel_values")}

    def forward() -> np.ndarray:
        return session.run(None, pixel_values)[0]

    return Subject(forward, forward, "fp32")


def compiled_by_openvino(job: Job, hint: str) -> tuple[Any, str]:
    """Return the exported graph as OpenVINO compiles it for latency or throughput, and the precision that it uses."""
    import openvino

    if job.device != "cpu":
        raise ValueError("OpenVINO is measured on CPUs only")
    options = {
        "INFERENCE_NUM_THREADS": job.threads,
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[job.precision],
        "PERFORMANCE_HINT": hint,
    }
    network = openvino.Core().compile_model(Path(job.folder, "model.onnx"), "CPU", options)
    used = network.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    return network, {"f32": "fp32"}.get(used, used)


def openvino_inference(job: Job) -> Subject:
    """Measure the exported graph, in the requested precision if the processor supports it."""
    network, precision = compiled_by_openvino(job, "LATENCY")
    pixel_values = array(job, "pixel_values")

    def forward() -> np.ndarray:
        return network(pixel_values, share_inputs=True)[0]

    return Subject(forward, forward, precision)


def ceiling(job: Job) -> Subject:
    """Measure products of matrices as large as time permits, in three shapes with equally many operations."""
    import torch

    synchronize = synchronizer(job)

    def matrix(rows: int, columns: int) -> Any:
        return torch.randn(rows, columns, device=job.device).to(torch_dtype(job.precision))

    def products(side: int) -> Callable[[], None]:
        shapes = [(side, side, side), (2 * side, side // 2, side), (side // 2, side, 2 * side)]
        pairs = [(matrix(rows, inner), matrix(inner, columns)) for rows, inner, columns in shapes]

        def multiply() -> None:
            pairs.append(pairs.pop(0))
            torch.mm(*pairs[0])
            synchronize()

        return multiply

    side = 256
    while side < MAX_MATRIX_SIDE[job.device] and 8 * min(timed_calls(products(side), 0)) < job.seconds / 10:
        side *= 2
    return Subject(products(side), lambda: np.zeros(0), job.precision, 2 * side**3)


# --------------------------------------------------------------------------------------------------------- images
# Encoded photos to pixel values [B, 3, 224, 224] or to labels.

PROCESSING: dict[str, Any] = {
    "size": {"height": 224, "width": 224},
    "resample": 2,  # bilinear, as in google/vit-base-patch16-224
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
SMALLEST_CROP = 0.08


def photo_paths(job: Job) -> list[str]:
    """Return the files of the photos of a job."""
    return [str(path) for path in sorted(Path(job.folder, "photos").iterdir())]


def encoded_photos(job: Job) -> list[bytes]:
    """Read the photos of a job without decoding them."""
    return [Path(path).read_bytes() for path in photo_paths(job)]


def preprocessing_by_transformers(backend: str, job: Job) -> Subject:
    from PIL import Image
    from transformers import ViTImageProcessor, ViTImageProcessorPil

    processor = {"torchvision": ViTImageProcessor, "pil": ViTImageProcessorPil}[backend](**PROCESSING)
    return preprocessing(processor, lambda photo: Image.open(BytesIO(photo)), job)


def preprocessing_by_ours(job: Job, precision: str = "uint8", **options: Any) -> Subject:
    from hf_vit import HFViTImageProcessor

    return preprocessing(HFViTImageProcessor(**PROCESSING, **options), bytes, job, precision)


def preprocessing(processor: Any, read: Callable[[bytes], Any], job: Job, precision: str = "uint8") -> Subject:
    """Measure an image processor on encoded photos, each passed through `read`."""
    photos = encoded_photos(job)

    def preprocess() -> Any:
        return processor([read(photo) for photo in photos], return_tensors="pt")["pixel_values"]

    return Subject(preprocess, lambda: preprocess().numpy(), precision)


def augmentation_by_torchvision(job: Job) -> Subject:
    """Measure random resized crop, flip and normalisation of Pillow images, as in torchvision's documentation."""
    import torch
    from PIL import Image
    from torchvision.transforms import v2

    size = (PROCESSING["size"]["height"], PROCESSING["size"]["width"])
    augment = v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(SMALLEST_CROP, 1.0)),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(PROCESSING["image_mean"], PROCESSING["image_std"]),
        ]
    )
    photos, seeds = encoded_photos(job), array(job, "seeds").tolist()

    def augmented(photo: bytes, seed: int) -> Any:
        torch.default_generator.manual_seed(seed)
        return augment(Image.open(BytesIO(photo)).convert("RGB"))

    def load() -> Any:
        return torch.stack([augmented(photo, seed) for photo, seed in zip(photos, seeds, strict=True)])

    return Subject(load, lambda: load().numpy(), "uint8")


def augmentation_by_ours(job: Job) -> Subject:
    """Measure what a data loader worker and the training loop do to the images of a batch."""
    from datasets import Dataset

    from hf_vit import HFViTImageProcessor
    from hf_vit.data.augmentation import build_augmentation
    from hf_vit.data.images import TrainingImages, Visit, collate, normalize

    processor = HFViTImageProcessor(**PROCESSING)
    size = (PROCESSING["size"]["height"], PROCESSING["size"]["width"])
    photos = [{"bytes": photo, "path": None} for photo in encoded_photos(job)]
    split = Dataset.from_dict({"image": photos, "label": [0] * len(photos)})
    augment = build_augmentation("crop_flip", size, SMALLEST_CROP)
    images = TrainingImages(split, ("image", "label"), processor, augment, seed=0)

    def load() -> Any:
        batch = collate([images[Visit(0, index)] for index in range(len(images))])
        return normalize(batch["pixel_values"], processor)

    return Subject(load, lambda: load().numpy(), "uint8")


def prediction_by_transformers(precision: str, job: Job) -> Subject:
    """Measure the pipeline on files, in batches of 8. Outputs: the class index of each photo."""
    from transformers import pipeline

    options: dict[str, Any] = {"device": job.device, "dtype": torch_dtype(precision), "batch_size": 8}
    classify: Any = pipeline("image-classification", f"{job.models}/transformers", **options)
    paths, indices = photo_paths(job), classify.model.config.label2id

    def predict() -> list[str]:
        return [predictions[0]["label"] for predictions in classify(paths, top_k=1)]

    return Subject(predict, lambda: np.array([indices[label] for label in predict()]), precision)


def prediction_by_timm(job: Job) -> Subject:
    """Measure a loop like that of timm's validate.py: its transform, a `DataLoader`, batches of 8."""
    import torch
    from PIL import Image
    from timm.data import create_transform, resolve_model_data_config

    network = load_timm(job).to(job.device, torch_dtype(job.precision)).eval()
    same = {"mean": PROCESSING["image_mean"], "std": PROCESSING["image_std"], "crop_pct": 1.0}
    transform: Any = create_transform(
        **{**resolve_model_data_config(network), **same, "interpolation": "bilinear", "crop_mode": "squash"}
    )
    photos = [(path, transform) for path in photo_paths(job)]

    def read(pairs: list[Any]) -> Any:
        return torch.stack([transform(Image.open(path).convert("RGB")) for path, transform in pairs])

    loader: Any = torch.utils.data.DataLoader(photos, batch_size=8, collate_fn=read)  # type: ignore[arg-type]

    @torch.inference_mode()
    def predict() -> np.ndarray:
        answers = [network(batch.to(job.device, torch_dtype(job.precision))).argmax(dim=1) for batch in loader]
        return torch.cat(answers).cpu().numpy()

    return Subject(predict, predict, job.precision)


def prediction_by_openvino(job: Job) -> Subject:
    """Measure OpenVINO as its documentation advises for throughput: Pillow, and requests of 8 photos in a queue."""
    import openvino
    from PIL import Image

    network, precision = compiled_by_openvino(job, "THROUGHPUT")
    paths, size = photo_paths(job), (PROCESSING["size"]["width"], PROCESSING["size"]["height"])
    mean, std = np.float32(PROCESSING["image_mean"]), np.float32(PROCESSING["image_std"])

    def pixels(path: str) -> np.ndarray:
        small = Image.open(path).convert("RGB").resize(size, Image.Resampling(PROCESSING["resample"]))
        return ((np.asarray(small, dtype=np.float32) / 255 - mean) / std).transpose(2, 0, 1)

    def predict() -> np.ndarray:
        answers: dict[int, np.ndarray] = {}
        queue = openvino.AsyncInferQueue(network)
        queue.set_callback(lambda request, start: answers.update({start: request.get_output_tensor().data.argmax(1)}))
        for start in range(0, len(paths), 8):
            queue.start_async(np.stack([pixels(path) for path in paths[start : start + 8]]), start)
        queue.wait_all()
        return np.concatenate([answers[start] for start in sorted(answers)])

    return Subject(predict, predict, precision)


def prediction_by_ours(job: Job, runtime: str = "torch") -> Subject:
    """Measure `Predictor` on files. Outputs: the class index of each photo."""
    from hf_vit import HFViTConfig
    from hf_vit.prediction.predictor import Predictor

    workers = job.threads if job.device == "cpu" else None
    options: dict[str, Any] = {"device": job.device, "workers": workers, "runtime": runtime}
    predictor = Predictor.from_pretrained(f"{job.models}/ours", job.precision, **options)
    config: Any = HFViTConfig.from_pretrained(f"{job.models}/ours")
    paths, indices = photo_paths(job), config.label2id

    def predict() -> list[str]:
        return [prediction.labels[0] for prediction in predictor(paths)]

    return Subject(predict, lambda: np.array([indices[label] for label in predict()]), job.precision)


# ------------------------------------------------------------------------------------------------------- variants

CEILING = "matrix products"
# The first variant of a suite is the baseline of the others. To add a variant, add a line.
SUBJECTS: dict[str, dict[str, Callable[[Job], Subject]]] = {
    "training": {
        "timm": partial(training, load_timm),
        "transformers": partial(training, load_transformers),
        "vit-pytorch": partial(training, load_vit_pytorch),
        "timm compiled": partial(training, load_timm, is_compiled=True),
        "ours": partial(training, load_ours),
        "ours compiled": partial(training, load_ours, is_compiled=True),
        CEILING: ceiling,
    },
    "inference": {
        "timm": partial(inference, load_timm),
        "transformers": partial(inference, load_transformers),
        "vit-pytorch": partial(inference, load_vit_pytorch),
        "onnxruntime": onnxruntime_inference,
        "openvino": openvino_inference,
        "ours": partial(inference, load_ours),
        "ours optimized": optimized_inference,
        "ours optimized compiled": partial(optimized_inference, is_compiled=True),
        CEILING: ceiling,
    },
    "preprocessing": {
        "transformers": partial(preprocessing_by_transformers, "torchvision"),
        "transformers pil": partial(preprocessing_by_transformers, "pil"),
        "ours": preprocessing_by_ours,
        "ours reduced": partial(preprocessing_by_ours, precision="reduced", reducing_gap=1),
    },
    "augmentation": {"torchvision": augmentation_by_torchvision, "ours": augmentation_by_ours},
    "prediction": {
        "transformers": partial(prediction_by_transformers, "fp32"),
        "transformers bf16": partial(prediction_by_transformers, "bf16"),
        "timm": prediction_by_timm,
        "openvino": prediction_by_openvino,
        "ours": prediction_by_ours,
        "ours openvino": partial(prediction_by_ours, runtime="openvino"),
    },
}

# -------------------------------------------------------------------------------------------------------- process


def timed_calls(call: Callable[[], Any], seconds: float, least: int = MIN_CALLS) -> list[float]:
    """Call for `seconds` and at least `least` times; return the seconds of each call.

    The first call is not counted: since the last round other processes have used the caches.
    """
    call()
    began = time.perf_counter()
    times: list[float] = []
    while len(times) < least or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


# `system.machine.peak_memory` includes the loading of weights, and importing it needs torch.


def reset_peak_memory(is_on_gpu: bool) -> None:
    """Restart the measurement of peak memory, so that it excludes the loading of weights."""
    if is_on_gpu:
        sys.modules["torch"].cuda.reset_peak_memory_stats()
    elif (clear := Path("/proc/self/clear_refs")).exists():
        clear.write_text("5")


def peak_memory(is_on_gpu: bool) -> int | None:
    """Return the peak in bytes of the GPU or the process since `reset_peak_memory`, or `None` if unknown."""
    if is_on_gpu:
        return sys.modules["torch"].cuda.max_memory_allocated()
    if not (status := Path("/proc/self/status")).exists():
        return None
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def serve(job: Job, make: Callable[[Job], Subject], send: Callable[[dict[str, Any]], None]) -> None:
    """Build and check the subject, then run one round for each line of stdin."""
    subject = make(job)
    np.save(job.output_file, subject.output())
    timed_calls(subject.call, job.seconds / 2, least=1)
    is_on_gpu = job.device == "cuda" and "torch" in sys.modules
    free_cache = sys.modules["torch"].cuda.empty_cache if is_on_gpu else lambda: None  # all variants share the GPU
    free_cache()
    reset_peak_memory(is_on_gpu)
    send({"precision": subject.precision, "operations": subject.operations})
    for _ in sys.stdin:
        times = timed_calls(subject.call, job.seconds)
        free_cache()
        time.sleep(0.05)  # OpenMP's threads spin for some milliseconds before they sleep
        send({"seconds": times})
    send({"peak_memory": peak_memory(is_on_gpu) if is_on_gpu or job.device == "cpu" else None})


def main(job: Job, make: Callable[[Job], Subject]) -> None:
    """Serve on stdin and stdout; everything that libraries print goes to stderr."""
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def send(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=lines, flush=True)

    if job.cores is not None:
        os.sched_setaffinity(0, job.cores)
    try:
        serve(job, make, send)
    except Exception as error:  # the table reports variants that fail
        send({"failed": f"{type(error).__name__}: {error}"})
        raise


if __name__ == "__main__":
    the_job = Job(**json.loads(sys.argv[1]))
    main(the_job, SUBJECTS[the_job.suite][the_job.variant])
