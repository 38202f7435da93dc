"""Render the docstrings of the public API as HTML pages: python scripts/render_reference.py FOLDER."""

import pkgutil
import sys
from pathlib import Path

import pdoc

import hf_vit


def main() -> None:
    vars(hf_vit).update({name: getattr(hf_vit, name) for name in hf_vit.__all__})  # which are imported at first use
    modules = [f"{hf_vit.__name__}.{module.name}" for module in pkgutil.iter_modules(hf_vit.__path__)]
    pdoc.render.configure(docformat="google", show_source=False)
    pdoc.pdoc(hf_vit.__name__, *modules, output_directory=Path(sys.argv[1]))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main()
