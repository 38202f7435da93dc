"""A model on a page of the browser, and that page as a Space of the Hub: `hf-vit demo`. Needs the extra `demo`."""

from .exhibit import Exhibit
from .serving import serve
from .space import export_space

__all__ = ["Exhibit", "export_space", "serve"]
