"""FidelityProbe: which messages it compares with which windows, and at which windows it is due."""

from __future__ import annotations

import pytest
import torch

import dni_seq as dni
from dni_seq.core import states
from dni_seq.credit.fidelity import fidelity
from dni_seq.credit.fidelity_probe import FidelityProbe
from dni_seq.credit.replay import RecordedWindow
from dni_seq.credit.window_runner import WindowRunner
from dni_seq.synthesizers.base import Recommended
from tests import problems
from tests.training import LANES

T, WINDOWS = 3, 10


@pytest.fixture
def runner() -> WindowRunner:
    return WindowRunner(problems.make_model("gru"), problems.summed, "sum")


def recorded(runner: WindowRunner) -> list[RecordedWindow]:
    """Returns consecutive windows, each with the state that it starts from."""
    state, found = torch.zeros(1, LANES, 5, dtype=torch.float64), []
    for inputs, targets, *_ in problems.cut(problems.tokens(T * WINDOWS, LANES), T):
        found.append(RecordedWindow(inputs, targets, None, None, state, None))
        state = states.detach(runner.run(inputs, state)[1])
    return found


def messages(window: RecordedWindow) -> list[torch.Tensor]:
    """Returns one message, which differs from state to state."""
    return [0.1 * window.start]


def probe_of(runner: WindowRunner, **settings: int) -> FidelityProbe:
    return FidelityProbe(runner, dni.SyntheticGradientConfig(discount=0.8, **settings).resolve(Recommended()))


def test_messages_are_those_of_the_first_recorded_window(runner):
    """Comparisons begin at windows 2 and 6. At window 4 the first one still waits, so its messages must stay."""
    windows = recorded(runner)
    probe = probe_of(runner, fidelity_every=2, replay_windows=4)
    measured = {}
    for step, window in enumerate(windows, start=1):
        found = probe.measure(window, step, lambda window=window: messages(window), bootstrapped=True)
        if found is not None:
            measured[step] = found
    assert list(measured) == [5, 9]
    for last, found in measured.items():
        span = windows[last - 4 : last]
        assert found == fidelity(runner, span, messages(span[0]), 0.8, bootstrapped=True)


@pytest.mark.parametrize(("every", "count"), [(3, 2), (1, 3), (2, 1), (0, 2)])
def test_it_is_due_exactly_at_the_windows_that_it_records(runner, every, count):
    """The trainer relies on `due`: it keeps what undoes a failed replay only for windows that are due."""
    probe = probe_of(runner, fidelity_every=every, replay_windows=count)
    for step, window in enumerate(recorded(runner), start=1):
        due = probe.due(step)
        before = len(probe.state_dict()["probe_windows"])
        found = probe.measure(window, step, lambda window=window: messages(window), bootstrapped=True)
        acted = found is not None or len(probe.state_dict()["probe_windows"]) > before
        assert due == acted, step
