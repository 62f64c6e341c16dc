"""step_rule: which windows have targets, and which of those skip injection."""

from __future__ import annotations

import pytest
from torch import nn

import dni_seq as dni
from dni_seq.credit.synthetic_gradient import step_rule
from dni_seq.synthesizers.base import Recommended
from dni_seq.synthesizers.target_rule import TargetRule
from tests import problems
from tests.credit.trainers import T, future_gradient, windows_of
from tests.training import sequence_trainer, trainer_initial

WINDOWS = 60


def synthesizer(kind: str) -> nn.Module:
    model = problems.make_model("lstm")
    example = trainer_initial(model)
    if kind == "one horizon":
        return dni.MultiHorizonSynthesizer(example, horizons=1, hidden=(4,))
    if kind == "two horizons":
        return dni.MultiHorizonSynthesizer(example, horizons=2, hidden=(4,))
    if kind == "a tail":
        return dni.MultiHorizonSynthesizer(example, horizons=1, tail=True, hidden=(4,))
    if kind == "bootstrapped":
        return dni.StateSynthesizer(example, hidden=(4,))
    if kind == "self-supervised":
        return future_gradient(model)
    return dni.ExactFuture(model, problems.unreduced, steps=2)


def rules(
    kind: str,
    can_skip: bool = True,
    shares: list[float] | None = None,
    recommended: Recommended | None = None,
    **settings,
) -> list[TargetRule]:
    chosen = dni.SyntheticGradientConfig(**settings).resolve(recommended or Recommended())
    module = synthesizer(kind)
    return [step_rule(module, chosen, window, shares, can_skip=can_skip) for window in range(WINDOWS)]


def with_targets(found: list[TargetRule]) -> list[int]:
    return [k for k, rule in enumerate(found) if any(rule.active)]


def skipping(found: list[TargetRule]) -> list[int]:
    return [k for k, rule in enumerate(found) if rule.skip_injection]


def test_one_horizon_skips_injection_at_the_windows_that_train_it():
    """The gradient that arrives at the first state is then the target, at no extra cost."""
    found = rules("one horizon", regress_every=3)
    assert WINDOWS / 6 < len(with_targets(found)) < WINDOWS / 2
    assert skipping(found) == with_targets(found)


@pytest.mark.parametrize(
    ("kind", "can_skip", "settings"),
    [
        ("one horizon", True, {"regress_every": 1}),  # it would never inject
        ("one horizon", False, {"regress_every": 3}),  # something else needs the message
        ("two horizons", True, {"regress_every": 3}),  # the second one's target holds the first one's message
        ("a tail", True, {"regress_every": 3}),
        ("bootstrapped", True, {"regress_every": 3}),
        ("self-supervised", True, {"regress_every": 3}),  # its targets only measure it
    ],
)
def test_all_others_inject_at_every_window(kind, can_skip, settings):
    found = rules(kind, can_skip, **settings)
    assert skipping(found) == []
    assert all(any(rule.injection) for rule in found)
    assert (len(with_targets(found)) == WINDOWS) == (settings["regress_every"] == 1)
    assert with_targets(found)


@pytest.mark.parametrize("kind", ["one horizon", "bootstrapped"])
def test_lambda_targets_are_not_computed_in_the_window(kind):
    """Replays compute them, so every window injects."""
    for every in (1, 3):
        found = rules(kind, targets="lambda", recommended=Recommended(regress_every=every))
        assert with_targets(found) == skipping(found) == []


def test_a_synthesizer_without_targets_injects_at_every_window():
    found = rules("exact", regress_every=3)
    assert with_targets(found) == skipping(found) == []


def test_an_automatic_scale_is_zero_before_the_first_comparison():
    settings = {"synthetic_scale": "auto", "fidelity_every": 5, "discount": 0.5}
    assert rules("two horizons", **settings)[0].injection == [0.0, 0.0]
    assert rules("two horizons", shares=[0.75, 0.5], **settings)[0].injection == [0.75, 0.25]
    assert rules("two horizons", synthetic_scale=0.5, discount=0.5)[0].injection == [0.5, 0.25]


@pytest.mark.parametrize(("kind", "skips"), [("plain", True), ("auxiliary", False), ("frozen", False)])
def test_a_trainer_skips_injection_only_for_a_target_that_it_trains_on(kind, skips):
    """An auxiliary task predicts the message at every window, and a frozen synthesizer has no use for targets."""
    model = problems.make_model("lstm")
    task = dni.AuxiliaryTask(trainer_initial(model), hidden=(4,)).double() if kind == "auxiliary" else None
    heads = synthesizer("one horizon").double().requires_grad_(kind != "frozen")
    trainer = sequence_trainer(
        model, problems.frozen(model), problems.mean, synthesizer=heads, auxiliary=task, regress_every=3
    )
    skipped = 0
    for window in windows_of(T * 12):
        trainer.step(window.inputs, window.targets)
        skipped += trainer.credit.rule.skip_injection
    assert (skipped > 0) == skips
