"""Sets the options of truncated BPTT on a trainer."""

from __future__ import annotations

from dni_seq.app.build.backpropagation_options import BackpropagationOptions
from dni_seq.trainer import SequenceTrainer


def set_backpropagation(trainer: SequenceTrainer, options: BackpropagationOptions, bptt: int) -> None:
    """Sets the options on a trainer that has not stepped yet.

    Raises:
        ValueError: `--backward-steps` is not a multiple of `bptt`, or is given with a synthesizer; or `--checkpoint-every`
            is given with an auxiliary task or with messages inside the window.
    """
    windows = options.backward_windows(bptt)
    if windows > 1 and trainer.credit is not None:
        raise ValueError("--backward-steps needs --synthesizer none: a message would count later losses twice")
    if options.checkpoint_every is not None and trainer.credit is not None and trainer.credit.auxiliary is not None:
        raise ValueError("--checkpoint-every does not work with --auxiliary: remove one of them")
    if options.checkpoint_every is not None and trainer.credit is not None and trainer.credit.settings.message_every:
        raise ValueError("--checkpoint-every does not work with --message-every: remove one of them")
    trainer.backward_windows, trainer.checkpoint_every = windows, options.checkpoint_every
