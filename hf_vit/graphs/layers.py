"""Find the layer of a graph whose output differs from torch's.

Hooks replace the output of a graph by the inputs and outputs of the model's modules, and the graph is written once
more, by the same functions as before. The first of these values that differs, in the order in which they are
computed, belongs to the module with the fault. The first graph has the modules outside of the repeated layers and each
layer as a whole; if the fault is within a layer, a second graph has the modules of that layer.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..system.texts import one_line
from .tracing import Graph

Values = Callable[[np.ndarray], np.ndarray]  # writes a graph, whatever its output is, and runs it on images


class Value(NamedTuple):
    """The input or output of a module in one of its calls, in the forward of a model."""

    module: str  # as in `named_modules`
    is_input: bool
    call: int  # from 0


class Difference(NamedTuple):
    """Where a graph first differs: the value, by how much, and the largest difference of all values before it."""

    value: Value
    size: float
    before: float


class Comparison(NamedTuple):
    """A graph that differs.

    Attributes:
        graph, reference: The graph that is written, and the same one in torch in float32.
        values_of_graph: Writes `graph`, which has another output meanwhile, and runs it.
        images: Input on which the output of the graph differs.
        bound: The largest difference of a correct layer, as a share of the largest element of its output.
    """

    graph: Graph
    reference: Graph
    values_of_graph: Values
    images: np.ndarray
    bound: float


def sentence_on_layers(
    graph: Graph, reference: Graph, values_of_graph: Values, images: np.ndarray, bound: float
) -> str:
    """Return a sentence that names the first layer whose output differs from torch's; see `Comparison`."""
    comparison = Comparison(graph, reference, values_of_graph, images, bound)
    try:
        found = _first_difference(comparison)
    except Exception as error:  # exporters and runtimes raise errors of any kind; the user needs the first one
        return f"Its layers could not be compared: {one_line(str(error)).rstrip('.')}."
    if found is None:
        return "Compared one by one, no layer differs: the difference arises in the runtime's optimized graph."
    differences = f"{found.size:.1e}; the values that it reads differ by {found.before:.1e}"
    (module, is_input, _), model = found.value, graph.model
    if not is_input:
        return f"The first layer that differs is {module or type(model).__name__} ({differences})."
    if not module:
        return f"The pixel values differ before the first layer ({found.size:.1e})."
    return f"The first layer that differs is {_parent(model, module)}, before {module} ({differences})."


def _parent(model: nn.Module, module: str) -> str:
    """Return the name of the module in whose forward another one is called."""
    parent = module.rpartition(".")[0]
    while isinstance(model.get_submodule(parent), nn.ModuleList):
        parent = parent.rpartition(".")[0]
    return parent or type(model).__name__


def _first_difference(comparison: Comparison) -> Difference | None:
    """Return the first value that differs: of the whole model, then within the layer that it belongs to."""
    model: nn.Module = comparison.graph.model
    names = [name for name, _ in model.named_modules()]
    layers = [
        name for name in names if name and isinstance(model.get_submodule(name.rpartition(".")[0]), nn.ModuleList)
    ]
    outside = [name for name in names if not any(name.startswith(f"{layer}.") for layer in layers)]
    found = _compare(comparison, outside)
    if found is None or found.value.module not in layers:
        return found
    inside = [name for name in names if f"{name}.".startswith(f"{found.value.module}.")]
    return _compare(comparison, inside) or found


def _compare(comparison: Comparison, names: list[str]) -> Difference | None:
    """Return the first value of these modules that differs."""
    expected = _values(comparison.reference, names, torch.from_numpy(comparison.images))
    wanted, bound = list(expected), comparison.bound
    with _outputs(comparison.graph, wanted):
        outputs = comparison.values_of_graph(comparison.images)
    sizes = [value.numel() for value in expected.values()]
    if outputs.size != sum(sizes):
        raise ValueError(f"expected {sum(sizes)} numbers of them, got {outputs.size}")
    parts = np.split(outputs.reshape(-1).astype(np.float32), np.cumsum(sizes)[:-1])
    differences = [
        _difference(part, value.numpy().reshape(-1)) for part, value in zip(parts, expected.values(), strict=True)
    ]
    above = [index for index, difference in enumerate(differences) if difference > bound]
    if not above:
        return None
    before = np.maximum.accumulate([0.0, *differences])
    # A fault may be small where it arises and grow in later layers: the largest growth is taken, not the first excess.
    growth = [differences[index] / max(before[index], bound / 100) for index in range(above[0] + 1)]
    first = int(np.argmax(growth))
    return Difference(wanted[first], differences[first], float(before[first]))


def _difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference as a share of the largest expected element; infinity if it is not a number."""
    difference = np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-6)
    return float(difference) if np.isfinite(difference) else float("inf")


# ------------------------------------------------------------------------------------------------ values of modules


@torch.no_grad()
def _values(graph: Graph, names: list[str], images: Tensor) -> dict[Value, Tensor]:
    """Return the inputs and outputs of modules, in the order of computation, each tensor once."""
    with _recording(graph.model, names) as recorded:
        graph.eval()(images)
    once = {id(tensor): value for value, tensor in reversed(recorded.items())}  # a dropout returns its input
    return {value: tensor.detach() for value, tensor in recorded.items() if once[id(tensor)] == value}


@contextmanager
def _outputs(graph: Graph, wanted: list[Value]) -> Iterator[None]:
    """Replace the outputs of a graph by these values, concatenated to one dimension, temporarily."""
    with _recording(graph.model, list(dict.fromkeys(value.module for value in wanted))) as recorded:

        def join(module: nn.Module, arguments: Any, output: Any) -> Tensor:
            parts = [recorded[value].reshape(-1).float() for value in wanted]
            recorded.clear()
            return torch.cat(parts)

        outputs, graph.outputs = graph.outputs, ("values",)
        handle = graph.register_forward_hook(join)
        try:
            yield
        finally:
            handle.remove()
            graph.outputs = outputs


@contextmanager
def _recording(model: nn.Module, names: list[str]) -> Iterator[dict[Value, Tensor]]:
    """Yield a dictionary that each forward of the model fills with inputs and outputs of modules."""
    recorded: dict[Value, Tensor] = {}
    handles = [model.register_forward_pre_hook(lambda module, arguments: recorded.clear())]

    def record(name: str, is_input: bool, values: Any) -> None:
        tensor = _tensor_in(values)
        if tensor is None:
            return
        calls = sum(value.module == name and value.is_input == is_input for value in recorded)
        recorded[Value(name, is_input, calls)] = tensor

    def hook(name: str) -> Callable[..., None]:
        return lambda module, arguments, output: record(name, False, output)

    def hook_before(name: str) -> Callable[..., None]:
        return lambda module, arguments, named: record(name, True, [*arguments, *named.values()])

    for name in names:
        module = model.get_submodule(name)
        handles += [
            module.register_forward_pre_hook(hook_before(name), with_kwargs=True),
            module.register_forward_hook(hook(name)),
        ]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def _tensor_in(values: Any) -> Tensor | None:
    """Return the first tensor of floats in the arguments or the output of a module."""
    if isinstance(values, Tensor):
        return values if values.is_floating_point() else None
    if isinstance(values, dict):
        values = list(values.values())
    if isinstance(values, list | tuple):
        return next((tensor for tensor in map(_tensor_in, values) if tensor is not None), None)
    return None
