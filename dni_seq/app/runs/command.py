"""Runs a training command: prepares its run, trains it, and reports the errors that are expected."""

from __future__ import annotations

from collections.abc import Callable

from dni_seq.app.runs.checkpoint import CheckpointError
from dni_seq.app.runs.loop import TrainingRun
from dni_seq.app.runs.options import program, report
from dni_seq.app.runs.signals import StopSignals, interrupt_exits
from dni_seq.core.nonfinite import NonFiniteError
from dni_seq.distributed.process_group import RankError, Ranks
from dni_seq.streams import DataError


def run_command(prog: str, ranks: Ranks, prepare: Callable[[], TrainingRun]) -> int:
    """Prepares a run, trains it and returns the exit status.

    An error that a user can mend, such as a wrong option, a missing file or a loss that is not finite, is one line on stderr
    and status 2.

    Args:
        prog: the command's name in messages.
        ranks: the ranks that share the run.
        prepare: makes the run, calls its `begin` and returns it. If it raises a ValueError or an OSError, it raises the same
            one on all ranks.
    """
    try:
        with interrupt_exits(f"{program(prog)}: stopped by Ctrl-C before training began"):
            training = prepare()
    except (ValueError, OSError) as error:
        return report(prog, error) if ranks.first else 2
    except RankError as error:
        return report(prog, error)
    try:
        with StopSignals() as stop:
            return training.train(stop)
    except RankError as error:
        where = f"rank {ranks.rank} stopped at {training.UNIT} {training.steps}"
        return report(prog, RankError(f"{where}: {error}; to resume from the last checkpoint: {training.how_to_resume}"))
    except DataError as error:
        if ranks.size > 1:  # no checkpoint: it needs all ranks, and the other ranks may not have this error
            return report(prog, DataError(f"rank {ranks.rank} stopped at {training.UNIT} {training.steps}: {error}"))
        return report(prog, training.save_after(error))
    except NonFiniteError as error:  # raised on all ranks at the same step, so that all can save
        end = training.save_after(error)
        return report(prog, end) if ranks.first else 2
    except (CheckpointError, OSError) as error:
        return report(prog, error)
    finally:
        training.close()
