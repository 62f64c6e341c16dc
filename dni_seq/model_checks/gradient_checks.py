"""Checks of gradients: from the last state to the first, leaf by leaf, and from the outputs to the parameters.

If no gradient reaches a leaf, the values of two runs decide why. If changing the leaf changes the result, something in the
model drops the gradient. If changing the leaf does not change the result, the model ignores the leaf.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from dni_seq.core import states
from dni_seq.core.states import State
from dni_seq.model_checks.nests import named
from dni_seq.model_checks.probe import Probe, Run, noise_like
from dni_seq.model_checks.report import Check, judged, listed
from dni_seq.model_checks.state_checks import Sample

Arrival = Literal["flows", "none", "zero", "not finite"]
"""What a backward pass brings to a leaf or a parameter; "flows" is a finite gradient other than zero, "none" no gradient."""


class LastLeaf(NamedTuple):
    """A floating-point leaf of the last state, and how it depends on the leaves of the first state.

    Attributes:
        path: the place of this leaf in the state.
        has_graph: whether it requires a gradient.
        varies: whether its value changes with the inputs and the first state.
        depends: the paths of the first state's leaves that its value depends on.
        reaches: the paths of the first state's leaves that get a gradient other than zero from this leaf.
        finite: whether these gradients are finite.
    """

    path: str
    has_graph: bool
    varies: bool
    depends: list[str]
    reaches: list[str]
    finite: bool


DROPPED = "remove detach(), .data and no_grad() from the model, or the kernel or autograd function that returns no gradient"


def check_state_gradient(probe: Probe, sample: Sample, base: Run) -> Check:
    """Checks that a finite, non-zero gradient flows from the last state to the first state."""
    paths = [path for path, leaf in named(sample.state).items() if states.is_floating(leaf)]
    leaves, used = _measure(probe, sample, base, paths)
    problems, notes = _judge_last_state(leaves)
    more_problems, more_notes = _judge_first_state(leaves, paths, used)
    problems += more_problems
    notes += more_notes
    if not problems:
        notes += _lost_pairs(leaves)
    return judged("state gradient", problems, notes, f"a gradient flows from the last state to {listed(paths)} of the first")


def _measure(probe: Probe, sample: Sample, base: Run, paths: list[str]) -> tuple[list[LastLeaf], list[str] | None]:
    """Runs one backward pass for each leaf of the last state, and one forward pass for each leaf of the first.

    A forward pass changes one leaf of the first state. One more pass changes all these leaves and the inputs.

    Returns:
        The leaves of the last state, and the paths of the first state's leaves that the outputs depend on. None instead of
        these paths if there are no outputs to compare.
    """
    noise = [noise_like(leaf) for leaf in states.floating(sample.state)]
    moved = [probe.run(sample.inputs, _perturbed(sample.state, {i}, noise)) for i in range(len(paths))]
    flipped = states.map_lanes(lambda leaf, _: leaf.flip(0), sample.inputs, 0)
    varied = _changed(probe.run(flipped, _perturbed(sample.state, set(range(len(paths))), noise)).last, base.last)
    changed = [_changed(run.last, base.last) for run in moved]
    leaves = []
    for j, path in enumerate(paths):
        found = probe.gradients(sample.inputs, sample.state, lambda run, j=j: [states.floating(run.last)[j]])  # type: ignore[misc]
        arrivals = [] if found is None else [arrival(gradient) for gradient in found]
        leaves.append(
            LastLeaf(
                path,
                has_graph=found is not None,
                varies=j in varied,
                depends=[first for first, positions in zip(paths, changed, strict=True) if j in positions],
                reaches=[first for first, each in zip(paths, arrivals, strict=False) if each in ("flows", "not finite")],
                finite="not finite" not in arrivals,
            )
        )
    if not states.floating(base.outputs):
        return leaves, None
    return leaves, [path for path, run in zip(paths, moved, strict=True) if _changed(run.outputs, base.outputs)]


def arrival(gradient: Tensor | None) -> Arrival:
    """Returns the `Arrival` of a gradient; "flows" means finite and not zero."""
    if gradient is None:
        return "none"
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    if not bool(values.isfinite().all()):
        return "not finite"
    return "flows" if bool((values != 0).any()) else "zero"


def _perturbed(state: State, leaves: set[int], noise: list[Tensor]) -> State:
    """Returns `state` with `noise` added to the floating-point leaves at the positions `leaves`."""
    found = [leaf + noise[i] if i in leaves else leaf for i, leaf in enumerate(states.floating(state))]
    return states.with_floating(state, found)


def _changed(found: State, expected: State) -> set[int]:
    """Returns the positions of the floating-point leaves whose values differ between two nests."""
    pairs = zip(states.floating(found), states.floating(expected), strict=True)
    return {i for i, (one, other) in enumerate(pairs) if not torch.equal(one, other)}


def _judge_last_state(leaves: list[LastLeaf]) -> tuple[list[str], list[str]]:
    """Returns problems and notes about leaves of the last state from which no gradient flows."""
    problems, notes = [], []
    if detached := [leaf.path for leaf in leaves if not leaf.has_graph and leaf.varies]:
        which = "the last state" if len(detached) == len(leaves) else f"{listed(detached)} of the last state"
        problems.append(
            f"{which} has no graph, so an injected gradient is lost there: return it without detach(), outside of no_grad() "
            "(SequenceTrainer detaches it between windows)"
        )
    if constant := [leaf.path for leaf in leaves if not leaf.has_graph and not leaf.varies]:
        notes.append(f"{listed(constant)} of the last state is constant and has no graph")
    if bad := [leaf.path for leaf in leaves if not leaf.finite]:
        problems.append(f"the gradient from {listed(bad)} of the last state to the first state is not finite")
    if dropped := [leaf.path for leaf in leaves if leaf.has_graph and leaf.depends and not leaf.reaches]:
        problems.append(
            f"{listed(dropped)} of the last state depends on the first state, but no gradient flows back: {DROPPED}"
        )
    return problems, notes


def _judge_first_state(leaves: list[LastLeaf], paths: list[str], used: list[str] | None) -> tuple[list[str], list[str]]:
    """Returns problems and notes about leaves of the first state that no gradient reaches, or that the model ignores.

    Args:
        leaves: the leaves of the last state.
        paths: the paths of the first state's leaves.
        used: the paths of the first state's leaves that the outputs depend on; None if there are no outputs to compare.
    """
    problems, notes = [], []
    lost = [path for path in paths if not any(path in leaf.reaches for leaf in leaves)]
    needed = [path for path in lost if any(path in leaf.depends for leaf in leaves)]
    # `_judge_last_state` reports a leaf of the last state that sends no gradient at all.
    dropped = [path for path in needed if any(path in leaf.depends and leaf.reaches for leaf in leaves)]
    forgotten = [path for path in lost if path not in needed and (used is None or path in used)]
    ignored = [path for path in lost if path not in needed and path not in forgotten]
    if dropped:
        which = f"the last state depends on {listed(dropped)} of the first state"
        problems.append(f"{which}, but no gradient reaches it: {DROPPED}")
    if ignored:
        problems.append(f"the model ignores {listed(ignored)} of the first state: use it, or take it out of the state")
    if used == [] and len(ignored) < len(paths):
        problems.append("the outputs do not depend on the first state: the model makes no use of the state that it is given")
    if forgotten:
        which = f"the last state does not depend on {listed(forgotten)} of the first state"
        notes.append(f"{which}: credit ends at the window's start there")
    return problems, notes


def _lost_pairs(leaves: list[LastLeaf]) -> list[str]:
    """Returns one note on the pairs of leaves between which a value flows but no gradient; an empty list without pairs."""
    lost = [
        f"{leaf.path} of the last state to {path} of the first"
        for leaf in leaves
        for path in leaf.depends
        if leaf.has_graph and path not in leaf.reaches
    ]
    return [f"no gradient flows from {listed(lost)}, although its value depends on it"] if lost else []


def check_parameter_gradient(probe: Probe, sample: Sample) -> Check:
    """Checks that a finite, non-zero gradient flows from the outputs to each parameter that requires one."""
    learning = {name: p for name, p in probe.model.named_parameters() if p.requires_grad}
    if not learning:
        return Check("parameter gradient", "note", "no parameter requires a gradient")
    by_outputs = _parameter_arrivals(probe, sample, learning, lambda run: states.floating(run.outputs))
    if by_outputs is None:
        text = (
            "the outputs have no graph, so no parameter gets a gradient: return them without detach(), outside of no_grad()"
        )
        return Check("parameter gradient", "problem", text)
    by_state = _parameter_arrivals(probe, sample, learning, lambda run: states.floating(run.last)) or {}
    by: dict[str, list[str]] = {"none": [], "late": [], "zero": [], "not finite": []}
    for name, found in by_outputs.items():
        late = found in ("none", "zero") and by_state.get(name) == "flows"
        if found != "flows":
            by["late" if late else found].append(name)
    problems = []
    if by["none"]:
        problems.append(f"no gradient reaches {listed(by['none'])}: use it, or set requires_grad_(False)")
    if by["zero"]:
        problems.append(f"the gradient is zero at {listed(by['zero'])}: look for a factor of zero or a saturated unit")
    if by["not finite"]:
        problems.append(f"the gradient is not finite at {listed(by['not finite'])}")
    notes = [f"{listed(by['late'])} gets a gradient from the last state only, none from the outputs"] if by["late"] else []
    return judged(
        "parameter gradient", problems, notes, f"a gradient flows from the outputs to all {len(learning)} parameters"
    )


def _parameter_arrivals(
    probe: Probe, sample: Sample, learning: dict[str, nn.Parameter], source: Callable[[Run], list[Tensor]]
) -> dict[str, Arrival] | None:
    """Returns what arrives at each parameter from the tensors of `source`; None if these tensors have no graph."""
    found = probe.gradients(sample.inputs, sample.state, source, list(learning.values()))
    if found is None:
        return None
    return {name: arrival(g) for name, g in zip(learning, found[-len(learning) :], strict=True)}
