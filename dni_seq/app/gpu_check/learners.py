"""What the GPU check trains: a language model with each kind of synthesizer, windows for the model, and a plain loop.

Legend: T = window length in steps, B = lanes, V = token ids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

import dni_seq as dni
from dni_seq.models.language_model import LanguageModel, token_losses

Settings = dict[str, Any]
"""Arguments of a `SequenceTrainer`."""


def windows(count: int, steps: int, lanes: int, vocabulary: int, lookahead: int, device: torch.device) -> list[dni.Window]:
    """Returns `count` consecutive windows of random tokens, each with a lookahead of `lookahead` steps. No lane ends."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(vocabulary, (count * steps + lookahead + 1, lanes), generator=generator).to(device)
    found = []
    for start in range(0, count * steps, steps):
        end = start + steps
        ahead = dni.Lookahead(
            text[end : end + lookahead],
            text[end + 1 : end + lookahead + 1],
            torch.ones(lookahead, lanes, dtype=torch.bool, device=device),
        )
        found.append(dni.Window(text[start:end], text[start + 1 : end + 1], lookahead=ahead))
    return found


def future(model: LanguageModel, steps: int, **given: Any) -> dni.FutureGradient:
    """Returns the recommended synthesizer for windows of `steps` steps."""
    example = torch.zeros(steps, 1, dtype=torch.int64, device=model.projection.weight.device)
    vocabulary = model.projection.out_features
    return dni.FutureGradient.for_model(model, token_losses, example_inputs=example, vocabulary=vocabulary, **given)


def encoder(vocabulary: int, steps: int) -> dni.LookaheadEncoder:
    """Returns a lookahead encoder of the next `steps` tokens and their targets."""
    return dni.LookaheadEncoder(steps, nn.Embedding(vocabulary, 8), nn.Embedding(vocabulary, 8))


def heads(model: LanguageModel, steps: int) -> Settings:
    """Returns a synthesizer of two regressed horizons and a tail."""
    shown = encoder(model.projection.out_features, steps)
    settings: dict[str, Any] = {"horizons": 2, "tail": True, "hidden": (16,), "encoder": shown}
    return {"synthesizer": dni.MultiHorizonSynthesizer(model.initial_state(1), **settings)}


def copied(model: LanguageModel, steps: int) -> Settings:
    """Returns a synthesizer of one regressed message, whose bootstrapped targets come from a copy (`target_network`)."""
    synthesizer = dni.StateSynthesizer(
        model.initial_state(1), hidden=(16,), encoder=encoder(model.projection.out_features, steps)
    )
    return {
        "synthesizer": synthesizer,
        "config": dni.SyntheticGradientConfig(target_network=2, synthetic_scale=0.5),
    }


def solved(model: LanguageModel, steps: int) -> Settings:
    """Returns a synthesizer of one message whose head is solved by least squares."""
    shown = encoder(model.projection.out_features, steps)
    return {"synthesizer": dni.LeastSquaresHeads(model.initial_state(1), 1, hidden=(16,), encoder=shown)}


def basic(model: LanguageModel, steps: int) -> Settings:
    """Returns a perceptron that reads each layer's state, with normalised targets."""
    width = 2 * model.hidden
    return {"synthesizer": dni.Normalized(dni.BasicSynthesizer(width, n_hidden=1)), "synthetic_scale": 0.5}


def dense(model: LanguageModel, steps: int) -> Settings:
    """Returns dense messages: every n-th state gets the gradient of a future model of the next n steps. n is at most 5."""
    every = min(5, -(-steps // 2))  # at most half a window, so that a short window too has a message inside
    found = future(model, steps, horizons=1, predict_steps=every)
    return {"synthesizer": found, "config": dni.SyntheticGradientConfig(synthetic_scale=0.1, message_every=every)}


KINDS: Mapping[str, Callable[[LanguageModel, int], Settings]] = MappingProxyType(
    {
        "none": lambda model, steps: {},
        "default": lambda model, steps: {"synthesizer": future(model, steps)},
        "dense": dense,
        "exact": lambda model, steps: {"synthesizer": dni.ExactFuture(model, token_losses, steps=4)},
        "past": lambda model, steps: {"synthesizer": future(model, steps, predict="past", predict_steps=8)},
        "future and past": lambda model, steps: {"synthesizer": future(model, steps, predict="both", predict_steps=8)},
        "basic": basic,
        "regressed horizons": heads,
        "least squares": solved,
        "target network": copied,
    }
)
"""Kinds of trainers by name: what each adds to plain truncated BPTT."""

LOOKAHEAD = 16
"""Length of the windows' lookahead in steps. At T = 3 or 4 no kind of `KINDS` reads more."""


def trainer_of(
    kind: Callable[[LanguageModel, int], Settings],
    model: LanguageModel,
    steps: int,
    device: torch.device,
    lr: float = 1e-3,
) -> dni.SequenceTrainer:
    """Returns a trainer of `model` with fused Adam and the synthesizer of `kind`, a value of `KINDS`."""
    settings = kind(model, steps)
    like = model.projection.weight
    synthesizer: nn.Module | None = settings.get("synthesizer")
    if synthesizer is not None:
        synthesizer.to(device, like.dtype)
        learned = [parameter for parameter in synthesizer.parameters() if parameter.requires_grad]
        if learned:
            settings["synthesizer_optimizer"] = torch.optim.Adam(learned, lr, fused=True)
    optimizer = torch.optim.Adam(model.parameters(), lr, fused=True)
    return dni.SequenceTrainer(model, optimizer, token_losses, clip=1.0, **settings)


def step(trainer: dni.SequenceTrainer, window: dni.Window) -> Tensor:
    """Trains on one window and returns the loss, 0-d. The kinds "none" and "basic", which read no lookahead, get none."""
    reads = trainer.credit is not None and not isinstance(trainer.credit.synthesizer, dni.Normalized)
    lookahead = window.lookahead if reads else None
    return trainer.step(window.inputs, window.targets, mask=window.mask, ends=window.ends, lookahead=lookahead).loss


class PlainLoop:
    """Truncated BPTT in a plain loop: zero_grad, forward, backward, clip, step, detach.

    Args:
        model: the language model.
        lr: learning rate of fused Adam.
    """

    def __init__(self, model: LanguageModel, lr: float = 1e-3) -> None:
        self.model = model
        self.optimizer = torch.optim.Adam(model.parameters(), lr, fused=True)
        self.state: Any = None

    def step(self, window: dni.Window) -> None:
        """Trains on one window."""
        if self.state is None:
            self.state = self.model.initial_state(window.inputs.shape[1])
        self.optimizer.zero_grad()
        logits, state = self.model(window.inputs, tuple(leaf.detach() for leaf in self.state))
        token_losses(logits, window.targets).mean().backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.state = state
