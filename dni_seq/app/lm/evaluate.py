"""Scores a trained language model: loss in nats per token, perplexity, bits per character.

python scripts/evaluate_lm.py runs/mine
    Score the test split with the checkpoint of the lowest validation loss.
python scripts/evaluate_lm.py runs/mine --split valid --checkpoint last
    Score the validation split with the last checkpoint.
python scripts/evaluate_lm.py runs/mine --data-file other.txt
    Score another text.

The run directory provides the data set, the tokenizer and the model.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from dni_seq.app.lm import build as lm
from dni_seq.app.lm.options import LanguageModelOptions
from dni_seq.app.runs.directory import RunDirectory
from dni_seq.app.runs.options import OneLineParser, report
from dni_seq.app.runs.resume import saved_options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    given = read_arguments(arguments)
    run = RunDirectory(given.run_dir)
    changes = {name: getattr(given, name) for name in ("data_dir", "device", "threads") if getattr(given, name) is not None}
    try:
        options = saved_options(LanguageModelOptions, run, changes)
        torch.set_num_threads(options.threads)
        if given.data_file is not None:
            return evaluate_file(given, run, options)
        if given.text_column is not None:
            raise ValueError("--text-column needs --data-file, the file that has the column")
        for split, result in lm.score_run(run, run.checkpoint(given.checkpoint), (given.split,), options):
            print(lm.describe(split, result))
    except (ValueError, OSError) as error:
        return report("evaluate_lm", error)
    return 0


def evaluate_file(given: argparse.Namespace, run: RunDirectory, options: LanguageModelOptions) -> int:
    """Prints the score of a local text, and the share of its tokens outside the vocabulary if there are any.

    Raises:
        ValueError: the run or the text cannot be read.
    """
    checkpoint = run.checkpoint(given.checkpoint)
    result, stream = lm.score_file(run, checkpoint, given.data_file, given.text_column, options)
    print(lm.describe(given.data_file, result))
    if unknown := lm.describe_unknown({given.data_file: stream}):
        print(unknown)
    return 0


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the parsed command line."""
    parser = OneLineParser(
        prog="evaluate_lm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="run directory of scripts/train_lm.py")
    parser.add_argument("--split", choices=("valid", "test"), default="test", help="split to score (default: test)")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best", help="checkpoint to load (default: best)")
    parser.add_argument("--data-file", metavar="FILE", help="text to score instead of a split: file or quoted pattern")
    parser.add_argument("--text-column", metavar="NAME", help="text column of --data-file (default: text)")
    parser.add_argument("--data-dir", metavar="DIR", help="directory of the data sets (default: the run's)")
    parser.add_argument("--device", help="device: cpu, cuda, cuda:1, mps (default: the run's)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: the run's)")
    return parser.parse_args(arguments)
