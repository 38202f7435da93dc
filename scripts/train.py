"""Train with a recipe, on one process or many; the options are those of `hf-vit train`.

    accelerate launch scripts/train.py --recipe flowers --data photos/     (as set by `accelerate config`)
    torchrun --nproc_per_node 2 scripts/train.py --recipe digits           (on CPUs, with ACCELERATE_USE_CPU=true)

On CPUs, `accelerate launch` needs MPI to start more than one process.
"""

import sys

from hf_vit.cli import app

if __name__ == "__main__":
    app(["train", *sys.argv[1:]])
