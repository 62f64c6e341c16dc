"""`python -m dni_seq COMMAND ...` is `dni-seq COMMAND ...`."""

import sys

from dni_seq.app.cli import main

if __name__ == "__main__":
    sys.exit(main())
