"""The three tasks of the comparison: delayed echo, digits by rows, and Penn Treebank by characters.

Legend: T = window length in steps, B = lanes, S = steps of a sequence, D = inputs.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dni_seq as dni
from dni_seq.app.build.credit import ModelSpec
from dni_seq.models.language_model import LanguageModel, token_losses
from dni_seq.models.recurrent import state_cells
from dni_seq.models.vector_rnn import VectorRNN
from dni_seq.streams import WindowStream, digits, open_corpus
from dni_seq.streams.algorithmic_tasks import Sequences, Stage, Task, TaskStream, input_losses, mean_error
from dni_seq.streams.tokenizer_factory import train_tokenizer
from dni_seq.synthesizers.for_model import EMBED

FRESH_SEED, HELD_BACK = 77, 2**20
"""The seed of the sequences that score a model, and the seed of the windows on which gradients are compared."""


class Problem(ABC):
    """One task: its models, its windows and its score.

    Attributes:
        lanes: B.
        whole: S, the number of steps of a sequence, which full BPTT processes as one window. Text has no sequences; there S
            is the length of the longest window.
        steps: number of steps of a trial on the whole text.
        per_update: number of steps from one update to the next; None for an update after each window.
        clip: largest norm of an update's gradient.
        rates: the learning rates that are tried for every column.
        past: k1 and k2 in steps, for the column "k1 and k2".
        future: number of steps of the exact future.
        decay: α of factored traces. On the echo, 0.2, 0.6 and 0.9 were tried on a quarter of the text; 0.9 was best.
        chunk: number of steps of a chunk whose activations are recomputed.
        unit: unit of the score; lower scores are better.
        decimals: number of decimal places of a score in the table.
    """

    lanes: int
    whole: int
    steps: int
    per_update: int | None
    clip: float
    rates: tuple[float, float, float]
    past: tuple[int, int]
    future: int
    decay: float
    chunk: int
    unit: str
    decimals = 2

    def decay_of(self, traces: str | None) -> float | None:
        """Returns α for a model with factored traces; None for other traces and for no traces."""
        return self.decay if traces == "factored" else None

    @abstractmethod
    def model(self, cell: str, traces: str | None) -> nn.Module:
        """Returns a new model."""

    @abstractmethod
    def windows(self, bptt: int, lookahead: int, seed: int) -> Iterator[dni.Window]:
        """Yields training windows without end, with lookaheads of `lookahead` steps."""

    @abstractmethod
    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns unreduced losses [T, B]."""

    @abstractmethod
    def score(self, model: nn.Module) -> float:
        """Returns the model's error on data that it has not been trained on, in `unit`."""

    @abstractmethod
    def spec(self, model: Any) -> ModelSpec:
        """Returns the description of the model and its loss that the library's builders of synthesizers need."""

    def sample(self, bptt: int, lookahead: int) -> list[dni.Window]:
        """Returns consecutive windows of fresh data, at least S steps, on which gradients are compared with full BPTT."""
        stream, found, steps = self.windows(bptt, lookahead, HELD_BACK), [], 0
        while steps < self.whole:
            found.append(next(stream))
            steps += len(found[-1].inputs)
        return found


class Sequential(Problem):
    """A task of generated sequences of S steps, which end in all lanes at once. An update follows each sequence."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.per_update = self.whole

    def model(self, cell: str, traces: str | None) -> nn.Module:
        """Returns a network of 64 units."""
        sizes = {"cell": cell, "hidden": 64, "traces": traces, "trace_decay": self.decay_of(traces)}
        return VectorRNN(self.task.input_size, self.task.target_size, **sizes)

    def windows(self, bptt: int, lookahead: int, seed: int) -> Iterator[dni.Window]:
        """Yields windows of new sequences."""
        stage = Stage(self.whole)
        return iter(TaskStream(self.task, lanes=self.lanes, bptt=bptt, lookahead=lookahead, seed=seed, stage=stage))

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the unreduced losses of the task [T, B]."""
        return self.task.losses(outputs, targets)

    def encode(self) -> tuple[nn.Module, nn.Module]:
        """Returns encoders of inputs and targets, for a synthesizer that reads the next steps."""
        return nn.Linear(self.task.input_size, EMBED), nn.Linear(self.task.target_size, EMBED)

    def spec(self, model: Any) -> ModelSpec:
        """Returns a spec as the command for tasks builds it."""
        example, cells = model.initial_state(1), state_cells(model.rnn)
        sizes: dict[str, Any] = {"outputs": self.task.target_size, "inputs": self.task.input_size}
        return ModelSpec(
            model, self.losses, example=example, cells=cells, encode=self.encode, past_loss=input_losses, **sizes
        )


class EchoTask(Task):
    """Random signs in a sequence of S steps. A step's target is the sign D steps before; the first D steps do not count.

    Args:
        delay: D.
    """

    input_size = target_size = 1

    def __init__(self, delay: int) -> None:
        self.delay = delay

    def generate(self, stage: Stage, lanes: int, generator: torch.Generator) -> Sequences:
        """Returns sequences with inputs -1 or 1 and targets 0 or 1."""
        bits = torch.randint(2, (stage.size, lanes, 1), generator=generator).float()
        targets = torch.cat([torch.zeros(self.delay, lanes, 1), bits[: -self.delay]])
        counts = (torch.arange(stage.size) >= self.delay)[:, None].repeat(1, lanes)
        return Sequences(2 * bits - 1, targets, counts)


class Echo(Sequential):
    """The delayed echo: outputs repeat the inputs D = 5 steps later, in sequences of 15 steps. Guessing has 1 bit of error.

    D was chosen from 5 and 10 by trials of 300 updates, before any other method ran. At D = 5 full BPTT had
    0.08 bits of error and a frozen recurrence 0.80 bits; at D = 10 they had 0.51 and 0.85 bits. D = 5 has the larger
    difference.
    """

    lanes, whole, steps, clip = 16, 15, 4500, 10.0
    rates, past, future, decay, chunk, unit = (1e-2, 2e-2, 4e-2), (3, 9), 10, 0.9, 5, "bits"

    def __init__(self) -> None:
        super().__init__(EchoTask(5))

    def score(self, model: nn.Module) -> float:
        """Returns the bits of error on 1,000 fresh sequences."""
        return mean_error(model, self.task, Stage(self.whole), torch.Generator().manual_seed(FRESH_SEED))


class RowsTask(Task):
    """A digit as a sequence of 28 steps, which each read a row of 28 pixels. The class is the target of the last step.

    The other steps do not count in the loss.
    """

    input_size, target_size = digits.SIDE, digits.CLASSES

    def __init__(self) -> None:
        self.digits = digits.load("digits")

    def generate(self, stage: Stage, lanes: int, generator: torch.Generator) -> Sequences:
        """Returns sequences of random training digits."""
        drawn = torch.randint(len(self.digits.train_labels), (lanes,), generator=generator)
        targets = self.digits.train_labels[drawn].expand(stage.size, lanes).clone()
        counts = (torch.arange(stage.size) == stage.size - 1)[:, None].repeat(1, lanes)
        return Sequences(self.digits.train_images[drawn, 0].transpose(0, 1).contiguous(), targets, counts)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy [T, B], nats."""
        return token_losses(outputs, targets)


class Digits(Sequential):
    """5,000 digits of MNIST, read row by row, S = 28. One digit in five is a test digit."""

    lanes, whole, steps, clip = 32, digits.SIDE, 200 * digits.SIDE, 1.0
    rates, past, future, decay, chunk, unit = (1e-3, 3e-3, 1e-2), (4, 20), 14, 0.9, 7, "% wrong"

    def __init__(self) -> None:
        super().__init__(RowsTask())

    def encode(self) -> tuple[nn.Module, nn.Module]:
        """Returns encoders of inputs, which are vectors, and of targets, which are ids."""
        return nn.Linear(self.task.input_size, EMBED), nn.Embedding(self.task.target_size, EMBED)

    @torch.no_grad()
    def score(self, model: nn.Module) -> float:
        """Returns the percentage of test digits that are classified wrongly."""
        model.eval()
        found = self.task.digits  # type: ignore[attr-defined]
        outputs, _ = model(found.test_images[:, 0].transpose(0, 1), None)
        model.train()
        return 100 * float((outputs[-1].argmax(-1) != found.test_labels).float().mean())


class Characters(Problem):
    """Penn Treebank by characters, 64 lanes, 256 units. An update follows each window; the longest window has 100 steps.

    Args:
        folder: folder that holds ptb/ptb.train.txt, ptb/ptb.valid.txt and ptb/ptb.test.txt.
    """

    lanes, whole, steps, per_update, clip = 64, 100, 500_000 // 64, None, 1.0
    rates, past, future, decay, chunk, unit = (1e-3, 2e-3, 4e-3), (4, 20), 20, 0.2, 10, "bits"
    decimals = 3

    def __init__(self, folder: Path) -> None:
        corpus = open_corpus(dataset="ptb", data_dir=folder)
        self.splits = {"train": corpus.train, "valid": corpus.valid}
        self.tokenizer = train_tokenizer("char", corpus.train)
        self.vocabulary = self.tokenizer.vocabulary_size

    def model(self, cell: str, traces: str | None) -> nn.Module:
        """Returns a model with an embedding of 64 numbers and 256 units."""
        sizes = {"cell": cell, "embed": 64, "hidden": 256, "layers": 1}
        return LanguageModel(self.vocabulary, **sizes, traces=traces, trace_decay=self.decay_of(traces))

    def windows(self, bptt: int, lookahead: int, seed: int) -> Iterator[dni.Window]:
        """Yields windows of the training text in its order; for the seed of `sample`, windows of the validation text."""
        split = "valid" if seed == HELD_BACK else "train"
        stream = WindowStream(self.splits[split], self.tokenizer, lanes=self.lanes, bptt=bptt, lookahead=lookahead)
        while True:
            yield from stream

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy [T, B], nats."""
        return token_losses(outputs, targets)

    @torch.no_grad()
    def score(self, model: nn.Module) -> float:
        """Returns the bits a character on the first 1,600 characters of each lane of the validation text."""
        model.eval()
        state, total, count = model.initial_state(self.lanes), 0.0, 0  # type: ignore[operator]
        stream = iter(WindowStream(self.splits["valid"], self.tokenizer, lanes=self.lanes, bptt=200))
        for window in itertools.islice(stream, 8):
            outputs, state = model(window.inputs, state)
            total += float(token_losses(outputs, window.targets).sum())
            count += window.targets.numel()
        model.train()
        return total / count / math.log(2)

    def spec(self, model: Any) -> ModelSpec:
        """Returns a spec as the command for language models builds it."""

        def encode() -> tuple[nn.Module, nn.Module]:
            return nn.Embedding(self.vocabulary, EMBED), nn.Embedding(self.vocabulary, EMBED)

        example, cells = model.initial_state(1), state_cells(model.rnn)
        sizes: dict[str, Any] = {"outputs": self.vocabulary, "inputs": self.vocabulary}
        return ModelSpec(model, token_losses, example=example, cells=cells, encode=encode, past_loss=token_losses, **sizes)


def problem(name: str, data: Path) -> Problem:
    """Returns a task by name. `data` is the folder that holds ptb/, the Penn Treebank."""
    return {"echo": Echo, "digits": Digits, "characters": partial(Characters, data)}[name]()
