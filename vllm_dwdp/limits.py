"""Limits: which steps meet, what they are padded to, and for how long they wait."""

import bisect
import dataclasses
from collections.abc import Callable, Sequence

from vllm_dwdp.kernels.tokens import FEW
from vllm_dwdp.manifests import DispatchManifest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """One engine's, alike on all ranks.

    `graph_sizes` are the rows of the graphs that dispatch, ascending. `most_rows` are the most that vLLM's expert buffers hold: a
    larger round is computed in halves. A step without peers that has more than `alone_graph_tokens` runs without a graph.

    `helped_max_tokens`, no less than `max_tokens`, are of steps in which all other ranks take part; `helped_s` and `alone_s` are
    how long such a step, and one that goes without peers, are expected to take on the device; `spare_s` is how long a large step
    waits for ranks that come soon.
    """

    max_tokens: int
    helped_max_tokens: int
    most_rows: int
    graph_sizes: Sequence[int]
    alone_graph_tokens: int
    patience_s: Callable[[int], float]
    helped_s: Callable[[int], float]
    alone_s: Callable[[int], float]
    spare_s: Callable[[int], float]

    def manifest(self) -> DispatchManifest:
        """What has to be alike on all ranks, whose rows and flags lie in each other's inboxes."""
        return DispatchManifest(
            dispatch_max_tokens=self.max_tokens, helped_max_tokens=self.helped_max_tokens,
            cudagraph_capture_sizes=list(self.graph_sizes),
        )

    def padded(self, tokens: Sequence[int]) -> int:
        """What ranks with so many rows pad them to, so that all launch the same graph; 0 where none has room for all."""
        at = bisect.bisect_left(self.graph_sizes, max(tokens))
        found = self.graph_sizes[at] if at < len(self.graph_sizes) else 0
        return found if sum(tokens) <= self.rows(found, len(tokens)) else 0

    def rows(self, padded: int, size: int) -> int:
        """The rows of a graph's layers, own and received: where a step is large, the peers' are few."""
        return padded * size if padded <= self.max_tokens else min(padded * size, padded + FEW * (size - 1))
