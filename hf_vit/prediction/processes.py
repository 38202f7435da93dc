"""Predict with the processes of a launcher."""

import os
from collections.abc import Iterable, Iterator

from accelerate import Accelerator

from ..checkpoints.models import load
from ..system.machine import cores
from .predictor import Predictor
from .shards import Settings, Share, Task, answer, identity_of
from .table import Answers


class Processes:
    """This process, or all that a launcher started: each takes its share."""

    def __init__(self, settings: Settings, accelerator: Accelerator) -> None:
        model, processor = load(settings.model, settings.image_size)
        self.model = identity_of(model, processor)
        self.device = accelerator.device.type
        workers = settings.workers or max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        options = {**settings.options, "workers": workers}
        self.predictor = Predictor.from_model(
            model, processor, device=accelerator.device, name=settings.model, **options
        )
        self.share = Share(accelerator.process_index, accelerator.num_processes)

    def answer(self, tasks: Iterable[Task], answers: Answers, shard_size: int) -> Iterator[tuple[int, int]]:
        return answer(self.predictor, tasks, answers, shard_size, self.share)
