"""Text as documents that are read in order, from any position.

A document is a piece of text that ends with a newline, so that joining documents never joins two words.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Position = dict[str, Any]
"""Where a reader stands: a nest of dicts, lists, strings and integers that JSON can hold."""


class DataError(ValueError):
    """Text that cannot be found, read or used; its message is one line that says what to change."""


class Reader(ABC):
    """An iterator over documents that knows where it stands."""

    def __iter__(self) -> Iterator[str]:
        return self

    @abstractmethod
    def __next__(self) -> str:
        """The next document.

        Raises:
            DataError: the source failed.
        """

    @abstractmethod
    def position(self) -> Position:
        """The position of the next document, to be given to `Documents.read`."""


class Documents(ABC):
    """The documents of one split; every reader is independent of the others.

    Attributes:
        name: what messages call them, such as "ptb/train".
        small: whether they are finite and their token ids may be held in memory.
    """

    def __init__(self, name: str, *, small: bool) -> None:
        self.name = name
        self.small = small

    def __iter__(self) -> Iterator[str]:
        return self.read()

    @abstractmethod
    def read(self, position: Position | None = None) -> Reader:
        """A reader that starts at `position`, or at the first document."""


class StreamedDocuments(Documents):
    """Rows of a streaming `datasets.IterableDataset`, local or on the Hub.

    Attributes:
        column: the column that holds the text.
        render: makes a document of a row's text.
    """

    def __init__(self, name: str, dataset: Any, *, column: str, render: Callable[[str], str], small: bool) -> None:
        super().__init__(name, small=small)
        self._dataset, self.column, self.render = dataset, column, render

    def read(self, position: Position | None = None) -> Reader:
        """A reader over a copy of the data set, because a data set keeps the state of its last iteration."""
        return _RowReader(self, copy.deepcopy(self._dataset), position)

    def part(self, name: str, first: int, count: int) -> StreamedDocuments:
        """The `count` documents from index `first` on, as documents of their own."""
        rows = self._dataset.skip(first).take(count)
        return StreamedDocuments(name, rows, column=self.column, render=self.render, small=self.small)


class _RowReader(Reader):
    """Reads a data set of its own, and turns its errors into `DataError`."""

    def __init__(self, documents: StreamedDocuments, dataset: Any, position: Position | None) -> None:
        self._documents, self._dataset = documents, dataset
        self._start: Position | None = dataset.state_dict() if position is None else copy.deepcopy(position)
        if position is not None:
            dataset.load_state_dict(copy.deepcopy(position))
        self._rows = iter(dataset)

    def __next__(self) -> str:
        documents = self._documents
        try:
            row = next(self._rows)
        except source_errors() as error:
            raise DataError(f"{documents.name}: reading stopped: {first_line(error)}") from error
        self._start = None
        text = row.get(documents.column)
        if not isinstance(text, str):
            raise DataError(f"{documents.name}: a row has no text in column {documents.column!r}")
        return documents.render(text)

    def position(self) -> Position:
        """The data set tells its position only once it has yielded a row; before that it is where we started."""
        return self._dataset.state_dict() if self._start is None else copy.deepcopy(self._start)


class ListedDocuments(Documents):
    """Documents that are at hand anyway, such as the embedded corpus."""

    def __init__(self, name: str, texts: Sequence[str]) -> None:
        super().__init__(name, small=True)
        self._texts = texts

    def read(self, position: Position | None = None) -> Reader:
        """A reader whose position is the index of the next document."""
        return _ListReader(self._texts, 0 if position is None else position["index"])


class _ListReader(Reader):
    """Reads a list from an index on."""

    def __init__(self, texts: Sequence[str], index: int) -> None:
        self._texts, self._index = texts, index

    def __next__(self) -> str:
        if self._index >= len(self._texts):
            raise StopIteration
        self._index += 1
        return as_it_is(self._texts[self._index - 1])

    def position(self) -> Position:
        return {"index": self._index}


def as_it_is(text: str) -> str:
    """The text, with the newline that ends a document."""
    return text if text.endswith("\n") else text + "\n"


def stripped_line(text: str) -> str:
    """One line without the blanks around it, with its newline."""
    return text.strip() + "\n"


def source_errors() -> tuple[type[Exception], ...]:
    """What reading through `datasets` raises when the source is at fault; httpx2's errors are no OSError."""
    import httpx2

    return (OSError, ValueError, httpx2.HTTPError)


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its kind where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
