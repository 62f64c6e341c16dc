"""Trains the two parts of a network in two processes that do not wait for each other.

`--help` lists the options. The code is `dni_seq.app.decoupled.train`.
"""

import os
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # The imports take seconds, and a KeyboardInterrupt in them can be lost: Ctrl-C ends the process until `run_module`
    # restores the handler.
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"train_decoupled: stopped by Ctrl-C\n"), os._exit(130)))

from dni_seq.app.runs.program import leave, run_module

if __name__ == "__main__":
    leave(run_module("dni_seq.app.decoupled.train"))
