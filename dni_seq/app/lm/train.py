"""Trains a recurrent language model by truncated BPTT, with or without synthetic gradients.

python scripts/train_lm.py
    Train on the embedded corpus by characters, then print a text sample; two minutes on two cores.
python scripts/train_lm.py --dataset ptb
    Train a 2x200 LSTM on Penn Treebank words, windows of 5 steps, 6 epochs; an hour or more on one core.
python scripts/train_lm.py --dataset ptb --synthesizer none
    The same with plain truncated BPTT.
python scripts/train_lm.py --run-dir runs/mine --resume auto
    Resume runs/mine if it was stopped or killed, else start it. If its text has moved, add --data-file.
torchrun --standalone --nproc-per-node 2 scripts/train_lm.py --dataset ptb
    Train in two processes, each with half of the lanes; see docs/distributed.md.
tensorboard --logdir runs
    Show the curves.

A run writes to its directory: metrics.csv, TensorBoard events (--logger), config.json, tokenizer.json, checkpoints/last.pt,
previous.pt and best.pt (lowest validation loss), and summary.json. Ctrl-C saves a checkpoint and exits with status 130,
SIGTERM with 143, SIGHUP with 129. Invalid input, a full disk and a loss that stays NaN print one line on stderr and exit
with status 2. docs/reliability.md lists the failures that a run survives.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from dni_seq.app.lm.options import PRESETS, LanguageModelOptions, as_given
from dni_seq.app.runs.loading import loading
from dni_seq.app.runs.options import build, parse, report

_PROG = "train_lm"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status. Options are parsed before PyTorch is imported."""
    try:
        given = parse(
            LanguageModelOptions,
            arguments,
            prog=_PROG,
            description=__doc__ or "",
            presets=PRESETS,
            as_given=as_given,
        )
        if os.environ.get("WORLD_SIZE", "1") == "1":  # several ranks check later together, so that one reports
            build(LanguageModelOptions, given)
        if given.get("dry_run") and given.get("eval_only"):
            raise ValueError("--dry-run and --eval-only exclude each other: remove one of them")
    except (ValueError, OSError) as error:
        return report(_PROG, error)
    with loading(result=bool(given.get("dry_run") or given.get("eval_only"))):
        from dni_seq.app.lm.session import run
    return run(_PROG, given)
