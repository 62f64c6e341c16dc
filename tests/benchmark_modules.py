"""Imports modules of benchmarks/, which is no package."""

from __future__ import annotations

import importlib.util
from types import ModuleType

from tests.paths import ROOT


def load(name: str) -> ModuleType:
    """Returns the module of `benchmarks/NAME.py`."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
