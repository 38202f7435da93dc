"""Signs of life between the processes of a run: a cable that is cut, or a machine that stops, closes no connection.

The process of rank 0 and each other one exchange numbers through torch's store, on connections of their own. Time is
counted in looks, so that a run that was suspended as a whole goes on.
"""

import os
import threading
from contextlib import suppress
from datetime import timedelta
from itertools import count

# Environment variable: seconds without a sign of life after which a run ends.
LONGEST_SILENCE = "HF_VIT_LONGEST_SILENCE"
SECONDS_BETWEEN_LOOKS = 2.0


class SignsOfLife:
    """The heartbeats of one process, and those of the processes that it listens to.

    Args:
        process, processes: Rank of this process, and their number.
    """

    def __init__(self, process: int, processes: int) -> None:
        self.process, self.others = process, [0] if process else list(range(1, processes))
        self.seconds = float(os.environ.get(LONGEST_SILENCE, "300"))
        self.signs: dict[int, bytes] = {}
        self.looks: dict[int, int] = {}  # since the last sign of each process that has given one

    def exchange(self, is_over: threading.Event) -> None:
        """Send heartbeats and read those of others until the run is over; may block while the network is down."""
        from torch.distributed import TCPStore

        if "MASTER_ADDR" not in os.environ:  # of a process group that was not started by a launcher
            return
        store = None
        for number in count():
            with suppress(RuntimeError):  # no connection: the looks are counted
                if store is None:
                    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
                    wait = timedelta(seconds=self.seconds)
                    store = TCPStore(*address, is_master=False, timeout=wait, wait_for_workers=False)
                store.set(self._key(self.process), str(number))
                for rank, sign in zip(self.others, store.multi_get(list(map(self._key, self.others))), strict=True):
                    if self.signs.get(rank) != sign:
                        self.signs[rank], self.looks[rank] = sign, 0
            if is_over.wait(SECONDS_BETWEEN_LOOKS):
                return

    def look(self) -> str:
        """Return an error message if a process is silent for too long, else an empty string; called at intervals."""
        silent = []
        for rank in list(self.looks):
            self.looks[rank] += 1
            if self.looks[rank] * SECONDS_BETWEEN_LOOKS > self.seconds:
                silent.append(str(rank))
        if not silent:
            return ""
        return (
            f"The process of rank {', '.join(silent)} gave no sign of life for {self.seconds:.0f} seconds: its "
            "machine or the network may be down. Saved checkpoints are intact: start all processes again to resume."
        )

    @staticmethod
    def _key(rank: int) -> str:
        return f"hf_vit/signs of life/{rank}"
