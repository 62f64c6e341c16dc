"""Generates text with a trained language model.

python scripts/sample_lm.py runs/mine
python scripts/sample_lm.py runs/mine --prompt "The statement" --length 300 --temperature 0.7 --top-k 40 --seed 3

The run directory provides the tokenizer and the model.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from dni_seq.app.build.device import device_of
from dni_seq.app.lm import build as lm
from dni_seq.app.runs.directory import RunDirectory
from dni_seq.app.runs.options import OneLineParser, report
from dni_seq.app.runs.output import output_status


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    given = read_arguments(arguments)
    run = RunDirectory(given.run_dir)
    try:
        loaded = lm.load_run(run, run.checkpoint(given.checkpoint), device_of(given.device))
        text = lm.sample_text(
            loaded.model,
            loaded.tokenizer,
            prompt=given.prompt,
            length=given.length,
            temperature=given.temperature,
            top_k=given.top_k,
            seed=loaded.options.seed if given.seed is None else given.seed,
        )
    except (ValueError, OSError) as error:
        return report("sample_lm", error)
    print(text)
    return output_status()


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the parsed command line."""
    lengths = ", ".join(f"{level} {length}" for level, length in lm.SAMPLE_LENGTH.items())
    parser = OneLineParser(
        prog="sample_lm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="run directory of scripts/train_lm.py")
    parser.add_argument("--prompt", default="\n", help="text to continue (default: a line break)")
    parser.add_argument("--length", type=int, help=f"number of tokens to generate (default: {lengths})")
    parser.add_argument(
        "--temperature",
        type=float,
        default=lm.SAMPLE_TEMPERATURE,
        help=f"sampling temperature; below 1 favours likely tokens (default: {lm.SAMPLE_TEMPERATURE})",
    )
    parser.add_argument("--top-k", type=int, help="sample from the k most likely tokens only (default: all)")
    parser.add_argument("--seed", type=int, help="random seed (default: the run's)")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best", help="checkpoint to load (default: best)")
    parser.add_argument("--device", help="device: cpu, cuda, cuda:1, mps (default: cuda if available, else cpu)")
    return parser.parse_args(arguments)
