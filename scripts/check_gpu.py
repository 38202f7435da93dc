"""Check a GPU: are results those of a CPU, does a run resume exactly, and how fast are models; about 8 minutes.

    python scripts/check_gpu.py --output-dir model_cards/benchmarks
    python scripts/check_gpu.py --quick                             (tiny sizes, on any machine)

Exits with 1 if a check fails. timm and torchao are used if they are installed: pip install timm torchao
"""

import sys

from hf_vit.cli import app

if __name__ == "__main__":
    app(["benchmark", "gpu", *sys.argv[1:]])
