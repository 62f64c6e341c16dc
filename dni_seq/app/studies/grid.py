"""The constants of the study of synthetic gradients: columns, budgets, learning rates, and the variants of the ablation."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from dni_seq.synthesizers.defaults import HORIZONS, default_horizons, default_scale

FIDELITY_EVERY = 499
"""Windows between comparisons with exact gradients in columns that make no comparisons by default."""


COLUMNS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "none": {"synthesizer": "none"},
        "paper": {"synthesizer": "paper", "fidelity_every": FIDELITY_EVERY},
        "paper-aux": {"synthesizer": "paper", "fidelity_every": FIDELITY_EVERY, "auxiliary": 0.1},
        "multi-horizon": {"synthesizer": "multi-horizon"},
        "exact": {"synthesizer": "exact", "exact_steps": 4},
    }
)
"""The columns of the tables, with their options. The budget and the learning rates give the other options."""


LEARNING_RATES = (1e-3, 2e-3, 4e-3, 8e-3)


SYNTHESIZER_LEARNING_RATES = (3e-4, 1e-3)


LEARNS = ("paper", "paper-aux", "multi-horizon")
"""Columns with a trained synthesizer, whose learning rate is tuned."""


TUNING_SEED = 1000
"""The seed of tuning runs, which no run of the tables uses."""


TUNING_SHARE = 4


class TableCell(NamedTuple):
    """A cell of the study's tables, which holds one trial per seed.

    Attributes:
        task: "ptb", "copy" or "repeat-copy".
        bptt: T, the window length in steps.
        column: a key of `COLUMNS`.
        budget: a key of `BUDGETS`.
    """

    task: str
    bptt: int
    column: str
    budget: str


class Budget(NamedTuple):
    """The size of a study's networks and trainings.

    Attributes:
        text: options for text; `max_tokens` is the length of a run.
        task: options for copy and repeat copy; `updates` is the length of a run.
        start: initial number of vectors of the copy task, None for one vector.
        rates: learning rates of network and synthesizer that are used if nothing is tuned. None if tuning is required.
    """

    text: Mapping[str, Any]
    task: Mapping[str, Any]
    start: int | None
    rates: tuple[float, float] | None


_CHARACTERS = {"tokenizer": "char", "layers": 1, "dropout": 0.0}


_SMALL_TEXT = {**_CHARACTERS, "embed": 64, "hidden": 256, "batch_size": 64}


_SMALL_TASK = {"hidden": 256, "layers": 1, "batch_size": 32, "updates": 20_000}


BUDGETS: Mapping[str, Budget] = MappingProxyType(
    {
        "small": Budget({**_SMALL_TEXT, "max_tokens": 2_000_000}, _SMALL_TASK, None, None),
        # Units, batch, learning rate and initial length are from the paper; embedding, lanes and training length are ours.
        "paper": Budget(
            {**_CHARACTERS, "embed": 256, "hidden": 1024, "batch_size": 64, "max_tokens": 100_000_000},
            {"hidden": 256, "layers": 1, "batch_size": 256, "updates": 500_000},
            5,
            (7e-5, 7e-5),
        ),
        "ablation": Budget({**_SMALL_TEXT, "max_tokens": 1_000_000}, {**_SMALL_TASK, "updates": 10_000}, None, None),
    }
)


VALIDATIONS = 10
"""Number of evenly spaced validations in a run on text. A shorter tuning run validates after the same number of tokens."""


ABLATION = (("ptb", 1), ("copy", 4))
"""The tasks of the ablation, each with its T."""


def without(bptt: int) -> dict[str, dict[str, Any]]:
    """Returns the variants of the default by name: the options that remove or replace a part of the default.

    The variants called "fitted ..." and "one ... message ..." regress messages, with two horizons or one message.
    """
    fitted = {"fit": "least-squares", "horizons": HORIZONS}
    message = {"synthesizer": "state"}
    usual = default_horizons(bptt)
    return {
        "default": {},
        "fitted to targets": fitted,
        "fitted, c = 1": {**fitted, "synthetic_scale": "1"},
        "fitted, no model of the future": {**fitted, "future_units": 0},
        "fitted, no lookahead": {**fitted, "lookahead": 0},
        # Targets that are not normalised exclude a future model, least-squares heads and a limit in units of their RMS.
        "fitted by descent, no normalisation, model of the future or limit": {
            **fitted,
            "fit": "descent",
            "normalize": False,
        },
        "fitted, with a tail": {**fitted, "tail": True},
        "no gate": {"gate": False},
        **{f"c = {c}": {"synthetic_scale": c} for c in ("0.5", "1") if float(c) != default_scale(usual)},
        "automatic scale": {"synthetic_scale": "auto"},
        **{f"K = {count}, c = 1": {"horizons": count, "synthetic_scale": "1"} for count in (1, 2, 4) if count != usual},
        "auxiliary task": {"auxiliary": 0.1},
        "one bootstrapped message, γ = 0.9": message,
        "one bootstrapped message, c = γ = 0.5": {**message, "synthetic_scale": "0.5", "discount": 0.5},
        "one message, λ-targets": {**message, "targets": "lambda"},
    }


def added(bptt: int) -> dict[str, dict[str, Any]]:
    """Returns the variants of the published recipe by name: the options that add one part to the recipe."""
    return {
        "paper": {},
        "lookahead": {"lookahead": HORIZONS * bptt},
        "normalisation": {"normalize": True},
        "gate": {"gate": True},
        "c and γ apart, γ = 0.9": {"discount": 0.9},
        "K = 2": {"horizons": 2},
        "K = 1 and a tail": {"tail": True},
        "λ-targets": {"targets": "lambda"},
        "auxiliary task": {"auxiliary": 0.1},
        "automatic scale": {"synthetic_scale": "auto"},
    }
