"""Text in local files: one file, several files, or all files that match a pattern."""

from __future__ import annotations

import glob
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from dni_seq.streams.documents import DataError, Documents, PartOfDocuments, Piece, Position, Reader
from dni_seq.streams.formats import COMPRESSIONS, FileFormat, read_file

IN_MEMORY_BYTES = 1 << 25
"""Files of up to this total size are held in memory as token ids; larger ones are streamed in constant memory."""

PACKED = 4
"""Assumed ratio of the uncompressed size to the size of a compressed file."""

HELD_OUT = 20
"""One document in this many is held out for each split without a file."""

MARKS = 4096
"""Largest number of positions that are kept while documents are counted."""


class FileDocuments(Documents):
    """The documents of several files, one file after the other.

    Raises:
        DataError: a file is missing, empty, unreadable, or not a regular file.
    """

    def __init__(self, name: str, paths: Sequence[Path], form: FileFormat) -> None:
        self._sizes = {path: _size(path) for path in paths}
        self._form = form
        unpacked = sum(
            size * (PACKED if path.suffix in COMPRESSIONS or path.suffix == ".parquet" else 1)
            for path, size in self._sizes.items()
        )
        super().__init__(name, small=unpacked <= IN_MEMORY_BYTES)
        self._checksum = zlib.crc32(repr([*self._sizes.values()]).encode())

    def read(self, position: Position | None = None) -> Reader:
        """Returns a reader; a position is a file's index, the position in it, and a checksum of the sizes of all files.

        Raises:
            DataError: the sizes or the number of the files differ from those of the position, so the splits would differ.
        """
        position = position or {"sizes": self._checksum, "file": 0, "inner": None}
        if position["sizes"] != self._checksum:
            raise DataError(f"{self.name} has changed since the position was saved: resume with the same data")
        return _FilesReader([*self._sizes.items()], self._form, **position)


class _FilesReader(Reader):
    """Reads files one after the other."""

    def __init__(
        self, files: Sequence[tuple[Path, int]], form: FileFormat, sizes: int, file: int, inner: Position | None
    ) -> None:
        self._files, self._form, self._sizes, self._number = files, form, sizes, file
        self._reader = read_file(*files[file], form, inner)

    def __next__(self) -> Piece:
        while True:
            try:
                return next(self._reader)
            except StopIteration:
                if self._number + 1 == len(self._files):
                    raise
            self._number += 1
            self._reader = read_file(*self._files[self._number], self._form, None)

    def position(self) -> Position:
        return {"sizes": self._sizes, "file": self._number, "inner": self._reader.position()}


def load_own_files(
    data_file: str | Path, valid_file: str | Path | None, test_file: str | Path | None, form: FileFormat
) -> dict[str, Documents]:
    """Returns the documents of local files, keyed "train", "valid" and "test"; each argument is a file or a pattern.

    A split without a file is held out of `data_file`. The last twentieth of its documents is the test text, and the
    twentieth before it is the validation text. If only the validation text is missing, it is the last twentieth. Each
    split gets at least one document. Holding out needs one pass through the files to count the documents.

    Raises:
        DataError: a file cannot be used, or has too few documents to hold some out.
    """
    given = {"train": data_file, "valid": valid_file, "test": test_file}
    splits: dict[str, Documents] = {
        split: FileDocuments(str(name), matching(name), form) for split, name in given.items() if name is not None
    }
    missing = [split for split in given if split not in splits]
    if missing:
        splits |= hold_out(splits["train"], missing)
    return splits


def hold_out(whole: Documents, missing: Sequence[str]) -> dict[str, Documents]:
    """Splits one text into the training text and the `missing` splits; see `load_own_files`.

    Raises:
        DataError: there are too few documents.
    """
    total, marks = _count(whole)
    share = max(1, total // HELD_OUT)
    kept = total - share * len(missing)
    if kept < 1:
        raise DataError(
            f"{whole.name} has {total} document{'s' * (total != 1)} (lines or rows), too few to hold out text for "
            f"{' and '.join(missing)}: give {' and '.join(f'--{split}-file' for split in missing)}"
        )
    splits: dict[str, Documents] = {"train": PartOfDocuments(whole.name, whole, start=None, count=kept, small=whole.small)}
    for number, split in enumerate(missing):
        first = kept + number * share
        mark = max(index for index in marks if index <= first)
        splits[split] = PartOfDocuments(
            f"{whole.name} ({split})", whole, start=marks[mark], skip=first - mark, count=share, small=whole.small
        )
    return splits


def _count(documents: Documents) -> tuple[int, Mapping[int, Position]]:
    """Returns the number of documents, and the positions of some documents keyed by index; index 0 is always there."""
    reader = documents.read()
    marks, every, count = {0: reader.position()}, 1, 0
    for piece in reader:
        count += piece.ends
        if piece.ends and count % every == 0:
            marks[count] = reader.position()
            if len(marks) > MARKS:
                every *= 2
                marks = {index: mark for index, mark in marks.items() if index % every == 0}
    return count, marks


def load_lines(paths: Mapping[str, Path], form: FileFormat, names: Mapping[str, str]) -> dict[str, Documents]:
    """Returns the documents of each split's file.

    Raises:
        DataError: a file cannot be used.
    """
    return {split: FileDocuments(names[split], [path], form) for split, path in paths.items()}


def matching(name: str | Path) -> list[Path]:
    """Returns the file `name`, or else all files that match it as a pattern (`**` for any folders), sorted by name.

    Raises:
        DataError: there is no such file.
    """
    if Path(name).exists():
        return [Path(name)]
    paths = [Path(found) for found in sorted(glob.glob(str(name), recursive=True)) if Path(found).is_file()]
    if not paths:
        raise DataError(f"no such file: {name}; give a file that exists, or a pattern that matches files")
    return paths


def _size(path: Path) -> int:
    """Returns the size of a file in bytes; raises a DataError if the file cannot be read or is empty."""
    if not path.exists():
        raise DataError(f"no such file: {path}; put it there, or give other files")
    if not path.is_file():
        kind = "a directory" if path.is_dir() else "not a regular file"
        raise DataError(f"{path} is {kind}: give a text file, or a pattern such as 'DIR/*.txt'")
    try:
        with path.open("rb") as file:
            first = file.read(1)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): make it readable, or give another file") from error
    if not first:
        raise DataError(f"{path} is empty: give a file with text")
    return path.stat().st_size
