"""Trainers with every kind of synthesizer, and windows for them."""

from __future__ import annotations

import torch
from torch import nn

import dni_seq as dni
from dni_seq.synthesizers.multi_horizon import Horizons
from tests import problems
from tests.training import LANES, sequence_trainer, trainer_initial

T = 3


KINDS = {
    "bootstrap": {"settings": {}},
    "lambda": {"settings": {"targets": "lambda", "lam": 0.7, "replay_windows": 4}},
    "target-network": {"settings": {"target_network": 3}},
    "auto": {"settings": {"synthetic_scale": "auto", "fidelity_every": 3, "replay_windows": 2}},
    "multi-horizon": {"horizons": {"horizons": 2, "tail": True}, "settings": {"target_network": 3}},
    "multi-horizon-drawn": {"horizons": {"horizons": 2, "draw": True}, "settings": {}},
    "multi-horizon-auto": {"horizons": {"horizons": 2}, "settings": {"synthetic_scale": "auto", "fidelity_every": 3}},
    "future-gradient": {"future": 1, "settings": {"regress_every": 3}},
    "future-gradient-auto": {"future": 3, "settings": {"synthetic_scale": "auto", "fidelity_every": 3}},
    "multi-horizon-lambda": {"horizons": {"horizons": 2}, "settings": {"targets": "lambda", "replay_windows": 4}},
}


def make_trainer(model, kind, lr=1e-2, synthesizer_lr=1e-2, **settings):
    torch.manual_seed(5)
    encoder = dni.LookaheadEncoder(T, nn.Embedding(problems.VOCABULARY, 4), nn.Embedding(problems.VOCABULARY, 4))
    common = {"cells": model.cells, "batch_dim": model.state_batch_dim, "hidden": (16,), "encoder": encoder}
    choice = KINDS[kind]
    if "horizons" in choice:
        synthesizer = dni.MultiHorizonSynthesizer(trainer_initial(model), **common, **choice["horizons"])
    elif "future" in choice:
        synthesizer = future_gradient(model, choice["future"])
    else:
        synthesizer = dni.StateSynthesizer(trainer_initial(model), **common)
    synthesizer.double()
    return sequence_trainer(
        model,
        torch.optim.Adam(model.parameters(), lr),
        problems.mean,
        synthesizer=synthesizer,
        state_batch_dim=model.state_batch_dim,
        **{
            "initial_state": lambda lanes: trainer_initial(model),
            "synthesizer_optimizer": torch.optim.Adam(synthesizer.parameters(), synthesizer_lr),
            "synthetic_scale": 0.5,
            "discount": 0.8,
            **choice["settings"],
            **settings,
        },
    )


def future_gradient(model, horizons=1, **settings):
    """Messages of one window of T steps, or of each of its steps."""

    def future(size):
        embedding = nn.Embedding(problems.VOCABULARY, 4)
        sizes = {"inputs_width": 4, "outputs": problems.VOCABULARY, "units": 16}
        return dni.FutureModel(size, T, inputs=embedding, loss_fn=problems.unreduced, parts=horizons, **sizes)

    common = {"cells": model.cells, "batch_dim": model.state_batch_dim, "limit": 10.0}
    heads = dni.FutureGradient(trainer_initial(model), future, **common | settings)
    return Horizons(heads, horizons=horizons).double()


def windows_of(steps, ends=None):
    return list(dni.with_lookahead(problems.cut(problems.tokens(steps, LANES), T, ends), T))


def steps(trainer, windows):
    return [trainer.step(w.inputs, w.targets, ends=w.ends, lookahead=w.lookahead) for w in windows]
