"""StreamState: the hidden state between two windows, in training and in checkpoints.

Legend: B = lanes of the run.
"""

from __future__ import annotations

from typing import Any

from dni_seq.core import states
from dni_seq.core.states import State
from dni_seq.core.windows import Nest, first_tensor
from dni_seq.credit.synthetic_gradient import SyntheticCredit, without_chain
from dni_seq.credit.window_runner import WindowRunner


class StreamState:
    """Holds the hidden state that the next window starts from, and what a checkpoint holds of it.

    A checkpoint has flat leaves, and their paths if the state has keys. Their nesting is that of the model's initial state,
    which may be known only at the next window; until then the loaded leaves wait.

    Args:
        runner: knows the initial state and the lanes.
        credit: the trainer's synthetic credit, whose recorded windows start from hidden states too; or None.

    Attributes:
        state: the hidden state with this rank's lanes, None before the first window.
    """

    def __init__(self, runner: WindowRunner, credit: SyntheticCredit | None) -> None:
        self._runner = runner
        self._credit = credit
        self._waiting: dict[str, Any] | None = None
        self.state: State | None = None

    def start(self, inputs: Nest) -> State | None:
        """Returns the state that a window with these inputs starts from; restores a loaded state first.

        Raises:
            TypeError: the state holds something else than tensors.
        """
        lanes = first_tensor(inputs).shape[self._runner.batch_dim]
        if self._waiting is not None:
            self.restore(self._runner.state_template(inputs, lanes))
        state = self._runner.initial_state(lanes) if self.state is None else self.state
        states.check_leaves(state, "the state that a window starts from")
        return state

    def reset(self) -> None:
        """Forgets the state: the next window starts from the initial state and does not continue an earlier window."""
        self.state = None
        if self._waiting is not None:
            credit = self._waiting["credit"]
            self._waiting = {"state": None, "credit": None if credit is None else without_chain(credit)}
        if self._credit is not None:
            self._credit.break_chain()

    def state_dict(self) -> dict[str, Any]:
        """Returns the state's leaves and the synthetic credit, with the lanes of all ranks; a collective call."""
        if self._waiting is not None:
            return self._waiting
        gather, dims = self._runner.parallel.all, self._runner.state_batch_dim
        places = states.key_paths(self.state)
        return {
            "state": None if self.state is None else states.flatten(states.map_lanes(gather, self.state, dims)),
            **({} if places is None else {"state_paths": places}),
            "credit": None if self._credit is None else self._credit.state_dict(),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Keeps what `state_dict` returned until `restore` or the next window."""
        self.state = None
        self._waiting = {name: saved[name] for name in ("state", "state_paths", "credit") if name in saved}

    def restore(self, nest: State) -> None:
        """Restores what was loaded, in the nesting and shapes of `nest`.

        Leaves without paths, as older versions saved them, are in the order of `nest`.

        Raises:
            ValueError: the saved state has other keys than `nest`, or a leaf has another shape than its leaf in `nest`.
        """
        if self._waiting is None:
            return
        leaves = self._waiting["state"]
        if leaves is not None:
            state = states.from_saved(leaves, self._waiting.get("state_paths"), nest)
            self._runner.check_saved(state, nest)
        if self._credit is not None:
            self._credit.load_state_dict(self._waiting["credit"], nest)
        if leaves is not None:
            self.state = states.map_lanes(self._runner.parallel.own, state, self._runner.state_batch_dim)
        self._waiting = None
