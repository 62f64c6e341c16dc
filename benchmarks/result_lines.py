"""The options `--output` and `--table` of benchmarks: results as JSON lines in a file, and as a table of Markdown.

The module imports torch only when a line is written or read, so that start_up.py can use it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

Line = Mapping[str, Any]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds `--output` and `--table` to a benchmark's options."""
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="append the JSON lines to this file; they are printed too"
    )
    parser.add_argument(
        "--table", type=Path, metavar="FILE", help="measure nothing; print the lines of this file as a table"
    )


def measuring(parser: argparse.ArgumentParser, options: argparse.Namespace, table: Callable[[Sequence[Line]], str]) -> bool:
    """Returns whether to measure. With `--table`, prints the table and returns False. Otherwise checks `--output` first."""
    if options.table is not None:
        print_table(parser, options.table, table)
        return False
    check_output(parser, options.output)
    return True


def machine() -> dict[str, Any]:
    """Returns the entries that every line has besides settings and results: the date, versions, and the number of CPUs."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "torch": version("torch"),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
    }


def check_output(parser: argparse.ArgumentParser, path: Path | None) -> None:
    """Ends the command with status 2 if the file cannot be written. Call this before measuring."""
    if path is None:
        return
    try:
        with path.open("ab"):
            pass
    except OSError as error:
        parser.exit(2, f"--output {path} cannot be written ({error.strerror}): give a file in a directory that exists\n")


def record(line: Line, path: Path | None) -> None:
    """Prints one line, and appends it to the file `path`; None for no file."""
    from dni_seq.app.studies.records import append_line

    print(json.dumps(line, ensure_ascii=False), flush=True)
    if path is not None:
        append_line(path, dict(line))


def print_table(parser: argparse.ArgumentParser, path: Path, table: Callable[[Sequence[Line]], str]) -> None:
    """Prints the table of a file's lines; ends the command with status 2 if the file has none of this benchmark."""
    from dni_seq.app.studies.records import read_lines

    try:
        lines = read_lines(path)
    except (OSError, ValueError) as error:
        parser.exit(2, f"--table {path} cannot be read ({error}): give a file that --output has written\n")
    try:
        printed = table(lines) if lines else ""
    except KeyError as error:
        parser.exit(2, f"{path} has a line without {error}: give a file that --output of this benchmark has written\n")
    if not lines:
        parser.exit(2, f"{path} has no lines: measure first, with --output {path}\n")
    print(printed, end="")


def newest(lines: Sequence[Line], *settings: str) -> list[Line]:
    """Returns the last line for each combination of `settings`. After a repeated measurement a file has several lines."""
    return list({tuple(line[name] for name in settings): line for line in lines}.values())
