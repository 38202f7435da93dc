"""What `hf-vit predict` reads: image files, folders, globs, parquet files and data sets, divided into parts.

A part knows its identity without being read, and is read from its first image. So finished parts are skipped unread,
processes read different parts, and no list of all images is held in memory. pyarrow and `datasets` are imported where
they are used, since image files do not need them.
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

from ..system.network import sentence_of
from ..system.places import is_junk, is_path, missing
from ..system.texts import without_tokens
from .archives import is_archive, unpacked
from .folders import is_image_file, skipped_in, split_of
from .images import NO_IMAGE, stored_rows
from .opening import (
    BUILDERS,
    IMAGE_COLUMNS,
    as_stored,
    choose,
    image_columns,
    no_images_in,
    open_splits,
    shards_of,
    spelled,
    stated_length,
    storage_of,
    with_features,
)
from .tables import Table, is_table, open_table

Stored = dict[str, Any]  # an image as `datasets` stores it: {"bytes", "path"}
ROWS_PER_BATCH = 16  # of parquet: few images are in memory, and Arrow's cost per batch is small in comparison
FILES_PER_PART = 512  # if the caller does not choose it
BUFFER = 1 << 20  # bytes of a parquet file that Arrow buffers; without it, a complete row group


@dataclass(frozen=True)
class Part:
    """Some images, read from the first one on.

    Attributes:
        rows: Opens the images.
        identity: Text that differs if the images differ.
        length: Number of images; `None` if it is not known before reading.
    """

    rows: Callable[[], Iterator[Stored]]
    identity: str
    length: int | None


# --------------------------------------------------------------------------------------------------- image files


def files_of(words: Iterable[str]) -> Iterator[Path]:
    """Yield the files at paths, and the image files (by suffix) in folders and of globs.

    Raises:
        ValueError: If a file or folder does not exist, or a glob matches none.
    """
    for word in words:
        path = Path(word)
        if path.is_dir():
            yield from _images_below(path)
        elif path.is_file():
            yield path
        else:
            is_recursive = "**" in word  # then it also matches the files in the folders that it matches
            for match in map(Path, _matches(word)):
                if match.is_dir() and not is_recursive:
                    yield from _images_below(match)
                elif match.is_file() and is_image_file(match.name):
                    yield match


def _matches(word: str) -> list[str]:
    if glob.has_magic(word) and (matches := sorted(glob.glob(word, recursive=True))):
        return matches
    what = "No file matches" if glob.has_magic(word) else "No such file or folder:"
    raise ValueError(f"{what} {without_tokens(word)}")


def _images_below(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yield the images below a folder by name; links are followed, but not in circles."""
    above = (*above, os.path.realpath(folder))
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if is_junk(entry.name):
            continue
        if entry.is_dir():
            if not entry.is_symlink() or os.path.realpath(entry.path) not in above:
                yield from _images_below(folder / entry.name, above)
        elif is_image_file(entry.name) and entry.is_file():
            yield folder / entry.name


def _state_of(path: str) -> str:
    """Return the path, size and modification time of a file."""
    try:
        state = os.stat(path)
    except OSError:  # reading will report it
        return path
    return f"{path} {state.st_size} {state.st_mtime_ns}"


def _states_of(paths: Iterable[str]) -> str:
    """Return a digest of the paths, sizes and modification times of files."""
    states = "\n".join(map(_state_of, paths)).encode("utf-8", "backslashreplace")
    return hashlib.blake2b(states, digest_size=16).hexdigest()


def _parts_of_files(words: list[str], size: int) -> Iterator[Part]:
    return _parts_of_paths(map(str, files_of(words)), size)


def _parts_of_paths(paths: Iterable[str], size: int) -> Iterator[Part]:
    rest = iter(paths)
    while names := list(islice(rest, size)):
        yield Part(partial(_rows_of_files, names), _states_of(names), len(names))


def _rows_of_files(names: list[str]) -> Iterator[Stored]:
    return ({"bytes": None, "path": name} for name in names)


def _parts_of_archive(archive: Path, folder: Path, size: int) -> Iterator[Part]:
    """Yield the images of an unpacked archive, which are called by their places in the archive."""
    files = _images_below(folder)
    while chunk := list(islice(files, size)):
        names = [str(archive / file.relative_to(folder)) for file in chunk]
        yield Part(partial(_rows_of_archive, chunk, names), f"{_state_of(str(archive))} {names[0]}", len(names))


def _rows_of_archive(files: list[Path], names: list[str]) -> Iterator[Stored]:
    return ({"bytes": file.read_bytes(), "path": name} for file, name in zip(files, names, strict=True))


def _paths_in(table: Table, split: str | None) -> list[str]:
    """Return the images that a table names; a missing one by the path that the table gives."""
    by_split = table.rows_by_split()
    rows: Iterable[int] = range(len(table.files))
    if split is not None:
        rows = by_split[choose("split", by_split, split_of(split) or split, ())]
    folder, above = table.path.parent, table.path.parent.absolute()
    paths = []
    for row in rows:
        path = Path(table.files[row] or above / str(table.named[row]))
        paths.append(str(folder / path.relative_to(above)) if path.is_relative_to(above) else str(path))
    return paths


# ----------------------------------------------------------------------------------------------------- data sets


def _parts_of_parquet(files: Sequence[str], column: str, size: int) -> Iterator[Part]:
    """Yield row groups; small ones are grouped up to `size` rows."""
    for path in files:
        file = _open_parquet(path)
        if column not in file.schema_arrow.names:
            raise ValueError(f"{path} has no column {column!r}: it has {', '.join(file.schema_arrow.names)}.")
        lengths = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
        groups: list[list[int]] = [[]]
        for number, length in enumerate(lengths):
            if groups[-1] and sum(lengths[n] for n in groups[-1]) + length > size:
                groups.append([])
            groups[-1].append(number)
        for group in groups:
            rows = partial(_rows_of_parquet, path, group, column)
            yield Part(rows, f"{_state_of(path)} {group}", sum(lengths[number] for number in group))


def _open_parquet(path: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path, buffer_size=BUFFER)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not a parquet file, or is corrupt: {error}") from error


def _rows_of_parquet(path: str, groups: list[int], column: str) -> Iterator[Stored]:
    from datasets import Image

    for batch in _open_parquet(path).iter_batches(ROWS_PER_BATCH, groups, [column]):
        for row in Image().cast_storage(batch.column(0)).to_pylist():
            yield row or NO_IMAGE


def _parts_of_table(dataset: Any, column: str, identity: str, size: int) -> Iterator[Part]:
    for start in range(0, len(dataset), size):
        chosen = range(start, min(start + size, len(dataset)))
        rows = partial(_rows_of_dataset, dataset.select(chosen), column)
        yield Part(rows, f"{identity} {chosen}", len(chosen))


def _parts_of_stream(dataset: Any, column: str, identity: str, size: int) -> Iterator[Part]:
    number = dataset.num_shards
    for index in range(number):
        rows = partial(_rows_of_dataset, dataset.shard(number, index), column)
        yield Part(rows, f"{identity} {index} of {number}", None)


def _rows_of_dataset(dataset: Any, column: str) -> Iterator[Stored]:
    return (stored for stored, _ in stored_rows(dataset, (column, None)))


def _image_column(features: Any, given: str | None) -> str:
    """Choose the image column; one of bytes may be inferred, one of paths must be given."""
    from datasets import Value

    types = {name: feature.dtype for name, feature in features.items() if isinstance(feature, Value)}
    of_bytes = [name for name, dtype in types.items() if dtype in ("binary", "large_binary")]
    of_paths = [name for name, dtype in types.items() if dtype in ("string", "large_string")]
    images = image_columns(features)
    found = [*images, *of_bytes, *of_paths] if given else images or of_bytes
    return choose("image_column", found, given, IMAGE_COLUMNS)


# ---------------------------------------------------------------------------------------------------- all of them


class Sources:
    """All images of some sources, in order.

    Args:
        words: Image files, and folders, globs and archives of them; tables of paths; parquet files, webdataset
            shards, and folders of these; folders that `save_to_disk` wrote; names of data sets on the Hub, which are
            streamed.
        split: Split of data sets that have several.
        image_column: Image column of data sets; the only one, or the one with a usual name, if not given.

    Attributes:
        stated: Number of images in parts of unknown length, or `None` if a source does not state it.

    Raises:
        ValueError: If a source does not exist, or its split or column cannot be inferred.
    """

    def __init__(self, words: Sequence[str], split: str | None = None, image_column: str | None = None) -> None:
        self.words, self.split, self.image_column = words, split, image_column
        self.stated: int | None = 0
        self.all: list[Callable[[int], Iterator[Part]]] = []
        self.files: list[str] = []  # of the last source, if that is image files
        self.has_data_sets = False
        for word in words:
            self._add(word)
        given = {"--split": split, "--image-column": image_column}
        if not self.has_data_sets and any(given.values()):
            raise ValueError(
                f"Image files take no {', '.join(name for name, value in given.items() if value)}: remove the option."
            )

    def parts(self, size: int) -> Iterator[Part]:
        """Yield all parts in order, of about `size` images where the number is known."""
        return chain.from_iterable(parts(size) for parts in self.all)

    def rows(self) -> Iterator[Stored]:
        """Yield all images in order."""
        return chain.from_iterable(part.rows() for part in self.parts(FILES_PER_PART))

    def skipped(self) -> str | None:
        """Return a sentence that counts the files in folders of images that are not read, or `None`."""
        return skipped_in(word for word in self.words if Path(word).is_dir() and storage_of(Path(word)) is None)

    def _add(self, word: str) -> None:
        path, storage = Path(word), storage_of(Path(word))
        if is_archive(path):
            self._add_archive(path)
        elif path.is_file() and is_table(path):
            self._add_table_of_paths(path)
        elif storage == "parquet":
            self._add_parquet(self._chosen(shards_of(path)))
        elif storage == "webdataset":
            self._add_stream(path, _states_of(self._chosen(shards_of(path))))
        elif storage == "saved":
            table = self._chosen(open_splits(path, streaming=False))
            self._add_table(table, _states_of(file["filename"] for file in table.cache_files))
        elif path.exists():
            self._add_files(word)
        elif word == "digits":
            self._add_table(self._chosen(open_splits(word, streaming=False)), word)
        elif _may_be_on_the_hub(word):
            self._add_stream(word, f"{word}@{_revision_of(word)}")
        else:
            matches = _matches(word)
            shards = [match for match in matches if Path(match).suffix.lower() in BUILDERS]
            for match in shards:
                self._add(match)
            if len(shards) < len(matches):
                self._add_files(word)

    def _add_files(self, word: str) -> None:
        if not self.files:
            self.files = []
            self.all.append(partial(_parts_of_files, self.files))
        self.files.append(word)

    def _add_data_set(self, parts: Callable[[int], Iterator[Part]]) -> None:
        self.all.append(parts)
        self.files, self.has_data_sets = [], True

    def _add_archive(self, path: Path) -> None:
        self.all.append(partial(_parts_of_archive, path, unpacked(path)))
        self.files = []

    def _add_table_of_paths(self, path: Path) -> None:
        table = open_table(path, self.image_column)
        if table is None:
            raise no_images_in(path)
        self._add_data_set(partial(_parts_of_paths, _paths_in(table, self.split)))

    def _add_parquet(self, files: list[str]) -> None:
        from datasets import Features

        column = _image_column(Features.from_arrow_schema(_open_parquet(files[0]).schema_arrow), self.image_column)
        self._add_data_set(partial(_parts_of_parquet, files, column))

    def _add_table(self, table: Any, identity: str) -> None:
        column = _image_column(table.features, self.image_column)
        table = as_stored(table.select_columns(column), (column, None))
        self._add_data_set(partial(_parts_of_table, table, column, identity))

    def _add_stream(self, source: str | Path, identity: str) -> None:
        from datasets import Image

        stream = with_features(self._chosen(open_splits(source, streaming=True)))
        column, stated = _image_column(stream.features, self.image_column), stated_length(stream)
        self.stated = None if self.stated is None or stated is None else self.stated + stated
        stream = stream.select_columns(column).cast_column(column, Image(decode=False))
        self._add_data_set(partial(_parts_of_stream, stream, column, identity))

    def _chosen(self, splits: dict[str, Any]) -> Any:
        return splits[choose("split", splits, spelled(self.split, list(splits)), ())]


def _may_be_on_the_hub(word: str) -> bool:
    return not (is_path(word) or glob.has_magic(word) or is_image_file(word))


def _revision_of(name: str) -> str:
    """Return the commit of a data set on the Hub.

    Raises:
        ValueError: If there is no such data set, or the Hub cannot be reached.
    """
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(name).sha)
    except Exception as error:
        if (reason := sentence_of(error)) is None:
            raise
        raise ValueError(f"{missing(name)}. {reason}") from error
