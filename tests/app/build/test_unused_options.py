"""What a run is told of its options is true: an option that is named changes no number, one that is not does."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch

import dni_seq as dni
from dni_seq.app.build.credit_options import CreditOptions
from dni_seq.app.build.unused_options import remarks
from dni_seq.app.lm.build import build_model
from dni_seq.app.lm.build_trainer import build_trainer
from dni_seq.app.lm.options import LanguageModelOptions, with_default_sizes
from dni_seq.app.runs.options import build, flag
from tests import problems

BPTT, LANES, WINDOWS = 2, 3, 9

SMALL = {"tokenizer": "char", "embed": 4, "hidden": 6, "layers": 1, "dropout": 0.0, "bptt": BPTT, "batch_size": LANES}

BASES: dict[str, dict[str, Any]] = {
    "none": {"synthesizer": "none"},
    "basic": {"synthesizer": "basic", "synthetic_scale": "0.5"},
    "basic, lambda": {"synthesizer": "basic", "synthetic_scale": "0.5", "targets": "lambda", "replay_windows": 2},
    "paper": {"synthesizer": "paper"},
    "paper, two horizons": {"synthesizer": "paper", "horizons": 2},
    "state": {"synthesizer": "state", "fit": "descent", "synthetic_scale": "0.5", "regress_every": 1},
    "default": {"regress_every": 1},
    "past": {"predict": "past", "predict_steps": 4, "regress_every": 1},
    "both": {"predict": "both", "predict_steps": 5, "regress_every": 1},
    "descent": {"fit": "descent", "synthetic_scale": "0.5", "regress_every": 1},
    "two by descent": {"fit": "descent", "horizons": 2, "synthetic_scale": "0.5", "regress_every": 1},
    "two, lambda": {"horizons": 2, "synthetic_scale": "0.5", "targets": "lambda", "replay_windows": 2, "fit": "descent"},
    "raw": {"fit": "descent", "normalize": False, "synthetic_scale": "0.5", "horizons": 2, "regress_every": 1},
    "tail": {"tail": True, "synthetic_scale": "0.5", "regress_every": 1, "fit": "descent"},
    "exact": {"synthesizer": "exact"},
    "exact with a tail": {"synthesizer": "exact", "tail": True, "regress_every": 1},
    "exact with a fitted tail": {"synthesizer": "exact", "tail": True, "fit": "descent"},
    "gru": {"model": "gru", "fit": "descent", "synthetic_scale": "0.5", "regress_every": 1},
}
"""Runs by what is told apart: each synthesizer, each kind of target, one horizon and several."""

CHANGES: dict[str, Any] = {
    "synthetic_scale": "0.3",
    "discount": 0.4,
    "horizons": 3,
    "tail": True,
    "draw_horizon": True,
    "lookahead": 6,
    "normalize": False,
    "gate": False,
    "synthesizer_hidden": 5,
    "synthesizer_layers": 2,
    "future_units": 7,
    "fit": "descent",
    "message_clip": 0.001,
    "exact_steps": 2,
    "predict": "both",
    "predict_steps": 3,
    "message_every": 1,
    "message_at_end": False,
    "targets": "lambda",
    "lam": 0.2,
    "replay_windows": 3,
    "regress_every": 2,
    "auxiliary": 0.5,
    "target_network": 3,
    "synthesizer_lr": 0.1,
    "synthesizer_clip": 1e-4,
    "synthesizer_vocab_size": 4,
}
"""Every option of credit assignment but the synthesizer itself and `fidelity_every`, which measures, with another value."""

PAPER: dict[str, Any] = {"normalize": True, "gate": True}
"""The published recipe has other defaults."""


def test_every_option_is_changed():
    names = {field.name for field in dataclasses.fields(CreditOptions)} | {"synthesizer_vocab_size"}
    assert names - set(CHANGES) == {"synthesizer", "fidelity_every"}


@functools.cache
def trained(**given: Any) -> list[torch.Tensor]:
    """The parameters of a language model and its synthesizer after a short training with these options, float64."""
    options = with_default_sizes(
        build(LanguageModelOptions, SMALL | {"lr": 1e-2, "clip": 1.0, "synthesizer_lr": 1e-2} | given)
    )
    torch.manual_seed(0)
    model = build_model(options, problems.VOCABULARY, torch.device("cpu")).double()
    trainer = build_trainer(options, model, torch.device("cpu"))
    text = problems.tokens(BPTT * WINDOWS, LANES)
    windows = problems.cut(text, BPTT)
    steps = options.resolve(BPTT).window_lookahead
    for window in dni.with_lookahead(windows, steps) if steps else windows:
        trainer.step(window.inputs, window.targets, lookahead=window.lookahead)
    parts = [model, *([] if trainer.credit is None else [trainer.credit.synthesizer])]
    return [parameter.detach() for part in parts for parameter in part.parameters()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    shapes = [tensor.shape for tensor in one] == [tensor.shape for tensor in other]
    return shapes and all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("base", BASES)
def test_what_is_reported_to_have_no_effect_has_none_and_all_else_has_one(base):
    wrong = []
    unchanged = trained(**BASES[base])  # the base itself is no contradiction
    for name, value in (CHANGES | PAPER if BASES[base].get("synthesizer") == "paper" else CHANGES).items():
        given = BASES[base] | {name: value}
        options = with_default_sizes(build(LanguageModelOptions, SMALL | given))
        try:
            said = remarks(options, BPTT, cells=options.model == "lstm")
            found = trained(**given)
        except ValueError:
            continue  # refused
        if name == "target_network" and base == "default":
            continue  # on one horizon it has none, but it decides that messages are fitted, which is said too
        unused = any(flag(name) in line.split(": ")[1].split(", ") for line in said)
        if unused != same(found, unchanged) and BASES[base].get(name, ...) != value:
            wrong.append((flag(name), "is said to have no effect" if unused else "has no effect"))
    assert wrong == []


def test_defaults_are_not_remarked_on():
    for base in ("none", "default", "basic", "paper", "state", "exact"):
        options = with_default_sizes(
            build(LanguageModelOptions, SMALL | {"synthesizer": BASES[base].get("synthesizer", "multi-horizon")})
        )
        assert remarks(options, BPTT) == []


def test_why_messages_are_fitted_is_reported():
    options = with_default_sizes(build(LanguageModelOptions, SMALL | {"target_network": 5}))
    assert [line for line in remarks(options, BPTT) if line.startswith("messages are regressed")]
    assert not remarks(with_default_sizes(build(LanguageModelOptions, SMALL | {"fit": "least-squares"})), BPTT)
