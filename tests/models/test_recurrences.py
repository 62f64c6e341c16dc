"""A window as a scan is the window as a loop, in float64."""

from __future__ import annotations

import importlib

import pytest
import torch

from dni_seq.models import recurrences
from tests.paths import ROOT

LANES, UNITS = 3, 4
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def parts(length):
    torch.manual_seed(length)
    real, imaginary = 0.6 * torch.rand(2, UNITS, dtype=torch.float64)
    inputs = torch.randn(length, LANES, 2 * UNITS, dtype=torch.float64)
    return real, imaginary, inputs, torch.randn(LANES, 2 * UNITS, dtype=torch.float64)


@pytest.mark.parametrize("length", [1, 2, 3, 8, 9, 11, 100])
def test_a_scan_is_the_loop(length, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    assert_close(recurrences.rotation_scan(*parts(length)), recurrences.rotation_loop(*parts(length)))
    decay = torch.rand(length, LANES, 2 * UNITS, dtype=torch.float64)
    _, _, inputs, start = parts(length)
    scanned = importlib.import_module("scans").gated_scan(decay, inputs, start)
    assert_close(scanned, recurrences.gated_loop(decay, inputs, start))


@pytest.mark.parametrize("length", [recurrences.SCAN_STEPS, recurrences.SCAN_STEPS + 7])
def test_gradients_of_a_scanned_window_are_those_of_the_loop(length, monkeypatch):
    found = []
    for steps in (recurrences.SCAN_STEPS, length + 1):
        monkeypatch.setattr(recurrences, "SCAN_STEPS", steps)
        leaves = [leaf.requires_grad_() for leaf in parts(length)]
        assert recurrences.scans(leaves[2]) == (steps <= length)
        states = recurrences.rotation(*leaves)
        found.append([states, *torch.autograd.grad((states**3).sum(), leaves)])
    for scan, loop in zip(*found, strict=True):
        assert_close(scan, loop)
        assert not torch.equal(scan, loop), "the two round differently, so both have run"


def test_short_windows_and_large_states_run_as_a_loop():
    steps, numbers = recurrences.SCAN_STEPS, recurrences.SCAN_NUMBERS
    assert recurrences.scans(torch.empty(steps, 2, numbers // 2))
    assert not recurrences.scans(torch.empty(steps - 1, 2, numbers // 2))
    assert not recurrences.scans(torch.empty(steps, 3, numbers // 2))


def assert_close(one, other):
    torch.testing.assert_close(one, other, **EXACT)
