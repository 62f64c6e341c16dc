"""Code that studies share: results as JSON lines, Markdown tables, and pages that hold tables between two marks.

A study is a list of trainings. Each training appends one line to a file of results when it is finished, so a killed study
resumes with the missing trainings. The tables are made from these lines alone.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

NOTHING = "–"
"""Entry of a table cell without results."""


def read_lines(results: Path) -> list[dict[str, Any]]:
    """Returns the recorded lines, an empty list if the file does not exist.

    An incomplete last line is ignored. A killed process leaves such a line, and another process may just be writing one.

    Raises:
        ValueError: a line is not JSON.
    """
    if not results.exists():
        return []
    content = results.read_bytes()
    found = []
    for number, line in enumerate(content[: _whole(content)].splitlines(), start=1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"line {number} of {results} is not JSON: {error}") from error
    return found


def append_line(results: Path, line: dict[str, Any]) -> None:
    """Appends one line to the file under a lock, so processes may share it. Removes an incomplete last line.

    Raises:
        ValueError: a number is not finite, which JSON does not support.
        OSError: the file cannot be written.
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
    """Returns the number of bytes of the complete lines. A last line without a line end is complete if it is JSON."""
    end = content.rfind(b"\n") + 1
    try:
        json.loads(content[end:])
    except ValueError:
        return end
    return len(content)


@contextmanager
def locked(file: BinaryIO) -> Iterator[None]:
    """Locks the file inside the context. Windows has no `flock` and so no lock; there only one process may write."""
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
    """Returns mean and standard deviation as text, with the number of values in parentheses."""
    known = list(values)
    if len(known) < 2:
        return f"{known[0]:.{digits}f} (1)" if known else NOTHING
    return f"{plus_minus(known, digits)} ({len(known)})"


def plus_minus(values: Sequence[float], digits: int) -> str:
    """Returns mean and standard deviation of two or more values as text."""
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    table = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in table) + "\n"


def around_tables(page: Path, marks: tuple[str, str]) -> tuple[str, str]:
    """Returns the text before and after the tables of the page.

    Raises:
        ValueError: the page does not exist, or lacks a mark.
        OSError: the page cannot be read.
    """
    if not page.exists():
        raise ValueError(
            f"{page} does not exist: call this in a clone of dni_seq, or give another page, a text file with the lines "
            f"{' and '.join(marks)}"
        )
    text = page.read_text(encoding="utf-8")
    if not all(mark in text for mark in marks):
        raise ValueError(f"{page} lacks the lines {' and '.join(marks)}: insert them where the tables go")
    return text.split(marks[0])[0], text.split(marks[1])[1]


def write_tables(page: Path, marks: tuple[str, str], tables: str) -> None:
    """Writes the tables between the marks of the page and keeps the rest of the page.

    Raises:
        ValueError: the page lacks a mark.
        OSError: the page cannot be read or written.
    """
    before, after = around_tables(page, marks)
    page.write_text(f"{before}{marks[0]}\n\n{tables}\n{marks[1]}{after}", encoding="utf-8")
