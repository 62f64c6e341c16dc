"""The training of peers.py in JAX: compiled truncated BPTT, and braintrace's online learning. Only its workers import this.

Legend: T = window length, B = lanes, V = vocabulary size, E = embedding size, H = hidden units.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import torch
from step_ways import CLIP, Setting, model_of

LR, DECAYS, TINY = 1e-3, (0.9, 0.999), 1e-8
"""The settings of Adam: those of `torch.optim.Adam` by default."""


def weights_of(setting: Setting) -> dict[str, Any]:
    """Returns the initial weights of the PyTorch ways as arrays of JAX."""
    model = model_of(setting)
    names = {
        "embedding": model.embedding.weight,
        "inputs": model.rnn.weight_ih_l0.T,
        "state": model.rnn.weight_hh_l0.T,
        "bias": model.rnn.bias_ih_l0,
        "state_bias": model.rnn.bias_hh_l0,  # separate from the other bias, as in PyTorch, because Adam updates each
        "projection": model.projection.weight.T,
        "projection_bias": model.projection.bias,
    }
    return {name: jnp.array(weight.detach().numpy()) for name, weight in names.items()}


def losses(weights: dict[str, Any], state: Any, tokens: Any) -> tuple[Any, Any]:
    """Returns the mean cross-entropy of a window [T, B] whose targets are its inputs, and the state after the window."""

    def step(state: Any, gates: Any) -> tuple[Any, Any]:
        hidden, cell = state
        i, f, g, o = jnp.split(gates + hidden @ weights["state"], 4, axis=-1)
        cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
        hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)
        return (hidden, cell), hidden

    gates = weights["embedding"][tokens] @ weights["inputs"] + (weights["bias"] + weights["state_bias"])  # [T, B, 4 H]
    state, outputs = jax.lax.scan(step, state, gates)
    logits = jax.nn.log_softmax(outputs @ weights["projection"] + weights["projection_bias"])
    return -jnp.take_along_axis(logits, tokens[..., None], axis=-1).mean(), state


def adam(weights: Any, moments: Any, gradients: Any, count: Any) -> tuple[Any, Any]:
    """Clips the norm of the gradients, makes a step of Adam, and returns the new weights and moments."""
    norm = jnp.sqrt(sum(jnp.sum(each**2) for each in jax.tree.leaves(gradients)))
    scale = jnp.minimum(1.0, CLIP / (norm + 1e-6))
    (one, two), (first, second) = DECAYS, moments
    first = jax.tree.map(lambda m, g: one * m + (1 - one) * scale * g, first, gradients)
    second = jax.tree.map(lambda v, g: two * v + (1 - two) * (scale * g) ** 2, second, gradients)
    rate, root = LR / (1 - one**count), jnp.sqrt(1 - two**count)
    weights = jax.tree.map(lambda w, m, v: w - rate * m / (jnp.sqrt(v) / root + TINY), weights, first, second)
    return weights, (first, second)


def truncated_bptt(setting: Setting, bptt: int) -> Callable[[], Any]:
    """Returns a function that makes one step of truncated BPTT, compiled as a whole, and returns the loss.

    JAX computes in the background, so the loss may not be ready yet; see `peers.finish`.
    """
    tokens = jnp.array(torch.randint(setting.vocabulary, (bptt, setting.lanes)).numpy())

    def update(carried: Any) -> tuple[Any, Any]:
        weights, moments, state, count = carried
        (loss, state), gradients = jax.value_and_grad(losses, has_aux=True)(weights, state, tokens)
        return (*adam(weights, moments, gradients, count), state, count + 1), loss

    compiled = jax.jit(update, donate_argnums=0)
    weights = weights_of(setting)
    zeros = lambda: jax.tree.map(jnp.zeros_like, weights)  # noqa: E731
    state = tuple(jnp.zeros((setting.lanes, setting.hidden)) for _ in range(2))
    carried: Any = (weights, (zeros(), zeros()), state, jnp.ones(()))

    def step() -> Any:
        nonlocal carried
        carried, loss = compiled(carried)
        return loss

    return step


def braintrace(setting: Setting, bptt: int, algorithm: str) -> Callable[[], Any]:
    """Returns a function that makes one step of braintrace's online learning.

    The layers have the sizes of the other ways. The embedding also has their initial weights. braintrace
    draws the initial weights of the other layers.
    """
    import brainstate
    import braintools
    import braintrace as library

    class Network(brainstate.nn.Module):  # type: ignore[misc]
        """Embedding, LSTM and projection."""

        def __init__(self) -> None:
            super().__init__()
            self.embedding = brainstate.ParamState(weights_of(setting)["embedding"])
            self.rnn = library.nn.LSTMCell(setting.embed, setting.hidden)
            self.projection = library.nn.Linear(setting.hidden, setting.vocabulary)

        def update(self, tokens: Any) -> Any:
            """Returns the logits of one step."""
            return self.projection(self.rnn(self.embedding.value[tokens]))

    network = Network()
    tokens = jnp.array(torch.randint(setting.vocabulary, (bptt, setting.lanes)).numpy())
    options = {"decay_or_rank": 0.9} if algorithm == "pp_prop" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # braintrace warns that the projection does not influence the state
        learner = library.compile(network, algorithm, tokens[0], batch_size=setting.lanes, **options)
    optimizer = braintools.optim.Adam(lr=LR)
    optimizer.register_trainable_weights(network.states(brainstate.ParamState))

    def loss_of(tokens: Any, targets: Any) -> Any:
        logits = jax.nn.log_softmax(learner(tokens))
        return -jnp.take_along_axis(logits, targets[:, None], axis=-1).mean()

    @brainstate.transform.jit  # type: ignore[untyped-decorator]
    def step() -> Any:
        gradients, loss = learner.etrace_grad(tokens, tokens, step_fn=loss_of, return_value=True)
        optimizer.update(brainstate.nn.clip_grad_norm(gradients, CLIP))
        return loss

    return step  # type: ignore[no-any-return]
