"""TrainerDescription: which optimizer trains each parameter, and which gradients reach it.

Legend: T = window length in steps, B = lanes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from dni_seq.core import states
from dni_seq.core.optimizer_step import parts_of
from dni_seq.core.snapshot import undo_runs
from dni_seq.core.windows import Window
from dni_seq.credit.synthetic_gradient import SyntheticCredit
from dni_seq.credit.window_checks import check_window
from dni_seq.credit.window_runner import WindowRunner

Source = Literal["window", "message", "auxiliary task", "own loss"]
"""Where a gradient comes from: the loss of the window, the gradient injected into its last state, the loss of the auxiliary
task, or the loss that trains a synthesizer."""


@dataclass(frozen=True)
class ParameterDescription:
    """What trains one parameter.

    Attributes:
        part: "model", "loss_fn", "synthesizer", "auxiliary task", or "other" for a parameter that only an optimizer holds.
        name: the parameter's name within its part.
        size: the parameter's number of elements.
        optimizer: the optimizer that holds the parameter, "model's" or "synthesizer's"; None if no optimizer holds it.
        gradients: which gradients reach the parameter; None if this is unknown, because no window was given.
        idle: the reason why the parameter is not trained; None if no such reason was found.
    """

    part: str
    name: str
    size: int
    optimizer: Literal["model's", "synthesizer's"] | None
    gradients: tuple[Source, ...] | None
    idle: str | None

    @property
    def module(self) -> str:
        """The part and the name of the submodule that holds the parameter, or the part alone."""
        inside, dot, _ = self.name.partition(".")
        return f"{self.part}.{inside}" if dot else self.part


class _Row(NamedTuple):
    """One line of the table; parameters with the same row are counted together."""

    module: str
    optimizer: str
    gradients: str


@dataclass(frozen=True, repr=False)
class TrainerDescription:
    """The result of `SequenceTrainer.describe`. `print` shows a table by module.

    Attributes:
        parameters: the parameters of the model, of a `loss_fn` that is a module, of the synthesizer and of the auxiliary
            task, and all others that an optimizer holds.
    """

    parameters: tuple[ParameterDescription, ...]

    @property
    def idle(self) -> tuple[ParameterDescription, ...]:
        """The parameters that are not trained."""
        return tuple(each for each in self.parameters if each.idle is not None)

    def lines(self) -> list[str]:
        """Returns the lines of the table: module, number of parameters, optimizer, and gradients or why there are none."""
        groups: dict[_Row, list[int]] = {}
        for each in self.parameters:
            reached = "unknown without a window" if each.gradients is None else " + ".join(each.gradients)
            gradients = reached if each.idle is None else f"not trained: {each.idle}"
            groups.setdefault(_Row(each.module, each.optimizer or "none", gradients), []).append(each.size)
        rows = [("module", "parameters", "optimizer", "gradient")]
        rows += [(r.module, f"{len(s)} ({sum(s):,} values)", r.optimizer, r.gradients) for r, s in groups.items()]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        return ["  ".join([*(f"{row[c]:{widths[c]}}" for c in range(3)), row[3]]) for row in rows]

    def __repr__(self) -> str:
        return "\n".join(self.lines())


def describe(
    runner: WindowRunner, optimizer: torch.optim.Optimizer, credit: SyntheticCredit | None, window: Window | None
) -> TrainerDescription:
    """Describes what trains each parameter; see `SequenceTrainer.describe`.

    Args:
        runner: runs the model.
        optimizer: the model's optimizer.
        credit: the trainer's synthetic credit, or None.
        window: the model runs on this window once for each source of gradients, and a backward pass from the source finds
            the parameters that it reaches. With None the gradients of the model's parameters are unknown. On several ranks
            this may be a collective call.

    Raises:
        ValueError: the shapes in the window do not agree.
    """
    optimizers = {"model's": optimizer, "synthesizer's": None if credit is None else credit.optimizer}
    holders = {id(p): name for name, each in optimizers.items() for p in _parameters(each)}
    without = {parameter for each in optimizers.values() for parameter in _without_gradient_so_far(each)}
    named = _named_parameters(runner, credit, [p for each in optimizers.values() for p in _parameters(each)])
    own = {"synthesizer", "auxiliary task"}
    measured = [parameter for part, _, parameter in named if part not in own and parameter.requires_grad]
    reached = None if window is None else _gradients(runner, credit, window, measured)
    found = []
    for part, name, parameter in named:
        gradients: tuple[Source, ...] | None = ("own loss",)
        if part not in own:
            gradients = None if reached is None else reached.get(id(parameter), ())
        holder = holders.get(id(parameter))
        idle = _idle(parameter, holder, gradients, so_far=id(parameter) not in without)
        found.append(ParameterDescription(part, name, parameter.numel(), holder, gradients, idle))  # type: ignore[arg-type]
    return TrainerDescription(tuple(found))


def _idle(parameter: Tensor, holder: str | None, gradients: tuple[Source, ...] | None, *, so_far: bool) -> str | None:
    """Returns why a parameter is not trained, or None."""
    if not parameter.requires_grad:
        return "requires_grad is False"
    if holder is None:
        return "in no optimizer"
    if gradients == ():
        return "no gradient reaches it"
    return None if so_far else "no gradient so far"


def _named_parameters(
    runner: WindowRunner, credit: SyntheticCredit | None, held: list[Tensor]
) -> list[tuple[str, str, Tensor]]:
    """Returns part, name and parameter of all parameters, each once; `held` are the parameters of the optimizers."""
    parts: dict[str, object] = {"model": runner.model, "loss_fn": runner.loss_fn}
    if credit is not None:
        parts |= {"synthesizer": credit.synthesizer, "auxiliary task": credit.auxiliary}
    found: dict[int, tuple[str, str, Tensor]] = {}
    for part, module in parts.items():
        if isinstance(module, nn.Module):
            for name, parameter in module.named_parameters():
                name = name.replace("_orig_mod.", "")  # torch.compile wraps a module under this name
                found.setdefault(id(parameter), (part, name, parameter))
    for i, other in enumerate(held):
        found.setdefault(id(other), ("other", f"parameter {i}", other))
    return list(found.values())


def _gradients(
    runner: WindowRunner, credit: SyntheticCredit | None, window: Window, parameters: list[Tensor]
) -> dict[int, tuple[Source, ...]]:
    """Returns which gradients reach each parameter over one window, by the parameter's id."""
    check_window(window, runner.batch_dim)
    found: dict[int, tuple[Source, ...]] = {id(parameter): () for parameter in parameters}
    modules = [module for module in (runner.model, runner.loss_fn) if isinstance(module, nn.Module)]
    device = states.flatten(window.inputs)[0].device
    reduces = runner.reduces
    try:
        with ExitStack() as stack:
            for module in modules:
                stack.enter_context(undo_runs(module, device))
            for source, tensors in _sources(runner, credit, window):
                for parameter in _reached(tensors, parameters):
                    found[id(parameter)] += (source,)
    finally:
        runner.reduces = reduces
    return found


def _reached(tensors: list[Tensor], parameters: list[Tensor]) -> list[Tensor]:
    """Returns the parameters that get a gradient in a backward pass from `tensors`."""
    ends = [tensor for tensor in tensors if tensor.requires_grad]
    if not ends or not parameters:
        return []
    gradients = torch.autograd.grad(ends, parameters, [torch.ones_like(tensor) for tensor in ends], allow_unused=True)
    return [parameter for parameter, gradient in zip(parameters, gradients, strict=True) if gradient is not None]


def _sources(runner: WindowRunner, credit: SyntheticCredit | None, window: Window) -> Iterator[tuple[Source, list[Tensor]]]:
    """Yields each source of gradients, with the tensors from which its gradients start.

    The model runs again for each source, because a compiled model cannot keep its graph for a second backward pass.
    """
    auxiliary = credit is not None and credit.auxiliary is not None
    run = runner.run_in_two_parts if auxiliary else runner.run_whole
    start = states.detach(runner.initial_state(states.flatten(window.inputs)[0].shape[runner.batch_dim]))
    yield "window", [runner.loss(run(window.inputs, start)[0], window.targets, window.mask)]
    if credit is not None:
        yield "message", states.floating(run(window.inputs, start)[2])
    if auxiliary:
        yield "auxiliary task", states.floating(run(window.inputs, start)[1])


def _parameters(optimizer: torch.optim.Optimizer | None) -> list[Tensor]:
    return [] if optimizer is None else [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _without_gradient_so_far(optimizer: torch.optim.Optimizer | None) -> set[int]:
    """Returns the ids of the parameters that have had no gradient in any step; an empty set before the first step."""
    if optimizer is None:
        return set()
    parts = parts_of(optimizer)
    trained = {id(parameter) for part in parts for parameter, kept in part.state.items() if kept}
    everything = _parameters(optimizer)
    trained |= {id(parameter) for parameter in everything if parameter.grad is not None}
    return {id(parameter) for parameter in everything} - trained if trained else set()
