"""bind and StepWeight: at its first window, a trainer tells its synthesizer the window length, the reduction and the lanes.

Legend: T = window length in steps, B = lanes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from dni_seq.core import states
from dni_seq.core.states import State
from dni_seq.core.windows import REDUCTIONS, Reduction, step_weight


def bind(synthesizer: nn.Module, *, window: int, reduction: Reduction | None, state_batch_dim: Any, state: State) -> None:
    """Tells a synthesizer the settings of its trainer; the trainer calls this at its first window.

    Args:
        synthesizer: the module. The method `bind` of this module and of each submodule is called, if the module has one.
        window: T, the length of the trainer's windows.
        reduction: the trainer's reduction; None if its loss_fn returns a scalar, so that the trainer reduces nothing.
        state_batch_dim: dimension of the lanes in the state's leaves, an int or a nest.
        state: a state of the model.

    Raises:
        ValueError: a part was built for another window length, reduction, dimension or state.
    """
    for part in synthesizer.modules():
        own: Callable[..., None] | None = getattr(part, "bind", None)
        if own is not None:
            own(window=window, reduction=reduction, state_batch_dim=state_batch_dim, state=state)


def bind_first(
    synthesizers: Iterable[nn.Module],
    saved: int | None,
    *,
    window: int,
    reduction: Reduction | None,
    state_batch_dim: Any,
    state: State,
) -> int:
    """Calls `bind` for all synthesizers at a trainer's first window, of `window` steps; returns the T that they got.

    A resumed run may begin with the last window of a sequence, which may be shorter than T. If there is a T in the
    checkpoint, `saved`, it is therefore passed on. If a synthesizer was built for another length and rejects
    `saved`, `window` is passed on.

    Raises:
        ValueError: a synthesizer was built for another window length, reduction, dimension or state.
    """
    everything = list(synthesizers)

    def tell(length: int) -> int:
        for each in everything:
            bind(each, window=length, reduction=reduction, state_batch_dim=state_batch_dim, state=state)
        return length

    if saved is None:
        return tell(window)
    try:
        return tell(saved)
    except ValueError:
        return tell(window)


def check_dtype(synthesizer: nn.Module, state: State) -> None:
    """Raises a ValueError if a synthesizer's parameters have another dtype than a state.

    A state in half precision counts as float32, because interfaces convert it to float32.
    """
    wanted = {states.to_float32(leaf).dtype for leaf in states.floating(state)}
    found = {parameter.dtype for parameter in synthesizer.parameters() if parameter.is_floating_point()}
    if len(wanted) == 1 and not found <= wanted:
        (dtype,) = wanted
        raise ValueError(
            f"the synthesizer's parameters are {found.pop()}, the model's state is {dtype}: call synthesizer.to({dtype})"
        )


@contextmanager
def several_states(synthesizer: nn.Module, count: int) -> Iterator[None]:
    """In the block, a synthesizer gets `count` joined states of each of the trainer's lanes, as `count` lanes.

    `StepWeight` then divides the number of lanes by `count`.
    """
    found: list[Any] = [getattr(part, "step_weight", None) for part in synthesizer.modules()]
    weights = [weight for weight in found if isinstance(weight, StepWeight)]
    for weight in weights:
        weight.states = count
    try:
        yield
    finally:
        for weight in weights:
            weight.states = 1


class StepWeight:
    """The weight of one step of one lane in the trainer's loss, such as 1 / (T B) for "mean".

    Args:
        owner: name of the synthesizer, for messages.
        window: T, or None to take it from the trainer.
        reduction: the trainer's reduction, or None to take it from the trainer ("mean" if there is none).

    Attributes:
        window: T, None while it is unknown.
        reduction: the reduction.
        states: number of states of each lane that are predicted together; see `several_states`.

    Raises:
        ValueError: `window` is not positive, or the reduction is unknown.
    """

    def __init__(self, owner: str, window: int | None, reduction: Reduction | None) -> None:
        if window is not None and window < 1:
            raise ValueError(f"{owner}: window must be positive, got {window}")
        if reduction is not None and reduction not in REDUCTIONS:
            raise ValueError(f"{owner}: reduction must be one of {REDUCTIONS}, got {reduction!r}")
        self._owner = owner
        self._given = (window, reduction)
        self.window = window
        self.reduction: Reduction = "mean" if reduction is None else reduction
        self.states = 1

    def bind(self, window: int, reduction: Reduction | None) -> None:
        """Takes over the trainer's window length, and its reduction unless that is None.

        Raises:
            ValueError: another reduction, or with "mean" another window length, was given at construction.
        """
        own_window, own_reduction = self._given
        if reduction is not None:
            self._check("reduction", own_reduction, reduction)
            self.reduction = reduction
        if self.reduction == "mean":
            self._check("window", own_window, window)
        self.window = window

    def _check(self, name: str, given: Any, found: Any) -> None:
        if given is not None and given != found:
            raise ValueError(
                f"{self._owner} was built with {name}={given!r}, but the trainer's {name} is {found!r}: build it for "
                f"that, or leave {name} out to take it from the trainer"
            )

    def __call__(self, lanes: int) -> float:
        """Returns the weight of one step of one lane, if there are `lanes` lanes.

        Raises:
            ValueError: the window length is needed, and neither given nor known from a trainer.
        """
        if self.window is None and self.reduction == "mean":
            raise ValueError(f"{self._owner} does not know the window length: pass window=, or use it in a SequenceTrainer")
        return step_weight(self.reduction, self.window or 1, lanes // self.states)
