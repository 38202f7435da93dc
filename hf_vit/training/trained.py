"""Training from Python: `hf_vit.fit` and `hf_vit.train`, and the model that they return.

    import hf_vit

    model = hf_vit.fit("pictures/", model="facebook/dinov2-small", minutes=10)
    model.predict("new/*.jpg")
    model.evaluate("test/")
    model.push_to_hub("USER/my-classifier")

Functions and methods have the names and options of the commands.
"""

import base64
import html
import json
import os
from collections import UserDict, UserList
from collections.abc import Sequence
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

from ..checkpoints.models import load
from ..data.sources import Sources
from ..evaluation.evaluate import evaluate_checkpoint
from ..evaluation.report import report_lines
from ..hub.upload import push
from ..model.image_processing_hf_vit import HFViTImageProcessor
from ..prediction.predict import Summary, predict_to_file
from ..prediction.predictor import Prediction
from ..prediction.shards import Settings
from ..system.places import check_exist
from ..system.texts import without_tokens
from .recipe import TrainConfig, default_recipe
from .report import train_and_report
from .run import METRICS

Source = str | os.PathLike
SHOWN, THUMBNAIL = 24, 96  # images of a list of predictions in a notebook, and their longest side in pixels


class TrainedModel:
    """A model in a folder or on the Hub, with the commands that use it as methods.

    Args:
        source: A folder that `fit` or `train` wrote, or any other checkpoint that `hf-vit` reads.

    Raises:
        ValueError: If the folder or file does not exist.

    Example:
        >>> model = TrainedModel("my-vit")  # doctest: +SKIP
        >>> model.predict("cat.jpg")[0].labels  # doctest: +SKIP
        ['cat', 'dog']
    """

    def __init__(self, source: Source) -> None:
        self.source = os.fspath(source)
        check_exist((), self.source)

    @property
    def folder(self) -> Path:
        """The folder of the model."""
        return Path(self.source)

    @cached_property
    def _loaded(self) -> tuple[Any, HFViTImageProcessor]:
        return load(self.source)

    @property
    def model(self) -> Any:
        """The model as transformers knows it, `HFViTForImageClassification` in evaluation mode."""
        return self._loaded[0]

    @property
    def processor(self) -> HFViTImageProcessor:
        """The image processor."""
        return self._loaded[1]

    @property
    def labels(self) -> list[str]:
        """Names of the classes, or of the targets of a regression, by index."""
        return list(self.model.config.id2label.values())

    @property
    def metrics(self) -> dict[str, Any]:
        """The metrics of the training, as in `metrics.json`; empty for a model that was not trained here."""
        path = self.folder / METRICS
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def predict(
        self,
        images: Source | Sequence[Any],
        output: Source | None = None,
        *,
        head: str | None = None,
        top_k: int | None = None,
        features: bool = False,
        split: str | None = None,
        image_column: str | None = None,
        batch_size: int | None = None,
        workers: int | None = None,
        image_size: tuple[int, int] | None = None,
        windows: bool = False,
        precision: str = "auto",
        restart: bool = False,
    ) -> "Predictions | Summary | None":
        """Predict labels of images.

        Args:
            images: Files, folders, globs, parquet files or data sets, one or several; or a list of PIL images, bytes,
                or images as `datasets` stores them.
            output: A .csv, .tsv, .jsonl or .parquet file. Without it, the predictions are returned.
            head: Head of a model with several heads; without it, predictions have the answers of all of them.
            top_k, features, split, image_column, batch_size, workers, precision, restart: As for `hf-vit predict`.
            image_size: (height, width) in pixels; if not given, the model's, or with windows that of each image.
            windows: Whether windows of the model's size slide over the images, for segmentation.

        Returns:
            A list of `Prediction`, one per image in order; with `output`, a summary.

        Raises:
            ValueError: If there are no images, or the sources cannot be opened.
        """
        words = [images] if isinstance(images, str | os.PathLike) else list(images)
        if not words:
            raise ValueError("Expected images, got an empty list.")
        settings = Settings(
            self.source, precision, image_size, False, batch_size, workers, top_k, features, windows, head
        )
        if not all(isinstance(word, str | os.PathLike) for word in words):
            return Predictions(settings.predictor()(words))
        sources = Sources([os.fspath(word) for word in words], split, image_column)
        if output is not None:
            return predict_to_file(Path(output), sources, settings, restart=restart)
        found = Predictions(map(_with_path, settings.predictor()(sources.rows())))
        if not found:
            raise ValueError(f"Found no images in {', '.join(sources.words)}.")
        return found

    def evaluate(self, data: Source | Sequence[Source], **options: Any) -> "Evaluation | None":
        """Evaluate the model on labelled images.

        Args:
            data: As for `hf-vit evaluate`.
            options: Those of `hf_vit.evaluation.evaluate_checkpoint`, which are those of the command.

        Returns:
            All measurements, which print as the command prints them; `None` on every process but the first.
        """
        source: Any = os.fspath(data) if isinstance(data, str | os.PathLike) else [os.fspath(each) for each in data]
        measured = evaluate_checkpoint(self.source, source, **options)
        self.__dict__.pop("_loaded", None)  # a calibration changes the config
        return None if measured is None else Evaluation(measured)

    def push_to_hub(
        self, repo_id: str, *, private: bool = False, license: str | None = None, token: str | None = None
    ) -> str:
        """Publish the folder on the Hugging Face Hub, and return its address.

        Args:
            repo_id, private, license, token: As for `hf_vit.hub.push`.

        Raises:
            ValueError: If the folder is not complete, or holds files that must not be published.
        """
        return push(self.folder, repo_id, private=private, license=license, token=token)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.source!r})"

    def _repr_html_(self) -> str:
        """Return the figures of the folder, for a notebook."""
        names = ("predictions.png", "confusion.png", "training.png")
        figures = [self.folder / name for name in names if (self.folder / name).is_file()]
        images = "".join(_image(path.read_bytes()) for path in figures)
        return f"<p><code>{html.escape(repr(self))}</code></p>{images}"


def _with_path(prediction: Prediction) -> Prediction:
    """Replace a file as `datasets` stores it by its path."""
    stored = prediction.source
    if stored["bytes"] is None:
        prediction.source = stored["path"]
    return prediction


class Predictions(UserList[Prediction]):
    """A list of predictions; a notebook shows the first ones with their images."""

    def __repr__(self) -> str:
        return "\n".join(f"{_name(each, number)}  {each.line}" for number, each in enumerate(self))

    def _repr_html_(self) -> str:
        rows = (
            f"<tr><td>{_thumbnail(each)}</td><td>{html.escape(_name(each, number))}</td>"
            f"<td>{html.escape(each.line)}</td></tr>"
            for number, each in enumerate(self[:SHOWN])
        )
        more = f"<p>and {len(self) - SHOWN:,} more</p>" if len(self) > SHOWN else ""
        return f"<table>{''.join(rows)}</table>{more}"


class Evaluation(UserDict[str, Any]):
    """The measurements of an evaluation, which print as lines."""

    def __repr__(self) -> str:
        return "\n".join(report_lines(self.data))


def _name(prediction: Prediction, number: int) -> str:
    source = prediction.source
    path = (
        source.get("path") if isinstance(source, dict) else source if isinstance(source, str | os.PathLike) else None
    )
    return str(path or number)


def _thumbnail(prediction: Prediction) -> str:
    from ..data.images import read_stored
    from ..model.image_conversion_hf_vit import convert_to_rgb, pil_of_tensor
    from ..model.image_reading_hf_vit import read_image

    source: Any = prediction.source
    try:
        if isinstance(source, dict):
            source = read_stored(source)
        elif isinstance(source, str | os.PathLike | bytes):
            source = read_image(source)
        image = convert_to_rgb(source if hasattr(source, "convert") else pil_of_tensor(source))
    except (ValueError, OSError):
        return ""
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    image.save(file := BytesIO(), "PNG")
    return _image(file.getvalue())


def _image(data: bytes) -> str:
    return f'<img style="max-width: 100%" src="data:image/png;base64,{base64.b64encode(data).decode()}">'


def train(
    data: Source | Sequence[Source],
    *,
    model: Source | None = None,
    output_dir: Source | None = None,
    recipe: Source | None = None,
    **fields: Any,
) -> TrainedModel:
    """Train a model, or resume an interrupted run in `output_dir`: `hf-vit train`.

    Args:
        data: A folder of images, a table, an archive, parquet, webdataset shards or a Hub data set, or several.
        model: Checkpoint to fine-tune, or a variant such as "ViT-S/16" to train from scratch.
        output_dir: Folder for the model; the recipe's if not given.
        recipe: Name of a recipe, or a YAML file; by default `finetune` for a checkpoint, else `scratch`.
        fields: Other fields of the recipe (`hf_vit.training.TrainConfig`), such as `epochs=10`.

    Raises:
        Interrupted, ValueError, OSError, FloatingPointError: As for `hf_vit.training.train`.
    """
    given: dict[str, Any] = {"data": _texts(data), **fields}
    given |= {name: os.fspath(value) for name, value in (("model", model), ("output_dir", output_dir)) if value}
    name = os.fspath(recipe) if recipe else default_recipe(given.get("model"))
    config = TrainConfig.from_recipe(name, **given)
    stated = {**given, **({"recipe": os.fspath(recipe)} if recipe else {})}
    train_and_report(config, call_of("train", stated), print)
    return TrainedModel(config.output_dir)


def _texts(data: Source | Sequence[Source]) -> str | list[str]:
    return os.fspath(data) if isinstance(data, str | os.PathLike) else [os.fspath(each) for each in data]


def call_of(function: str, arguments: dict[str, Any]) -> str:
    """Return a call of this package as Python, without tokens, for a model card."""
    stated = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    return without_tokens(f"hf_vit.{function}({stated})")
