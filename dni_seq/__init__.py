"""Trains recurrent networks on long streams with truncated BPTT and synthetic gradients.

There are three levels of use: the command `python scripts/train_lm.py`, `SequenceTrainer` in your own training loop, and
the interfaces such as `BackwardInterface`. `import dni_seq` needs no package but torch, and imports torch only when a public
name is first used. A command can therefore show its help, or an error in its options, at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dni_seq.public import *  # noqa: F403  # the names are listed once, in dni_seq.public

__version__ = "0.1.0"
"""The version of the package, which `pyproject.toml` reads from here."""


def __getattr__(name: str) -> Any:
    """Returns the object of a public name, or a folder or module of this package by its name."""
    public = importlib.import_module("dni_seq.public")
    if name in ("__all__", *public.__all__):
        return getattr(public, name)
    if name in globals():  # a folder such as `core`, which is imported by now
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Returns the public names, and the names that this module has already."""
    return sorted({*globals(), *importlib.import_module("dni_seq.public").__all__})
