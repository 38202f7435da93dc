"""Speed and memory compared with other libraries: the model, its training and its preprocessing.

suites -> preparation -> measure (one process per variant) -> compare -> table
"""

from ..system.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "compare": ["benchmark"],
        "table": ["Report"],
    },
)
