"""Copy, repeat copy and the adding problem: generated sequences in windows, and a curriculum that makes them longer.

Sources: copy and repeat copy are those of Graves et al. 2014, arXiv 1410.5401, sections 4.1 and 4.2, trained with a
curriculum as in Jaderberg et al. 2017, arXiv 1608.05343, section 3.1. Here the number of repeats, divided by 10, is an
input at the step of the go flag. The adding problem is that of Hochreiter and Schmidhuber 1997, with one marker in each
half of the sequence.

Every lane gets one fresh sequence after another. The sequences of all lanes have the same length, so they end together. A
sequence starts at the start of a window and is cut every T steps. The last window of a sequence holds only the remaining
steps, without padding.

The error of a task is 1 for a network that knows nothing about the answer and 0 for a perfect network. For copy and repeat
copy the error is the mean cross-entropy, in bits per target bit, over all steps that count. For the adding problem the
error is the mean squared error divided by 1/6, which is the mean squared error of always answering 1. A network that knows
only one of the two numbers has error 1/2. A length is solved when the mean error over 1,000 fresh sequences is below 0.15.

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
"""Bits in a vector to copy."""

SOLVED_BELOW = 0.15
"""A length is solved if the mean error is below this value (Jaderberg et al. 2017)."""

FRESH_SEQUENCES = 1000
"""Number of fresh sequences on which a length is checked."""

RECENT_SEQUENCES = 20
"""A length is checked if the mean error of this many recent training sequences is below the threshold.

The sequences of all lanes together count as one.
"""

EVALUATION_LANES = 250
"""Sequences evaluated in one batch: enough to be fast, few enough not to raise a run's peak memory."""


class Stage(NamedTuple):
    """Difficulty of the sequences.

    Attributes:
        size: N, the number of vectors to copy, or of steps in an adding problem.
        repeats: R, how often the vectors are repeated; 1 for a task without repeats.
    """

    size: int
    repeats: int = 1

    @property
    def length(self) -> int:
        """The number that measures progress: N for copy, N · R for repeat copy, the steps N of an adding problem."""
        return self.size * self.repeats


class Sequences(NamedTuple):
    """A batch of sequences, one in each lane.

    Attributes:
        inputs: [S, B, D] float32.
        targets: [S, B, O] float32, zero at steps that do not count.
        mask: [S, B] bool, True at steps that count in the loss.
    """

    inputs: Tensor
    targets: Tensor
    mask: Tensor


class Task(ABC):
    """A generated task whose sequences can be made longer stage by stage.

    Attributes:
        input_size: D, the size of an input vector.
        target_size: O, the size of a target vector.
        first: the stage at which a curriculum starts by default.
        least: the smallest size of a stage.
        error_of_loss: the factor by which the mean loss of a step is multiplied to get the task's error.
        error_name: "error_bits" for an error in bits per target bit, else "error".
    """

    input_size: int
    target_size: int
    first = Stage(1)
    least = 1
    error_of_loss = 1 / math.log(2)
    error_name = "error_bits"

    @abstractmethod
    def generate(self, stage: Stage, lanes: int, generator: torch.Generator) -> Sequences:
        """Returns fresh random sequences on the CPU, one for each of `lanes` lanes."""

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns losses [T, B] in nats: the binary cross-entropy of logits [T, B, O], averaged over the O bits."""
        return functional.binary_cross_entropy_with_logits(outputs, targets, reduction="none").mean(-1)

    def harder(self, stage: Stage) -> Stage:
        """Returns the stage after `stage`, which has one more vector."""
        return stage._replace(size=stage.size + 1)


class Copy(Task):
    """The copy task: after N vectors of 8 bits the network outputs the same vectors.

    The inputs are a start flag, the vectors, a go flag, and zeros during the answer. S = 2 N + 2; D = 10: 8 bits, start, go;
    O = 8.
    """

    input_size = BITS + 2
    target_size = BITS

    def generate(self, stage: Stage, lanes: int, generator: torch.Generator) -> Sequences:
        """Returns sequences of random bits, each 1 with probability 1/2."""
        vectors = _random_bits(stage.size, lanes, generator)
        inputs = _presented(vectors, self.input_size, answer=stage.size)
        targets = torch.zeros(len(inputs), lanes, self.target_size)
        targets[-stage.size :] = vectors
        return Sequences(inputs, targets, _last_steps(len(inputs), lanes, stage.size))


class RepeatCopy(Task):
    """The repeat copy task: after N vectors of 8 bits the network outputs them R times, and then an end flag.

    The inputs are a start flag, the vectors, a go flag together with R / 10, and zeros during the answer. S = N + N R + 3;
    D = 11: 8 bits, start, go, R / 10; O = 9: 8 bits, end. The target of the end flag is 0 at every step of the answer
    except the last one, where it is 1, so the network must count the repeats.
    """

    input_size = BITS + 3
    target_size = BITS + 1

    def generate(self, stage: Stage, lanes: int, generator: torch.Generator) -> Sequences:
        """Returns sequences of random bits, each 1 with probability 1/2."""
        vectors = _random_bits(stage.size, lanes, generator)
        answer = stage.length + 1
        inputs = _presented(vectors, self.input_size, answer)
        inputs[stage.size + 1, :, BITS + 2] = stage.repeats / 10
        targets = torch.zeros(len(inputs), lanes, self.target_size)
        targets[-answer:-1, :, :BITS] = vectors.repeat(stage.repeats, 1, 1)
        targets[-1, :, BITS] = 1
        return Sequences(inputs, targets, _last_steps(len(inputs), lanes, answer))

    def harder(self, stage: Stage) -> Stage:
        """Returns the next stage: raises R by 1 if R < N, else raises N by 1."""
        if stage.repeats < stage.size:
            return stage._replace(repeats=stage.repeats + 1)
        return stage._replace(size=stage.size + 1)


class Adding(Task):
    """The adding problem: the network outputs the sum of two marked numbers at the last step.

    All numbers are uniform in [0, 1). One number in each half of the sequence is marked. S = N, the length; D = 2: number,
    marker; O = 1.
    """

    input_size = 2
    target_size = 1
    first = Stage(4)
    least = 2
    error_of_loss = 6.0  # 1 / (1/6), where 1/6 is the variance of the sum
    error_name = "error"

    def generate(self, stage: Stage, lanes: int, generator: torch.Generator) -> Sequences:
        """Returns sequences of uniform numbers, with uniform marker positions in each half."""
        steps, half = stage.size, stage.size // 2
        inputs = torch.zeros(steps, lanes, self.input_size)
        inputs[..., 0] = torch.rand(steps, lanes, generator=generator)
        for start, stop in ((0, half), (half, steps)):
            inputs[torch.randint(start, stop, (lanes,), generator=generator), torch.arange(lanes), 1] = 1
        targets = torch.zeros(steps, lanes, self.target_size)
        targets[-1, :, 0] = (inputs[..., 0] * inputs[..., 1]).sum(0)
        return Sequences(inputs, targets, _last_steps(steps, lanes, 1))

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the squared errors [T, B] of outputs [T, B, 1]."""
        return (outputs - targets).square().mean(-1)

    def harder(self, stage: Stage) -> Stage:
        """Returns the next stage, which has a tenth more steps, at least one more."""
        return stage._replace(size=stage.size + max(1, stage.size // 10))


TASKS: Mapping[str, Task] = MappingProxyType({"copy": Copy(), "repeat-copy": RepeatCopy(), "adding": Adding()})
"""The tasks, keyed by the value of the option `--task`."""


def input_losses(outputs: Tensor, inputs: Tensor) -> Tensor:
    """Returns losses [m, B] in nats: the binary cross-entropy of logits [m, B, D] for inputs from 0 to 1, mean over D."""
    return functional.binary_cross_entropy_with_logits(outputs, inputs, reduction="none").mean(-1)


def _random_bits(size: int, lanes: int, generator: torch.Generator) -> Tensor:
    return torch.randint(2, (size, lanes, BITS), generator=generator).float()


def _presented(vectors: Tensor, input_size: int, answer: int) -> Tensor:
    """Returns inputs [S, B, D]: start flag, vectors [N, B, 8], go flag, and `answer` steps of zeros."""
    size, lanes, _ = vectors.shape
    inputs = torch.zeros(size + 2 + answer, lanes, input_size)
    inputs[0, :, BITS] = 1
    inputs[1 : size + 1, :, :BITS] = vectors
    inputs[size + 1, :, BITS + 1] = 1
    return inputs


def _last_steps(steps: int, lanes: int, count: int) -> Tensor:
    """Returns a mask [S, B] bool that is True at the last `count` steps."""
    return (torch.arange(steps) >= steps - count)[:, None].repeat(1, lanes)


def cut(sequences: Sequences, bptt: int) -> Iterator[Window]:
    """Cuts sequences into windows of `bptt` steps; the last window holds the remaining steps, and all lanes end with it."""
    steps, lanes = sequences.mask.shape
    for start in range(0, steps, bptt):
        inputs, targets, mask = (part[start : start + bptt] for part in sequences)
        yield Window(inputs, targets, mask, ends=torch.full((lanes,), start + bptt >= steps))


class TaskStream:
    """An endless stream of windows over freshly generated sequences; its position can be saved and restored.

    Args:
        task: generates the sequences.
        lanes: B, the batch size.
        bptt: T, the window length.
        lookahead: m, the number of steps after each window that are attached to it; 0 for no lookahead. Steps after the
            end of the sequence are not valid.
        seed: seed of the stream's own generator.
        stage: stage of the first sequence; None for `task.first`.

    Attributes:
        stage: stage of the next sequences. It may be set at any time; the current sequence does not change.

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
        self._before: tuple[Tensor, Stage] | None = None  # generator state and stage of the current sequence
        self._windows: list[Window] = []
        self._position = 0

    def __iter__(self) -> Iterator[Window]:
        """Yields windows from the current position; `ends` is True in all lanes at a sequence's last window."""
        while True:
            if self._position == len(self._windows):
                self._draw(self._generator.get_state(), self.stage)
            self._position += 1
            yield self._windows[self._position - 1]

    def _draw(self, state: Tensor, stage: Stage) -> None:
        """Draws a sequence from generator state `state` and cuts it into windows."""
        self._before = (state, stage)
        self._generator.set_state(state)
        # The lookahead stops at the sequence's end, so the next sequence is not drawn before its stage is known.
        windows = cut(self.task.generate(stage, self.lanes, self._generator), self.bptt)
        self._windows = list(with_lookahead(windows, self.lookahead) if self.lookahead else windows)
        self._position = 0

    def state_dict(self) -> dict[str, Any]:
        """Returns the position: generator state before this sequence, its stage, windows yielded, and the next stage."""
        generator, drawn = self._before or (self._generator.get_state(), None)
        return {
            "generator": generator.clone(),
            "drawn": None if drawn is None else list(drawn),
            "stage": list(self.stage),
            "position": self._position,
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restores a position from `state_dict`; the next windows are bit-identical."""
        self.stage = Stage(*saved["stage"])
        self._before, self._windows, self._position = None, [], 0
        self._generator.set_state(saved["generator"])
        if saved["drawn"] is not None:
            self._draw(saved["generator"], Stage(*saved["drawn"]))
            self._position = saved["position"]


class Curriculum:
    """A curriculum that moves to the next stage when the current one is solved.

    The mean error of recent training sequences decides when to check the stage on fresh sequences. Only the error on fresh
    sequences decides whether the stage is solved.

    Args:
        task: the task to train on.
        start: the first stage; None for `task.first`.
        threshold: a stage is solved if its mean error is below this value.
        patience: number of recent training sequences whose mean error is compared with `threshold`, and the smallest number
            of training sequences between two checks. The sequences of all lanes together count as one.

    Attributes:
        stage: the stage to train on.
        solved: `Stage.length` of the last solved stage; 0 if no stage is solved yet.

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
        """Records the mean error of a training sequence; returns True if the stage should be checked on fresh sequences."""
        self._recent.append(error)
        return len(self._recent) == self._recent.maxlen and sum(self._recent) / len(self._recent) < self.threshold

    def conclude(self, error: float) -> bool:
        """Returns True and moves to the next stage if `error`, the mean on fresh sequences, is below the threshold."""
        self._recent.clear()
        if not error < self.threshold:
            return False
        self.solved = self.stage.length
        self.stage = self.task.harder(self.stage)
        return True

    def state_dict(self) -> dict[str, Any]:
        """Returns the stage, the solved length and the recent training errors."""
        return {"stage": list(self.stage), "solved": self.solved, "recent": list(self._recent)}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restores a state from `state_dict`."""
        self.stage = Stage(*saved["stage"])
        self.solved = saved["solved"]
        self._recent = deque(saved["recent"], maxlen=self._recent.maxlen)


def check_stage(task: Task, stage: Stage) -> Stage:
    """Returns `stage`; raises a ValueError if it is too small for the task."""
    if stage.size < task.least or stage.repeats < 1:
        raise ValueError(
            f"the task's stages begin at size {task.least} and 1 repeat, got size {stage.size} and {stage.repeats} repeats: "
            "raise the stage (--start)"
        )
    return stage


@torch.no_grad()
def mean_error(
    model: nn.Module, task: Task, stage: Stage, generator: torch.Generator, sequences: int = FRESH_SEQUENCES
) -> float:
    """Returns the mean error of `model` on fresh sequences, in the unit of the task.

    Args:
        model: `model(inputs, state) -> (outputs, state)` with `initial_state(B)`. It runs in `eval()`; its mode is then
            restored.
        task: generates the sequences.
        stage: difficulty of the sequences.
        generator: CPU generator that draws the sequences.
        sequences: number of sequences.
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
