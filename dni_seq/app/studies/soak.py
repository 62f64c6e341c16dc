"""Kill training runs with SIGKILL at random moments, go on with them, and compare with a run that was never killed.

python scripts/soak.py
    Every kind of credit on the embedded corpus, 6 kills each; about five minutes of one core.
python scripts/soak.py --dataset ptb --out docs/results/soak.json
    The same on Penn Treebank, with the figures in a file.
python scripts/soak.py --kinds basic lambda --kills 50

Each run is scripts/train_lm.py, tiny, with dropout, in a process of its own that is killed at a random time after its start,
or, every second time, while it writes a checkpoint. Then `--resume auto` goes on, is killed again, and so forth. Held to the
bit: parameters, buffers and normalisers, optimizers' moments, hidden state, position in the text, random state, half-filled
averages, the best checkpoint, every TensorBoard point but time, speed and memory, the final scores. Expected: no difference,
and exit status 0; a difference is printed, and the status is then 1.
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
from dni_seq.app.runs.options import OneLineParser

_MULTI = ("--synthesizer", "multi-horizon", "--synthesizer-hidden", "8")
_BASIC = ("--synthesizer", "basic", "--synthetic-scale", "0.5")

KINDS = MappingProxyType(
    {
        "none": ("--synthesizer", "none"),
        "none by documents": ("--synthesizer", "none", "--document-reset", "--shuffle-documents"),
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
    }
)
"""Options by kind of credit: truncated BPTT, every synthesizer, every target, every addition."""

TINY = ("--embed", "8", "--hidden", "8", "--layers", "2", "--dropout", "0.3", "--bptt", "4", "--batch-size", "8")
LENGTH = ("--max-steps", "170", "--eval-every", "17", "--eval-tokens", "200", "--threads", "1", "--device", "cpu")

OF_THE_MACHINE = ("speed/", "memory/", "progress/seconds")
"""TensorBoard keys that no two runs share."""


class Kill(NamedTuple):
    """One kill.

    Attributes:
        seconds: after the start of the process.
        saving: whether it fell while a checkpoint was being written: an unfinished file is left, or no last one.
        kept: steps in the newest checkpoint then, 0 where there was none.
    """

    seconds: float
    saving: bool
    kept: int


class Session:
    """One call of the training command in a process of its own, its output in a file.

    A fork of this process, which has imported all modules already, so that a call takes a second less.
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
        """The exit status, None where the process still runs after so many seconds."""
        end = None if seconds is None else self.began + seconds
        while end is None or time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG if end is not None else 0)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.001)
        return None

    def wait_for_saving(self, run: RunDirectory, times: int) -> int | None:
        """The exit status, None while a checkpoint is being written for the `times`-th time."""
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
        """SIGKILL; the status that the process has left."""
        os.kill(self.pid, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    given = read_arguments(arguments)
    # Before the forks, which share what is imported.
    import torch.utils.tensorboard

    torch.set_num_threads(1)
    chosen = {"--dataset": given.dataset, "--data-file": given.data_file, "--tokenizer": given.tokenizer}
    data = [text for name, value in chosen.items() if value is not None for text in (name, value)]
    chance = random.Random(given.seed)
    began = time.monotonic()
    results = {}
    with tempfile.TemporaryDirectory(prefix="soak-") as directory:
        for kind in given.kinds:
            options = (*TINY, *LENGTH, *data, *KINDS[kind])
            results[kind] = soak(train_lm, options, Path(directory) / kind.replace(" ", "-"), given.kills, chance)
            print(f"{kind}: {describe(results[kind])}", flush=True)
    total = totals(results)
    print(f"all: {describe(total)}, {time.monotonic() - began:.0f} s")
    if given.out is not None:
        about = {"torch": torch.__version__, "corpus": given.dataset or given.data_file or "pydoc", "seed": given.seed}
        about |= {"options": " ".join((*TINY, *LENGTH)), "seconds": round(time.monotonic() - began)}
        write_json(Path(given.out), {**about, "all": total, "kinds": results})
    return 1 if total["differences"] or total["failures"] else 0


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = OneLineParser(prog="soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--kinds", nargs="+", choices=tuple(KINDS), default=list(KINDS), metavar="KIND", help="(default: all)"
    )
    parser.add_argument("--kills", type=int, default=6, help="of each kind (default: 6)")
    parser.add_argument("--dataset", help="as for train_lm.py")
    parser.add_argument("--data-file", help="as for train_lm.py")
    parser.add_argument("--tokenizer", help="as for train_lm.py")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--out", metavar="FILE", help="write the figures there, as JSON")
    return parser.parse_args(arguments)


def soak(
    train: Callable[[Sequence[str]], int], options: Sequence[str], directory: Path, kills: int, chance: random.Random
) -> dict[str, Any]:
    """Kill runs with `options` so often, until each has finished all the same; what came of it."""
    directory.mkdir(parents=True)
    whole = RunDirectory(directory / "whole")
    session = Session(train, (*options, "--run-dir", str(whole.path)), directory / "whole.txt")
    status = session.wait()
    if status != 0:
        raise RuntimeError(f"a run that was not killed ended with status {status}: {last_output(directory / 'whole.txt')}")
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
    """The last of what a session has printed."""
    return output.read_text(encoding="utf-8", errors="replace")[-1000:]


def until_moment(session: Session, run: RunDirectory, number: int, seconds: float, chance: random.Random) -> int | None:
    """Wait for the moment of a kill: in turn anywhere in half of a whole run's time, and while a checkpoint is written."""
    if number % 2 == 0:
        return session.wait(chance.uniform(0.0, 0.5 * seconds))
    return session.wait_for_saving(run, chance.randint(1, 5))


def taken_down(run: RunDirectory, seconds: float) -> Kill:
    """What a kill has left."""
    newest = run.newest_checkpoint()
    saving = any(path.exists() for path in unfinished(run)) or (newest is not None and newest.note is not None)
    return Kill(round(seconds, 3), saving, 0 if newest is None else newest.content["trainer"]["steps"])


def unfinished(run: RunDirectory) -> list[Path]:
    """Where checkpoints are while they are being written."""
    return [path.with_name(path.name + ".tmp") for path in (run.last, run.best)]


def compare(whole: RunDirectory, run: RunDirectory) -> Iterator[str]:
    """Where a run differs from one that was never killed; nothing where it does not."""
    for name in ("last", "best"):
        one, two = (load_checkpoint(each.checkpoint(name)) for each in (whole, run))
        for content in (one, two):
            counters = content["counters"]
            del counters["seconds"], counters["process_seconds"]
            counters["curve"] = [(tokens, bpc) for tokens, _, _, bpc in counters["curve"]]
        yield from differences_of(one, two, name)
    yield from differences_of(points(whole.path), points(run.path), "TensorBoard")
    one, two = (json.loads(each.summary.read_text(encoding="utf-8")) for each in (whole, run))
    for name in ("steps", "tokens", "valid", "test"):
        yield from differences_of(one[name], two[name], f"summary.{name}")


def differences_of(one: Any, two: Any, name: str) -> Iterator[str]:
    """The places at which two nests of plain values and tensors differ, NaNs being equal."""
    if type(one) is not type(two):
        yield f"{name}: {type(one).__name__} and {type(two).__name__}"
    elif isinstance(one, dict):
        for key in one.keys() ^ two.keys():
            yield f"{name}.{key}: in one only"
        for key in one.keys() & two.keys():
            yield from differences_of(one[key], two[key], f"{name}.{key}")
    elif isinstance(one, (list, tuple)):
        if len(one) != len(two):
            yield f"{name}: {len(one)} and {len(two)} entries"
        for index, (a, b) in enumerate(zip(one, two, strict=False)):
            yield from differences_of(a, b, f"{name}[{index}]")
    elif isinstance(one, torch.Tensor):
        same = one.shape == two.shape and one.dtype == two.dtype and torch.equal(one.nan_to_num(), two.nan_to_num())
        if not same or not torch.equal(one.isnan(), two.isnan()):
            yield f"{name}: tensors differ"
    elif one != two and not (one != one and two != two):
        yield f"{name}: {one!r} and {two!r}"


def points(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Every TensorBoard scalar of a run, (step, value) in the order of its file, but for time, speed and memory."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    keys = [key for key in events.Tags()["scalars"] if not key.startswith(OF_THE_MACHINE)]
    return {key: [(event.step, event.value) for event in events.Scalars(key)] for key in keys}


def totals(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The sums over kinds, lists joined."""
    sums: dict[str, Any] = {}
    for result in results.values():
        for key, value in result.items():
            sums[key] = sums[key] + value if key in sums else value
    return sums


def describe(result: dict[str, Any]) -> str:
    """Figures in one line, what went wrong behind it."""
    counts = [f"{value if isinstance(value, int) else len(value)} {key}" for key, value in result.items()]
    return "; ".join([", ".join(counts), *(result["differences"] + result["failures"])[:5]])
