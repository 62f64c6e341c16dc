"""The GPU check on the CPU: its lines, its page, and what it says of a device that computes something else."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest
import torch

from dni_seq.app.gpu_check import check, learners, parts

CPU = ["--device", "cpu", "--quick"]

pytestmark = pytest.mark.usefixtures("one_thread")


def test_lines_and_page(tmp_path, capsys):
    results, page = tmp_path / "lines.jsonl", tmp_path / "page.md"
    files = ["--results", str(results), "--page", str(page)]
    assert check.main([*CPU, "--parts", "identities", "synchronisation", "reach", *files]) == 0
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    compared = [line["kind"] for line in lines if line["part"] == "identities"]
    assert compared == [*learners.KINDS, "exact messages give full BPTT"]
    assert all(line["passed"] for line in lines if "passed" in line)
    assert all("CPU" in line["device"] and line["torch"] == torch.__version__ for line in lines)
    reach = [line["reach"] for line in lines if line["part"] == "reach"]
    assert reach == [40, 40, 40, 4]
    assert [line for line in page.read_text().splitlines() if line.startswith("## ")] == [
        "## Identities",
        "## Synchronisation",
        "## Reach",
    ]
    assert capsys.readouterr().out.splitlines()[-1] == f"{len(lines)} lines, 0 failed"


def test_a_device_that_computes_something_else_fails(monkeypatch, capsys):
    """Here the second of two trainings, which is the device's, starts from other weights."""
    made = parts.trainer_of
    count = [0]

    def other(*arguments, **settings):
        trainer = made(*arguments, **settings)
        count[0] += 1
        if count[0] % 2 == 0:
            with torch.no_grad():
                next(trainer.model.parameters()).mul_(1 + 1e-6)
        return trainer

    monkeypatch.setattr(parts, "trainer_of", other)
    assert check.main([*CPU, "--parts", "identities"]) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()[:-1]]
    assert not any(line["passed"] for line in lines[:-1])
    assert lines[-1]["passed"]


def test_a_part_that_fails_leaves_the_others(monkeypatch, capsys):
    def broken(setting):
        raise RuntimeError("out of memory\nand more")
        yield

    monkeypatch.setattr(check, "PARTS", {**check.PARTS, "identities": check.Part(broken, 1, 1)})
    assert check.main([*CPU, "--parts", "identities", "synchronisation"]) == 1
    first, second, _ = capsys.readouterr().out.splitlines()
    assert json.loads(first) == {"part": "identities", "passed": False, "error": "RuntimeError: out of memory"}
    assert "skipped" in json.loads(second)


def test_a_part_ends_with_its_time():
    over = parts.Setting(torch.device("cpu"), quick=True, until=-math.inf)
    assert [line["kind"] for line in parts.costs(over)] == []
    assert list(parts.memory_by_reach(over)) == []


def test_a_device_that_is_not_there_is_one_line(capsys):
    assert check.main(["--device", "cuda:77", "--quick"]) == 2
    assert "gpu_check: error: --device cuda:77 cannot be used: " in capsys.readouterr().err


def test_it_needs_torch_alone():
    code = "import sys\nfor name in ('datasets', 'tensorboard', 'sentencepiece'): sys.modules[name] = None\n"
    code += "from dni_seq.app.gpu_check.check import main\n"
    code += "sys.exit(main(['--device', 'cpu', '--quick', '--parts', 'identities', 'copying']))"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stdout + result.stderr
