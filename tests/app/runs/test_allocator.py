"""Freed memory is kept where the C library can do so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dni_seq.app.runs.allocator import keep_freed_memory

FAULTS = """
import resource, torch
from dni_seq.app.runs.allocator import keep_freed_memory
assert keep_freed_memory()
embed, project = torch.nn.Embedding(10_000, 100), torch.nn.Linear(100, 10_000)
tokens = torch.zeros(100, dtype=torch.int64)
def window():
    for module in (embed, project):
        module.zero_grad()
    torch.nn.functional.cross_entropy(project(embed(tokens)), tokens).backward()
for _ in range(30):  # until the heap, whose place is drawn anew in each process, has settled
    window()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    window()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_a_window_uses_the_memory_of_the_one_before():
    if not keep_freed_memory():
        pytest.skip("this C library is not glibc, whose options it sets")
    found = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True).stdout
    # A process that does not ask to keep them has 10,000 to 22,000 faults here as a rule; now and then, by where its heap
    # lies, as few as this one: the bound is absolute.
    assert int(found) < 5000


HUGE = """
from dni_seq.app.runs.allocator import RESERVED, keep_freed_memory
assert keep_freed_memory()
assert keep_freed_memory()  # a second time asks for no more
asked = 0
for line in open("/proc/self/smaps"):
    words = line.split()
    if "-" in words[0]:
        low, high = (int(end, 16) for end in words[0].split("-"))
    elif words[0] == "VmFlags:" and "hg" in words:
        asked += high - low
print(asked / RESERVED)
"""


def test_the_first_megabytes_of_what_is_kept_are_asked_for_in_huge_pages():
    if not keep_freed_memory():
        pytest.skip("this C library is not glibc, whose options it sets")
    switch = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not switch.exists() or "[never]" in switch.read_text(encoding="ascii"):
        pytest.skip("this system has no huge pages to give")
    found = subprocess.run([sys.executable, "-c", HUGE], capture_output=True, text=True, check=True).stdout
    assert 0.9 < float(found) < 1.1
