"""ParameterProbe: every n windows, compares the parameters' gradient of a run with that of full BPTT, on a few windows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dni_seq.core import states
from dni_seq.core.nonfinite import NonFiniteError
from dni_seq.core.windows import Lookahead, Window, first_tensor
from dni_seq.parameter_fidelity import gradient_fidelity
from dni_seq.trainer import SequenceTrainer

KEY = "fidelity/parameters_cosine"

LEAST_WINDOWS, LEAST_STEPS = 8, 40
"""A comparison covers at least 8 windows and at least 40 steps, because full BPTT sends credit across windows."""


class ParameterProbe:
    """Every n windows, records the next windows and compares the trainer's gradient on them with that of full BPTT.

    A comparison costs about twice the training on the recorded windows. It changes nothing in the trainer. In a run of
    several ranks no comparisons are made.

    Args:
        trainer: the trainer.
        every: n, 0 for no comparisons.
    """

    def __init__(self, trainer: SequenceTrainer, every: int) -> None:
        self._trainer = trainer
        self._every = every if trainer.parallel.size == 1 else 0
        self._start: Any = None
        self._windows: list[Window] = []

    @property
    def active(self) -> bool:
        """Whether the probe makes comparisons."""
        return self._every > 0

    def observe(self, window: Window) -> dict[str, Tensor]:
        """Records a window if a comparison needs it. Returns the cosine by TensorBoard key if the window completes one.

        Args:
            window: the next window that the trainer will train on.

        Returns:
            The cosine of the two gradients; empty if no comparison is complete, or if too many of its windows are skipped.
        """
        trainer = self._trainer
        if not self._every or (not self._windows and (trainer.steps + 1) % self._every):
            return {}
        if not self._windows:
            self._start = states.clone(trainer.state)
        self._windows.append(states.clone(window))
        steps = len(first_tensor(window.inputs))
        if len(self._windows) < max(LEAST_WINDOWS, math.ceil(LEAST_STEPS / steps)):
            return {}
        windows, start = self._windows, self._start
        self._windows, self._start = [], None
        try:
            found = gradient_fidelity(trainer, windows, start)
        except NonFiniteError:  # too many of the windows are skipped; the trainer reports this itself
            return {}
        return {KEY: torch.tensor(found.cosine)}

    def state_dict(self) -> dict[str, Any]:
        """Returns the recorded windows of an unfinished comparison, and the model's state before the first of them."""
        windows = [
            {**window._asdict(), "lookahead": None if window.lookahead is None else list(window.lookahead)}
            for window in self._windows
        ]
        start = self._start
        return {"windows": windows, "start": states.saved_leaves(start), "paths": states.key_paths(start)}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned. Restore the hidden state of the trainer before."""
        self._windows = [
            Window(**{**window, "lookahead": None if window["lookahead"] is None else Lookahead(*window["lookahead"])})
            for window in saved["windows"]
        ]
        self._start = None
        if self._windows:
            self._start = states.from_saved(saved["start"], saved["paths"], self._trainer.state)
