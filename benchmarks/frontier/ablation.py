"""The ablation of the frontier study: changes one choice of a predictive message at a time, on copying and words, one seed.

On copying, the unchanged method has windows of 4 steps, and messages of the last 40 inputs at the end of each window. On
words, the unchanged method has windows of 35 steps, and messages every 5 steps from a predictor of the next 5 words.

Legend: T = window length in steps, m = steps predicted, n = steps from message to message.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "studies"))
from trials import Trial

REMOVED = None
"""The value of a setting that a row removes from its base."""

BASES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "copy": {"method": "past", "T": 4, "rate": 4e-3, "seconds": 150, "predict": "past", "steps": 40},
        "words": {"method": "dense", "T": 35, "rate": 8e-3, "budget": 1, "dropout": 0.2, "predict": "horizons", "steps": 5}
        | {"horizons": 1, "every": 5, "weight": 0.1},
    }
)

ROWS: Mapping[str, Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "copy": {
            "nothing": {},
            "n = 2": {"every": 2},
            "n = 1": {"every": 1},
            "n = 2, no message at the end": {"every": 2, "end": False},
            "m = 10": {"steps": 10},
            "m = 20": {"steps": 20},
            "future": {"predict": "future"},
            "past and future": {"predict": "both"},
            "the next two windows": {"predict": "horizons", "horizons": 2, "steps": 8},
            "no gate of the cells": {"gate": False},
            "10 of the 40 steps, at random": {"draws": 10},
        },
        "words": {
            "nothing": {},
            "n = 10": {"every": 10},
            "n = 35, the end alone": {"every": REMOVED},
            "no message at the end": {"end": False},
            "m = 10": {"steps": 10},
            "past, m = 20": {"predict": "past", "horizons": REMOVED, "steps": 20},
            "past and future, m = 20": {"predict": "both", "horizons": REMOVED, "steps": 20},
            "future by gated reading, m = 20": {"predict": "future", "horizons": REMOVED, "steps": 20},
            "past, 5 of 20 steps at random": {"predict": "past", "horizons": REMOVED, "steps": 20, "draws": 5},
            "no gate of the cells": {"gate": False},
        },
    }
)
"""The changed settings of each row, by task."""


def row_trial(task: str, row: str) -> Trial:
    """Returns the trial of a row."""
    settings = {"part": "ablation", "task": task, **BASES[task], "seed": 1, **ROWS[task][row]}
    return {name: value for name, value in settings.items() if value is not REMOVED}


def ablation() -> Iterator[Trial]:
    """Yields the trials of all rows, copying first."""
    yield from (row_trial(task, row) for task, rows in ROWS.items() for row in rows)
