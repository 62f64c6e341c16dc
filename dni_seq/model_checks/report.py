"""ModelReport: what `check_model` found, check by check."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

Verdict = Literal["ok", "note", "problem", "skipped"]
"""A note is worth knowing but is no mistake. A check is skipped if an earlier problem makes its result meaningless."""

NAMES_SHOWN = 4
"""Largest number of names that a message lists."""


@dataclass(frozen=True)
class Check:
    """One check of a model.

    Attributes:
        name: what is checked, such as "halves".
        verdict: "ok", "note", "problem" or "skipped".
        text: what was found. For a problem, also what to do.
        cause: the exception that the model raised, or None.
    """

    name: str
    verdict: Verdict
    text: str
    cause: BaseException | None = field(default=None, compare=False)


@dataclass(frozen=True)
class StateLeaf:
    """One leaf of a model's state.

    Attributes:
        path: where the leaf is, such as `state["units"][0]`.
        shape: its shape with all lanes; None if it is not a tensor.
        dtype: its dtype; None if it is not a tensor.
        floating: whether it is a floating-point tensor, so that gradients flow through it.
        lane_dim: the dimension of its lanes; None if it has none, or if the checks did not get that far.
    """

    path: str
    shape: tuple[int, ...] | None
    dtype: torch.dtype | None
    floating: bool
    lane_dim: int | None


@dataclass(frozen=True, repr=False)
class ModelReport:
    """The result of `check_model`. `print(report)` shows one line for each check; `report[name]` is the check of that name.

    - contract: `model(inputs, state)` returns `(outputs, state)`, and continues from the state that it has returned.
    - outputs: a tensor of outputs is time-major, [T, B, ...].
    - finite values: outputs and state hold no NaN and no infinity.
    - state: nesting, shapes and dtypes stay the same from window to window; notes name leaves that are not floating-point.
    - randomness: runs from the same random state agree, and eval mode is not random.
    - mode: whether the model was in train mode, and what train mode changes: random numbers of dropout, or batch
      normalisation over the steps of a window.
    - in place: whether the model writes into its inputs or its state, which is allowed.
    - lanes: the dimension of the lanes in each leaf of the state, found by a run with one lane less.
    - halves: one window equals two halves with the state carried from the first to the second.
    - state gradient: each floating-point leaf of the last state sends a finite, non-zero gradient to the first state, and
      each floating-point leaf of the first state receives one. A constant leaf, or a leaf that only the outputs depend
      on, is a note.
    - parameter gradient: a finite, non-zero gradient flows from the outputs to each parameter that requires one.

    Attributes:
        title: the model's class and the size of the window.
        checks: all checks, in the order in which they ran.
        leaves: the leaves of the state.
        state_batch_dim: the value that `SequenceTrainer` needs for `state_batch_dim`: an int, or ints nested like the state.
            None if it is not known.
    """

    title: str
    checks: tuple[Check, ...]
    leaves: tuple[StateLeaf, ...]
    state_batch_dim: Any

    @property
    def problems(self) -> tuple[Check, ...]:
        """The checks that found a problem."""
        return tuple(check for check in self.checks if check.verdict == "problem")

    @property
    def ok(self) -> bool:
        """Whether no check found a problem."""
        return not self.problems

    def __getitem__(self, name: str) -> Check:
        """Returns the check of that name.

        Raises:
            KeyError: there is no such check.
        """
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(f"no check {name!r}: choose from {', '.join(check.name for check in self.checks)}")

    def __repr__(self) -> str:
        count = len(self.problems)
        result = "no problem found" if not count else f"{count} problem{'s' * (count > 1)} found"
        width = max(len(check.name) for check in self.checks)
        verdicts = {"problem": "PROBLEM"}
        lines = [f"{c.name:{width}}  {verdicts.get(c.verdict, c.verdict):7}  {c.text}" for c in self.checks]
        return "\n".join([f"{self.title}: {result}", *lines])


def judged(name: str, problems: list[str], notes: list[str], fine: str) -> Check:
    """Returns a "problem" if there are problems, else a "note" if there are notes, else "ok" with the text `fine`."""
    if problems:
        return Check(name, "problem", "; ".join([*problems, *notes]))
    return Check(name, "note", "; ".join(notes)) if notes else Check(name, "ok", fine)


def listed(names: list[str]) -> str:
    """Returns the first few names as text: "a, b, c, d and 3 more"."""
    shown = ", ".join(names[:NAMES_SHOWN])
    return shown if len(names) <= NAMES_SHOWN else f"{shown} and {len(names) - NAMES_SHOWN} more"
