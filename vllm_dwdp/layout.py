"""Layout: the pages of one full tensor - which lie in the shard, which in a slot, and where each is copied from.

A driver maps whole pages only, while a rank's range of experts may begin and end inside a page. Such an edge page is
held by every owner that touches it and is complete in each of them: `fills` lists the bytes an owner lacks. Pages are
cut into segments wherever some rank's owned or held pages begin or end: a driver maps a block whole or not at all, so
every reader must be able to map each segment from one owner.

    bytes   0 .......... s*b ................ e*b .......... E*b
    pages   |  missing  |edge|   shard   |edge|   missing    |
"""

import dataclasses
import functools
import itertools

from vllm_dwdp.placement import Placement


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Pages of one [E, ...] tensor whose experts take `expert_bytes` each; `residents` are this layer's cached ones."""

    placement: Placement
    expert_bytes: int
    page_bytes: int
    residents: int = 0

    @property
    def total_bytes(self) -> int:
        return self.placement.num_experts * self.expert_bytes

    def bytes_of(self, experts: range) -> range:
        return range(experts.start * self.expert_bytes, experts.stop * self.expert_bytes)

    def pages_of(self, experts: range) -> range:
        """Every page that a byte of `experts` touches."""
        span = self.bytes_of(experts)
        return range(span.start // self.page_bytes, -(-span.stop // self.page_bytes))

    def owned_pages(self, rank: int) -> range:
        return self.pages_of(self.placement.owned(rank))

    def held_pages(self, rank: int) -> range:
        return self.pages_of(self.placement.held(rank, self.residents))

    @functools.cached_property
    def cuts(self) -> list[int]:
        """Page numbers at which some rank's owned or held pages begin or end, ascending, from 0 to the page count."""
        edges = {self.pages_of(range(self.placement.num_experts)).stop, 0}
        for rank in range(self.placement.size):
            for pages in (self.owned_pages(rank), self.held_pages(rank)):
                edges |= {pages.start, pages.stop}
        return sorted(edges)

    def segments(self, rank: int) -> list[range]:
        """The physical blocks that `rank` exports: its owned pages, cut."""
        return split(self.owned_pages(rank), self.cuts)

    def missing(self, rank: int) -> tuple[range, range]:
        """The pages below and above those held: what is streamed into a slot. Either may be empty."""
        held = self.held_pages(rank)
        return range(held.start), range(held.stop, self.cuts[-1])

    def sources(self, rank: int, pages: range) -> list[tuple[int, range]]:
        """(owner, pages) pieces that cover `pages`, each within one segment of that owner."""
        return [(self._server(rank, piece), piece) for piece in split(pages, self.cuts)]

    def fills(self, rank: int) -> list[tuple[int, range]]:
        """(owner, bytes) pieces that `rank` holds without owning: the edges of its edge pages, and its residents."""
        held = self.held_pages(rank)
        span = range(held.start * self.page_bytes, min(held.stop * self.page_bytes, self.total_bytes))
        own = self.bytes_of(self.placement.owned(rank))
        owners = [self.bytes_of(self.placement.owned(peer)) for peer in range(self.placement.size)]
        cuts = sorted({edge for owner in owners for edge in (owner.start, owner.stop)})
        pieces = []
        for part in (range(span.start, own.start), range(own.stop, span.stop)):
            for piece in split(part, cuts):
                holders = [r for r, b in enumerate(owners) if b.start <= piece.start and piece.stop <= b.stop]
                pieces.append((self.placement.server(rank, holders), piece))
        return pieces

    def _server(self, rank: int, piece: range) -> int:
        owners = [r for r in range(self.placement.size) if covers(self.owned_pages(r), piece)]
        return self.placement.server(rank, owners)


def covers(outer: range, inner: range) -> bool:
    return outer.start <= inner.start and inner.stop <= outer.stop


def split(span: range, cuts: list[int]) -> list[range]:
    """`span` cut at every number of the ascending `cuts` that lies inside it; [] for an empty span."""
    edges = [span.start, *(c for c in cuts if span.start < c < span.stop), span.stop]
    return [range(a, b) for a, b in itertools.pairwise(edges) if a < b]


def interleave(pieces: list[tuple[int, range]], rank: int, size: int, slice_bytes: int) -> list[range]:
    """The order in which `rank` copies byte ranges: sources from rank + 1 on, then one slice of each in turn.

    Whole pieces when `slice_bytes` is 0. Rotation keeps N ranks from pulling on one source at once; slices bound the
    time for which a collision lasts.
    """
    queues: list[list[range]] = []
    for source in sorted({owner for owner, _ in pieces}, key=lambda owner: (owner - rank) % size):
        queue: list[range] = []
        for owner, piece in pieces:
            if owner == source:
                step = slice_bytes or len(piece)
                queue += [range(at, min(at + step, piece.stop)) for at in range(piece.start, piece.stop, step)]
        queues.append(queue)
    if not slice_bytes:
        return [piece for queue in queues for piece in queue]
    return [queue[turn] for turn in range(max(map(len, queues), default=0)) for queue in queues if turn < len(queue)]
