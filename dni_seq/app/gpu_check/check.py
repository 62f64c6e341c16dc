"""Checks the library on a GPU, and measures what synthetic gradients cost there: JSON lines and a page of Markdown.

python scripts/gpu_check.py
    On the first GPU, sized for less than 8 minutes. Needs torch with NumPy alone.
python scripts/gpu_check.py --device cpu --quick
    Run the same parts with small sizes on the CPU, in a minute, to see whether the check itself works.

The parts, the most valuable first; each has its own time limit:
    identities       in float64, the device computes the same numbers as the CPU for every synthesizer; truncated BPTT with
                     an exact message gives the gradient of full BPTT
    synchronisation  no training step waits for the device
    costs            step time and peak memory of the trainer, compared with a plain loop
    reach            peak memory of T = 4 with messages of the next or the last 400 steps, and of BPTT over 400 steps
    half             training with bfloat16 autocast
    processes        training in two processes on two GPUs over NCCL
    copying          the copy task at T = 4 with 256 lanes: the lengths solved within the time limit
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from dni_seq.app.gpu_check import parts
from dni_seq.app.gpu_check.parts import Line, Setting
from dni_seq.app.runs.options import OneLineParser, report

_PROG = "gpu_check"


class Part(NamedTuple):
    """A part of the check.

    Attributes:
        run: yields its lines.
        seconds: its time limit.
        quick_seconds: its time limit with `--quick`.
    """

    run: Callable[[Setting], Iterator[Line]]
    seconds: float
    quick_seconds: float


PARTS: Mapping[str, Part] = MappingProxyType(
    {
        "identities": Part(parts.identities, 60, 10),
        "synchronisation": Part(parts.no_synchronisation, 40, 5),
        "costs": Part(parts.costs, 150, 10),
        "reach": Part(parts.memory_by_reach, 40, 5),
        "half": Part(parts.half_precision, 30, 10),
        "processes": Part(parts.two_processes, 60, 60),
        "copying": Part(parts.copying, 80, 5),
    }
)
"""The parts, the most valuable first."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; the exit status is 1 if something did not pass, 2 for bad input."""
    try:
        given = read_arguments(arguments)
        device = device_of(given.device)
        lines = list(run(device, given))
        if given.page is not None:
            Path(given.page).write_text(page(lines), encoding="utf-8")
    except (ValueError, OSError) as error:
        return report(_PROG, error)
    failed = [line for line in lines if line.get("passed") is False]
    print(f"{len(lines)} lines, {len(failed)} failed")
    return 1 if failed else 0


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the parsed command line."""
    parser = OneLineParser(prog=_PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="device to check: cuda, cuda:1, cpu (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="small sizes, about a minute")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS), metavar="PART", help="some parts")
    parser.add_argument("--results", metavar="FILE", help="append JSON lines to this file (default: the screen alone)")
    parser.add_argument("--page", metavar="FILE", help="write a page of Markdown")
    return parser.parse_args(arguments)


def device_of(name: str) -> torch.device:
    """Returns the device called `name`.

    Raises:
        ValueError: the device cannot be used.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def run(device: torch.device, given: argparse.Namespace) -> Iterator[Line]:
    """Runs the parts; prints, records and yields their lines. For a part that raises an exception, yields a failed line."""
    about = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "device": described(device)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name in given.parts:
            part = PARTS[name]
            limit = part.quick_seconds if given.quick else part.seconds
            for line in _lines(part.run, Setting(device, given.quick, time.monotonic() + limit)):
                whole = {"part": name, **line, **about}
                print(json.dumps({"part": name, **line}), flush=True)
                if given.results is not None:
                    with Path(given.results).open("a", encoding="utf-8") as file:
                        file.write(json.dumps(whole) + "\n")
                yield whole
    finally:
        torch.set_num_threads(threads)


def _lines(part: Callable[[Setting], Iterator[Line]], setting: Setting) -> Iterator[Line]:
    try:
        yield from part(setting)
    except Exception as error:  # the other parts can still run
        yield {"passed": False, "error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}


def described(device: torch.device) -> str:
    """Returns a description of a device: the GPU's name, or the processor with its one thread."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU, one thread"


def page(lines: Sequence[Line]) -> str:
    """Returns a page with a table for each part."""
    first = lines[0]
    text = [f"# The library on a GPU\n\n{first['device']}, PyTorch {first['torch']}, {first['date']}."]
    for name in PARTS:
        rows = [{key: value for key, value in line.items() if key not in ("part", "date", "torch", "device")}
                for line in lines if line["part"] == name]  # fmt: skip
        columns = list(dict.fromkeys(key for row in rows for key in row))
        if rows:
            text.append(f"## {name.capitalize()}\n\n" + "\n".join(table(columns, rows)))
    return "\n\n".join(text) + "\n"


def table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yields the lines of a table of Markdown."""
    yield "| " + " | ".join(column.replace("_", " ") for column in columns) + " |"
    yield "|" + "---|" * len(columns)
    for row in rows:
        yield "| " + " | ".join(str(row.get(column, "")) for column in columns) + " |"


if __name__ == "__main__":
    sys.exit(main())
