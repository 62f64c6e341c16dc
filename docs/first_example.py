"""Runs README's first example and writes what it prints into README: python -m docs.first_example

The command needs about two minutes. `python -m docs.first_example --text` runs nothing, and writes the sentence again from
the last results, docs/results/first_example.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import json
import re
import time
from pathlib import Path
from typing import Any

import torch

README = Path(__file__).parents[1] / "README.md"
RECORD = Path(__file__).parent / "results" / "first_example.jsonl"
MARK = re.compile(r"(<!-- first example: written by \S+ -->\n).*?(<!-- end of first example -->)", re.DOTALL)
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
REPLACED = re.compile(r"^for inputs, targets in windows:\n.*?^    state = state\.detach\(\)\n", re.MULTILINE | re.DOTALL)


def programs(text: str) -> tuple[str, str]:
    """Returns two programs: README's first block of Python, and the same with README's second block in place of the loop."""
    before, lines, *_ = PYTHON.findall(text)
    after, count = REPLACED.subn(lambda _: lines, before)
    if count != 1:
        raise ValueError("README's first block must have the plain loop once")
    return before, after


def run(program: str) -> tuple[str, float]:
    """Runs a program and returns what it prints, and its CPU seconds."""
    shown, start = io.StringIO(), time.process_time()
    with contextlib.redirect_stdout(shown):
        exec(compile(program, "README.md", "exec"), {"__name__": "example"})
    return shown.getvalue().strip(), time.process_time() - start


def sentence(lines: list[dict[str, Any]]) -> str:
    """Returns the text below README's first example."""
    plain, synthetic, longer = lines
    return (
        f"The plain loop prints `{plain['printed']}` after {plain['seconds']:.0f} CPU seconds, the second program "
        f"`{synthetic['printed']}` after {synthetic['seconds']:.0f}.\n"
        f"Longer windows are cheaper, if they are possible: the plain loop with T = 8 prints `{longer['printed']}` "
        f"after {longer['seconds']:.0f}."
    )


def written(text: str) -> str:
    """Returns README's text with the sentence replaced by that of the recorded results."""
    lines = [json.loads(line) for line in RECORD.read_text(encoding="utf-8").splitlines()]
    return MARK.sub(lambda found: f"{found[1]}{sentence(lines)}\n{found[2]}", text)


def measure() -> None:
    """Runs the programs on one thread and records what they print."""
    torch.set_num_threads(1)
    before, after = programs(README.read_text(encoding="utf-8"))
    date = datetime.date.today().isoformat()
    with RECORD.open("w", encoding="utf-8") as file:
        for name, program in (
            ("plain loop", before),
            ("with a synthesizer", after),
            ("plain loop, T = 8", before.replace("T, LANES, STEPS, UNITS = 1,", "T, LANES, STEPS, UNITS = 8,")),
        ):
            printed, seconds = run(program)
            line = {"program": name, "printed": printed, "seconds": round(seconds, 1), "torch": torch.__version__}
            file.write(json.dumps({**line, "date": date}) + "\n")


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", action="store_true", help="run nothing")
    if not parser.parse_args().text:
        measure()
    README.write_text(written(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
