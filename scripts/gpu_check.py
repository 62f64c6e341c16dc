"""Checks the library on a GPU, and measures what synthetic gradients cost there.

`--help` lists the options. The code is `dni_seq.app.gpu_check.check`.
"""

import os
import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # The imports take seconds, and a KeyboardInterrupt in them can be lost: Ctrl-C ends the process until `run_module`
    # restores the handler.
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"gpu_check: stopped by Ctrl-C\n"), os._exit(130)))

from dni_seq.app.runs.program import run_module

if __name__ == "__main__":
    sys.exit(run_module("dni_seq.app.gpu_check.check"))
