"""Trains a recurrent language model.

`--help` lists the options. The code is `dni_seq.app.lm.train`.
"""

import os
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # The imports take seconds, and a KeyboardInterrupt in them can be lost: Ctrl-C ends the process until `run_program`
    # restores the handler.
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"train_lm: stopped by Ctrl-C\n"), os._exit(130)))

from dni_seq.app.lm.train import main
from dni_seq.app.runs.program import leave, run_program

if __name__ == "__main__":
    leave(run_program(main))
