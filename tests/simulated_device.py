"""A simulated accelerator: tensors that say that they are on `cuda:0`, `mps:0` or `xpu:0`, and compute on the CPU.

Operations fail where those of the real device fail: tensors of two devices, generators of the CPU, conversion to
numpy, float64 on MPS. Every place where the host would wait for the device is counted: values that are read, sizes
that depend on values, and copies that block. Only Python sees the device: in C++ these are CPU tensors, so that
autograd, autocast and optimizers work as usual.
"""

import linecache
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import imports
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
CPU = torch.device("cpu")
PACKAGE = str(Path(__file__).resolve().parents[1] / "hf_vit")
# Operations with a result in Python, or with a shape that depends on values.
READING = {
    *(aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default, aten.nonzero.default),
    *(aten.masked_select.default, aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default),
    *(aten.bincount.default, aten.repeat_interleave.Tensor),
}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
WIDE = (torch.float64, torch.complex128)


def leaves_of(value: Any) -> list[Any]:
    """Return what lists, tuples and dictionaries hold; torch's own function takes five times as long."""
    if type(value) is dict:
        value = list(value.values())
    return [leaf for each in value for leaf in leaves_of(each)] if type(value) in (list, tuple) else [value]


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """Return lists, tuples and dictionaries with the results of a function for what they hold."""
    if type(value) is dict:
        return {name: mapped(function, each) for name, each in value.items()}
    return type(value)([mapped(function, each) for each in value]) if type(value) in (list, tuple) else function(value)


class Simulation:
    """What the simulated device has seen.

    Attributes:
        waits: How often the host waited, by the cause and the line of the package; counted while `is_counting`.
    """

    def __init__(self, kind: str) -> None:
        if kind == "xpu" and torch.__version__ < "2.15":
            pytest.skip("earlier versions of torch ask the driver of a GPU of Intel")
        self.kind, self.device = kind, torch.device(kind, 0)
        self.waits: Counter[str] = Counter()
        self.is_counting = False
        self.pinned: dict[int, Tensor] = {}  # by the address of the storage, which stays in use

    def wait(self, cause: str) -> None:
        if self.is_counting:
            self.waits[f"{cause} at {_line_of_package()}"] += 1

    @contextmanager
    def counting(self) -> Iterator[None]:
        before, self.is_counting = self.is_counting, True
        try:
            yield
        finally:
            self.is_counting = before

    def is_here(self, device: Any) -> bool:
        """Return whether an argument `device` means the simulated one."""
        if device is None or isinstance(device, bool):
            return False
        return isinstance(device, int) or torch.device(device).type == self.kind

    def check_dtype(self, dtype: torch.dtype | None) -> None:
        if self.kind == "mps" and dtype in WIDE:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )

    def put(self, value: Any) -> Any:
        """Return a value with its CPU tensors on the device."""
        if not isinstance(value, Tensor) or isinstance(value, DeviceTensor):
            return value
        self.check_dtype(value.dtype)
        return DeviceTensor(value)

    def pin(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, DeviceTensor):
            raise RuntimeError("cannot pin a tensor of a device: only dense CPU tensors can be pinned")
        if self.kind == "mps":
            raise RuntimeError("MPS has no pinned memory")
        copy = tensor.clone()
        self.pinned[copy.untyped_storage().data_ptr()] = copy
        return copy

    def copies_late(self, tensor: Tensor) -> bool:
        """Return whether a copy to the device can be made without the host; MPS shares its memory."""
        return self.kind == "mps" or self.is_pinned(tensor)

    def is_pinned(self, tensor: Tensor) -> bool:
        return not isinstance(tensor, DeviceTensor) and tensor.untyped_storage().data_ptr() in self.pinned


def _line_of_package() -> str:
    frame: Any = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
            return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}, {frame.f_code.co_name}: {line}"
        frame = frame.f_back
    return "a test"


CURRENT = Simulation("cuda")  # replaced by `simulated`


class DeviceTensor(torch.Tensor):
    """A tensor on the simulated device, around one on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "DeviceTensor":
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, held.size(), device=CPU, **layout)
        made.held = held
        return made

    device = property(lambda self: CURRENT.device)
    is_cuda = property(lambda self: CURRENT.kind == "cuda")
    is_mps = property(lambda self: CURRENT.kind == "mps")
    is_xpu = property(lambda self: CURRENT.kind == "xpu")
    is_cpu = property(lambda self: False)

    def get_device(self) -> int:
        return 0

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        CURRENT.wait("tolist")
        return self.held.tolist()

    def numpy(self, *arguments: Any, **options: Any) -> Any:
        raise TypeError(f"can't convert {CURRENT.device} device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    def __repr__(self, **options: Any) -> str:
        return f"DeviceTensor({self.held})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copy: Any = DeviceTensor(self.held.clone())
        if isinstance(self, torch.nn.Parameter):
            copy = torch.nn.Parameter(copy, self.requires_grad)
        memo[id(self)] = copy
        return copy

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(operation, args, kwargs or {})


def _compute(operation: Any, args: Any, kwargs: Any) -> Any:
    """Compute an operation with at least one tensor of the device."""
    leaves = leaves_of((args, kwargs))
    ours = {id(leaf.held): leaf for leaf in leaves if isinstance(leaf, DeviceTensor)}
    others = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, DeviceTensor)]
    CURRENT.check_dtype(kwargs.get("dtype"))
    stays = True
    if operation is aten.copy_.default:
        stays = isinstance(args[0], DeviceTensor)
        is_blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        if others and (is_blocking or (stays and not CURRENT.copies_late(args[1]))):
            CURRENT.wait("copy_")
    elif operation in READING:
        CURRENT.wait(operation.name().split("::")[-1])
    elif operation in INDEXING:
        _check_indices(*args[:3])
    elif any(tensor.ndim for tensor in others):  # a number is passed with the kernel
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{CURRENT.device} and cpu! ({operation.name()})"
        )
    args, kwargs = mapped(lambda leaf: leaf.held if isinstance(leaf, DeviceTensor) else leaf, (args, kwargs))
    kwargs.pop("pin_memory", None)
    result = operation(*args, **kwargs)
    if not stays:
        return result
    # Operations in place return what they got.
    return mapped(lambda leaf: ours[id(leaf)] if id(leaf) in ours else CURRENT.put(leaf), result)


def _check_indices(indexed: Tensor, indices: Any, values: Any = None) -> None:
    if not isinstance(indexed, DeviceTensor):
        raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
    if isinstance(values, Tensor) and values.ndim and not isinstance(values, DeviceTensor):
        raise RuntimeError("Expected all tensors to be on the same device (values of index_put)")
    for index in indices:
        if not isinstance(index, Tensor):
            continue
        is_mask = index.dtype in (torch.bool, torch.uint8)
        if is_mask and not (isinstance(values, Tensor) and values.numel() == 1):  # one value is filled in
            CURRENT.wait("index by a mask")
        elif index.ndim and not isinstance(index, DeviceTensor):
            CURRENT.wait("index by a CPU tensor")


class _Operations(TorchDispatchMode):
    """See all operations, also those that create tensors within an operation on the device."""

    def __init__(self, functions: "_Functions") -> None:
        super().__init__()
        self.functions = functions

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = leaves_of((args, kwargs))
        if any(isinstance(leaf, DeviceTensor) for leaf in leaves):
            return _compute(operation, args, kwargs)
        result = operation(*args, **kwargs)
        is_factory = not any(isinstance(leaf, Tensor) for leaf in leaves)
        return mapped(CURRENT.put, result) if is_factory and self.functions.is_on_device else result


class _Functions(TorchFunctionMode):
    """Replace what Python functions say about devices."""

    is_on_device = False  # whether tensors that are created belong to the device

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function in (Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.xpu):
            return self._moved(function, *args, **kwargs)
        if function in (Tensor.device.__get__, Tensor.is_cuda.__get__):
            return function(*args, **kwargs)
        has_ours = any(isinstance(leaf, DeviceTensor) for leaf in leaves_of((args, kwargs)))
        is_placed = CURRENT.is_here(kwargs.get("device"))
        if isinstance(kwargs.get("generator"), torch.Generator) and (is_placed or has_ours):
            raise RuntimeError(f"Expected a '{CURRENT.kind}' device type for generator but found 'cpu'")
        if is_placed:
            kwargs["device"] = CPU
            CURRENT.check_dtype(kwargs.get("dtype"))
        if (is_placed and function in (torch.tensor, torch.as_tensor)) or function is Tensor.new_tensor:
            CURRENT.wait("tensor of Python values")
        elsewhere = not is_placed and kwargs.get("device") is not None
        is_inside = function.__name__ == "backward" or (has_ours and not elsewhere)
        with self._creating(is_placed or ((is_inside or self.is_on_device) and not elsewhere)):
            result = function(*args, **kwargs)
        return mapped(CURRENT.put, result) if is_placed else result

    @contextmanager
    def _creating(self, is_on_device: bool) -> Iterator[None]:
        before, self.is_on_device = self.is_on_device, is_on_device
        try:
            yield
        finally:
            self.is_on_device = before

    def _moved(self, function: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rest = list(args)
        non_blocking = kwargs.pop("non_blocking", False)
        target = {Tensor.cpu: CPU, Tensor.cuda: CURRENT.device, Tensor.xpu: CURRENT.device}.get(function)
        if function is Tensor.to:
            target = kwargs.pop("device", None)
            if rest and isinstance(rest[0], Tensor):
                target, rest[0] = rest[0].device, rest[0].dtype
            elif rest and isinstance(rest[0], str | torch.device | int):
                target = rest.pop(0)
            if rest and isinstance(rest[-1], bool):
                non_blocking = rest.pop()
        elif function is Tensor.cpu:
            rest = []
        rest = [each for each in rest if each is not None]
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        is_here = isinstance(tensor, DeviceTensor)
        goes_here = is_here if target is None else CURRENT.is_here(target)
        if goes_here:
            CURRENT.check_dtype(
                next((each for each in (*rest, *kwargs.values()) if isinstance(each, torch.dtype)), tensor.dtype)
            )
        with self._creating(is_here):
            converted = Tensor.to(tensor, *rest, **kwargs) if rest or kwargs else tensor
        if is_here == goes_here:
            return converted
        with self._creating(False):
            if goes_here and tensor.numel() and not (non_blocking and CURRENT.copies_late(tensor)):
                CURRENT.wait("copy to the device" + ", not pinned" * non_blocking)
            if is_here and not (non_blocking and CURRENT.kind != "mps"):
                CURRENT.wait("copy to the CPU")
            return (_ToDevice if goes_here else _ToHost).apply(converted)


class _ToDevice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return DeviceTensor(tensor.detach().clone())

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Tensor:
        return gradient.held


class _ToHost(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Any) -> Tensor:
        return tensor.detach().held.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return DeviceTensor(gradient)


def _attributes(simulation: Simulation) -> list[tuple[Any, dict[str, Any]]]:
    """Return what torch says of itself on a machine with the device."""
    kind = simulation.kind

    def wait(*arguments: Any) -> None:
        simulation.wait("synchronize")

    def nothing(*arguments: Any, **options: Any) -> None:
        pass

    group_on_cpu: Callable[..., Any] = torch._C._group_tensors_by_device_and_dtype  # C++ does not see the device

    def group(tensors: list[list[Any]], *options: Any) -> Any:
        place = simulation.device if isinstance(tensors[0][0], DeviceTensor) else CPU
        return {(place, dtype): group for (_, dtype), group in group_on_cpu(tensors, *options).items()}

    class Event:
        """An event, at which the host waits by intention."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            pass

        record = synchronize = nothing

    accelerator = {
        "current_accelerator": lambda check_available=False: torch.device(kind),
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device_index": lambda: 0,
        "set_device_index": nothing,
        "current_stream": lambda *arguments: SimpleNamespace(is_capturing=lambda: False, synchronize=wait),
        "synchronize": wait,
        "empty_cache": nothing,
    }
    shared: list[tuple[Any, dict[str, Any]]] = [
        (torch.accelerator, accelerator),
        (torch, {"Event": Event}),
        (torch.Tensor, {"pin_memory": lambda self, *device: simulation.pin(self)}),
        (torch.Tensor, {"is_pinned": lambda self, *device: simulation.is_pinned(self)}),
        (torch._C, {"_group_tensors_by_device_and_dtype": group}),
    ]
    if kind == "mps":
        backend = {"is_available": lambda: True, "is_built": lambda: True, "is_macos_or_newer": lambda *version: True}
        return [*shared, (torch.backends.mps, backend), (torch.mps, {"manual_seed": nothing, "synchronize": wait})]
    properties = SimpleNamespace(total_memory=1 << 37, name="Simulated", major=9, minor=0, multi_processor_count=132)
    common = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": nothing,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": nothing,
        "is_bf16_supported": lambda *emulated, **options: True,
        "get_device_name": lambda *device: "Simulated",
        "get_device_capability": lambda *device: (9, 0),
        "get_device_properties": lambda *device: properties,
        "mem_get_info": lambda *device: (1 << 36, 1 << 37),
        "max_memory_allocated": lambda *device: 0,
        "synchronize": wait,
        "empty_cache": nothing,
        "manual_seed": nothing,
        "manual_seed_all": nothing,
    }
    if kind == "cuda":
        common |= {"is_current_stream_capturing": lambda: False, "Event": Event}
    return [*shared, ({"cuda": torch.cuda, "xpu": torch.xpu}[kind], common)]


def _forget_devices() -> None:
    """Have Accelerate look for devices anew."""
    AcceleratorState._reset_state(reset_partial_state=True)
    for function in (imports.is_xpu_available, imports.is_mps_available, imports.is_cuda_available):
        getattr(function, "cache_clear", lambda: None)()


@contextmanager
def simulated(kind: str) -> Iterator[Simulation]:
    """Simulate that the machine has one accelerator: `"cuda"`, `"mps"` or `"xpu"`."""
    global CURRENT
    CURRENT = simulation = Simulation(kind)
    start_autocast: Callable[..., None] = torch.autocast.__init__

    def on_cpu(self: Any, device_type: str, *arguments: Any, **options: Any) -> None:
        start_autocast(self, "cpu" if device_type == kind else device_type, *arguments, **options)

    swaps = torch.__future__.get_swap_module_params_on_conversion()
    with ExitStack() as stack:
        for owner, values in _attributes(simulation):
            for name, value in values.items():
                stack.enter_context(patch.object(owner, name, value, create=True))
        stack.enter_context(patch.object(torch.autocast, "__init__", on_cpu))
        torch.__future__.set_swap_module_params_on_conversion(True)  # parameters change their class
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swaps)
        _forget_devices()
        stack.callback(_forget_devices)
        functions = _Functions()
        stack.enter_context(functions)
        stack.enter_context(_Operations(functions))
        yield simulation
