"""Reproduce one of the paper's experiments, with the options of `hf-vit study`.

    python scripts/reproduce.py                       # lists the studies
    python scripts/reproduce.py positions --quick

The same command resumes an interrupted study.
"""

import sys

from hf_vit.cli import app

if __name__ == "__main__":
    app(["study", *sys.argv[1:]])
