"""metrics.csv: every curve of a run in one table, a row for each step that has points and a column for each key.

`pandas.read_csv("metrics.csv", index_col="step")` reads the file. A cell is empty if its key has no point at its step. Rows
are appended, so a killed process loses at most the last row. A new key adds a column, and the whole file is rewritten then.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from dni_seq.app.runs.checkpoint import write_atomically

STEP = "step"


class MetricsFile:
    """Writes the curves of a run to a CSV file.

    The points of one step may arrive in several calls; they become one row. A point replaces an earlier point of the same
    key and step. A key named "step" is skipped, because the first column has that name.

    Args:
        path: the file. Its directory is created if it does not exist.
        resumed_at: number of steps already done. Rows of later steps are removed; a session that was killed wrote them.

    Raises:
        ValueError: the file exists and is not a table of steps.
        OSError: the file cannot be read or written.
    """

    def __init__(self, path: Path, resumed_at: int = 0) -> None:
        self._path = path
        self._row: dict[str, str] = {}
        self._step = self._last_step = -1
        self._pending = False
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_rows(path) if int(row[STEP]) <= resumed_at] if path.exists() else []
        self._columns = [STEP, *(key for key in (kept[0] if kept else {}) if key != STEP)]
        self._replace(kept)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Adds values by key as the points of `step`."""
        if step != self._step:
            self._write_row()
            self._step, self._row = step, {}
        texts = {key: str(value if isinstance(value, int) else float(value)) for key, value in values.items()}
        self._row |= {key: text for key, text in texts.items() if key != STEP}
        self._pending = True

    def flush(self) -> None:
        """Writes the row of the current step. If another point of this step follows, the row is written again."""
        self._write_row()

    def close(self) -> None:
        """Writes the row of the current step. If that fails, the row is lost without an error."""
        with suppress(OSError):  # `flush`, which is called before every checkpoint, reports the error
            self._write_row()

    def _write_row(self) -> None:
        """Writes the row of the current step, unless the file already has it."""
        if not self._pending:
            return
        new = [key for key in self._row if key not in self._columns]
        if new or self._step == self._last_step:
            rows = read_rows(self._path)
            before = rows.pop() if self._step == self._last_step else {}
            self._columns += new
            self._replace([*rows, {**before, STEP: str(self._step), **self._row}])
        else:
            with self._path.open("a", encoding="utf-8", newline="") as file:
                file.write(self._lines([{STEP: str(self._step), **self._row}]))
        self._last_step, self._pending = self._step, False

    def _replace(self, rows: list[dict[str, str]]) -> None:
        """Replaces the file by one with `rows`."""
        content = (self._lines([dict(zip(self._columns, self._columns, strict=True))]) + self._lines(rows)).encode()
        write_atomically(self._path, lambda file: file.write(content))
        self._last_step = int(rows[-1][STEP]) if rows else -1

    def _lines(self, rows: Iterable[Mapping[str, str]]) -> str:
        """Returns rows as lines of the file."""
        text = io.StringIO()
        csv.DictWriter(text, self._columns, restval="", lineterminator="\n").writerows(rows)
        return text.getvalue()


def read_rows(path: Path) -> list[dict[str, str]]:
    """Returns the rows of a metrics.csv as texts by column. Skips a last line that a killed process left unfinished.

    Raises:
        ValueError: the file is not a table of steps.
        OSError: the file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
        rows = list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]), strict=True))
    except (ValueError, csv.Error) as error:  # not UTF-8, or not CSV
        raise _damaged(path) from error
    if not all((row.get(STEP) or "").isdecimal() and None not in row and None not in row.values() for row in rows):
        raise _damaged(path)
    return rows


def read_curves(path: Path) -> dict[str, dict[int, float]]:
    """Returns the curves of a metrics.csv as values by step for each key.

    Raises:
        ValueError: the file is not a table of numbers by step.
        OSError: the file cannot be read.
    """
    curves: dict[str, dict[int, float]] = {}
    try:
        for row in read_rows(path):
            for key, value in row.items():
                if key != STEP and value:
                    curves.setdefault(key, {})[int(row[STEP])] = float(value)
    except ValueError as error:
        raise _damaged(path) from error
    return curves


def _damaged(path: Path) -> ValueError:
    return ValueError(f"{path} is not a table of numbers by step, or is damaged: move it to another directory")
