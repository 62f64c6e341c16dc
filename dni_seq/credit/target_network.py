"""TargetNetwork: a frozen copy of a synthesizer that supplies the messages in its targets."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from dni_seq.core.snapshot import Restorable, TrainingSnapshot


class TargetNetwork(Restorable):
    """Copies a synthesizer every `every` windows.

    Source: Mnih et al. 2015, "Human-level control through deep reinforcement learning", Nature 518, Methods: targets that
    bootstrap are computed by a copy that changes seldom.

    Args:
        synthesizer: the module to copy.
        every: number of windows between two copies.
        model: the RNN, which a synthesizer may hold and which is never copied.

    Attributes:
        module: the copy.
    """

    UNCHANGING = (TrainingSnapshot,)

    def __init__(self, synthesizer: nn.Module, every: int, model: nn.Module) -> None:
        self.module = copy.deepcopy(synthesizer, {id(model): model})
        self._synthesizer = synthesizer
        self._every = every
        self._before: TrainingSnapshot | None = None

    def update(self, steps: int) -> None:
        """Copies the synthesizer if a copy is due after window number `steps`, counted from 1."""
        if steps % self._every == 0:
            self.copy()

    def copy(self) -> None:
        """Copies the synthesizer."""
        if self._before is None:  # only for a step that changes the copy; most steps do not
            self._before = TrainingSnapshot([self.module], [])
        self.module.load_state_dict(self._synthesizer.state_dict())

    def snapshot(self) -> dict[str, Any]:
        """Returns what `restore` needs. The module's tensors are copied later, by the step that overwrites them."""
        self._before = None
        return super().snapshot()

    def restore(self, kept: dict[str, Any]) -> None:
        """Restores what `snapshot` returned, and the module's tensors."""
        if self._before is not None:
            self._before.restore()
        super().restore(kept)

    def state_dict(self) -> dict[str, Any]:
        """Returns the copy's state."""
        return self.module.state_dict()

    def load_state_dict(self, saved: dict[str, Any] | None) -> None:
        """Restores what `state_dict` returned; None, if no target network was saved, copies the synthesizer."""
        self.module.load_state_dict(saved or self._synthesizer.state_dict())
