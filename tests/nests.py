"""Comparing nests, such as checkpoints."""

from __future__ import annotations

from typing import Any

import torch


def assert_same(one: Any, two: Any, name: str = "nest") -> None:
    """Equal nests of dicts, lists and tuples: tensors bit for bit, NaN equal to NaN; `name` says where in the message."""
    if isinstance(one, dict):
        assert one.keys() == two.keys(), name
        for key in one:
            assert_same(one[key], two[key], f"{name}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two), name
        for index, (a, b) in enumerate(zip(one, two, strict=True)):
            assert_same(a, b, f"{name}[{index}]")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == two.dtype, name
        assert torch.equal(one.isnan(), two.isnan()), name
        assert torch.equal(one.nan_to_num(), two.nan_to_num()), name
    else:
        assert one == two or (one != one and two != two), name
