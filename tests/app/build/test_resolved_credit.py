"""The settings in force: complete, and what follows from them for windows and for the LSTM kernel."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from dni_seq.app.build.credit_options import AUTO_FIDELITY_EVERY, SYNTHESIZERS, CreditOptions
from dni_seq.app.build.resolved_credit import ResolvedCredit
from dni_seq.app.runs.options import build
from dni_seq.synthesizers.defaults import REACH

BPTT = 2


def resolved(**given: Any) -> ResolvedCredit:
    return build(CreditOptions, given).resolve(BPTT)


@pytest.mark.parametrize("given", [{}, {"fit": "descent"}, {"fit": "descent", "tail": True}])
@pytest.mark.parametrize("synthesizer", SYNTHESIZERS)
def test_every_setting_is_filled_in(synthesizer, given):
    settings = vars(resolved(synthesizer=synthesizer, **given))
    assert [name for name, value in settings.items() if value is None] == []


def test_every_option_has_its_setting():
    options, settings = ({field.name for field in dataclasses.fields(cls)} for cls in (CreditOptions, ResolvedCredit))
    assert options - settings == {"synthesizer_lr"}


def test_a_given_option_is_the_setting():
    """Each value differs from the default, so that an option that is not passed on shows."""
    given = {
        "synthesizer": "paper",
        "synthetic_scale": "0.3",
        "discount": 0.4,
        "horizons": 3,
        "tail": True,
        "draw_horizon": True,
        "lookahead": 6,
        "normalize": True,
        "gate": True,
        "synthesizer_hidden": 5,
        "synthesizer_layers": 2,
        "future_units": 7,
        "fit": "descent",
        "message_clip": 0.5,
        "exact_steps": 2,
        "targets": "lambda",
        "lam": 0.2,
        "replay_windows": 3,
        "regress_every": 2,
        "auxiliary": 0.5,
        "target_network": 3,
        "fidelity_every": 11,
        "synthesizer_clip": 2.0,
    }
    inner = {"message_every": BPTT, "message_at_end": True, "predict": "horizons", "predict_steps": REACH}
    expected = given | inner | {"synthetic_scale": 0.3, "bptt": BPTT, "next_input_only": False}
    assert vars(resolved(**given)) == expected
    inner = {"message_every": BPTT - 1, "message_at_end": False, "predict": "past", "predict_steps": 7}
    assert inner.items() <= vars(resolved(synthesizer="multi-horizon", **inner)).items()


def test_an_automatic_scale_is_compared_at_its_own_interval_unless_one_is_given():
    assert resolved(synthesizer="basic").fidelity_every == AUTO_FIDELITY_EVERY
    assert resolved(synthesizer="basic", fidelity_every=7).fidelity_every == 7
    assert resolved(synthesizer="basic", synthetic_scale="0.5").fidelity_every == 0


@pytest.mark.parametrize(
    ("given", "seen", "carried"),
    [
        ({"synthesizer": "none", "lookahead": 3}, 0, 0),
        ({"synthesizer": "basic", "lookahead": 3}, 0, 0),
        ({"synthesizer": "paper"}, 1, 1),
        ({"synthesizer": "paper", "lookahead": 3}, 3, 3),
        ({"synthesizer": "state"}, BPTT, BPTT),
        ({"synthesizer": "multi-horizon", "horizons": 3}, 3 * BPTT, 3 * BPTT),
        ({"synthesizer": "exact", "exact_steps": 5, "lookahead": 3}, 0, 5),
        ({"synthesizer": "exact", "exact_steps": 5, "tail": True, "lookahead": 3}, 3, 8),
    ],
)
def test_windows_carry_the_steps_that_are_seen(given, seen, carried):
    credit = resolved(**given)
    assert (credit.lookahead, credit.window_lookahead) == (seen, carried)


def test_paper_sees_no_target_unless_a_lookahead_is_given():
    """A given lookahead of one step is another synthesizer than the default, which is one step too."""
    assert resolved(synthesizer="paper").next_input_only
    assert not resolved(synthesizer="paper", lookahead=1).next_input_only


def test_messages_are_counted():
    assert resolved(synthesizer="multi-horizon", horizons=3).message_count == 3
    assert resolved(synthesizer="paper", horizons=3, tail=True).message_count == 4
    assert resolved(synthesizer="state", horizons=3, tail=True).message_count == 1
    assert resolved(synthesizer="exact", horizons=3, tail=True).message_count == 1


def test_products_per_window():
    def products(**given: Any) -> float:
        return resolved(
            **{"synthesizer": "multi-horizon", "fit": "descent", "horizons": 2, "regress_every": 4} | given
        ).state_products

    assert products(synthesizer="none") == 0
    assert products() == 2 / 4
    assert products(tail=True) == 3 / 4
    assert products(draw_horizon=True) == products(targets="lambda") == products(synthesizer="state") == 1 / 4
    assert products(fit="future", draw_horizon=True) == 2 / 4
    # Injection is skipped at the windows whose target is the window's own gradient.
    assert products(horizons=1) == 0
    assert products(horizons=1, regress_every=1) == 1
    assert products(horizons=1, auxiliary=0.1) == products(horizons=1, fit="future") == 1 / 4
