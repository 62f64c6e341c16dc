"""Checks of values: randomness, the model's mode, writes in place, and one window against two halves.

Legend: T = window length in steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dni_seq.core.states import State
from dni_seq.model_checks.nests import named
from dni_seq.model_checks.probe import ModelError, Probe, Run, differences, relative_difference, tolerance
from dni_seq.model_checks.report import Check, judged, listed
from dni_seq.model_checks.state_checks import Sample

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def largest(gaps: dict[str, float], limit: float) -> str | None:
    """Returns a text that names the tensor with the largest difference above `limit`, or None if there is none."""
    path, gap = max(gaps.items(), key=lambda item: item[1], default=("", 0.0))
    if gap <= limit:
        return None
    if gap == float("inf"):
        return f"in {path}"
    share = f"{100 * gap:.0f}" if gap > 0.01 else f"{100 * gap:.1g}"
    return f"in {path}, by {share} % of its largest value"


def run_differences(found: Run, expected: Run) -> dict[str, float]:
    """Returns the relative difference of each tensor in two runs, by path."""
    return differences(found.outputs, expected.outputs, "outputs") | differences(found.last, expected.last, "state")


def check_repeat(probe: Probe, inputs: Any, first: State | None, found: Run) -> tuple[Check, bool]:
    """Checks that two runs from the same random state give the same results; `found` is the first run.

    Returns:
        The check, and whether the model draws random numbers of torch in its present mode.
    """
    again = probe.run(inputs, first)
    other = probe.run(inputs, first, same_random_state=False)
    random = largest(run_differences(other, again), 0.0) is not None
    gaps = run_differences(again, found)
    limit = tolerance(found, probe.device)
    apart = largest(gaps, limit)
    if apart:
        text = (
            f"two runs from the same random state differ ({apart}): use torch's random numbers only, and keep nothing "
            "between calls but the state that is returned"
        )
        return Check("randomness", "problem", text), random
    notes = ["two runs from the same random state agree up to rounding only"] if largest(gaps, 0.0) else []
    return judged("randomness", [], notes, "two runs from the same random state are bit-identical"), random


def check_eval_is_fixed(probe: Probe, sample: Sample, base: Run) -> Check | None:
    """Returns a problem if the model in eval mode gives different results with different random numbers, else None."""
    probe.run(sample.inputs, sample.state)
    other = probe.run(sample.inputs, sample.state, same_random_state=False)
    apart = largest(run_differences(other, base), tolerance(base, probe.device))
    if apart is None:
        return None
    text = f"the model is random in eval mode ({apart}): draw only `if self.training`, as nn.Dropout does"
    return Check("randomness", "problem", text)


def check_mode(probe: Probe, sample: Sample, *, training: bool, random: bool) -> Check:
    """Says in which mode values were compared, and which modules make train mode differ.

    Args:
        probe: runs the model, which must be in eval mode.
        sample: the window.
        training: whether the model was in train mode when it was passed to `check_model`.
        random: whether the model draws random numbers in the mode in which it was passed.
    """
    if not training:
        return Check("mode", "ok", "the model is in eval mode")
    notes = []
    if random:
        notes.append("the model is random in train mode (dropout), so windows and halves were compared in eval mode")
    mixing = [
        f"{name!r} ({type(part).__name__})"
        for name, part in probe.model.named_modules()
        if isinstance(part, BATCH_NORMS) and _mixes_steps(probe, sample, part)
    ]
    if mixing:
        notes.append(
            f"in train mode {listed(mixing)} normalises over the steps of a window, so one window differs from two halves; "
            "they were compared in eval mode"
        )
    return judged("mode", [], notes, "train mode; windows and halves were compared in eval mode")


def _mixes_steps(probe: Probe, sample: Sample, part: nn.Module) -> bool:
    """Returns whether one window differs from its halves if `part` alone is in train mode."""
    part.train()
    try:
        return largest(*_halves(probe, sample, probe.run(sample.inputs, sample.state))) is not None
    except ModelError:
        return False
    finally:
        part.eval()


def check_in_place(probe: Probe, sample: Sample) -> Check:
    """Says whether the model writes into its inputs or its state."""
    inputs, leaves = probe.written(sample.inputs, sample.state)
    notes = []
    if inputs:
        notes.append("the model writes into its inputs in place, so the caller's tensor changes: clone it first")
    written = [path for path, wrote in zip(named(sample.state), leaves, strict=True) if wrote]
    if written:
        notes.append(
            f"the model writes into {listed(written)} in place; SequenceTrainer passes a copy, your own loop may not"
        )
    return judged("in place", [], notes, "inputs and state are not written to")


def check_halves(probe: Probe, sample: Sample, base: Run) -> Check:
    """Checks that one window equals two halves with the state carried from the first to the second."""
    gaps, limit = _halves(probe, sample, base)
    half = sample.steps // 2
    pair = f"a window of {sample.steps} steps and two of {half} and {sample.steps - half} with the state carried"
    apart = largest(gaps, limit)
    if apart is None:
        fine = f"{pair} agree (largest relative difference {max(gaps.values(), default=0.0):.1g})"
        return Check("halves", "ok", fine)
    norms = [
        f"{n!r}" for n, part in probe.model.named_modules() if isinstance(part, BATCH_NORMS) and not part.track_running_stats
    ]
    cause = f" ({listed(norms)}: batch normalisation without running statistics)" if norms else ""
    advice = (
        "put everything that passes between steps into the state, and use nothing that looks over all steps of the window"
    )
    return Check("halves", "problem", f"{pair} differ ({apart}){cause}: {advice}")


def _halves(probe: Probe, sample: Sample, whole: Run) -> tuple[dict[str, float], float]:
    """Returns the relative difference of each tensor between one window and two halves, and the tolerance."""
    half = sample.steps // 2
    one = probe.run(probe.steps(sample.inputs, 0, half), sample.state)
    two = probe.run(probe.steps(sample.inputs, half, sample.steps), one.last)
    gaps = differences(two.last, whole.last, "state")
    pieces = [named(each.outputs, "outputs") for each in (one, two)]
    for path, leaf in named(whole.outputs, "outputs").items():
        if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == sample.steps:
            gaps[path] = relative_difference(_joined([piece.get(path) for piece in pieces]), leaf)
    return gaps, tolerance(whole, probe.device)


def _joined(pieces: list[Any]) -> Tensor:
    """Returns the pieces concatenated along time, an empty tensor if they do not fit."""
    if not all(isinstance(piece, Tensor) and piece.dim() and piece.shape[1:] == pieces[0].shape[1:] for piece in pieces):
        return torch.empty(0)
    return torch.cat(pieces)
