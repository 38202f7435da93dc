"""Settings of the documentation: `sphinx-build -W -c docs . build/docs`, from the root of the repository.

The sources are the pages of `docs/`, the model cards, the changelog and CONTRIBUTING.md, where they are: links
between them work on the site as in the repository, and no text is there twice.
"""

import sys
from pathlib import Path

from sphinx.application import Sphinx

import hf_vit

sys.path.insert(0, str(Path(__file__).parent))

from tables import commands

project, author = "hf_vit", "The hf_vit developers"
copyright = author
release = version = hf_vit.__version__
root_doc = "docs/index"
include_patterns = ["docs/**.md", "model_cards/**README.md", "CHANGELOG.md", "CONTRIBUTING.md"]
exclude_patterns = [".*", "build", "dist"]  # folders that are not searched for pages
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

myst_heading_anchors = 3
myst_enable_extensions = ["deflist"]
smartquotes = False  # would change the hyphens of options

default_role = "code"  # docstrings write `name`
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
napoleon_use_rtype = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"hf_vit {release}"
html_static_path = ["static"]
html_extra_path = ["root"]  # a page at the root of the site that leads to docs/index.html
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
html_show_sphinx = False


# What a page has on the site only: the help of all commands, and the pages below it in the navigation.
BELOW = "\n```{toctree}\n:hidden:\n:glob:\n\n%s\n```\n"
ADDED = {
    "docs/commands": commands(),
    "model_cards/README": BELOW % "/model_cards/hf-vit-*/README",
    "model_cards/studies/README": BELOW % "/model_cards/studies/*/README",
}


def add(app: Sphinx, page: str, source: list[str]) -> None:
    source[0] += ADDED.get(page, "")


def setup(app: Sphinx) -> None:
    app.connect("source-read", add)
