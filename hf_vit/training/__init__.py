"""Training by a recipe: the loop, its checkpoints, and the report at its end."""

from ..system.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "loop": ["train"],
        "recipe": ["TrainConfig", "recipe_header", "recipe_path", "shipped_recipes"],
        "rehearsal": ["rehearse"],
        "report": ["train_and_report", "write_report"],
        "run": ["CHECKPOINTS", "LOG", "METRICS", "TIMING", "Run"],
        "state": ["RunLog"],
        "trainer": ["ViTTrainer", "add_lora", "metrics_of"],
    },
)
