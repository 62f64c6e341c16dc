"""The parts of the GPU check. Each part yields lines of results, as dicts, until it is done or its time limit is reached.

Legend: T = window length in steps, B = lanes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import dni_seq as dni
from dni_seq.app.gpu_check import ranks
from dni_seq.app.gpu_check.learners import KINDS, LOOKAHEAD, PlainLoop, future, step, trainer_of, windows
from dni_seq.core import states
from dni_seq.models.language_model import LanguageModel, token_losses
from dni_seq.models.vector_rnn import VectorRNN
from dni_seq.streams.algorithmic_tasks import TASKS, Curriculum, TaskStream, input_losses, mean_error
from dni_seq.synthesizers.gated_predictors import GatedPast

Line = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """The device and the time limit of a part.

    Attributes:
        device: the device that is checked.
        quick: whether sizes and repetitions are small.
        until: the time at which the part must end, in seconds of `time.monotonic`.
    """

    device: torch.device
    quick: bool
    until: float

    @property
    def over(self) -> bool:
        """Whether the time limit of the part is reached."""
        return time.monotonic() > self.until

    def wait(self) -> None:
        """Waits until the device is idle."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def identities(setting: Setting) -> Iterator[Line]:
    """Trains each kind in float64 on the CPU and on the device, and compares the parameters after 6 windows.

    Yields a line for each kind, and then the line of `full_bptt`.
    """
    steps, lanes, vocabulary, count = 3, 4, 23, 6
    for kind in KINDS:
        if setting.over:
            return
        found = []
        for device in (torch.device("cpu"), setting.device):
            torch.manual_seed(0)
            model = LanguageModel(vocabulary, embed=8, hidden=8, layers=2).double()
            trainer = trainer_of(KINDS[kind], model, steps, torch.device("cpu"))
            if device.type != "cpu":
                trainer = moved(trainer, device)
            for window in windows(count, steps, lanes, vocabulary, LOOKAHEAD, device):
                step(trainer, window)
            parameters = [*trainer.model.parameters(), *credit_parameters(trainer)]
            found.append(torch.cat([parameter.detach().cpu().flatten() for parameter in parameters]))
        error = float((found[0] - found[1]).abs().max() / found[0].abs().max())
        yield {"kind": kind, "windows": count, "largest_relative_difference": error, "passed": error < 1e-9}
    yield full_bptt(setting.device)


def moved(trainer: dni.SequenceTrainer, device: torch.device) -> dni.SequenceTrainer:
    """Moves the modules of a trainer that has not stepped yet to a device, in place, and returns the trainer."""
    trainer.model.to(device)
    if trainer.credit is not None:
        trainer.credit.synthesizer.to(device)
    return trainer


def credit_parameters(trainer: dni.SequenceTrainer) -> list[torch.Tensor]:
    """Returns the synthesizer's parameters."""
    return [] if trainer.credit is None else list(trainer.credit.synthesizer.parameters())


def full_bptt(device: torch.device) -> Line:
    """Compares two gradients in float64: truncated BPTT with an exact message, and BPTT over all windows at once.

    The learning rate is 0, so the parameters stay the same while the gradients of the windows are summed.
    """
    torch.manual_seed(0)
    steps, count = 3, 4
    model = LanguageModel(23, embed=8, hidden=8, layers=2).double().to(device)
    exact = dni.ExactFuture(model, token_losses, steps=steps * count)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    trainer = dni.SequenceTrainer(model, optimizer, token_losses, synthesizer=exact, synthetic_scale=1.0)
    some = windows(count, steps, 4, 23, 0, device)
    total = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for window in dni.with_lookahead([each._replace(lookahead=None) for each in some], steps * count):
        trainer.step(window.inputs, window.targets, lookahead=window.lookahead)
        total = [a + b.grad for a, b in zip(total, model.parameters(), strict=True) if b.grad is not None]
    state, loss = model.initial_state(4), torch.zeros((), device=device)
    for window in some:
        logits, state = model(window.inputs, state)
        loss = loss + token_losses(logits, window.targets).mean()
    expected = torch.autograd.grad(loss, list(model.parameters()))
    error = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(total, expected, strict=True))
    return {"kind": "exact messages give full BPTT", "largest_relative_difference": error, "passed": error < 1e-10}


def no_synchronisation(setting: Setting) -> Iterator[Line]:
    """Trains each kind while CUDA raises an error at every synchronisation. On the CPU, yields a line "skipped" instead."""
    if setting.device.type != "cuda":
        yield {"skipped": f"{setting.device.type} has no synchronisation to forbid; tests hold the same path on the CPU"}
        return
    for kind in KINDS:
        if setting.over:
            return
        torch.manual_seed(0)
        model = LanguageModel(100, embed=32, hidden=64, layers=2).to(setting.device)
        trainer = trainer_of(KINDS[kind], model, 4, setting.device)
        first, *others = windows(9, 4, 8, 100, LOOKAHEAD, setting.device)
        step(trainer, first)
        setting.wait()
        line: Line = {"kind": kind, "windows": len(others), "passed": True}
        with forbidden_synchronisation():
            try:
                for window in others:
                    step(trainer, window)
            except RuntimeError as error:
                line |= {"passed": False, "error": str(error).splitlines()[0]}
        yield line


@contextmanager
def forbidden_synchronisation() -> Iterator[None]:
    """Inside the context, CUDA raises a RuntimeError when the host would wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def costs(setting: Setting) -> Iterator[Line]:
    """Measures step time and peak memory of the plain loop and of four kinds, for each hidden size and T."""
    lanes, vocabulary = (8, 200) if setting.quick else (32, 10_000)
    for hidden in (32,) if setting.quick else (512, 2048):
        for steps in (1, 4) if setting.quick else (1, 4, 20, 40):
            if setting.over:
                return
            some = windows(4, steps, lanes, vocabulary, max(8, 2 * steps), setting.device)
            yield from in_turns(setting, {"hidden": hidden, "T": steps, "lanes": lanes}, hidden, steps, some, vocabulary)


def in_turns(
    setting: Setting, about: Line, hidden: int, steps: int, some: list[dni.Window], vocabulary: int
) -> Iterator[Line]:
    """Measures a step of the plain loop and of four kinds at one size: medians over rounds in which all five take turns."""
    rounds, repeats = (2, 2) if setting.quick else (7, 5)
    runs: dict[str, Callable[[dni.Window], Any]] = {}
    for kind in ("plain loop", "none", "default", "dense", "exact"):
        torch.manual_seed(0)
        model = LanguageModel(vocabulary, embed=min(hidden, 512), hidden=hidden, layers=1).to(setting.device)
        if kind == "plain loop":
            runs[kind] = PlainLoop(model).step
        else:
            trainer = trainer_of(KINDS[kind], model, steps, setting.device)
            runs[kind] = partial(step, trainer)
    milliseconds: dict[str, list[float]] = {kind: [] for kind in runs}
    peaks = dict.fromkeys(runs, 0)
    for number in range(rounds + 1):
        for kind, run in runs.items():
            reset_peak(setting)
            begun = time.perf_counter()
            for window in some * repeats if number else some:
                run(window)
            setting.wait()
            if number:
                milliseconds[kind].append(1000 * (time.perf_counter() - begun) / (len(some) * repeats))
                peaks[kind] = max(peaks[kind], peak_bytes(setting))
        if setting.over and number:
            break
    plain = statistics.median(milliseconds["plain loop"])
    for kind, values in milliseconds.items():
        median = statistics.median(values)
        spread = [round(min(values), 3), round(max(values), 3)]
        yield {**about, "kind": kind, "ms": round(median, 3), "spread": spread, "of_plain": round(median / plain, 3)} | (
            {"peak_mib": round(peaks[kind] / 2**20, 1)} if peaks[kind] else {}
        )


def reset_peak(setting: Setting) -> None:
    """Resets the count of the device's peak memory. Does nothing on the CPU."""
    if setting.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(setting.device)


def peak_bytes(setting: Setting) -> int:
    """Returns the peak memory of the device in bytes since `reset_peak`. On the CPU nothing is counted, and it returns 0."""
    return torch.cuda.max_memory_allocated(setting.device) if setting.device.type == "cuda" else 0


def memory_by_reach(setting: Setting) -> Iterator[Line]:
    """Measures peak memory and time per step of text for BPTT over 400 steps, and for T = 4 with messages of 400 steps.

    The messages are of the past or of the future. A last line has T = 4 without messages. With `quick` 400 steps are 40.
    """
    reach, hidden, lanes = (40, 32, 8) if setting.quick else (400, 512, 32)
    for kind, steps in (("none", reach), ("past", 4), ("future", 4), ("none", 4)):
        if setting.over:
            return
        torch.manual_seed(0)
        model = LanguageModel(200, embed=64, hidden=hidden, layers=1).to(setting.device)
        settings: dict[str, Any] = {}
        if kind != "none":
            settings["synthesizer"] = future(model, steps, predict=kind, predict_steps=reach).to(setting.device)
        optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
        trainer = dni.SequenceTrainer(model, optimizer, token_losses, **settings)
        some = windows(3, steps, lanes, 200, reach, setting.device)
        for window in some:
            step(trainer, window)
        setting.wait()
        reset_peak(setting)
        begun = time.perf_counter()
        for window in some:
            step(trainer, window)
        setting.wait()
        seconds = (time.perf_counter() - begun) / (len(some) * steps)
        line: Line = {"kind": kind, "T": steps, "reach": steps if kind == "none" else reach, "hidden": hidden}
        peak = {"peak_mib": round(peak_bytes(setting) / 2**20, 1)} if peak_bytes(setting) else {}
        yield {**line, "ms_a_step_of_text": round(1000 * seconds, 4), **peak}


def half_precision(setting: Setting) -> Iterator[Line]:
    """Trains three kinds with bfloat16 autocast and in float32, and compares the losses of the last window."""
    count, steps = (20, 4) if setting.quick else (100, 4)
    for kind in ("none", "default", "dense"):
        losses = {}
        for dtype in (None, torch.bfloat16):
            torch.manual_seed(0)
            model = LanguageModel(50, embed=32, hidden=64, layers=1).to(setting.device)
            trainer = trainer_of(KINDS[kind], model, steps, setting.device, lr=1e-2)
            trainer.runner.autocast = dtype
            some = windows(4, steps, 8, 50, LOOKAHEAD, setting.device)
            for number in range(count):
                loss = step(trainer, some[number % len(some)])
            losses["float32" if dtype is None else "bfloat16"] = round(float(loss), 4)
            if setting.over:
                return
        yield {"kind": kind, "windows": count, "loss": losses, "passed": losses["bfloat16"] < 1.2 * losses["float32"] + 0.1}


def two_processes(setting: Setting) -> Iterator[Line]:
    """Trains in two processes, on two GPUs over NCCL or on the CPU over gloo, and compares the result with one process."""
    if setting.device.type == "cuda" and torch.cuda.device_count() < 2:
        yield {"skipped": "one GPU: two processes need two"}
        return
    yield ranks.compare(setting.device.type, setting.until - time.monotonic())


def copying(setting: Setting) -> Iterator[Line]:
    """Trains on the copy task at T = 4 with messages of the past, and yields a line for each length solved in time.

    The 256 lanes are those of Jaderberg et al. 2017.
    """
    torch.manual_seed(0)
    task, lanes = TASKS["copy"], 16 if setting.quick else 256
    model = VectorRNN(task.input_size, task.target_size, hidden=32 if setting.quick else 256).to(setting.device)

    def past(size: int) -> GatedPast:
        return GatedPast(size, 40, outputs=task.input_size, loss_fn=input_losses)

    predictor = dni.FutureGradient(model.initial_state(1), past, cells=dni.LSTM_CELLS).to(setting.device)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3, fused=True)
    trainer = dni.SequenceTrainer(model, optimizer, task.losses, synthesizer=predictor, clip=5.0, reduction="lane-mean")
    stream, curriculum = TaskStream(task, lanes=lanes, bptt=4, lookahead=0, seed=0), Curriculum(task)
    fresh, begun, total, counted = torch.Generator().manual_seed(77), time.monotonic(), 0.0, 0
    for window in stream:
        window = states.map_tensors(lambda tensor: tensor.to(setting.device), window)
        result = trainer.step(window.inputs, window.targets, ends=window.ends, mask=window.mask)
        total, counted = total + float(result.loss), counted + int(window.mask[:, 0].sum())
        if bool(window.ends.all()):
            error, total, counted = task.error_of_loss * total / counted, 0.0, 0
            if curriculum.observe(error) and curriculum.conclude(mean_error(model, task, curriculum.stage, fresh)):
                stream.stage = curriculum.stage
                seconds = round(time.monotonic() - begun, 1)
                yield {"solved": curriculum.solved, "updates": trainer.steps, "lanes": lanes, "seconds": seconds}
            if setting.over:
                break
    yield {"solved": curriculum.solved, "updates": trainer.steps, "lanes": lanes, "end": True}
