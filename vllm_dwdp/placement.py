"""Placement: which rank owns which experts, which are resident, who serves whom. Pure arithmetic, no torch."""

import dataclasses

from vllm_dwdp.errors import DWDPError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """Owners of one layer's experts.

    Rank r owns the contiguous range `owned(r)`. Without `experts_per_rank` the ranges are disjoint and their sizes
    differ by at most one; with it every rank owns that many experts and neighbouring ranges overlap.
    """

    num_experts: int
    size: int
    experts_per_rank: int | None = None

    def __post_init__(self) -> None:
        if self.size > self.num_experts:
            raise DWDPError(
                f"{self.size} ranks cannot share {self.num_experts} experts: every rank must own one; "
                f"use at most {self.num_experts} (--data-parallel-size)"
            )
        least = -(-self.num_experts // self.size)
        if self.experts_per_rank is not None and not least <= self.experts_per_rank <= self.num_experts:
            raise DWDPError(
                f"experts_per_rank is {self.experts_per_rank}: {self.num_experts} experts over {self.size} ranks need {least} to "
                f"{self.num_experts} on each; choose one of those, or leave it out"
            )

    def owned(self, rank: int) -> range:
        """The experts that `rank` permanently holds as their owner."""
        if self.experts_per_rank is None:
            return range(rank * self.num_experts // self.size, (rank + 1) * self.num_experts // self.size)
        start = rank * (self.num_experts - self.experts_per_rank) // max(self.size - 1, 1)
        return range(start, start + self.experts_per_rank)

    def held(self, rank: int, residents: int) -> range:
        """Owned plus `residents` resident experts: the owned range grown on both sides, clipped to the layer."""
        own = self.owned(rank)
        count = min(len(own) + residents, self.num_experts)
        start = min(max(own.start - residents // 2, 0), self.num_experts - count)
        return range(min(start, own.start), min(start, own.start) + count)

    def server(self, reader: int, owners: list[int]) -> int:
        """The owner that serves `reader`: the first one after it, counting round the group."""
        return min(owners, key=lambda owner: (owner - reader) % self.size)


def spread_residents(total: int, num_layers: int) -> list[int]:
    """Resident experts per layer so that the longest remaining prefetch is shortest: counts differ by at most one."""
    base, extra = divmod(total, num_layers)
    return [base + (layer < extra) for layer in range(num_layers)]
