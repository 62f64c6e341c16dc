"""Warns at the start of a run about options that other options make ineffective."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from dni_seq.app.build.credit_options import CreditOptions
from dni_seq.app.build.resolved_credit import ResolvedCredit
from dni_seq.app.runs.options import flag

_FITTED = ("synthesizer_hidden", "synthesizer_layers")
_FUTURE = ("fit", "future_units", "lookahead", "predict", "predict_steps", "synthesizer_vocab_size")
_LEARNING = (
    "discount",
    "horizons",
    "draw_horizon",
    "normalize",
    "gate",
    "message_clip",
    "regress_every",
    *_FITTED,
    *_FUTURE,
)
_OPTIMIZER = ("synthesizer_lr", "synthesizer_clip")
_TARGETS = ("lam", "target_network")


def remarks(options: CreditOptions, bptt: int, *, cells: bool = True) -> list[str]:
    """Returns one warning per reason for which options have no effect, and a warning if an option makes messages regressed.

    Args:
        options: options with their default sizes filled in.
        bptt: T.
        cells: whether the model is an LSTM.

    Returns:
        The warnings. An option without effect causes no warning if it has its default value.
    """
    found = [
        f"no effect with {reason}: {', '.join(flags)}"
        for reason, names in _reasons(options, bptt, cells)
        if (flags := [flag(name) for name in names if _given(options, name)])
    ]
    hindrance = options.why_regressed(bptt)
    if hindrance is not None:
        found.append(f"messages are regressed on targets: the gradient of a future model is not possible with {hindrance}")
    return found


def credit_in_force(options: CreditOptions, bptt: int, *, cells: bool) -> dict[str, Any]:
    """Returns the value in force of every option of credit assignment by name; None for an option without effect.

    Args:
        options: options with their default sizes filled in.
        bptt: T.
        cells: whether the model is an LSTM.
    """
    without_effect = {name for _, names in _reasons(options, bptt, cells) for name in names}
    resolved = dataclasses.asdict(options.resolve(bptt))
    values = {field.name: resolved.get(field.name, getattr(options, field.name)) for field in dataclasses.fields(options)}
    ours = {*resolved, *without_effect, "synthesizer_lr"}
    return {name: None if name in without_effect else value for name, value in values.items() if name in ours}


def _given(options: CreditOptions, name: str) -> bool:
    """Returns whether an option differs from its default. `--horizons 1` counts as a default."""
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    if name not in defaults:  # an option of another command
        return False
    value = getattr(options, name)
    return value != defaults[name] and not (name == "horizons" and value == 1)


def _reasons(options: CreditOptions, bptt: int, cells: bool) -> Iterator[tuple[str, Iterable[str]]]:
    """Yields pairs: a reason as text, and the names of the options that have no effect for this reason.

    An option may occur with several reasons.
    """
    kind = options.synthesizer
    if kind == "none":
        every = (field.name for field in dataclasses.fields(CreditOptions))
        kept = ("synthesizer", "fidelity_every")
        yield "--synthesizer none", [*(name for name in every if name not in kept), "synthesizer_vocab_size"]
        return
    if kind != "exact":
        yield f"--synthesizer {kind}", ["exact_steps"]
    if kind == "exact" and not options.tail:
        nothing = [*_LEARNING, *_TARGETS, "replay_windows", *([] if options.auxiliary else _OPTIMIZER)]
        yield "--synthesizer exact without --tail", nothing
        return
    if not cells:
        yield "a model without LSTM cells", ["gate"]
    credit = options.resolve(bptt)
    yield from _of_networks(credit)
    yield from _of_targets(credit)


def _of_networks(credit: ResolvedCredit) -> Iterator[tuple[str, Iterable[str]]]:
    """Yields the reasons that concern the synthesizer's network."""
    kind = credit.synthesizer
    if kind == "basic":
        yield "--synthesizer basic", ["tail", "draw_horizon", "horizons", *_FITTED, *_FUTURE]
    elif kind == "paper":
        yield "--synthesizer paper", ["fit", "future_units", *_FITTED]
    elif kind == "state":
        yield "--synthesizer state", ["tail", "draw_horizon"]
    elif kind == "exact":
        yield "--synthesizer exact", ["draw_horizon"]
    if credit.predict == "horizons":
        yield "--predict horizons", ["predict_steps"]
    if credit.fit == "future":
        yield "messages that are the gradient of a future model", [*_FITTED, "draw_horizon"]
    elif kind in ("multi-horizon", "paper") and credit.message_count == 1:
        yield "one horizon", ["draw_horizon"]
    if not credit.normalize:
        yield "messages that are not normalised", ["message_clip"]


def _of_targets(credit: ResolvedCredit) -> Iterator[tuple[str, Iterable[str]]]:
    """Yields the reasons that concern the synthesizer's targets."""
    kind, horizons, fitted = credit.synthesizer, credit.horizons, credit.fit != "future"
    last_on_itself = kind in ("basic", "state") or (kind == "paper" and horizons == 1) or (fitted and credit.tail)
    if credit.targets == "lambda":
        yield "--targets lambda", ["regress_every", "draw_horizon"]
    else:
        yield "--targets bootstrap", ["lam"]
        if not (last_on_itself and credit.fidelity_every):
            yield "--targets bootstrap", ["replay_windows"]
    if kind == "exact" and not fitted:
        yield "a tail that is the gradient of a future model", ["discount", *_TARGETS]
    elif horizons == 1 and not last_on_itself:
        yield "one horizon, whose target is the window's own gradient", ["discount", *_TARGETS]
