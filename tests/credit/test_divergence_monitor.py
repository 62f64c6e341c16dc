"""DivergenceMonitor: counts rejected windows, reads a GPU's counts now and then, and disables the synthesizer."""

from __future__ import annotations

import torch

from dni_seq.core import nonfinite
from dni_seq.credit.divergence_monitor import BAD_WINDOWS, READ_EVERY, RESETS, DivergenceMonitor

GOOD, BAD = torch.tensor(True), torch.tensor(False)


def test_a_divergence_is_three_rejected_windows_in_a_row():
    monitor = DivergenceMonitor()
    windows = [BAD] * (BAD_WINDOWS - 1) + [GOOD] + [BAD] * BAD_WINDOWS
    found = [monitor.diverged(valid, step) for step, valid in enumerate(windows, start=1)]
    assert found == [False] * (len(windows) - 1) + [True]
    assert monitor.total == 2 * BAD_WINDOWS - 1


def test_gpu_counts_are_read_every_twenty_windows(monkeypatch):
    """A divergence is noticed at the next read, however long ago it began."""
    monkeypatch.setattr(nonfinite, "readable_without_sync", lambda flag: False)
    monitor = DivergenceMonitor()
    found = [step for step in range(1, 2 * READ_EVERY + 1) if monitor.diverged(BAD, step)]
    assert found == [READ_EVERY, 2 * READ_EVERY]
    assert monitor.take_events(READ_EVERY)[0].endswith(f"({READ_EVERY} in a row)")


def test_a_disabled_monitor_counts_nothing():
    monitor = DivergenceMonitor()
    for _ in range(RESETS + 1):
        assert not monitor.disabled
        monitor.count_reset()
    assert (monitor.disabled, monitor.resets) == (True, RESETS)
    assert monitor.take_events(1)[-1] == "step 1: the synthesizer has diverged and was disabled"
    assert not any(monitor.diverged(BAD, step) for step in range(1, 2 * BAD_WINDOWS))
    assert monitor.total == 0
    assert monitor.take_events(2) == ()
