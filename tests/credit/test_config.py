"""SyntheticGradientConfig: every field is checked at construction, and the trainer takes it whole."""

from __future__ import annotations

import dataclasses
import inspect
import math

import pytest
import torch
from torch import nn

import dni_seq as dni
from dni_seq.synthesizers.base import Recommended
from tests import problems
from tests.training import trainer_initial

WRONG = {
    "synthetic_scale": (-1, "much", math.inf),
    "discount": (-0.1, 1.1),
    "synthesizer_clip": (0, -1.0),
    "targets": ("lamda",),
    "lam": (-0.1, 1.1),
    "replay_windows": (0,),
    "regress_every": (0,),
    "target_network": (-1,),
    "fidelity_every": (-1,),
    "message_every": (0, -3),
    "message_at_end": (False,),  # without messages inside the window
    "auxiliary_weight": (-1.0, math.inf),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_wrong_setting_is_named(name, value):
    with pytest.raises(ValueError, match=name):
        dni.SyntheticGradientConfig(**{name: value})


EDGES = {
    "synthetic_scale": (0,),
    "discount": (0, 1),
    "synthesizer_clip": (math.inf,),
    "lam": (0, 1),
    "replay_windows": (1,),
    "regress_every": (1,),
    "target_network": (0, 1),
    "fidelity_every": (0, 1),
    "message_every": (1,),
    "auxiliary_weight": (0,),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in EDGES.items() for value in values])
def test_an_edge_is_allowed(name, value):
    assert getattr(dni.SyntheticGradientConfig(**{name: value}), name) == value


def test_every_field_is_checked_or_a_module():
    assert {field.name for field in dataclasses.fields(dni.SyntheticGradientConfig)} == {*WRONG, "auxiliary"}


def test_an_automatic_scale_needs_comparisons():
    with pytest.raises(ValueError, match="set fidelity_every"):
        dni.SyntheticGradientConfig(synthetic_scale="auto")
    assert dni.SyntheticGradientConfig(synthetic_scale="auto", fidelity_every=1).fidelity_every == 1


def test_lambda_targets_have_their_own_period():
    with pytest.raises(ValueError, match="regress_every has no effect"):
        dni.SyntheticGradientConfig(targets="lambda", regress_every=5)
    assert dni.SyntheticGradientConfig(targets="lambda", regress_every=1).regress_every == 1


def test_it_is_frozen():
    config = dni.SyntheticGradientConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.discount = 0.5


def test_no_limit_is_infinite():
    advice = Recommended(synthesizer_clip=2.0)
    assert dni.SyntheticGradientConfig().resolve(advice).clip == 2.0
    assert dni.SyntheticGradientConfig(synthesizer_clip=math.inf).resolve(advice).clip is None
    assert dni.SyntheticGradientConfig(synthesizer_clip=0.5).resolve(advice).clip == 0.5
    assert dni.SyntheticGradientConfig().resolve(Recommended(synthesizer_clip=math.inf)).clip is None


def test_the_trainer_has_at_most_14_parameters():
    assert len(inspect.signature(dni.SequenceTrainer).parameters) <= 14


def parts(**settings):
    model = problems.make_model("lstm")
    synthesizer = dni.StateSynthesizer(trainer_initial(model), hidden=(4,)).double()
    return dni.SequenceTrainer(model, problems.frozen(model), problems.mean, synthesizer=synthesizer, **settings)


def test_the_short_form_is_the_config():
    assert parts(synthetic_scale=0.3).credit.settings == parts(config=dni.SyntheticGradientConfig(0.3)).credit.settings


def test_two_scales_are_one_too_many():
    with pytest.raises(ValueError, match="synthetic_scale is a field of config"):
        parts(synthetic_scale=0.3, config=dni.SyntheticGradientConfig())


def test_an_auxiliary_task_needs_a_synthesizer():
    model = problems.make_model("lstm")
    config = dni.SyntheticGradientConfig(auxiliary=dni.AuxiliaryTask(trainer_initial(model)))
    with pytest.raises(ValueError, match="give a synthesizer too"):
        dni.SequenceTrainer(model, problems.frozen(model), problems.mean, config=config)


def test_the_default_optimizer_trains_synthesizer_and_auxiliary_task():
    task = dni.AuxiliaryTask(trainer_initial(problems.make_model("lstm")))
    trainer = parts(config=dni.SyntheticGradientConfig(auxiliary=task))
    learning = {id(p) for group in trainer.credit.optimizer.param_groups for p in group["params"]}
    assert learning == {id(p) for module in (trainer.credit.synthesizer, task) for p in module.parameters()}
    assert isinstance(trainer.credit.optimizer, torch.optim.Adam)


def test_the_skip_limit_is_checked_when_it_is_set():
    trainer = parts()
    assert trainer.skip_limit == 10
    trainer.skip_limit = 2
    with pytest.raises(ValueError, match="skip_limit must be 1 or more, got 0"):
        trainer.skip_limit = 0
    assert trainer.skip_limit == 2


def test_a_synthesizer_that_learns_nothing_has_no_optimizer():
    model = problems.make_model("lstm")
    exact = dni.ExactFuture(model, problems.unreduced, steps=2)
    trainer = dni.SequenceTrainer(model, problems.frozen(model), problems.mean, synthesizer=exact)
    assert trainer.credit.optimizer is None
    assert isinstance(model, nn.Module)
