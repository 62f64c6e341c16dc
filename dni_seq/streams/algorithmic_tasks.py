"""Copy, repeat copy and the adding problem: generated sequences in windows, and a curriculum that makes them longer.

Sources: copy and repeat copy are those of Graves et al. 2014, arXiv 1410.5401, sections 4.1 and 4.2, trained with a
curriculum as in Jaderberg et al. 2017, arXiv 1608.05343, section 3.1; we give the number of repeats beside the go flag,
divided by 10. The adding problem is that of Hochreiter and Schmidhuber 1997, with the markers in the two halves of the
sequence.

All lanes run in lockstep: one fresh sequence after another, of the same length in every lane, so all lanes end together. A
sequence begins with a window and is cut every T steps; its last window is as short as what is left of it, which costs no
steps for nothing and leaves a sum over time what it is.

The error of a task is 1 where nothing is known of the answer and 0 where all of it is. For copy and repeat copy it is in
bits a bit: the mean cross-entropy, base 2, of the target's single bits over all steps that count. For the adding problem it
is the share of the variance: the mean squared error over that of always answering 1, which is 1/6; knowing one of the two
numbers gives 1/2. A length is solved when the mean error over 1,000 fresh sequences is below 0.15.

Legend: S = steps of a sequence, T = window length, B = lanes, D = inputs, O = outputs, N = vectors, R = repeats.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from dni_seq.core.windows import Window, with_lookahead

BITS = 8
"""Size of a vector to copy."""

SOLVED_BELOW = 0.15
"""Largest mean error with which a length counts as solved (Jaderberg et al.)."""

FRESH_SEQUENCES = 1000
"""Sequences that decide whether a length is solved."""

RECENT_SEQUENCES = 20
"""Training sequences, of all lanes, whose mean error says whether that check is worth running."""

EVALUATION_LANES = 250
"""Sequences evaluated side by side: enough to be quick, few enough not to decide a run's peak memory."""


class Stage(NamedTuple):
    """How hard the sequences are.

    Attributes:
        size: N, the vectors to copy, or the steps of an adding problem.
        repeats: R, how often they are to be repeated; 1 where a task knows no repeats.
    """

    size: int
    repeats: int = 1

    @property
    def length(self) -> int:
        """What the curve of the length solved shows: N, N · R, or the steps of an adding problem."""
        return self.size * self.repeats


class Sequences(NamedTuple):
    """One sequence in every lane.

    Attributes:
        inputs: [S, B, D] float32.
        targets: [S, B, O] float32, zeros at steps that do not count.
        mask: [S, B] bool, the steps that count.
    """

    inputs: Tensor
    targets: Tensor
    mask: Tensor


class Task(ABC):
    """A family of sequences of growing length.

    Attributes:
        input_size: D.
        target_size: O.
        first: the stage at which a curriculum begins by itself.
        least: the smallest size of a stage.
        error_of_loss: the error over the loss of a step, see above.
        error_name: "error_bits" for an error in bits a bit, else "error".
    """

    input_size: int
    target_size: int
    first = Stage(1)
    least = 1
    error_of_loss = 1 / math.log(2)
    error_name = "error_bits"

    @abstractmethod
    def generate(self, stage: Stage, lanes: int, generator: torch.Generator) -> Sequences:
        """Fresh random sequences, on the CPU."""

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """[T, B] of outputs [T, B, O]: binary cross-entropy of the outputs as logits, nats, mean over the bits."""
        return functional.binary_cross_entropy_with_logits(outputs, targets, reduction="none").mean(-1)

    def harder(self, stage: Stage) -> Stage:
        """The stage behind `stage`: one vector more."""
        return stage._replace(size=stage.size + 1)


class Copy(Task):
    """A start flag, N vectors of 8 bits, a go flag; then the network gives the vectors back, its inputs zeros.

    S = 2 N + 2; D = 10: the bits, start, go.
    """

    input_size = BITS + 2
    target_size = BITS

    def generate(self, stage: Stage, lanes: int, generator: torch.Generator) -> Sequences:
        """Random bits, each 1 with probability 1/2."""
        vectors = _random_bits(stage.size, lanes, generator)
        inputs = _presented(vectors, self.input_size, answer=stage.size)
        targets = torch.zeros(len(inputs), lanes, self.target_size)
        targets[-stage.size :] = vectors
        return Sequences(inputs, targets, _last_steps(len(inputs), lanes, stage.size))


class RepeatCopy(Task):
    """A start flag, N vectors of 8 bits, a go flag and R / 10; then the network gives the vectors R times and an end flag.

    S = N + N R + 3; D = 11: the bits, start, go, R / 10; O = 9: the bits, end. The end flag is a target at every step of the
    answer, so that the network has to count.
    """

    input_size = BITS + 3
    target_size = BITS + 1

    def generate(self, stage: Stage, lanes: int, generator: torch.Generator) -> Sequences:
        """Random bits, each 1 with probability 1/2."""
        vectors = _random_bits(stage.size, lanes, generator)
        answer = stage.length + 1
        inputs = _presented(vectors, self.input_size, answer)
        inputs[stage.size + 1, :, BITS + 2] = stage.repeats / 10
        targets = torch.zeros(len(inputs), lanes, self.target_size)
        targets[-answer:-1, :, :BITS] = vectors.repeat(stage.repeats, 1, 1)
        targets[-1, :, BITS] = 1
        return Sequences(inputs, targets, _last_steps(len(inputs), lanes, answer))

    def harder(self, stage: Stage) -> Stage:
        """N and R are raised in turn: the smaller one, N where they are equal."""
        if stage.repeats < stage.size:
            return stage._replace(repeats=stage.repeats + 1)
        return stage._replace(size=stage.size + 1)


class Adding(Task):
    """Numbers between 0 and 1, two of them marked, one in each half; at the last step the network gives their sum.

    S = N, the length; D = 2: number, marker; O = 1.
    """

    input_size = 2
    target_size = 1
    first = Stage(4)
    least = 2
    error_of_loss = 6.0  # over 1/6, the variance of the sum
    error_name = "error"

    def generate(self, stage: Stage, lanes: int, generator: torch.Generator) -> Sequences:
        """Numbers and places of the markers are uniform."""
        steps, half = stage.size, stage.size // 2
        inputs = torch.zeros(steps, lanes, self.input_size)
        inputs[..., 0] = torch.rand(steps, lanes, generator=generator)
        for start, stop in ((0, half), (half, steps)):
            inputs[torch.randint(start, stop, (lanes,), generator=generator), torch.arange(lanes), 1] = 1
        targets = torch.zeros(steps, lanes, self.target_size)
        targets[-1, :, 0] = (inputs[..., 0] * inputs[..., 1]).sum(0)
        return Sequences(inputs, targets, _last_steps(steps, lanes, 1))

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """[T, B] of outputs [T, B, 1]: squared error."""
        return (outputs - targets).square().mean(-1)

    def harder(self, stage: Stage) -> Stage:
        """A tenth more steps, one at least."""
        return stage._replace(size=stage.size + max(1, stage.size // 10))


TASKS: Mapping[str, Task] = MappingProxyType({"copy": Copy(), "repeat-copy": RepeatCopy(), "adding": Adding()})
"""Every task by the name that commands know it by."""


def _random_bits(size: int, lanes: int, generator: torch.Generator) -> Tensor:
    return torch.randint(2, (size, lanes, BITS), generator=generator).float()


def _presented(vectors: Tensor, input_size: int, answer: int) -> Tensor:
    """[S, B, D]: start flag, vectors [N, B, 8], go flag, and `answer` steps of zeros."""
    size, lanes, _ = vectors.shape
    inputs = torch.zeros(size + 2 + answer, lanes, input_size)
    inputs[0, :, BITS] = 1
    inputs[1 : size + 1, :, :BITS] = vectors
    inputs[size + 1, :, BITS + 1] = 1
    return inputs


def _last_steps(steps: int, lanes: int, count: int) -> Tensor:
    """[S, B] bool: the last `count` steps."""
    return (torch.arange(steps) >= steps - count)[:, None].repeat(1, lanes)


def cut(sequences: Sequences, bptt: int) -> Iterator[Window]:
    """Windows of `bptt` steps, the last one of what is left; all lanes end with it."""
    steps, lanes = sequences.mask.shape
    for start in range(0, steps, bptt):
        inputs, targets, mask = (part[start : start + bptt] for part in sequences)
        yield Window(inputs, targets, mask, ends=torch.full((lanes,), start + bptt >= steps))


class TaskStream:
    """Windows of one fresh sequence after another, without end.

    Args:
        task: what the sequences are.
        lanes: B.
        bptt: T.
        lookahead: m, the steps behind each window that are attached to it; 0 for no lookahead. It sees nothing behind the
            end of the sequence.
        seed: of the stream's own generator.
        stage: of the first sequence, None for the task's first one.

    Attributes:
        stage: of the sequences to come; set it at any time, the sequence under way stays as it is.

    Raises:
        ValueError: a number is out of its range, or the stage is too small for the task.
    """

    def __init__(
        self, task: Task, *, lanes: int, bptt: int, lookahead: int = 0, seed: int = 0, stage: Stage | None = None
    ) -> None:
        for name, value, least in (("lanes", lanes, 1), ("bptt", bptt, 1), ("lookahead", lookahead, 0)):
            if value < least:
                raise ValueError(f"{name} must be {least} or more, got {value}")
        self.task, self.lanes, self.bptt, self.lookahead = task, lanes, bptt, lookahead
        self.stage = check_stage(task, stage or task.first)
        self._generator = torch.Generator().manual_seed(seed)
        self._before: tuple[Tensor, Stage] | None = None  # the generator's state and the stage that the sequence came of
        self._windows: list[Window] = []
        self._position = 0

    def __iter__(self) -> Iterator[Window]:
        """Go on from the current position; `ends` is True in all lanes at a sequence's last window."""
        while True:
            if self._position == len(self._windows):
                self._draw(self._generator.get_state(), self.stage)
            self._position += 1
            yield self._windows[self._position - 1]

    def _draw(self, state: Tensor, stage: Stage) -> None:
        """Take the sequence that the generator gives from `state` on."""
        self._before = (state, stage)
        self._generator.set_state(state)
        # Looking ahead one sequence at a time, the stream never draws a sequence before its stage is known.
        windows = cut(self.task.generate(stage, self.lanes, self._generator), self.bptt)
        self._windows = list(with_lookahead(windows, self.lookahead) if self.lookahead else windows)
        self._position = 0

    def state_dict(self) -> dict[str, Any]:
        """Where the next window is: the generator before the current sequence, the stages, and the windows given."""
        generator, drawn = self._before or (self._generator.get_state(), None)
        return {
            "generator": generator.clone(),
            "drawn": None if drawn is None else list(drawn),
            "stage": list(self.stage),
            "position": self._position,
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave: the next windows are the same, bit for bit."""
        self.stage = Stage(*saved["stage"])
        self._before, self._windows, self._position = None, [], 0
        self._generator.set_state(saved["generator"])
        if saved["drawn"] is not None:
            self._draw(saved["generator"], Stage(*saved["drawn"]))
            self._position = saved["position"]


class Curriculum:
    """Raise the length when it is solved.

    Training sequences cost nothing more to score, so their mean error says when the check on fresh ones is worth running;
    that check alone decides.

    Args:
        task: what is learned.
        start: the first stage, None for the task's own.
        threshold: the largest mean error that counts as solved.
        patience: training sequences, each of all lanes, between two checks at least.

    Attributes:
        stage: to train on.
        solved: the length solved, 0 before the first.

    Raises:
        ValueError: a setting is out of its range, or the stage is too small for the task.
    """

    def __init__(
        self,
        task: Task,
        *,
        start: Stage | None = None,
        threshold: float = SOLVED_BELOW,
        patience: int = RECENT_SEQUENCES,
    ) -> None:
        if not threshold > 0 or patience < 1:
            raise ValueError(f"threshold and patience must be positive, got {threshold} and {patience}")
        self.task = task
        self.threshold = threshold
        self.stage = check_stage(task, start or task.first)
        self.solved = 0
        self._recent: deque[float] = deque(maxlen=patience)

    def observe(self, error: float) -> bool:
        """Take in the mean error of a training sequence; whether the check on fresh sequences is worth running."""
        self._recent.append(error)
        return len(self._recent) == self._recent.maxlen and sum(self._recent) / len(self._recent) < self.threshold

    def conclude(self, error: float) -> bool:
        """Take in the mean error on fresh sequences of this stage, and raise the stage if it is solved; whether it is."""
        self._recent.clear()
        if not error < self.threshold:
            return False
        self.solved = self.stage.length
        self.stage = self.task.harder(self.stage)
        return True

    def state_dict(self) -> dict[str, Any]:
        """Stage, length solved and recent errors."""
        return {"stage": list(self.stage), "solved": self.solved, "recent": list(self._recent)}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.stage = Stage(*saved["stage"])
        self.solved = saved["solved"]
        self._recent = deque(saved["recent"], maxlen=self._recent.maxlen)


def check_stage(task: Task, stage: Stage) -> Stage:
    """The stage, or a ValueError where it is too small for the task."""
    if stage.size < task.least or stage.repeats < 1:
        raise ValueError(
            f"the task's sequences begin at size {task.least} and 1 repeat, got size {stage.size} and {stage.repeats}"
        )
    return stage


@torch.no_grad()
def mean_error(
    model: nn.Module, task: Task, stage: Stage, generator: torch.Generator, sequences: int = FRESH_SEQUENCES
) -> float:
    """The mean error of `model` on fresh sequences, in the unit of the task.

    Args:
        model: `model(inputs, state) -> (outputs, state)` with `initial_state(B)`; run in `eval()`, then put back.
        task: what the sequences are.
        stage: how hard.
        generator: that draws them, on the CPU.
        sequences: how many.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    total, steps = 0.0, 0
    for start in range(0, sequences, EVALUATION_LANES):
        lanes = min(EVALUATION_LANES, sequences - start)
        inputs, targets, mask = (part.to(device) for part in task.generate(stage, lanes, generator))
        outputs, _ = model(inputs, model.initial_state(lanes))  # type: ignore[operator]
        total += float(task.losses(outputs, targets)[mask].sum())
        steps += int(mask.sum())
    model.train(training)
    return task.error_of_loss * total / steps
