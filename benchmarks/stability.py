"""Do default synthetic gradients ever do harm? Compares short runs with truncated BPTT over seeds, rates and windows.

python benchmarks/stability.py --dataset ptb --output docs/results/stability.jsonl
    Make 20 pairs of runs, in ten minutes on one core, and write one JSON line for each pair.
python benchmarks/stability.py --tables docs/results/stability.jsonl
    Measure nothing; print the recorded lines as a table of Markdown.

A pair is a run with the default synthesizer and a run of truncated BPTT, with the same initial weights, text and settings:
by characters, LSTM of 256 units. The range of learning rates from 1e-4 to 1e-2 is cut into 20 parts of equal length on a
logarithmic scale, and each pair draws its rate from another part. The pairs take the window lengths 1, 2, 4, 8, 16 and 32 in
turn. The results of a run are the mean loss of the last quarter of the windows, and the largest absolute value of a cell in
the whole run.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dni_seq.app.lm import build as lm
from dni_seq.app.lm.build_trainer import build_trainer, cell_size
from dni_seq.app.lm.options import LanguageModelOptions
from dni_seq.app.runs.options import build
from dni_seq.app.studies.records import append_line, markdown, read_lines

BPTT = (1, 2, 4, 8, 16, 32)
RATES, STRATA = (1e-4, 1e-2), 20
STRIDE = 7
"""The distance from a pair's part of the range of rates to the next pair's part. Each window length thus gets low and high
rates.

The number is prime to 20, so 20 pairs use all 20 parts.
"""

WAYS = ("none", "multi-horizon")
SIZES: Mapping[str, Any] = {"tokenizer": "char", "embed": 64, "hidden": 256, "layers": 1, "dropout": 0.0, "batch_size": 32}


def one_run(text: Mapping[str, Any], way: str, bptt: int, lr: float, seed: int, windows: int) -> tuple[float, float]:
    """Trains one run. Returns the mean loss of the last quarter of the windows, nats a token, and the largest cell.

    The largest cell is the largest absolute value of an LSTM cell in the run.
    """
    options = build(
        LanguageModelOptions, {**SIZES, "clip": 1.0, "bptt": bptt, "lr": lr, "seed": seed, **text}, {"synthesizer": way}
    )
    corpus = lm.open_text(options)
    tokenizer = lm.build_tokenizer(options, corpus)
    stream = lm.open_training(corpus, tokenizer, options)
    torch.manual_seed(seed)
    device = torch.device("cpu")
    trainer = build_trainer(options, lm.build_model(options, tokenizer.vocabulary_size, device), device)
    losses: list[float] = []
    largest = 0.0
    while len(losses) < windows:
        for window in stream:
            result = trainer.step(
                window.inputs, window.targets, ends=window.ends, mask=window.mask, lookahead=window.lookahead
            )
            losses.append(float(result.loss))
            largest = max(largest, cell_size(trainer)["state/cell_max"])
            if len(losses) == windows:
                break
    last = losses[-(windows // 4) :]
    return sum(last) / len(last), largest


def pair(text: Mapping[str, Any], number: int, windows: int) -> dict[str, Any]:
    """Trains both runs of a pair and returns its line."""
    drawn = float(torch.rand((), generator=torch.Generator().manual_seed(number)))
    low, high = (math.log(rate) for rate in RATES)
    lr = math.exp(low + (high - low) * (number * STRIDE % STRATA + drawn) / STRATA)
    bptt = BPTT[number % len(BPTT)]
    found = {way: one_run(text, way, bptt, lr, number, windows) for way in WAYS}
    line: dict[str, Any] = {"seed": number, "bptt": bptt, "lr": lr, "windows": windows, "torch": torch.__version__}
    for way, (loss, largest) in found.items():
        line |= {f"{way}: loss": loss, f"{way}: largest cell": largest}
    return line | {"ratio": found["multi-horizon"][0] / found["none"][0]}


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Returns a table with a row for each pair, ordered by T and learning rate, and a line with the largest ratio."""
    rows = [
        [
            str(line["bptt"]),
            f"{line['lr']:.1e}",
            *(f"{line[f'{way}: loss']:.3f}" for way in WAYS),
            f"{line['ratio']:.3f}",
            *(f"{line[f'{way}: largest cell']:.1f}" for way in WAYS),
        ]
        for line in sorted(lines, key=lambda line: (line["bptt"], line["lr"]))
    ]
    header = ["T", "learning rate", *(f"loss, {way}" for way in WAYS), "ratio", *(f"largest cell, {way}" for way in WAYS)]
    return markdown(header, rows) + f"\nlargest ratio {max(line['ratio'] for line in lines):.3f}"


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help="as for scripts/train_lm.py")
    parser.add_argument("--data-dir", help="as for scripts/train_lm.py")
    parser.add_argument("--data-file", help="as for scripts/train_lm.py")
    parser.add_argument("--pairs", type=int, default=20, help="of runs (default: 20)")
    parser.add_argument("--windows", type=int, default=400, help="of a run (default: 400)")
    parser.add_argument("--output", type=Path, help="JSON lines; pairs that it has are not run again")
    parser.add_argument("--tables", type=Path, help="print lines that are on record, as a table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.tables:
        print(table(read_lines(options.tables)))
        return
    text = {name: getattr(options, name) for name in ("dataset", "data_dir", "data_file") if getattr(options, name)}
    known = {line["seed"] for line in read_lines(options.output)} if options.output else set()
    for number in range(options.pairs):
        if number not in known:
            line = pair(text, number, options.windows)
            print(json.dumps(line), flush=True)
            if options.output:
                append_line(options.output, line)


if __name__ == "__main__":
    main()
