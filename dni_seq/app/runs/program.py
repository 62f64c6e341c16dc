"""Runs a command as a program: the error handling that every script and `dni-seq` add to a command's `main`."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from dni_seq.app.runs.crash_report import report_crash
from dni_seq.app.runs.loading import loading
from dni_seq.app.runs.output import program_name, tolerant_output
from dni_seq.app.runs.signals import INTERRUPTED


def run_module(name: str, *, result: bool = False) -> int:
    """Imports a command's module and runs its `main` as a program; see `run_program`.

    Args:
        name: the module's dotted name.
        result: whether stdout is the command's result; see `loading`.
    """
    return run_program(lambda: run_main(name, None, result=result))


def run_main(name: str, arguments: Sequence[str] | None, *, result: bool = False) -> int:
    """Imports a command's module, runs its `main` with `arguments`, and returns the exit status."""
    with loading(result=result):
        module = importlib.import_module(name)
    status: int = module.main(arguments)
    return status


def run_program(main: Callable[[], int]) -> int:
    """Runs `main` and returns the exit status of the process.

    Failures of stdout and stderr do not end the program. An unexpected exception prints a traceback and gives status 1.
    Ctrl-C prints one line and gives status 130, unless `main` handles Ctrl-C itself, as the training commands do. Call this
    in the main thread.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # ignored in the background of a shell script
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with tolerant_output():
        try:
            return report_crash(main)
        except KeyboardInterrupt:
            print(f"{program_name()}: stopped by Ctrl-C", file=sys.stderr)
            return INTERRUPTED


def leave(status: int) -> NoReturn:
    """Ends this process with `status`. Skips the interpreter's shutdown if torch.distributed still has a process group.

    The process group still exists after another rank has failed. Threads of the process group may then wait for an answer of
    that rank, and ending these threads at shutdown can abort the process.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # None if the process was started with the stream closed
            stream.flush()
    dist = sys.modules.get("torch.distributed")  # not imported if the command was --help
    if dist is not None and dist.is_available() and dist.is_initialized():
        os._exit(status)
    sys.exit(status)
