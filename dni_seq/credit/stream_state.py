"""StreamState: the hidden state between two windows, in training and in checkpoints.

Legend: B = lanes of the run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dni_seq.core import states
from dni_seq.core.nonfinite import broken_lanes, nonfinite_lanes
from dni_seq.core.states import State
from dni_seq.core.windows import Nest, first_tensor
from dni_seq.credit.past_inputs import PastInputs, WindowContexts
from dni_seq.credit.past_windows import PastWindows
from dni_seq.credit.replay import RecordedWindow
from dni_seq.credit.synthetic_gradient import SyntheticCredit, without_chain
from dni_seq.credit.window_runner import WindowRunner
from dni_seq.interfaces.exchange import Attached


class StreamState:
    """Holds the hidden state that the next window starts from, and saves and restores it.

    A checkpoint holds a flat list of the state's leaves, and their paths if the state has keys. The nesting is that of the
    model's initial state, which may be known only at the next window. Loaded leaves are kept until the nesting is known.

    An initial state that requires a gradient is learned: in the first window of a sequence, the gradient at the lane's first
    state flows on to the initial state.

    Args:
        runner: knows the initial state and the lanes.
        credit: the trainer's synthetic credit, whose recorded windows start from hidden states too; or None.

    Attributes:
        state: the hidden state with this rank's lanes, None before the first window.
        past: the earlier windows through which the loss of the next window is propagated back.
        inputs: the inputs that led to the state, for a synthesizer that reads the past.
    """

    def __init__(self, runner: WindowRunner, credit: SyntheticCredit | None) -> None:
        self._runner = runner
        self._credit = credit
        self._waiting: dict[str, Any] | None = None
        self._learned: State | None = None
        self._fresh: Tensor | None = None
        self.state: State | None = None
        self.past = PastWindows(runner)
        self.inputs = PastInputs(runner, 0 if credit is None else credit.past_steps)

    def start(self, inputs: Nest) -> State | None:
        """Returns the state that a window starts from, without a graph; restores a loaded state first.

        Raises:
            ValueError: the state has another number of lanes than the inputs.
            TypeError: the state holds something else than tensors.
        """
        first = first_tensor(inputs)
        lanes = first.shape[self._runner.batch_dim]
        if self._waiting is not None:
            self.restore(self._runner.state_template(inputs, lanes), lanes)
        state, self._learned = self.state, None
        if state is None or self._fresh is not None:
            initial = self._runner.initial_state(lanes)
            if initial is not None and needs_gradient(initial):
                self._learned = initial
            if initial is not None:
                initial = states.detach(initial)
            if state is None:
                state = initial
                everywhere = torch.ones(lanes, dtype=torch.bool, device=first.device)
                self._fresh = None if self._learned is None else everywhere
            elif self._fresh is not None:  # the optimizer has changed the initial state since the lanes were reset
                state = states.reset_lanes(state, self._fresh, initial, self._runner.state_batch_dim)
        states.check_leaves(state, "the state that a window starts from")
        if state is not None:
            self._runner.check_lanes(state, lanes)
        return state

    def attach(self, start: State | None, window: RecordedWindow) -> State | None:
        """Returns a window's first state with a graph to a learned initial state, or over earlier windows.

        With a learned initial state, the gradient of lanes that start a sequence flows on to the initial state; the values
        are those of `start`. With `backward_windows` above 1, the earlier windows run again, and the result is the state
        after them. Otherwise the result is `start`.

        Args:
            start: the window's first state, without a graph.
            window: the window.

        Raises:
            ValueError: `backward_windows` is above 1, and the initial state is learned or the window cannot be recorded.
        """
        if self.past.count > 1:
            if self._learned is not None:
                raise ValueError("backward_windows does not work with a learned initial state: remove one of them")
            self.past.check(window)  # it is recorded after the optimizer's step, which cannot be undone
            return self.past.run(start)
        if self._learned is None or self._fresh is None or start is None:
            return start
        dims = states.broadcast_to_leaves(self._runner.state_batch_dim, start, "state_batch_dim")
        learned = states.flatten(states.match_keys(self._learned, start, "the initial state", "the state"))
        leaves = []
        for leaf, initial, dim in zip(states.flatten(start), learned, dims, strict=True):
            if isinstance(initial, Tensor) and initial.requires_grad:
                source = torch.where(states.lane_mask(self._fresh, leaf, dim), initial, leaf.detach())
                leaf = Attached.apply(leaf, source)
            leaves.append(leaf)
        return states.unflatten(start, leaves)

    def if_skipped(self, start: State, passed: Tensor) -> tuple[State, Tensor | None]:
        """Returns what the next window starts from if the device skips this window, as `stay` sets it on the host.

        Args:
            start: this window's first state.
            passed: 0-d bool, false if the window is skipped.

        Returns:
            The state, in which lanes with a NaN or an infinity are reset, and the lanes that start a sequence with the next
            window because this one was skipped, [B] bool or None.
        """
        broken = nonfinite_lanes(start, self._runner.state_batch_dim)
        masks = [mask for mask in (broken, self._fresh) if mask is not None]
        again = torch.stack(masks).any(0) & ~passed if masks else None
        return self._runner.reset(start, broken), again

    def follow(self, around: WindowContexts, state: State | None, passed: Tensor, again: Tensor | None = None) -> None:
        """Sets the state after a window.

        Args:
            around: the window and what is known around it.
            state: the state.
            passed: 0-d bool, false if the window was skipped on the device.
            again: lanes that start a sequence because the window was skipped, from `if_skipped`.
        """
        self.advance(state, around.window.ends, again)
        self.past.add(around.window, passed)
        self.inputs.advance(around, passed)
        self.inputs.forget(again)

    def advance(self, state: State | None, *reset: Tensor | None) -> None:
        """Sets the state that the next window starts from.

        Args:
            state: the state.
            *reset: masks [B] of lanes that start a sequence with the next window. A mask may be None, for no lane.
        """
        self.state = state
        masks = [mask for mask in reset if mask is not None]
        lanes = len(masks[0]) if masks else 0
        if masks and self._learned is None and not needs_gradient(self._runner.initial_state(lanes)):
            masks = []
        self._fresh = torch.stack(masks).any(0) if masks else None

    def replace(self, state: State | None) -> None:
        """Sets the state that the next window starts from to one that does not follow the last window.

        Of a loaded state, the counts and averages of the synthetic credit are kept.
        """
        self.past.clear()
        self.inputs.clear()
        self.advance(state)
        if self._waiting is not None:
            credit = self._waiting["credit"]
            self._waiting = {"state": None, "credit": None if credit is None else without_chain(credit), "fresh": None}
        if self._credit is not None:
            self._credit.break_chain()

    def stay(self, start: State | None, ends: Tensor | None) -> None:
        """Sets the state after a skipped window: its first state, with lanes reset that are not finite or are in `ends`."""
        broken = None
        if start is not None:
            broken = broken_lanes(start, self._runner.state_batch_dim)
            start = self._runner.reset(self._runner.reset(start, broken), ends)
        self.advance(start, ends, broken, self._fresh)
        self.past.clear()
        self.inputs.forget(broken)
        self.inputs.forget(ends)

    def reset(self) -> None:
        """Forgets the state: the next window starts from the initial state and does not continue an earlier window."""
        self.replace(None)

    def state_dict(self) -> dict[str, Any]:
        """Returns the hidden state, the synthetic credit and the recorded windows, of all ranks; a collective call."""
        if self._waiting is not None:
            return self._waiting if self.state is None else {**self._waiting, **self._saved_state()}
        gather = self._runner.parallel.all
        return {
            **self._saved_state(),
            "credit": None if self._credit is None else self._credit.state_dict(),
            "fresh": None if self._fresh is None else gather(self._fresh, 0),
            **({} if self.past.count == 1 else {"past": self.past.state_dict()}),
            **({} if not self.inputs.steps else {"past_inputs": self.inputs.state_dict()}),
        }

    def _saved_state(self) -> dict[str, Any]:
        """Returns the hidden state's leaves, and their paths if it has keys; a collective call."""
        gather, dims = self._runner.parallel.all, self._runner.state_batch_dim
        places = states.key_paths(self.state)
        return {
            "state": None if self.state is None else states.saved_leaves(states.map_lanes(gather, self.state, dims)),
            **({} if places is None else {"state_paths": places}),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Keeps what `state_dict` returned until `restore` or the next window. Older states have no "fresh"."""
        self.state = self._fresh = None
        self.past.clear()
        self.inputs.clear()
        names = ("state", "state_paths", "credit", "fresh", "past", "past_inputs")
        self._waiting = {"fresh": None, **{name: saved[name] for name in names if name in saved}}

    def restore(self, nest: State, lanes: int) -> None:
        """Restores what was loaded, in the nesting and shapes of `nest`, a state of `lanes` lanes.

        Leaves without paths, as older versions saved them, are in the order of `nest`.

        Raises:
            ValueError: the saved state has other keys than `nest`, or a leaf has another shape than its leaf in `nest`.
        """
        if self._waiting is None:
            return
        leaves, own = self._waiting["state"], self._runner.parallel.own
        if leaves is not None:
            state = states.from_saved(leaves, self._waiting.get("state_paths"), nest)
        if nest is not None:
            self._runner.check_lanes(nest, lanes)
        if leaves is not None:
            self._runner.check_saved(state, nest)
        if self._credit is not None:
            self._credit.load_state_dict(self._waiting["credit"], nest)
        if leaves is not None:
            self.state = states.map_lanes(own, state, self._runner.state_batch_dim)
        if "past" in self._waiting:
            self.past.load_state_dict(self._waiting["past"], nest)
        self.inputs.load_state_dict(self._waiting.get("past_inputs"))
        fresh = self._waiting["fresh"]
        self._fresh = None if fresh is None else own(fresh, 0)
        self._waiting = None


def needs_gradient(state: State | None) -> bool:
    """Returns whether a leaf of a state requires a gradient."""
    return state is not None and any(leaf.requires_grad for leaf in states.floating(state))
