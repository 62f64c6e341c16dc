"""Checks the arguments of `SequenceTrainer`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dni_seq.credit.config import SyntheticGradientConfig
from dni_seq.synthesizers.base import past_steps


def check_kinds(
    model: Any,
    optimizer: Any,
    loss_fn: Any,
    synthesizer: Any,
    synthesizer_optimizer: Any,
    config: Any,
    autocast: Any,
    clip: float | None,
) -> None:
    """Raises a TypeError if an argument of a trainer has a wrong type, for example after two arguments were swapped.

    Raises a ValueError if `clip` is not positive.
    """
    kinds: list[tuple[str, Any, Any, str]] = [
        ("model", model, nn.Module, "an nn.Module"),
        ("optimizer", optimizer, torch.optim.Optimizer, "an optimizer of the model's parameters"),
        ("loss_fn", loss_fn, Callable, "a function of outputs and targets"),
    ]
    optional: list[tuple[str, Any, Any, str]] = [
        ("synthesizer", synthesizer, nn.Module, "an nn.Module such as dni_seq.FutureGradient.for_model(...)"),
        ("synthesizer_optimizer", synthesizer_optimizer, torch.optim.Optimizer, "an optimizer of its parameters"),
        ("config", config, SyntheticGradientConfig, "a SyntheticGradientConfig"),
        ("autocast", autocast, torch.dtype, "a dtype such as torch.bfloat16"),
    ]
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be positive, or None for no limit, got {clip}")
    for name, value, kind, wanted in [*kinds, *(row for row in optional if row[1] is not None)]:
        if not isinstance(value, kind):
            found = repr(value) if isinstance(value, (str, bool)) else type(value).__name__
            raise TypeError(f"{name} must be {wanted}, got {found}")


def chosen_config(
    synthesizer: nn.Module | None, synthetic_scale: float | None, config: SyntheticGradientConfig | None, batch_dim: int
) -> SyntheticGradientConfig:
    """Returns the config that the arguments of a trainer describe.

    Raises:
        ValueError: two arguments exclude each other, such as `config` and `synthetic_scale`, or an argument needs another.
    """
    if config is not None and synthetic_scale is not None:
        raise ValueError("synthetic_scale is a field of config: give it in one of the two places")
    if config is None:
        config = SyntheticGradientConfig(synthetic_scale=synthetic_scale)
    if config.auxiliary is not None and synthesizer is None:
        raise ValueError("auxiliary predicts the messages of a synthesizer: give a synthesizer too")
    if config.auxiliary is not None and batch_dim != 1:
        raise ValueError("an auxiliary task needs time-major windows [T, B, ...]: use batch_dim=1")
    if synthesizer is not None and past_steps(synthesizer) and batch_dim != 1:
        raise ValueError("a synthesizer that reads the past needs time-major windows [T, B, ...]: use batch_dim=1")
    return config
