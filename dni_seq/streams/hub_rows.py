"""Rows of a streaming `datasets.IterableDataset` as documents; reading survives temporary network faults.

A read that fails for a temporary reason is retried from the exact row, with growing pauses. A permanent fault, such as a
missing file, raises at once.
"""

from __future__ import annotations

import copy
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

from dni_seq.streams.documents import DataError, Documents, Position, Reader, WholeReader, first_line
from dni_seq.streams.formats import text_in

PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds to wait before each retry of a row; `huggingface_hub` makes about as many retries of its own in each attempt."""

ROWS_TO_SKIP = 64
"""Rows between two calls of the data set's `state_dict`, which is slow. A position has the last result of the method, and
the number of rows since then."""

CHARACTERS_TO_SKIP = 1 << 20
"""`state_dict` is also called after this many characters of rows, so that resuming never reads much text again."""

EQUAL_ERRORS = 3
"""Number of attempts in a row after which a ValueError with the same message counts as permanent."""

NOT_WORTH_RETRYING = frozenset({400, 401, 403, 404, 410, 416})
"""HTTP statuses that a retry will not change."""


class RowDocuments(Documents):
    """The rows of a streaming data set as documents.

    A position is a state of the data set, the number of rows read after it, and the offset in a row's text.

    Args:
        name: name of the split in messages.
        dataset: a `datasets.IterableDataset` that has not been iterated.
        column: the column that holds the text.
        render: turns a row's text into a document.
        small: as in `Documents`.
        nulls: "error" to raise at a null in the column, "skip" to skip its row.
    """

    def __init__(
        self, name: str, dataset: Any, *, column: str, render: Callable[[str], str], small: bool, nulls: str = "error"
    ) -> None:
        super().__init__(name, small=small)
        self.column, self.render, self.nulls = column, render, nulls
        # A data set keeps the state of its last iteration, so each reader has its own copy. All copies come from a pickle
        # made here: pickling later could race with a thread that changes objects that the copies share, such as the cache
        # of a file system.
        self._copy = _copies(dataset)

    def read(self, position: Position | None = None) -> Reader:
        """Returns a reader over a copy of the data set."""
        return _RowReader(self, **(position or {"state": None, "rows": 0, "offset": 0}))

    def dataset(self) -> Any:
        """Returns a copy of the data set."""
        return self._copy()

    def text_of(self, row: Any) -> str | None:
        """Returns the text of a row, None to skip the row.

        Raises:
            DataError: the row has no text.
        """
        return text_in(row, self.column, partial(_place, self.name, row), self.nulls)


def _copies(dataset: Any) -> Callable[[], Any]:
    """Returns a function that copies `dataset` as it is now.

    Raises:
        DataError: the data set holds an object that cannot be copied, such as a generator.
    """
    try:
        return partial(pickle.loads, pickle.dumps(dataset))
    except (pickle.PicklingError, AttributeError, TypeError):  # it maps a lambda or a local function
        import dill  # `datasets` needs it

    try:
        return partial(dill.loads, dill.dumps(dataset))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise DataError(f"the data set cannot be copied, which resuming needs: {first_line(error)}") from error


class _RowReader(WholeReader):
    """Reads its own copy of a data set, reopens it if reading fails, and turns its errors into `DataError`."""

    def __init__(self, documents: RowDocuments, state: Position | None, rows: int, offset: int) -> None:
        super().__init__(offset)
        self._documents = documents
        self._state, self._rows, self._characters = state, rows, 0
        self._dataset: Any = None
        self._iterator: Iterator[Any] = iter(())

    def next_text(self) -> str:
        documents = self._documents
        found = None
        while found is None:
            found = documents.text_of(self._patient_row())
            self._rows += 1
        text = documents.render(found)
        self._characters += len(text)
        if self._rows >= ROWS_TO_SKIP or self._characters >= CHARACTERS_TO_SKIP:
            self._state, self._rows, self._characters = self._dataset.state_dict(), 0, 0
        return text

    def here(self) -> Position:
        return {"state": copy.deepcopy(self._state), "rows": self._rows}

    def _patient_row(self) -> Any:
        """Returns the next row, with retries; raises StopIteration at the end."""
        errors: list[Exception] = []
        for pause in (*PAUSES, None):
            try:
                return self._row()
            except source_errors() as error:
                self._dataset = None
                errors.append(error)
                if pause is None or not may_pass(errors):
                    tried = "" if len(errors) == 1 else f" {len(errors)} times"
                    cause = first_line(error.__cause__ or error)
                    raise DataError(f"{self._documents.name}: reading failed{tried}: {cause}") from error
            time.sleep(pause)
        raise AssertionError

    def _row(self) -> Any:
        """Returns the next row, without retries; raises StopIteration at the end."""
        if self._dataset is None:
            dataset = self._documents.dataset()
            if self._state is not None:
                dataset.load_state_dict(copy.deepcopy(self._state))
            iterator = iter(dataset)
            for _ in range(self._rows):
                next(iterator)
            self._dataset, self._iterator = dataset, iterator
        return next(self._iterator)


def _place(name: str, row: Any) -> str:
    """Returns the place of a row in messages, which is the start of the row, because rows on the Hub have no numbers."""
    return f"{name}: the row {str(row)[:60]!r}"


def source_errors() -> tuple[type[Exception], ...]:
    """Returns the errors that `datasets` raises if the source fails; httpx2's errors are not OSErrors."""
    import httpx2

    return (OSError, ValueError, httpx2.HTTPError)


def may_pass(errors: Sequence[Exception]) -> bool:
    """Returns whether the next attempt to read may succeed, after attempts that failed with `errors`.

    A ValueError comes from a text that was cut short on its way, which may pass, or from the user's own code, which fails
    each time with the same message.
    """
    error = errors[-1]
    response = getattr(error, "response", None)
    if response is not None:
        return response.status_code not in NOT_WORTH_RETRYING
    if len(errors) >= EQUAL_ERRORS and isinstance(error, ValueError) and not isinstance(error, OSError):
        return len({repr(each) for each in errors[-EQUAL_ERRORS:]}) > 1
    return not isinstance(error, (FileNotFoundError, UnicodeError))


def leave_retrying_to_us() -> None:
    """Turns off the retries of `datasets`, which would make 20 attempts, over minutes, in each attempt of `_RowReader`."""
    from datasets import config

    once = MappingProxyType({"MAX_RETRIES": 1, "RETRY_INTERVAL": 0})
    for name, value in once.items():
        setattr(config, f"STREAMING_READ_{name}", value)
        setattr(config, f"STREAMING_OPEN_{name}", value)
    config.STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL = 0
    config.STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL = 0
