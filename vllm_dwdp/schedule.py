"""Schedule: which slot a layer uses and what follows it there, and which view a forward has. Arithmetic only."""

import dataclasses
import math
from typing import Literal

View = Literal["direct", "streamed", "dispatched"]
DIRECT: View = "direct"
STREAMED: View = "streamed"
DISPATCHED: View = "dispatched"  # tokens travel; what a rank computes it reads in the direct view

# Reading in place moves the experts that a batch routes to, streaming moves all; the SMs read a peer at about this
# part of the copy engines' speed less what the local experts cost meanwhile (two H100s, NVLink 4).
DIRECT_BREAK_EVEN = 0.75


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """Layer ordinals count from 0 in the order in which a forward runs the layers. At most `max_slots` slots.

    Ordinals from `num_layers` on are a draft model's layers, of which a forward of its own may run any, any number of
    times. Such a layer is copied into its slot when it is needed, and the slot then gets back what it held.
    """

    num_layers: int
    max_slots: int

    @property
    def num_slots(self) -> int:
        return min(self.max_slots, self.num_layers)

    @property
    def first(self) -> range:
        """The layers that a forward finds in the slots, in the order of the slots."""
        return range(self.num_slots)

    def slot(self, ordinal: int) -> int:
        return ordinal % self.num_slots

    def following(self, ordinal: int) -> int:
        """The layer that uses the slot next: one of this forward, else the slot's first of the next forward."""
        later = ordinal + self.num_slots
        return later if later < self.num_layers else self.slot(ordinal)

    def is_draft(self, ordinal: int) -> bool:
        return ordinal >= self.num_layers

    def is_last(self, ordinal: int) -> bool:
        return ordinal == self.num_layers - 1

    def is_alone(self, ordinal: int) -> bool:
        """No other layer uses the slot, so it is filled once."""
        return self.following(ordinal) == ordinal


def view_of(num_rows: int, direct_max_tokens: int) -> View:
    """The view of a forward whose first layer has `num_rows` rows."""
    return DIRECT if num_rows <= direct_max_tokens else STREAMED


def default_direct_max_tokens(num_experts: int, top_k: int) -> int:
    """The batch that routes to `DIRECT_BREAK_EVEN` of the experts, if tokens choose `top_k` of them evenly."""
    if top_k >= num_experts:
        return 1
    return max(int(math.log(1 - DIRECT_BREAK_EVEN) / math.log(1 - top_k / num_experts)), 1)
