"""Trains two recurrent networks that tick at different rates.

`--help` lists the options. The code is `dni_seq.app.decoupled.train_multi_timescale`.
"""

import sys

from dni_seq.app.decoupled.train_multi_timescale import main
from dni_seq.app.runs.crash_report import report_crash

if __name__ == "__main__":
    sys.exit(report_crash(main))
