"""Slots: what each holds and who may use it, as the host has it; in truth, and as a graph being captured will have it."""

import dataclasses
import enum
from collections.abc import Sequence
from typing import Any

from vllm_dwdp.errors import DWDPError

NOBODY = -1


class State(enum.Enum):
    LOST = "lost"  # nobody can say whose bytes it holds
    FILLED = "filled"  # a copy was enqueued: who reads the slot waits for `copy_done`
    JOINED = "joined"  # in a graph: what comes next in the graph runs after the copy as it is
    READ = "read"  # kernels that read it are being enqueued
    RELEASED = "released"  # its layer's kernels are enqueued: the layer that follows is yet to be copied


_BEFORE = {  # what a slot may have been, its layer the same; to be lost or filled, anything
    State.JOINED: {State.FILLED},
    State.READ: {State.FILLED, State.JOINED, State.READ},
    State.RELEASED: {State.READ},
}


@dataclasses.dataclass(kw_only=True)
class Slot:
    """One slot, its layer, and the events that protect this layer's bytes. An event of a graph means nothing outside."""

    is_captured: bool
    copy_done: Any  # recorded by the copy stream after the copy, waited for by the computing stream
    slot_free: Any  # recorded by the computing stream some time after the last reader, waited for by the copy stream
    ordinal: int = NOBODY  # its layer
    state: State = State.LOST

    def holds(self, ordinal: int) -> bool:
        """Whether it may be read as `ordinal`'s. A released slot is for the next layer: nobody vouches for its bytes."""
        return self.ordinal == ordinal and self.state not in (State.LOST, State.RELEASED)

    def become(self, state: State, ordinal: int) -> None:
        """To be called before the wait that makes it true.

        Raises DWDPError when the slot is another layer's, or its state has no such successor.
        """
        if self.ordinal != ordinal or self.state not in _BEFORE[state]:
            raise DWDPError(
                f"layer {ordinal} cannot be {state.value}: its slot is {self.state.value} with layer {self.ordinal}; "
                "acquire a layer before its kernels and release it after them, one layer at a time"
            )
        self.state = state


class Overlay:
    """The slots as the graph being captured will find and leave them: a capture itself moves no byte.

    A forward is captured in one graph or in pieces: the first finds the first layers, each other what was left before.
    """

    def __init__(self, slots: Sequence[Slot]):
        self.slots = slots
        self.carries = False  # some graph streams layers
        self.strays = False  # some forward's graphs do not end with the first layers
        self._first = self._committed = [(ordinal, State.JOINED) for ordinal in range(len(slots))]
        self.resume()

    def resume(self) -> None:
        """A capture begins where the last one was joined; one that was not joined has never been."""
        for slot, (ordinal, state) in zip(self.slots, self._committed, strict=True):
            slot.ordinal, slot.state = ordinal, state

    def commit(self) -> None:
        """A capture has joined its copies."""
        self._committed = [(slot.ordinal, slot.state) for slot in self.slots]

    def drop(self) -> None:
        """No capture goes on from the last one."""
        if self._committed != self._first:
            self.strays |= [ordinal for ordinal, _ in self._committed] != list(range(len(self.slots)))
            self._committed = self._first
