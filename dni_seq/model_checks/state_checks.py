"""Checks of shapes and nesting: the outputs, the state, and the dimension of the lanes in each leaf of the state.

Legend: T = window length in steps, B = lanes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from dni_seq.core import states
from dni_seq.core.nonfinite import first_nonfinite
from dni_seq.core.states import State
from dni_seq.model_checks.nests import describe, describe_nest, difference, named
from dni_seq.model_checks.probe import ModelError, Probe, Run, differences, tolerance
from dni_seq.model_checks.report import Check, judged, listed

MOST_STEPS = 16
"""Largest number of steps of the window on which values and gradients are compared; rounding errors grow with the steps."""

MOST_GUESSES = 64
"""Largest number of combinations of lane dimensions that are tried."""


class Sample(NamedTuple):
    """The window that values and gradients are compared on.

    Attributes:
        inputs: [T, B, ...], a tensor or a nest of tensors.
        state: the first state.
        steps: T.
        lanes: B.
    """

    inputs: Any
    state: State
    steps: int
    lanes: int


def sample_of(probe: Probe, inputs: Any, state: State, steps: int, lanes: int) -> Sample:
    """Returns a short window from the start of `inputs`, if possible with T != B, so that shapes cannot be confused."""
    short = min(steps, MOST_STEPS)
    if short == lanes and short > 2:
        short -= 1
    return Sample(probe.steps(inputs, 0, short), state, short, lanes)


def batch_first_modules(model: nn.Module) -> str:
    """Returns a text that names the modules with batch_first=True, empty if there are none."""
    found = [
        f"{name!r}" if name else "the model" for name, part in model.named_modules() if getattr(part, "batch_first", False)
    ]
    return f" ({listed(found)}: batch_first=True, but windows are time-major)" if found else ""


def check_outputs(model: nn.Module, runs: list[tuple[Run, int]], lanes: int, batch_dim: int) -> Check:
    """Checks that outputs are time-major, [T, B, ...].

    Args:
        model: the model, for a hint at modules with batch_first=True.
        runs: the runs, each with its number of steps T.
        lanes: B.
        batch_dim: the dimension of the lanes in the inputs. The lanes of the outputs are checked only if it is 1.
    """
    outputs = runs[0][0].outputs
    if not isinstance(outputs, Tensor):
        return Check("outputs", "note", f"outputs are {describe_nest(outputs)}: shapes are checked only for a single tensor")
    for run, steps in runs:
        wrong = _wrong_shape(list(run.outputs.shape), steps, lanes, batch_dim)
        if wrong:
            return Check("outputs", "problem", wrong + batch_first_modules(model))
    return Check("outputs", "ok", f"{describe(outputs)}, time-major")


def _wrong_shape(shape: list[int], steps: int, lanes: int, batch_dim: int) -> str | None:
    """Returns what is wrong with the outputs' shape and what to do, or None."""
    expected = [steps, lanes] if batch_dim == 1 else [steps]
    if shape[: len(expected)] == expected:
        return None
    got = f"outputs have shape {shape} for inputs of T={steps} steps and B={lanes} lanes"
    if shape[:2] == [lanes, steps]:
        return f"{got}: they are batch-major, return them as [T, B, ...]"
    if shape[:1] == [steps * lanes]:
        return f"{got}: time and lanes are flattened, return them as [T, B, ...]"
    if shape[1:2] == [lanes]:
        return f"{got}: return one output for each of the T steps"
    if shape[:1] == [lanes]:
        return f"{got}: the time dimension is missing, return the outputs of all T steps as [T, B, ...]"
    return f"{got}: return them as [T, B, ...]"


def check_finite(inputs: Any, first: State, run: Run) -> Check:
    """Checks that the outputs and the last state hold no NaN and no infinity."""
    order = [("inputs", inputs), ("the first state", first), ("the outputs", run.outputs), ("the last state", run.last)]
    if first_nonfinite(order[2:])[0] == 2:
        return Check("finite values", "ok", "outputs and last state are finite")
    place, where = first_nonfinite(order)
    return Check("finite values", "problem", f"NaN or infinity in {where}" + (": pass finite ones" if place < 2 else ""))


def check_state(first: State | None, last: State, after: State, *, reordered: bool) -> tuple[Check, bool]:
    """Checks the kinds of the state's leaves, and that states keep their nesting, shapes and dtypes from window to window.

    Args:
        first: the first state, None if the model chose it itself.
        last: the state after one window.
        after: the state after a second window that started from `last`.
        reordered: whether dicts of the last state had their keys in another order than dicts of the first state.

    Returns:
        The check, and whether the leaves of all states can be compared.
    """
    problems, notes = _leaf_kinds(last)
    for before, behind in [(last, after)] if first is None else [(first, last), (last, after)]:
        differs, comparable = difference(before, behind)
        if differs:
            problems.insert(0, f"{differs}: return a state like the one that was passed in")
        if not comparable:
            return judged("state", problems, notes, ""), False
    if reordered:
        notes.append("the keys of its dicts come in another order in the last state")
    fine = describe_nest(last)
    check = judged("state", problems, [fine, *notes] if notes and not problems else notes, fine)
    return check, bool(states.floating(last))


def _leaf_kinds(state: State) -> tuple[list[str], list[str]]:
    """Returns problems and notes about leaves that are not floating-point tensors."""
    problems, notes = [], []
    for path, leaf in named(state).items():
        if states.is_floating(leaf):
            continue
        if isinstance(leaf, Tensor) and leaf.is_complex():
            problems.append(f"{path} is complex, and only floating-point leaves receive gradients: use torch.view_as_real")
        elif isinstance(leaf, Tensor):
            notes.append(f"{path} ({describe(leaf)}) is not floating-point: it is carried without gradients")
        elif isinstance(leaf, (int, float, str, type(None))):
            notes.append(f"{path} is {describe(leaf)}, not a tensor: it is carried as it is and has no lanes")
        else:
            problems.append(f"{path} is {describe(leaf)}: use tensors in tuples, lists and dicts")
    if not states.floating(state):
        problems.append("the state holds no floating-point tensor, so no gradient can pass from window to window")
    return problems, notes


def check_lanes(probe: Probe, sample: Sample, base: Run) -> tuple[Check, list[int | None]]:
    """Finds the dimension of the lanes in each leaf, by a run with one lane less.

    Returns:
        The check, and the lane dimension of each leaf, None for a leaf without lanes.
    """
    leaves = named(sample.state)
    unknown: list[int | None] = [None] * len(leaves)
    candidates = [_dims_of_size(leaf, sample.lanes) for leaf in leaves.values()]
    lost = [
        path for (path, leaf), dims in zip(leaves.items(), candidates, strict=True) if states.is_floating(leaf) and not dims
    ]
    if lost:
        shapes = listed([f"{path} {list(leaves[path].shape)}" for path in lost])
        hint = batch_first_modules(probe.model)
        text = f"no dimension has the size of the B={sample.lanes} lanes in {shapes}{hint}: hold values for each lane"
        return Check("lanes", "problem", text), unknown
    error: ModelError | None = None
    mixing: list[int | None] | None = None
    for dims in itertools.islice(_guesses(candidates), MOST_GUESSES):
        try:
            agrees = _fits(probe, sample, base, list(dims))
        except ModelError as raised:
            error = error or raised
            continue
        if agrees:
            return _lanes_found(sample.state, list(dims), mixes=False), list(dims)
        if agrees is not None:
            mixing = mixing or list(dims)
    if mixing is not None:
        return _lanes_found(sample.state, mixing, mixes=True), mixing
    reason = str(error) if error is not None else "the last state does not have the lanes of the first"
    text = f"with B={sample.lanes - 1} lanes instead of {sample.lanes}: {reason}{batch_first_modules(probe.model)}"
    return Check("lanes", "problem", text, None if error is None else error.__cause__), unknown


def _guesses(candidates: list[list[int | None]]) -> Iterator[tuple[int | None, ...]]:
    """Yields combinations of one lane dimension for each leaf, first those in which as many leaves as possible agree."""
    for dim in sorted({dim for dims in candidates for dim in dims if dim is not None}):
        yield tuple(dim if dim in dims else (dims or [None])[0] for dims in candidates)
    yield from itertools.product(*(dims or [None] for dims in candidates))


def _dims_of_size(leaf: Any, lanes: int) -> list[int | None]:
    if not isinstance(leaf, Tensor):
        return []
    return [dim for dim, size in enumerate(leaf.shape) if size == lanes]


def _fits(probe: Probe, sample: Sample, base: Run, dims: list[int | None]) -> bool | None:
    """Runs all lanes but the last one, with the lanes along `dims`.

    Returns:
        None if the last state has other shapes than the same lanes of the full run `base`. Otherwise whether the values of
        the last state agree with those of the full run.
    """

    def fewer(state: State) -> State:
        leaves = zip(states.flatten(state), dims, strict=True)
        return states.unflatten(
            state, [leaf if dim is None else leaf.narrow(dim, 0, sample.lanes - 1) for leaf, dim in leaves]
        )

    found = probe.run(probe.lanes(sample.inputs, sample.lanes - 1), fewer(sample.state))
    gaps = differences(found.last, fewer(base.last), "state")
    if any(gap == float("inf") for gap in gaps.values()):
        same = difference(found.last, fewer(base.last))[1]
        return False if same else None
    return max(gaps.values(), default=0.0) <= tolerance(base, probe.device)


def _lanes_found(state: State, dims: list[int | None], *, mixes: bool) -> Check:
    notes = []
    leaves = named(state)
    bare = [path for (path, leaf), dim in zip(leaves.items(), dims, strict=True) if isinstance(leaf, Tensor) and dim is None]
    if bare:
        notes.append(f"{listed(bare)} has no lanes, so ends= cannot reset it: hold one value for each lane, [B]")
    if mixes:
        notes.append("the state of a lane depends on the other lanes of the batch")
    setting = f"state_batch_dim={state_batch_dim_of(state, dims)!r}"
    return judged("lanes", [], [*notes, setting] if notes else [], setting)


def state_batch_dim_of(state: State, dims: list[int | None]) -> Any:
    """Returns the value for `state_batch_dim`: one int, or ints nested like the state if leaves differ; None if unknown."""
    known = [dim for dim in dims if dim is not None]
    if not known:
        return None
    usual = max(known, key=known.count)
    filled = [usual if dim is None else dim for dim in dims]
    return filled[0] if len(set(filled)) == 1 else states.unflatten(state, filled)
