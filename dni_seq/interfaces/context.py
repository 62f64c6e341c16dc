"""synthesizer_context: what synthesizers see beside their trigger."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_contexts: ContextVar[tuple[Any, ...]] = ContextVar("dni_seq_contexts", default=())


@contextmanager
def synthesizer_context(context: Any) -> Iterator[None]:
    """Give `context` to the synthesizers of all interfaces that are called in the block; blocks nest, the innermost counts.

    Args:
        context: what the synthesizers expect: for `BasicSynthesizer`, a tensor [..., context_dim], such as one-hot labels.
    """
    token = _contexts.set((*_contexts.get(), context))
    try:
        yield
    finally:
        _contexts.reset(token)


def current_context() -> Any:
    """The context of the innermost `synthesizer_context` block of this thread, None outside of any."""
    contexts = _contexts.get()
    return contexts[-1] if contexts else None
