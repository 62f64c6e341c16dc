"""Two processes for a test: a function run on every rank of a group over loopback, its results by rank."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import torch

from tests.paths import ROOT

CODE = textwrap.dedent(
    """
    import importlib, sys, warnings
    warnings.simplefilter("error")
    import torch
    from dni_seq.distributed.process_group import init_distributed
    torch.set_num_threads(1)
    module, name, folder, timeout = sys.argv[1:]
    with init_distributed(float(timeout)) as ranks:
        result = getattr(importlib.import_module(module), name)(ranks)
        torch.save(result, f"{folder}/{name}-{ranks.size}-{ranks.rank}.pt")
    """
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun sets for a rank."""
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return (
        os.environ
        | place
        | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": paths.strip(os.pathsep),
        }
    )


def start_ranks(command: list[str], size: int, cwd: Path, port: int | None = None) -> list[subprocess.Popen]:
    """`command` of Python in every rank, without torchrun, whose own start takes as long as a test."""
    port = free_port() if port is None else port
    return [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=cwd,
            env=environment(rank, size, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def finish(processes: list[subprocess.Popen], timeout: float = 120) -> list[subprocess.CompletedProcess]:
    """Wait for every rank; whatever is left is killed."""
    try:
        done = []
        for process in processes:
            out, err = process.communicate(timeout=timeout)
            done.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
        return done
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.communicate()


def run_ranks(module: str, name: str, size: int, folder: Path, timeout: float = 120) -> list[Any]:
    """`module.name(ranks)` in `size` processes; what each returns."""
    for result in finish(start_ranks(["-c", CODE, module, name, str(folder), str(timeout)], size, folder), 400):
        assert result.returncode == 0, result.stderr
    return [torch.load(folder / f"{name}-{size}-{rank}.pt", weights_only=True) for rank in range(size)]
