"""The paper's experiments, at a size that a laptop or one GPU can do."""

from pathlib import Path

from .data_size import DataSize
from .page import write_page
from .pooling import Pooling
from .positions import Positions
from .pretraining import Pretraining
from .regularization import Regularization
from .resolution import Resolution
from .running import read_rows, run_study
from .scaling import Scaling
from .study import Results, Study

# In the order of the questions: what a model is told and reads, how it grows, and from what it learns.
STUDIES: dict[str, Study] = {
    study.name: study
    for study in (Positions(), Pooling(), Scaling(), Resolution(), DataSize(), Regularization(), Pretraining())
}

# What they vary: a recipe for a GPU, and one for two cores.
SIZES = {name: Path(__file__).with_name(f"{name}.yaml") for name in ("full", "quick")}

__all__ = ["SIZES", "STUDIES", "Results", "Study", "read_rows", "run_study", "write_page"]
