"""Trains a recurrent network on copy, repeat copy or the adding problem.

`--help` lists the options. The code is `dni_seq.app.tasks.train`.
"""

import sys

from dni_seq.app.runs.crash_report import report_crash
from dni_seq.app.tasks.train import main

if __name__ == "__main__":
    sys.exit(report_crash(main))
