"""Copying: are predictive messages in windows of 4 or 10 steps better than windows that hold the whole sequence?

python benchmarks/predictive_messages/copying.py time
    Measure the CPU time of an update of each method, in turns on an idle machine. Budgets are counted by these times.
python benchmarks/predictive_messages/copying.py run --max-minutes 60
    Run the missing trials. Several processes may run side by side.
python benchmarks/predictive_messages/copying.py table
    Print the recorded results as a table of Markdown.

LSTM of 256 units, 32 lanes, clip 5, fused Adam, one thread. The length rises when 1,000 fresh sequences have an error below
0.15 bits. The task "distractors" has four random vectors, which are not to be copied, after each vector to copy. A trial has
a budget of CPU seconds. An update counts as the CPU time that its window length needs on an idle machine, as measured.
Each method is tried at three learning rates for a short budget. With the best rate it then runs for the whole budget, unless
in the short budget its longest solved length is more than 3 vectors shorter than that of the best method of its task.
docs/results/predictive_messages.md has the results.

Legend: T = window length in steps, B = lanes, m = reach in steps, D = inputs, S = numbers in a lane's packed state.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

import dni_seq as dni
from dni_seq.app.runs.allocator import keep_freed_memory
from dni_seq.app.studies.records import append_line
from dni_seq.models.vector_rnn import VectorRNN
from dni_seq.streams.algorithmic_tasks import BITS, Copy, Curriculum, Sequences, Stage, TaskStream, mean_error

sys.path.insert(0, str(Path(__file__).parents[1] / "studies"))
from memory import peak_mib, reset_peak
from trials import (
    Line,
    Trial,
    best_value,
    key_of,
    latest_times,
    lines_by_key,
    measure_in_turns,
    run_part,
    serve_steps,
    study_parser,
)

LANES, UNITS, CLIP = 32, 256, 5.0
REACH = 40
"""m, the number of steps of the past or the future that a predictor predicts."""

PREDICTOR_UNITS, CONTEXT_UNITS, EMBED, PREDICTOR_RATE = 256, 64, 32, 1e-3
EXACT_STEPS = 16
DISTRACTORS = 4
RATES = (1e-3, 2e-3, 4e-3)
TUNING_SECONDS = 150
SECONDS = {"copy": 800, "distractors": 400}
LEFT_BEHIND = 3
"""A method does not run the whole budget if, in the short one, it solves over this many vectors less than the best."""

CHECK_SEED = 77


class CopyWithDistractors(Copy):
    """Copying in which four random vectors, which are not to be copied, follow each of the N vectors to copy.

    A sequence has (2 + DISTRACTORS) N + 2 steps: start flag, N times a vector with the flag "to be copied" and `DISTRACTORS`
    vectors without it, go flag, N targets. An input has D = 11 numbers: 8 bits and the flags start, go, "to be copied".
    """

    input_size = BITS + 3

    def generate(self, stage: Stage, lanes: int, generator: torch.Generator) -> Sequences:
        """Returns sequences of random vectors, whose bits are 1 with probability 1/2."""
        shown = stage.size * (1 + DISTRACTORS)
        vectors = torch.randint(2, (shown, lanes, BITS), generator=generator).float()
        kept = vectors[:: 1 + DISTRACTORS]
        inputs = torch.zeros(shown + 2 + stage.size, lanes, self.input_size)
        inputs[0, :, BITS] = 1
        inputs[1 : shown + 1, :, :BITS] = vectors
        inputs[1 : shown + 1 : 1 + DISTRACTORS, :, BITS + 2] = 1
        inputs[shown + 1, :, BITS + 1] = 1
        targets = torch.zeros(len(inputs), lanes, self.target_size)
        targets[-stage.size :] = kept
        mask = (torch.arange(len(inputs)) >= len(inputs) - stage.size)[:, None].repeat(1, lanes)
        return Sequences(inputs, targets, mask)


TASKS: dict[str, Copy] = {"copy": Copy(), "distractors": CopyWithDistractors()}


class Steps(NamedTuple):
    """The m steps before a state, the latest first, or the m steps after it.

    Attributes:
        inputs: [m, B, D].
        targets: [m, B, O].
        counts: [m, B] bool, whether a step exists and counts in the loss.
    """

    inputs: Tensor
    targets: Tensor
    counts: Tensor


class Past(nn.Module):
    """Predicts the last m inputs from the packed state s. Input j: a linear layer of tanh(W s) * g_j; g_j is learned."""

    def __init__(self, units: int, outputs: int, inputs: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(REACH, 1, units))
        self.output = nn.Linear(units, outputs)

    def forward(self, read: Tensor, steps: Steps) -> Tensor:
        """Returns the predictions [m, B, O] from `read`, tanh(W s) [B, F]."""
        if self.output.out_features >= len(read):
            return self.output(read[None] * self.gate)
        weights = (self.output.weight * self.gate).flatten(0, 1)  # fewer outputs than lanes: gating the weights is cheaper
        return functional.linear(read, weights).unflatten(1, (REACH, -1)).transpose(0, 1) + self.output.bias


class Far(nn.Module):
    """Predicts the targets of the next m steps from the packed state s and a GRU's outputs c_j on the next inputs up to j.

    The prediction of step j is a linear layer of tanh(W s) * tanh(V c_j + b_j).
    """

    def __init__(self, units: int, outputs: int, inputs: int) -> None:
        super().__init__()
        self.encoder, self.context = nn.Linear(inputs, EMBED), nn.GRU(EMBED, CONTEXT_UNITS)
        self.gate, self.bias = nn.Linear(CONTEXT_UNITS, units), nn.Parameter(torch.zeros(REACH, 1, units))
        self.output = nn.Linear(units, outputs)

    def forward(self, read: Tensor, steps: Steps) -> Tensor:
        """Returns the predictions [m, B, O] from `read`, tanh(W s) [B, F]."""
        context, _ = self.context(self.encoder(steps.inputs))
        return self.output(read[None] * torch.tanh(self.gate(context) + self.bias))


class Predictor(nn.Module):
    """Predicts the past, the far future, or both, from tanh(W s), one layer on the packed state s.

    Args:
        kinds: "past", "far", or both. If both are given, each reads half of the layer's units.
        size: S.
        task: the task to learn.
    """

    def __init__(self, kinds: tuple[str, ...], size: int, task: Copy) -> None:
        super().__init__()
        self.task, self.units = task, PREDICTOR_UNITS // len(kinds)
        self.read = nn.Linear(size, PREDICTOR_UNITS)
        sizes = (self.units, task.target_size, task.input_size)
        self.parts = nn.ModuleDict({kind: {"past": Past, "far": Far}[kind](*sizes) for kind in kinds})

    def loss(self, packed: Tensor, steps: dict[str, Steps]) -> Tensor:
        """Returns the loss, 0-d: the sum over the steps that count, the mean over lanes, and the sum over the kinds."""
        total = packed.new_zeros(())
        reads = torch.tanh(self.read(packed)).split(self.units, -1)
        for read, (kind, part) in zip(reads, self.parts.items(), strict=True):
            losses = self.task.losses(part(read, steps[kind]), steps[kind].targets)
            total = total + torch.where(steps[kind].counts, losses, 0).sum() / packed.shape[0]
        return total


class Learner:
    """Trains by truncated BPTT with the messages of a predictor, with exact messages, or with none.

    Args:
        trial: the settings. `method` is "none", "exact", "past", "far" or "far and past". The last three may end with
            " inside": messages are then injected at every 4th state inside a window that holds the whole sequence.
    """

    every = 4

    def __init__(self, trial: Trial) -> None:
        torch.manual_seed(trial["seed"])
        self.task = TASKS[trial["task"]]
        self.model = VectorRNN(self.task.input_size, self.task.target_size, hidden=UNITS)
        self.inside = trial["method"].endswith(" inside")
        kinds = tuple(kind for kind in ("far", "past") if kind in trial["method"].split())
        self.predictor = Predictor(kinds, 2 * UNITS, self.task) if kinds else None
        self.exact = None
        if trial["method"] == "exact":
            sizes: dict[str, Any] = {"steps": EXACT_STEPS, "window": trial["T"], "reduction": "lane-mean"}
            self.exact = dni.ExactFuture(self.model, self.task.losses, **sizes)
        self.optimizers = [torch.optim.Adam(self.model.parameters(), trial["lr"], fused=True)]
        if self.predictor is not None:
            self.optimizers.append(torch.optim.Adam(self.predictor.parameters(), PREDICTOR_RATE, fused=True))
        self.reach = REACH if "far" in kinds else EXACT_STEPS if self.exact is not None else 0
        self.state: Any = self.model.initial_state(LANES)
        self.seen: list[Tensor] = []

    def step(self, window: dni.Window) -> Tensor:
        """Makes one update and returns the window's loss, 0-d: the sum over its steps of the mean over lanes."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        state = tuple(leaf.detach() for leaf in self.state)
        outputs, states, ends = self.run(window.inputs, state)
        assert window.mask is not None
        assert window.ends is not None
        loss = torch.where(window.mask, self.task.losses(outputs, window.targets), 0).sum() / LANES
        ended = bool(window.ends.all())
        self.seen = [*self.seen, *window.inputs][-REACH - len(window.inputs) :]
        roots, gradients = [loss], list[Tensor | None]([None])
        senders = [(state, end) for state, end in zip(states, ends, strict=True) if self.inside or not ended]
        if senders and (self.predictor is not None or self.exact is not None):
            leaves = [torch.cat([state[i] for state, _ in senders], 1) for i in range(2)]
            roots += leaves
            gradients += self.messages(leaves, window, [end for _, end in senders])
        torch.autograd.backward(roots, gradients)
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        for optimizer in self.optimizers:
            optimizer.step()
        self.state = self.model.initial_state(LANES) if ended else states[-1]
        if ended:
            self.seen = []
        return loss.detach()

    def run(self, inputs: Tensor, state: Any) -> tuple[Tensor, list[Any], list[int]]:
        """Runs the model. Returns its outputs, the states that get messages, and the number of steps before each state."""
        if not self.inside:
            outputs, state = self.model(inputs, state)
            return outputs, [state], [len(inputs)]
        outputs, states, ends = [], [], []
        for start in range(0, len(inputs), self.every):
            output, state = self.model(inputs[start : start + self.every], state)
            outputs.append(output)
            states.append(state)
            ends.append(min(start + self.every, len(inputs)))
        return torch.cat(outputs), states, ends

    def messages(self, leaves: list[Tensor], window: dni.Window, ends: list[int]) -> list[Tensor | None]:
        """Returns the messages for (h, c) at n states side by side, [1, n B, H]. Trains the predictor in the same pass."""
        if self.exact is not None:
            message: Any = self.exact.predict(tuple(leaf.detach() for leaf in leaves), window.lookahead)[0]
            return list(message)
        assert self.predictor is not None
        hidden, cells = (leaf.detach().requires_grad_() for leaf in leaves)
        packed = torch.cat([hidden[0], torch.tanh(cells[0])], 1)
        steps = {kind: self.steps(kind, window, ends) for kind in self.predictor.parts}
        loss = self.predictor.loss(packed, steps) * len(ends)
        loss.backward()
        return [hidden.grad, cells.grad]

    def steps(self, kind: str, window: dni.Window, ends: list[int]) -> Steps:
        """Returns the steps that a predictor predicts at all states, side by side along the batch dimension."""
        parts = [self.past(len(window.inputs) - end) if kind == "past" else self.future(window, end) for end in ends]
        return Steps(*(torch.cat(columns, 1) for columns in zip(*parts, strict=True)))

    def past(self, ago: int) -> Steps:
        """Returns the last m inputs up to `ago` steps before the window's end, latest first; missing ones do not count."""
        inputs = torch.stack(self.seen[: len(self.seen) - ago][-REACH:]).flip(0)
        missing = REACH - len(inputs)
        counts = (torch.arange(REACH) < len(inputs))[:, None].expand(-1, LANES)
        inputs = torch.cat([inputs, inputs.new_zeros(missing, *inputs.shape[1:])])
        return Steps(inputs, inputs[..., : self.task.target_size], counts)

    def future(self, window: dni.Window, end: int) -> Steps:
        """Returns the m steps after the first `end` steps of the window."""
        ahead = window.lookahead
        assert ahead is not None
        assert window.mask is not None
        inputs = torch.cat([window.inputs[end:], ahead.inputs])[:REACH]
        targets = torch.cat([window.targets[end:], ahead.targets])[:REACH]
        counts = torch.cat([window.mask[end:], ahead.counts])[:REACH]
        return Steps(inputs, targets, counts)


def run(trial: Trial, checkpoint: Path, times: dict[str, UpdateTime]) -> Line:
    """Trains for the trial's budget. Returns its line, with updates, steps and idle CPU seconds until each solved length."""
    reset_peak()
    learner = Learner(trial)
    task = learner.task
    time_of = times[kind_of(trial)]
    curriculum = Curriculum(task)
    stream = TaskStream(task, lanes=LANES, bptt=trial["T"], lookahead=learner.reach, seed=trial["seed"])
    fresh = torch.Generator().manual_seed(trial["seed"] + CHECK_SEED)
    curve: list[list[float]] = []
    updates, steps, loss, count, seconds = 0, 0, 0.0, 0, 0.0
    for window in stream:
        loss += float(learner.step(window))
        updates += 1
        steps += len(window.inputs)
        seconds += time_of.seconds(len(window.inputs))
        assert window.mask is not None
        assert window.ends is not None
        count += int(window.mask[:, 0].sum())
        if bool(window.ends.all()):
            error, loss, count = task.error_of_loss * loss / count, 0.0, 0
            if curriculum.observe(error) and curriculum.conclude(mean_error(learner.model, task, curriculum.stage, fresh)):
                stream.stage = curriculum.stage
                curve.append([curriculum.solved, updates, steps, round(seconds, 1)])
        if seconds >= trial["seconds"]:
            break
    return {"solved": curriculum.solved, "updates": updates, "steps": steps, "curve": curve, "peak_mib": peak_mib()}


class UpdateTime(NamedTuple):
    """CPU seconds of an update on an idle machine, as a linear function of the window length.

    Attributes:
        fixed: seconds of an update for 0 steps.
        per_step: further seconds for each step of the window.
    """

    fixed: float
    per_step: float

    def seconds(self, steps: int) -> float:
        """Returns the seconds of an update on a window of `steps` steps."""
        return self.fixed + self.per_step * steps


def kind_of(trial: Trial) -> str:
    """Returns the settings that decide the time of an update, as text: the method and T."""
    return f"{trial['method']} T={trial['T']}"


def trial_of(method: str, bptt: int, lr: float, seconds: float, task: str = "copy", seed: int = 0) -> Trial:
    """Returns the settings of a trial."""
    return {"task": task, "method": method, "T": bptt, "lr": lr, "seconds": seconds, "seed": seed}


COLUMNS: list[tuple[str, str, int]] = [
    ("copy", "none", 40),
    ("copy", "past", 4),
    ("copy", "far and past", 4),
    ("distractors", "none", 4),
    ("distractors", "past", 4),
    ("copy", "past inside", 40),
    ("copy", "far", 4),
    ("copy", "past", 10),
    ("distractors", "none", 40),
    ("distractors", "far", 4),
    ("copy", "exact", 4),
    ("copy", "far and past", 10),
    ("copy", "exact", 10),
]
"""Task, method and T of each column, the most important first."""


def serve_updates(trial: Trial, size: int, pipe: Any) -> None:
    """The program of a process that times updates on sequences of `size` vectors; see `measure_in_turns`."""
    torch.set_num_threads(1)
    keep_freed_memory()
    learner = Learner(trial)
    stream = TaskStream(learner.task, lanes=LANES, bptt=trial["T"], lookahead=learner.reach, seed=0, stage=Stage(size))
    windows = iter(stream)
    serve_steps(lambda: learner.step(next(windows)), pipe)


def measure_updates(results: Path) -> None:
    """Measures an update of each method on windows of T and of 4 steps, on an idle machine, and records `UpdateTime`s."""
    kinds = {kind_of(trial): trial for trial in (trial_of(method, bptt, 1e-3, 0) for _, method, bptt in COLUMNS)}
    sizes = {f"{kind}, {size} vectors": (trial, size) for kind, trial in kinds.items() for size in (1, 19)}
    counts = {name: max(5, 200 // trial["T"]) for name, (trial, _) in sizes.items()}
    medians = measure_in_turns(serve_updates, sizes, counts, "none T=40, 19 vectors")
    times = {}
    for kind, trial in kinds.items():
        short, full = (medians[f"{kind}, {size} vectors"] for size in (1, 19))
        longer = trial["T"] - 4
        per_step = (full - short) / longer if longer else 0.0
        times[kind] = [round(full - per_step * trial["T"], 7), round(per_step, 7)]
    append_line(results, {"study": "copying", "update_seconds": times, "date": time.strftime("%Y-%m-%d")})


def update_times(results: Path) -> dict[str, UpdateTime]:
    """Returns the last recorded update times.

    Raises:
        SystemExit: no update times are recorded.
    """
    found = latest_times(results, "copying", "update_seconds")
    return {kind: UpdateTime(*numbers) for kind, numbers in found.items()}


def progress_score(line: Line) -> float:
    """Returns the score by which rates are chosen, lower is better: minus the length solved, then the time until then."""
    solved, *_, seconds = line["curve"][-1] if line["curve"] else (0, 0.0)
    return -float(solved) + float(seconds) / 1e6


def plan(known: dict[str, Line]) -> Iterator[Trial]:
    """Yields every trial that can be run now, the most important first."""
    for task, method, bptt in COLUMNS:
        short = [trial_of(method, bptt, rate, TUNING_SECONDS, task) for rate in RATES]
        yield from short
        rate = best_value(known, short, "lr", progress_score)
        if rate is None:
            continue
        tuned = known[key_of(trial_of(method, bptt, rate, TUNING_SECONDS, task))]
        if tuned["solved"] + LEFT_BEHIND >= longest(known, task):
            yield trial_of(method, bptt, rate, SECONDS[task], task)


def longest(known: dict[str, Line], task: str) -> int:
    """Returns the largest number of vectors that a method has solved within the short budget of a task."""
    short = [line for line in known.values() if line["trial"]["task"] == task and line["trial"]["seconds"] == TUNING_SECONDS]
    return max(int(line["solved"]) for line in short)


def table(results: Path) -> Iterable[str]:
    """Yields the lines of a table of Markdown of the recorded trials. Its seconds use the last recorded update times."""
    times = update_times(results)
    yield "| task | method | T | rate | CPU s | solved | seconds to 7, 9, 11, 15, 19 | peak MiB |"
    yield "|---|---|---|---|---|---|---|---|"
    lines = [line for line in lines_by_key(results).values() if line["trial"]["task"] in TASKS]
    order = ("task", "T", "method", "seconds", "lr")
    for line in sorted(lines, key=lambda line: [str(line["trial"][name]) for name in order]):
        trial = line["trial"]
        at = {int(point[0]): seconds_at(point, times[kind_of(trial)]) for point in line["curve"]}
        reached = ", ".join(f"{at[n]:.0f}" if n in at else "–" for n in (7, 9, 11, 15, 19))
        cells = [trial["task"], trial["method"], trial["T"], trial["lr"], trial["seconds"], line["solved"], reached]
        yield "| " + " | ".join(map(str, [*cells, line["peak_mib"]])) + " |"


def seconds_at(point: list[float], time_of: UpdateTime) -> float:
    """Returns the idle CPU seconds of a row of a curve, computed from the row's updates and steps."""
    _, updates, steps, _ = point
    return updates * time_of.fixed + steps * time_of.per_step


def main() -> None:
    """Runs the command."""
    parser = study_parser(__doc__ or "")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    run_part(
        options,
        plan,
        lambda: partial(run, times=update_times(options.results)),
        table=lambda: print("\n".join(table(options.results))),
        time=lambda: measure_updates(options.results),
    )


if __name__ == "__main__":
    main()
