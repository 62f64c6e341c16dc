"""Compares training in two processes, each on its own GPU or on the CPU, with training in one process.

`python -m dni_seq.app.gpu_check.ranks KIND FOLDER` runs one of the two processes; see `main`. The environment variables RANK
and LOCAL_RANK say which one.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dni_seq.app.gpu_check.learners import future, windows
from dni_seq.distributed.data_parallel import DataParallel
from dni_seq.distributed.process_group import init_distributed
from dni_seq.models.language_model import LanguageModel, token_losses
from dni_seq.trainer import SequenceTrainer

LANES, STEPS, COUNT = 8, 4, 20


def train(device: torch.device, parallel: DataParallel | None) -> Tensor:
    """Trains in float64 with the default synthesizer for `COUNT` windows and returns the model's parameters, on the CPU."""
    torch.manual_seed(0)
    model = LanguageModel(50, embed=16, hidden=16, layers=1).double().to(device)
    synthesizer = future(model, STEPS).to(device, torch.float64)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
    learned = torch.optim.Adam(synthesizer.parameters(), 1e-3, fused=True)
    settings: dict[str, Any] = {"synthesizer": synthesizer, "synthesizer_optimizer": learned, "clip": 1.0}
    trainer = SequenceTrainer(model, optimizer, token_losses, parallel=parallel, **settings)
    for window in windows(COUNT, STEPS, LANES, 50, 2 * STEPS, device):
        mine = window if parallel is None else parallel.window(window)
        trainer.step(mine.inputs, mine.targets, lookahead=mine.lookahead)
    return torch.cat([parameter.detach().cpu().flatten() for parameter in model.parameters()])


def compare(kind: str, seconds: float) -> dict[str, Any]:
    """Trains in two processes and in one, and returns a line with the largest difference of the parameters.

    Args:
        kind: "cuda" for one GPU per process and NCCL, "cpu" for the CPU and gloo.
        seconds: time limit of the two processes.
    """
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
        probe.close()
        processes = []
        for rank in range(2):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
            command = [sys.executable, "-m", "dni_seq.app.gpu_check.ranks", kind, folder]
            paths = os.pathsep.join([str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")])
            environment = os.environ | place | {"MASTER_PORT": port, "PYTHONPATH": paths.strip(os.pathsep)}
            processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
        try:
            errors = [process.communicate(timeout=max(seconds, 1))[1] for process in processes]
        except subprocess.TimeoutExpired:
            return {"ranks": 2, "passed": False, "error": f"no answer in {seconds:.0f} s"}
        finally:
            for process in processes:
                process.kill()
        if any(process.returncode for process in processes):
            last = [error.strip().splitlines()[-1] for error in errors if error.strip()]
            return {"ranks": 2, "passed": False, "error": "; ".join(last)}
        found = [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(2)]
    alone = train(torch.device(kind if kind == "cpu" else "cuda:0"), None)
    error = max(float((each - alone).abs().max() / alone.abs().max()) for each in found)
    backend = "gloo" if kind == "cpu" else "nccl"
    return {"ranks": 2, "backend": backend, "largest_relative_difference": error, "passed": error < 1e-9}


def main(kind: str, folder: str) -> None:
    """Trains as one of two ranks, and saves the parameters in `folder`. For `kind` see `compare`."""
    torch.set_num_threads(1)
    device = torch.device("cpu" if kind == "cpu" else f"cuda:{os.environ['LOCAL_RANK']}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with init_distributed(60.0) as ranks:
        torch.save(train(device, DataParallel(ranks)), Path(folder) / f"{ranks.rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
