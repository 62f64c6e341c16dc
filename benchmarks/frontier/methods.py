"""The methods of the frontier study, built from the classes of the library, as a user builds them.

A trial has the settings `method`, `T`, `rate` (the learning rate) and `seed`. These settings are optional:

    optimizer   "sgd"; Adam if absent
    predict     what the predictor predicts, as in `FutureGradient.for_model`; no predictor if absent
    steps       m, the number of steps that the predictor predicts or that the exact gradient covers; the default if absent
    horizons    K, the number of parts into which these steps are divided; the default if absent
    every       n: a message is injected every n steps inside a window; only at the window's end if absent
    end         False: no message is injected at the window's end
    weight      weight of the predictor's loss, a mean over its m steps, on text; the recommended scale if absent
    gate        False: the predictor reads cells of the LSTM without a bound
    draws       number of steps, drawn at random from the m steps, that the predictor predicts at a time; all if absent
    back        number of windows over which a window's loss is propagated back (`backward_windows`); 1 if absent

Legend: T = window length in steps, B = lanes, m = steps predicted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dni_seq as dni
from dni_seq.core.windows import Reduction
from dni_seq.credit.message_filter import OBSERVED_FIRST
from dni_seq.synthesizers.for_model import Text as PredictedText
from dni_seq.synthesizers.for_model import predictor_for, read_text
from dni_seq.synthesizers.future_gradient import MESSAGE_LIMIT

sys.path.insert(0, str(Path(__file__).parents[1] / "studies"))
from trials import Trial

PREDICTOR_RATE, PREDICTOR_UNITS, CLASSES = 1e-3, 256, 500
"""The predictor's learning rate, its units, and the number of classes that it distinguishes.

Units and classes are those of `FutureGradient.for_model`; the rate is the default of a trainer.
"""


@dataclass(frozen=True)
class Parts:
    """A new model, and the properties of its task that a method needs.

    Attributes:
        model: `model(inputs, state) -> (outputs, state)`.
        loss_fn: `loss_fn(outputs, targets)`, unreduced losses [T, B].
        example: inputs of a window of one lane, [T, 1, ...]; their values do not matter.
        vocabulary: number of token ids, None if inputs are vectors.
        outputs: width of the outputs, None if the outputs are logits of tokens.
        past_loss_fn: unreduced losses [m, B] of predicted input vectors; None if inputs are tokens.
        clip: largest norm of the model's gradient.
        reduction: the argument `reduction` of the trainer.
    """

    model: nn.Module
    loss_fn: Callable[[Any, Tensor], Tensor]
    example: Tensor
    vocabulary: int | None
    outputs: int | None
    past_loss_fn: Callable[[Any, Tensor], Tensor] | None
    clip: float
    reduction: Reduction


def synthesizer_of(trial: Trial, parts: Parts) -> nn.Module | None:
    """Returns the synthesizer of a trial's method, None for truncated BPTT."""
    if trial["method"] == "exact":
        return dni.ExactFuture(parts.model, parts.loss_fn, steps=trial["steps"])
    if "predict" not in trial:
        return None
    if parts.vocabulary is None or "draws" in trial:
        return future_gradient(trial, parts)
    found: dni.FutureGradient = dni.FutureGradient.for_model(
        parts.model,
        parts.loss_fn,
        example_inputs=parts.example,
        vocabulary=parts.vocabulary,
        predict=trial["predict"],
        predict_steps=trial.get("steps"),
        horizons=trial.get("horizons"),
        cells=None if trial.get("gate", True) else False,
    )
    return found


def future_gradient(trial: Trial, parts: Parts) -> dni.FutureGradient:
    """Returns a synthesizer as `FutureGradient.for_model` builds it, except for two differences.

    The synthesizer predicts drawn steps if the trial has `draws`. It does not fix the window length, because the windows of
    a sequence differ in length, and a resumed trial may begin with a short window.
    """
    steps, horizons = trial.get("steps"), trial.get("horizons")
    make: Callable[[int], Any] = predictor_for(
        text_of(parts), trial["T"], trial["predict"], steps, horizons, PREDICTOR_UNITS
    )
    if "draws" in trial:
        make = partial(drawn_past, trial, parts)
    example = parts.model.initial_state(1)  # type: ignore[operator]
    cells = dni.LSTM_CELLS if trial.get("gate", True) else False
    return dni.FutureGradient(example, make, cells=cells, limit=MESSAGE_LIMIT)


def text_of(parts: Parts) -> PredictedText:
    """Returns the description of the inputs and targets that a predictor reads and predicts."""
    return read_text(parts.loss_fn, parts.example, parts.vocabulary, parts.outputs, CLASSES, parts.past_loss_fn)


def drawn_past(trial: Trial, parts: Parts, size: int) -> dni.GatedPast:
    """Returns a predictor of the past that predicts `draws` random steps of the last m at a time."""
    text = text_of(parts)
    sizes = {"units": PREDICTOR_UNITS, "outputs": text.past_width, "draws": trial["draws"]}
    return dni.GatedPast(size, trial["steps"], loss_fn=text.past_loss, **sizes)


def trainer_of(trial: Trial, parts: Parts) -> dni.SequenceTrainer:
    """Returns the trainer of a trial."""
    kind = torch.optim.SGD if trial.get("optimizer") == "sgd" else torch.optim.Adam
    optimizer = kind(parts.model.parameters(), trial["rate"], fused=True)
    synthesizer = synthesizer_of(trial, parts)
    found = dni.SequenceTrainer(
        parts.model,
        optimizer,
        parts.loss_fn,
        synthesizer=synthesizer,
        config=None if synthesizer is None else config_of(trial),
        clip=parts.clip,
        reduction=parts.reduction,
    )
    found.backward_windows = trial.get("back", 1)
    return found


def config_of(trial: Trial) -> dni.SyntheticGradientConfig:
    """Returns the settings of a trial's messages.

    The scale c is 1 for the exact gradient. With a `weight` w, c is w T / m. The reason: a window's mean gives each step the
    weight 1 / (T B), so with scale c each predicted step has the weight c / (T B). The mean over the m steps and B lanes
    then has the weight c m / T, which must equal w. Otherwise c is the scale that the synthesizer recommends.
    """
    settings: dict[str, Any] = {"message_every": trial.get("every"), "message_at_end": trial.get("end", True)}
    if trial["method"] == "exact":
        settings["synthetic_scale"] = 1.0
    elif "weight" in trial:
        settings["synthetic_scale"] = trial["weight"] * trial["T"] / trial["steps"]
    return dni.SyntheticGradientConfig(**settings)


def lookahead_of(trainer: dni.SequenceTrainer) -> int:
    """Returns the number of steps after a window that the trainer's synthesizer reads."""
    synthesizer = None if trainer.credit is None else trainer.credit.synthesizer
    if isinstance(synthesizer, dni.ExactFuture):
        return synthesizer.steps
    return synthesizer.lookahead if isinstance(synthesizer, dni.FutureGradient) else 0


def observed_first(trainer: dni.SequenceTrainer) -> int:
    """Returns the number of first windows that the trainer's synthesizer checks more often, so that they cost more."""
    return 0 if trainer.credit is None else OBSERVED_FIRST


def optimizers_of(trainer: dni.SequenceTrainer) -> list[torch.optim.Optimizer]:
    """Returns the trainer's optimizers: that of the model, then that of the synthesizer if it has one."""
    predictor = None if trainer.credit is None else trainer.credit.optimizer
    return [trainer.optimizer] + ([] if predictor is None else [predictor])


def modules_of(trainer: dni.SequenceTrainer) -> list[nn.Module]:
    """Returns the trainer's model, and its synthesizer if it has one."""
    return [trainer.model] + ([] if trainer.credit is None else [trainer.credit.synthesizer])


def kind_of(trial: Trial) -> str:
    """Returns the kind of a trial's updates: a text of all settings that decide the time and the memory of an update."""
    words = ["messages" if "predict" in trial else trial["method"], f"T={trial['T']}"]
    names = {"predict": "of {}", "horizons": "K={}", "steps": "m={}", "every": "every {}", "draws": "{} drawn"}
    words += [text.format(trial[name]) for name, text in {**names, "back": "{} back"}.items() if name in trial]
    switches = {"end": "no end", "gate": "no gate"}
    words += [text for name, text in switches.items() if not trial.get(name, True)]
    return " ".join(words + ["by SGD"] * (trial.get("optimizer") == "sgd"))
