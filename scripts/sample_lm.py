"""Writes text with a trained language model.

`--help` lists the options. The code is `dni_seq.app.lm.sample`.
"""

import os
import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # The imports take seconds, and a KeyboardInterrupt in them can be lost: Ctrl-C ends the process until `run_module`
    # restores the handler.
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"sample_lm: stopped by Ctrl-C\n"), os._exit(130)))

from dni_seq.app.runs.program import run_module

if __name__ == "__main__":
    sys.exit(run_module("dni_seq.app.lm.sample", result=True))
