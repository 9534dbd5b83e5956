"""Costs: what a layer is expected to take streamed, direct and dispatched, and from that which steps dispatch.

A layer here is a decoder layer: its experts and the rest of it (attention and so on). Rates are fitted by hand to what
was measured on two GPUs; nothing is measured at start. Formats that compute in more bits than they store take longer.
"""

import dataclasses
import math

LEAST_PATIENCE_S, MOST_PATIENCE_S = 2e-3, 0.3
TILE_ROWS = 64  # of an expert, for which a kernel reads its weights once; a GPU's cache is taken to keep none that are a peer's
WORTH = 0.1  # the part of a step that dispatching must save: costs leave out meeting, and peers that come late


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """One GPU. Latencies in microseconds; rates in bytes a microsecond, that is MB/s."""

    link: float  # copy engines, all ranks at once
    direct: float  # a kernel reading peers' experts in place
    memory: float  # a kernel reading local experts, or writing and reading activations
    compute: float  # bytes of experts times the rows that they are applied to
    exchange: float  # rows pushed to peers, and partial sums pushed back
    rest: float  # bytes of a layer's hidden states that the rest of the layer works through
    experts_us: float  # the least that a layer's experts take
    dispatch_us: float  # the same when they are masked, beyond experts_us
    exchange_us: float  # the least that both exchanges take
    rest_us: float  # the least that the rest of a layer takes
    launch_us: float  # what a layer takes the host without a graph
    drag: float  # what copying beside computing adds, as a part of the copies' time


H100 = Rates(  # stands for every GPU: faster links have come with faster GPUs
    link=370e3, direct=296e3, memory=2.9e6, compute=408e6, exchange=265e3, rest=22e3,
    experts_us=8, dispatch_us=15, exchange_us=16, rest_us=90, launch_us=2300, drag=0.16,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
    """A model of `num_layers` MoE layers alike on ranks that each own `1 / size` of the experts, without residents.

    `expert_bytes` are one expert's, in all streamed tensors; `itemsize` is an activation's. Tokens are taken to choose
    experts evenly. Steps of up to `graph_tokens` have a graph, which dispatches or, alone, reads in place; without graphs, 0, a
    host's launches are left out. Results are microseconds a layer.
    """

    rates: Rates
    num_layers: int
    num_experts: int
    top_k: int
    expert_bytes: int
    hidden_size: int
    itemsize: int
    size: int
    graph_tokens: int = 0

    def rest_us(self, own: int) -> float:
        """All of a layer but its experts, for `own` rows."""
        return self.rates.rest_us + self._row_bytes(own) / self.rates.rest

    def local_us(self, own: int) -> float:
        """All experts in this rank's memory: what no rank of a group can go below alone."""
        return self.rest_us(own) + self._experts_us(own, own, 1.0, 0.0)

    def streamed_us(self, own: int) -> float:
        """Copies of remote experts take as long whatever `own` is; a large step hides them. Each slows the other."""
        copies = self.num_experts * (1 - 1 / self.size) * self.expert_bytes / self.rates.link
        return max(copies, self.local_us(own)) + self.rates.drag * copies

    def direct_us(self, own: int) -> float:
        return self.rest_us(own) + self._experts_us(own, own, 1 / self.size, 1 - 1 / self.size)

    def dispatched_us(self, own: int, rows: int, members: int) -> float:
        """`own` rows in a round of `rows` in all among `members` ranks; experts of other ranks are read in place.

        Sums that others push back, all at once, take as long as own ones for their rows, or more where they have none.
        """
        sent = self._row_bytes(own * (members - 1) + max(rows - own, own)) if members > 1 else 0
        exchanges = self.rates.exchange_us + sent / self.rates.exchange
        experts = self._experts_us(own, rows, 1 / self.size, 1 - members / self.size)
        return self.rest_us(own) + self.rates.dispatch_us + experts + exchanges

    def saved_us(self, own: int) -> float:
        """What a step of `own` rows gains a layer in a round of all ranks that have as many each; negative if it loses."""
        return self.alone_us(own) - self.dispatched_us(own, self.size * own, self.size)

    def alone_us(self, own: int) -> float:
        """Without peers. A graph of that size dispatches: alone it reads in place, and what is streamed is launched."""
        if own > self.graph_tokens:
            return min(self.streamed_us(own), self.direct_us(own))
        return min(max(self.streamed_us(own), self.rates.launch_us), self.dispatched_us(own, own, 1))

    def max_tokens(self, bound: int) -> int:
        """The largest step of at most `bound` tokens that gains enough by going with alike peers; 0 if none does."""
        return next((own for own in range(bound, 0, -1) if self.saved_us(own) > WORTH * self.alone_us(own)), 0)

    def helped_max_tokens(self, bound: int) -> int:
        """The largest step of at most `bound` tokens that gains enough with every other rank's help; 0 if none does."""
        def gains(own: int) -> bool:
            launched_us = self.rates.launch_us if 0 < self.graph_tokens < own else 0.0  # with help and alone
            helped_us = self.dispatched_us(own, own, self.size)
            return max(helped_us, launched_us) < (1 - WORTH) * max(self.alone_us(own), launched_us)

        return next((own for own in range(bound, 0, -1) if gains(own)), 0)

    def in_place_max_tokens(self) -> int:
        """The largest step that takes no longer alone in a graph, which reads in place, than streamed."""
        sizes = range(1, self.graph_tokens + 1)
        return next((own - 1 for own in sizes if self.dispatched_us(own, own, 1) > self.alone_us(own)), self.graph_tokens)

    def patience_s(self, num_tokens: int) -> float:
        """Seconds that a step may wait for its peers: what it gains over all layers if all are alike, within bounds."""
        gained = self.num_layers * self.saved_us(num_tokens) * 1e-6
        return min(max(gained, LEAST_PATIENCE_S), MOST_PATIENCE_S)

    def helped_s(self, num_tokens: int) -> float:
        """Seconds on the device that a step takes with which all other ranks help."""
        return self.num_layers * self.dispatched_us(num_tokens, num_tokens, self.size) * 1e-6

    def alone_s(self, num_tokens: int) -> float:
        """Seconds that a step takes which goes without peers."""
        return self.num_layers * self.alone_us(num_tokens) * 1e-6

    def spare_s(self, num_tokens: int) -> float:
        """Seconds that a large step may wait for all other ranks: half of what they save it."""
        return max(self.alone_s(num_tokens) - self.helped_s(num_tokens), 0.0) / 2

    def _experts_us(self, own: int, rows: int, near: float, far: float) -> float:
        """Experts that `rows` reach in the part `near` of them, here, and `own` rows in the part `far`, at peers."""
        read = self._reached(rows) * near * self.expert_bytes / self.rates.memory
        times = max(1.0, own * self.top_k / self.num_experts / TILE_ROWS)
        far_read = times * self._reached(own) * far * self.expert_bytes / self.rates.direct
        applied = self.top_k * (rows * near + own * far)
        compute = applied * self.expert_bytes / self.rates.compute
        written = 2 * self.top_k * self._row_bytes(rows) / self.rates.memory  # and read, for every expert of a row
        return self.rates.experts_us + math.hypot(max(read, far_read), compute) + written

    def _reached(self, rows: int) -> float:
        """How many experts `rows` are expected to choose among them."""
        return self.num_experts * (1 - (1 - self.top_k / self.num_experts) ** rows)

    def _row_bytes(self, rows: int) -> int:
        return rows * self.hidden_size * self.itemsize
