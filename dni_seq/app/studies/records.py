"""What studies share: results as JSON lines, Markdown tables of them, and the page where the tables stand between two marks.

A study is a list of trainings. Each leaves one line in a file of results as soon as it is through, so that a killed study
goes on with what is missing, and tables come from the lines alone.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

NOTHING = "–"
"""What a table says where no line says anything."""


def read_lines(results: Path) -> list[dict[str, Any]]:
    """The lines on record, none where there is no file.

    A last line that was broken off, by a kill or because it is being written now, is not there.

    Raises:
        ValueError: a line is no JSON.
    """
    if not results.exists():
        return []
    content = results.read_bytes()
    found = []
    for number, line in enumerate(content[: _whole(content)].splitlines(), start=1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"line {number} of {results} is no JSON: {error}") from error
    return found


def append_line(results: Path, line: dict[str, Any]) -> None:
    """Put one line at the end of the file; processes may share it. What a kill has left of a broken line goes.

    Raises:
        ValueError: a number is not finite, which JSON cannot say.
        OSError: as from the file system.
    """
    text = json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a+b") as file, locked(file):
        file.seek(0)
        content = file.read()
        end = _whole(content)
        file.truncate(end)
        file.write((b"" if content[:end].endswith(b"\n") or not end else b"\n") + text.encode("utf-8"))
        file.flush()


def _whole(content: bytes) -> int:
    """Where the last whole line ends, be it that the last one lacks its line end alone."""
    end = content.rfind(b"\n") + 1
    try:
        json.loads(content[end:])
    except ValueError:
        return end
    return len(content)


@contextmanager
def locked(file: BinaryIO) -> Iterator[None]:
    """Hold the file against other processes that lock it; where the system has no `flock` (Windows), only one may write."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


def mean_and_std(values: Iterable[float], digits: int = 1) -> str:
    """Mean and standard deviation, with the number of values in brackets."""
    known = list(values)
    if len(known) < 2:
        return f"{known[0]:.{digits}f} (1)" if known else NOTHING
    return f"{statistics.mean(known):.{digits}f} ± {statistics.stdev(known):.{digits}f} ({len(known)})"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown."""
    table = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in table) + "\n"


def around_tables(page: Path, marks: tuple[str, str]) -> tuple[str, str]:
    """What stands before and behind the tables on the page.

    Raises:
        ValueError: the page lacks a mark.
        OSError: as from the file system.
    """
    text = page.read_text(encoding="utf-8")
    if not all(mark in text for mark in marks):
        raise ValueError(f"{page} lacks the lines {' and '.join(marks)}: put them where the tables go")
    return text.split(marks[0])[0], text.split(marks[1])[1]


def write_tables(page: Path, marks: tuple[str, str], tables: str) -> None:
    """Put the tables between the marks of the page; the rest of it stays.

    Raises:
        ValueError, OSError: as from `around_tables`.
    """
    before, after = around_tables(page, marks)
    page.write_text(f"{before}{marks[0]}\n\n{tables}\n{marks[1]}{after}", encoding="utf-8")
