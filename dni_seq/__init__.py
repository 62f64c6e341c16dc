"""Trains recurrent networks on long streams with truncated BPTT and synthetic gradients.

There are three levels of use: the command `python scripts/train_lm.py`, `SequenceTrainer` in your own training loop, and
the interfaces such as `BackwardInterface`. `import dni_seq` needs no package but torch, which is imported at the first use
of a public name, so that a command shows its help, or an error in its options, without waiting for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dni_seq.public import *  # noqa: F403  # that module lists the public names

__version__ = "0.1.0"
"""The version of the package, which `pyproject.toml` reads from here."""


def __getattr__(name: str) -> Any:
    """Returns a public name, or a subpackage that was imported together with the public names."""
    public = importlib.import_module("dni_seq.public")
    if name in ("__all__", *public.__all__):
        return getattr(public, name)
    if name in globals():  # a subpackage such as `core`, which `dni_seq.public` has imported
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Returns the public names and the names that this module already holds."""
    return sorted({*globals(), *importlib.import_module("dni_seq.public").__all__})
