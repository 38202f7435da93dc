"""Training by a recipe: the loop, its checkpoints, and the report at its end."""

from ..system.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "loop": ["CHECKPOINTS", "LOG", "METRICS", "TIMING", "Run", "train"],
        "recipe": ["TrainConfig", "recipe_header", "recipe_path", "shipped_recipes"],
        "rehearsal": ["rehearse"],
        "report": ["train_and_report", "write_report"],
        "state": ["RunLog"],
        "trainer": ["ViTTrainer", "add_lora"],
    },
)
