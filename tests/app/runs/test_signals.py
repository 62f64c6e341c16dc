"""The first signal asks, the second one kills, a terminal that closes never does; Ctrl-C at the start is one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from dni_seq.app.runs.signals import StopSignals, interrupt_exits

HANGUP = signal.SIGHUP


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a process of its own."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_asks_to_stop(number, status):
    before = [signal.getsignal(each) for each in StopSignals.SIGNALS]
    with StopSignals() as stop:
        assert (stop.received, stop.exit_status) == (None, 0)
        os.kill(os.getpid(), number)
        assert (stop.received, stop.exit_status) == (number, status)
        assert signal.getsignal(number) == signal.SIG_DFL
    assert [signal.getsignal(each) for each in StopSignals.SIGNALS] == before


def test_a_second_signal_ends_the_process():
    code = (
        "import os, signal\n"
        "from dni_seq.app.runs.signals import StopSignals\n"
        "with StopSignals():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('once', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('twice', flush=True)\n"
    )
    result = run(code)
    assert result.returncode == -signal.SIGINT
    assert result.stdout == "once\n"


def test_a_terminal_that_closes_asks_to_stop_and_never_kills():
    before = signal.getsignal(HANGUP)
    with StopSignals() as stop:
        for _ in range(3):  # of the shell, of the kernel, of the session's manager
            os.kill(os.getpid(), HANGUP)
        assert (stop.received, stop.exit_status) == (HANGUP, 129)
        os.kill(os.getpid(), signal.SIGTERM)  # the first of these
        assert stop.received == HANGUP
        os.kill(os.getpid(), HANGUP)
    assert signal.getsignal(HANGUP) == before


def test_an_ignored_hangup_stays_ignored():
    """As nohup has it."""
    before = signal.signal(HANGUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), HANGUP)
            assert stop.received is None
    finally:
        signal.signal(HANGUP, before)


def test_an_interrupt_while_a_run_is_prepared_is_one_line():
    """Even where an exception would be lost, such as in a callback."""
    result = run(
        "import os, signal\n"
        "from dni_seq.app.runs.signals import interrupt_exits\n"
        "class Callback:\n"
        "    def __del__(self):\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        sum(range(1000))\n"
        "with interrupt_exits('stopped early'):\n"
        "    Callback()\n"
        "    print('lost')\n"
    )
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "stopped early\n")


def test_after_the_preparation_interrupts_are_as_before():
    before = signal.getsignal(signal.SIGINT)
    with interrupt_exits("stopped early"):
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before
