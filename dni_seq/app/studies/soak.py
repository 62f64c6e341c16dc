"""Kills training runs with SIGKILL at random moments, resumes them, and compares them with a run that was never killed.

python scripts/soak.py
    Test every kind of credit assignment, optimizer and schedule on the embedded corpus, 6 kills each; about eight minutes
    on one core.
python scripts/soak.py --dataset ptb --out docs/results/soak.json
    Test all kinds on Penn Treebank, and write the figures to a file.
python scripts/soak.py --kinds basic lambda --kills 50
    Test two kinds with 50 kills each.

Each run is a tiny scripts/train_lm.py with dropout in its own process. It is killed at a random time after its start or,
every second time, while it writes a checkpoint, and is then resumed with `--resume auto` until it finishes. In both runs
these must be bit-identical: parameters, buffers and normalisers, optimizer moments, hidden state, position in the text,
random state, unfinished averages, the best checkpoint, every TensorBoard point except time, speed and memory, and the final
scores. The exit status is 0 if nothing differs. Differences are printed and give status 1. Invalid input prints one line on
stderr and exits with status 2.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from dni_seq.app.lm.train import main as train_lm
from dni_seq.app.runs.checkpoint import load_checkpoint, write_json
from dni_seq.app.runs.directory import RunDirectory
from dni_seq.app.runs.metrics_file import read_curves
from dni_seq.app.runs.options import OneLineParser, report
from dni_seq.app.runs.trackers import METRICS

_MULTI = ("--synthesizer", "multi-horizon", "--synthesizer-hidden", "8")
_BASIC = ("--synthesizer", "basic", "--synthetic-scale", "0.5")
_NONE = ("--synthesizer", "none")
_MOMENTUM = ("--optimizer", "sgd", "--momentum", "0.9", "--lr", "3")
_SHORT_EPOCHS = ("--batch-size", "512", "--bptt", "8")

_FOLLOW = ("--scale-schedule", "follow")

KINDS = MappingProxyType(
    {
        "none": _NONE,
        "none by documents": (*_NONE, "--document-reset", "--shuffle-documents"),
        "basic": (*_BASIC, "--fidelity-every", "5", "--replay-windows", "3"),
        "basic, auto scale": ("--synthesizer", "basic", "--synthetic-scale", "auto", "--fidelity-every", "5"),
        "multi-horizon": (*_MULTI, "--horizons", "3", "--synthetic-scale", "auto", "--fidelity-every", "5"),
        "multi-horizon, tail, drawn": (*_MULTI, "--horizons", "2", "--tail", "--draw-horizon", "--synthetic-scale", "0.5"),
        "exact": ("--synthesizer", "exact", "--exact-steps", "6"),
        "exact with tail": ("--synthesizer", "exact", "--exact-steps", "3", "--tail", "--synthesizer-hidden", "8"),
        "lambda": (*_BASIC, "--targets", "lambda", "--replay-windows", "3"),
        "target network": (*_BASIC, "--target-network", "7"),
        "lambda, target network": (
            *_MULTI,
            "--horizons",
            "2",
            "--tail",
            "--targets",
            "lambda",
            "--replay-windows",
            "4",
            "--target-network",
            "5",
        ),
        "auxiliary": (*_BASIC, "--auxiliary", "0.1"),
        "adamw, linear": (*_MULTI, "--optimizer", "adamw", "--weight-decay", "0.1", "--schedule", "linear", *_FOLLOW),
        "cosine, warm-up": (*_MULTI, "--schedule", "cosine", "--warmup", "60", "--min-lr", "1e-4"),
        "sgd, step": (*_NONE, "--optimizer", "sgd", "--lr", "2", "--schedule", "step", *_SHORT_EPOCHS),
        "momentum, plateau": (*_NONE, *_MOMENTUM, "--schedule", "plateau", "--decay", "0.8", "--patience", "9"),
        "accumulation": (*_MULTI, "--accumulate", "7", "--schedule", "linear", "--warmup", "3"),
        "backward steps, chunks": (*_NONE, "--backward-steps", "12", "--checkpoint-every", "2"),
        "messages inside windows": (*_MULTI, "--message-every", "1"),
        "past and future": (*_MULTI, "--predict", "both", "--predict-steps", "9"),
        "exact traces": (*_MULTI, "--model", "lru", "--traces", "exact"),
        "factored traces": (*_MULTI, "--traces", "factored"),
        "sparse, accumulation": (*_NONE, "--sparse-embedding", "--accumulate", "3", "--schedule", "cosine"),
    }
)
"""Options by kind: truncated BPTT, every synthesizer, every target, every extension, every optimizer, every schedule."""

TINY = ("--embed", "8", "--hidden", "8", "--layers", "2", "--dropout", "0.3", "--bptt", "4", "--batch-size", "8")
LENGTH = ("--max-steps", "170", "--eval-every", "17", "--eval-tokens", "200", "--threads", "1", "--device", "cpu")

OF_THE_MACHINE = ("speed/", "memory/", "progress/seconds", "progress/process_seconds")
"""Prefixes of the TensorBoard keys whose values depend on the machine. They are not compared."""


class UnkilledRunError(RuntimeError):
    """Raised if the run that is never killed fails, for example because of its options."""


class Kill(NamedTuple):
    """One kill.

    Attributes:
        seconds: time from the start of the process to the kill.
        saving: whether the kill interrupted the writing of a checkpoint, which leaves an unfinished file or no last.pt.
        kept: number of steps in the newest checkpoint at the kill, 0 without a checkpoint.
    """

    seconds: float
    saving: bool
    kept: int


class Session:
    """Runs the training command in its own process, with its output in a file.

    The process is a fork of the calling process, which has already imported all modules. This saves a second per call.
    """

    def __init__(self, main: Callable[[Sequence[str]], int], arguments: Sequence[str], output: Path):
        self.began = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(main, arguments, output)

    @staticmethod
    def _run(main: Callable[[Sequence[str]], int], arguments: Sequence[str], output: Path) -> None:
        status = 70
        try:
            descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            status = main(arguments)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)

    def wait(self, seconds: float | None = None) -> int | None:
        """Waits for the exit status. Returns None if the process still runs `seconds` after its start."""
        end = None if seconds is None else self.began + seconds
        while end is None or time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG if end is not None else 0)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.001)
        return None

    def wait_for_saving(self, run: RunDirectory, times: int) -> int | None:
        """Waits until the process writes its `times`-th checkpoint. Returns None, or the exit status if it exits earlier."""
        status, before = None, False
        while status is None:
            saving = any(path.exists() for path in unfinished(run))
            times -= saving and not before
            if saving and times == 0:
                return None
            before = saving
            status = self.wait(time.monotonic() - self.began + 0.0003)
        return status

    def kill(self) -> int:
        """Sends SIGKILL and returns the exit status of the process."""
        os.kill(self.pid, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    given = read_arguments(arguments)
    try:
        return run(given)
    except (UnkilledRunError, OSError) as error:
        return report("soak", error)


def run(given: argparse.Namespace) -> int:
    """Tests the kinds of runs that the command line names and returns the exit status.

    Raises:
        UnkilledRunError: the training options are not valid.
        OSError: a file cannot be written.
    """
    # Import before the forks, which share the modules.
    import torch.utils.tensorboard

    torch.set_num_threads(1)
    length = LENGTH if given.max_steps is None else (*LENGTH, "--max-steps", str(given.max_steps))
    chosen = {"--dataset": given.dataset, "--data-file": given.data_file, "--tokenizer": given.tokenizer}
    data = [text for name, value in chosen.items() if value is not None for text in (name, value)]
    chance = random.Random(given.seed)
    began = time.monotonic()
    results = {}
    # After Ctrl-C a session may still be writing to the directory.
    with tempfile.TemporaryDirectory(prefix="soak-", ignore_cleanup_errors=True) as directory:
        for kind in given.kinds:
            options = (*TINY, *length, *data, *KINDS[kind])
            results[kind] = soak(train_lm, options, Path(directory) / kind.replace(" ", "-"), given.kills, chance)
            print(f"{kind}: {describe(results[kind])}", flush=True)
    total = totals(results)
    print(f"all: {describe(total)}, {time.monotonic() - began:.0f} s")
    if given.out is not None:
        about = {"torch": torch.__version__, "corpus": given.dataset or given.data_file or "pydoc", "seed": given.seed}
        about |= {"options": " ".join((*TINY, *length)), "seconds": round(time.monotonic() - began)}
        write_json(Path(given.out), {**about, "all": total, "kinds": results})
    return 1 if total["differences"] or total["failures"] else 0


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the parsed command line."""
    parser = OneLineParser(prog="soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=tuple(KINDS),
        default=list(KINDS),
        metavar="KIND",
        help="kinds of runs to test (default: all)",
    )
    parser.add_argument("--kills", type=int, default=6, help="number of kills per kind (default: 6)")
    parser.add_argument("--max-steps", type=int, help="steps of each run (default: 170)")
    parser.add_argument("--dataset", help="data set, as in train_lm.py")
    parser.add_argument("--data-file", help="training text, as in train_lm.py")
    parser.add_argument("--tokenizer", help="tokenizer, as in train_lm.py")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the times of the kills (default: 0)")
    parser.add_argument("--out", metavar="FILE", help="write the figures to this file as JSON")
    given: argparse.Namespace = parser.parse_args(arguments)
    if given.kills < 1:
        parser.error(f"--kills must be 1 or more, got {given.kills}")
    if given.max_steps is not None and given.max_steps < 1:
        parser.error(f"--max-steps must be 1 or more, got {given.max_steps}")
    return given


def soak(
    train: Callable[[Sequence[str]], int], options: Sequence[str], directory: Path, kills: int, chance: random.Random
) -> dict[str, Any]:
    """Kills and resumes runs with `options` until `kills` kills are done and each run has finished. Returns the figures."""
    directory.mkdir(parents=True)
    whole = RunDirectory(directory / "whole")
    session = Session(train, (*options, "--run-dir", str(whole.path)), directory / "whole.txt")
    status = session.wait()
    if status != 0:
        words = last_output(directory / "whole.txt")
        raise UnkilledRunError(f"a run that was not killed exited with status {status}: {words}")
    seconds = time.monotonic() - session.began
    done: list[Kill] = []
    differences: list[str] = []
    failures: list[str] = []
    runs = 0
    while len(done) < kills and not failures:
        runs += 1
        run = RunDirectory(directory / f"killed-{runs}")
        output = directory / f"killed-{runs}.txt"
        status = None
        while status is None:
            session = Session(train, (*options, "--run-dir", str(run.path), "--resume", "auto"), output)
            status = session.wait() if len(done) >= kills else until_moment(session, run, len(done), seconds, chance)
            if status is None and session.kill() == -signal.SIGKILL:
                done.append(taken_down(run, time.monotonic() - session.began))
        if status != 0:
            failures.append(f"status {status}: {output.read_text(encoding='utf-8', errors='replace')[-500:]}")
        else:
            differences += list(compare(whole, run))
    return {
        "runs": runs,
        "kills": len(done),
        "while saving": sum(kill.saving for kill in done),
        "before the first checkpoint": sum(kill.kept == 0 for kill in done),
        "kept steps": [kill.kept for kill in done],
        "differences": differences,
        "failures": failures,
    }


def last_output(output: Path) -> str:
    """Returns the last 1,000 characters of a session's output."""
    return output.read_text(encoding="utf-8", errors="replace")[-1000:]


def until_moment(session: Session, run: RunDirectory, number: int, seconds: float, chance: random.Random) -> int | None:
    """Waits for the moment of the next kill. Returns the exit status if the session ends earlier, else None.

    For an even `number`, the moment is a random time within half of `seconds`, the duration of a run. For an odd `number`,
    it is the writing of a checkpoint, at random the first to the fifth.
    """
    if number % 2 == 0:
        return session.wait(chance.uniform(0.0, 0.5 * seconds))
    return session.wait_for_saving(run, chance.randint(1, 5))


def taken_down(run: RunDirectory, seconds: float) -> Kill:
    """Returns the record of a kill from the files of the run."""
    newest = run.newest_checkpoint()
    saving = any(path.exists() for path in unfinished(run)) or (newest is not None and newest.note is not None)
    return Kill(round(seconds, 3), saving, 0 if newest is None else newest.content["trainer"]["steps"])


def unfinished(run: RunDirectory) -> list[Path]:
    """Returns the paths of the temporary files of checkpoints."""
    return [path.with_name(path.name + ".tmp") for path in (run.last, run.best)]


def compare(whole: RunDirectory, run: RunDirectory) -> Iterator[str]:
    """Yields the differences between a run and the run that was never killed."""
    for name in ("last", "best"):
        one, two = (load_checkpoint(each.checkpoint(name)) for each in (whole, run))
        for content in (one, two):
            counters = content["counters"]
            del counters["seconds"], counters["process_seconds"]
            counters["curve"] = [(tokens, bpc) for tokens, _, _, bpc in counters["curve"]]
        yield from differences_of(one, two, name)
    yield from differences_of(points(whole.path), points(run.path), "TensorBoard")
    yield from differences_of(metrics(whole.path), metrics(run.path), "metrics.csv")
    one, two = (json.loads(each.summary.read_text(encoding="utf-8")) for each in (whole, run))
    for name in ("steps", "updates", "tokens", "valid", "test"):
        yield from differences_of(one[name], two[name], f"summary.{name}")


def differences_of(one: Any, two: Any, name: str) -> Iterator[str]:
    """Yields the places at which two nests of plain values and tensors differ. Two NaNs at one place count as equal."""
    if type(one) is not type(two):
        yield f"{name}: {type(one).__name__} and {type(two).__name__}"
    elif isinstance(one, dict):
        for key in one.keys() ^ two.keys():
            yield f"{name}.{key}: only in one run"
        for key in one.keys() & two.keys():
            yield from differences_of(one[key], two[key], f"{name}.{key}")
    elif isinstance(one, (list, tuple)):
        if len(one) != len(two):
            yield f"{name}: {len(one)} and {len(two)} entries"
        for index, (a, b) in enumerate(zip(one, two, strict=False)):
            yield from differences_of(a, b, f"{name}[{index}]")
    elif isinstance(one, torch.Tensor):
        one, two = one.to_dense(), two.to_dense()
        same = one.shape == two.shape and one.dtype == two.dtype and torch.equal(one.nan_to_num(), two.nan_to_num())
        if not same or not torch.equal(one.isnan(), two.isnan()):
            yield f"{name}: tensors differ"
    elif one != two and not (one != one and two != two):
        yield f"{name}: {one!r} and {two!r}"


def points(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Returns every TensorBoard scalar of a run as (step, value) in file order, without time, speed and memory."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    keys = [key for key in events.Tags()["scalars"] if not key.startswith(OF_THE_MACHINE)]
    return {key: [(event.step, event.value) for event in events.Scalars(key)] for key in keys}


def metrics(run: Path) -> dict[str, dict[int, float]]:
    """Returns every curve of a run in metrics.csv as values by step, without time, speed and memory."""
    return {key: curve for key, curve in read_curves(run / METRICS).items() if not key.startswith(OF_THE_MACHINE)}


def totals(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Returns the figures of all kinds together: numbers are summed, lists are concatenated."""
    sums: dict[str, Any] = {}
    for result in results.values():
        for key, value in result.items():
            sums[key] = sums[key] + value if key in sums else value
    return sums


def describe(result: dict[str, Any]) -> str:
    """Returns the figures as one line, followed by the first differences and failures."""
    counts = [f"{value if isinstance(value, int) else len(value)} {key}" for key, value in result.items()]
    return "; ".join([", ".join(counts), *(result["differences"] + result["failures"])[:5]])
