"""synthesizer_context: a second input of synthesizers, beside the trigger."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_contexts: ContextVar[tuple[Any, ...]] = ContextVar("dni_seq_contexts", default=())


@contextmanager
def synthesizer_context(context: Any) -> Iterator[None]:
    """Passes `context` to the synthesizers of all interfaces that are called in the block.

    A context manager. If blocks are nested, an interface passes on the context of the innermost block around the call. Each
    thread has its own contexts.

    Source: the conditioning of Jaderberg et al. 2017, arXiv 1608.05343, section 2 (cDNI); the name is that of dni-pytorch.

    Args:
        context: the input that the synthesizers need; for `BasicSynthesizer` a tensor [..., context_dim], such as one-hot
            labels.
    """
    token = _contexts.set((*_contexts.get(), context))
    try:
        yield
    finally:
        _contexts.reset(token)


def current_context() -> Any:
    """Returns the context of the innermost `synthesizer_context` block of this thread, or None outside of such blocks."""
    contexts = _contexts.get()
    return contexts[-1] if contexts else None
