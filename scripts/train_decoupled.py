"""Trains the two parts of a network in two processes that do not wait for each other.

`--help` lists the options. The code is `dni_seq.app.decoupled.train`.
"""

import os
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # The imports take seconds, and an exception in them can be lost. `run_program` restores the handler.
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"train_decoupled: stopped by Ctrl-C\n"), os._exit(130)))

from dni_seq.app.decoupled.train import main
from dni_seq.app.runs.program import run_program
from dni_seq.distributed.process_group import leave

if __name__ == "__main__":
    leave(run_program(main))
