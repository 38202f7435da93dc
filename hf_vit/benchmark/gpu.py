"""Checks of a GPU: whether its outputs match those of a CPU, and how fast it is.

Weights and images are random, so nothing is downloaded. On a CPU, the same checks run at tiny sizes.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate.utils.ao import convert_model_to_fp8_ao
from torch import Tensor

from ..evaluation.flops import count_flops
from ..inference.optimize import DTYPES, optimize_for_inference
from ..model.configuration_hf_vit import HFViTConfig
from ..model.modeling_hf_vit import HFViTForImageClassification
from ..system.checks import Check, NotPossible, Outcome
from ..system.machine import multiplies_in_8_bits
from ..variants import config_of

SMALL: dict[str, Any] = {
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 192,
    "image_size": 64,
    "num_labels": 10,
}
# One configuration for each way in which a model computes something else.
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "learned": {},
    "learned_2d in every layer": {"position_embedding_type": "learned_2d", "position_placement": "every_layer"},
    "sincos_2d, mean": {"position_embedding_type": "sincos_2d", "pooling": "mean"},
    "relative": {"position_embedding_type": "relative"},
    "rotary, registers, qk norm": {
        "position_embedding_type": "rotary",
        "num_register_tokens": 4,
        "use_qk_norm": True,
    },
    "attention pooling": {"pooling": "attention"},
    "gated MLP, LayerScale": {"use_gated_mlp": True, "hidden_act": "silu", "layer_scale_init_value": 0.1},
    "distillation token": {"pooling": "cls_and_distillation"},
    "96x48 pixels": {"image_size": (96, 48)},
    "ResNet stem": {"stem_layers": [1, 1], "stem_width": 32},
}


class Kind(NamedTuple):
    """A way to compute, and the largest relative errors of outputs and gradients from a CPU in float32.

    `gradients` is `None` for inference; `graphs` is whether CUDA graphs replay the kernels.
    """

    precision: str
    outputs: float
    gradients: float | None = None
    is_compiled: bool = False
    graphs: bool = False


KINDS = {
    "training fp32": Kind("fp32", 2e-4, 1e-3),
    "training bf16": Kind("bf16", 4e-2, 2e-1),  # the gradients of a ResNet stem differ most
    "training fp16": Kind("fp16", 1e-2, 6e-2),
    "training bf16, compiled": Kind("bf16", 4e-2, 2e-1, is_compiled=True),
    "training bf16, CUDA graphs": Kind("bf16", 4e-2, 2e-1, is_compiled=True, graphs=True),
    "training fp8": Kind("fp8", 2e-1, 5e-1),  # not measured yet
    "inference fp32": Kind("fp32", 2e-4),
    "inference bf16": Kind("bf16", 4e-2),
    "inference fp16": Kind("fp16", 8e-3),
    "inference bf16, compiled": Kind("bf16", 4e-2, is_compiled=True),
    "inference bf16, CUDA graphs": Kind("bf16", 4e-2, is_compiled=True, graphs=True),
    "inference fp8": Kind("fp8", 2e-1),
}


class Size(NamedTuple):
    """A variant whose speed is measured, and the shares of the rate of matrix products to reach when compiled."""

    variant: str
    timm: str
    training_batch: int
    inference_batch: int
    training: float
    inference: float


SIZES = {
    "S": Size("ViT-S/16", "vit_small_patch16_224", 256, 512, 0.33, 0.50),
    "B": Size("ViT-B/16", "vit_base_patch16_224", 256, 512, 0.43, 0.62),
    "L": Size("ViT-L/16", "vit_large_patch16_224", 128, 256, 0.50, 0.70),
    "H": Size("ViT-H/14", "vit_huge_patch14_224", 64, 128, 0.50, 0.70),
}
GRAPHS: dict[str, Any] = {"mode": "reduce-overhead", "dynamic": False}  # of torch.compile
REPLAYED = 3  # calls: the third one replays what the second one recorded
OVER_TIMM = 1.15
ROUNDS = 3
PRODUCT_SIDE = 8192


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference relative to the norm of the expected values, on the CPU in float32."""
    found, expected = found.detach().float().cpu(), expected.detach().float()
    error = float((found - expected).norm() / expected.norm())
    return error if found.isfinite().all() else float("inf")


def with_random_weights(model: Any) -> Any:
    """Fill all parameters with random values, so that no zeros hide an error; return the model."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 and "weight" in name else 0.1
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
            if parameter.ndim == 1 and name.endswith("weight"):  # of norms
                parameter.add_(1)
    return model


def free_memory_of_device() -> None:
    """Free what a check leaves: compiled code and memory of the GPU."""
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass
class GPUChecks:
    """Checks of one device.

    Attributes:
        device: The device.
        is_tiny: Whether to use tiny sizes, a compiler backend that generates no code, and no targets: this checks the
            checks themselves.
        rate: FLOP/s of large matrix products in bf16, once measured.
        speeds: Images/s by task, size, library and whether compiled.
    """

    device: torch.device
    is_tiny: bool = False
    rate: float = 0.0
    speeds: dict[tuple[str, str, str, bool], float] = field(default_factory=dict)

    def agreement(self) -> Iterator[Check]:
        """Yield a check for each way to compute, over all configurations."""
        for name, kind in KINDS.items():
            seconds = 60 if kind.is_compiled else 10
            yield Check("agreement", name, partial(self._agrees, kind), seconds)

    def speed(self) -> Iterator[Check]:
        """Yield checks of the speed of training and inference, plain and compiled, beside timm."""
        yield Check("speed", f"bf16 products of {PRODUCT_SIDE}", self._matrix_rate, 5)
        for task in ("training", "inference"):
            for size in list(SIZES)[: 1 if self.is_tiny else None]:  # they differ in nothing at tiny sizes
                for is_compiled in (False, True):
                    for library in ("timm", "ours"):
                        how = f"{task} {size}, {library}{', compiled' * is_compiled}"
                        run = partial(self._speed, task, size, library, is_compiled)
                        yield Check("speed", how, run, 20 if is_compiled else 8)

    # ------------------------------------------------------------------------------------------------- agreement

    def _agrees(self, kind: Kind) -> Outcome:
        self._check_possible(kind)
        errors: dict[str, float] = {}
        problems = []
        # Tracing takes seconds, and the compiler is not what a tiny check is for.
        names = list(CONFIGURATIONS)[: 2 if self.is_tiny and kind.is_compiled else None]
        for name in names:
            fields = CONFIGURATIONS[name]
            model = with_random_weights(HFViTForImageClassification(HFViTConfig(**{**SMALL, **fields})))
            pixel_values, labels = self._images(model)
            expected = model(pixel_values=pixel_values).logits
            if kind.gradients is None:
                errors[name] = relative_error(self._inference(model, kind, pixel_values), expected)
            else:
                F.cross_entropy(expected, labels).backward()
                logits, gradients = self._training(model, kind, pixel_values, labels)
                errors[name] = relative_error(logits, expected)
                gradient_error = relative_error(gradients, _gradients(model))
                if not gradient_error <= kind.gradients:
                    problems.append(f"gradients of {name} differ by {gradient_error:.0e}")
            if not errors[name] <= kind.outputs:
                problems.append(f"outputs of {name} differ by {errors[name]:.0e}")
            torch.compiler.reset()
        worst = max(errors, key=errors.__getitem__)
        text = f"{len(errors)} configurations, largest error {errors[worst]:.0e} ({worst}), limit {kind.outputs:.0e}"
        return Outcome(text, ", ".join(problems), {"errors": errors})

    def _check_possible(self, kind: Kind) -> None:
        if kind.graphs and self.device.type != "cuda" and not self.is_tiny:
            raise NotPossible(f"the device is {self.device}, and CUDA graphs need a GPU")
        if kind.precision == "fp8":
            if not multiplies_in_8_bits(self.device):
                raise NotPossible("FP8 needs a GPU of compute capability 8.9 or later")
            if find_spec("torchao") is None:
                raise NotPossible("torchao is not installed: pip install torchao")

    def _images(self, model: Any) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1)
        return torch.randn(4, 3, *model.config.image_shape, generator=generator), torch.tensor([0, 1, 2, 3])

    def _training(self, model: Any, kind: Kind, pixel_values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits and all gradients of a step on the device."""
        twin: Any = HFViTForImageClassification(model.config)
        twin.to(self.device)
        twin.load_state_dict(model.state_dict())
        if kind.precision == "fp8":
            convert_model_to_fp8_ao(twin)
        if kind.is_compiled:
            self._compile(twin.vit.layers, **GRAPHS if kind.graphs else {})
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}.get(kind.precision)
        autocast = nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)
        scale = 1024.0 if kind.precision == "fp16" else 1.0  # as a gradient scaler: fp16 has few small numbers
        for _ in range(REPLAYED if kind.graphs else 1):
            twin.zero_grad()
            if kind.graphs:  # as in training
                torch.compiler.cudagraph_mark_step_begin()
            # By default, convolutions in float32 use TF32.
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), autocast:
                logits = twin(pixel_values=pixel_values.to(self.device)).logits
            (F.cross_entropy(logits.float(), labels.to(self.device)) * scale).backward()
        return logits, _gradients(twin) / scale

    def _inference(self, model: Any, kind: Kind, pixel_values: Tensor) -> Tensor:
        twin: Any = HFViTForImageClassification(model.config)
        twin.to(self.device)
        twin.load_state_dict(model.state_dict())
        optimized = optimize_for_inference(twin, kind.precision)
        if kind.is_compiled:
            self._compile([optimized] if kind.graphs else optimized.layers, **GRAPHS if kind.graphs else {})
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            pixel_values = pixel_values.to(self.device, DTYPES[kind.precision])
            for _ in range(REPLAYED if kind.graphs else 1):
                logits = optimized(pixel_values).logits.clone()
        return logits

    def _compile(self, parts: Any, **options: Any) -> None:
        for part in parts:
            part.compile(**({"backend": "aot_eager"} if self.is_tiny else options))

    # ----------------------------------------------------------------------------------------------------- speed

    def _matrix_rate(self) -> Outcome:
        side = 128 if self.is_tiny else PRODUCT_SIDE
        one, other = (torch.randn(side, side, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        self.rate, *_ = (2 * side**3 * pace for pace in self._paces(lambda: one @ other, 1))
        return Outcome(f"{self.rate / 1e12:,.3g} TFLOP/s", values={"flops_per_second": self.rate})

    def _speed(self, task: str, size: str, library: str, is_compiled: bool) -> Outcome:
        """Measure one model on a batch that is on the device."""
        facts = SIZES[size]
        batch = 2 if self.is_tiny else getattr(facts, f"{task}_batch")
        config = HFViTConfig(**SMALL) if self.is_tiny else config_of(facts.variant, num_labels=1000)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with self.device:  # a CPU takes seconds to draw the weights of a large model
            model = HFViTForImageClassification(config) if library == "ours" else self._timm(facts.timm)
        call = getattr(self, f"_{task}_step")(model, library, is_compiled, batch, config)
        median, low, high = self._paces(call, batch)
        self.speeds[task, size, library, is_compiled] = median
        with torch.device("meta"):
            flops = count_flops(HFViTForImageClassification(config), HFViTForImageClassification)[task == "training"]
        if not self.rate:
            self._matrix_rate()
        share = median * flops / self.rate
        text = f"{median:,.0f} images/s ({low:,.0f} to {high:,.0f}), {share:.0%} of the rate"
        values: dict[str, Any] = {"images_per_second": [median, low, high], "share": share, "batch_size": batch}
        if self.device.type == "cuda":
            values["peak_memory"] = torch.cuda.max_memory_allocated(self.device)
            text += f", {values['peak_memory'] / 2**30:.1f} GiB"
        problems = []
        if library == "ours":
            target = getattr(facts, task)
            text += f", target {target:.0%}" if is_compiled else ""
            if is_compiled and not self.is_tiny and not share >= target:
                problems.append(f"below the target of {target:.0%}")
            if (theirs := self.speeds.get((task, size, "timm", is_compiled))) is not None:
                text += f", {median / theirs:.2f} x timm, target {OVER_TIMM}"
                if not self.is_tiny and not median >= OVER_TIMM * theirs:
                    problems.append(f"below {OVER_TIMM} x timm")
        return Outcome(text, ", ".join(problems), values)

    def _timm(self, name: str) -> Any:
        if find_spec("timm") is None:
            raise NotPossible("timm is not installed: pip install timm")
        import timm

        if not self.is_tiny:
            return timm.create_model(name, num_classes=1000)
        names = {"embed_dim": "hidden_size", "depth": "num_hidden_layers", "num_heads": "num_attention_heads"}
        fields = {theirs: SMALL[ours] for theirs, ours in names.items()}
        return timm.models.VisionTransformer(img_size=SMALL["image_size"], num_classes=10, **fields)

    def _training_step(
        self, model: Any, library: str, is_compiled: bool, batch: int, config: HFViTConfig
    ) -> Callable[[], object]:
        """Return a training step: uint8 pixels, forward in bf16, loss, backward, clipping, AdamW."""
        model.train()
        if is_compiled:
            self._compile(model.vit.layers if library == "ours" else model.blocks)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)
        pixels = torch.randint(0, 256, (batch, 3, *config.image_shape), dtype=torch.uint8, device=self.device)
        labels = torch.zeros(batch, dtype=torch.int64, device=self.device)

        def step() -> None:
            pixel_values = pixels.float().sub_(127.5).div_(127.5)
            with torch.autocast(self.device.type, torch.bfloat16):
                outputs = model(pixel_values)
            logits = outputs.logits if library == "ours" else outputs
            F.cross_entropy(logits.float(), labels).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return step

    def _inference_step(
        self, model: Any, library: str, is_compiled: bool, batch: int, config: HFViTConfig
    ) -> Callable[[], object]:
        model = optimize_for_inference(model, "bf16") if library == "ours" else model.eval().to(torch.bfloat16)
        if is_compiled:
            self._compile(model.layers if library == "ours" else model.blocks)
        pixel_values = torch.randn(batch, 3, *config.image_shape, device=self.device, dtype=torch.bfloat16)
        return torch.inference_mode()(lambda: model(pixel_values))

    def _paces(self, call: Callable[[], object], images: int) -> tuple[float, float, float]:
        """Return images/s: median, minimum and maximum over rounds. The device is waited for once per round."""
        synchronize = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        warm_up, seconds = (1, 0.0) if self.is_tiny else (4, 0.5)

        def timed(calls: int) -> float:
            synchronize()
            began = time.perf_counter()
            for _ in range(calls):
                call()
            synchronize()
            return (time.perf_counter() - began) / calls

        timed(warm_up)
        calls = max(1, round(seconds / timed(warm_up)))
        paces = [images / timed(calls) for _ in range(ROUNDS)]
        return statistics.median(paces), min(paces), max(paces)


def _gradients(model: Any) -> Tensor:
    return torch.cat([parameter.grad.float().flatten() for parameter in model.parameters()])
