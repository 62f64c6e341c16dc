"""Expands `~` in paths that users give."""

from __future__ import annotations

import os
from pathlib import Path


def expand_home(name: str | Path) -> Path:
    """Returns the path `name`; a leading `~` or `~USER` becomes the home directory, unless a file has that name."""
    path = Path(name)
    if not path.parts or not path.parts[0].startswith("~") or os.path.lexists(path.parts[0]):
        return path
    return Path(os.path.expanduser(path))
