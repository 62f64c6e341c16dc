"""Windows over any data set of the library `datasets`, of token ids or of text with a tokenizer.

Every row is a document. The ids of a row follow the ids of the row before, as with `group_texts` in the scripts of
`transformers`. Nothing is inserted between rows: the tokenizer must add an end-of-text token if the text needs one.

Legend: T = window length in steps, B = lanes, m = lookahead in steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from dni_seq.core.windows import Window
from dni_seq.streams.documents import DataError, Documents, Position, Reader, WholeReader, first_line
from dni_seq.streams.hub_rows import RowDocuments, source_errors
from dni_seq.streams.tokenization import Ids, Tokenizer
from dni_seq.streams.window_stream import WindowStream

ROWS = 64
"""Rows of a `Dataset` that are read at once."""

IDS = 0x110000
"""Ids must be below this number: streams carry text, so an id is passed on as the character with that code point."""

NAME = "the data set"


class DatasetWindows:
    """A stream of windows over a data set; its position can be saved and restored. `windows` builds it.

    Iterating yields the rest of the current epoch, as `WindowStream` does: the last window of an epoch has `ends`.
    """

    def __init__(self, stream: WindowStream) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[Window]:
        return iter(self._stream)

    @property
    def epoch(self) -> int:
        """Number of finished epochs. It is incremented before the last window of an epoch is yielded."""
        return self._stream.epoch

    @property
    def windows_per_epoch(self) -> int | None:
        """Number of windows in an epoch; None for an `IterableDataset` and with `document_reset`."""
        return self._stream.windows_per_epoch

    def restart(self) -> None:
        """Moves to the start of the current epoch."""
        self._stream.restart()

    def state_dict(self) -> dict[str, Any]:
        """Returns the position of the next window; JSON can hold it."""
        return self._stream.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Moves to a position from `state_dict`.

        Raises:
            DataError: B, `document_reset`, the data set or the tokenizer differs, or `state` is not a position.
        """
        self._stream.load_state_dict(state)


def windows(
    dataset: Any,
    *,
    tokenizer: Any = None,
    lanes: int,
    bptt: int,
    lookahead: int = 0,
    text_column: str | None = None,
    document_reset: bool = False,
) -> DatasetWindows:
    """Returns a resumable stream of windows over a data set, streamed or not.

    A `Dataset` is held in memory as one int32 per token, in lanes of contiguous text. An `IterableDataset` is streamed, and
    may be endless; `dataset.to_iterable_dataset()` streams a `Dataset` that is too large. `StreamedLanes` says how streamed
    text is cut into lanes. A shuffled `IterableDataset` is rejected, because it drops rows when it resumes: shuffle a
    `Dataset` instead.

    Args:
        dataset: a `datasets.Dataset` or `datasets.IterableDataset`, one split.
        tokenizer: converts the text of a row to ids: a `tokenizers.Tokenizer`, another object whose `encode(text)` returns
            ids or an object with `ids`, or a function from a text to such a value. Without a tokenizer the column must hold
            ids.
        lanes: B, the batch size.
        bptt: T, the window length.
        lookahead: m, the number of steps after each window that are attached to the window; 0 for no lookahead.
        text_column: the column with the text or the ids. None for the column "text" with a tokenizer and "input_ids" without
            a tokenizer. If no column has this name, None stands for the only column whose first row is text, or ids.
        document_reset: whether lanes end with each row; see `WindowStream`.

    Raises:
        TypeError: `dataset` or `tokenizer` is of another kind.
        ValueError: a size is out of range.
        DataError: the data set is too short, is a shuffled stream, cannot be read, or has no column to read.
    """
    import datasets

    encode = _encoder(tokenizer)
    if isinstance(dataset, datasets.Dataset):
        documents: _TableDocuments | _StreamDocuments = _TableDocuments(dataset, encode)
    elif isinstance(dataset, datasets.IterableDataset):
        documents = _StreamDocuments(dataset, encode)
    else:
        raise TypeError(
            f"windows needs a Dataset or an IterableDataset, got {type(dataset).__name__}: choose one split of a DatasetDict"
        )
    documents.column = _column(documents.first_row(), text_column, encode is not None)
    sizes = {"lanes": lanes, "bptt": bptt, "lookahead": lookahead}
    return DatasetWindows(WindowStream(documents, _IdTokenizer(), **sizes, document_reset=document_reset))


class _TableDocuments(Documents):
    """The rows of a `Dataset`, as text whose code points are ids."""

    def __init__(self, dataset: Any, encode: Callable[[str], Any] | None) -> None:
        super().__init__(NAME, small=True)
        self.rows, self.encode, self.column = dataset, encode, ""

    def first_row(self) -> Mapping[str, Any] | None:
        """Returns the first row, None if there is none."""
        return self.rows[0] if len(self.rows) else None

    def read(self, position: Position | None = None) -> Reader:
        """Returns a reader; its position is the index of the next row and the ids read in it."""
        return _TableReader(self, **(position or {"row": 0, "offset": 0}))


class _TableReader(WholeReader):
    """Reads the rows of a `Dataset` from an index."""

    def __init__(self, documents: _TableDocuments, row: int, offset: int) -> None:
        super().__init__(offset)
        self._documents, self._row = documents, row
        self._values: Iterator[Any] = iter(())

    def next_text(self) -> str:
        documents = self._documents
        value = next(self._values, self)  # a row's value may be None
        if value is self:
            if self._row >= len(documents.rows):
                raise StopIteration
            self._values = iter(documents.rows[self._row : self._row + ROWS][documents.column])
            value = next(self._values)
        self._row += 1
        return _ids_as_text(value, documents.encode, documents.column)

    def here(self) -> Position:
        return {"row": self._row}


class _StreamDocuments(RowDocuments):
    """The rows of an `IterableDataset`, as text whose code points are ids.

    Raises:
        DataError: the data set is shuffled, or cannot be copied.
    """

    def __init__(self, dataset: Any, encode: Callable[[str], Any] | None) -> None:
        if _is_shuffled(getattr(dataset, "_ex_iterable", None)):
            raise DataError(
                f"{NAME} is a shuffled IterableDataset, which drops rows when it resumes: shuffle a Dataset, then call its "
                "to_iterable_dataset if it is too large for memory"
            )
        super().__init__(NAME, dataset, column="", render=str, small=False)
        self.encode = encode

    def first_row(self) -> Mapping[str, Any] | None:
        """Returns the first row, None if there is none.

        Raises:
            DataError: the data set cannot be read.
        """
        try:
            return next(iter(self.dataset()), None)
        except source_errors() as error:
            raise DataError(f"{self.name} cannot be read: {first_line(error)}") from error

    def text_of(self, row: Any) -> str:
        """Returns the ids of a row as text."""
        return _ids_as_text(row.get(self.column), self.encode, self.column)


class _IdTokenizer(Tokenizer):
    """Returns the code points of a text as its ids."""

    kind = "word"  # so every token counts as a word; the count is not used
    vocabulary = ()

    @property
    def vocabulary_size(self) -> int:
        """`IDS`, the largest number of ids."""
        return IDS

    def lookup(self, text: str) -> Ids:
        """Returns the ids."""
        return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.int32)

    def decode(self, ids: Any) -> str:
        """Returns ids as text."""
        return _ids_as_text(ids, None, "ids")

    def content(self) -> dict[str, Any]:
        """Returns an empty dict: this tokenizer has nothing to save."""
        return {}


def _ids_as_text(value: Any, encode: Callable[[str], Any] | None, column: str) -> str:
    """Returns the ids of a row as the code points of a text.

    Args:
        value: the row's text, or its ids if `encode` is None.
        encode: converts text to ids.
        column: name of the column, for messages.

    Raises:
        DataError: the value is not text or not ids.
    """
    if encode is not None and not isinstance(value, str):
        raise DataError(
            f"{NAME} has a row whose column {column!r} holds {type(value).__name__}, no text: filter such rows out, choose "
            "another text_column, or leave the tokenizer out if it holds ids"
        )
    if encode is None and isinstance(value, str):
        raise DataError(f"{NAME} has text in column {column!r}: pass a tokenizer, or choose a text_column of ids")
    found = value if encode is None else encode(value)
    try:
        ids = np.asarray(found)
    except ValueError:  # lists of several lengths
        ids = np.asarray(None)
    if ids.ndim == 1 and ids.size == 0:
        return ""
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        source = (
            f"has a row whose column {column!r} holds" if encode is None else "has a row for which the tokenizer returned"
        )
        raise DataError(f"{NAME} {source} no list of ids, but {str(found)[:60]!r}")
    if ids.min() < 0 or ids.max() >= IDS:
        raise DataError(f"{NAME} has the id {ids.min() if ids.min() < 0 else ids.max()}: ids must be from 0 to {IDS - 1}")
    return ids.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")


def _encoder(tokenizer: Any) -> Callable[[str], Any] | None:
    """Returns a function from text to ids, None without a tokenizer.

    Raises:
        TypeError: the tokenizer has no method `encode` and cannot be called.
    """
    if tokenizer is None:
        return None
    encode = getattr(tokenizer, "encode", tokenizer)
    if not callable(encode):
        raise TypeError(f"tokenizer must have a method encode, or be callable, got {type(tokenizer).__name__}")

    def to_ids(text: str) -> Any:
        found = encode(text)
        return getattr(found, "ids", found)

    return to_ids


def _column(row: Mapping[str, Any] | None, given: str | None, of_text: bool) -> str:
    """Returns the name of the column to read.

    Raises:
        DataError: there is no row, or no such column.
    """
    if row is None:
        raise DataError(f"{NAME} has no rows")
    usual = "text" if of_text else "input_ids"
    wanted = usual if given is None else given
    if wanted in row:
        return wanted
    fitting = [name for name, value in row.items() if (isinstance(value, str) if of_text else _are_ids(value))]
    if given is None and len(fitting) == 1:
        return fitting[0]
    columns = ", ".join(map(repr, row))
    raise DataError(f"{NAME} has no column {wanted!r} (columns: {columns}): choose one with text_column")


def _are_ids(value: Any) -> bool:
    """Returns whether a row's value is a list or an array of integers."""
    return isinstance(value, list | np.ndarray) and len(value) > 0 and isinstance(value[0], int | np.integer)


def _is_shuffled(source: Any) -> bool:
    """Returns whether the examples of an `IterableDataset` pass through a shuffle buffer, whose content is not saved."""
    if type(source).__name__ == "BufferShuffledExamplesIterable":
        return True
    inner = [getattr(source, "ex_iterable", None), *(getattr(source, "ex_iterables", None) or [])]
    return any(_is_shuffled(each) for each in inner if each is not None)
