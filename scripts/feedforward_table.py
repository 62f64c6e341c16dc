"""Runs the feed-forward study and writes its tables.

`--help` lists the options. The code is `dni_seq.app.studies.feedforward_table`.
"""

import sys

from dni_seq.app.runs.crash_report import report_crash
from dni_seq.app.studies.feedforward_table import main

if __name__ == "__main__":
    sys.exit(report_crash(main))
