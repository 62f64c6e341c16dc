"""What runs on the two ranks of the fixture `two_ranks`."""

from __future__ import annotations

from typing import Any

from dni_seq.distributed.process_group import Ranks
from tests.distributed.test_data_parallel import on_ranks
from tests.distributed.test_decoupled_parts import on_both_ends
from tests.distributed.test_process_group import agreement


def everything(ranks: Ranks) -> dict[str, Any]:
    return {"training": on_ranks(ranks), "ends": on_both_ends(ranks), "agreement": agreement(ranks)}
