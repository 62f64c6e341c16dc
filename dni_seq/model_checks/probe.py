"""Probe: runs a model on copies of inputs and state, each time from the same random state.

Legend: T = window length in steps, B = lanes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dni_seq.core import states
from dni_seq.core.snapshot import RNGState, buffers_apart
from dni_seq.core.states import State
from dni_seq.model_checks.nests import in_order_of, named, paths

LONGEST_ERROR = 200
"""Number of characters after which the text of a model's exception is cut."""


class ModelError(Exception):
    """The model raised an exception (the `__cause__`), or returned something else than (outputs, state)."""


class Run(NamedTuple):
    """The outputs and the last state of one run."""

    outputs: Any
    last: State


class Probe:
    """Runs a model on copies of inputs and state, so that no tensor of the caller is written to.

    Every run starts from the random state and the buffers of the moment when the probe is made. The keys of dicts in a
    last state are brought to the order of the first state.

    Args:
        model: `model(inputs, state) -> (outputs, state)`.
        device: the device of the inputs.
        batch_dim: the dimension of the lanes in the inputs.

    Attributes:
        reordered: whether a last state had its keys in another order than its first state.
    """

    def __init__(self, model: nn.Module, device: torch.device, batch_dim: int) -> None:
        self.model = model
        self.device = device
        self.batch_dim = batch_dim
        self.reordered = False
        self._randomness = RNGState.now(device)

    def run(self, inputs: Any, state: State | None, *, same_random_state: bool = True) -> Run:
        """Runs the model without a graph.

        Args:
            inputs: a tensor or a nest of tensors, [T, B, ...].
            state: the first state, or None.
            same_random_state: False to draw random numbers that differ from those of the run before.

        Raises:
            ModelError: the model raised an exception, or returned something else than (outputs, state).
        """
        if same_random_state:
            self._randomness.restore()
        with torch.no_grad(), buffers_apart(self.model):
            return Run(*states.detach_clone(tuple(self._call(states.clone(inputs), states.clone(state)))))

    def written(self, inputs: Any, state: State) -> tuple[bool, list[bool]]:
        """Returns whether the model writes into its inputs in place, and into which leaves of its state."""
        self._randomness.restore()
        own_inputs, own_state = states.clone(inputs), states.clone(state)
        with torch.no_grad(), buffers_apart(self.model):
            self._call(own_inputs, own_state)
        return any(_was_written(leaf) for leaf in states.flatten(own_inputs)), [
            _was_written(leaf) for leaf in states.flatten(own_state)
        ]

    def gradients(
        self, inputs: Any, state: State, source: Callable[[Run], Sequence[Tensor]], parameters: Sequence[nn.Parameter] = ()
    ) -> list[Tensor | None] | None:
        """Backpropagates random gradients from tensors of one run.

        Args:
            inputs: a tensor or a nest of tensors, [T, B, ...].
            state: the first state.
            source: returns the tensors of a run to backpropagate from; tensors without a graph are skipped.
            parameters: parameters whose gradients are returned too.

        Returns:
            A list with the gradients of the first state's floating-point leaves and of `parameters`. An entry is None if no
            gradient reaches the leaf or the parameter. None instead of the list if no tensor of `source` has a graph.

        Raises:
            ModelError: the model or its backward pass raised an exception.
        """
        self._randomness.restore()
        first = states.map_floating(lambda leaf: leaf.detach().clone().requires_grad_(), state)
        with torch.enable_grad(), buffers_apart(self.model):
            # A fresh graph for each backward pass: a compiled model cannot keep its graph for a second pass.
            found = Run(*self._call(states.clone(inputs), states.clone(first)))
            tensors = [tensor for tensor in source(found) if tensor.requires_grad]
            if not tensors:
                return None
            wanted = [*states.floating(first), *parameters]
            try:
                return list(torch.autograd.grad(tensors, wanted, [noise_like(each) for each in tensors], allow_unused=True))
            except Exception as error:
                raise ModelError(f"the backward pass raised {first_line(error)}") from error

    def steps(self, inputs: Any, start: int, stop: int) -> Any:
        """Returns the steps `start:stop` of the inputs."""
        return states.map_lanes(lambda leaf, _: leaf[start:stop], inputs, 0)

    def lanes(self, inputs: Any, count: int) -> Any:
        """Returns the first `count` lanes of the inputs."""
        return states.map_lanes(lambda leaf, _: leaf.narrow(self.batch_dim, 0, count), inputs, 0)

    def _call(self, inputs: Any, state: State | None) -> tuple[Any, State]:
        try:
            result = self.model(inputs, state)
        except Exception as error:
            raise ModelError(f"model(inputs, state) raised {first_line(error)}") from error
        if not isinstance(result, (tuple, list)) or len(result) != 2:
            kind = type(result).__name__
            size = f" of {len(result)}" if isinstance(result, (tuple, list)) else ""
            raise ModelError(f"model(inputs, state) returned a {kind}{size}: return the pair (outputs, state)")
        if state is None:
            return result[0], result[1]
        last = in_order_of(result[1], state)
        self.reordered = self.reordered or paths(last) != paths(result[1])
        return result[0], last


def set_to_eval(model: nn.Module) -> None:
    """Sets the model to eval mode, except recurrent layers of PyTorch: they lose their dropout instead.

    cuDNN computes the gradients of recurrent layers in train mode only. For these layers, train mode changes nothing but
    dropout.
    """
    model.eval()
    for part in model.modules():
        if isinstance(part, nn.RNNBase):
            part.training = True
            part.dropout = 0.0


def noise_like(tensor: Tensor) -> Tensor:
    """Returns normal random numbers in the shape of `tensor`, always the same numbers for a shape."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype).to(tensor.device)


def first_line(error: BaseException) -> str:
    """Returns an exception's type and the first line of its message."""
    text = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0].rstrip(": ")
    return text if len(text) <= LONGEST_ERROR else text[: LONGEST_ERROR - 3] + "..."


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Returns the largest difference, relative to the largest absolute value of `expected`.

    The result is 0 for equal tensors, where a NaN counts as equal to a NaN. It is infinity if the shapes or the dtypes
    differ, if integers differ, or if only one of two elements is a NaN.
    """
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return float("inf")
    if bool(((found == expected) | (found.isnan() & expected.isnan())).all()):
        return 0.0
    if not (found.is_floating_point() or found.is_complex()):
        return float("inf")
    gap = (found - expected).abs().max().double() / expected.abs().max().double()
    return float("inf") if gap.isnan() else float(gap)


def tolerance(run: Run, device: torch.device) -> float:
    """Returns the largest relative difference that rounding explains, for the least precise dtype in a run."""
    dtypes = [leaf.dtype for leaf in states.floating((run.outputs, run.last))]
    if torch.is_autocast_enabled(device.type):
        dtypes.append(torch.get_autocast_dtype(device.type))
    return max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0) ** 0.6


def _was_written(leaf: Any) -> bool:
    """Returns whether a tensor was written to since `clone` made it; each write in place increases its version."""
    return isinstance(leaf, Tensor) and leaf._version > 0


def differences(found: Any, expected: Any, name: str) -> dict[str, float]:
    """Returns the relative difference of each tensor in two nests, by path. If the paths differ, one infinity."""
    one, other = named(found, name), named(expected, name)
    if one.keys() != other.keys():
        return {name: float("inf")}
    return {
        path: relative_difference(leaf, other[path])
        for path, leaf in one.items()
        if isinstance(leaf, Tensor) and isinstance(other[path], Tensor)
    }
