"""Export of models as graphs: ONNX and torch.export."""

from ..system.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "export": ["export_graph"],
        "kinds": ["KINDS", "Graph", "Kind"],
    },
)
