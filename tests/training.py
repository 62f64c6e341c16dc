"""Running trainers on the problems of `problems.py`, and comparing what they did."""

from __future__ import annotations

import dataclasses

import torch

import dni_seq as dni
from tests import problems

# Sums of products in another order, over at most 12 steps of gradients of size 1: a hundred times float64's epsilon.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


LANES, STEPS = 3, 11


def run(trainer: dni.SequenceTrainer, windows) -> list[dict[str, torch.Tensor]]:
    """Each window's parameter gradients."""
    history = []
    for window in windows:
        trainer.step(window.inputs, window.targets, ends=window.ends, lookahead=window.lookahead)
        history.append(problems.gradients(trainer.model))
    return history


def summed_gradients(history):
    return {name: sum(window[name] for window in history) for name in history[0]}


def assert_same(found, expected, **tolerance):
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def trainer_initial(model):
    return model.initial_state(LANES) if hasattr(model, "initial_state") else torch.zeros(1, LANES, 5, dtype=torch.float64)


CONFIG = {field.name for field in dataclasses.fields(dni.SyntheticGradientConfig)}


def sequence_trainer(*parts, **settings) -> dni.SequenceTrainer:
    """A trainer; settings of the synthetic gradient may stand beside the trainer's own."""
    limit = settings.pop("skip_limit", None)
    config = {name: settings.pop(name) for name in CONFIG & set(settings)}
    trainer = dni.SequenceTrainer(*parts, config=dni.SyntheticGradientConfig(**config), **settings)
    if limit is not None:
        trainer.skip_limit = limit
    return trainer
