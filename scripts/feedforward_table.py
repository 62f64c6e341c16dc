"""Runs the feed-forward study and writes its tables.

`--help` lists the options. The code is `dni_seq.app.feedforward.table`.
"""

import sys

from dni_seq.app.feedforward.table import main
from dni_seq.app.runs.crash_report import guarded

if __name__ == "__main__":
    sys.exit(guarded(main))
