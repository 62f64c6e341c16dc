"""Writes text with a trained language model.

`--help` lists the options. The code is `dni_seq.app.lm.sample`.
"""

import sys

from dni_seq.app.lm.sample import main
from dni_seq.app.runs.crash_report import report_crash

if __name__ == "__main__":
    sys.exit(report_crash(main))
