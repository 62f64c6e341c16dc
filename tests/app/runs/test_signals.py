"""The first signal asks, the second one kills."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from dni_seq.app.runs.signals import StopSignals


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
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == -signal.SIGINT
    assert result.stdout == "once\n"
