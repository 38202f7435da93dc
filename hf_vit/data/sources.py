"""What `hf-vit predict` reads: files, folders, globs, parquet and datasets, as parts that are opened one by one.

A part is read from its first image on, and says who it is without being read. So what is finished is passed over
unread, several processes take different parts, and nothing is held but the names of the files of one folder.
"""

import glob
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Image, IterableDataset, Value
from huggingface_hub import HfApi
from PIL import Image as PILImage

from ..system.texts import without_tokens
from .opening import (
    BUILDERS,
    IMAGE_COLUMNS,
    as_stored,
    choose,
    images_in,
    is_saved,
    known,
    open_splits,
    shards_in,
    stated_length,
    stored_rows,
)

Stored = dict[str, Any]  # an image as `datasets` stores it: {"bytes", "path"}
ROWS_AT_A_TIME = 16  # of parquet: few images are held, and Arrow's cost for each batch is small beside them
NAMES_AT_A_TIME = 512  # of files, where nothing else decides it
BUFFER = 1 << 20  # bytes of a file that Arrow holds; without one, a whole row group


@dataclass(frozen=True)
class Part:
    """Images that are read from the first on.

    Attributes:
        rows: Opens them.
        identity: Of where they are read from; another one means other images.
        length: Their number; `None` where only reading tells it.
    """

    rows: Callable[[], Iterator[Stored]]
    identity: str
    length: int | None


# --------------------------------------------------------------------------------------------------- image files


def files_of(words: Iterable[str]) -> Iterator[Path]:
    """Yield the files that paths, folders and globs name; of folders and globs those whose name is that of an image.

    Raises:
        ValueError: If there is no such file or folder, or a glob fits none.
    """
    for word in words:
        path = Path(word)
        if path.is_dir():
            yield from _images_below(path)
        elif path.is_file():
            yield path
        else:
            yield from _images_of_glob(word)


def _images_of_glob(word: str) -> Iterator[Path]:
    is_recursive = "**" in word  # then the folders that it fits hold files that it fits, too
    for match in map(Path, _matches(word)):
        if match.is_dir() and not is_recursive:
            yield from _images_below(match)
        elif match.is_file() and _is_image(match.name):
            yield match


def _matches(word: str) -> list[str]:
    if glob.has_magic(word) and (matches := sorted(glob.glob(word, recursive=True))):
        return matches
    raise ValueError(f"There is no file or folder {without_tokens(word)}.")


def _images_below(folder: Path) -> Iterator[Path]:
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir(follow_symlinks=False):
            yield from _images_below(folder / entry.name)
        elif _is_image(entry.name) and entry.is_file():
            yield folder / entry.name


def _is_image(name: str) -> bool:
    ending = os.path.splitext(name)[1].lower()
    return ending != "" and ending in PILImage.registered_extensions()  # to which Pillow 12.0 may add none


class ImageFiles:
    """The files that some words name."""

    stated = 0  # beyond what its parts know

    def __init__(self, words: list[str]) -> None:
        self.words = words

    def parts(self, size: int) -> Iterator[Part]:
        files = files_of(self.words)
        while chunk := list(islice(files, size)):
            names = [str(file) for file in chunk]
            yield Part(partial(_rows_of_files, names), _states_of(names), len(names))


def _rows_of_files(names: list[str]) -> Iterator[Stored]:
    return ({"bytes": None, "path": name} for name in names)


def _states_of(names: Iterable[str]) -> str:
    """Return what tells some files from others, in a few characters."""
    states = "\n".join(map(_state_of, names)).encode("utf-8", "backslashreplace")
    return hashlib.blake2b(states, digest_size=16).hexdigest()


def _state_of(path: str) -> str:
    """Say which file this is, and as it was written when."""
    try:
        state = os.stat(path)
    except OSError:  # it is named in the table as one that cannot be read
        return f"{path}"
    return f"{path} {state.st_size} {state.st_mtime_ns}"


# --------------------------------------------------------------------------------------------------------- tables


class ParquetFiles:
    """Parquet files of this machine; what they hold is known without reading it."""

    stated = 0  # beyond what its parts know

    def __init__(self, files: Sequence[str], image_column: str | None) -> None:
        self.files = files
        self.column = _image_column(Features.from_arrow_schema(_opened(files[0]).schema_arrow), image_column)

    def parts(self, size: int) -> Iterator[Part]:
        """Yield row groups, small ones together up to `size` rows."""
        for path in self.files:
            file = _opened(path)
            if self.column not in file.schema_arrow.names:
                raise ValueError(f"{path} has no column {self.column!r}: it has {', '.join(file.schema_arrow.names)}.")
            lengths = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
            group: list[int] = []
            for number, length in enumerate(lengths):
                if group and sum(lengths[n] for n in group) + length > size:
                    yield self._part(path, group, lengths)
                    group = []
                group.append(number)
            yield self._part(path, group, lengths)

    def _part(self, path: str, group: list[int], lengths: list[int]) -> Part:
        rows = partial(_rows_of_parquet, path, group, self.column)
        return Part(rows, f"{_state_of(path)} {group}", sum(lengths[number] for number in group))


def _opened(path: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, buffer_size=BUFFER)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is no parquet file, or damaged: {error}") from error


def _rows_of_parquet(path: str, groups: list[int], column: str) -> Iterator[Stored]:
    for batch in _opened(path).iter_batches(ROWS_AT_A_TIME, groups, [column]):
        for row in Image().cast_storage(batch.column(0)).to_pylist():
            yield row or {"bytes": None, "path": None}


class Table:
    """A data set that `save_to_disk` wrote."""

    stated = 0  # beyond what its parts know

    def __init__(self, dataset: Dataset, identity: str, image_column: str | None) -> None:
        column = _image_column(dataset.features, image_column)
        self.columns, self.identity = (column, None), identity
        self.dataset = as_stored(dataset.select_columns(column), self.columns)

    def parts(self, size: int) -> Iterator[Part]:
        for start in range(0, len(self.dataset), size):
            chosen = range(start, min(start + size, len(self.dataset)))
            rows = partial(_rows_of_dataset, self.dataset.select(chosen), self.columns)
            yield Part(rows, f"{self.identity} {chosen}", len(chosen))


class Stream:
    """A data set that is read as it comes; a part is one of its files. `stated` counts its images, if it says so."""

    def __init__(self, dataset: IterableDataset, identity: str, image_column: str | None) -> None:
        dataset = known(dataset)
        column = _image_column(dataset.features, image_column)
        self.stated, self.columns, self.identity = stated_length(dataset), (column, None), identity
        self.dataset = dataset.select_columns(column).cast_column(column, Image(decode=False))

    def parts(self, size: int) -> Iterator[Part]:
        number = self.dataset.num_shards
        for index in range(number):
            rows = partial(_rows_of_dataset, self.dataset.shard(number, index), self.columns)
            yield Part(rows, f"{self.identity} {index} of {number}", None)


def _rows_of_dataset(dataset: Any, columns: tuple[str, None]) -> Iterator[Stored]:
    return (stored for stored, _ in stored_rows(dataset, columns))


def _image_column(features: Features, given: str | None) -> str:
    """Choose the column of images; those of bytes and of paths may stand for one."""
    kinds = {name: feature.dtype for name, feature in features.items() if isinstance(feature, Value)}
    of_bytes = [name for name, kind in kinds.items() if kind in ("binary", "large_binary")]
    of_paths = [name for name, kind in kinds.items() if kind in ("string", "large_string")]
    images = images_in(features)
    return choose(
        "image_column", [*images, *of_bytes, *of_paths] if given else images or of_bytes, given, IMAGE_COLUMNS
    )


# ---------------------------------------------------------------------------------------------------- all of them


class Sources:
    """All that some words name, in their order.

    Args:
        words: Image files, globs and folders of them; parquet files, webdataset shards, and folders of these; folders
            that `save_to_disk` wrote; names of data sets on the Hub, which are read as streams.
        split: Of data sets that have several.
        image_column: Of data sets and parquet files; the only one, or the one with a usual name, if not given.

    Raises:
        ValueError: If a word names nothing, or split or column cannot be told.
    """

    def __init__(self, words: Sequence[str], split: str | None = None, image_column: str | None = None) -> None:
        self.words, self.split, self.image_column = words, split, image_column
        self.all: list[ImageFiles | ParquetFiles | Table | Stream] = []
        for word in words:
            self._add(word)
        given = {"--split": split, "--image-column": image_column}
        if all(isinstance(source, ImageFiles) for source in self.all) and any(given.values()):
            raise ValueError(
                f"{', '.join(k for k, v in given.items() if v)} is for data sets and parquet: leave it out."
            )

    @property
    def stated(self) -> int | None:
        """Return how many images there are beyond those of parts of a known length, if the sources say so."""
        numbers = [source.stated for source in self.all]
        return None if None in numbers else sum(number or 0 for number in numbers)

    def parts(self, size: int) -> Iterator[Part]:
        """Yield all parts in order; where their images are known, of about `size` of them."""
        return chain.from_iterable(source.parts(size) for source in self.all)

    def rows(self) -> Iterator[Stored]:
        """Yield all images in order."""
        return chain.from_iterable(part.rows() for part in self.parts(NAMES_AT_A_TIME))

    def _add(self, word: str) -> None:
        path = Path(word)
        if path.is_file():
            self._add_file(word)
        elif path.is_dir() and (is_saved(path) or shards_in(path)):
            self._add_folder(path)
        elif path.is_dir():
            self._add_images(word)
        elif word == "digits":
            self.all.append(Table(self._chosen(open_splits(word, streaming=False)), word, self.image_column))
        elif not _may_be_on_the_hub(word):
            matches = _matches(word)
            shards = [match for match in matches if Path(match).suffix in BUILDERS]
            for match in shards:
                self._add_file(match)
            if len(shards) < len(matches):
                self._add_images(word)
        else:
            stream = self._chosen(open_splits(word, streaming=True))
            self.all.append(Stream(stream, f"{word}@{HfApi().dataset_info(word).sha}", self.image_column))

    def _add_images(self, word: str) -> None:
        if self.all and isinstance(self.all[-1], ImageFiles):
            self.all[-1].words.append(word)
        else:
            self.all.append(ImageFiles([word]))

    def _add_file(self, word: str) -> None:
        if Path(word).suffix not in BUILDERS:
            self._add_images(word)
        elif BUILDERS[Path(word).suffix] == "parquet":
            self._chosen({"train": word})
            self.all.append(ParquetFiles([word], self.image_column))
        else:
            stream = self._chosen(open_splits(word, streaming=True))
            self.all.append(Stream(stream, _state_of(word), self.image_column))

    def _add_folder(self, path: Path) -> None:
        shards = None if is_saved(path) else shards_in(path)
        if shards is not None and BUILDERS[shards[0]] == "parquet":
            self.all.append(ParquetFiles(self._chosen(shards[1]), self.image_column))
            return
        split = self._chosen(open_splits(path, streaming=shards is not None))
        if shards is None:
            files = [file["filename"] for file in split.cache_files]
            self.all.append(Table(split, _states_of(files), self.image_column))
        else:
            self.all.append(Stream(split, _states_of(self._chosen(shards[1])), self.image_column))

    def _chosen(self, splits: dict[str, Any]) -> Any:
        return splits[choose("split", splits, self.split, ())]


def _may_be_on_the_hub(word: str) -> bool:
    is_path = word.startswith((".", "/", "~")) or word.endswith("/") or word.count("/") > 1
    return not (is_path or glob.has_magic(word) or _is_image(word) or Path(word).suffix in BUILDERS)
