"""check_model: checks a recurrent model before training, and says what is wrong with it.

Legend: T = window length in steps, B = lanes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dni_seq.core import states
from dni_seq.core.snapshot import undo_runs
from dni_seq.core.states import State
from dni_seq.model_checks.gradient_checks import check_parameter_gradient, check_state_gradient
from dni_seq.model_checks.nests import named
from dni_seq.model_checks.probe import ModelError, Probe, Run, first_line, set_to_eval
from dni_seq.model_checks.report import Check, ModelReport, StateLeaf
from dni_seq.model_checks.state_checks import (
    Sample,
    batch_first_modules,
    check_finite,
    check_lanes,
    check_outputs,
    check_state,
    sample_of,
    state_batch_dim_of,
)
from dni_seq.model_checks.value_checks import (
    check_eval_is_fixed,
    check_halves,
    check_in_place,
    check_mode,
    check_repeat,
)

NAMES = (
    "contract",
    "outputs",
    "finite values",
    "state",
    "randomness",
    "mode",
    "in place",
    "lanes",
    "halves",
    "state gradient",
    "parameter gradient",
)
"""The names of all checks, in their order."""


def check_model(
    model: nn.Module, inputs: Any, state: State | None = None, *, batch_dim: int = 1, strict: bool = False
) -> ModelReport:
    """Checks a recurrent model before training; `print` the result to see what the model does and what is wrong.

    The model runs a few dozen times on one window. `ModelReport` lists the checks. The values and gradients of these runs
    are compared with each other in eval mode, on at most 16 steps. The model, the random state and the arguments are left as
    they were.

    Args:
        model: `model(inputs, state) -> (outputs, state)`.
        inputs: [T, B, ...], example inputs of at least 2 steps and 2 lanes: a tensor, or a nest of tensors.
        state: the state in which the first run starts. Default: `model.initial_state(B)` if it exists, else None. Most
            compared runs start from the state that the model returns after a run over all of `inputs`.
        batch_dim: the dimension of the lanes in `inputs`.
        strict: True to raise a ValueError with the first problem that the checks found.

    Returns:
        The report; its attribute `ok` is True if no check found a problem.

    Raises:
        ValueError: `inputs` do not have the form above, gradients are disabled by `torch.inference_mode()`, a parameter has
            no shape yet, or `strict` is set and a check found a problem.

    Example::

        >>> model = torch.nn.LSTM(3, 5)
        >>> report = dni_seq.check_model(model, torch.randn(6, 4, 3))
        >>> report.ok
        True
        >>> print(report["lanes"].text)
        state_batch_dim=1
    """
    steps, lanes, device = _sizes(inputs, batch_dim)
    _check_ready(model)
    examination = _Examination(f"{type(model).__name__}, T={steps}, B={lanes}")
    with undo_runs(model, device):
        examination.run(Probe(model, device, batch_dim), inputs, state, steps, lanes)
    report = examination.report()
    if strict and report.problems:
        first = report.problems[0]
        raise ValueError(f"{first.name}: {first.text}") from first.cause
    return report


def _check_ready(model: nn.Module) -> None:
    """Raises a ValueError if gradients cannot be computed here, or if parameters have no shape yet."""
    if torch.is_inference_mode_enabled():
        raise ValueError("check_model needs gradients: call it outside of torch.inference_mode()")
    if any(isinstance(parameter, nn.UninitializedParameter) for parameter in model.parameters()):
        raise ValueError("the model has lazy parameters without a shape: run it once before check_model")


def _sizes(inputs: Any, batch_dim: int) -> tuple[int, int, torch.device]:
    """Returns T, B and the device of the inputs.

    Raises:
        ValueError: the inputs are not tensors [T, B, ...] of at least 2 steps and 2 lanes.
    """
    if batch_dim < 1:
        raise ValueError(f"batch_dim must be 1 or more, because dimension 0 of the inputs is time; got {batch_dim}")
    leaves = states.flatten(inputs)
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise ValueError(f"inputs must be a tensor [T, B, ...] or a nest of tensors, got a {type(leaf).__name__}")
        if leaf.dim() <= batch_dim:
            raise ValueError(f"inputs have shape {list(leaf.shape)}, and no dimension batch_dim={batch_dim}")
    sizes = {(leaf.shape[0], leaf.shape[batch_dim]) for leaf in leaves}
    if len(sizes) != 1:
        raise ValueError(f"all inputs must have the same T and B, got {sorted(sizes)}")
    steps, lanes = sizes.pop()
    if steps < 2 or lanes < 2:
        raise ValueError(f"check_model needs inputs of at least 2 steps and 2 lanes, got T={steps} and B={lanes}")
    return steps, lanes, leaves[0].device


class _Examination:
    """Runs all checks of a model in their order, and collects what they find."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._checks: list[Check] = []
        self._state: State | None = None
        self._dims: list[int | None] = []

    def report(self) -> ModelReport:
        """Returns the report; a check that was not reached has the verdict "skipped"."""
        done = {check.name: check for check in self._checks}
        skipped = "not reached, because of the problem above"
        checks = tuple(done.get(name, Check(name, "skipped", skipped)) for name in NAMES)
        leaves = named(self._state) if self._state is not None else {}
        dims = self._dims or [None] * len(leaves)
        pairs = zip(leaves.items(), dims, strict=True)
        found = tuple(_state_leaf(path, leaf, dim) for (path, leaf), dim in pairs)
        return ModelReport(self._title, checks, found, state_batch_dim_of(self._state, self._dims))

    def run(self, probe: Probe, inputs: Any, state: State | None, steps: int, lanes: int) -> None:
        """Runs the checks, up to the first problem that makes the results of later ones meaningless."""
        training = any(part.training for part in probe.model.modules())
        try:
            first = _first_state(probe.model, state, lanes)
            as_trained = probe.run(inputs, first)
            repeat, random = check_repeat(probe, inputs, first, as_trained)
            set_to_eval(probe.model)
            found = probe.run(inputs, first)
        except ModelError as error:
            hint = "; give it initial_state(lanes), or pass its first state to check_model" if state is None else ""
            hint = "" if hasattr(probe.model, "initial_state") else hint
            self._add(Check("contract", "problem", f"{error}{hint}", error.__cause__))
            return
        after = self._continue(probe, inputs, found)
        if after is None:
            return
        self._state = found.last
        sample = sample_of(probe, inputs, found.last, steps, lanes)
        finite = check_finite(inputs, first, found)
        state_check, comparable = check_state(first, found.last, after.last, reordered=probe.reordered)
        self._add(finite, state_check, repeat)
        base = self._shapes(probe, found, sample, steps)
        if base is None or finite.verdict == "problem" or not comparable:
            return
        self._values(probe, sample, base, repeat, training=training, random=random)

    def _continue(self, probe: Probe, inputs: Any, found: Run) -> Run | None:
        """Runs the window again, from the state after its first run; returns None if this run fails."""
        try:
            after = probe.run(inputs, found.last)
        except ModelError as error:
            text = f"from the state that it has returned, {error}{batch_first_modules(probe.model)}"
            self._add(Check("contract", "problem", text, error.__cause__))
            return None
        self._add(Check("contract", "ok", "model(inputs, state) returns (outputs, state), and continues from that state"))
        return after

    def _shapes(self, probe: Probe, found: Run, sample: Sample, steps: int) -> Run | None:
        """Checks the outputs; returns a run of the window of `sample`, or None if this run fails."""
        try:
            base = probe.run(sample.inputs, sample.state)
        except ModelError as error:
            text = f"with T={sample.steps} steps instead of {steps}, {error}{batch_first_modules(probe.model)}"
            self._add(Check("outputs", "problem", text, error.__cause__))
            return None
        runs = [(found, steps), (base, sample.steps)]
        self._add(check_outputs(probe.model, runs, sample.lanes, probe.batch_dim))
        return base

    def _values(self, probe: Probe, sample: Sample, base: Run, repeat: Check, *, training: bool, random: bool) -> None:
        """Compares the values and gradients of several runs of the model in eval mode."""
        restless = check_eval_is_fixed(probe, sample, base)
        if restless is not None and repeat.verdict != "problem":
            self._add(restless)
        fixed = restless is None and repeat.verdict != "problem"
        self._attempt("in place", lambda: check_in_place(probe, sample))
        if not fixed:
            return
        self._attempt("mode", lambda: check_mode(probe, sample, training=training, random=random))
        self._attempt("lanes", lambda: self._lanes(probe, sample, base))
        self._attempt("halves", lambda: check_halves(probe, sample, base))
        self._attempt("state gradient", lambda: check_state_gradient(probe, sample, base))
        self._attempt("parameter gradient", lambda: check_parameter_gradient(probe, sample))

    def _lanes(self, probe: Probe, sample: Sample, base: Run) -> Check:
        check, self._dims = check_lanes(probe, sample, base)
        return check

    def _attempt(self, name: str, check: Callable[[], Check]) -> None:
        try:
            self._add(check())
        except ModelError as error:
            self._add(Check(name, "problem", str(error), error.__cause__))

    def _add(self, *checks: Check) -> None:
        self._checks += checks


def _first_state(model: nn.Module, state: State | None, lanes: int) -> State | None:
    """Returns the state in which the first window starts; None if the model chooses it.

    Raises:
        ModelError: `model.initial_state` raised an exception.
    """
    of_model = getattr(model, "initial_state", None)
    if state is not None or of_model is None:
        return state
    try:
        return of_model(lanes)
    except Exception as error:
        raise ModelError(f"model.initial_state({lanes}) raised {first_line(error)}") from error


def _state_leaf(path: str, leaf: Any, dim: int | None) -> StateLeaf:
    if not isinstance(leaf, Tensor):
        return StateLeaf(path, None, None, False, None)
    return StateLeaf(path, tuple(leaf.shape), leaf.dtype, states.is_floating(leaf), dim)
