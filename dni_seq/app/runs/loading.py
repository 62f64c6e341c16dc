"""Prints a line before PyTorch is imported, because the import takes seconds."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from dni_seq.app.runs.output import program_name
from dni_seq.app.runs.signals import interrupt_exits

QUICK = frozenset({"-h", "--help", "--help-all"})
"""Options that end a command before it uses PyTorch."""


@contextmanager
def loading(*, result: bool = False) -> Iterator[None]:
    """Context for the imports of a command. Prints one line if PyTorch is not imported yet, on the first rank only.

    Ctrl-C inside the context ends the process with one line and status 130.

    Args:
        result: whether stdout is the command's result. The line is then printed on stderr, and only if stderr is a
            terminal.
    """
    if "torch" in sys.modules:
        yield
        return
    stream = sys.stderr if result else sys.stdout
    if (not result or stream.isatty()) and os.environ.get("RANK", "0") == "0" and not QUICK & {*sys.argv[1:]}:
        print(f"{program_name()}: loading PyTorch ...", file=stream, flush=True)
    with interrupt_exits(f"{program_name()}: stopped by Ctrl-C"):
        yield
