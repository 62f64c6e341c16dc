"""Readers of single local files: lines of text, lines of JSON, and Parquet; text and JSON may be compressed.

Memory is bounded: for text by `CHUNK` bytes, whatever the length of the lines; for JSON by one line; for Parquet by a batch
of `ROWS` rows. Positions in text and JSON are byte offsets of the uncompressed text, so resuming in an uncompressed file is
immediate.
"""

from __future__ import annotations

import codecs
import json
import re
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from dni_seq.streams.compression import open_bytes, packing_of, reading, reason, unpacked_ending
from dni_seq.streams.documents import DataError, Piece, Position, Reader, WholeReader, as_it_is, first_line
from dni_seq.streams.file_types import BYTE_ORDER_MARK, JSON_LINES, PARQUET, check_start

CHUNK = 1 << 20
"""Bytes of text read at once; a longer line is cut, before a space if the line has one."""

ROWS = 64
"""Rows of Parquet read at once."""


@dataclass(frozen=True)
class FileFormat:
    """Settings for reading text from a file.

    Attributes:
        column: the JSON field or Parquet column that holds the text.
        errors: "strict" to raise at bytes that are not UTF-8, "replace" to read them as U+FFFD.
        render: turns a line, or a column's text, into a document.
        nulls: "error" to raise at a null in the column, "skip" to skip its row.
    """

    column: str = "text"
    errors: str = "strict"
    render: Callable[[str], str] = as_it_is
    nulls: str = "error"


def read_file(path: Path, size: int, form: FileFormat, position: Position | None) -> Reader:
    """Returns a reader of a file, chosen by the ending of its name, that starts at a position.

    Args:
        path: the file.
        size: its size in bytes when it was opened first. An uncompressed text or JSON file that has grown since is read up
            to this size. If such a file has shrunk, or if the size of a file of another kind has changed, reading raises a
            DataError.
        form: settings for reading.
        position: where to start; None for the start of the file.
    """
    ending = unpacked_ending(path)
    if ending in JSON_LINES:
        return _JsonReader(path, size, form, **(position or {"lines": None, "offset": 0}))
    if ending == PARQUET:
        return _ParquetReader(path, size, form, **(position or {"group": 0, "row": 0, "offset": 0}))
    return _LineReader(path, size, form.errors, form.render, **(position or {"byte": 0, "line": 0}))


class _LineReader(Reader):
    r"""Reads the lines of a text file, ended by \n, \r\n or \r, as documents.

    A chunk has at most `CHUNK` bytes and ends after its last line end. Without a line end it ends before its last space, and
    without a space it has `CHUNK` bytes. A position is the start of a chunk and a number of lines in the chunk. Reading from
    a position therefore always gives the same pieces.
    """

    def __init__(self, path: Path, size: int, errors: str, render: Callable[[str], str], byte: int, line: int) -> None:
        self._path, self._errors, self._render = path, errors, render
        self._size = size
        self._start = self._next = byte
        self._lines: list[str] = []
        self._line, self._skip = 0, line
        self._file: IO[bytes] | None = None
        self._rest = b""

    def __next__(self) -> Piece:
        while self._line >= len(self._lines):
            self._read_chunk()
        text = self._lines[self._line]
        self._line += 1
        if text.endswith("\n"):
            return Piece(self._render(text), True)
        return Piece(text, False)

    def position(self) -> Position:
        if self._line >= len(self._lines):
            return {"byte": self._next, "line": self._skip}
        return {"byte": self._start, "line": self._line}

    def line_number(self) -> int:
        """Returns the number of the line that was read last, counted from 1. Reads the file again up to this line."""
        return _line_ends(self._path, self._start) + max(1, self._line)

    def _read_chunk(self) -> None:
        """Reads the lines of the next chunk; raises StopIteration at the end of the file."""
        data, last = self._fill()
        if self._next == 0:
            check_start(self._path, data)
        usable = len(data) if last else _usable(data)
        try:
            text, used = codecs.utf_8_decode(data[:usable], self._errors, last)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self._path} is not UTF-8 at byte {self._next + error.start}"
                f"{' and holds NUL bytes, as files do that are not text' if 0 in data else ''}: "
                "convert it to UTF-8, for example with iconv, or use --invalid-utf8 replace"
            ) from error
        if not data:
            raise StopIteration
        if self._next == 0 and data.startswith(BYTE_ORDER_MARK):
            text = text[1:]
        if "\r" in text:
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        lines = text.split("\n")
        self._lines = [line + "\n" for line in lines[:-1]]
        if lines[-1]:
            self._lines.append(lines[-1] + "\n" if last else lines[-1])
        self._start, self._next, self._rest = self._next, self._next + used, data[used:]
        self._line, self._skip = self._skip, 0

    def _fill(self) -> tuple[bytes, bool]:
        """Returns up to CHUNK + 1 bytes from the start of the chunk, and whether the file ends with them."""
        with reading(self._path):
            if self._file is None:
                self._file = open_bytes(self._path)
                weakref.finalize(self, self._file.close)
                _pass(self._file, self._next)
            # The additional byte shows whether the file continues.
            data = self._rest + self._file.read(CHUNK + 1 - len(self._rest))
        if not packing_of(self._path) and self._next + len(data) >= self._size:
            data = data[: max(0, self._size - self._next)]
            if self._next + len(data) < self._size:
                raise DataError(_changed(self._path))
            return data, True
        if len(data) <= CHUNK:
            check_size(self._path, self._size)
            return data, True
        return data, False


def _usable(data: bytes) -> int:
    """Returns how many of the first CHUNK bytes belong to the chunk."""
    # The last byte may be the first half of \r\n.
    line = max(data.rfind(b"\n", 0, CHUNK), data.rfind(b"\r", 0, CHUNK - 1)) + 1
    if line:
        return line
    blank = data.rfind(b" ", 1, CHUNK)
    if blank > 0:
        return blank
    return CHUNK - (data[CHUNK - 1 : CHUNK] == b"\r")


def _line_ends(path: Path, stop: int) -> int:
    """Returns the number of line ends in the first `stop` bytes of the uncompressed text."""
    count, left, last = 0, stop, b""
    with reading(path), open_bytes(path) as file:
        while left > 0 and (data := file.read(min(left, CHUNK))):
            pairs = data.count(b"\r\n") + (last == b"\r" and data.startswith(b"\n"))
            count += data.count(b"\n") + data.count(b"\r") - pairs
            left, last = left - len(data), data[-1:]
    return count


_HALVES = re.compile("[\ud800-\udfff]")
"""Surrogates, which JSON can escape and UTF-8 cannot hold."""


class _JsonReader(WholeReader):
    """Reads JSON objects, one per line; a document is the text in one field."""

    def __init__(self, path: Path, size: int, form: FileFormat, lines: Position | None, offset: int) -> None:
        super().__init__(offset)
        self._path, self._form = path, form
        self._lines = _LineReader(path, size, form.errors, str, **(lines or {"byte": 0, "line": 0}))

    def next_text(self) -> str:
        while True:
            parts = []
            for piece in self._lines:
                parts.append(piece.text)
                if piece.ends:
                    break
            line = "".join(parts)
            if not parts:
                raise StopIteration
            if not line.strip():
                continue
            text = self._text_of(line)
            if text is not None:
                return self._form.render(text)
            self._skipped += 1

    def here(self) -> Position:
        return {"lines": self._lines.position()}

    def _text_of(self, line: str) -> str | None:
        """Returns the text in a line of JSON; None if the line is to be skipped."""
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            cause = f"{error.msg}, column {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else first_line(error)
            raise DataError(
                f"{self._where()} is not JSON ({cause}), give one JSON object per line: {_shortened(line)}"
            ) from error
        if not isinstance(row, dict):
            raise DataError(f"{self._where()} is not a JSON object, give one JSON object per line: {_shortened(line)}")
        text = text_in(row, self._form.column, self._where, self._form.nulls)
        if text is None or text.isascii() or not _HALVES.search(text):
            return text
        if self._form.errors == "strict":
            raise DataError(
                f"{self._where()} has half of a surrogate pair, which is not a character: correct the line, "
                f"or use --invalid-utf8 replace: {_shortened(line)}"
            )
        return _HALVES.sub("\ufffd", text)

    def _where(self) -> str:
        """Returns the place of the line that was read last, for messages."""
        return f"{self._path}: line {self._lines.line_number()}"


class _ParquetReader(WholeReader):
    """Reads the rows of a Parquet file; a document is the text in one column."""

    def __init__(self, path: Path, size: int, form: FileFormat, group: int, row: int, offset: int) -> None:
        super().__init__(offset)
        self._path, self._form, self._size = path, form, size
        self._group, self._row = group, row
        self._texts: Iterator[Any] | None = None
        self._file: Any = None

    def next_text(self) -> str:
        import pyarrow

        column = self._form.column
        while True:
            try:
                value = self._next_value()
            except (OSError, pyarrow.ArrowException) as error:
                raise DataError(f"{self._path}: reading failed ({reason(error)}): check that the file is intact") from error
            text = text_in({column: value}, column, self._where, self._form.nulls)
            if text is not None:
                return self._form.render(text)
            self._skipped += 1

    def here(self) -> Position:
        return {"group": self._group, "row": self._row}

    def _where(self) -> str:
        """Returns the place of the row that was read last, for messages; rows are counted from 1."""
        before = sum(self._file.metadata.row_group(group).num_rows for group in range(self._group))
        return f"{self._path}: row {before + self._row}"

    def _next_value(self) -> Any:
        if self._file is None:
            self._file = _open_parquet(self._path, self._size, self._form.column)
            weakref.finalize(self, self._file.close)
        while self._group < self._file.num_row_groups:
            if self._texts is None:
                self._texts = self._values(self._group, self._row)
            for text in self._texts:
                self._row += 1
                return text
            self._group, self._row, self._texts = self._group + 1, 0, None
        raise StopIteration

    def _values(self, group: int, row: int) -> Iterator[Any]:
        """Yields the column's values in a row group, starting at a row."""
        passed = 0
        for batch in self._file.iter_batches(ROWS, row_groups=[group], columns=[self._form.column]):
            if passed + len(batch) > row:
                for value in batch.column(0)[max(0, row - passed) :]:
                    yield self._decoded(value)
            passed += len(batch)

    def _decoded(self, value: Any) -> Any:
        """Returns the value of an Arrow scalar; Parquet does not check that text is UTF-8."""
        try:
            return value.as_py()
        except UnicodeDecodeError as error:
            if self._form.errors == "strict":
                where = f"byte {error.start} of row {self._row} of row group {self._group}"
                raise DataError(
                    f"{self._path} is not UTF-8 at {where} (counted from 0): correct the row, or use --invalid-utf8 replace"
                ) from error
            return value.as_buffer().to_pybytes().decode("utf-8", self._form.errors)


def _open_parquet(path: Path, size: int, column: str) -> Any:
    """Opens a Parquet file; raises a DataError if it lacks the column or has changed its size."""
    import pyarrow.parquet

    check_size(path, size)
    file = pyarrow.parquet.ParquetFile(path)
    if column not in file.schema_arrow.names:
        raise DataError(_no_column(str(path), column, file.schema_arrow.names))
    return file


def text_in(row: Mapping[str, Any], column: str, where: Callable[[], str], nulls: str) -> str | None:
    """Returns the text in a row's column, None if it is null and `nulls` is "skip".

    Args:
        row: the row.
        column: name of the column.
        where: returns the place of the row, for messages.
        nulls: "error" or "skip", as in `FileFormat`.

    Raises:
        DataError: the row has no such column, or its value is neither a string nor a null to skip.
    """
    if column not in row:
        raise DataError(_no_column(where(), column, [*row]))
    text = row[column]
    if isinstance(text, str) or (text is None and nulls == "skip"):
        return text
    if text is None:
        raise DataError(
            f"{where()} has no text in column {column!r}, but null: use --null-text skip to skip such rows, "
            "or choose another column with --text-column"
        )
    raise DataError(
        f"{where()} has no text in column {column!r}, but {_shortened(str(text))}: correct the row, "
        "or choose another column with --text-column"
    )


def _no_column(where: str, column: str, columns: list[str]) -> str:
    return f"{where} has no column {column!r} (columns: {', '.join(map(repr, columns))}): choose one with --text-column"


def check_size(path: Path, size: int) -> None:
    """Raises a DataError if the size of a file differs from `size`."""
    try:
        now = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: reading failed ({reason(error)}): check that the file is intact") from error
    if now != size:
        raise DataError(_changed(path))


def _changed(path: Path) -> str:
    return f"{path} has changed while it was read: start again with a file that does not change"


def _pass(file: IO[bytes], count: int) -> None:
    """Moves to byte `count` of a file just opened. A file that cannot seek is read up to this byte."""
    if file.seekable():
        file.seek(count)
        return
    while count > 0 and (data := file.read(min(count, CHUNK))):
        count -= len(data)


def _shortened(line: str) -> str:
    """Returns the quoted start of a line."""
    return repr(line[:60])
