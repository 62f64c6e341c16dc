"""The ranks of a run: initialises torch.distributed, provides collectives, and reports failures within a bounded time.

`torchrun` starts the processes; gloo transfers CPU tensors and NCCL transfers GPU tensors. If a rank dies, its connections
close and the other ranks fail at once. If a rank hangs, the other ranks fail after `timeout` seconds.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from dni_seq.distributed.timeout import TIMEOUT

Result = TypeVar("Result")


class RankError(RuntimeError):
    """Raised if another rank has ended or does not answer; the message is one line."""


class Ranks:
    """The ranks of a process group, with collectives; a single process is a group of one rank and never communicates.

    Every method is a collective call: all ranks call it in the same order.

    Args:
        group: the process group. None for the default group, or for a single process if torch.distributed is not
            initialised.
        timeout: seconds that ranks wait for each other in groups made by `new_group`.

    Attributes:
        rank: the rank of this process, from 0.
        size: number of ranks.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, timeout: float = TIMEOUT) -> None:
        self._group = group
        self._timeout = timeout
        there = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(group) if there else 0
        self.size = dist.get_world_size(group) if there else 1

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        """Returns self: copies share the connections of the process."""
        return self

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which logs and saves."""
        return self.rank == 0

    def new_group(self) -> dist.ProcessGroup:
        """Returns another process group of all ranks, whose messages do not mix with those of other groups."""
        with translate_dist_errors():
            return dist.new_group(timeout=timedelta(seconds=self._timeout))

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sums `tensor` over all ranks in place, and returns it.

        Raises:
            RankError: another rank has ended or does not answer. All methods that communicate raise it.
        """
        if self.size > 1:
            with translate_dist_errors():
                dist.all_reduce(tensor, group=self._group)
        return tensor

    def all_reduce_max(self, *numbers: int) -> list[int]:
        """Returns the maximum of each number over all ranks."""
        if self.size == 1:
            return list(numbers)
        found = torch.tensor(numbers)
        with translate_dist_errors():
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self._group)
        return found.tolist()

    def all_gather_cat(self, tensor: Tensor, dim: int) -> Tensor:
        """Returns the ranks' tensors, which have equal shapes, concatenated along `dim`."""
        if self.size == 1:
            return tensor
        own = tensor.to(torch.uint8 if tensor.dtype == torch.bool else tensor.dtype).contiguous()  # gloo has no bool
        pieces = [torch.empty_like(own) for _ in range(self.size)]
        with translate_dist_errors():
            dist.all_gather(pieces, own, group=self._group)
        return torch.cat(pieces, dim).to(tensor.dtype)

    def gather(self, value: Any) -> list[Any]:
        """Returns the `value` of every rank, in the order of the ranks; values must be picklable."""
        values = [value]
        if self.size > 1:
            values = [None] * self.size
            with translate_dist_errors():
                dist.all_gather_object(values, value, group=self._group)
        return values

    def run_on_all(self, work: Callable[[], Result]) -> Result:
        """Runs `work` on every rank and returns this rank's result. If `work` fails on one rank, all ranks raise an error.

        Raises:
            ValueError: `work` has raised a ValueError or OSError on some rank; the message is that of the first such rank.
        """
        result, failure = _attempted(work)
        self._raise_first(self.gather(failure))
        return result  # type: ignore[return-value]

    def broadcast_from_rank0(self, work: Callable[[], Result]) -> Result:
        """Runs `work` on rank 0 and returns its result, which must be picklable, on every rank.

        Raises:
            ValueError: `work` has raised a ValueError or OSError.
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
        """Checks that `facts` are equal on all ranks.

        Raises:
            ValueError: a rank differs from rank 0; the message names that rank and the first fact that differs.
        """
        first, *others = self.gather(dict(facts))
        for rank, found in enumerate(others, start=1):
            for name in facts:
                if found.get(name) != first.get(name):
                    raise ValueError(
                        f"rank {rank} has a different {name} than rank 0 ({_short(found.get(name))} there, "
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
    """Converts a RuntimeError of torch.distributed, such as a closed connection or a timeout, to a one-line RankError."""
    try:
        yield
    except RuntimeError as error:
        reason = (str(error).splitlines() or [""])[0].split("] ", 1)[-1].split(". This is typically")[0]
        raise RankError(f"another rank has ended, or does not answer ({reason})") from error


@contextmanager
def init_distributed(timeout: float = TIMEOUT) -> Iterator[Ranks]:
    """Initialises torch.distributed if `torchrun` has started this process, and yields the ranks of the run.

    The environment variables RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT must be set, by `torchrun` or another launcher.
    If WORLD_SIZE is missing or 1, the process is the only rank.

    Args:
        timeout: seconds to wait for the other ranks, at the start and in each later collective call.

    Raises:
        ValueError: a variable is missing, the port is in use, or the other ranks have not started in time.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    _meet(timeout)
    yield Ranks(timeout=timeout)
    # Not run after an exception: destroying the group could wait for other ranks. Connections close with the process.
    dist.destroy_process_group()


def _meet(timeout: float) -> None:
    """Initialises the default process group."""
    # If this module is first imported after the group exists, for example by torch's optimizers, its functions keep the
    # group as a default argument. The threads of the group then run until shutdown, and a thread that frees a message during
    # shutdown aborts the process.
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
            f"({(str(error).splitlines() or [''])[0]}): start all ranks, and check that they can reach this address"
        ) from error


def local_device() -> str | None:
    """Returns the GPU that LOCAL_RANK gives this rank, such as "cuda:0"; None without LOCAL_RANK or without GPUs."""
    local = os.environ.get("LOCAL_RANK")
    return None if local is None or not torch.cuda.is_available() else f"cuda:{local}"


def program() -> dict[str, Any]:
    """Returns what all ranks of a run must share: the version of torch, and a checksum of this library's source."""
    source = 0
    package = Path(__file__).parents[1]
    for path in sorted(package.rglob("*.py")):
        source = zlib.crc32(path.read_bytes(), zlib.crc32(str(path.relative_to(package)).encode(), source))
    return {"torch": torch.__version__, "source of dni_seq": f"{source:08x}"}
