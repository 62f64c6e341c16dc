"""Kills training runs at random moments, resumes them, and compares with runs that were never killed.

`--help` lists the options. The code is `dni_seq.app.studies.soak`.
"""

import sys

from dni_seq.app.runs.crash_report import report_crash
from dni_seq.app.studies.soak import main

if __name__ == "__main__":
    sys.exit(report_crash(main))
