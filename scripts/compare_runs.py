"""Compares training runs, as a table and a plot.

`--help` lists the options. The code is `dni_seq.app.studies.compare_runs`.
"""

import sys

from dni_seq.app.runs.crash_report import report_crash
from dni_seq.app.studies.compare_runs import main

if __name__ == "__main__":
    sys.exit(report_crash(main))
