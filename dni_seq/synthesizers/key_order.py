"""KeyOrder: the order in which a synthesizer reads the entries of dict states, kept with its parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dni_seq.core import states
from dni_seq.core.states import State


class KeyOrder(nn.Module):
    """Brings the entries of triggers into one order, so that a parameter always belongs to the same entry.

    The order is that of `like`, or without `like` that of the first trigger with keys. If there are keys, the state dict
    holds their order as an entry "keys", a text in a tensor of bytes. A state dict of an older version has no such entry.
    The order is then found as for a new module.

    Args:
        like: a nest whose order never changes, such as an example of the state. None for the order of the first trigger.
    """

    def __init__(self, like: State | None = None) -> None:
        super().__init__()
        self._fixed = like is not None
        self._keyed = states.has_keys(like)
        self._places = states.paths(like)

    def arrange(self, trigger: State) -> State:
        """Returns `trigger` with its entries in the order of this module.

        Raises:
            ValueError: the keys are not those of the first trigger, or of the example.
        """
        if not self._keyed and not states.has_keys(trigger):
            return trigger
        places = states.paths(trigger)
        if not self._keyed and not self._fixed:
            self._keyed, self._places = True, places
        if places == self._places:
            return trigger
        states.check_keys(places, self._places, "the trigger", "the example" if self._fixed else "the first trigger")
        return states.order_by_paths(trigger, self._places)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self._keyed:
            destination[prefix + "keys"] = torch.tensor(list("\n".join(self._places).encode()), dtype=torch.uint8)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        text = state_dict.get(prefix + "keys")
        saved = [] if text is None else bytes(text.tolist()).decode().split("\n")
        if not self._fixed:
            self._keyed, self._places = bool(saved), saved
        elif saved and saved != self._places:
            error_msgs.append(
                f"the saved synthesizer has the entries {', '.join(saved)} in this order, this one "
                f"{', '.join(self._places)}: build it from an example like the saved one"
            )
