"""The sentence on a run's method, for each kind of synthesizer. tests/app/tasks/test_train.py compares `unwritten_keys` with
the curves of real runs."""

from __future__ import annotations

import pytest

from dni_seq.app.build.backpropagation_options import BackpropagationOptions
from dni_seq.app.build.credit_options import SYNTHESIZERS, CreditOptions
from dni_seq.app.build.method import describe_method

AFTER = "After each window of 5 steps, "
AUTO = "injected, scaled by a comparison with exact gradients every 47 windows; the synthetic gradient is regressed"
MODEL = "; the synthetic gradient is that of the loss of a small model of the next"
TRAINS = "which trains on these steps at every window."

SENTENCES = {
    "none": (
        {"synthesizer": "none"},
        "Truncated BPTT (none): no gradient crosses the end of a window of 5 steps.",
    ),
    "multi-horizon": (
        {},
        "a synthetic gradient of each of the next 2 windows (multi-horizon) is injected with scale 1"
        f"{MODEL} 10 steps, {TRAINS}",
    ),
    "multi-horizon, not injected": (
        {"horizons": 1, "synthetic_scale": "0", "auxiliary": 0.5},
        f"a synthetic gradient of the next window (multi-horizon) is predicted, but not injected (scale 0){MODEL} 5 steps, "
        f"{TRAINS[:-1]}; an auxiliary task of weight 0.5 predicts the next message.",
    ),
    "multi-horizon, regressed": (
        {"horizons": 3, "tail": True},
        f"a synthetic gradient of each of the next 3 windows and of all windows after them (multi-horizon) is {AUTO} by "
        "least-squares heads from the state and the next 15 steps on targets at one window in 4.",
    ),
    "multi-horizon, lambda": (
        {"targets": "lambda", "lam": 0.5, "lookahead": 0, "fit": "descent", "replay_windows": 1},
        f"a synthetic gradient of the next window (multi-horizon) is {AUTO} from the state on λ-targets (λ = 0.5) of "
        "1 replayed window.",
    ),
    "multi-horizon, past": (
        {"predict": "past", "predict_steps": 9},
        "the gradient of a small model's loss on the last 9 inputs (multi-horizon) is injected with scale 1; the model "
        "trains on the same steps at every window.",
    ),
    "multi-horizon, both": (
        {"predict": "both"},
        "the gradient of a small model's loss on the next 40 steps and the last 40 inputs (multi-horizon) is injected with "
        "scale 1; the model trains on the same steps at every window.",
    ),
    "basic": (
        {"synthesizer": "basic"},
        f"a synthetic gradient of all later windows (basic) is {AUTO} from the state on targets at every window.",
    ),
    "paper": (
        {"synthesizer": "paper"},
        "a synthetic gradient of all later windows (paper) is injected with scale 0.1; the synthetic gradient is regressed "
        "from the state and the next step's input on targets at every window.",
    ),
    "paper, horizons": (
        {"synthesizer": "paper", "horizons": 2, "lookahead": 1},
        "a synthetic gradient of each of the next 2 windows (paper) is injected with scale 0.1; the synthetic gradient is "
        "regressed from the state and the next step on targets at every window.",
    ),
    "state": (
        {"synthesizer": "state"},
        f"a synthetic gradient of all later windows (state) is {AUTO} by least-squares heads from the state and the next "
        "5 steps on targets at one window in 3.",
    ),
    "exact": (
        {"synthesizer": "exact", "exact_steps": 1},
        "the exact gradient of the next 1 step (exact) is injected with scale 1.",
    ),
    "exact, tail": (
        {"synthesizer": "exact", "tail": True},
        "the exact gradient of the next 4 steps plus a synthetic gradient of later steps (exact) is injected with scale 1"
        f"{MODEL} 5 steps after them, {TRAINS}",
    ),
}


@pytest.mark.parametrize("kind", SENTENCES)
def test_a_sentence_says_what_is_injected_and_how_it_is_learned(kind):
    options, sentence = SENTENCES[kind]
    expected = sentence if kind == "none" else AFTER + sentence
    assert describe_method(CreditOptions(**options).resolve(5), BackpropagationOptions()) == expected


def test_every_kind_of_synthesizer_has_a_sentence():
    assert {kind.split(",")[0] for kind in SENTENCES} == set(SYNTHESIZERS)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            {"backward_steps": 20},
            "Truncated BPTT (none): the losses of each window of 5 steps are propagated back over the last 20 steps.",
        ),
        (
            {"traces": "exact"},
            "Truncated BPTT (none): no gradient crosses the end of a window of 5 steps backwards; traces bring the exact "
            "credit of earlier steps to the recurrent parameters.",
        ),
    ],
)
def test_gradients_over_earlier_steps_are_named(given, sentence):
    none = CreditOptions(synthesizer="none").resolve(5)
    assert describe_method(none, BackpropagationOptions(**given)) == sentence
    with_messages = describe_method(CreditOptions().resolve(5), BackpropagationOptions(traces="factored"))
    assert with_messages.endswith("; factored traces bring approximate credit of earlier steps to the recurrent parameters.")
