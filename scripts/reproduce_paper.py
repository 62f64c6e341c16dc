"""Runs the experiments of Jaderberg et al. 2017 and an ablation.

`--help` lists the options. The code is `dni_seq.app.studies.reproduce`.
"""

import sys

from dni_seq.app.runs.crash_report import report_crash
from dni_seq.app.studies.reproduce import main

if __name__ == "__main__":
    sys.exit(report_crash(main))
