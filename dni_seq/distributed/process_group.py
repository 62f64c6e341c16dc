"""The processes of one run, its ranks: how they find each other, agree, and fail within a bounded time.

The engine is `torch.distributed`: `torchrun` starts the processes, gloo carries what lies on CPUs and NCCL what lies on
GPUs. A rank that dies closes its connections, which the others notice at once; one that hangs is noticed after `timeout`.
"""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

TIMEOUT = 300.0
"""Seconds that a rank waits for the others, unless told otherwise."""

Result = TypeVar("Result")


class RankError(RuntimeError):
    """Another rank has ended, or does not answer; the text is one line."""


class Ranks:
    """The ranks of a process group; one process alone is a group of one, which talks to nobody.

    Every method is a collective: all ranks call it, in the same order.

    Attributes:
        rank: of this process, from 0.
        size: number of ranks.

    Args:
        group: the process group, None for the default one, or for a process alone where there is none.
        timeout: seconds that the ranks wait for each other in groups that are made later.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, timeout: float = TIMEOUT) -> None:
        self._group = group
        self._timeout = timeout
        there = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(group) if there else 0
        self.size = dist.get_world_size(group) if there else 1

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        """The connections of a process are its own: copies of what holds them share them."""
        return self

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which logs and saves."""
        return self.rank == 0

    def new_group(self) -> dist.ProcessGroup:
        """Another group of all ranks, whose messages pair up among themselves."""
        with translate_dist_errors():
            return dist.new_group(timeout=timedelta(seconds=self._timeout))

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add `tensor` up over all ranks, in place.

        Raises:
            RankError: another rank has ended, or does not answer; so for all methods.
        """
        if self.size > 1:
            with translate_dist_errors():
                dist.all_reduce(tensor, group=self._group)
        return tensor

    def all_reduce_max(self, *numbers: int) -> list[int]:
        """The largest of each number over all ranks."""
        if self.size == 1:
            return list(numbers)
        found = torch.tensor(numbers)
        with translate_dist_errors():
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self._group)
        return found.tolist()

    def all_gather_cat(self, tensor: Tensor, dim: int) -> Tensor:
        """The ranks' tensors, all of one shape, one behind the other along `dim`."""
        if self.size == 1:
            return tensor
        own = tensor.to(torch.uint8 if tensor.dtype == torch.bool else tensor.dtype).contiguous()  # gloo has no bool
        pieces = [torch.empty_like(own) for _ in range(self.size)]
        with translate_dist_errors():
            dist.all_gather(pieces, own, group=self._group)
        return torch.cat(pieces, dim).to(tensor.dtype)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, anything that can be pickled, by rank."""
        values = [value]
        if self.size > 1:
            values = [None] * self.size
            with translate_dist_errors():
                dist.all_gather_object(values, value, group=self._group)
        return values

    def run_on_all(self, work: Callable[[], Result]) -> Result:
        """Do `work` on every rank, and fail on all of them where it fails on one.

        Raises:
            ValueError: `work` has raised a ValueError or OSError somewhere; the text is that of the first such rank.
        """
        result, failure = _attempted(work)
        self._raise_first(self.gather(failure))
        return result  # type: ignore[return-value]

    def broadcast_from_rank0(self, work: Callable[[], Result]) -> Result:
        """What `work` gives on rank 0, on every rank; it must be something that can be pickled.

        Raises:
            ValueError: as in `run_on_all`.
        """
        outcome = _attempted(work) if self.first else None
        if self.size > 1:
            box = [outcome]
            with translate_dist_errors():
                dist.broadcast_object_list(box, src=0, group=self._group)
            outcome = box[0]
        assert outcome is not None
        self._raise_first([outcome[1]])
        return outcome[0]  # type: ignore[return-value]

    def check_same(self, facts: Mapping[str, Any]) -> None:
        """Hold all ranks to the same facts.

        Raises:
            ValueError: a rank has others than rank 0; the text names it, and the first fact that differs.
        """
        first, *others = self.gather(dict(facts))
        for rank, found in enumerate(others, start=1):
            for name in facts:
                if found.get(name) != first.get(name):
                    raise ValueError(
                        f"rank {rank} has another {name} than rank 0 ({_short(found.get(name))} there, "
                        f"{_short(first.get(name))} on rank 0): start all ranks with the same program, data and options"
                    )

    def _raise_first(self, failures: list[str | None]) -> None:
        for rank, text in enumerate(failures):
            if text is not None:
                raise ValueError(text if rank == 0 else f"rank {rank}: {text}")


def _attempted(work: Callable[[], Result]) -> tuple[Result | None, str | None]:
    try:
        return work(), None
    except (ValueError, OSError) as error:
        return None, str(error) or type(error).__name__


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


@contextmanager
def translate_dist_errors() -> Iterator[None]:
    """Say in one line what it means that a rank's connection is gone, or that time is up."""
    try:
        yield
    except RuntimeError as error:
        reason = (str(error).splitlines() or [""])[0].split("] ", 1)[-1].split(". This is typically")[0]
        raise RankError(f"another rank has ended, or does not answer ({reason})") from error


@contextmanager
def init_distributed(timeout: float = TIMEOUT) -> Iterator[Ranks]:
    """The ranks of the run that this process was started for by `torchrun`; alone where it was not.

    `torchrun` says where through RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; other launchers may set them too.

    Args:
        timeout: seconds to wait for the others to come, and later to answer.

    Raises:
        ValueError: the variables are wrong, the port is in use, or the others have not come in time.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    _meet(timeout)
    yield Ranks(timeout=timeout)
    # After a failure the connections close with the process: others may wait in them, and taking them down would too.
    dist.destroy_process_group()


def leave(status: int) -> NoReturn:
    """End this process with `status`, at once where its group still stands, as after another rank's end.

    The group's threads may be waiting for the rank that is gone; an interpreter that takes them down at its end may abort.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if dist.is_available() and dist.is_initialized():
        os._exit(status)
    sys.exit(status)


def _meet(timeout: float) -> None:
    """Initialise the default process group."""
    # Imported later, by torch's optimizers say, its functions would hold this group as the default of an argument for ever.
    # Its threads then outlive it, and one that lets go of a message while Python ends aborts the process.
    import torch.distributed.nn.functional

    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ValueError(f"WORLD_SIZE is set, but not {' and '.join(missing)}: start the ranks with torchrun")
    gpus = torch.cuda.is_available() and dist.is_nccl_available()
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=timedelta(seconds=timeout))
    except (RuntimeError, ValueError) as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error):
            raise ValueError(f"the port of {where} is in use: give torchrun another one with --master-port") from error
        raise ValueError(
            f"the {os.environ['WORLD_SIZE']} ranks have not met at {where} within {timeout:g} s "
            f"({(str(error).splitlines() or [''])[0]}): start them all, and see that they can reach that address"
        ) from error


def local_device() -> str | None:
    """The GPU of this rank, by LOCAL_RANK, where the machine has them; None elsewhere."""
    local = os.environ.get("LOCAL_RANK")
    return None if local is None or not torch.cuda.is_available() else f"cuda:{local}"


def program() -> dict[str, Any]:
    """What ranks must have in common to be one run: torch, and this library's own source."""
    source = 0
    package = Path(__file__).parents[1]
    for path in sorted(package.rglob("*.py")):
        source = zlib.crc32(path.read_bytes(), zlib.crc32(str(path.relative_to(package)).encode(), source))
    return {"torch": torch.__version__, "source of dni_seq": f"{source:08x}"}
