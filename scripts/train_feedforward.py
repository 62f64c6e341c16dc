"""Trains a feed-forward network on digits, with synthetic gradients between its layers.

`--help` lists the options. The code is `dni_seq.app.feedforward.train`.
"""

import sys

from dni_seq.app.feedforward.train import main
from dni_seq.app.runs.crash_report import report_crash

if __name__ == "__main__":
    sys.exit(report_crash(main))
