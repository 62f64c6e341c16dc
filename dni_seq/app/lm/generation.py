"""Generates text with a language model, one token after the other."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dni_seq.app.lm.evaluation import evaluating


@torch.no_grad()
def generate(
    model: nn.Module,
    prompt: Tensor,
    length: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator,
) -> list[int]:
    """Generates `length` tokens that continue `prompt`. The model reads the prompt from its initial state.

    Args:
        model: `model(tokens [T, 1], state) -> (logits [T, 1, V], state)` with `initial_state(1)`.
        prompt: token ids [n], n >= 1, on the model's device.
        length: number of tokens to generate.
        temperature: divisor of the logits; below 1 favours likely tokens.
        top_k: sample from the k most likely tokens only; None for all.
        generator: random generator on the CPU; the global generator is not used.

    Returns:
        The generated ids, without the prompt.

    Raises:
        ValueError: the prompt is empty, the temperature is not above 0, top_k is below 1, or the model's output is not
            finite.
    """
    if len(prompt) == 0:
        raise ValueError("the prompt must hold at least one token")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be 1 or more, got {top_k}")
    drawn: list[int] = []
    with evaluating(model):
        tokens, state = prompt[:, None], model.initial_state(1)  # type: ignore[operator]
        while len(drawn) < length:
            logits, state = model(tokens, state)
            drawn.append(_draw(logits[-1, 0].float().cpu() / temperature, top_k, generator))
            tokens = prompt.new_tensor([[drawn[-1]]])
    return drawn


def _draw(logits: Tensor, top_k: int | None, generator: torch.Generator) -> int:
    """Returns an id sampled from the softmax of logits [V], or of the `top_k` largest logits."""
    if not logits.isfinite().all():
        raise ValueError("the model's output is not finite because its training diverged: try a smaller --lr or --clip")
    if top_k is not None and top_k < len(logits):
        least = logits.topk(top_k).values[-1]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return int(torch.multinomial(logits.softmax(dim=0), 1, generator=generator))
