"""Reports an unexpected error with its traceback and the versions that a bug report needs."""

from __future__ import annotations

import platform
import sys
import traceback
from collections.abc import Callable


def versions() -> dict[str, str]:
    """Returns the versions of dni_seq, torch and Python, and the system."""
    from importlib import metadata

    import torch

    try:
        own = metadata.version("dni-seq")
    except metadata.PackageNotFoundError:  # a clone on the path, not installed
        own = "not installed"
    return {
        "dni_seq": own,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def report_crash(main: Callable[[], int]) -> int:
    """Runs `main` and returns its exit status. For an unexpected exception, prints a traceback and returns 1."""
    try:
        return main()
    except Exception:
        traceback.print_exc()
        named = ", ".join(f"{name} {version}" for name, version in versions().items())
        print(
            f"This looks like a bug in dni_seq: please report the command and all of the output above, with {named}.",
            file=sys.stderr,
        )
        return 1
