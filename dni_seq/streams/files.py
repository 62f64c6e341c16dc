"""Text in local files: one file, several files, or all files that match a pattern."""

from __future__ import annotations

import glob
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from dni_seq.core.paths import expand_home
from dni_seq.streams.compression import packing_of
from dni_seq.streams.documents import DataError, Documents, Piece, Position, Reader, check_visible
from dni_seq.streams.file_types import PARQUET, check_ending
from dni_seq.streams.formats import FileFormat, read_file

IN_MEMORY_BYTES = 1 << 25
"""Files of up to this total size are held in memory as token ids. If their total size is larger, they are streamed."""

PACKED = 4
"""Assumed ratio of the uncompressed size to the size of a compressed file."""


class FileDocuments(Documents):
    """The documents of several files, one file after the other.

    Attributes:
        paths: the files.

    Raises:
        DataError: a file is missing, empty, unreadable or not a regular file, or its name has the ending of a file that is
            not text.
    """

    def __init__(self, name: str, paths: Sequence[Path], form: FileFormat) -> None:
        self.paths = tuple(paths)
        self._sizes = {path: _size(path) for path in paths}
        self._form = form
        unpacked = sum(
            size * (PACKED if packing_of(path) or path.suffix.lower() == PARQUET else 1)
            for path, size in self._sizes.items()
        )
        super().__init__(name, small=unpacked <= IN_MEMORY_BYTES)
        self._checksum = zlib.crc32(repr([*self._sizes.values()]).encode())

    def read(self, position: Position | None = None) -> Reader:
        """Returns a reader; a position is a file's index, the position in it, and a checksum of the sizes of all files.

        Raises:
            DataError: the sizes or the number of the files have changed since the position was saved; the splits would
                differ.
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
        self._skipped_before = 0
        self._reader = read_file(*files[file], form, inner)

    @property
    def skipped(self) -> int:
        """Number of rows with a null that were skipped."""
        return self._skipped_before + self._reader.skipped

    def __next__(self) -> Piece:
        while True:
            try:
                return next(self._reader)
            except StopIteration:
                if self._number + 1 == len(self._files):
                    raise
            self._number += 1
            self._skipped_before = self.skipped
            self._reader = read_file(*self._files[self._number], self._form, None)

    def position(self) -> Position:
        return {"sizes": self._sizes, "file": self._number, "inner": self._reader.position()}


def load_lines(paths: Mapping[str, Path], form: FileFormat, names: Mapping[str, str]) -> dict[str, Documents]:
    """Returns the documents of each split's file.

    Raises:
        DataError: a file cannot be used, or has no visible character.
    """
    splits: dict[str, Documents] = {split: FileDocuments(names[split], [path], form) for split, path in paths.items()}
    for split, documents in splits.items():
        check_visible(documents, f"give {paths[split]} with text")
    return splits


def matching(name: str | Path) -> list[Path]:
    """Returns the file `name`, or else all files that match it as a pattern (`**` for any folders), sorted by name.

    The first folders of a pattern that exist are taken as they are, even if their names have wildcards or brackets.

    Raises:
        DataError: there is no such file, or its folder cannot be read.
    """
    path = expand_home(name)
    try:
        if path.exists():
            return [path]
        folder, pattern = _existing_folder(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): make it readable, or give another file") from error
    found = sorted(glob.glob(pattern, root_dir=folder, recursive=True))
    paths = [each for each in (folder / one for one in found) if each.is_file()]
    if paths:
        return paths
    if not os.access(folder, os.R_OK | os.X_OK):
        raise DataError(f"{folder} cannot be read (Permission denied): make it readable, or give another file")
    raise DataError(f"no such file: {path}; give a file that exists, or a pattern that matches files")


def _existing_folder(path: Path) -> tuple[Path, str]:
    """Splits a path into its first folders, as far as they exist, and the rest."""
    folder, *rest = [path, *path.parents][::-1]
    for longer in rest:
        if not longer.is_dir():
            break
        folder = longer
    return folder, str(path.relative_to(folder))


def _size(path: Path) -> int:
    """Returns the size of a file in bytes; raises a DataError if the file cannot be read, is empty, or is not text."""
    if not path.exists():
        raise DataError(f"no such file: {path}; put it there, or give other files")
    if not path.is_file():
        kind = "a directory" if path.is_dir() else "not a regular file"
        raise DataError(f"{path} is {kind}: give a text file, or a pattern such as 'DIR/*.txt'")
    check_ending(path)
    try:
        with path.open("rb") as file:
            first = file.read(1)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): make it readable, or give another file") from error
    if not first:
        raise DataError(f"{path} is empty: give a file with text")
    if not (size := path.stat().st_size):
        raise DataError(f"{path} has no fixed size, like the files in /proc: copy it to another file")
    return size
