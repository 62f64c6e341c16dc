"""The methods of the study on words: truncated BPTT, multi-token heads, messages of a predictor, and methods of the library.

Legend: T = window length in steps, B = lanes, m = steps predicted, S = numbers in a lane's packed state.
"""

from __future__ import annotations

import collections
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dni_seq as dni
from dni_seq.models.language_model import LanguageModel, token_losses

sys.path.insert(0, str(Path(__file__).parents[1] / "studies"))
from trials import Trial

LANES, UNITS, CLIP = 20, 200, 0.25
STEPS_PREDICTED = 5
"""m, the number of steps that predictors and multi-token heads predict."""

WORDS_PREDICTED = 500
"""Number of classes that predictors and multi-token heads distinguish: the most frequent words, and one for all others."""

EMBED, PREDICTOR_UNITS, PREDICTOR_RATE = 32, 256, 1e-3


class Text:
    """A split as lanes of word ids [steps, B]."""

    def __init__(self, folder: Path, split: str, vocabulary: dict[str, int] | None = None) -> None:
        words = (folder / f"ptb.{split}.txt").read_text().replace("\n", " <eos> ").split()
        if vocabulary is None:
            vocabulary = {word: i for i, (word, _) in enumerate(collections.Counter(words).most_common())}
        self.vocabulary = vocabulary
        ids = torch.tensor([vocabulary.get(word, vocabulary["<unk>"]) for word in words])
        steps = len(ids) // LANES
        self.lanes = ids[: steps * LANES].view(LANES, steps).t().contiguous()

    def window(self, start: int, steps: int) -> tuple[Tensor, Tensor]:
        """Returns the inputs and the targets [T, B] of the window that begins at step `start`."""
        return self.lanes[start : start + steps], self.lanes[start + 1 : start + steps + 1]

    def lookahead(self, starts: list[int], steps: int) -> dni.Lookahead:
        """Returns the `steps` steps from each of `starts` on, side by side along the batch dimension.

        With n starts and m steps the lookahead's tensors are [m, n B].
        """
        inputs, targets = zip(*(self.window(start, steps) for start in starts), strict=True)
        side_by_side = torch.cat(inputs, 1)
        return dni.Lookahead(side_by_side, torch.cat(targets, 1), torch.ones_like(side_by_side, dtype=torch.bool))


class FirstWords(nn.Embedding):
    """An embedding of the most frequent words. All other words share the last row."""

    def forward(self, ids: Tensor) -> Tensor:
        """Returns the embeddings [..., E] of ids [...]."""
        return super().forward(ids.clamp(max=self.num_embeddings - 1))


def first_words_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns the cross-entropy [m, B] among the most frequent words and one class for all other words."""
    return token_losses(logits, targets.clamp(max=WORDS_PREDICTED - 1))


class Truncated:
    """Truncated BPTT in a plain loop. Methods that are not in the library are subclasses, which extend `roots`.

    Args:
        model: the language model.
        trial: the settings.

    Attributes:
        reach: number of steps after the window that a method reads.
        extra: a module that trains together with the model, None for no module.
    """

    reach = 0

    def __init__(self, model: LanguageModel, trial: Trial) -> None:
        self.model, self.window, self.weight = model, trial["T"], trial.get("weight", 1.0)
        self.optimizer = torch.optim.Adam(model.parameters(), trial["lr"], fused=True)
        self.extra = self.build_extra(model)
        self.extra_optimizer = None
        if self.extra is not None:
            self.extra_optimizer = torch.optim.Adam(self.extra.parameters(), PREDICTOR_RATE, fused=True)
        self.restart()

    def build_extra(self, model: LanguageModel) -> nn.Module | None:
        """Returns the module that trains together with the model, None for no module."""
        return None

    def restart(self) -> None:
        """Resets the state of all lanes to the initial state."""
        self.state: Any = self.model.initial_state(LANES)

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The optimizers. The learning rates of all of them follow the schedule."""
        return [self.optimizer] + ([] if self.extra_optimizer is None else [self.extra_optimizer])

    def step(self, text: Text, start: int) -> None:
        """Makes one update on the window that begins at step `start`."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.state = tuple(leaf.detach() for leaf in self.state)
        roots, gradients = self.roots(text, start)
        torch.autograd.backward(roots, gradients)
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        for optimizer in self.optimizers:
            optimizer.step()

    def roots(self, text: Text, start: int) -> tuple[list[Tensor], list[Tensor | None]]:
        """Runs the model. Returns the tensors from which the backward pass starts, and their gradients (None for a loss)."""
        inputs, targets = text.window(start, self.window)
        outputs, self.state = self.model(inputs, self.state)
        return [token_losses(outputs, targets).mean()], [None]

    def state_dict(self) -> dict[str, Any]:
        """Returns the content of a checkpoint."""
        modules = [self.model] + ([] if self.extra is None else [self.extra])
        parts = [part.state_dict() for part in (*modules, *self.optimizers)]
        return {"parts": parts, "state": [leaf.detach() for leaf in self.state]}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        modules = [self.model] + ([] if self.extra is None else [self.extra])
        for part, value in zip((*modules, *self.optimizers), saved["parts"], strict=True):
            part.load_state_dict(value)
        self.state = tuple(saved["state"])


class MultiToken(Truncated):
    """Truncated BPTT with further heads, which read the top layer at every step and predict the words 2 to m steps later.

    The mean of the heads' losses has the weight `weight`.
    """

    reach = STEPS_PREDICTED

    def build_extra(self, model: LanguageModel) -> nn.Module:
        """Returns m - 1 hidden layers, one for each head, and a layer from hidden units to words, which all heads share."""
        heads = [nn.Sequential(nn.Linear(UNITS, PREDICTOR_UNITS), nn.Tanh()) for _ in range(STEPS_PREDICTED - 1)]
        model.projection.register_forward_pre_hook(self.keep_top)
        return nn.ModuleList([*heads, nn.Linear(PREDICTOR_UNITS, WORDS_PREDICTED)])

    def keep_top(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Stores the input of the projection, [T, B, H]: the output of the top layer."""
        self.top = inputs[0]

    def roots(self, text: Text, start: int) -> tuple[list[Tensor], list[Tensor | None]]:
        """Returns the window's loss plus `weight` times the mean of the heads' losses."""
        (loss,), _ = super().roots(text, start)
        assert isinstance(self.extra, nn.ModuleList)
        *heads, words = self.extra
        further = loss.new_zeros(())
        for distance, head in enumerate(heads, start=1):
            _, targets = text.window(start + distance, self.window)
            further = further + first_words_losses(words(head(self.top)), targets).mean()
        return [loss + self.weight / len(heads) * further], [None]


class Messages(Truncated):
    """Truncated BPTT with messages. A predictor of the next m steps reads states inside the window and at its end.

    The message at a state is the gradient of the predictor's loss at that state. This loss is the mean over the m steps and
    the lanes, times `weight`.
    """

    reach = STEPS_PREDICTED
    inner, end = True, True

    def __init__(self, model: LanguageModel, trial: Trial) -> None:
        super().__init__(model, trial)
        self.every = trial.get("every", self.window)

    def build_extra(self, model: LanguageModel) -> nn.Module:
        """Returns the predictor: a tanh layer that reads the packed state and the next inputs, and a layer to the words."""
        size = sum(leaf.numel() for leaf in model.initial_state(1))
        embedding = FirstWords(WORDS_PREDICTED, EMBED)
        sizes = {"inputs_width": EMBED, "outputs": WORDS_PREDICTED, "units": PREDICTOR_UNITS}
        return dni.FutureModel(size, STEPS_PREDICTED, inputs=embedding, loss_fn=first_words_losses, **sizes)

    def roots(self, text: Text, start: int) -> tuple[list[Tensor], list[Tensor | None]]:
        """Returns the window's loss and the states that get messages, and as gradients None and the messages."""
        inputs, targets = text.window(start, self.window)
        outputs, states, starts = [], [], []
        for first in range(0, self.window, self.every):
            last = min(first + self.every, self.window)
            output, self.state = self.model(inputs[first:last], self.state)
            outputs.append(output)
            if self.end if last == self.window else self.inner:
                states.append(self.state)
                starts.append(start + last)
        loss = token_losses(torch.cat(outputs), targets).mean()
        leaves = [torch.cat([state[i] for state in states], 1) for i in range(2)]
        gradients = self.messages(leaves, text.lookahead(starts, STEPS_PREDICTED), len(states))
        return [loss, *leaves], [None, *gradients]

    def messages(self, leaves: list[Tensor], lookahead: dni.Lookahead, count: int) -> list[Tensor]:
        """Returns the messages for (h, c) at `count` states, each [L, count B, H], side by side along the batch dimension.

        The predictor trains in the same backward pass.
        """
        assert isinstance(self.extra, dni.FutureModel)
        hidden, cells = (leaf.detach().requires_grad_() for leaf in leaves)
        packed = torch.cat([*hidden.unbind(), *torch.tanh(cells).unbind()], 1)
        self.extra.loss(packed, lookahead).backward()
        # The loss is a mean over all states. Times `count`, the loss of each state is a mean over its lanes.
        return [leaf.grad * (count * self.weight) for leaf in (hidden, cells) if leaf.grad is not None]


class InnerMessages(Messages):
    """Messages only at states inside the window: an auxiliary loss, which carries no credit from later windows."""

    end = False


class EndMessage(Messages):
    """Only the message at the window's end, which is credit from the steps after the window."""

    inner = False


class Trained:
    """Base class of the methods of the library: `SequenceTrainer` with a synthesizer, as a user has it."""

    reach = STEPS_PREDICTED

    def __init__(self, model: LanguageModel, trial: Trial) -> None:
        optimizer = torch.optim.Adam(model.parameters(), trial["lr"], fused=True)
        synthesizer, learns = self.synthesizer(model, trial["T"])
        second = None
        if synthesizer is not None and learns:
            second = torch.optim.Adam(synthesizer.parameters(), PREDICTOR_RATE, fused=True)
        self.trainer = dni.SequenceTrainer(
            model,
            optimizer,
            token_losses,
            synthesizer=synthesizer,
            synthesizer_optimizer=second,
            config=dni.SyntheticGradientConfig(
                synthetic_scale=1.0, discount=1.0, synthesizer_clip=math.inf, regress_every=100 if learns else 1
            ),
            clip=CLIP,
        )
        self.optimizers = [optimizer] + ([] if second is None else [second])
        self.window = trial["T"]

    def synthesizer(self, model: LanguageModel, window: int) -> tuple[nn.Module | None, bool]:
        """Returns the synthesizer, and whether it has parameters to train."""
        raise NotImplementedError

    def restart(self) -> None:
        """Resets the state of all lanes to the initial state."""
        self.trainer.reset()

    def step(self, text: Text, start: int) -> None:
        """Makes one update on the window that begins at step `start`."""
        lookahead = text.lookahead([start + self.window], self.reach) if self.reach else None
        self.trainer.step(*text.window(start, self.window), lookahead=lookahead)

    def state_dict(self) -> dict[str, Any]:
        """Returns the content of a checkpoint."""
        return self.trainer.state_dict()

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.trainer.load_state_dict(saved, LANES)


class Plain(Trained):
    """Truncated BPTT by `SequenceTrainer`."""

    reach = 0

    def synthesizer(self, model: LanguageModel, window: int) -> tuple[nn.Module | None, bool]:
        """Returns no synthesizer."""
        return None, False


class Exact(Trained):
    """The exact gradient of the next 4 steps at the window's end."""

    reach = 4

    def synthesizer(self, model: LanguageModel, window: int) -> tuple[nn.Module, bool]:
        """Returns `ExactFuture` of 4 steps."""
        return dni.ExactFuture(model, token_losses, steps=self.reach, window=window), False


class MultiHorizon(Trained):
    """The default method of the command by words: messages that are gradients of a future model of the next 5 words.

    The study uses this method at T = 5, where 5 words are the next window.
    """

    def synthesizer(self, model: LanguageModel, window: int) -> tuple[nn.Module, bool]:
        """Returns a `FutureGradient` of one horizon."""

        def future(size: int) -> dni.FutureModel:
            embedding = FirstWords(WORDS_PREDICTED, EMBED)
            sizes = {"inputs_width": EMBED, "outputs": WORDS_PREDICTED, "units": PREDICTOR_UNITS}
            return dni.FutureModel(size, self.reach, inputs=embedding, loss_fn=first_words_losses, **sizes)

        messages = dni.FutureGradient(model.initial_state(1), future, window=window, cells=dni.LSTM_CELLS, limit=10.0)
        return dni.Horizons(messages, horizons=1), True


METHODS: dict[str, type[Truncated] | type[Trained]] = {
    "none": Plain,
    "multi-token": MultiToken,
    "dense": Messages,
    "dense, no end": InnerMessages,
    "end alone": EndMessage,
    "exact": Exact,
    "multi-horizon": MultiHorizon,
}
