"""Export the demo page as a Space of the Hub: program, requirements, card and local models in a folder."""

import shutil
import sys
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import SpaceCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..checkpoints.folder import write_checkpoint
from ..checkpoints.opening import open_checkpoint
from ..inspection.gallery import name_of
from ..system.disk import new_folder
from ..system.extras import is_from_an_index, need, requirements
from ..system.texts import markdown
from .exhibit import NO_CLASSIFIER, SHOWN

PROGRAM = '''\
"""Demo of a Vision Transformer: `pip install -r requirements.txt && python app.py`."""

from pathlib import Path

from hf_vit.demo import serve

HERE = Path(__file__).parent

if __name__ == "__main__":
    serve({arguments})
'''
CARD = """\
# {title}

Upload an image to see its predicted labels, the model's attention, and the predictions at other resolutions. Upload
many to download a table of their labels. Uploaded files are not sent anywhere else, and are deleted afterwards.

To run it on another machine: `pip install -r requirements.txt && python app.py`. Written by `hf-vit demo
--export-space`.
"""
LONGEST_TITLE = 80
PACKAGE = Path(__file__).resolve().parents[1]


def export_space(folder: str | Path, model: str, compare: str | None = None) -> None:
    """Write a Space that shows a model: `app.py`, `requirements.txt`, `README.md`, and copies of local models.

    If this package was installed from a file or a folder, an index may not have it: then a copy of its code is beside
    `app.py`, and `requirements.txt` lists what it needs. The Hub installs the requirements before it copies the other
    files, so that a wheel in the Space could not be one of them.

    Args:
        folder: Absent or empty; nothing is left there if the export fails.
        model: A file or a folder, which is converted to this package's layout in `folder`, or a name on the Hub.
        compare: A second classifier to compare with.

    Raises:
        ValueError: If the folder is not empty, Gradio is missing, or a model does not exist or is no classifier.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: choose another folder for the Space.")
    need("demo", "gradio")
    models = {"model": model} if compare is None else {"model": model, "compare": compare}
    title = " and ".join(map(name_of, models.values()))[:LONGEST_TITLE]
    with new_folder(folder) as unfinished:
        arguments, names = [], []
        for place, source in models.items():
            if Path(source).exists():
                arguments.append(f"str(HERE / {place!r} / {_copy(source, unfinished / place)!r})")
            else:
                arguments.append(repr(_name_on_the_hub(source)))
                names.append(source)
        data = SpaceCardData(
            title=title,
            sdk="gradio",
            sdk_version=version("gradio"),
            python_version=f"{sys.version_info.major}.{sys.version_info.minor}",
            app_file="app.py",
            colorFrom="blue",
            colorTo="gray",
            models=names or None,
            pinned=False,
        )
        card = f"---\n{data.to_yaml()}\n---\n\n{CARD.format(title=markdown(title))}"
        files = {
            "app.py": PROGRAM.format(arguments=", ".join(arguments)),
            "requirements.txt": "".join(f"{each}\n" for each in _requirements(unfinished)),
            "README.md": card,
        }
        for name, text in files.items():
            (unfinished / name).write_text(text, encoding="utf-8")


def _copy(source: str, folder: Path) -> str:
    """Write a model into a subfolder with its name, and return the name."""
    checkpoint = open_checkpoint(source)
    if checkpoint.architecture not in SHOWN:
        raise ValueError(NO_CLASSIFIER.format(source))
    write_checkpoint(checkpoint, folder / name_of(source))
    return name_of(source)


def _name_on_the_hub(source: str) -> str:
    try:
        validate_repo_id(source)
    except HFValidationError:
        raise ValueError(f"There is no file or folder {source}, and it is not a valid name on the Hub.") from None
    return source


def _requirements(folder: Path) -> list[str]:
    """Return the lines of `requirements.txt`; copy this package into the folder if they do not install it."""
    if is_from_an_index():
        return [f"hf-vit[demo]>={version('hf-vit')}"]
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    stated = requirements()
    return [f"{each.name}{each.specifier}" for extra in ("", "demo") for each in stated.get(extra, [])]
