"""Text in local files: one file, several, or all that a pattern matches."""

from __future__ import annotations

import glob
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from dni_seq.streams.documents import DataError, Documents, PartOfDocuments, Piece, Position, Reader
from dni_seq.streams.formats import COMPRESSIONS, FileFormat, read_file

IN_MEMORY_BYTES = 1 << 25
"""Files up to this size in all are held in memory as token ids; larger ones are streamed in constant memory."""

PACKED = 4
"""How much larger a compressed file is taken to be when it is unpacked."""

HELD_OUT = 20
"""One document in this many is held out for each split that has no file of its own."""

MARKS = 4096
"""Positions noted at most on the way through files whose documents are counted."""


class FileDocuments(Documents):
    """The documents of files, one file after the other.

    Raises:
        DataError: a file is missing, is no regular file, or is empty.
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
        """A reader; a position is the file's number, the position in it, and a checksum of all files' sizes.

        Raises:
            DataError: the position is one in other files, or in files that have grown since; the splits would be others.
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
    """A user's own text, keyed "train", "valid" and "test"; each a file, or a pattern for several.

    A split without a file is held out of `data_file`: its last twentieth, in documents, is the test text and the twentieth
    before it the validation text (the last one, where only that is missing). At least one document goes to each. The
    documents are counted for that, which takes a pass through the files.

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
    """The training text and the `missing` splits out of one text, as `load_own_files` tells.

    Raises:
        DataError: there are too few documents.
    """
    total, marks = _count(whole)
    share = max(1, total // HELD_OUT)
    kept = total - share * len(missing)
    if kept < 1:
        raise DataError(
            f"{whole.name} has {total} document{'s' * (total != 1)} (lines, or rows), too few to hold out text for "
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
    """The number of documents, and the positions of some of them by their index, 0 among them."""
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
    """The documents of each split's file.

    Raises:
        DataError: a file cannot be used.
    """
    return {split: FileDocuments(names[split], [path], form) for split, path in paths.items()}


def matching(name: str | Path) -> list[Path]:
    """The file of that name, or else all files that it matches as a pattern (`**` for any folders), in their order.

    Raises:
        DataError: there is none.
    """
    if Path(name).exists():
        return [Path(name)]
    paths = [Path(found) for found in sorted(glob.glob(str(name), recursive=True)) if Path(found).is_file()]
    if not paths:
        raise DataError(f"no such file: {name}")
    return paths


def _size(path: Path) -> int:
    """The bytes of a file that can be read."""
    if not path.exists():
        raise DataError(f"no such file: {path}")
    if not path.is_file():
        kind = "a directory" if path.is_dir() else "not a regular file"
        raise DataError(f"{path} is {kind}: give a text file, or a pattern such as 'DIR/*.txt'")
    try:
        with path.open("rb") as file:
            first = file.read(1)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    if not first:
        raise DataError(f"{path} is empty: give a file with text")
    return path.stat().st_size
