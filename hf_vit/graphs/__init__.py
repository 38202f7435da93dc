"""Export of models as graphs for other runtimes: ONNX, OpenVINO, ExecuTorch, torch.export and transformers.js."""

from ..system.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "export": ["export_graph"],
        "transformers_js": ["export_transformers_js"],
        "kinds": ["KINDS", "Graph", "Kind"],
    },
)
