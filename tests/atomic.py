"""Runs of a trainer in which single windows may be bad."""

from __future__ import annotations

from tests import problems

LANES = 3


def windows(count=8, seed=1):
    return list(problems.cut(problems.tokens(3 * count, LANES, seed), 3))


def run(trainer, some):
    return [trainer.step(w.inputs, w.targets, ends=w.ends) for w in some]
