"""Export of models as graphs for other runtimes: ONNX, OpenVINO, ExecuTorch and torch.export."""

from ..system.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "export": ["export_graph"],
        "kinds": ["KINDS", "Graph", "Kind"],
    },
)
