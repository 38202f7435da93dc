"""One variant in a process of its own: it is made, answers once to be checked, and works when it is told to.

    python -P measure.py JOB        JOB is a `Job` as JSON

Run by its path, and importing what it measures alone: many libraries in one process bias each other, and hf_vit brings
torch and transformers, which another library's memory would then be charged with. What it says are lines of JSON:

    {"precision", "operations"}    made, answered, warmed up; the answer lies in `Job.answer`
    {"seconds": [...]}             for each line on stdin, a round: seconds of every call
    {"peak_memory": bytes}         when stdin ends
    {"failed": "why"}              instead of any of these
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

LEAST_CALLS = 3  # in a round
STEPS_CHECKED = 3
LEARNING_RATE = 1e-4
LARGEST_SIDE = {"cpu": 2048, "cuda": 8192}  # of the matrices that show what the hardware can do


class Job(NamedTuple):
    """What a process measures, and where things lie.

    Attributes:
        suite, variant: Keys of `SUBJECTS`.
        models: Folder of the weights, in the layouts of all libraries.
        folder: Folder of what goes in: arrays or photos.
        answer: File to write the answer to.
        device: `"cpu"` or `"cuda"`.
        precision: `"fp32"` or `"bf16"`.
        threads: Of every library that can be told.
        seconds: Length of a round.
        cores: Those to run on, where the parent's threads have been bound to fewer.
    """

    suite: str
    variant: str
    models: str
    folder: str
    answer: str
    device: str
    precision: str
    threads: int
    seconds: float
    cores: list[int] | None = None


class Subject(NamedTuple):
    """What is measured.

    Attributes:
        call: Does the work once, to its end.
        answer: Does it in a way that can be compared.
        precision: What it computes in.
        operations: Floating-point operations of a call, where only it knows.
    """

    call: Callable[[], Any]
    answer: Callable[[], np.ndarray]
    precision: str
    operations: int | None = None


def array(job: Job, name: str) -> np.ndarray:
    """Read an array that goes in."""
    return np.load(Path(job.folder, f"{name}.npy"))


# ------------------------------------------------------------------------------------------------------- networks
# From a job to a module that gives logits, or an output that has them.


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
    """Return the logits of an output, which some libraries wrap."""
    return output["logits"] if isinstance(output, dict) else output


def synchronizer(job: Job) -> Callable[[], None]:
    """Return what waits until the device has done all that it was given."""
    import torch

    return torch.cuda.synchronize if job.device == "cuda" else lambda: None


def training(load: Callable[[Job], Any], job: Job, is_compiled: bool = False) -> Subject:
    """A step on one batch: forward, loss, backward, AdamW. The answer is the logits of the first steps."""
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(job.threads)
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

    def answer() -> np.ndarray:
        return torch.stack([step().detach().float() for _ in range(STEPS_CHECKED)]).cpu().numpy()

    return Subject(step, answer, job.precision)


def inference(load: Callable[[Job], Any], job: Job) -> Subject:
    """Logits of one batch; for bf16, weights and images are."""
    import torch

    torch.set_num_threads(job.threads)
    dtype = torch.bfloat16 if job.precision == "bf16" else torch.float32
    network = load(job).to(job.device, dtype).eval()
    return _forward(network, dtype, job)


def optimized_inference(job: Job, is_compiled: bool = False) -> Subject:
    """The same by what this package does to a model that will not be trained."""
    import torch

    from hf_vit.inference.optimize import optimize_for_inference

    torch.set_num_threads(job.threads)
    network = optimize_for_inference(load_ours(job).to(job.device), job.precision, is_compiled)
    return _forward(network, torch.bfloat16 if job.precision == "bf16" else torch.float32, job)


def _forward(network: Any, dtype: Any, job: Job) -> Subject:
    import torch

    pixel_values = torch.from_numpy(array(job, "pixel_values")).to(job.device, dtype)
    synchronize = synchronizer(job)

    @torch.inference_mode()
    def forward() -> Any:
        logits = logits_of(network(pixel_values))
        synchronize()
        return logits

    return Subject(forward, lambda: forward().float().cpu().numpy(), job.precision)


def onnxruntime_inference(job: Job) -> Subject:
    """The exported graph. On a CPU it computes in fp32, whatever is asked for."""
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


def openvino_inference(job: Job) -> Subject:
    """The exported graph; OpenVINO computes in the precision asked for if the processor has it."""
    import openvino

    if job.device != "cpu":
        raise ValueError("OpenVINO has no such device")
    options = {
        "INFERENCE_NUM_THREADS": job.threads,
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[job.precision],
        "PERFORMANCE_HINT": "LATENCY",
    }
    network = openvino.Core().compile_model(Path(job.folder, "model.onnx"), "CPU", options)
    used = network.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    pixel_values = array(job, "pixel_values")

    def forward() -> np.ndarray:
        return network(pixel_values, share_inputs=True)[0]

    return Subject(forward, forward, {"f32": "fp32"}.get(used, used))


def ceiling(job: Job) -> Subject:
    """Products of matrices as large as time allows, of three shapes with as many operations each."""
    import torch

    torch.set_num_threads(job.threads)
    dtype = torch.bfloat16 if job.precision == "bf16" else torch.float32
    synchronize = synchronizer(job)

    def matrix(rows: int, columns: int) -> Any:
        return torch.randn(rows, columns, device=job.device).to(dtype)

    def products(side: int) -> Callable[[], None]:
        shapes = [(side, side, side), (2 * side, side // 2, side), (side // 2, side, 2 * side)]
        pairs = [(matrix(rows, inner), matrix(inner, columns)) for rows, inner, columns in shapes]

        def multiply() -> None:
            pairs.append(pairs.pop(0))
            torch.mm(*pairs[0])
            synchronize()

        return multiply

    side = 256
    while side < LARGEST_SIDE[job.device] and 8 * min(timed_calls(products(side), 0)) < job.seconds / 10:
        side *= 2
    return Subject(products(side), lambda: np.zeros(0), job.precision, 2 * side**3)


# --------------------------------------------------------------------------------------------------------- images
# Photos as they lie in files, to pixel values [B, 3, 224, 224] or to labels.

PROCESSING: dict[str, Any] = {
    "size": {"height": 224, "width": 224},
    "resample": 2,  # bilinear, as google/vit-base-patch16-224 has it
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
SMALLEST_CROP = 0.08


def photo_paths(job: Job) -> list[str]:
    """Return the photos of a job."""
    return [str(path) for path in sorted(Path(job.folder, "photos").iterdir())]


def encoded_photos(job: Job) -> list[bytes]:
    """Read the photos of a job, undecoded."""
    return [Path(path).read_bytes() for path in photo_paths(job)]


def preprocessing_by_transformers(backend: str, job: Job) -> Subject:
    import torch
    from PIL import Image
    from transformers import ViTImageProcessor, ViTImageProcessorPil

    torch.set_num_threads(job.threads)
    processor: Any = {"torchvision": ViTImageProcessor, "pil": ViTImageProcessorPil}[backend](**PROCESSING)
    photos = encoded_photos(job)

    def preprocess() -> Any:
        return processor([Image.open(BytesIO(photo)) for photo in photos], return_tensors="pt")["pixel_values"]

    return Subject(preprocess, lambda: preprocess().numpy(), "uint8")


def preprocessing_by_ours(job: Job, kind: str = "uint8", **options: Any) -> Subject:
    import torch

    from hf_vit import HFViTImageProcessor

    torch.set_num_threads(job.threads)
    processor: Any = HFViTImageProcessor(**PROCESSING, **options)
    photos = encoded_photos(job)

    def preprocess() -> Any:
        return processor(photos, return_tensors="pt")["pixel_values"]

    return Subject(preprocess, lambda: preprocess().numpy(), kind)


def augmentation_by_torchvision(job: Job) -> Subject:
    """Random resized crop, flip and normalisation as its documentation shows them, of Pillow's images."""
    import torch
    from PIL import Image
    from torchvision.transforms import v2

    torch.set_num_threads(job.threads)
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

    def vary(photo: bytes, seed: int) -> Any:
        torch.default_generator.manual_seed(seed)
        return augment(Image.open(BytesIO(photo)).convert("RGB"))

    def load() -> Any:
        return torch.stack([vary(photo, seed) for photo, seed in zip(photos, seeds, strict=True)])

    return Subject(load, lambda: load().numpy(), "uint8")


def augmentation_by_ours(job: Job) -> Subject:
    """What a worker of the training loop does, and what the loop then does to the batch."""
    import torch
    from datasets import Dataset

    from hf_vit import HFViTImageProcessor
    from hf_vit.data.augmentation import build_augmentation
    from hf_vit.data.images import TrainingImages, Visit, collate, normalize

    torch.set_num_threads(job.threads)
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
    """The pipeline on files, in batches of 8. The answer is the number of every photo's label."""
    import torch
    from transformers import pipeline

    torch.set_num_threads(job.threads)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    classify: Any = pipeline(
        "image-classification", f"{job.models}/transformers", device=job.device, dtype=dtype, batch_size=8
    )
    paths, numbers = photo_paths(job), classify.model.config.label2id

    def predict() -> list[str]:
        return [answers[0]["label"] for answers in classify(paths, top_k=1)]

    return Subject(predict, lambda: np.array([numbers[label] for label in predict()]), precision)


def prediction_by_ours(job: Job) -> Subject:
    """`Predictor` on files. The answer is the number of every photo's label."""
    from hf_vit import HFViTConfig
    from hf_vit.prediction.predictor import Predictor

    workers = job.threads if job.device == "cpu" else None
    predictor = Predictor.from_pretrained(f"{job.models}/ours", job.precision, device=job.device, workers=workers)
    config: Any = HFViTConfig.from_pretrained(f"{job.models}/ours")
    paths, numbers = photo_paths(job), config.label2id

    def predict() -> list[str]:
        return [prediction.labels[0] for prediction in predictor(paths)]

    return Subject(predict, lambda: np.array([numbers[label] for label in predict()]), job.precision)


# ------------------------------------------------------------------------------------------------------- variants

CEILING = "matrix products"
# The first is what the others are compared with. A further one is a line here.
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
        "ours reduced": partial(preprocessing_by_ours, kind="reduced", reducing_gap=1),
    },
    "augmentation": {
        "torchvision": augmentation_by_torchvision,
        "ours": augmentation_by_ours,
    },
    "prediction": {
        "transformers": partial(prediction_by_transformers, "fp32"),
        "transformers bf16": partial(prediction_by_transformers, "bf16"),
        "ours": prediction_by_ours,
    },
}

# -------------------------------------------------------------------------------------------------------- process


def timed_calls(call: Callable[[], Any], seconds: float, least: int = LEAST_CALLS) -> list[float]:
    """Return the seconds of each of the calls that fit into `seconds`, of `least` at the least.

    One call before them is not counted: other processes had the caches since the last round.
    """
    call()
    began = time.perf_counter()
    times: list[float] = []
    while len(times) < least or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def forget_peak(job: Job) -> None:
    """Begin to watch the memory: loading weights is behind us."""
    if job.device == "cuda" and "torch" in sys.modules:
        sys.modules["torch"].cuda.reset_peak_memory_stats()
    elif (clear := Path("/proc/self/clear_refs")).exists():
        clear.write_text("5")


def peak_memory(job: Job) -> int | None:
    """Return bytes: of the device where torch works on one, else resident ones of the process."""
    if job.device == "cuda":
        return sys.modules["torch"].cuda.max_memory_allocated() if "torch" in sys.modules else None
    if (status := Path("/proc/self/status")).exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def free_cache(job: Job) -> None:
    """Give back what torch keeps of the device's memory: all variants are there at once."""
    if job.device == "cuda" and "torch" in sys.modules:
        sys.modules["torch"].cuda.empty_cache()


def serve(job: Job, make: Callable[[Job], Subject], say: Callable[[dict[str, Any]], None]) -> None:
    """Make the subject, answer, and work for a round at each line of stdin."""
    subject = make(job)
    np.save(job.answer, subject.answer())
    timed_calls(subject.call, job.seconds / 2, least=1)
    free_cache(job)
    forget_peak(job)
    say({"precision": subject.precision, "operations": subject.operations})
    for _ in sys.stdin:
        times = timed_calls(subject.call, job.seconds)
        free_cache(job)
        time.sleep(0.05)  # threads of OpenMP wait awake for some milliseconds: let them fall asleep
        say({"seconds": times})
    say({"peak_memory": peak_memory(job)})


def main(job: Job, make: Callable[[Job], Subject]) -> None:
    """Serve on stdin and stdout; whatever libraries print goes to stderr."""
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=lines, flush=True)

    if job.cores is not None:
        os.sched_setaffinity(0, job.cores)
    try:
        serve(job, make, say)
    except Exception as error:  # a variant that fails is a line of the table
        say({"failed": f"{type(error).__name__}: {error}"})
        raise


if __name__ == "__main__":
    the_job = Job(**json.loads(sys.argv[1]))
    main(the_job, SUBJECTS[the_job.suite][the_job.variant])
