"""Render the docstrings of the public API as HTML pages: python scripts/render_reference.py FOLDER."""

import pkgutil
import sys
from importlib import import_module
from pathlib import Path
from typing import Literal

import pdoc

import hf_vit


def main() -> None:
    modules = [f"{hf_vit.__name__}.{module.name}" for module in pkgutil.iter_modules(hf_vit.__path__)]
    for name in (hf_vit.__name__, *modules):  # pdoc does not see names that are imported at first use
        module = import_module(name)
        vars(module).update({public: getattr(module, public) for public in getattr(module, "__all__", ())})
    # pdoc looks up the types of inherited config fields in the module of our config instead of transformers'.
    vars(sys.modules[hf_vit.HFViTConfig.__module__])["Literal"] = Literal
    pdoc.render.configure(docformat="google", show_source=False)
    pdoc.pdoc(hf_vit.__name__, *modules, output_directory=Path(sys.argv[1]))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main()
