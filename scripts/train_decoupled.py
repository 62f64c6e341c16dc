"""Trains the two parts of a network in two processes that do not wait for each other.

`--help` lists the options. The code is `dni_seq.app.decoupled.train`.
"""

import sys

from dni_seq.app.decoupled.train import main
from dni_seq.app.runs.crash_report import report_crash

if __name__ == "__main__":
    sys.exit(report_crash(main))
