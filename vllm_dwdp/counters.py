"""Counters: what a rank reports of its forwards and copies. Nothing is decided by them."""

import dataclasses

from vllm_dwdp.schedule import DIRECT, DISPATCHED, STREAMED, View


@dataclasses.dataclass(kw_only=True)
class Counters:
    """Totals since the start; captures count nothing, as they run nothing."""

    forwards: dict[View, int] = dataclasses.field(default_factory=lambda: {DIRECT: 0, STREAMED: 0, DISPATCHED: 0})
    replays: int = 0  # the streamed forwards that were replays of graphs
    prefetched_bytes: int = 0  # those that peers served
    refills: int = 0  # layers that were not in their slot when they were needed
    drafts: dict[View, int] = dataclasses.field(default_factory=lambda: {DIRECT: 0, STREAMED: 0})  # eager forwards of a draft's layers
    _streamed_before: int = 0  # this step

    def begin_step(self) -> None:
        self._streamed_before = self.forwards[STREAMED]

    def end_step(self, replayed_bytes: int | None) -> None:
        """Count the step's forward, unless it was eager and streamed: that is counted already.

        `replayed_bytes` are those that a streamed graph copied, None if the step launched none.
        """
        if self.forwards[STREAMED] > self._streamed_before:
            return
        self.forwards[DIRECT if replayed_bytes is None else STREAMED] += 1
        if replayed_bytes is not None:
            self.replays += 1
            self.prefetched_bytes += replayed_bytes


@dataclasses.dataclass
class Stats:
    """What one rank has done in the convoy."""

    timeouts: list[int]  # by rank: how often it was waited for in vain
    rounds: int = 0
    helper_rounds: int = 0
    participants: int = 0  # over all rounds
    alone: int = 0
    waited_s: float = 0.0
