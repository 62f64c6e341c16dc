"""What follows from the credit-assignment options: how messages are made, how many horizons, what a run keeps of them."""

from __future__ import annotations

import dataclasses

import pytest

from dni_seq.app.build.credit_options import CreditOptions, default_values
from dni_seq.app.lm.options import DEFAULTS, LanguageModelOptions, as_given, resolve_options
from dni_seq.app.runs.options import build
from dni_seq.app.tasks.options import TaskOptions
from dni_seq.app.tasks.options import as_given as tasks_as_given
from dni_seq.app.tasks.options import resolve_options as settle_task
from dni_seq.streams import open_corpus
from dni_seq.synthesizers.defaults import HORIZONS

BPTT = 2

HINDRANCES = {
    "state": {"synthesizer": "state"},
    "lookahead 0": {"lookahead": 0},
    "multiple": {"horizons": 2, "lookahead": 3},
    "--future-units 0": {"future_units": 0},
    "no-normalize": {"normalize": False},
    "tail": {"tail": True},
    "lambda": {"targets": "lambda"},
    "target-network": {"target_network": 5},
}


@pytest.mark.parametrize("name", HINDRANCES)
def test_where_the_future_model_cannot_give_messages(name):
    """By default they are fitted there; asked for all the same, the text says what is in the way."""
    given = {"synthesizer": "multi-horizon"} | HINDRANCES[name]
    assert build(CreditOptions, given).resolve(BPTT).fit == ("descent" if name == "no-normalize" else "least-squares")
    with pytest.raises(ValueError, match=f"--fit future is not possible with .*{name}"):
        build(CreditOptions, given | {"fit": "future"}).resolve(BPTT)


@pytest.mark.parametrize("given", [{"synthesizer": "state"}, {}, {"synthesizer": "exact", "tail": True}])
def test_raw_targets_are_not_solved_for(given):
    with pytest.raises(ValueError, match="remove --no-normalize, or use --fit descent"):
        build(CreditOptions, given | {"fit": "least-squares", "normalize": False}).resolve(BPTT)
    assert build(CreditOptions, given | {"normalize": False}).resolve(BPTT).fit == "descent"


def test_the_tail_of_an_exact_gradient_reads_any_number_of_steps():
    """Its model has one part, however many windows they are."""
    assert CreditOptions(synthesizer="exact", tail=True, horizons=2, lookahead=3).resolve(BPTT).fit == "future"


def test_horizons_by_default():
    """Several where messages are a model's gradient, one where they are fitted, or sized by a lookahead that is given."""
    for name, given in HINDRANCES.items():
        if "horizons" not in given:
            assert build(CreditOptions, {"synthesizer": "multi-horizon"} | given).resolve(BPTT).horizons == 1, name

    def horizons(**given):
        return build(CreditOptions, {"synthesizer": "multi-horizon"} | given).resolve(BPTT).horizons

    assert horizons() == horizons(fit="future") == HORIZONS > 1
    by_window = [CreditOptions(synthesizer="multi-horizon").resolve(bptt).horizons for bptt in (1, 2, 3, 4, 5, 20)]
    assert by_window == [4, 2, 2, 2, 2, 2]
    assert horizons(horizons=3) == horizons(horizons=3, fit="descent") == 3
    assert horizons(synthesizer="paper") == horizons(fit="descent") == horizons(lookahead=5) == 1


def test_the_reach_on_text_by_default():
    """K windows where they are short, the next four steps in one horizon else; what is given holds."""

    def reach(tokenizer, bptt, **given):
        options = build(LanguageModelOptions, {"synthesizer": "multi-horizon", "tokenizer": tokenizer, "bptt": bptt} | given)
        found = resolve_options(options, open_corpus())
        return found.horizons, found.lookahead

    windows = (1, 2, 4, 7, 8, 16)
    assert [reach("char", bptt) for bptt in windows] == [(4, 4), (2, 4), (2, 8), (2, 14), (1, 4), (1, 4)]
    assert [reach("word", bptt) for bptt in windows] == [(1, 1), (1, 2), (1, 4), (1, 7), (1, 4), (1, 4)]
    assert reach("char", 16, horizons=2) == (2, 32)
    assert reach("char", 16, lookahead=9) == (1, 9)
    assert reach("char", 16, fit="descent") == reach("word", 16, fit="descent") == (1, 16)


def test_the_scale_of_many_horizons_by_default():
    """Together they weigh as much as two; what is given holds, and an exact gradient's tail is one."""

    def scale(**given):
        return build(CreditOptions, {"synthesizer": "multi-horizon"} | given).resolve(BPTT).synthetic_scale

    assert [scale(horizons=count) for count in (1, 2, 4, 8)] == [1, 1, 0.5, 0.25]
    assert scale(horizons=4, synthetic_scale="0.9") == 0.9
    assert scale(horizons=4, fit="least-squares") == scale(horizons=4, synthetic_scale="auto") == "auto"
    assert scale(synthesizer="exact", tail=True, horizons=4) == 1


@pytest.mark.parametrize(
    "given", [{}, {"horizons": 3}, {"lookahead": 9}, {"horizons": 2, "lookahead": 6}, {"fit": "descent"}]
)
@pytest.mark.parametrize("tokenizer", ["word", "char"])
def test_a_runs_configuration_leaves_its_sizes_to_follow_from_what_is_given_over_it(given, tokenizer):
    """As though the options that somebody gave had been given with the new ones."""
    asked = {"synthesizer": "multi-horizon", "tokenizer": tokenizer, **given}
    settled = resolve_options(build(LanguageModelOptions, asked), open_corpus())
    recorded = as_given(dataclasses.asdict(settled))
    assert set(given) <= set(recorded)
    for change in ({}, {"bptt": 7}, {"fit": "least-squares"}, {"synthesizer": "paper"}, {"synthesizer": "none"}):
        found, expected = (
            resolve_options(build(LanguageModelOptions, layer, change), open_corpus()) for layer in (recorded, asked)
        )
        assert (found.horizons, found.lookahead) == (expected.horizons, expected.lookahead), change


def test_a_tasks_configuration_does_so_too():
    recorded = tasks_as_given(dataclasses.asdict(settle_task(TaskOptions(synthesizer="none"))))
    assert settle_task(build(TaskOptions, recorded, {"synthesizer": "multi-horizon"})).horizons == HORIZONS
    assert settle_task(TaskOptions(task="adding")).synthesizer == "none"
    assert settle_task(TaskOptions(task="adding", synthesizer="exact")).synthesizer == "exact"
    recorded = tasks_as_given(dataclasses.asdict(settle_task(TaskOptions(horizons=3))))
    assert settle_task(build(TaskOptions, recorded, {"bptt": 2})).horizons == 3


def test_a_configuration_may_hold_a_contradiction_that_the_command_line_removes():
    config = {"tokenizer": "char", "bptt": 4, "synthesizer": "state", "fit": "future"}
    with pytest.raises(ValueError, match="not possible with --synthesizer state"):
        build(LanguageModelOptions, config).resolve(4)
    assert as_given(config) == {**config, "schedule": "constant"}  # the schedule of all runs before there were any
    assert build(LanguageModelOptions, as_given(config), {"synthesizer": "multi-horizon"}).resolve(4).fit == "future"


@pytest.mark.parametrize(("synthesizer", "replay_windows"), [("none", 5), ("basic", 8)])
def test_options_without_effect_count_as_defaults(synthesizer, replay_windows):
    given = {**DEFAULTS["char"], "tokenizer": "char", "hidden": 8, "seed": 2}
    options = LanguageModelOptions(synthesizer=synthesizer, replay_windows=5, fidelity_every=47, **given)
    values = default_values(options, as_given, DEFAULTS["char"])
    assert values["replay_windows"] == replay_windows
    assert values["fidelity_every"] == 0, "it measures the parameters' gradient of every run"
    assert (values["synthesizer"], values["hidden"], values["seed"]) == ("multi-horizon", 256, 1111)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"predict": "past", "fit": "descent"}, "--predict past needs --synthesizer multi-horizon with --fit future"),
        ({"predict": "both", "synthesizer": "exact"}, "--predict both needs --synthesizer multi-horizon"),
        ({"predict": "future", "horizons": 2}, "--horizons 2 needs --predict horizons"),
        ({"predict": "past", "lookahead": 3}, "use --predict-steps in place of --lookahead"),
    ],
    ids=str,
)
def test_what_a_predictor_of_far_steps_does_not_go_with(given, message):
    with pytest.raises(ValueError, match=message):
        CreditOptions(**{"synthesizer": "multi-horizon", **given}).resolve(4)


@pytest.mark.parametrize("predict", ["future", "past", "both"])
def test_what_a_predictor_sees(predict):
    found = CreditOptions(synthesizer="multi-horizon", predict=predict, predict_steps=9).resolve(4)
    assert (found.fit, found.horizons, found.message_count, found.synthetic_scale) == ("future", 1, 1, 1.0)
    assert found.window_lookahead == (0 if predict == "past" else 9)
