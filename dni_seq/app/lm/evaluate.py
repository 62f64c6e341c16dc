"""Scores a trained language model: loss in nats per token, perplexity, bits per character.

python scripts/evaluate_lm.py runs/mine
    Score the test split with the checkpoint of the lowest validation loss.
python scripts/evaluate_lm.py runs/mine --split valid --checkpoint last
    Score the validation split with the last checkpoint.
python scripts/evaluate_lm.py runs/mine --data-file book.txt
    Score the whole of another text. If book.txt is the run's own text, which has moved, score its test split.

The run directory provides the data set, the tokenizer and the model. If scoring stops at a limit on the number of
tokens, the line after the score says so. Invalid input prints one line on stderr and exits with status 2.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import torch

from dni_seq.app.build.device import device_of
from dni_seq.app.lm import build as lm
from dni_seq.app.lm.options import LanguageModelOptions
from dni_seq.app.lm.scoring import ScoredText, is_own_text, score_other_text, score_splits
from dni_seq.app.runs.directory import RunDirectory
from dni_seq.app.runs.options import OneLineParser, flag, report
from dni_seq.app.runs.output import output_status
from dni_seq.app.runs.resume import saved_options

OF_THE_CALL = (
    *("data_dir", "device", "threads", "eval_tokens", "data_file", "valid_file", "test_file"),
    *("invalid_utf8", "null_text"),
)
"""Options of the run for which this command accepts other values."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    given = read_arguments(arguments)
    try:
        for scored in scores(given):
            print(*scored.lines(), sep="\n")
    except (ValueError, OSError) as error:
        return report("evaluate_lm", error)
    return output_status()


def scores(given: argparse.Namespace) -> Iterator[ScoredText]:
    """Yields the score of the split or of the text that the command line names.

    Raises:
        ValueError: the run or the text cannot be used.
    """
    if given.text_column is not None and given.data_file is None:
        raise ValueError("--text-column needs --data-file, the file that has the column")
    run = RunDirectory(given.run_dir)
    changes = {name: getattr(given, name) for name in OF_THE_CALL if getattr(given, name) is not None}
    options = saved_options(LanguageModelOptions, run, changes)
    torch.set_num_threads(options.threads)
    loaded = lm.load_run(run, run.checkpoint(given.checkpoint), device_of(options.device))
    if given.data_file is None or (loaded.options.data_file is not None and is_own_text(loaded, options)):
        yield from score_splits(loaded, (given.split or "test",), options)
        return
    for name in ("split", "valid_file", "test_file"):
        if getattr(given, name) is not None:
            raise ValueError(
                f"--data-file {given.data_file} is not the text of the run, so it is scored whole: remove {flag(name)}"
            )
    yield score_other_text(loaded, options, given.data_file, given.text_column)


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the parsed command line."""
    parser = OneLineParser(
        prog="evaluate_lm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="run directory of scripts/train_lm.py")
    parser.add_argument("--split", choices=("valid", "test"), help="split to score (default: test)")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best", help="checkpoint to load (default: best)")
    parser.add_argument("--text-column", metavar="NAME", help="text column of --data-file (default: text)")
    parser.add_argument("--data-dir", metavar="DIR", help="directory of the data sets (default: the run's)")
    parser.add_argument(
        "--data-file",
        metavar="FILE",
        help="where the run's training text is now, or another text to score: file or quoted pattern (default: the run's)",
    )
    parser.add_argument("--valid-file", metavar="FILE", help="where the run's --valid-file is now (default: the run's)")
    parser.add_argument("--test-file", metavar="FILE", help="where the run's --test-file is now (default: the run's)")
    parser.add_argument("--invalid-utf8", choices=("error", "replace"), help="bytes that are not UTF-8 (default: the run's)")
    parser.add_argument("--null-text", choices=("error", "skip"), help="rows whose text is null (default: the run's)")
    parser.add_argument("--eval-tokens", type=int, help="largest number of tokens to score (default: the run's)")
    parser.add_argument("--device", help="device: cpu, cuda, cuda:1, mps (default: the run's)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: the run's)")
    return parser.parse_args(arguments)
