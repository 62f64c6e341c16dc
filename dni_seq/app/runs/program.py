"""Runs a command as a program: what every script and `dni-seq` do around a command's `main`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

from dni_seq.app.runs.crash_report import report_crash
from dni_seq.app.runs.output import program_name, tolerant_output
from dni_seq.app.runs.signals import INTERRUPTED


def run_program(main: Callable[[], int]) -> int:
    """Runs `main` and returns the exit status of the process.

    Failures of stdout and stderr do not end the program. An unexpected exception gives a traceback and status 1. Ctrl-C
    gives one line and status 130, unless `main` handles it as training does. Call this in the main thread.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # ignored in the background of a shell script
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with tolerant_output():
        try:
            return report_crash(main)
        except KeyboardInterrupt:
            print(f"{program_name()}: stopped by Ctrl-C", file=sys.stderr)
            return INTERRUPTED
