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
"""Offsets of the seeds of sequences that score a model and that measure gradients."""


class Problem(ABC):
    """One task: its models, its windows and its score.

    Attributes:
        lanes: B.
        whole: S, the steps of a sequence, which full BPTT sees at once. Of text, the longest window.
        steps: steps of text in a whole trial.
        per_update: steps of text from one update to the next; None for an update after each window.
        clip: largest norm of an update's gradient.
        rates: the learning rates that every column tries.
        past: (k1, k2) in steps, for updates from gradients over more steps than a window has.
        future: steps of the exact future.
        decay: α of factored traces. On the echo 0.9 was the best of 0.2, 0.6 and 0.9 in trials of a quarter of the text.
        chunk: steps of a chunk whose activations are computed again.
        unit: what a score is, lower is better.
        decimals: of a score in the table.
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
        """α for a model with `traces`, None if they have none."""
        return self.decay if traces == "factored" else None

    @abstractmethod
    def model(self, cell: str, traces: str | None) -> nn.Module:
        """Returns a new model."""

    @abstractmethod
    def windows(self, bptt: int, lookahead: int, seed: int) -> Iterator[dni.Window]:
        """Yields training windows without end, with the steps after them."""

    @abstractmethod
    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns losses [T, B]."""

    @abstractmethod
    def score(self, model: nn.Module) -> float:
        """Returns how far the model is from right on data that it has not seen."""

    @abstractmethod
    def spec(self, model: Any) -> ModelSpec:
        """Returns what the library's builders of synthesizers need to know."""

    def sample(self, bptt: int, lookahead: int) -> list[dni.Window]:
        """Returns consecutive windows of fresh data, on which gradients are compared with those of full BPTT."""
        stream, found, steps = self.windows(bptt, lookahead, HELD_BACK), [], 0
        while steps < self.whole:
            found.append(next(stream))
            steps += len(found[-1].inputs)
        return found


class Sequential(Problem):
    """A task of sequences of S steps, all lanes together, from generated data; an update after each sequence."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.per_update = self.whole

    def model(self, cell: str, traces: str | None) -> nn.Module:
        """A network of 64 units."""
        sizes = {"cell": cell, "hidden": 64, "traces": traces, "trace_decay": self.decay_of(traces)}
        return VectorRNN(self.task.input_size, self.task.target_size, **sizes)

    def windows(self, bptt: int, lookahead: int, seed: int) -> Iterator[dni.Window]:
        """Windows of fresh sequences."""
        stage = Stage(self.whole)
        return iter(TaskStream(self.task, lanes=self.lanes, bptt=bptt, lookahead=lookahead, seed=seed, stage=stage))

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The task's."""
        return self.task.losses(outputs, targets)

    def encode(self) -> tuple[nn.Module, nn.Module]:
        """Encoders of inputs and targets for a synthesizer that reads the next steps."""
        return nn.Linear(self.task.input_size, EMBED), nn.Linear(self.task.target_size, EMBED)

    def spec(self, model: Any) -> ModelSpec:
        """As the command for tasks builds it."""
        example, cells = model.initial_state(1), state_cells(model.rnn)
        sizes: dict[str, Any] = {"outputs": self.task.target_size, "inputs": self.task.input_size}
        return ModelSpec(
            model, self.losses, example=example, cells=cells, encode=self.encode, past_loss=input_losses, **sizes
        )


class EchoTask(Task):
    """Random signs, each of which is due D steps later. S steps; those before D do not count."""

    input_size = target_size = 1

    def __init__(self, delay: int) -> None:
        self.delay = delay

    def generate(self, stage: Stage, lanes: int, generator: torch.Generator) -> Sequences:
        """Inputs are -1 or 1, targets 0 or 1."""
        bits = torch.randint(2, (stage.size, lanes, 1), generator=generator).float()
        targets = torch.cat([torch.zeros(self.delay, lanes, 1), bits[: -self.delay]])
        counts = (torch.arange(stage.size) >= self.delay)[:, None].repeat(1, lanes)
        return Sequences(2 * bits - 1, targets, counts)


class Echo(Sequential):
    """Inputs come back D = 5 steps later, in sequences of 15 steps; 1 bit of error is chance.

    D is the delay at which full BPTT and a frozen recurrence differed most in a trial of 300 updates each, before
    any other method ran: 0.08 and 0.80 bits at D = 5, 0.51 and 0.85 at D = 10.
    """

    lanes, whole, steps, clip = 16, 15, 4500, 10.0
    rates, past, future, decay, chunk, unit = (1e-2, 2e-2, 4e-2), (3, 9), 10, 0.9, 5, "bits"

    def __init__(self) -> None:
        super().__init__(EchoTask(5))

    def score(self, model: nn.Module) -> float:
        """Bits of error on 1,000 fresh sequences."""
        return mean_error(model, self.task, Stage(self.whole), torch.Generator().manual_seed(FRESH_SEED))


class RowsTask(Task):
    """A digit's 28 rows of 28 pixels, one a step; its class is due at the last row."""

    input_size, target_size = digits.SIDE, digits.CLASSES

    def __init__(self) -> None:
        self.digits = digits.load("digits")

    def generate(self, stage: Stage, lanes: int, generator: torch.Generator) -> Sequences:
        """Random training digits."""
        drawn = torch.randint(len(self.digits.train_labels), (lanes,), generator=generator)
        targets = self.digits.train_labels[drawn].expand(stage.size, lanes).clone()
        counts = (torch.arange(stage.size) == stage.size - 1)[:, None].repeat(1, lanes)
        return Sequences(self.digits.train_images[drawn, 0].transpose(0, 1).contiguous(), targets, counts)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy [T, B], nats."""
        return token_losses(outputs, targets)


class Digits(Sequential):
    """5,000 digits of MNIST by rows, S = 28; one in five is a test digit."""

    lanes, whole, steps, clip = 32, digits.SIDE, 200 * digits.SIDE, 1.0
    rates, past, future, decay, chunk, unit = (1e-3, 3e-3, 1e-2), (4, 20), 14, 0.9, 7, "% wrong"

    def __init__(self) -> None:
        super().__init__(RowsTask())

    def encode(self) -> tuple[nn.Module, nn.Module]:
        """Targets are ids."""
        return nn.Linear(self.task.input_size, EMBED), nn.Embedding(self.task.target_size, EMBED)

    @torch.no_grad()
    def score(self, model: nn.Module) -> float:
        """Percent of the test digits that are taken for another one."""
        model.eval()
        found = self.task.digits  # type: ignore[attr-defined]
        outputs, _ = model(found.test_images[:, 0].transpose(0, 1), None)
        model.train()
        return 100 * float((outputs[-1].argmax(-1) != found.test_labels).float().mean())


class Characters(Problem):
    """Penn Treebank by characters, 64 lanes, 256 units; an update after each window. No window is the whole text.

    Args:
        folder: of ptb.train.txt, ptb.valid.txt and ptb.test.txt.
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
        """An embedding of 64 and 256 units."""
        sizes = {"cell": cell, "embed": 64, "hidden": 256, "layers": 1}
        return LanguageModel(self.vocabulary, **sizes, traces=traces, trace_decay=self.decay_of(traces))

    def windows(self, bptt: int, lookahead: int, seed: int) -> Iterator[dni.Window]:
        """Windows of the training text, in its order; other data for gradients are those of the validation text."""
        split = "valid" if seed == HELD_BACK else "train"
        stream = WindowStream(self.splits[split], self.tokenizer, lanes=self.lanes, bptt=bptt, lookahead=lookahead)
        while True:
            yield from stream

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy [T, B], nats."""
        return token_losses(outputs, targets)

    @torch.no_grad()
    def score(self, model: nn.Module) -> float:
        """Bits a character of the first 100,000 characters of the validation text's lanes."""
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
        """As the command for language models builds it."""

        def encode() -> tuple[nn.Module, nn.Module]:
            return nn.Embedding(self.vocabulary, EMBED), nn.Embedding(self.vocabulary, EMBED)

        example, cells = model.initial_state(1), state_cells(model.rnn)
        sizes: dict[str, Any] = {"outputs": self.vocabulary, "inputs": self.vocabulary}
        return ModelSpec(model, token_losses, example=example, cells=cells, encode=encode, past_loss=token_losses, **sizes)


def problem(name: str, data: Path) -> Problem:
    """Returns a task by name; `data` is the folder of the Penn Treebank."""
    return {"echo": Echo, "digits": Digits, "characters": partial(Characters, data)}[name]()
