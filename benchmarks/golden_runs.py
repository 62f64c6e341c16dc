"""Compares two checkouts of this project: do short runs of the commands give bit-identical numbers?

python benchmarks/golden_runs.py compare --base ../before --data-dir data
    Record the runs in this checkout and in the one at ../before, side by side on this machine, and list every difference.
    The exit status is 1 if there is a difference.
python benchmarks/golden_runs.py record --output mine.jsonl
    Record the runs of this checkout only. Numbers differ between machines, so compare only files from one machine.

`git worktree add ../before COMMIT` makes a checkout to compare with. The runs cover every kind of synthesizer and target,
with LSTM and GRU, on one thread. A kind and cell have three runs of 200 windows: `train_lm.py` on the embedded corpus by
characters, with --data-dir also on Penn Treebank by words, and `train_tasks.py` on copying. The comparison covers all losses
of the model, all losses of the synthesizer, the parameters at the end, and the final scores. If two runs of one checkout end
with the same parameters, this is an error too: the options of one run then had no effect, and the run would test nothing.

The file depends on these parts of a checkout: the commands' options and modules, `SequenceTrainer.step`, `summary.json`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import importlib
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

WINDOWS = 200

KINDS: Mapping[str, str] = {
    "none": "none",
    "basic": "basic --synthetic-scale 0.5",
    "paper": "paper",
    "paper, auxiliary task": "paper --auxiliary 0.1",
    "paper, two horizons and tail": "paper --horizons 2 --tail --draw-horizon --synthetic-scale 0.5",
    "state": "state --synthetic-scale 0.5",
    "state, lambda": "state --targets lambda --replay-windows 4 --synthetic-scale 0.5",
    "state, target network": "state --target-network 20 --regress-every 1 --synthetic-scale 0.5",
    "multi-horizon": "multi-horizon",
    "multi-horizon, auto scale": "multi-horizon --fit least-squares --synthetic-scale auto --fidelity-every 7 --lookahead 5",
    "multi-horizon, auxiliary task": "multi-horizon --auxiliary 0.1",
    "multi-horizon, least squares": "multi-horizon --fit least-squares --synthetic-scale 1",
    "multi-horizon, descent": "multi-horizon --fit descent --horizons 2 --synthetic-scale 1",
    "multi-horizon, tail": "multi-horizon --fit descent --horizons 2 --tail --synthetic-scale 0.5",
    "multi-horizon, lambda": "multi-horizon --fit descent --targets lambda --synthetic-scale 0.5",
    "multi-horizon, raw": "multi-horizon --no-normalize --no-gate --message-clip 0 --synthetic-scale 0.5",
    "exact": "exact --fidelity-every 50",
    "exact, tail": "exact --tail --bptt 4",
    "exact, fitted tail": "exact --tail --bptt 4 --fit least-squares",
}
"""The options of every kind of synthesizer and target. Many set a scale, because "auto" injects nothing in a short run."""

SMALL = ["--hidden", "48", "--batch-size", "8", "--threads", "1", "--seed", "3"]
TEXT = ["--embed", "24", "--max-steps", str(WINDOWS), "--eval-every", "100", "--eval-tokens", "2000"]
PENN_TREEBANK = ["--dataset", "ptb", "--tokenizer", "word", "--dropout", "0.2"]
COPY = ["--task", "copy", "--updates", str(WINDOWS), "--start", "6"]
"""The options of copying. Sequences have 14 steps, in windows of 4, because a sequence of one window gets no message."""


def runs(data_dir: Path | None) -> Iterator[tuple[str, str, list[str]]]:
    """Yields the name, the script and the options of every run."""
    for cell in ("lstm", "gru"):
        for kind, options in KINDS.items():
            more = ["--synthesizer", *options.split(), "--model", cell, *SMALL]
            yield f"characters, {cell}: {kind}", "train_lm.py", [*more, *TEXT]
            if data_dir is not None:
                yield f"words, {cell}: {kind}", "train_lm.py", [*more, *TEXT, *PENN_TREEBANK, "--data-dir", str(data_dir)]
            yield f"copy, {cell}: {kind}", "train_tasks.py", [*more, *COPY]


def record(script: Path, options: list[str]) -> dict[str, Any]:
    """Runs one command in this process and returns digests of its losses and parameters, and its final scores."""
    import torch

    import dni_seq as dni

    losses: list[float] = []
    synthetic: list[float] = []
    trainers: list[dni.SequenceTrainer] = []
    step = dni.SequenceTrainer.step

    def watched(self: dni.SequenceTrainer, *args: Any, **more: Any) -> Any:
        result = step(self, *args, **more)
        trainers[:] = [self]
        if self.model.training:  # not a step of a comparison of gradients, which has the model in evaluation mode
            losses.append(float(result.loss))
            if result.synthetic is not None:
                synthetic.append(float(result.synthetic.loss))
        return result

    dni.SequenceTrainer.step = watched  # type: ignore[method-assign]
    if script.name == "train_lm.py" and has_schedules():
        options = [*options, "--schedule", "constant"]  # older checkouts have no other schedule
    with tempfile.TemporaryDirectory() as folder:
        status = main_of(script)([*options, "--run-dir", f"{folder}/run"])
        summary = json.loads(Path(folder, "run", "summary.json").read_text())
    assert status == 0, f"{script.name} {' '.join(options)} ended with status {status}"
    scores = [summary.get(name, {}).get("loss") for name in ("valid", "test")]
    parameters = hashlib.sha256()
    for parameter in trainers[0].model.parameters():
        parameters.update(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return {
        "windows": len(losses),
        "losses": digest(losses),
        "last loss": losses[-1],
        "synthesizer's losses": digest(synthetic),
        "parameters": parameters.hexdigest()[:16],
        "scores": scores if any(scores) else [summary.get("length"), summary.get("sequences")],
    }


def has_schedules() -> bool:
    """Whether this checkout's command has the option --schedule."""
    try:
        options = importlib.import_module("dni_seq.app.lm.options").LanguageModelOptions
    except ImportError:  # modules of older checkouts have other names
        return False
    return "schedule" in {entry.name for entry in dataclasses.fields(options)}


def main_of(script: Path) -> Any:
    """Returns the function `main` of a command from the module that its script names, or from the script if that has it."""
    named = re.search(r"The code is `(dni_seq[\w.]+)`", script.read_text(encoding="utf-8"))
    return runpy.run_path(str(script))["main"] if named is None else importlib.import_module(named[1]).main


def digest(numbers: list[float]) -> str:
    """Returns a short digest of numbers. Two digests are equal only if all bits of the numbers are equal."""
    return hashlib.sha256(" ".join(number.hex() for number in numbers).encode()).hexdigest()[:16]


def record_all(tree: Path, output: Path, data_dir: Path | None, only: str) -> int:
    """Records the runs of a checkout and returns the exit status.

    Each run has a child process of its own; the parent has already imported everything.
    """
    sys.path.insert(0, str(tree))
    import dni_seq

    assert Path(dni_seq.__file__).is_relative_to(tree), f"{dni_seq.__file__} is not in {tree}"
    # Import everything before the child processes start. A command may import torch only when it is called.
    main_of(tree / "scripts" / "train_lm.py")
    for module in ("dni_seq.app.lm.build_trainer", "dni_seq.app.lm.training"):
        with contextlib.suppress(ImportError):  # modules of other checkouts have other names
            importlib.import_module(module)
    failed = 0
    for name, script, options in runs(data_dir):
        if only not in name:
            continue
        child = os.fork()
        if child == 0:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            try:
                line = record(tree / "scripts" / script, options)
                with output.open("a") as file:
                    file.write(json.dumps({"run": name, **line}) + "\n")
                os._exit(0)
            except BaseException as error:
                print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                os._exit(1)
        failed += os.waitpid(child, 0)[1] != 0
    return int(failed > 0)


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Returns the recorded runs by name."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line.pop("run"): line for line in lines}


def compare(base: Path, data_dir: Path | None, only: str) -> int:
    """Records both checkouts side by side, prints every difference, and returns the exit status."""
    trees = [base.resolve(), Path(__file__).resolve().parents[1]]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, f"{i}.jsonl") for i in range(len(trees))]
        command = [sys.executable, __file__, "record", "--only", only]
        if data_dir is not None:
            command += ["--data-dir", str(data_dir.resolve())]
        children = [
            subprocess.Popen([*command, "--tree", str(tree), "--output", str(output)], cwd=tree)
            for tree, output in zip(trees, outputs, strict=True)
        ]
        failed = sum(child.wait() != 0 for child in children)
        before, after = map(read, outputs)
    different = [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]
    for name, line in after.items():
        if name not in different:
            print(f"same       {name}: {line['windows']} windows, parameters {line['parameters']}")
    for name in different:
        print(f"DIFFERENT  {name}: {before.get(name)} and {after.get(name)}")
    twins = list(without_effect(after))
    for name, other in twins:
        print(f"NO EFFECT  {name} ends as {other} does")
    print(f"{len(after)} runs, {len(different)} different")
    return int(bool(failed or different or twins or not after))


def without_effect(runs: dict[str, dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Yields the pairs of runs that end with the same parameters."""
    first: dict[str, str] = {}
    for name, line in runs.items():
        other = first.setdefault(line["parameters"], name)
        if other != name:
            yield name, other


def main() -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    for name in ("compare", "record"):
        part = parts.add_parser(name)
        part.add_argument("--data-dir", type=Path, metavar="DIR", help="holds ptb/ptb.train.txt; without it no words")
        part.add_argument("--only", default="", metavar="TEXT", help="runs whose name contains this")
        if name == "compare":
            part.add_argument("--base", type=Path, required=True, metavar="DIR", help="the other checkout")
        else:
            part.add_argument("--tree", type=Path, default=Path(__file__).resolve().parents[1], metavar="DIR")
            part.add_argument("--output", type=Path, required=True, metavar="FILE")
    options = parser.parse_args()
    if options.part == "compare":
        return compare(options.base, options.data_dir, options.only)
    return record_all(options.tree.resolve(), options.output, options.data_dir, options.only)


if __name__ == "__main__":
    sys.exit(main())
