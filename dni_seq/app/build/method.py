"""Describes a run: its model in a line, its method in a few words and in a sentence, and the curves that it lacks."""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType
from typing import TYPE_CHECKING

from dni_seq.app.build.backpropagation_options import BackpropagationOptions
from dni_seq.app.build.resolved_credit import ResolvedCredit

if TYPE_CHECKING:
    from torch import nn

_TRACES = MappingProxyType(
    {
        "exact": "traces bring the exact credit",
        "snap1": "SnAp-1 traces bring approximate credit",
        "factored": "factored traces bring approximate credit",
    }
)


def describe_method(credit: ResolvedCredit, options: BackpropagationOptions) -> str:
    """Returns one sentence on the gradients that cross the end of a window, and on how a synthetic gradient is learned."""
    window = f"window of {_count(credit.bptt, 'step')}"
    traces = [] if options.traces is None else [f"{_TRACES[options.traces]} of earlier steps to the recurrent parameters"]
    if credit.synthesizer == "none":
        steps = options.backward_steps or credit.bptt
        if steps > credit.bptt:
            crossing = f"the losses of each {window} are propagated back over the last {steps} steps"
        else:
            crossing = f"no gradient crosses the end of a {window}" + (" backwards" if traces else "")
        return "; ".join([f"Truncated BPTT (none): {crossing}", *traces]) + "."
    parts = [f"After each {window}, {_message(credit)} ({credit.synthesizer}) is {_use(credit)}"]
    if credit.synthesizer != "exact" or credit.tail:
        parts.append(_training(credit))
    if credit.message_every < credit.bptt:
        end = "" if credit.message_at_end else ", and not at its end"
        parts.append(f"messages also reach the states every {_count(credit.message_every, 'step')} inside the window{end}")
    if credit.auxiliary:
        parts.append(f"an auxiliary task of weight {credit.auxiliary:g} predicts the next message")
    return "; ".join([*parts, *traces]) + "."


def brief_method(credit: ResolvedCredit, options: BackpropagationOptions) -> str:
    """Returns the method of credit assignment in a few words, for the screen."""
    window = f"windows of T = {credit.bptt}"
    if credit.synthesizer == "none":
        parts = ["truncated BPTT", window]
    else:
        parts = [f"synthetic gradients by {credit.synthesizer}", window, *_brief_messages(credit)]
    if (options.backward_steps or 0) > credit.bptt:
        parts.append(f"backward over {options.backward_steps} steps")
    if options.checkpoint_every is not None:
        parts.append(f"recomputed in chunks of {_count(options.checkpoint_every, 'step')}")
    if options.traces is not None:
        parts.append(f"{options.traces} traces")
    return ", ".join(parts)


def describe_model(model: nn.Module, cell: str, layers: int, units: int) -> str:
    """Returns a line on a model for the screen: its cells, layers and number of parameters."""
    deep = "1 layer" if layers == 1 else f"{layers} layers"
    count = in_words(sum(parameter.numel() for parameter in model.parameters()))
    return f"model: {cell.upper()}, {deep} of {units} units, {count} parameters"


def in_words(count: int) -> str:
    """Returns a count in at most three digits and a unit: "870", "87 K", "1.2 M"."""
    for size, unit in ((10**9, " G"), (10**6, " M"), (10**3, " K")):
        if round(count / size, 1) >= 1:
            number = count / size
            return f"{number:.1f}{unit}" if number < 9.95 else f"{number:.0f}{unit}"
    return str(count)


def _brief_messages(credit: ResolvedCredit) -> Iterator[str]:
    """Yields short descriptions: what the messages are gradients of, the lookahead, and the states inside a window."""
    if credit.predict != "horizons":
        yield f"of {_predicted(credit)}"
    elif credit.synthesizer in ("multi-horizon", "paper"):
        yield _count(credit.horizons, "horizon")
    if credit.window_lookahead and credit.predict == "horizons":
        yield f"lookahead {credit.window_lookahead}"
    if credit.message_every < credit.bptt:
        end = "" if credit.message_at_end else ", not at the end"
        yield f"messages every {_count(credit.message_every, 'step')}{end}"


def unwritten_keys(credit: ResolvedCredit, *, measures: bool = False, moves: bool = False) -> Iterator[str]:
    """Yields the first characters of the TensorBoard keys that a run does not write, or writes with one constant value.

    Args:
        credit: the settings in force.
        measures: whether the run compares the parameters' gradient with that of full BPTT.
        moves: whether the injected share follows the learning rate.
    """
    if not measures:
        yield "fidelity/parameters_cosine"
    if credit.synthesizer == "none":
        yield from ("synthetic/", "fidelity/cosine", "fidelity/r2", "gradient/synthesizer_norm")
        return
    exact = credit.synthesizer == "exact"
    learns = credit.tail or not exact
    written = {
        "fidelity/cosine": credit.fidelity_every > 0,
        "fidelity/r2": credit.fidelity_every > 0,
        "synthetic/scale": moves or credit.synthetic_scale == "auto",  # else c is constant, and `describe_method` names it
        "synthetic/loss": learns,
        "synthetic/cosine": learns,
        # The ratio needs the target of the first horizon. Neither exact gradients nor replayed windows have this target.
        "synthetic/injected_ratio": not exact and credit.targets == "bootstrap",
        "gradient/synthesizer_norm": learns or credit.auxiliary > 0,
    }
    yield from (key for key, is_written in written.items() if not is_written)


def _message(credit: ResolvedCredit) -> str:
    """Returns the message in words, as a noun in the singular, with the steps that it is a gradient of."""
    if credit.synthesizer == "exact":
        exact = f"the exact gradient of the next {_count(credit.exact_steps, 'step')}"
        return f"{exact} plus a synthetic gradient of later steps" if credit.tail else exact
    if credit.predict != "horizons":
        return f"the gradient of a small model's loss on {_predicted(credit)}"
    if credit.synthesizer == "multi-horizon" or credit.message_count > 1:
        windows = "the next window" if credit.horizons == 1 else f"each of the next {credit.horizons} windows"
        return f"a synthetic gradient of {windows}" + (" and of all windows after them" if credit.tail else "")
    return "a synthetic gradient of all later windows"


def _predicted(credit: ResolvedCredit) -> str:
    """Returns what a predictor predicts if it predicts a number of steps (`predict_steps`) instead of horizons."""
    steps = credit.predict_steps
    future, past = f"the next {_count(steps, 'step')}", f"the last {_count(steps, 'input')}"
    return {"future": future, "past": past, "both": f"{future} and {past}"}[credit.predict]


def _use(credit: ResolvedCredit) -> str:
    """Returns how the message is injected, as a participle."""
    if credit.synthetic_scale == "auto":
        return f"injected, scaled by a comparison with exact gradients every {_count(credit.fidelity_every, 'window')}"
    if credit.synthetic_scale == 0:
        return "predicted, but not injected (scale 0)"
    return f"injected with scale {credit.synthetic_scale:g}"


def _training(credit: ResolvedCredit) -> str:
    """Returns how the synthetic gradient is learned."""
    if credit.predict != "horizons":
        return "the model trains on the same steps at every window"
    steps = f"the next {_count(credit.lookahead, 'step')}" if credit.lookahead > 1 else "the next step"
    if credit.fit == "future":
        later = f"{steps} after them" if credit.synthesizer == "exact" else steps
        model = f"the loss of a small model of {later}, which trains on these steps at every window"
        return f"the synthetic gradient is that of {model}"
    source = "the state" if not credit.lookahead else f"the state and {steps}"
    if credit.next_input_only:
        source += "'s input"
    # The kinds "basic" and "paper" have no heads that least squares could fit.
    solved = credit.fit == "least-squares" and credit.synthesizer in ("state", "multi-horizon", "exact")
    heads = " by least-squares heads" if solved else ""
    regressed = f"the synthetic gradient is regressed{heads} from {source}"
    if credit.targets == "lambda":
        return f"{regressed} on λ-targets (λ = {credit.lam:g}) of {_count(credit.replay_windows, 'replayed window')}"
    often = "every window" if credit.regress_every == 1 else f"one window in {credit.regress_every}"
    return f"{regressed} on targets at {often}"


def _count(number: int, name: str) -> str:
    """Returns a number with its noun, such as "1 step" or "5 steps"."""
    return f"{number} {name}" if number == 1 else f"{number} {name}s"
