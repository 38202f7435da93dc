"""Run one of the paper's experiments again; the options are those of `hf-vit study`.

    python scripts/reproduce.py                                            (lists them)
    python scripts/reproduce.py positions --quick

What is done is kept: the same command goes on with a study that was stopped.
"""

import sys

from hf_vit.cli import app

if __name__ == "__main__":
    app(["study", *sys.argv[1:]])
