"""Peak rates of GPUs, by which a run on one of them is estimated.

Source: NVIDIA's data sheets and architecture white papers. Rates of matrix units are those without sparsity, with sums
in float32. Of a GPU in several forms, it is the SXM module.
"""

from typing import NamedTuple


class GPU(NamedTuple):
    """Peak rates of a GPU.

    Attributes:
        name: Name of the product.
        half: TFLOP/s of matrix products in bf16 or fp16.
        single: TFLOP/s in float32, without TF32.
        bandwidth: TB/s of its memory.
        memory: GiB of its memory.
        has_bf16, has_fp8: Whether its matrix units compute in bf16 and in FP8.
    """

    name: str
    half: float
    single: float
    bandwidth: float
    memory: int
    has_bf16: bool = True
    has_fp8: bool = False


GPUS = {
    "b200": GPU("NVIDIA B200", 2250, 75, 7.7, 180, has_fp8=True),
    "h200": GPU("NVIDIA H200", 989, 67, 4.8, 141, has_fp8=True),
    "h100": GPU("NVIDIA H100", 989, 67, 3.35, 80, has_fp8=True),
    "a100": GPU("NVIDIA A100 80GB", 312, 19.5, 2.04, 80),
    "a100-40gb": GPU("NVIDIA A100 40GB", 312, 19.5, 1.56, 40),
    "l40s": GPU("NVIDIA L40S", 362, 91.6, 0.864, 48, has_fp8=True),
    "l4": GPU("NVIDIA L4", 121, 30.3, 0.3, 24, has_fp8=True),
    "a10": GPU("NVIDIA A10", 125, 31.2, 0.6, 24),
    "rtx4090": GPU("NVIDIA GeForce RTX 4090", 165, 82.6, 1.01, 24, has_fp8=True),
    "rtx3090": GPU("NVIDIA GeForce RTX 3090", 71, 35.6, 0.936, 24),
    "v100": GPU("NVIDIA V100", 125, 15.7, 0.9, 32, has_bf16=False),
    "t4": GPU("NVIDIA T4", 65, 8.1, 0.3, 16, has_bf16=False),
}


def gpu_of(name: str) -> GPU:
    """Return a GPU by its name in `GPUS`, which may be written as `"RTX 4090"` or `"rtx-4090"`.

    Raises:
        ValueError: For an unknown name; the message lists the names.
    """
    plain = {known.replace("-", ""): known for known in GPUS}
    known = plain.get(name.lower().replace("-", "").replace(" ", ""))
    if known is None:
        raise ValueError(f"Unknown GPU {name!r}: choose one of {', '.join(GPUS)}.")
    return GPUS[known]
